"""A tiny policy, pairs and a sink for the tests of training; run as a program it trains."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlaifv.config import LoraConfig, ModelSpec, TrainConfig
from rlaifv.models import load_model
from rlaifv.models.base import Branches
from rlaifv.records import Image, PreferencePair, ReferenceLogps
from rlaifv.training import StepMetrics, TrainedCheckpoint, TrainRequest, train
from rlaifv.training.processes import Processes
from tests.tiny import make_tiny_llava, random_image

WORDS = ("a", "red", "blue", "green", "ball", "cube", "cone", "left", "right", "small", "large")
LORA = LoraConfig(rank=4, alpha=8, dropout=0.1)
CONFIG = TrainConfig(
    learning_rate=1e-3, epochs=2, global_batch_size=4, micro_batch_size=2, warmup_ratio=0.0
)
NUM_STEPS = 6
"""Of 10 pairs, two epochs and batches of 4."""


class Killed(Exception):
    """Stands for the end of the process."""


class Folders:
    """A sink that keeps everything in folders, and may be killed at a point of its choice."""

    def __init__(self, root: Path, *, dies_at: tuple[str, int] | None = None) -> None:
        self.root, self._dies_at = root, dies_at
        self.metrics: list[StepMetrics] = []
        self.offered: list[int] = []

    def checkpoint(self, made: TrainedCheckpoint, save: Callable[[Path], None]) -> None:
        self.offered.append(made.step)
        self._fill(f"checkpoint-{made.step}", save)
        self._reached("checkpoint", made.step)

    def wants_state(self) -> bool:
        return True

    def state(self, step: int, save: Callable[[Path], None]) -> None:
        self._fill(f"state-{step}", save)
        self._reached("state", step)

    def progress(self, metrics: StepMetrics) -> None:
        self.metrics.append(metrics)
        trap = self.root / f"kill-{Processes().rank.number}-after-{metrics.step}"
        if trap.exists():
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        self._reached("progress", metrics.step)

    def latest_state(self) -> Path | None:
        states = self.root.glob("state-*")
        return max(states, key=lambda path: int(path.name.split("-")[1]), default=None)

    def _fill(self, name: str, save: Callable[[Path], None]) -> None:
        unfinished = self.root / f"unfinished-{name}-{random.getrandbits(32):08x}"
        unfinished.mkdir(parents=True)
        save(unfinished)
        if not (self.root / name).exists():
            unfinished.rename(self.root / name)

    def _reached(self, event: str, step: int) -> None:
        print(f"{event} {step}", flush=True)
        if self._dies_at == (event, step):
            raise Killed


def make_policy(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(make_tiny_llava(folder)), dtype="float32")


def make_pair(index: int) -> PreferencePair:
    rng = random.Random(index)
    chosen, rejected = (" ".join(rng.choices(WORDS, k=rng.randint(2, 8))) for _ in range(2))
    return PreferencePair(
        ds_name="test",
        image=Image(bytes=random_image(index // 2)),
        question="What is in the picture?",
        chosen=chosen,
        rejected=rejected,
        origin_dataset="",
        origin_split="{}",
        idx=index,
        image_path="",
        pair_id=f"pair-{index:02}",
    )


def reference_logps(
    policy: ModelSpec, pairs: Sequence[PreferencePair]
) -> dict[str, ReferenceLogps]:
    rows = [
        Branches(pair.image.bytes, pair.question, (pair.chosen, pair.rejected)) for pair in pairs
    ]
    scores = load_model(policy).sequence_logps(rows)
    return {
        pair.pair_id: ReferenceLogps(
            pair_id=pair.pair_id,
            chosen_token_nats=chosen.tolist(),
            rejected_token_nats=rejected.tolist(),
        )
        for pair, (chosen, rejected) in zip(pairs, scores, strict=True)
    }


def make_request(policy: ModelSpec, reflogps: Mapping[str, ReferenceLogps]) -> TrainRequest:
    """Ten pairs, full fine-tuning, a checkpoint after every second step."""
    return TrainRequest(
        policy=policy,
        base="hub/tiny",
        pairs=[make_pair(index) for index in range(10)],
        reflogps=reflogps,
        config=CONFIG,
        seed=0,
        steps=(2, 4, NUM_STEPS),
    )


def with_config(request: TrainRequest, **changes: object) -> TrainRequest:
    return request._replace(config=request.config.model_copy(update=changes))


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    tensors: dict[str, Tensor] = load_file(file)
    return tensors


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def main(policy_folder: str, root: str, *cases: str) -> None:
    """Trains (or goes on) once per case: JSON of a TrainConfig's changes, under `root/<number>`."""
    policy = ModelSpec(path=policy_folder, dtype="float32")
    pairs = [make_pair(index) for index in range(10)]
    request = make_request(policy, reference_logps(policy, pairs))
    for number, case in enumerate(cases or ("{}",)):
        sink = Folders(Path(root) / str(number))
        config = TrainConfig.model_validate(request.config.model_dump() | json.loads(case))
        train(request._replace(config=config, resume_from=sink.latest_state()), sink)
        losses = [metrics.loss for metrics in sink.metrics]
        if Processes().is_main:
            (sink.root / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
