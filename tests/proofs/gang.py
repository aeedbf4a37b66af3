"""Measurement: a random 7B trained by the real trainer, on one GPU or on several.

    python -m tests.proofs.gang FOLDER 4 plain full-recompute
    torchrun --nproc-per-node 2 -m -- tests.proofs.gang FOLDER 4 zero2 zero3-recompute resume

The number: pairs in a pass. Cases: `plain` (LoRA, the default), `recompute`, `zero2`, `zero3`,
`zero3-recompute`, `full-recompute` (all language weights), and `resume`, which goes on from the state that `plain` left in the folder. Prints
losses, seconds of each step, pairs per second (median from the third step on) and peak memory. Weights and reference
log-probabilities are made once per folder. On a CPU: a tiny model, to see that it runs.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import distributed

from rlaifv.benchmark_gpu_model import SEVEN_B, photo
from rlaifv.benchmark_iteration import REQUEST, TINY, save_model, sentences
from rlaifv.config import LoraConfig, ModelSpec, TrainConfig
from rlaifv.records import Image, PreferencePair, ReferenceLogps
from rlaifv.training import StepMetrics, TrainedCheckpoint, TrainRequest, train
from rlaifv.training.processes import Processes
from tests.training_support import make_pair, reference_logps

ON_GPU = torch.cuda.is_available()
NUM_PAIRS, BATCH, STEPS = 32, 16, (4, 8)


def make_pairs() -> list[PreferencePair]:
    """Answers of four to six sentences of 20 words; two pairs per picture."""
    said = sentences(400)
    answers = [
        [" ".join(said[(13 * i + 7 * k + 31 * j) % 400] for j in range(4 + (i + k) % 3)) for k in (0, 1)]
        for i in range(NUM_PAIRS)
    ]  # fmt: skip
    return [
        make_pair(number).model_copy(
            update={
                "image": Image(bytes=photo(number // 2)),
                "question": REQUEST,
                "chosen": chosen,
                "rejected": rejected,
            }
        )
        for number, (chosen, rejected) in enumerate(answers)
    ]


class Timed:
    """A sink that keeps states (or nothing) and remembers when each step ended."""

    def __init__(self, root: Path, *, keeps: bool) -> None:
        self.root, self._keeps = root, keeps
        self.losses: list[float] = []
        self.ends: list[float] = []

    def checkpoint(self, made: TrainedCheckpoint, save: Callable[[Path], None]) -> None:
        """What a checkpoint holds is for the tests."""

    def wants_state(self) -> bool:
        return self._keeps

    def state(self, step: int, save: Callable[[Path], None]) -> None:
        folder = self.root / f"state-{step}"
        folder.mkdir(parents=True)
        save(folder)

    def progress(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)
        self.ends.append(time.monotonic())


def references(
    folder: Path, spec: ModelSpec, pairs: Sequence[PreferencePair], *, is_main: bool
) -> dict[str, ReferenceLogps]:
    """By pair; made by the main process, read by all."""
    file = folder / "references.json"
    if is_main and not file.exists():
        rows = reference_logps(spec, pairs).values()
        file.write_text(json.dumps([row.model_dump() for row in rows]))
    if distributed.is_initialized():
        distributed.barrier()
    found = [ReferenceLogps.model_validate(row) for row in json.loads(file.read_text())]
    return {row.pair_id: row for row in found}


def main(folder: Path, micro_batch_size: int, cases: Sequence[str]) -> None:
    processes, dtype = Processes(), torch.bfloat16 if ON_GPU else torch.float32
    is_main, model = processes.is_main, folder / "model"
    if is_main and not model.exists():
        shape, device = (SEVEN_B, "cuda") if ON_GPU else (TINY, "cpu")
        save_model(model, shape, torch.device(device), dtype)
    if distributed.is_initialized():
        distributed.barrier()
    spec = ModelSpec(path=str(model), dtype="bfloat16" if ON_GPU else "float32", batch_size=8)
    pairs = make_pairs()
    reflogps = references(folder, spec, pairs, is_main=is_main)
    for case in cases:
        config = TrainConfig(
            lora=None if "full" in case else LoraConfig(),
            global_batch_size=BATCH,
            micro_batch_size=micro_batch_size,
            epochs=4,
            learning_rate=1e-5,
            warmup_ratio=0.0,
            zero_stage=2 if "zero2" in case else 3 if "zero3" in case else 0,
            gradient_checkpointing="recompute" in case,
        )
        if ON_GPU:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        left = folder / f"state-{STEPS[0]}"
        sink = Timed(folder, keeps=case == "plain" and not left.exists())
        train(
            TrainRequest(
                policy=spec,
                base="random",
                pairs=pairs,
                reflogps=reflogps,
                config=config,
                seed=0,
                steps=STEPS,
                resume_from=left if case == "resume" else None,
            ),
            sink,
        )
        if is_main:
            taken = [
                after - before for before, after in zip(sink.ends, sink.ends[1:], strict=False)
            ]
            told = {
                "case": case,
                "processes": processes.rank.num_processes,
                "losses": sink.losses,
                "seconds": taken,
                "pairs_per_s": BATCH / median(taken[1:]),
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else None,
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    main(root, int(sys.argv[2]), sys.argv[3:] or ["plain"])
