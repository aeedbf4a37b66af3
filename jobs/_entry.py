"""What every stage shares: flags, logging, skip-if-done, quarantine, provenance, exit codes.

A stage is a generator function `stage(job) -> rows`; `main` writes its rows as one atomic part.
"""

import datetime
import hashlib
import inspect
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from jobs._flags import parser
from rlaifv import __version__
from rlaifv.cli import INTERRUPTED
from rlaifv.config import ModelSpec, RunConfig
from rlaifv.config_values import parse_config
from rlaifv.errors import ArtifactError, ConfigError, RlaifvError
from rlaifv.models.compilations import kept
from rlaifv.pipeline import (
    ARTIFACTS,
    CHOICE,
    CONFIG,
    STAGES,
    Shard,
    done_key,
    held_out_key,
    num_shards,
    part_key,
    quarantine_key,
)
from rlaifv.places import policy_spec, policy_tree
from rlaifv.records import Answer, Claim, Instruction, Quarantined, Record
from rlaifv.store import Provenance, Store, explain_os_error, open_store

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)
Follower = TypeVar("Follower", Answer, Claim)
Stage = Callable[["Job"], Iterator[Record]]
IMAGE_VARIABLE = "RLAIFV_IMAGE"
"""Set by the launcher to the container image with its digest; recorded in the provenance."""
GROUP_SIZES = "group_sizes"
"""Note of an instructions part: rows in each of its groups. A group has fewer than `group_size`
where rows were quarantined; later stages must not shift rows between groups because of that."""
TERMINATED = 128 + signal.SIGTERM


class Job:
    """One shard of one stage of one iteration, and what the stage may ask for."""

    def __init__(self, run: Store, *, stage: str, iteration: int, shard: Shard) -> None:
        self.run = run
        self.config = _read_config(run)
        self.stage = STAGES[stage]
        self.iteration = iteration
        self.shard = shard
        self.notes: dict[str, str] = {}
        """What the provenance records besides: batch sizes, models, prompts."""
        self.inputs: dict[str, str] = {}
        self.quarantined: list[Quarantined] = []
        self.held_out: list[Instruction] = []
        """What `prepare` sets aside for choosing; stored before its part."""
        self.group: Sequence[Any] = ()
        """The rows that are worked on; a model counts its rows from the first of them."""
        self.total: int | None = None
        """How many rows there will be, if that is known."""

    def parts(self, artifact: str) -> list[str]:
        """Keys of all parts of an input artifact, in shard order, whether they exist or not."""
        writer = next(stage for stage in STAGES.values() if stage.writes == artifact)
        count = num_shards(self.config, writer.name)
        return [part_key(self.iteration, artifact, Shard(i, count)) for i in range(count)]

    def origin(self, artifact: str, *, part: int | None = None) -> Provenance:
        """Provenance of one part of an input artifact (default: this shard's), noted as input."""
        key = self.parts(artifact)[self.shard.index if part is None else part]
        origin = self.run.provenance(key)
        self.inputs[key] = origin.rows_sha256
        return origin

    def read(self, artifact: str, record: type[R], *, part: int | None = None) -> Iterator[R]:
        """Rows of one part of an input artifact (default: this shard's), noted as an input."""
        self.origin(artifact, part=part)
        key = self.parts(artifact)[self.shard.index if part is None else part]
        return self.run.read_part(key, record)

    def read_all(self, artifact: str, record: type[R]) -> Iterator[R]:
        """Rows of every part, in shard order; one part is open at a time."""
        for part in range(len(self.parts(artifact))):
            yield from self.read(artifact, record, part=part)

    def read_parts(self, artifact: str, record: type[R]) -> list[Iterator[R]]:
        """The rows of every part, part by part; all are open at a time."""
        return [self.read(artifact, record, part=n) for n in range(len(self.parts(artifact)))]

    def policy(self) -> ModelSpec:
        """The iteration's policy (also its DPO reference), noted as an input."""
        tree = policy_tree(self.run, self.config, self.iteration)
        self.inputs["policy"] = self.run.tree_digest(tree) if tree else self.config.policy.path
        return policy_spec(self.run, self.config, self.iteration)

    def seed(self, item: str) -> int:
        """63 bits for one item of this iteration: its random numbers depend on nothing else."""
        text = f"{self.config.seed}/{self.iteration}/{item}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def quarantine(self, row: Quarantined) -> None:
        """Sets a bad input row aside; it is counted and stored beside the part."""
        log.warning("quarantined %s row %d: %s: %s", row.file, row.row, row.field, row.problem)
        self.quarantined.append(row)

    def instruction_groups(self) -> Iterator[list[Instruction]]:
        """This shard's instructions, in the groups in which `prepare` dealt them."""
        sizes = [int(size) for size in self.origin("instructions").notes[GROUP_SIZES].split()]
        rows = self.read("instructions", Instruction)
        groups = (list(itertools.islice(rows, size)) for size in sizes)
        self.total = sum(sizes)
        return (group for group in groups if group)

    def follow(
        self, artifact: str, record: type[Follower]
    ) -> Iterator[tuple[list[Instruction], list[Follower]]]:
        """Each group of instructions with the rows of `artifact` that belong to it.

        Raises ArtifactError for rows that are out of order or without instruction.
        """
        rows = self.read(artifact, record)
        row = next(rows, None)
        for group in self.instruction_groups():
            mine: list[Follower] = []
            ids = {instruction.instruction_id for instruction in group}
            while row is not None and row.instruction_id in ids:
                mine.append(row)
                row = next(rows, None)
            yield group, mine
        if row is not None:
            raise ArtifactError(
                f"{self.parts(artifact)[self.shard.index]}: instruction {row.instruction_id!r} "
                "is out of order, or not among this shard's instructions"
            )


