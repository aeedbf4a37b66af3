"""`python -m rlaifv.demo build` remakes the demo's files; `check` measures them."""

import argparse
import logging
import time
from pathlib import Path

from rlaifv.demo import PATH
from rlaifv.demo.build import build
from rlaifv.demo.measure import check


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rlaifv.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build_help = "make weights and data from a seed: 14 minutes on two busy cores"
    builder = commands.add_parser("build", help=build_help, description=build_help)
    builder.add_argument("--seed", type=int, default=0)
    checker = commands.add_parser("check", help="measure policy and labeller: half a minute")
    for command in (builder, checker):
        command.add_argument("--out", type=Path, default=PATH, help="folder (default: the package)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    start_s = time.monotonic()
    if arguments.command == "build":
        build(arguments.out, arguments.seed)
        print(f"built {arguments.out} in {time.monotonic() - start_s:.0f} s")
        return
    measured = check(arguments.out)
    for name, value in measured.description._asdict().items():
        print(f"policy, greedy, test scenes: {name} {value:.4f}")
    print(f"labeller: accuracy on fresh scenes {measured.labeller_accuracy:.4f}")
    print(f"size of all files: {measured.size_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
