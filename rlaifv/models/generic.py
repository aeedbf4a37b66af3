"""Any image-text model of transformers, through its own forward and processor: slower.

The fallback for families without a `VisionSide`; see `one_by_one`. In training each answer is a
row of its own, its image included.

Shapes:  T tokens of an answer;  M tokens of all answers.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import DynamicLayer

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.images import BadImageError, decode
from rlaifv.models.base import Branches, Decoding
from rlaifv.models.branches import FullRows
from rlaifv.models.one_by_one import Inputs, OneByOne, Run, extended, num_tokens
from rlaifv.models.prompting import Prompter


class GenericModel(OneByOne):
    """A `branches.TrainableModel` over `AutoModelForImageTextToText`."""

    def __init__(
        self,
        module: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        batch_size: int,
        eos_ids: Sequence[int],
        source: str,
    ) -> None:
        self._processor = processor
        self._prompter = Prompter(processor, source=source, prompt="chat_template")
        super().__init__(module, self._prompter, batch_size=batch_size, eos_ids=eos_ids)

    def _inputs(self, image: bytes, question: str, row: int) -> Inputs:
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

    def encode_branches(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> FullRows:
        """Each answer with its prompt and image; see `TrainableModel`."""
        asked = [self._asked(row, number, max_length) for number, row in enumerate(rows)]
        return FullRows(
            [extended(inputs, ids) for inputs, answers in asked for ids in answers],
            torch.tensor(
                [token for _, answers in asked for ids in answers for token in ids],
                device=self.module.device,
            ),
            tuple(tuple(map(len, answers)) for _, answers in asked),
        )

    def branch_logps(self, batch: FullRows) -> list[list[Tensor]]:
        """Token log-probabilities, one row per answer; see `TrainableModel`."""
        counts = [count for row in batch.counts for count in row]
        targets = torch.split(batch.targets_M, counts)
        logps = iter(map(self._answer_logps, batch.inputs, targets))
        return [[next(logps) for _ in row] for row in batch.counts]

    def _answer_logps(self, inputs: Inputs, targets_T: Tensor) -> Tensor:
        kept = len(targets_T) + 1
        named = inspect.signature(self.module.forward).parameters
        options = {"logits_to_keep": kept} if "logits_to_keep" in named else {}
        output = self.module(**self._cast(inputs), use_cache=False, **options)
        logits_TV: Tensor = output.logits[0, -kept:-1].float()
        return logits_TV.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)

    def _forward(self, inputs: Inputs, cache: Any) -> Run:
        output = self.module(**inputs, past_key_values=cache, use_cache=True)
        return Run(output.logits[0].float(), output.past_key_values)

    def _image_end(self, inputs: Inputs) -> int:
        ids: list[int] = inputs["input_ids"][0].tolist()
        return len(ids) - ids[::-1].index(self._prompter.image_id)

    def _can_be_copied(self, cache: Any) -> bool:
        """Not sliding windows, nor recurrent layers."""
        layers = cache.layers if isinstance(cache, DynamicCache) else ()
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def _beams(self, inputs: Inputs, decoding: Decoding) -> list[int]:
        if decoding.repetition_penalty != 1:
            raise ConfigError("beam search of this family: only with repetition_penalty 1")
        ids = self.module.generate(
            **inputs,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=False,
            eos_token_id=self._eos_ids,
            pad_token_id=self._prompter.pad_id,
        )
        tokens: list[int] = ids[0, num_tokens(inputs) :].tolist()
        return tokens
