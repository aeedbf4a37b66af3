"""Measurement: what it saves that a part is worked on as soon as it is there, not when its stage is done.

`python -m tests.proofs.overlap`. Runs the first iteration of the demo in turns as it is (a map shard starts
when its input part exists, `respond` while `train` still runs) and with a barrier after each stage,
compares every row, and prints the seconds. Ends with 1 if a row differs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controller.plan import WRITERS
from rlaifv.pipeline import POLICY, Stage, num_shards
from rlaifv.store import Manifest, open_store


def with_barriers(ready: Callable[..., Any]) -> Callable[..., Any]:
    """`controller.plan._ready`, but of whole stages only."""

    def whole(
        config: Any, state: Any, *, stage: Stage, done: Mapping[str, Any], **more: Any
    ) -> Any:
        before = [WRITERS[each].name for each in stage.reads if each != POLICY]
        if any(len(done[each]) < num_shards(config, each) for each in before):
            return None
        return ready(config, state, stage=stage, done=done, **more)

    return whole


def measure(root: Path, name: str) -> tuple[float, dict[str, str]]:
    """Seconds of one run, and the digests of its parts."""
    command = [sys.executable, "-m", "tests.proofs.overlap", "--run", name, str(root)]
    started = time.monotonic()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    run = open_store(str(root / name / "demo"))  # pairs hold the run's name: all have one
    keys = [item.key for item in run.objects("") if item.key.endswith("manifest.json")]
    parts = [part for key in keys for part in run.read_json(key, Manifest).parts]
    return seconds, {part.key: part.rows_sha256 for part in parts}


def drive(name: str, root: str) -> int:
    """One run of the demo in this process."""
    from controller import plan
    from controller.__main__ import main as controller

    if name.startswith("barriers"):
        plan._ready = with_barriers(plan._ready)
    sys.argv[1:] = ["run", "--iterations", "1", "--root", f"{root}/{name}"]
    return controller()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.overlap", description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--run", nargs=2, metavar=("NAME", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return drive(*options.run)
    seconds: dict[str, list[float]] = {"overlap": [], "barriers": []}
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for kind, found in seconds.items():
                took, made = measure(Path(folder), f"{kind}-{turn}")
                found.append(took)
                rows.append(made)
    for kind, found in seconds.items():
        each = " ".join(f"{one:.1f}" for one in found)
        print(f"{kind}: {statistics.mean(found):.1f} s ({each}), {os.cpu_count()} cores")
    equal = all(one == rows[0] for one in rows)
    print(f"{len(rows[0])} parts in each run, rows {'equal' if equal else 'NOT equal'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
