"""What the controller at work knows and the artifacts do not: who it is, what runs, waits, failed.

`controller.json` in the run is written anew every other second (a bucket: every 15). Nothing is
decided by it; `status` reads it, and a run without it goes on all the same.
"""

import datetime
import os
import shlex
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from controller.loop import Progress, Watcher
from controller.plan import CONFIG_EXIT, DATA_EXIT, TRANSIENT_EXIT, ShardId
from rlaifv.errors import ArtifactError, TransientError
from rlaifv.records import Record
from rlaifv.store import LocalBackend, Manifest, Store

JOURNAL = "controller.json"
LOCAL_EVERY_S, BUCKET_EVERY_S = 2.0, 15.0
SILENT_S = 4 * BUCKET_EVERY_S
"""A controller on another machine that has not written for so long is taken for dead."""
KEPT_FAILURES = 20
KEPT_RUNNING = 64
NO_SHARD = -1

ErrorClass = Literal["configuration", "data", "passing", "killed", "program"]


class Failure(Record):
    """An attempt that ended badly, or (shard -1) an error of the controller itself."""

    iteration: int
    stage: str
    shard: int
    attempt: int
    exit_code: int
    """Minus the signal's number when a signal ended it."""
    reason: str
    at: str

    @property
    def error_class(self) -> ErrorClass:
        return error_class(self.exit_code)


class Clock(Record):
    """Time spent on a stage of an iteration while a controller was at work, in seconds."""

    iteration: int
    stage: str
    running: int = 0
    waiting: int = 0
    failed: int = 0
    """Shards whose last attempt ended badly and that are to be tried again."""
    wall_seconds: float = 0.0
    """While at least one of its shards ran or waited."""
    queue_seconds: float = 0.0
    """Summed over its shards: submitted, not started yet."""
    run_seconds: float = 0.0
    """Summed over its shards."""


class Running(Record):
    """A shard that runs."""

    iteration: int
    stage: str
    shard: int
    attempt: int
    waits_for: str = ""


class Journal(Record):
    """The last that was heard of the controller."""

    controller: str
    """Process and machine."""
    command: str
    """As typed; typed again it goes on."""
    executor: str
    started: str
    at: str
    """UTC, ISO 8601."""
    ended: bool = False
    """It ended by itself: finished, stopped, or interrupted with Ctrl-C."""
    clocks: list[Clock] = Field(default_factory=list)
    running: list[Running] = Field(default_factory=list)
    waits: list[Running] = Field(default_factory=list)
    """Shards that wait and say for what: a quota, a node, an image."""
    failures: list[Failure] = Field(default_factory=list)
    """The latest ones, oldest first."""
    active_seconds: dict[int, float] = Field(default_factory=dict)
    """Of each iteration, while a controller was at work."""


def error_class(exit_code: int) -> ErrorClass:
    """What kind of failure an exit code means."""
    if exit_code < 0 or exit_code > 128:
        return "killed"
    known: dict[int, ErrorClass] = {
        CONFIG_EXIT: "configuration",
        DATA_EXIT: "data",
        TRANSIENT_EXIT: "passing",
    }
    return known.get(exit_code, "program")


def read_journal(run: Store) -> Journal | None:
    """None: there is none, or another version wrote it."""
    try:
        return run.read_json(JOURNAL, Journal)
    except ArtifactError:
        return None


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds_since(stamp: str) -> float:
    """Since a time of a journal, by this machine's clock."""
    then = datetime.datetime.fromisoformat(stamp)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


