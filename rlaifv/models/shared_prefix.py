"""The engine: a vision-language model in which every prefix is run once.

Ten samples of a prompt share its keys and values; the questions about an image, or the two
answers of a pair, are branches of one row. What a model family does differently lies in its
`VisionSide`.

Shapes:  B rows;  L tokens of a row;  P tokens of a prompt;  M positions that are read;  E width;
V vocabulary.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlaifv.errors import ArtifactError
from rlaifv.models.base import (
    Branches,
    Decoding,
    Floats,
    Generation,
    ImageQuestions,
    Prompt,
    YesNo,
)
from rlaifv.models.batches import batches
from rlaifv.models.branches import (
    BranchBatch,
    PackedRows,
    TokenRow,
    answer_sources,
    end_sources,
    pack,
    question_rows,
)
from rlaifv.models.decoder import NOT_FINITE, Decoder
from rlaifv.models.generation import generate
from rlaifv.models.prompting import Prompter

YES = ("yes", "Yes")
NO = ("no", "No")
"""The words that count; the reference release's."""

MAX_BRANCH_TOKENS = 4096
"""Most question tokens in a row: the mask grows with the square of the row."""


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


class _Images(NamedTuple):
    """The different images of some rows."""

    pixels: Tensor
    of_row_B: Tensor
    num_tokens: int


class _Asked(NamedTuple):
    """A question of a row, as token ids with one placeholder."""

    number: int
    ids: list[int]


class TokenLogp(NamedTuple):
    """A token's text and its log-probability in nats."""

    text: str
    logp: float


class _QuestionRow(NamedTuple):
    image: int
    row: TokenRow


