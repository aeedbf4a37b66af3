"""`python -m rlaifv.merge --base B --adapter A --out O`: a LoRA adapter into a full checkpoint."""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("merge")

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rlaifv.cli import ending
from rlaifv.errors import ConfigError


def merge(base: str, adapter: str, out: Path) -> float:
    """Fills `out` with the merged model; the largest difference that the check found, in nats.

    `base` and `adapter` are folders, URIs, or (`base`) hub ids. `out` must not exist, and does not
    after a failure. Raises ConfigError for an `out` that exists, else what `merge_adapter` does.
    """
    from rlaifv.config import ModelSpec  # with torch: --help is instant
    from rlaifv.models.checkpoint import find_checkpoint
    from rlaifv.places import local_path
    from rlaifv.training.merge import merge_adapter

    if out.exists():
        raise ConfigError(f"--out {out}: exists already")
    unfinished = out.with_name(f"{out.name}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        folder = find_checkpoint(ModelSpec(path=base)).folder
        difference = merge_adapter(folder, local_path(adapter), unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = flags.merge().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    def work() -> int:
        difference = merge(given.base, given.adapter, given.out)
        print(f"{given.out}: merged; largest difference {difference:.1e} nats per token")
        return 0

    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
