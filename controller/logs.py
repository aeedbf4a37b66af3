"""`python -m controller logs` where shards are processes or containers of this machine."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from controller.journal import read_journal
from controller.lock import is_held
from controller.places import RunPlace
from controller.plan import ShardId
from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError
from rlaifv.pipeline import CONFIG, STAGES, Shard, done_key, iteration_key, num_shards

TAIL_BYTES = 8000
SHOWN_BYTES = 200_000
FOLLOW_S = 0.5


def log_path(place: RunPlace, config: RunConfig, shard: ShardId) -> Path:
    """The file that takes what a local shard says, every attempt after the one before."""
    name = f"{shard.number:05d}-of-{num_shards(config, shard.stage):05d}.log"
    return place.folder / "logs" / iteration_key(shard.iteration) / shard.stage / name


def log_tail(place: RunPlace, config: RunConfig, shard: ShardId) -> str:
    """The end of it; empty when there is none on this machine."""
    return _end_of(log_path(place, config, shard), TAIL_BYTES)


def is_local(place: RunPlace) -> bool:
    """Whether stages of the run have run on this machine, and the last controller ran them here."""
    journal = read_journal(place.store)
    elsewhere = journal is not None and journal.executor == "kubernetes"
    return not elsewhere and (place.folder / "logs").is_dir()


def check_shard(place: RunPlace, stage: str, iteration: int, shard: int) -> None:
    """Raises ConfigError for a shard that the run cannot have."""
    if stage not in STAGES:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(STAGES)}")
    config = place.store.read_json(CONFIG, RunConfig)
    if not 0 <= iteration < config.iterations:
        raise ConfigError(f"--iteration {iteration}: the run has {config.iterations}, from 0 on")
    if stage not in ("respond", "grade") and not 0 <= shard < num_shards(config, stage):
        count = num_shards(config, stage)
        raise ConfigError(f"--shard {shard}: the run gives {stage} {count}, from 0 on")


def find_shard(place: RunPlace, stage: str, iteration: int | None, shard: int | None) -> ShardId:
    """The shard that a user means: by default the latest of the stage that has said something.

    Raises ConfigError for a stage that does not exist or has no log here.
    """
    if stage not in STAGES:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(STAGES)}")
    folder = place.folder / "logs"
    which = "*" if iteration is None else str(iteration)
    number = "*" if shard is None else f"{shard:05d}"
    found = list(folder.glob(f"iteration-{which}/{stage}/{number}-of-*.log"))
    if not found:
        named = "" if iteration is None else f" of iteration {iteration}"
        named += "" if shard is None else f", shard {shard}"
        raise ConfigError(
            f"{folder}: {stage}{named} has no log here: it has not begun, or ran elsewhere; "
            "see `python -m controller status`"
        )
    path = max(found, key=lambda one: (one.stat().st_mtime_ns, one.name))
    index = int(path.parts[-3].rpartition("-")[2])
    return ShardId(index, stage, int(path.name.partition("-")[0]))


def local_log(place: RunPlace, shard: ShardId) -> Iterator[str]:
    """Its log's end, at most 200 kB, and where all of it is."""
    path = log_path(place, place.store.read_json(CONFIG, RunConfig), shard)
    yield _end_of(path, SHOWN_BYTES)
    yield f"({shard}: {path})"


def follow_local(
    place: RunPlace, shard: ShardId, *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """New lines until the shard is done or nobody drives the run."""
    config = place.store.read_json(CONFIG, RunConfig)
    path = log_path(place, config, shard)
    key = done_key(
        shard.iteration, shard.stage, Shard(shard.number, num_shards(config, shard.stage))
    )
    offset = max(0, path.stat().st_size - SHOWN_BYTES)
    while True:
        over = place.store.exists(key) or not is_held(place.folder)
        with path.open("rb") as stream:
            stream.seek(offset)
            block = stream.read()
        whole, newline, _ = block.rpartition(b"\n")
        if over:
            whole = block.rstrip(b"\n")
        if whole:
            yield whole.decode(errors="replace")
        if over:
            return
        offset += len(whole) + len(newline)
        sleep(FOLLOW_S)


def _end_of(path: Path, most: int) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - most))
            return stream.read().decode(errors="replace").rstrip()
    except FileNotFoundError:
        return ""
