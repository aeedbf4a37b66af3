"""What the tests of models share: a tiny checkpoint's questions, and transformers' plain way."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from rlaifv.config import ModelSpec
from rlaifv.images import decode
from rlaifv.models import load_trainable
from rlaifv.models.base import Branches, Prompt, YesNo
from rlaifv.models.shared_prefix import SharedPrefixModel
from tests.tiny import random_image

QUESTIONS = (
    "Is there a dog in the image? Please answer yes or no.",
    "Is there a red cup?",
    "Is there a red lamp on the wooden table near the window? Please answer yes or no.",
)
REQUESTS = ("Describe the image in detail.", "What?", "What do you see near the blue chair?")
IMAGES = tuple(random_image(seed) for seed in range(3))
EOS_IDS = [2, *range(100, 140)]
"""Enough end tokens that a random model stops now and then."""


def spec(folder: Path, *, batch_size: int = 4) -> ModelSpec:
    return ModelSpec(path=str(folder), dtype="float32", batch_size=batch_size)


def load_engine(spec: ModelSpec) -> SharedPrefixModel:
    """The engine of our own families."""
    engine = load_trainable(spec)
    assert isinstance(engine, SharedPrefixModel)
    return engine


def with_eos(folder: Path, eos_ids: list[int] = EOS_IDS) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos_ids}))
    return folder


class Plain:
    """transformers as its documentation shows it."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(str(folder), backend="pil")
        self.module: Any = LlavaForConditionalGeneration.from_pretrained(str(folder)).eval()

    def inputs(self, image: bytes, question: str) -> Any:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        return self.processor(
            images=decode(image), text=text, return_tensors="pt", add_special_tokens=False
        )

    def generate(self, image: bytes, question: str, *, steps: int, beams: int) -> list[int]:
        inputs = self.inputs(image, question)
        ids = self.module.generate(
            **inputs, max_new_tokens=steps, num_beams=beams, do_sample=False, eos_token_id=EOS_IDS
        )
        new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return new

    def next_probabilities(self, image: bytes, question: str) -> Tensor:
        with torch.no_grad():
            logits = self.module(**self.inputs(image, question)).logits[0, -1]
        return cast(Tensor, logits.softmax(-1))

    def one_by_one(self, image: bytes, question: str) -> YesNo:
        p = self.next_probabilities(image, question)
        ids = self.processor.tokenizer.convert_tokens_to_ids(["yes", "Yes", "no", "No"])
        return YesNo(float(p[ids[:2]].sum()), float(p[ids[2:]].sum()))


def make_prompts(seeds: tuple[int, ...] = (0,)) -> list[Prompt]:
    return [Prompt(image, request, seeds) for image in IMAGES for request in REQUESTS]


def make_rows() -> list[Branches]:
    answers = (("A dog.", "There is a cat and a lamp.", "x"), ("no",), ("Two green bottles", ""))
    return [
        Branches(image, request, texts)
        for image, request, texts in zip(IMAGES, REQUESTS, answers, strict=True)
    ]


class Count:
    """How many tokens a module has seen, or how often it was called."""

    def __init__(self, module: Any) -> None:
        self.tokens = 0
        self.rows = 0
        self._handle = module.register_forward_hook(self._seen, with_kwargs=True)

    def _seen(self, _module: Any, args: Any, kwargs: Any, _output: Any) -> None:
        first = kwargs.get("inputs_embeds", args[0] if args else None)
        assert first is not None
        self.rows += first.shape[0]
        self.tokens += first.shape[0] * first.shape[1]

    def stop(self) -> None:
        self._handle.remove()
