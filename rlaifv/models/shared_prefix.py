"""The engine: a vision-language model in which every prefix is run once.

Ten samples of a prompt share its keys and values; the questions about an image, or the two
answers of a pair, are branches of one row. What a model family does differently lies in its
`VisionSide`.

Shapes:  B rows;  L tokens of a row;  P tokens of a prompt;  M positions that are read;  E width;
V vocabulary.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlaifv.errors import ArtifactError
from rlaifv.models.base import (
    NO,
    NOT_FINITE,
    YES,
    Branches,
    Decoding,
    Floats,
    Generation,
    ImageQuestions,
    Prompt,
    TokenLogp,
    YesNo,
)
from rlaifv.models.batches import batches
from rlaifv.models.branches import (
    BranchBatch,
    TokenRow,
    TrainableModel,
    answer_sources,
    end_sources,
    question_rows,
    split_answers,
    to_device,
    to_host,
)
from rlaifv.models.decoder import Decoder
from rlaifv.models.generation import generate
from rlaifv.models.prompting import Images, Prompter

MAX_BRANCH_TOKENS = 4096
"""Most question tokens in a row: a mask in full grows with the square of the row."""


class VisionSide(Protocol):
    """How a family sees; the rest of it is a decoder."""

    @property
    def module(self) -> PreTrainedModel: ...

    def features(self, pixels: Tensor) -> Tensor:
        """Of the vision tower, before whatever may be trained; one entry per image."""
        ...

    def merge(self, ids_BL: Tensor, features: Tensor, image_of_row_B: Tensor) -> Tensor:
        """Embeddings [B, L, E] of rows with one image each."""
        ...

    def full_logits(self, ids_L: Tensor, pixels_1: Tensor) -> Tensor:
        """The family's own forward on one row and its image, [L, V]."""
        ...


_Pixels = dict[bytes, Future[Tensor]]


class _Asked(NamedTuple):
    """A question of a row, as token ids with one placeholder."""

    number: int
    ids: list[int]


class _QuestionRow(NamedTuple):
    image: int
    row: TokenRow


