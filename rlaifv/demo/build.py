"""Makes all shipped files from a seed: data, tokenizer, and the weights of both models."""

import concurrent.futures
import itertools
import json
import logging
import multiprocessing
import random
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlavaProcessor

from rlaifv.demo import INSTRUCTIONS, LABELLER, POLICY, SELECTION, TEST, VOCABULARY
from rlaifv.demo.language import (
    write_caption,
    write_inventory,
    write_probe,
    write_request,
)
from rlaifv.demo.scenes import SYNONYMS, Content, Scene, make_scene, scene_png
from rlaifv.demo.teach import (
    INVENTORY_LESSON,
    LABELLER_LESSON,
    POLICY_LESSON,
    Lesson,
    teach,
    teach_to_see,
)
from rlaifv.demo.tiny_llava import make_model, make_processor

log = logging.getLogger(__name__)

NUM_INSTRUCTIONS = 2400
NUM_SELECTION = 200
NUM_TEST = 500

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
INSTRUCTION_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("image", _IMAGE),
        ("origin_dataset", pa.string()),
        ("origin_split", pa.string()),
        ("idx", pa.int64()),
        ("image_path", pa.string()),
    ]
)
"""The columns of a source in the layout of RLAIF-V-Dataset."""

BENCHMARK_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("image", _IMAGE),
        ("question", pa.string()),
        ("objects", pa.list_(pa.string())),
    ]
)
"""The columns of an object benchmark."""


class Splits(NamedTuple):
    """The scenes that ship; no content is in two splits or twice in one."""

    instructions: tuple[Scene, ...]
    selection: tuple[Scene, ...]
    test: tuple[Scene, ...]


def make_splits(seed: int) -> Splits:
    """The shipped scenes of that seed."""
    used: set[Content] = set()

    def take(split: str, number: int) -> tuple[Scene, ...]:
        taken: list[Scene] = []
        for index in itertools.count():
            scene = make_scene(seed, split, index)
            if scene.content not in used:
                used.add(scene.content)
                taken.append(scene)
            if len(taken) == number:
                break
        return tuple(taken)

    return Splits(
        take("instructions", NUM_INSTRUCTIONS),
        take("selection", NUM_SELECTION),
        take("test", NUM_TEST),
    )


def build(out: Path, seed: int) -> None:
    """Write policy/, labeller/ and data/ under out; files of an earlier build are replaced."""
    splits = make_splits(seed)
    _write_data(out, splits, seed)
    reserved = frozenset(scene.content for scene in itertools.chain(*splits))
    processor = make_processor(_tokenizer_texts(seed))
    eyes = teach_to_see(processor, seed, reserved)
    teach(processor, eyes, INVENTORY_LESSON, seed, reserved)
    weights = {name: value.numpy() for name, value in eyes.state_dict().items()}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        jobs = [
            pool.submit(_teach_and_save, folder, lesson, _Start(processor, weights, seed, reserved))
            for folder, lesson in (
                (out / POLICY, POLICY_LESSON.name),
                (out / LABELLER, LABELLER_LESSON.name),
            )
        ]
        for job in jobs:
            job.result()


class _Start(NamedTuple):
    processor: LlavaProcessor
    weights: dict[str, Any]
    """NumPy arrays: tensors would travel through shared memory."""
    seed: int
    reserved: frozenset[Content]


def _teach_and_save(folder: Path, lesson_name: str, start: _Start) -> None:
    """One process, one thread: two of them use two cores, and a thread count changes no bit."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    lessons: dict[str, Lesson] = {item.name: item for item in (POLICY_LESSON, LABELLER_LESSON)}
    model = make_model(start.processor)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in start.weights.items()})
    teach(start.processor, model, lessons[lesson_name], start.seed, start.reserved)
    model.save_pretrained(folder)
    start.processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _tokenizer_texts(seed: int) -> list[str]:
    """Everything that is ever said, often enough that each word becomes one token."""
    rng = random.Random(f"{seed}/tokenizer")
    texts = ["USER: \n ASSISTANT:", "Yes", "yes", "No", "no"] * 4000
    for index in range(4000):
        scene = make_scene(seed, "tokenizer", index)
        probe = write_probe(scene, rng)
        texts += [write_request(rng), write_caption(scene, rng), probe.question]
        texts += write_inventory(scene, rng)
    return texts


def _write_data(out: Path, splits: Splits, seed: int) -> None:
    (out / INSTRUCTIONS).parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/requests")
    instructions = []
    for index, scene in enumerate(splits.instructions):
        path = f"instructions/{index:06d}.png"
        instructions.append(
            {
                "question": write_request(rng),
                "image": {"bytes": scene_png(scene), "path": path},
                "origin_dataset": "demo_scenes",
                "origin_split": json.dumps({"type": "detailed_description", "seed": seed}),
                "idx": index,
                "image_path": path,
            }
        )
    _write_table(out / INSTRUCTIONS, instructions, INSTRUCTION_SCHEMA)
    for name, file, scenes in (
        ("selection", SELECTION, splits.selection),
        ("test", TEST, splits.test),
    ):
        rows = [
            {
                "question_id": f"{name}-{index:04d}",
                "image": {"bytes": scene_png(scene), "path": f"{name}/{index:04d}.png"},
                "question": write_request(rng),
                "objects": list(scene.kinds),
            }
            for index, scene in enumerate(scenes)
        ]
        _write_table(out / file, rows, BENCHMARK_SCHEMA)
    lines = (", ".join((kind, *synonyms)) for kind, synonyms in SYNONYMS.items())
    (out / VOCABULARY).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
