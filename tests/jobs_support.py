"""Runs of the real stages on tiny random models, in this process or in others."""

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from rlaifv.config import (
    BenchmarkSpec,
    LoraConfig,
    ModelSpec,
    PairConfig,
    PrepareConfig,
    RespondConfig,
    RunConfig,
    SampleConfig,
    ShardsConfig,
    TrainConfig,
    VerifyConfig,
)
from rlaifv.pipeline import CONFIG, Shard, num_shards, part_key
from rlaifv.records import Record
from rlaifv.store import Store, open_store

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RLAIFV_TEST_DATA", ROOT.parent / "shared" / "data"))
R = TypeVar("R", bound=Record)
TO_VERIFY = ("prepare", "sample", "claim", "verify")
LOOP = (*TO_VERIFY, "pair", "reflogp", "train", "respond", "grade", "choose")


def random_image(seed: int, *, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of noise; that of `tests.tiny`, without importing torch."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_source(folder: Path, *, num_rows: int, bad: Sequence[int] = ()) -> Path:
    """JSON lines with an image each; those of the rows in `bad` are cut."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_rows):
        data = random_image(number)
        (folder / f"{number}.png").write_bytes(data[:60] if number in bad else data)
        lines.append(json.dumps({"question": f"What is in {number}?", "image": f"{number}.png"}))
    path = folder / "source.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_benchmark(folder: Path, *, num_questions: int = 5) -> BenchmarkSpec:
    """A benchmark of kind `objects` in which everything is a dog."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocabulary.txt").write_text("dog, puppy\ncup\n")
    rows = []
    for number in range(num_questions):
        (folder / f"{number}.png").write_bytes(random_image(1000 + number))
        row = {"question_id": f"q{number}", "question": "What?", "objects": ["dog"]}
        rows.append(json.dumps(row | {"image": f"{number}.png"}))
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return BenchmarkSpec(
        name="objects",
        path=str(folder / "questions.jsonl"),
        vocabulary=str(folder / "vocabulary.txt"),
        use="select",
    )


def make_config(
    source: Path,
    *,
    model: Path,
    num_shards: int = 1,
    group_size: int = 4,
    benchmarks: Sequence[BenchmarkSpec] = (),
    lora: LoraConfig | None = None,
) -> RunConfig:
    spec = ModelSpec(path=str(model), dtype="float32", batch_size=3)
    return RunConfig(
        name="tiny",
        iterations=2,
        policy=spec,
        prepare=PrepareConfig(source=str(source), instructions_per_iteration=20),
        sample=SampleConfig(num_answers=3, temperature=1.0, max_new_tokens=12),
        verify=VerifyConfig(labeller=spec),
        pair=PairConfig(balance_length=False),
        train=TrainConfig(
            learning_rate=1e-3, epochs=1, checkpoints_per_epoch=2, min_pairs=2, lora=lora
        ),
        respond=RespondConfig(benchmarks=tuple(benchmarks), num_beams=1, max_new_tokens=8),
        shards=ShardsConfig(
            instructions=num_shards,
            reflogp=num_shards,
            respond=num_shards,
            group_size=group_size,
        ),
    )


def make_run(folder: Path, config: RunConfig) -> Store:
    run = open_store(str(folder))
    run.write_json_once(CONFIG, config)
    return run


def run_job(run: Store, stage: str, *, shard: str = "0/1", iteration: int = 0) -> int:
    """One shard in this process; its exit code."""
    module = importlib.import_module(f"jobs.{stage}")
    argv = ["--run", str(run), "--iteration", str(iteration), "--shard", shard]
    code: int = module.main(getattr(module, stage), argv)
    return code


def run_stages(run: Store, config: RunConfig, stages: Sequence[str], *, iteration: int = 0) -> None:
    """All shards of the stages, in this process."""
    for stage in stages:
        count = num_shards(config, stage)
        for index in range(count):
            assert run_job(run, stage, shard=f"{index}/{count}", iteration=iteration) == 0


def environment(**changes: str) -> dict[str, str]:
    base = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return dict(os.environ) | base | changes


def spawn_job(
    run: Store, stage: str, *, env: Mapping[str, str] | None = None, shard: str = "0/1"
) -> "subprocess.CompletedProcess[str]":
    """One shard in a process of its own."""
    argv = ["--run", str(run), "--iteration", "0", "--shard", shard]
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{stage}", *argv],
        capture_output=True,
        text=True,
        env=env or environment(),
        cwd=ROOT,
        check=False,
    )


RUN_STAGES = """
import sys
from rlaifv.config import RunConfig
from rlaifv.pipeline import CONFIG
from rlaifv.store import open_store
from tests.jobs_support import run_stages

run = open_store(sys.argv[1])
run_stages(run, run.read_json(CONFIG, RunConfig), sys.argv[2:])
"""


def spawn_stages(run: Store, stages: Sequence[str], *, env: Mapping[str, str]) -> None:
    """All shards of the stages in one process of their own, which imports torch once."""
    subprocess.run(
        [sys.executable, "-c", RUN_STAGES, str(run), *stages], env=env, cwd=ROOT, check=True
    )


def digests(run: Store, config: RunConfig, stages: Mapping[str, str]) -> dict[str, str]:
    """Digest of the rows of each part, by key; `stages` names the artifact of each stage."""
    keys = [
        part_key(0, artifact, Shard(index, num_shards(config, stage)))
        for stage, artifact in stages.items()
        for index in range(num_shards(config, stage))
    ]
    return {key: run.provenance(key).rows_sha256 for key in keys}


def all_rows(run: Store, config: RunConfig, stage: str, record: type[R]) -> list[R]:
    """Rows of all parts, sorted by their values."""
    from rlaifv.pipeline import STAGES

    count = num_shards(config, stage)
    keys = [part_key(0, STAGES[stage].writes, Shard(index, count)) for index in range(count)]
    rows = [row for key in keys for row in run.read_part(key, record)]
    return sorted(rows, key=lambda row: row.model_dump_json())


def jsonl(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path