def run_stage(job: Job, stage: Stage) -> bool:
    """Runs one shard and commits what it writes; False when another writer was first.

    Of a gang that torchrun started, all processes run the stage and the first one commits.
    """
    if job.stage.runs_on == "gpus" and os.environ.get("RANK", "0") != "0":
        for _ in stage(job):
            pass
        return False
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

    def rows() -> Generator[Record, None, None]:
        try:
            yield from stage(job)
        except ArtifactError as error:
            if not job.group:
                raise
            ids = f"{_id_of(job.group[0])} to {_id_of(job.group[-1])}"
            raise ArtifactError(f"{error} (in the group {ids}, counted from 0)") from error
        _write_aside(job, origin)

    key = done_key(job.iteration, job.stage.name, job.shard)
    if job.stage.writes == CHOICE:
        (choice,) = stage(job)
        won, count = job.run.write_json_once(key, choice), 1
    else:
        record = ARTIFACTS[job.stage.writes]
        with closing(rows()) as made:  # what is queued ends with it, however it ends
            won = job.run.write_part(key, made, record=record, origin=origin)
        count = job.run.provenance(key).rows
    log.info(
        "%s rows=%d quarantined=%d seconds=%.1f",
        "committed" if won else "another writer was first; ours is dropped",
        count,
        len(job.quarantined),
        time.monotonic() - started,
    )
    return won


def _write_aside(job: Job, origin: Callable[[], Provenance]) -> None:
    """What lies beside a part, before it: a complete part implies them."""
    if job.quarantined:
        key = quarantine_key(job.iteration, job.stage.name, job.shard)
        job.run.write_part(key, job.quarantined, record=Quarantined, origin=origin)
    if job.held_out:
        key = held_out_key(job.iteration)
        job.run.write_part(key, job.held_out, record=Instruction, origin=origin)


def _id_of(row: Any) -> str:
    """Of an instruction, a pair, a benchmark's question, or a row of the source."""
    names = ("instruction_id", "pair_id", "question_id")
    parts = (row, *row) if isinstance(row, tuple) else (row,)
    ids = (getattr(part, name) for part in parts for name in names if hasattr(part, name))
    return str(next(ids, row))


def main(stage: Stage, argv: Sequence[str] | None = None) -> int:
    """Parses `--run --iteration --shard`, runs the stage unless it is done, returns the exit code.

    A stage's flags are exactly these three, for ever: everything else is in `config.json`.
    SIGTERM ends it with 143; what is not committed is removed.
    """
    name = stage.__name__
    flags = parser(name, inspect.getdoc(stage)).parse_args(argv)
    label = f"{flags.run.rstrip('/').rsplit('/', 1)[-1]} {flags.iteration} {name} {flags.shard}"
    _start_logging(label)
    try:
        with _unwinding_on_sigterm():
            _run(stage, run_uri=flags.run, iteration=flags.iteration, shard=flags.shard)
    except RlaifvError as error:
        log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except OSError as error:
        explained = explain_os_error(error, error.filename or flags.run)
        if not isinstance(explained, RlaifvError):
            raise
        log.error("%s: %s", type(explained).__name__, explained)
        return explained.exit_code
    except KeyboardInterrupt:
        log.warning("interrupted; what is not committed is removed")
        return INTERRUPTED
    return 0


def join_gang(module: str) -> None:
    """Becomes torchrun, which runs `module` with the same flags, if its PET_ variables are set."""
    if "RANK" not in os.environ and {"PET_NNODES", "PET_NPROC_PER_NODE"} & os.environ.keys():
        # Without `--` it takes our --run for its own --run-path.
        torchrun = (sys.executable, "-m", "torch.distributed.run", "-m", "--", module)
        # A second restart would meet the first one's keys in the shared store, and hang.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        os.execv(sys.executable, [*torchrun, *sys.argv[1:]])  # noqa: S606


def _run(stage: Stage, *, run_uri: str, iteration: int, shard: str) -> None:
    parsed = _parse_shard(shard)
    run = open_store(run_uri)
    name = stage.__name__
    done = done_key(iteration, name, parsed)
    if run.exists(done):
        log.info("done already: %s", done)
        return
    job = Job(run, stage=name, iteration=iteration, shard=parsed)
    expected = num_shards(job.config, name)
    if parsed.count != expected:
        raise ConfigError(f"--shard {parsed}: config.json gives {name} {expected} shards")
    if not 0 <= iteration < job.config.iterations:
        raise ConfigError(f"--iteration {iteration}: config.json has {job.config.iterations}")
    with kept(run, job.config, stage=name, rank=int(os.environ.get("RANK", "0"))):
        run_stage(job, stage)


def _read_config(run: Store) -> RunConfig:
    source = f"{run}/{CONFIG}"
    try:
        values = json.loads(run.read_bytes(CONFIG))
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected an object, got {type(values).__name__}")
    return parse_config(values, source=source)


def _parse_shard(text: str) -> Shard:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {text}: expected I/N with 0 <= I < N, such as 3/8")
    return Shard(int(index), int(count))


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that temporary files are removed; a second one is ignored."""

    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_logging(label: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03dZ %(levelname)s [{label}] %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
    logging.Formatter.converter = time.gmtime
