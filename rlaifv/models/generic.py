"""Any image-text model of transformers, through its own forward and processor: slower, no training.

The fallback for families without a `VisionSide`. One image at a time; what prompts and answers
about it have in common is run once where the cache can be copied and continued, and anew for every
row where it cannot (sliding windows, recurrent layers).

Shapes:  L tokens;  T steps;  V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import DynamicLayer

from rlaifv.errors import ArtifactError
from rlaifv.images import BadImageError, decode
from rlaifv.models.base import (
    Branches,
    Decoding,
    Floats,
    Generation,
    ImageQuestions,
    Prompt,
    YesNo,
)
from rlaifv.models.decoder import NOT_FINITE
from rlaifv.models.prompting import Prompter
from rlaifv.models.sampling import draw_uniforms, pick
from rlaifv.models.shared_prefix import NO, YES


class _Run(NamedTuple):
    """Some tokens that were run."""

    logits_LV: Tensor
    cache: Any


class GenericModel:
    """A `VisionLanguageModel` over `AutoModelForImageTextToText`."""

    def __init__(
        self,
        module: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        batch_size: int,
        eos_ids: Sequence[int],
        source: str,
    ) -> None:
        self.module, self.batch_size = module, batch_size
        self._processor, self._eos_ids = processor, list(eos_ids)
        self._prompter = Prompter(processor, source=source, prompt="chat_template")

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], *, decoding: Decoding) -> list[list[Generation]]:
        """One list per prompt, one generation per seed; the prompt is run once for all of them."""
        results = []
        for row, prompt in enumerate(prompts):
            inputs = self._inputs(prompt.image, prompt.question, row)
            self._check_length(row, _length(inputs) + decoding.max_new_tokens)
            if decoding.num_beams > 1:
                answers = [self._beams(inputs, decoding)] * len(prompt.seeds)
            elif decoding.temperature == 0:
                answers = self._samples(inputs, (0,), decoding) * len(prompt.seeds)
            else:
                answers = self._samples(inputs, prompt.seeds, decoding)
            results.append([self._prompter.generation(ids, self._eos_ids) for ids in answers])
        return results

    @torch.inference_mode()
    def yes_no(self, rows: Sequence[ImageQuestions]) -> list[list[YesNo]]:
        """One list per image, one verdict per question; the image is run once."""
        yes, no = self._prompter.word_ids(YES), self._prompter.word_ids(NO)
        verdicts = []
        for number, row in enumerate(rows):
            found = []
            for logits_V in self._last_logits(row, number):
                p_V = logits_V.softmax(-1)
                found.append(YesNo(float(p_V[yes].sum()), float(p_V[no].sum())))
            verdicts.append(found)
        return verdicts

    @torch.inference_mode()
    def sequence_logps(self, rows: Sequence[Branches]) -> list[list[Floats]]:
        """Per row and answer: log-probability in nats of each answer token, float32 [tokens]."""
        results = []
        for number, row in enumerate(rows):
            inputs = self._inputs(row.image, row.question, number)
            answers = [self._prompter.answer(answer) for answer in row.answers]
            self._check_length(number, _length(inputs) + max(map(len, answers), default=0))
            prefix = self._prefix(inputs, _length(inputs))
            results.append([self._logps(prefix(ids), ids).cpu().numpy() for ids in answers])
        return results

    @torch.inference_mode()
    def two_row_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Tensor]]:
        """The plain way: one full row per answer, nothing shared."""
        del max_length
        results = []
        for number, row in enumerate(rows):
            inputs = self._inputs(row.image, row.question, number)
            answers = [self._prompter.answer(answer) for answer in row.answers]
            start = _length(inputs) - 1
            full = [self._run(_extended(inputs, ids)).logits_LV[start:] for ids in answers]
            results.append([self._logps(lv, ids) for lv, ids in zip(full, answers, strict=True)])
        return results

    # --- inside ----------------------------------------------------------------------------------

    def _inputs(self, image: bytes, question: str, row: int) -> dict[str, Tensor]:
        self._prompter.prompt(question, row=row)  # refuses a second placeholder
        try:
            picture = decode(image)
        except BadImageError as error:
            raise ArtifactError(f"row {row}: image: {error}") from error
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs: Any = self._processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return {name: value.to(self.module.device) for name, value in inputs.items()}

    def _check_length(self, row: int, length: int) -> None:
        limit: int = self.module.config.get_text_config().max_position_embeddings
        if length > limit:
            raise ArtifactError(
                f"row {row}: prompt, image and answer take {length} tokens, more than {limit}"
            )

    def _run(self, inputs: dict[str, Tensor], cache: Any = None) -> _Run:
        dtype = self.module.dtype
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        output = self.module(**cast, past_key_values=cache, use_cache=True)
        logits_LV = output.logits[0].float()
        if not logits_LV[-1].isfinite().all():
            raise ArtifactError(NOT_FINITE)
        return _Run(logits_LV, output.past_key_values)

    def _more(self, tokens: Sequence[int], cache: Any) -> _Run:
        """Runs tokens after what `cache` holds, which it extends; their positions follow from it."""
        return self._run(
            {"input_ids": torch.tensor([list(tokens)], device=self.module.device)}, cache
        )

    def _prefix(self, inputs: dict[str, Tensor], length: int) -> Callable[[list[int]], Tensor]:
        """Runs the first `length` tokens; gives logits from the last of them on, after more tokens.

        Families keep the positions of the image in the module, so one prefix is used at a time.
        """
        first = _cut(inputs, length)
        run = self._run(first)
        shareable = _can_be_copied(run.cache)

        def continued(tokens: list[int]) -> Tensor:
            if not shareable:
                return self._run(_extended(first, tokens)).logits_LV[length - 1 :]
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
            self._check_length(number, _length(each))
        prompts = [each["input_ids"][0].tolist() for each in inputs]
        columns = zip(*prompts, strict=False)
        common = next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), None)
        shared = min(map(len, prompts)) - 1 if common is None else common
        if self._prompter.image_id in prompts[0][shared:] or shared < 1:
            return [self._run(each).logits_LV[-1] for each in inputs]  # the question comes first
        prefix = self._prefix(inputs[0], shared)
        return [prefix(ids[shared:])[-1] for ids in prompts]

    def _samples(
        self, inputs: dict[str, Tensor], seeds: Sequence[int], decoding: Decoding
    ) -> list[list[int]]:
        first, answers = self._run(inputs), []
        for number, seed in enumerate(seeds):
            run = first
            if _can_be_copied(first.cache):
                run = _Run(first.logits_LV, copy.deepcopy(first.cache))
            elif number:  # the last answer used it up
                run = self._run(inputs)
            answers.append(self._sample(run, seed, decoding))
        return answers

    def _sample(self, run: _Run, seed: int, decoding: Decoding) -> list[int]:
        steps, tokens = decoding.max_new_tokens, list[int]()
        uniforms_1T = draw_uniforms([seed], steps).to(run.logits_LV.device)
        for step in range(steps):
            tokens.append(int(pick(run.logits_LV[-1:], uniforms_1T[:, step], decoding)))
            if tokens[-1] in self._eos_ids or step + 1 == steps:
                break
            run = self._more(tokens[-1:], run.cache)
        return tokens

    def _beams(self, inputs: dict[str, Tensor], decoding: Decoding) -> list[int]:
        ids = self.module.generate(
            **inputs,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=False,
            eos_token_id=self._eos_ids,
            pad_token_id=self._prompter.pad_id,
        )
        tokens: list[int] = ids[0, _length(inputs) :].tolist()
        return tokens


def _length(inputs: dict[str, Tensor]) -> int:
    return inputs["input_ids"].shape[1]


def _is_row(value: Tensor, length: int) -> bool:
    """Whether an input has one entry per token."""
    return value.ndim == 2 and value.shape == (1, length) and not value.is_floating_point()


def _cut(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    whole = _length(inputs)
    return {k: v[:, :length] if _is_row(v, whole) else v for k, v in inputs.items()}


def _extended(inputs: dict[str, Tensor], tokens: Sequence[int]) -> dict[str, Tensor]:
    """The inputs with more text: seen, and of the kind 0 where a family tells kinds apart."""
    whole, extended = _length(inputs), dict(inputs)
    for name, value in inputs.items():
        if not _is_row(value, whole):
            continue
        ids = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}
        more = value.new_tensor([ids.get(name, [0] * len(tokens))])
        extended[name] = torch.cat([value, more], 1)
    return extended


def _can_be_copied(cache: Any) -> bool:
    layers = cache.layers if isinstance(cache, DynamicCache) else ()
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
