"""Measured properties of the shipped files; plain transformers calls, one independent check."""

import io
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from rlaifv.demo import LABELLER, POLICY, TEST
from rlaifv.demo.language import Probe, write_probe
from rlaifv.demo.scenes import KINDS, SYNONYMS, make_scene, scene_pixels
from rlaifv.demo.tiny_llava import encode_prompt, normalise

MAX_NEW_TOKENS = 96
BATCH_SIZE = 50

_CLASS_OF = {name: kind for kind in KINDS for name in (kind, *SYNONYMS[kind])}


class Asked(NamedTuple):
    """A benchmark question with its picture and the names of what is in it."""

    pixels: npt.NDArray[np.uint8]
    question: str
    kinds: frozenset[str]


class Description(NamedTuple):
    """How a policy describes scenes, greedy."""

    response_hallucination: float
    """Answers that name an absent object, among answers that name any."""
    mention_hallucination: float
    recall: float
    mean_words: float


class Check(NamedTuple):
    """What the demo rests on."""

    description: Description
    labeller_accuracy: float
    size_bytes: int


def load(folder: Path) -> tuple[LlavaProcessor, LlavaForConditionalGeneration]:
    """Processor and model of a Hugging Face folder, in float32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return AutoProcessor.from_pretrained(folder), model.eval()


def read_benchmark(path: Path) -> list[Asked]:
    """The rows of an object benchmark file."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [
        Asked(
            np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")),
            row["question"],
            frozenset(row["objects"]),
        )
        for row in rows
    ]


@torch.inference_mode()
def describe(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration, asked: Sequence[Asked]
) -> list[str]:
    """Greedy answers."""
    answers: list[str] = []
    tokenizer = processor.tokenizer
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        prompts = [encode_prompt(processor, item.question) for item in batch]
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        tokens_BL = model.generate(
            **padded,
            pixel_values=normalise([item.pixels for item in batch]),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        new_BL = tokens_BL[:, padded["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_BL, skip_special_tokens=True)
    return answers


def measure_answers(asked: Sequence[Asked], answers: Sequence[str]) -> Description:
    """Compare answers with the ground truth; at least one answer must name an object."""
    said = [mentioned_kinds(answer) for answer in answers]
    truth = [item.kinds for item in asked]
    pairs = list(zip(said, truth, strict=True))
    wrong = [len([kind for kind in names if kind not in kinds]) for names, kinds in pairs]
    return Description(
        sum(map(bool, wrong)) / sum(map(bool, said)),
        sum(wrong) / sum(map(len, said)),
        sum(len(kinds.intersection(names)) for names, kinds in pairs) / sum(map(len, truth)),
        sum(len(answer.split()) for answer in answers) / len(answers),
    )


def mentioned_kinds(text: str) -> list[str]:
    """Kinds that a text names, in order, once per mention."""
    words = re.findall(r"[a-z]+", text.lower())
    return [_CLASS_OF[word] for word in words if word in _CLASS_OF]


@torch.inference_mode()
def says_yes(
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    pixels: npt.NDArray[np.uint8],
    question: str,
) -> bool:
    """Whether p(yes) + p(Yes) > p(no) + p(No) for the first token of the answer."""
    input_ids = torch.tensor([encode_prompt(processor, question)])
    logits = model(input_ids=input_ids, pixel_values=normalise([pixels])).logits[0, -1]
    probabilities = logits.softmax(-1)
    words = ("yes", "Yes", "no", "No")
    yes, also_yes, no, also_no = probabilities[processor.tokenizer.convert_tokens_to_ids(words)]
    return bool(yes + also_yes > no + also_no)


def labeller_accuracy(folder: Path, seed: int, *, num_probes: int) -> float:
    """Share of right verdicts about fresh scenes, half of the claims true."""
    processor, model = load(folder / LABELLER)
    rng = random.Random(f"{seed}/probes")
    num_right = 0
    for index in range(num_probes):
        scene = make_scene(seed, "probes", index)
        probe: Probe = write_probe(scene, rng)
        verdict = says_yes(processor, model, scene_pixels(scene), probe.question)
        num_right += verdict == probe.is_true
    return num_right / num_probes


def check(folder: Path, seed: int = 0) -> Check:
    """Measure the files of a build on its test scenes and 1,000 questions about fresh scenes."""
    asked = read_benchmark(folder / TEST)
    answers = describe(*load(folder / POLICY), asked)
    size_bytes = sum(
        path.stat().st_size
        for part in ("policy", "labeller", "data")
        for path in (folder / part).rglob("*")
        if path.is_file()
    )
    accuracy = labeller_accuracy(folder, seed, num_probes=1000)
    return Check(measure_answers(asked, answers), accuracy, size_bytes)
