"""What every stage shares: flags, logging, skip-if-done, quarantine, provenance, exit codes.

A stage is a generator function `stage(job) -> rows`; `main` writes its rows as one atomic part.
"""

import argparse
import datetime
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from rlaifv import __version__
from rlaifv.config import ModelSpec, RunConfig
from rlaifv.errors import ConfigError, RlaifvError
from rlaifv.pipeline import (
    ARTIFACTS,
    CONFIG,
    STAGES,
    Shard,
    done_key,
    num_shards,
    part_key,
    quarantine_key,
)
from rlaifv.places import policy_spec, policy_tree
from rlaifv.records import Quarantined, Record
from rlaifv.store import Provenance, Store, explain_os_error, open_store

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)
T = TypeVar("T")
IMAGE_VARIABLE = "RLAIFV_IMAGE"
"""Set by the launcher to the container image with its digest; recorded in the provenance."""
PROGRESS_SECONDS = 30.0


class Job:
    """One shard of one stage of one iteration, and what the stage may ask for."""

    def __init__(self, run: Store, *, stage: str, iteration: int, shard: Shard) -> None:
        self.run = run
        self.config = run.read_json(CONFIG, RunConfig)
        self.stage = STAGES[stage]
        self.iteration = iteration
        self.shard = shard
        self.notes: dict[str, str] = {}
        """What the provenance records besides: batch sizes, models, prompts."""
        self.inputs: dict[str, str] = {}
        self.quarantined: list[Quarantined] = []

    def parts(self, artifact: str) -> list[str]:
        """Keys of all parts of an input artifact, in shard order, whether they exist or not."""
        writer = next(stage for stage in STAGES.values() if stage.writes == artifact)
        count = num_shards(self.config, writer.name)
        return [part_key(self.iteration, artifact, Shard(i, count)) for i in range(count)]

    def read(self, artifact: str, record: type[R], *, part: int | None = None) -> Iterator[R]:
        """Rows of one part of an input artifact (default: this shard's), noted as an input."""
        key = self.parts(artifact)[self.shard.index if part is None else part]
        self.inputs[key] = self.run.provenance(key).rows_sha256
        return self.run.read_part(key, record)

    def read_all(self, artifact: str, record: type[R]) -> Iterator[R]:
        """Rows of every part, in shard order."""
        for part in range(len(self.parts(artifact))):
            yield from self.read(artifact, record, part=part)

    def policy(self) -> ModelSpec:
        """The iteration's policy (also its DPO reference), noted as an input."""
        tree = policy_tree(self.run, self.config, self.iteration)
        self.inputs["policy"] = self.run.tree_digest(tree) if tree else self.config.policy.path
        return policy_spec(self.run, self.config, self.iteration)

    def quarantine(self, row: Quarantined) -> None:
        """Sets a bad input row aside; it is counted and stored beside the part."""
        log.warning("quarantined %s row %d: %s: %s", row.file, row.row, row.field, row.problem)
        self.quarantined.append(row)

    def groups(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Items in groups of `shards.group_size`, with progress; batches never cross a group."""
        size = self.config.shards.group_size
        started = reported = time.monotonic()
        bar = tqdm(total=len(items), desc=self.stage.name, unit="row", disable=None, leave=False)
        with bar:
            for start in range(0, len(items), size):
                group = items[start : start + size]
                yield group
                bar.update(len(group))
                now = time.monotonic()
                if now - reported > PROGRESS_SECONDS:
                    rate = (start + len(group)) / (now - started)
                    log.info(
                        "progress rows=%d/%d rate=%.1f/s", start + len(group), len(items), rate
                    )
                    reported = now


def run_stage(job: Job, stage: Callable[[Job], Iterator[Record]]) -> bool:
    """Runs one shard and commits its part; False when another writer was first."""
    started = time.monotonic()
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def origin() -> Provenance:
        return Provenance(
            stage=job.stage.name,
            run=job.config.name,
            iteration=job.iteration,
            shard=str(job.shard),
            code_version=__version__,
            image=os.environ.get(IMAGE_VARIABLE, ""),
            config_sha256=hashlib.sha256(job.config.model_dump_json().encode()).hexdigest(),
            inputs=job.inputs,
            quarantined=len(job.quarantined),
            seconds=round(time.monotonic() - started, 3),
            started_at=started_at,
            seed=job.config.seed,
            threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 0),
            notes=job.notes,
        )

    def rows() -> Iterator[Record]:
        yield from stage(job)
        if job.quarantined:  # before the part, so that a complete part implies its quarantine
            key = quarantine_key(job.iteration, job.stage.name, job.shard)
            job.run.write_part(key, job.quarantined, record=Quarantined, origin=origin)

    key = done_key(job.iteration, job.stage.name, job.shard)
    record = ARTIFACTS[job.stage.writes]
    won = job.run.write_part(key, rows(), record=record, origin=origin)
    log.info(
        "%s rows=%d quarantined=%d seconds=%.1f",
        "committed" if won else "another writer was first; ours is dropped",
        job.run.provenance(key).rows,
        len(job.quarantined),
        time.monotonic() - started,
    )
    return won


def main(stage: Callable[[Job], Iterator[Record]], argv: Sequence[str] | None = None) -> int:
    """Parses `--run --iteration --shard`, runs the stage unless it is done, returns the exit code.

    A stage's flags are exactly these three, for ever: everything else is in `config.json`.
    """
    name = stage.__name__
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=stage.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--run", required=True, help="URI of the run, e.g. file:///runs/demo")
    parser.add_argument("--iteration", required=True, type=int, help="0, 1, 2, ...")
    parser.add_argument("--shard", default="0/1", help="which shard of how many, e.g. 3/8")
    flags = parser.parse_args(argv)
    label = f"{flags.run.rstrip('/').rsplit('/', 1)[-1]} {flags.iteration} {name} {flags.shard}"
    _start_logging(label)
    try:
        shard = _parse_shard(flags.shard)
        run = open_store(flags.run)
        done = done_key(flags.iteration, name, shard)
        if run.exists(done):
            log.info("done already: %s", done)
            return 0
        job = Job(run, stage=name, iteration=flags.iteration, shard=shard)
        expected = num_shards(job.config, name)
        if shard.count != expected:
            raise ConfigError(f"--shard {shard}: config.json gives {name} {expected} shards")
        run_stage(job, stage)
    except RlaifvError as error:
        log.error("%s: %s", type(error).__name__, error)  # noqa: TRY400 - no traceback for these
        return error.exit_code
    except OSError as error:
        explained = explain_os_error(error, error.filename or flags.run)
        if not isinstance(explained, RlaifvError):
            raise
        log.error("%s: %s", type(explained).__name__, explained)  # noqa: TRY400 - as above
        return explained.exit_code
    return 0


def _parse_shard(text: str) -> Shard:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {text}: expected I/N with 0 <= I < N, such as 3/8")
    return Shard(int(index), int(count))


def _start_logging(label: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03dZ %(levelname)s [{label}] %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
    logging.Formatter.converter = time.gmtime
