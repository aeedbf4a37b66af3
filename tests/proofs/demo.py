"""Proof: the demo's hallucination falls for every seed, and does not when verdicts are shuffled.

`make proof-demo`. Runs `python -m controller run` once per seed and once with shuffled verdicts, each
in a run of its own below --root (what is there already is resumed), and judges
`report/summary.json`. Ends with 1 if a promise below is broken.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from rlaifv.demo import INSTRUCTIONS, PATH, SELECTION, TEST

MIN_SCENES = 400
MIN_UNTRAINED = 0.35
MIN_FALL, MIN_MEAN_FALL = 0.5, 0.6
MAX_RECALL_LOSS = 0.03
MAX_LENGTH_LOSS = 0.25
MAX_CONTROL_FALL = 0.15


class Outcome(NamedTuple):
    """Untrained policy and last iteration of one run, on the test scenes."""

    name: str
    untrained: float
    """Response-level hallucination, a fraction; so is `trained`."""
    trained: float
    recall_loss: float
    """Fraction of all objects, not relative."""
    length_loss: float
    """Relative to the untrained policy's mean length."""
    seconds: float

    @property
    def fall(self) -> float:
        return 1 - self.trained / self.untrained

    def broken(self, *, control: bool) -> list[str]:
        """What this run promised and did not keep."""
        promises = {
            f"untrained >= {MIN_UNTRAINED}": self.untrained >= MIN_UNTRAINED,
            f"fall < {MAX_CONTROL_FALL}": not control or self.fall < MAX_CONTROL_FALL,
            f"fall >= {MIN_FALL}": control or self.fall >= MIN_FALL,
            f"recall loss <= {MAX_RECALL_LOSS}": control or self.recall_loss <= MAX_RECALL_LOSS,
            f"length loss <= {MAX_LENGTH_LOSS}": control or self.length_loss <= MAX_LENGTH_LOSS,
        }
        return [f"{self.name}: not {promise}" for promise, kept in promises.items() if not kept]


def scenes_are_unseen() -> int:
    """Number of test scenes; raises if one of them is in the instructions or the selection."""
    pictures = {
        name: [row["bytes"] for row in pq.read_table(PATH / name)["image"].to_pylist()]
        for name in (INSTRUCTIONS, SELECTION, TEST)
    }
    test = set(pictures[TEST])
    if len(test) != len(pictures[TEST]) or test & {*pictures[INSTRUCTIONS], *pictures[SELECTION]}:
        raise SystemExit("a test scene was seen before")
    return len(test)


def measure(root: Path, name: str, *flags: str) -> Outcome:
    """Runs (or resumes) the demo under that name and reads its summary."""
    command = (sys.executable, "-m", "controller", "run", "--iterations", "4", "--root", str(root))
    started = time.monotonic()
    subprocess.run((*command, "--name", name, *flags), check=True)
    seconds = time.monotonic() - started
    entries = json.loads((root / name / "report/summary.json").read_text())
    first = next(entry for entry in entries if entry["iteration"] is None)
    last = next(entry for entry in entries if entry["iteration"] == 3)
    return Outcome(
        name,
        untrained=first["response_hallucination"],
        trained=last["response_hallucination"],
        recall_loss=first["recall"] - last["recall"],
        length_loss=1 - last["mean_words"] / first["mean_words"],
        seconds=seconds,
    )


def table(outcomes: list[Outcome]) -> str:
    """For docs/demo.md."""
    lines = [
        "| run | untrained | after 4 iterations | fall | recall loss, points | shorter | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in outcomes:
        cells = (
            one.name,
            f"{one.untrained:.1%}",
            f"{one.trained:.1%}",
            f"{one.fall:.1%}",
            f"{100 * one.recall_loss:.1f}",
            f"{one.length_loss:.1%}",
            f"{one.seconds:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.demo", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/proof"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    scenes = scenes_are_unseen()
    runs = [measure(options.root, f"seed-{s}", "--seed", str(s)) for s in options.seeds]
    shuffled = [
        measure(options.root, f"shuffled-{s}", "--seed", str(s), "--set", "verify.control=shuffled")
        for s in options.seeds
    ]
    mean_fall = sum(one.fall for one in runs) / len(runs)
    broken = [line for one in runs for line in one.broken(control=False)]
    broken += [line for one in shuffled for line in one.broken(control=True)]
    if mean_fall < MIN_MEAN_FALL:
        broken.append(f"mean fall {mean_fall:.1%} < {MIN_MEAN_FALL:.0%}")
    if scenes < MIN_SCENES:
        broken.append(f"{scenes} test scenes < {MIN_SCENES}")
    print(table([*runs, *shuffled]))
    print(f"mean fall over seeds: {mean_fall:.1%}; {scenes} test scenes, none seen before")
    print("\n".join(broken) or "every promise is kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
