"""Any image-text model of transformers, through its own forward and processor: slower, no training.

The fallback for families without a `VisionSide`; see `one_by_one`.
"""

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import DynamicLayer

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.images import BadImageError, decode
from rlaifv.models.base import Decoding
from rlaifv.models.one_by_one import Inputs, OneByOne, Run, num_tokens
from rlaifv.models.prompting import Prompter


class GenericModel(OneByOne):
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