class SharedPrefixModel(TrainableModel):
    """Of a family with a `VisionSide`."""

    def __init__(
        self, side: VisionSide, prompter: Prompter, *, batch_size: int, eos_ids: Sequence[int]
    ) -> None:
        self.batch_size = batch_size
        self._side = side
        self._prompter = prompter
        self._decoder = Decoder(side.module)
        self._eos_ids = tuple(eos_ids)

    @property
    def module(self) -> PreTrainedModel:
        """The transformers module; adapters put into it in place take part in every method."""
        return self._side.module

    # --- plain values in, plain values out -------------------------------------------------------

    def queue_answer(
        self, prompts: Sequence[Prompt], *, decoding: Decoding
    ) -> Callable[[], list[list[Generation]]]:
        """Starts reading the images; the call runs each prompt once for all of its answers."""
        lengths = [len(prompt.question) for prompt in prompts]
        order = [row for rows in batches(lengths, size=self.batch_size) for row in rows]
        ahead = self._read([(prompts[row].image, row) for row in order])
        numbers = range(len(prompts))
        ids = self._prompter.prompts([prompt.question for prompt in prompts], rows=numbers)
        return functools.partial(self._answers, prompts, ids, ahead, decoding)

    @torch.inference_mode()
    def _answers(
        self, prompts: Sequence[Prompt], asked: list[list[int]], ahead: _Pixels, decoding: Decoding
    ) -> list[list[Generation]]:
        """`asked`: the prompts as token ids with one placeholder."""
        generations: dict[int, list[Generation]] = {}
        lengths = [len(prompt.question) for prompt in prompts]
        for rows in batches(lengths, size=self.batch_size):
            group = [prompts[row] for row in rows]
            images = self._images([prompt.image for prompt in group], rows, ahead)
            ids = [self._prompter.with_image(asked[row], images.num_tokens) for row in rows]
            for row, tokens in zip(rows, ids, strict=True):
                self._check_length(row, len(tokens) + decoding.max_new_tokens, None)
            prefill = self._decoder.prefill(
                functools.partial(self._embeds, ids, images),
                [len(tokens) for tokens in ids],
                rectangle=decoding.num_beams > 1,
            )
            seeds = [prompt.seeds for prompt in group]
            answers = generate(
                self._decoder, prefill, seeds, decoding=decoding, eos_ids=self._eos_ids
            )
            for row, tokens_of_row in zip(rows, answers, strict=True):
                generations[row] = [
                    self._prompter.generation(tokens, self._eos_ids) for tokens in tokens_of_row
                ]
        return [generations[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def queue_yes_no(self, rows: Sequence[ImageQuestions]) -> Callable[[], list[list[YesNo]]]:
        """One list per image, one verdict per question.

        An image is seen once however many rows ask about it, and equal questions about it are
        computed once.
        """
        asked: dict[bytes, dict[str, int]] = {}
        for number, row in enumerate(rows):
            for question in row.questions:
                asked.setdefault(row.image, {}).setdefault(question, number)
        running: list[tuple[list[tuple[bytes, str]], Callable[[], Tensor]]] = []
        every = list(asked)
        groups = batches([sum(map(len, asked[image])) for image in every], size=self.batch_size)
        first_rows = [next(iter(asked[image].values())) for image in every]
        ahead = self._read([(every[i], first_rows[i]) for group in groups for i in group])
        for group in groups:
            seen = [every[i] for i in group]
            images = self._images(seen, [first_rows[i] for i in group], ahead)
            pairs = [(image, question) for image in seen for question in asked[image]]
            numbers = [asked[image][question] for image, question in pairs]
            ids = self._prompter.prompts([question for _, question in pairs], rows=numbers)
            found = iter(map(_Asked, numbers, ids))
            units = [
                unit
                for index, image in enumerate(seen)
                for unit in self._question_rows(
                    index, list(itertools.islice(found, len(asked[image]))), images
                )
            ]
            running.append((pairs, to_host(self._sums(units, images))))

        def wait() -> list[list[YesNo]]:
            verdicts: dict[tuple[bytes, str], YesNo] = {}
            for pairs, sums in running:
                verdicts.update(zip(pairs, _verdicts(sums()), strict=True))
            return [[verdicts[row.image, question] for question in row.questions] for row in rows]

        return wait

    @torch.inference_mode()
    def queue_sequence_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> Callable[[], list[list[Floats]]]:
        """Per row and answer: log-probability in nats of each answer token, float32 [tokens]."""
        running: list[tuple[list[int], tuple[tuple[int, ...], ...], Callable[[], Tensor]]] = []
        lengths = [len(row.question) + sum(map(len, row.answers)) for row in rows]
        groups = batches(lengths, size=self.batch_size)
        ahead = self._read([(rows[row].image, row) for group in groups for row in group])
        for group in groups:
            batch = self._encode([rows[row] for row in group], group, max_length, ahead)
            logps_M = self._decoder.target_logps(self._hidden(batch, None), batch.targets_M)
            running.append((group, batch.counts, to_host(logps_M)))

        def wait() -> list[list[Floats]]:
            results: dict[int, list[Floats]] = {}
            for group, counts, scored in running:
                for row, logps in zip(group, split_answers(scored(), counts), strict=True):
                    results[row] = [part.numpy() for part in logps]
            return [results[row] for row in range(len(rows))]

        return wait

    @torch.inference_mode()
    def first_tokens(
        self, image: bytes, question: str, *, count: int, ids: Sequence[int] = ()
    ) -> list[TokenLogp]:
        """The likeliest first tokens of an answer, best first; or these, behind the likeliest."""
        batch = self._encode([Branches(image, question, ("",))], [0], None)
        logps_V = self._decoder.logits(self._hidden(batch, None))[0].log_softmax(-1)
        best = logps_V.topk(min(count, len(logps_V))).indices.tolist()
        chosen = dict.fromkeys([best[0], *ids] if ids else best)
        return [TokenLogp(self._prompter.piece(token), float(logps_V[token])) for token in chosen]

    def count_prompt(self, image: bytes, question: str) -> int:
        """Tokens of a prompt, those of the image included; for servers."""
        num_tokens = self._images([image], [0]).num_tokens
        return len(self._prompter.prompt(question, row=0)) + num_tokens - 1

    # --- differentiable --------------------------------------------------------------------------

    def encode_branches(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> BranchBatch:
        """Tokens and pixels of some rows; see `TrainableModel`."""
        return self._encode(rows, range(len(rows)), max_length)

    def vision_features(self, pixels: Tensor) -> Tensor:
        """What the vision tower says about images, before the projector: [I, F, E].

        Without gradients where the tower is frozen. Worth keeping between epochs.
        """
        return self._side.features(pixels)

    def branch_logps(
        self, batch: BranchBatch, *, features: Tensor | None = None
    ) -> list[list[Tensor]]:
        """Token log-probabilities, one prefix per row; see `TrainableModel`.

        `features` replaces `vision_features(batch.pixels)`.
        """
        logps_M = self._decoder.target_logps(self._hidden(batch, features), batch.targets_M)
        return split_answers(logps_M, batch.counts)

    def _hidden(self, batch: BranchBatch, features: Tensor | None) -> Tensor:
        """Before each answer token, [M, E]."""
        if features is None:
            features = self._side.features(batch.pixels)
        embeds_BLE = self._side.merge(batch.packed.ids_BL, features, batch.image_of_row_B)
        return self._decoder.run(embeds_BLE, batch.packed, batch.sources_M)

    def two_row_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Tensor]]:
        """The plain way: the family's own forward on one full row per answer."""
        images = self._images([row.image for row in rows], range(len(rows)))
        token_rows = self._token_rows(rows, range(len(rows)), images, max_length)
        pixels = self._pixels(images)
        results: list[list[Tensor]] = []
        for row, image in zip(token_rows, images.of_row, strict=True):
            pixels_1 = pixels[image : image + 1]
            results.append([self._plain_logps(row.prefix, b, pixels_1) for b in row.branches])
        return results

    def _plain_logps(self, prefix: list[int], branch: list[int], pixels_1: Tensor) -> Tensor:
        ids_L = torch.tensor([*prefix, *branch], device=self._decoder.device)
        logits_LV = self._side.full_logits(ids_L, pixels_1)[len(prefix) - 1 : -1]
        targets_L1 = ids_L[len(prefix) :].unsqueeze(1)
        return logits_LV.float().log_softmax(-1).gather(1, targets_L1).squeeze(1)

    # --- inside ----------------------------------------------------------------------------------

    def _read(self, images: Sequence[tuple[bytes, int]]) -> _Pixels:
        """Starts reading images, in this order; each comes with a row that shows it."""
        first_row: dict[bytes, int] = {}
        for image, row in images:
            first_row.setdefault(image, row)
        raw = self._decoder.device.type == "cuda"
        reading = self._prompter.read(list(first_row), list(first_row.values()), raw=raw)
        return dict(zip(first_row, reading, strict=True))

    def _images(
        self, images: Sequence[bytes], rows: Sequence[int], ahead: _Pixels | None = None
    ) -> Images:
        """Of some rows; `ahead` holds them if `_read` was asked before."""
        pixels = ahead or self._read(list(zip(images, rows, strict=True)))
        numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
        num_tokens = self._prompter.num_image_tokens(pixels[images[0]].result())
        reading = [pixels[image] for image in numbers]
        return Images(reading, [numbers[image] for image in images], num_tokens)

    def _pixels(self, images: Images) -> Tensor:
        """Of all images, on the device."""
        pixels = torch.cat([each.result() for each in images.reading])
        return self._prompter.normalised(to_device(pixels, self._decoder.device))

    def _embeds(self, ids: Sequence[list[int]], images: Images, rows: range) -> Tensor:
        """Embeddings of some prompts, padded on the right."""
        some = images.of(rows)
        device, pad_id = self._decoder.device, self._prompter.pad_id
        listed = [torch.tensor(ids[row]) for row in rows]
        ids_BP = to_device(pad_sequence(listed, batch_first=True, padding_value=pad_id), device)
        features = self._side.features(self._pixels(some))
        return self._side.merge(ids_BP, features, self._on_device(some.of_row))

    def _on_device(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values), self._decoder.device)

    def _check_length(self, row: int, length: int, limit: int | None) -> None:
        """Nothing is ever truncated."""
        limit = min(limit or self._decoder.context, self._decoder.context)
        if length > limit:
            raise ArtifactError(
                f"row {row}: prompt, image and answer take {length} tokens, more than {limit}"
            )

    def _token_rows(
        self,
        rows: Sequence[Branches],
        numbers: Sequence[int],
        images: Images,
        max_length: int | None,
    ) -> list[TokenRow]:
        token_rows = []
        prompts = self._prompter.prompts([row.question for row in rows], rows=numbers)
        for row, number, prompt in zip(rows, numbers, prompts, strict=True):
            prefix = self._prompter.with_image(prompt, images.num_tokens)
            branches = [self._prompter.answer(answer) for answer in row.answers]
            self._check_length(number, len(prefix) + max(map(len, branches)), max_length)
            token_rows.append(TokenRow(prefix, branches))
        return token_rows

    def _encode(
        self,
        rows: Sequence[Branches],
        numbers: Sequence[int],
        max_length: int | None,
        ahead: _Pixels | None = None,
    ) -> BranchBatch:
        images = self._images([row.image for row in rows], numbers, ahead)
        token_rows = self._token_rows(rows, numbers, images, max_length)
        packed, starts = self._decoder.pack(token_rows, pad_id=self._prompter.pad_id)
        branches = itertools.chain.from_iterable(row.branches for row in token_rows)
        return BranchBatch(
            packed,
            self._pixels(images),
            self._on_device(images.of_row),
            self._on_device(answer_sources(token_rows, starts)),
            self._on_device(list(itertools.chain.from_iterable(branches))),
            tuple(tuple(map(len, row.branches)) for row in token_rows),
        )

    def _question_rows(
        self, image: int, asked: Collection[_Asked], images: Images
    ) -> Iterator[_QuestionRow]:
        prompts = [question.ids for question in asked]
        for question in asked:
            self._check_length(question.number, len(question.ids) + images.num_tokens, None)
        image_id = self._prompter.image_id
        for row in question_rows(prompts, image_id=image_id, budget=MAX_BRANCH_TOKENS):
            prefix = self._prompter.with_image(row.prefix, images.num_tokens)
            yield _QuestionRow(image, TokenRow(prefix, row.branches))

    def _sums(self, units: Sequence[_QuestionRow], images: Images) -> Tensor:
        """P(yes) and P(no) after each question, over the whole vocabulary, [M, 2]; on the device."""
        features = self._side.features(self._pixels(images))
        yes, no = (self._on_device(self._prompter.word_ids(words)) for words in (YES, NO))
        sums = []
        for start in range(0, len(units), self.batch_size):
            group = units[start : start + self.batch_size]
            rows = [unit.row for unit in group]
            packed, starts = self._decoder.pack(rows, pad_id=self._prompter.pad_id)
            image_of_row_B = self._on_device([unit.image for unit in group])
            embeds_BLE = self._side.merge(packed.ids_BL, features, image_of_row_B)
            sources_M = self._on_device(end_sources(rows, starts))
            hidden_ME = self._decoder.run(embeds_BLE, packed, sources_M)
            p_MV = self._decoder.logits(hidden_ME).softmax(-1)
            sums.append(torch.stack([p_MV[:, yes].sum(1), p_MV[:, no].sum(1)], 1))
        return torch.cat(sums)


def _verdicts(sums_M2: Tensor) -> list[YesNo]:
    if not sums_M2.isfinite().all():
        raise ArtifactError(NOT_FINITE)
    return [YesNo(p_yes, p_no) for p_yes, p_no in sums_M2.tolist()]
