"""What torch compiled outlives the process: stored in the run, found by the stage's next one."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from controller.gc import Collection
from controller.places import run_place
from rlaifv.config import RunConfig
from rlaifv.errors import TransientError
from rlaifv.models import compilations, lines
from rlaifv.pipeline import COMPILED, compiled_key
from rlaifv.store import Store, open_store
from tests.commands_support import command, finished_run
from tests.jobs_support import ROOT, environment, make_config, make_run, make_source, run_stages
from tests.tiny import make_tiny_llava

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
PROGRAM = """
import json, logging, sys
import torch
from torch._dynamo.utils import counters
from rlaifv.config import RunConfig
from rlaifv.models import compilations
from rlaifv.pipeline import CONFIG
from rlaifv.store import open_store

logging.basicConfig(level=logging.INFO)
run = open_store(sys.argv[1])
weight = torch.ones(8, 8, requires_grad=True)
with compilations.kept(run, run.read_json(CONFIG, RunConfig), stage="train"):
    compilations.load()
    layer = torch.compile(lambda x: torch.nn.functional.silu(x @ weight) * 2 + x, dynamic=True)
    for rows in sys.argv[2:]:
        layer(torch.ones(int(rows), 8)).sum().backward()
caches = counters["aot_autograd"]
print(json.dumps([caches["autograd_cache_miss"], caches["autograd_cache_hit"]]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Store:
    source = make_source(tmp_path / "source", num_rows=4)
    return make_run(tmp_path / "run", make_config(source, model=tmp_path / "no-model"))


@pytest.fixture
def config(run: Store) -> RunConfig:
    return run.read_json("config.json", RunConfig)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as the names of objects go; what torch keeps for the whole process is put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    changed = {"recompile_limit": 8, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(changed):
        yield


def stored(run: Store) -> dict[str, bytes]:
    return {item.key: run.read_bytes(item.key) for item in run.objects(COMPILED)}


def compile_apart(run: Store, tmp_path: Path, *rows: int) -> tuple[int, int, str]:
    """Misses and hits of a process with an empty cache of its own, and what it logged."""
    cache = tmp_path / f"cache-{'-'.join(map(str, rows))}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), *map(str, rows)],
        capture_output=True,
        text=True,
        env=environment(TORCHINDUCTOR_CACHE_DIR=str(cache)),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    misses, hits = json.loads(done.stdout)
    return misses, hits, done.stderr


@pytest.mark.slow
@needs_compiler
def test_the_next_process_finds_what_was_compiled(run: Store, tmp_path: Path) -> None:
    misses, hits, said = compile_apart(run, tmp_path, 16, 32)
    assert (misses, hits) == (1, 0)
    assert "nothing compiled is stored yet" in said
    assert "new pieces" in said
    first = stored(run)
    assert [key.startswith("compiled/train-") for key in first] == [True]
    misses, hits, said = compile_apart(run, tmp_path, 48, 64)
    assert (misses, hits) == (0, 1)
    assert "nothing was compiled that was not stored" in said
    assert stored(run) == first


@pytest.mark.slow
@needs_compiler
def test_a_broken_object_is_replaced(run: Store, tmp_path: Path) -> None:
    compile_apart(run, tmp_path, 16)
    ((key, data),) = stored(run).items()
    run.write_bytes(key, data[: len(data) // 2])
    misses, hits, said = compile_apart(run, tmp_path, 24)
    assert (misses, hits) == (1, 0)
    assert f"{key} is broken" in said
    assert "new pieces" in said
    assert len(stored(run)[key]) > len(data) // 2


@pytest.mark.usefixtures("a_gpu")
def test_the_first_compilation_of_a_stage_looks_into_the_run(
    run: Store, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    key = compiled_key("sample", compilations._environment(3))
    assert key.endswith("-NVIDIA-H100-80GB-HBM3-3.bin")
    run.write_bytes(key, b"of another time")
    lines.compiled(lambda x: x)  # outside of a stage nothing is looked up
    assert not caplog.records
    with compilations.kept(run, config, stage="sample", rank=3):
        for _ in range(2):
            lines.compiled(lambda x: x)
    mine = [record for record in caplog.records if record.name == compilations.__name__]
    said = [record.message for record in mine if record.levelno >= logging.WARNING]
    assert said == [f"what was compiled cannot be used: {key} is broken"]  # once


@pytest.mark.usefixtures("a_gpu")
def test_switched_off_nothing_is_looked_up(
    run: Store, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    off = config.model_copy(update={"keep_compiled": False})
    with compilations.kept(run, off, stage="sample"):
        lines.compiled(lambda x: x)
    assert not caplog.records


class Away:
    """A store's back end that cannot be reached."""

    uri = "s3://away"

    def __getattr__(self, name: str) -> Any:
        def fails(*_arguments: object) -> None:
            raise TransientError(f"{name}: the endpoint cannot be reached")

        return fails


class Info(NamedTuple):
    """What torch says of its artifacts."""

    artifacts: dict[str, list[str]]


INFO = Info({"inductor": ["a"]})


@pytest.mark.parametrize(
    ("size", "problem"),
    [(1, "cannot be reached"), (compilations.MOST_BYTES + 1, "not stored: 537 MB")],
)
@pytest.mark.usefixtures("a_gpu")
def test_what_cannot_be_stored_is_a_warning(
    config: RunConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    problem: str,
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (bytes(size), INFO))
    backend: Any = Away()
    with compilations.kept(Store(backend), config, stage="sample"):
        compilations.load()
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    first, second = (record.message for record in warned)
    assert "size: the endpoint cannot be reached" in first
    assert problem in second


@pytest.mark.usefixtures("a_gpu")
def test_a_stage_that_fails_stores_nothing(
    run: Store, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", INFO))

    def stage(*, fails: bool) -> None:
        with compilations.kept(run, config, stage="sample"):
            compilations.load()
            if fails:
                raise TransientError("no")

    with pytest.raises(TransientError):
        stage(fails=True)
    assert not stored(run)
    stage(fails=False)
    assert list(stored(run).values()) == [b"code"]


def test_a_stage_on_a_cpu_neither_looks_nor_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "source", num_rows=3)
    config = make_config(source, model=make_tiny_llava(tmp_path / "model"))
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, ["prepare", "sample"])
    assert "compiled" not in capsys.readouterr().err
    assert not stored(open_store(str(run)))


def test_a_stage_without_a_model_does_without_torch() -> None:
    program = "import sys, jobs.pair; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_what_was_compiled_is_no_artifact_and_goes_when_the_run_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = finished_run(tmp_path)
    reading = (
        ["ls", "tiny"],
        ["verify", "tiny"],
        ["lineage", "answers", "tiny"],
        ["show", "table", "tiny"],
    )

    def said() -> list[tuple[int, str]]:
        return [(command(*words, root=tmp_path), capsys.readouterr().out) for words in reading]

    before = said()
    key = compiled_key("train", "0.1.0-torch-2.15.0-NVIDIA-H100-0")
    place.store.write_bytes(key, b"code")
    assert said() == before
    assert [code for code, _text in before] == [0] * len(reading)
    words = ["fork", "tiny", "other", "--from", "train", "--set", "keep_compiled=false"]
    assert command(*words, root=tmp_path) == 0
    assert not list(run_place(str(tmp_path), "other").store.objects(COMPILED))
    for kind in ("pairs", "checkpoint"):
        assert command("export", kind, "tiny", "--to", str(tmp_path / kind), root=tmp_path) == 0
        assert not list((tmp_path / kind).rglob("*.bin"))
    capsys.readouterr()
    assert command("gc", "tiny", "--json", "--older-than", "0", root=tmp_path) == 0
    found = Collection.model_validate_json(capsys.readouterr().out)
    assert [(item.kind, item.key, item.bytes) for item in found.items] == [("compiled", key, 4)]
    choice = place.folder / "iteration-1/choice.json"
    chosen = choice.read_bytes()
    choice.unlink()
    assert command("gc", "tiny", "--delete", root=tmp_path) == 0
    assert place.store.exists(key)  # a run that goes on still needs it
    choice.write_bytes(chosen)
    assert command("gc", "tiny", "--delete", root=tmp_path) == 0
    assert not place.store.exists(key)
