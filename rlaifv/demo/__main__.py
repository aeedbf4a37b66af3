"""`python -m rlaifv.demo build` remakes the demo's files; `check` measures them."""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("demo")

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from rlaifv.cli import ending
from rlaifv.demo import PATH
from rlaifv.demo.build import build
from rlaifv.demo.measure import check


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    given = flags.demo().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return ending(lambda: (_build if given.command == "build" else _check)(given))


def _build(given: argparse.Namespace) -> int:
    start_s = time.monotonic()
    folder = given.out or PATH
    build(folder, given.seed)
    print(f"built {folder} in {time.monotonic() - start_s:.0f} s")
    return 0


def _check(given: argparse.Namespace) -> int:
    measured = check(given.out or PATH)
    for name, value in measured.description._asdict().items():
        print(f"policy, greedy, test scenes: {name} {value:.4f}")
    print(f"labeller: accuracy on fresh scenes {measured.labeller_accuracy:.4f}")
    print(f"size of all files: {measured.size_bytes / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
