"""From questions and answers to tokens and back, and from image bytes to pixels.

A prompt is rendered by the checkpoint's own chat template (one user turn: image, then question),
or as one of LLaVA's conversations, where the texts before and after the image are tokenised apart.
An answer is tokenised apart from its prompt and ends with the end-of-sequence token. Generated
text keeps every character that the tokenizer gives back, so tokenising it again yields the tokens
that were generated, except where a tokenizer has several spellings of one text and the model did
not choose the canonical one. An answer cut at its length limit is scored with an end token all
the same, as in the reference release.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProcessorMixin

from rlaifv.config import PromptName
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.images import BadImageError, decode
from rlaifv.models.branches import to_device
from rlaifv.models.words import Words

_MANNERS = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
SYSTEMS = {
    name: f"A chat between a curious {who} and an artificial intelligence assistant. "
    + _MANNERS.format(who)
    for name, who in (("llava_v1", "human"), ("vicuna_v1", "user"))
}
"""System prompts of LLaVA's conversations.

The release samples, trains and evaluates with `llava_v1`; LLaVA's own evaluation has `vicuna_v1`.
"""


MAX_THREADS = 8
"""That read images: most of the work is in C, without Python's lock."""


class Images(NamedTuple):
    """The different images of some rows, perhaps still being read."""

    reading: list[Future[Tensor]]
    of_row: list[int]
    num_tokens: int

    def of(self, rows: range) -> "Images":
        """Those of some rows."""
        numbers = [self.of_row[row] for row in rows]
        places = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
        reading = [self.reading[number] for number in places]
        return Images(reading, [places[number] for number in numbers], self.num_tokens)


class Prompter(Words):
    """Tokens and pixels of one checkpoint."""

    def __init__(
        self, processor: ProcessorMixin, *, source: str, prompt: PromptName = "auto"
    ) -> None:
        """`auto`: the checkpoint's template if it has one, else `llava_v1`."""
        self._processor = processor
        super().__init__(processor.tokenizer, source=source)
        if prompt == "auto":
            prompt = "chat_template" if processor.chat_template else "llava_v1"
        if prompt == "chat_template" and not processor.chat_template:
            raise ConfigError(
                f"{source}: has no chat template; set prompt to llava_v1 or vicuna_v1"
            )
        self._system = SYSTEMS.get(prompt)
        self._threads: ThreadPoolExecutor | None = None
        self.image_id: int = self._tokenizer.convert_tokens_to_ids(processor.image_token)

    def prompt(self, question: str, *, row: int) -> list[int]:
        """Token ids with one placeholder for the image; raises ArtifactError naming the row."""
        return self.prompts([question], rows=[row])[0]

    def prompts(self, questions: Sequence[str], *, rows: Sequence[int]) -> list[list[int]]:
        """The same for many."""
        if not questions:
            return []
        every = self._templated(questions) if self._system is None else self._llava(questions)
        for ids, row in zip(every, rows, strict=True):
            if ids.count(self.image_id) != 1:
                raise ArtifactError(
                    f"row {row}: the prompt has {ids.count(self.image_id)} image placeholders, "
                    f"expected 1; does the question contain {self._processor.image_token!r}?"
                )
        return every

    def _templated(self, questions: Sequence[str]) -> list[list[int]]:
        texts = [
            self._processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for text in questions
        ]
        bos = self._tokenizer.bos_token
        add_specials = bos is None or not texts[0].startswith(bos)
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=add_specials)["input_ids"]
        return ids

    def _llava(self, questions: Sequence[str]) -> list[list[int]]:
        """As LLaVA's code does it: two texts, each tokenised by itself, the image between."""
        bos = self._tokenizer.bos_token_id
        before = self._tokenizer(f"{self._system} USER: ", add_special_tokens=False)["input_ids"]
        after = [f"\n{question} ASSISTANT:" for question in questions]
        tails = self._tokenizer(after, add_special_tokens=False)["input_ids"]
        start = [*([] if bos is None else [bos]), *before, self.image_id]
        return [[*start, *tail] for tail in tails]

    def with_image(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """The placeholder repeated, once per image feature."""
        at = ids.index(self.image_id)
        return [*ids[:at], *([self.image_id] * num_tokens), *ids[at + 1 :]]

    def read(
        self, images: Sequence[bytes], rows: Sequence[int], *, raw: bool
    ) -> list[Future[Tensor]]:
        """Each image as the vision tower takes it, [1, C, Y, X]; read by threads meanwhile.

        `raw`: as bytes where that is possible, for `normalised` to finish on a GPU. `result()`
        raises ArtifactError naming the row.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))))
        transform: Any = self._processor.image_processor
        skipped = ("do_rescale", "do_normalize")
        raw = raw and all(getattr(transform, name, False) for name in skipped)
        options = dict.fromkeys(skipped, False) if raw else {}
        return [
            self._threads.submit(self._pixels, image, row, options)
            for image, row in zip(images, rows, strict=True)
        ]

    def pixels(self, images: Sequence[bytes], rows: Sequence[int]) -> Tensor:
        """The images as the vision tower takes them, [I, C, Y, X]; errors as in `read`."""
        return torch.cat([each.result() for each in self.read(images, rows, raw=False)])

    def _pixels(self, image: bytes, row: int, options: dict[str, bool]) -> Tensor:
        try:
            picture = decode(image)
        except BadImageError as error:
            raise ArtifactError(f"row {row}: image: {error}") from error
        batch: Any = self._processor.image_processor([picture], return_tensors="pt", **options)
        pixels_1: Tensor = batch["pixel_values"]
        return pixels_1

    def normalised(self, pixels: Tensor) -> Tensor:
        """Images on their device; bytes become what the processor would have made of them."""
        if pixels.dtype != torch.uint8:
            return pixels
        transform: Any = self._processor.image_processor
        mean, std = (
            to_device(torch.tensor(values).view(-1, 1, 1), pixels.device)
            for values in (transform.image_mean, transform.image_std)
        )
        normalised: Tensor = (pixels.float() * transform.rescale_factor - mean) / std
        return normalised

    def num_image_tokens(self, pixels: Tensor) -> int:
        """How many features the vision tower makes of each of these images."""
        processor, (height, width) = self._processor, pixels.shape[-2:]
        patches: int = (height // processor.patch_size) * (width // processor.patch_size)
        dropped = processor.vision_feature_select_strategy == "default"  # the class token
        return patches + int(processor.num_additional_image_tokens) - int(dropped)
