"""Several processes and DeepSpeed: the numbers of one process, and the bits after a gang restart."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_tiny_llava
from tests.training_support import LORA, NUM_STEPS

pytestmark = pytest.mark.slow

ADAPTED: dict[str, object] = {"lora": LORA.model_dump()}
CASES: dict[str, dict[str, object]] = {
    "full": {},
    "lora": ADAPTED,
    "zero2-full": {"zero_stage": 2},
    "zero2-lora": {"zero_stage": 2, **ADAPTED},
    "zero3-full": {"zero_stage": 3, "gradient_checkpointing": True},
    "zero3-lora": {"zero_stage": 3, **ADAPTED},
    "zero2-offload": {"zero_stage": 2, "offload": True},
    "zero3-offload": {"zero_stage": 3, "offload": True},
}
NAMES = list(CASES)
KILLED = ("full", "zero2-full", "zero2-lora", "zero3-full", "zero3-lora")
"""Each restart imports everything again in two processes; one process and LoRA: test_training."""
CONTINUED = ("full", "zero2-lora", "zero3-lora", "zero2-offload", "zero3-offload")
TRAIN = ["-m", "tests.training_support"]


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as `jobs.train` sets it
    }
    command = [sys.executable, *words]
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def case_words(policy: Path, root: Path) -> list[str]:
    return [str(policy), str(root), *(json.dumps(case) for case in CASES.values())]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def alone(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process, without torchrun."""
    root = tmp_path_factory.mktemp("alone")
    finish(start([*TRAIN, *case_words(policy, root)]))
    return root


@pytest.fixture(scope="module")
def gang(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by two processes of one node."""
    root = tmp_path_factory.mktemp("gang")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    finish(start([*torchrun, *TRAIN, *case_words(policy, root)]))
    return root


@pytest.fixture(scope="module")
def restarted(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some cases by two nodes of one process each, one of which is killed in each case."""
    root = tmp_path_factory.mktemp("restarted")
    for number in range(len(KILLED)):
        (root / str(number)).mkdir()
        rank, step = random.randrange(2), random.randrange(1, NUM_STEPS)
        (root / str(number) / f"kill-{rank}-after-{step}").touch()
    torchrun = [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}",
        "--max-restarts", str(len(KILLED)),
    ]  # fmt: skip
    words = [*torchrun, *TRAIN, str(policy), str(root)]
    words += [json.dumps(CASES[name]) for name in KILLED]
    finish(start(words), start(words))
    return root


def losses(root: Path, name: str) -> list[float]:
    values: list[float] = json.loads((root / str(NAMES.index(name)) / "losses.json").read_text())
    return values


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_and_every_zero_stage_have_the_losses_of_one(
    alone: Path, gang: Path, name: str
) -> None:
    assert not list(gang.glob("*/unfinished-*")), "both wrote: they were no gang"
    plain = losses(alone, "lora" if "lora" in name else "full")
    assert len(plain) == NUM_STEPS
    assert losses(alone, name) == pytest.approx(plain, abs=1e-4)
    assert losses(gang, name) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_a_gang_are_those_of_one_process(alone: Path, gang: Path, name: str) -> None:
    tree = Path(str(NAMES.index(name)), f"checkpoint-{NUM_STEPS}")
    assert {path.name for path in (gang / tree).iterdir()} == {
        path.name for path in (alone / tree).iterdir()
    }
    (file,) = (gang / tree).glob("*.safetensors")
    ours, theirs = load_file(file), load_file(alone / tree / file.name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=1e-3, rtol=0, msg=key)


@pytest.mark.parametrize("name", KILLED)
def test_gang_with_a_killed_process_restarts_and_ends_with_the_same_bits(
    gang: Path, restarted: Path, name: str
) -> None:
    folder = restarted / str(KILLED.index(name))
    assert not list(folder.glob("kill-*")), "nobody was killed"
    tree = f"checkpoint-{NUM_STEPS}"
    (file,) = (gang / str(NAMES.index(name)) / tree).glob("*.safetensors")
    ours, theirs = load_file(folder / tree / file.name), load_file(file)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_states_of_two_processes_are_continued_by_one(
    gang: Path, policy: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(CONTINUED):
        (tmp_path / str(number)).mkdir()
        (gang / str(NAMES.index(name)) / "state-2").rename(tmp_path / str(number) / "state-2")
    cases = [json.dumps(CASES[name]) for name in CONTINUED]
    finish(start([*TRAIN, str(policy), str(tmp_path), *cases]))
    for number, name in enumerate(CONTINUED):
        continued = json.loads((tmp_path / str(number) / "losses.json").read_text())
        assert continued == pytest.approx(losses(gang, name)[2:], abs=1e-4), name
