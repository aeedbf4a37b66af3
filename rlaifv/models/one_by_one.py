"""A vision-language model through a forward that is not ours: one image at a time.

What prompts and answers about an image have in common is run once where the cache can be copied
and continued, and anew for every row where it cannot. Families differ in how a prompt becomes
inputs and how inputs become scores.

Shapes:  L tokens;  T steps;  V vocabulary.
"""

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    VisionLanguageModel,
    YesNo,
)
from rlaifv.models.sampling import draw_uniforms, penalised, pick
from rlaifv.models.words import Words

Inputs = dict[str, Tensor]
"""Of one prompt: `input_ids` [1, L], and whatever the family's forward takes beside them."""


class Run(NamedTuple):
    """Some tokens that were run."""

    logits_LV: Tensor
    cache: Any


class OneByOne(VisionLanguageModel, abc.ABC):
    """Of single rows, computed as soon as they are queued; `batch_size` means nothing."""

    def __init__(
        self, module: Any, words: Words, *, batch_size: int, eos_ids: Sequence[int]
    ) -> None:
        self.module, self.batch_size = module, batch_size
        self._words, self._eos_ids = words, list(eos_ids)

    # --- what a family says ----------------------------------------------------------------------

    @abc.abstractmethod
    def _inputs(self, image: bytes, question: str, row: int) -> Inputs:
        """A prompt; raises ArtifactError with the row for what cannot be one."""

    @abc.abstractmethod
    def _forward(self, inputs: Inputs, cache: Any) -> Run:
        """Float32 scores after each of these tokens, which come after what `cache` holds."""

    @abc.abstractmethod
    def _image_end(self, inputs: Inputs) -> int:
        """How many tokens go up to the end of the image."""

    @abc.abstractmethod
    def _beams(self, inputs: Inputs, decoding: Decoding) -> list[int]:
        """The best sequence of a beam search."""

    @abc.abstractmethod
    def _can_be_copied(self, cache: Any) -> bool:
        """Whether a cache may be continued more than once."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        limit: int = self.module.config.get_text_config().max_position_embeddings
        return limit

    # --- what all of them do ---------------------------------------------------------------------

    @torch.inference_mode()
    def queue_answer(
        self, prompts: Sequence[Prompt], *, decoding: Decoding
    ) -> Callable[[], list[list[Generation]]]:
        """One list per prompt, one generation per seed; the prompt is run once for all of them."""
        results = []
        for row, prompt in enumerate(prompts):
            inputs = self._inputs(prompt.image, prompt.question, row)
            self._check_length(row, num_tokens(inputs) + decoding.max_new_tokens)
            if decoding.num_beams > 1:
                answers = [self._beams(inputs, decoding)] * len(prompt.seeds)
            elif decoding.temperature == 0:
                answers = self._samples(inputs, (0,), decoding) * len(prompt.seeds)
            else:
                answers = self._samples(inputs, prompt.seeds, decoding)
            results.append([self._words.generation(ids, self._eos_ids) for ids in answers])
        return lambda: results

    @torch.inference_mode()
    def queue_yes_no(self, rows: Sequence[ImageQuestions]) -> Callable[[], list[list[YesNo]]]:
        """One list per image, one verdict per question; the image is run once."""
        yes, no = self._words.word_ids(YES), self._words.word_ids(NO)
        verdicts = []
        for number, row in enumerate(rows):
            found = []
            for logits_V in self._last_logits(row, number):
                p_V = logits_V.softmax(-1)
                found.append(YesNo(float(p_V[yes].sum()), float(p_V[no].sum())))
            verdicts.append(found)
        return lambda: verdicts

    def sequence_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Floats]]:
        """As `queue_sequence_logps`."""
        return self.queue_sequence_logps(rows, max_length=max_length)()

    @torch.inference_mode()
    def queue_sequence_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> Callable[[], list[list[Floats]]]:
        """Per row and answer: log-probability in nats of each answer token, float32 [tokens]."""
        results = []
        for number, row in enumerate(rows):
            inputs, answers = self._asked(row, number, max_length)
            prefix = self._prefix(inputs, num_tokens(inputs))
            results.append([self._logps(prefix(ids), ids).cpu().numpy() for ids in answers])
        return lambda: results

    @torch.inference_mode()
    def two_row_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Tensor]]:
        """The plain way: one full row per answer, nothing shared."""
        results = []
        for number, row in enumerate(rows):
            inputs, answers = self._asked(row, number, max_length)
            start = num_tokens(inputs) - 1
            full = [self._run(extended(inputs, ids)).logits_LV[start:] for ids in answers]
            results.append([self._logps(lv, ids) for lv, ids in zip(full, answers, strict=True)])
        return results

    @torch.inference_mode()
    def first_tokens(
        self, image: bytes, question: str, *, count: int, ids: Sequence[int] = ()
    ) -> list[TokenLogp]:
        """The likeliest first tokens of an answer, best first; or these, behind the likeliest."""
        logps_V = self._run(self._inputs(image, question, 0)).logits_LV[-1].log_softmax(-1)
        best = logps_V.topk(min(count, len(logps_V))).indices.tolist()
        chosen = dict.fromkeys([best[0], *ids] if ids else best)
        return [TokenLogp(self._words.piece(token), float(logps_V[token])) for token in chosen]

    @torch.inference_mode()
    def count_prompt(self, image: bytes, question: str) -> int:
        """Tokens of a prompt, those of the image included; for servers."""
        return num_tokens(self._inputs(image, question, 0))

    # --- inside ----------------------------------------------------------------------------------

    def _asked(
        self, row: Branches, number: int, max_length: int | None
    ) -> tuple[Inputs, list[list[int]]]:
        """The prompt of a row and the tokens of its answers."""
        inputs = self._inputs(row.image, row.question, number)
        answers = [self._words.answer(answer) for answer in row.answers]
        longest = num_tokens(inputs) + max(map(len, answers), default=0)
        self._check_length(number, longest, max_length)
        return inputs, answers

    def _check_length(self, row: int, length: int, most: int | None = None) -> None:
        """Nothing is ever truncated."""
        limit = min(most or self.context, self.context)
        if length > limit:
            raise ArtifactError(
                f"row {row}: prompt, image and answer take {length} tokens, more than {limit}"
            )

    def _run(self, inputs: Inputs, cache: Any = None) -> Run:
        run = self._forward(self._cast(inputs), cache)
        if not run.logits_LV[-1].isfinite().all():
            raise ArtifactError(NOT_FINITE)
        return run

    def _cast(self, inputs: Inputs) -> Inputs:
        """In the module's precision."""
        dtype = self.module.dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def _more(self, tokens: Sequence[int], cache: Any) -> Run:
        """Runs tokens after what `cache` holds, which it extends; their positions follow from it."""
        return self._run(
            {"input_ids": torch.tensor([list(tokens)], device=self.module.device)}, cache
        )

    def _prefix(self, inputs: Inputs, length: int) -> Callable[[list[int]], Tensor]:
        """Runs the first `length` tokens; gives logits from the last of them on, after more tokens.

        Families keep the positions of the image in the module, so one prefix is used at a time.
        """
        first = _cut(inputs, length)
        run = self._run(first)
        shareable = self._can_be_copied(run.cache)

        def continued(tokens: list[int]) -> Tensor:
            if not shareable:
                return self._run(extended(first, tokens)).logits_LV[length - 1 :]
            more = self._more(tokens, copy.deepcopy(run.cache))
            return torch.cat([run.logits_LV[-1:], more.logits_LV])

        return continued

    def _logps(self, logits_LV: Tensor, tokens: list[int]) -> Tensor:
        targets_L1 = torch.tensor(tokens, device=logits_LV.device).unsqueeze(1)
        return logits_LV[:-1].log_softmax(-1).gather(1, targets_L1).squeeze(1)

    def _last_logits(self, row: ImageQuestions, number: int) -> list[Tensor]:
        """For the first token after each question, [V] each."""
        inputs = [self._inputs(row.image, question, number) for question in row.questions]
        if not inputs:
            return []
        for each in inputs:
            self._check_length(number, num_tokens(each))
        prompts = [each["input_ids"][0].tolist() for each in inputs]
        columns = zip(*prompts, strict=False)
        common = next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), None)
        shared = min(map(len, prompts)) - 1 if common is None else common
        if shared < max(1, self._image_end(inputs[0])):
            return [self._run(each).logits_LV[-1] for each in inputs]  # the question comes first
        prefix = self._prefix(inputs[0], shared)
        return [prefix(ids[shared:])[-1] for ids in prompts]

    def _samples(self, inputs: Inputs, seeds: Sequence[int], decoding: Decoding) -> list[list[int]]:
        first, answers = self._run(inputs), []
        for number, seed in enumerate(seeds):
            run = first
            if self._can_be_copied(first.cache):
                run = Run(first.logits_LV, copy.deepcopy(first.cache))
            elif number:  # the last answer used it up
                run = self._run(inputs)
            answers.append(self._sample(run, seed, decoding))
        return answers

    def _sample(self, run: Run, seed: int, decoding: Decoding) -> list[int]:
        steps, tokens = decoding.max_new_tokens, list[int]()
        uniforms_1T = draw_uniforms([seed], steps).to(run.logits_LV.device)
        for step in range(steps):
            logits_1V = run.logits_LV[-1:]
            if decoding.repetition_penalty != 1:
                said_1V = torch.zeros_like(logits_1V, dtype=torch.bool)
                said_1V[:, tokens] = True
                logits_1V = penalised(logits_1V, said_1V, decoding.repetition_penalty)
            tokens.append(int(pick(logits_1V, uniforms_1T[:, step], decoding)))
            if tokens[-1] in self._eos_ids or step + 1 == steps:
                break
            run = self._more(tokens[-1:], run.cache)
        return tokens


def num_tokens(inputs: Inputs) -> int:
    return inputs["input_ids"].shape[1]


def _is_row(value: Tensor, length: int) -> bool:
    """Whether an input has one entry per token."""
    return value.ndim == 2 and value.shape == (1, length) and not value.is_floating_point()


def _cut(inputs: Inputs, length: int) -> Inputs:
    whole = num_tokens(inputs)
    return {k: v[:, :length] if _is_row(v, whole) else v for k, v in inputs.items()}


def extended(inputs: Inputs, tokens: Sequence[int]) -> Inputs:
    """The inputs with more text: seen, and of the kind 0 where a family tells kinds apart."""
    whole, extended = num_tokens(inputs), dict(inputs)
    for name, value in inputs.items():
        if not _is_row(value, whole):
            continue
        ids = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}
        more = value.new_tensor([ids.get(name, [0] * len(tokens))])
        extended[name] = torch.cat([value, more], 1)
    return extended