class JournalWriter(Watcher):
    """Adds up times from one look to the next, and writes them now and then."""

    def __init__(
        self,
        run: Store,
        *,
        command: Sequence[str],
        executor: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on with the times of an earlier controller of the run."""
        self._run, self._clock = run, clock
        self._every = LOCAL_EVERY_S if isinstance(run.backend, LocalBackend) else BUCKET_EVERY_S
        before = read_journal(run) if run.exists(JOURNAL) else None
        self._clocks = {(one.iteration, one.stage): one for one in before.clocks} if before else {}
        self._active: defaultdict[int, float] = defaultdict(float)
        self._active.update(before.active_seconds if before else {})
        self._failures: list[Failure] = []
        self._attempts: dict[ShardId, int] = {}
        self._counts: dict[tuple[int, str], tuple[int, int, int]] = {}
        self._iteration = 0
        self._last = self._written = clock()
        self._journal = Journal(
            controller=f"process {os.getpid()} on {socket.gethostname()}",
            command=shlex.join(command),
            executor=executor,
            started=utc_now(),
            at=utc_now(),
        )
        self._write({})

    def look(self, progress: Progress) -> None:
        """Notes new failures; the time since the last look belongs to what was seen then."""
        self._pass_time()
        counts: dict[tuple[int, str], list[int]] = {}
        for identity, shard in progress.shards.items():
            row = counts.setdefault((identity.iteration, identity.stage), [0, 0, 0])
            failed = shard.phase == "ended" and bool(shard.exit_code)
            row[0] += shard.phase == "running"
            row[1] += shard.phase == "waiting"
            row[2] += failed
            if failed and self._attempts.get(identity) != shard.attempts:
                self._attempts[identity] = shard.attempts
                self._note(identity, shard.attempts, shard.exit_code or 0, shard.reason)
        self._counts = {key: (row[0], row[1], row[2]) for key, row in counts.items()}
        self._iteration = len(progress.state.choices)
        if self._clock() - self._written >= self._every:
            self._write(_busy(progress))

    def stage_done(self, iteration: int, manifest: Manifest) -> None:
        self._counts.pop((iteration, manifest.stage), None)

    def close(self) -> None:
        """The controller ends in an orderly way."""
        self._pass_time()
        self._counts = {key: (0, 0, failed) for key, (_, _, failed) in self._counts.items()}
        self._journal = self._journal.model_copy(update={"ended": True})
        self._write({})

    def _note(self, identity: ShardId, attempt: int, exit_code: int, reason: str) -> None:
        failure = Failure(
            iteration=identity.iteration,
            stage=identity.stage,
            shard=identity.number,
            attempt=attempt,
            exit_code=exit_code,
            reason=reason,
            at=utc_now(),
        )
        self._failures = [*self._failures, failure][-KEPT_FAILURES:]

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._last = now - self._last, now
        self._active[self._iteration] += passed
        for key, (running, waiting, _) in self._counts.items():
            if running or waiting:
                old = self._clocks.get(key) or Clock(iteration=key[0], stage=key[1])
                self._clocks[key] = old.model_copy(
                    update={
                        "wall_seconds": old.wall_seconds + passed,
                        "queue_seconds": old.queue_seconds + passed * waiting,
                        "run_seconds": old.run_seconds + passed * running,
                    }
                )

    def _write(self, busy: dict[str, list[Running]]) -> None:
        """Best effort: a store that is away for a moment must not end the run."""
        clocks = []
        for key in sorted(self._clocks.keys() | self._counts.keys()):
            running, waiting, failed = self._counts.get(key, (0, 0, 0))
            clock = self._clocks.get(key) or Clock(iteration=key[0], stage=key[1])
            counts = {"running": running, "waiting": waiting, "failed": failed}
            clocks.append(clock.model_copy(update=counts))
        news = {
            "at": utc_now(),
            "clocks": clocks,
            "failures": self._failures,
            "active_seconds": {key: round(value, 1) for key, value in self._active.items()},
            "running": busy.get("running", []),
            "waits": busy.get("waiting", []),
        }
        journal = self._journal.model_copy(update=news)
        self._written = self._clock()
        try:
            self._run.write_bytes(JOURNAL, journal.model_dump_json(indent=1).encode())
        except TransientError:
            return


def _busy(progress: Progress) -> dict[str, list[Running]]:
    found: dict[str, list[Running]] = {"running": [], "waiting": []}
    for identity, shard in progress.shards.items():
        told = shard.phase == "running" or (shard.phase == "waiting" and ":" in shard.reason)
        if told and len(found[shard.phase]) < KEPT_RUNNING:
            found[shard.phase].append(
                Running(
                    iteration=identity.iteration,
                    stage=identity.stage,
                    shard=identity.number,
                    attempt=shard.attempts,
                    waits_for=shard.reason if shard.phase == "waiting" else "",
                )
            )
    return found