class SharedPrefixModel:
    """A `branches.TrainableModel`."""

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

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], *, decoding: Decoding) -> list[list[Generation]]:
        """One list per prompt, one generation per seed; the prompt is run once for all of them."""
        generations: dict[int, list[Generation]] = {}
        lengths = [len(prompt.question) for prompt in prompts]
        for rows in batches(lengths, size=self.batch_size):
            group = [prompts[row] for row in rows]
            images = self._images([prompt.image for prompt in group], rows)
            ids = [
                self._prefix(prompt.question, row, images)
                for prompt, row in zip(group, rows, strict=True)
            ]
            for row, tokens in zip(rows, ids, strict=True):
                self._check_length(row, len(tokens) + decoding.max_new_tokens, None)
            ids_BP = pad_sequence(
                [torch.tensor(tokens) for tokens in ids],
                batch_first=True,
                padding_value=self._prompter.pad_id,
            ).to(self._decoder.device)
            features = self._side.features(images.pixels)
            embeds_BPE = self._side.merge(ids_BP, features, images.of_row_B)
            answers = generate(
                self._decoder,
                self._decoder.prefill(embeds_BPE, [len(tokens) for tokens in ids]),
                [prompt.seeds for prompt in group],
                decoding=decoding,
                eos_ids=self._eos_ids,
            )
            for row, tokens_of_row in zip(rows, answers, strict=True):
                generations[row] = [
                    self._prompter.generation(tokens, self._eos_ids) for tokens in tokens_of_row
                ]
        return [generations[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def yes_no(self, rows: Sequence[ImageQuestions]) -> list[list[YesNo]]:
        """One list per image, one verdict per question.

        An image is seen once however many rows ask about it, and equal questions about it are
        computed once.
        """
        prompts: dict[bytes, dict[str, _Asked]] = {}
        for number, row in enumerate(rows):
            asked = prompts.setdefault(row.image, {})
            for question in row.questions:
                if question not in asked:
                    ids = self._prompter.prompt(question, row=number)
                    asked[question] = _Asked(number, ids)
        verdicts: dict[tuple[bytes, str], YesNo] = {}
        wanted = [image for image, asked in prompts.items() if asked]
        lengths = [sum(len(asked.ids) for asked in prompts[image].values()) for image in wanted]
        for indices in batches(lengths, size=self.batch_size):
            group = [wanted[index] for index in indices]
            numbers = [next(iter(prompts[image].values())).number for image in group]
            images = self._images(group, numbers)
            units = [
                unit
                for index, image in enumerate(group)
                for unit in self._question_rows(index, prompts[image].values(), images)
            ]
            pairs = [(image, question) for image in group for question in prompts[image]]
            verdicts.update(zip(pairs, self._verdicts(units, images), strict=True))
        return [[verdicts[row.image, question] for question in row.questions] for row in rows]

    @torch.inference_mode()
    def sequence_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Floats]]:
        """Per row and answer: log-probability in nats of each answer token, float32 [tokens]."""
        results: dict[int, list[Floats]] = {}
        lengths = [len(row.question) + sum(map(len, row.answers)) for row in rows]
        for group in batches(lengths, size=self.batch_size):
            batch = self._encode([rows[row] for row in group], group, max_length)
            for row, logps in zip(group, self.branch_logps(batch), strict=True):
                results[row] = [part.cpu().numpy() for part in logps]
        return [results[row] for row in range(len(rows))]

    @torch.inference_mode()
    def first_tokens(self, image: bytes, question: str, *, count: int) -> list[TokenLogp]:
        """The likeliest first tokens of an answer, best first; for servers."""
        batch = self._encode([Branches(image, question, ("",))], [0], None)
        features = self._side.features(batch.pixels)
        embeds_BLE = self._side.merge(batch.packed.ids_BL, features, batch.image_of_row_B)
        hidden_ME = self._hidden(batch.packed, embeds_BLE, batch.sources_M)
        logps_V = self._decoder.logits(hidden_ME)[0].log_softmax(-1)
        best = logps_V.topk(min(count, len(logps_V)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [TokenLogp(self._prompter.piece(token), logp) for token, logp in pairs]

    # --- differentiable --------------------------------------------------------------------------

    def encode_branches(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> BranchBatch:
        """Tokens and pixels of some rows; see `TrainableModel`."""
        return self._encode(rows, range(len(rows)), max_length)

    def vision_features(self, pixels: Tensor) -> Tensor:
        """What the vision tower says about images; see `TrainableModel`."""
        return self._side.features(pixels)

    def branch_logps(
        self, batch: BranchBatch, *, features: Tensor | None = None
    ) -> list[list[Tensor]]:
        """Token log-probabilities, one prefix per row; see `TrainableModel`."""
        if features is None:
            features = self._side.features(batch.pixels)
        embeds_BLE = self._side.merge(batch.packed.ids_BL, features, batch.image_of_row_B)
        hidden_ME = self._hidden(batch.packed, embeds_BLE, batch.sources_M)
        return batch.split(self._decoder.target_logps(hidden_ME, batch.targets_M))

    def two_row_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Tensor]]:
        """The plain way: the family's own forward on one full row per answer."""
        images = self._images([row.image for row in rows], range(len(rows)))
        token_rows = self._token_rows(rows, range(len(rows)), images, max_length)
        results: list[list[Tensor]] = []
        for row, image in zip(token_rows, images.of_row_B.tolist(), strict=True):
            pixels_1 = images.pixels[image : image + 1]
            results.append([self._plain_logps(row.prefix, b, pixels_1) for b in row.branches])
        return results

    def _plain_logps(self, prefix: list[int], branch: list[int], pixels_1: Tensor) -> Tensor:
        ids_L = torch.tensor([*prefix, *branch], device=self._decoder.device)
        logits_LV = self._side.full_logits(ids_L, pixels_1)[len(prefix) - 1 : -1]
        targets_L1 = ids_L[len(prefix) :].unsqueeze(1)
        return logits_LV.float().log_softmax(-1).gather(1, targets_L1).squeeze(1)

    # --- inside ----------------------------------------------------------------------------------

    def _images(self, images: Sequence[bytes], rows: Sequence[int]) -> _Images:
        first_row: dict[bytes, int] = {}
        for image, row in zip(images, rows, strict=True):
            first_row.setdefault(image, row)
        numbers = {image: number for number, image in enumerate(first_row)}
        pixels = self._prompter.pixels(list(first_row), list(first_row.values()))
        device = self._decoder.device
        of_row_B = torch.tensor([numbers[image] for image in images], device=device)
        return _Images(pixels.to(device), of_row_B, self._prompter.num_image_tokens(pixels))

    def _prefix(self, question: str, row: int, images: _Images) -> list[int]:
        ids = self._prompter.prompt(question, row=row)
        return self._prompter.with_image(ids, images.num_tokens)

    def _check_length(self, row: int, length: int, limit: int | None) -> None:
        """Nothing is ever truncated."""
        limit = min(limit or self._decoder.context, self._decoder.context)
        if length > limit:
            raise ArtifactError(
                f"row {row}: prompt, image and answer take {length} tokens, more than {limit}"
            )

    def _hidden(self, packed: PackedRows, embeds_BLE: Tensor, sources_M: Tensor) -> Tensor:
        """Hidden states at the positions that are read, [M, E]."""
        hidden_BLE = self._decoder.run(embeds_BLE, packed.positions_BL, packed.segments_BL)
        return hidden_BLE.flatten(0, 1)[sources_M]

    def _token_rows(
        self,
        rows: Sequence[Branches],
        numbers: Sequence[int],
        images: _Images,
        max_length: int | None,
    ) -> list[TokenRow]:
        token_rows = []
        for row, number in zip(rows, numbers, strict=True):
            prefix = self._prefix(row.question, number, images)
            branches = [self._prompter.answer(answer) for answer in row.answers]
            self._check_length(number, len(prefix) + max(map(len, branches)), max_length)
            token_rows.append(TokenRow(prefix, branches))
        return token_rows

    def _encode(
        self, rows: Sequence[Branches], numbers: Sequence[int], max_length: int | None
    ) -> BranchBatch:
        images = self._images([row.image for row in rows], numbers)
        token_rows = self._token_rows(rows, numbers, images, max_length)
        packed = pack(token_rows, pad_id=self._prompter.pad_id)
        branches = itertools.chain.from_iterable(row.branches for row in token_rows)
        sources = answer_sources(token_rows, width=packed.ids_BL.shape[1])
        device = self._decoder.device
        return BranchBatch(
            packed.to(device),
            images.pixels,
            images.of_row_B,
            torch.tensor(sources, device=device),
            torch.tensor(list(itertools.chain.from_iterable(branches)), device=device),
            tuple(tuple(map(len, row.branches)) for row in token_rows),
        )

    def _question_rows(
        self, image: int, asked: Collection[_Asked], images: _Images
    ) -> Iterator[_QuestionRow]:
        prompts = [question.ids for question in asked]
        for question in asked:
            self._check_length(question.number, len(question.ids) + images.num_tokens, None)
        image_id = self._prompter.image_id
        for row in question_rows(prompts, image_id=image_id, budget=MAX_BRANCH_TOKENS):
            prefix = self._prompter.with_image(row.prefix, images.num_tokens)
            yield _QuestionRow(image, TokenRow(prefix, row.branches))

    def _verdicts(self, units: Sequence[_QuestionRow], images: _Images) -> Iterator[YesNo]:
        """Probabilities at the position after each question, over the whole vocabulary."""
        features, device = self._side.features(images.pixels), self._decoder.device
        yes, no = self._prompter.word_ids(YES), self._prompter.word_ids(NO)
        for start in range(0, len(units), self.batch_size):
            group = units[start : start + self.batch_size]
            rows = [unit.row for unit in group]
            packed = pack(rows, pad_id=self._prompter.pad_id).to(device)
            image_of_row_B = torch.tensor([unit.image for unit in group], device=device)
            embeds_BLE = self._side.merge(packed.ids_BL, features, image_of_row_B)
            sources = end_sources(rows, width=packed.ids_BL.shape[1])
            hidden_ME = self._hidden(packed, embeds_BLE, torch.tensor(sources, device=device))
            p_MV = self._decoder.logits(hidden_ME).softmax(-1)
            sums_M2 = torch.stack([p_MV[:, yes].sum(1), p_MV[:, no].sum(1)], 1)
            if not sums_M2.isfinite().all():
                raise ArtifactError(NOT_FINITE)
            yield from (YesNo(p_yes, p_no) for p_yes, p_no in sums_M2.tolist())
