"""How far a run is, from what is stored: works for one that runs, stopped, or was killed."""

import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Literal

from controller.journal import (
    JOURNAL,
    SILENT_S,
    Clock,
    ErrorClass,
    Failure,
    Journal,
    Running,
    error_class,
    read_journal,
    seconds_since,
)
from controller.lock import is_held
from controller.logs import log_tail
from controller.places import RunPlace
from controller.plan import ShardId, State, Stop, observe, planned_stages
from controller.summary import Entry, caveat, summarise
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import CONFIG, STAGES, choice_key, manifest_key, num_shards
from rlaifv.records import Choice, Record
from rlaifv.store import LocalBackend, Manifest, Store

STOPPED = "stopped.json"
LOGS_READ = 8
"""Logs of running shards that are looked into for their progress."""
_PROGRESS = re.compile(r"progress rows=(\d+)/(\d+) rate=([\d.]+)/s")
RunState = Literal["finished", "failed", "running", "interrupted"]
EXIT_CODES: dict[RunState, int] = {"finished": 0, "failed": 1, "running": 3, "interrupted": 4}
"""Of `status`. 2 stays what it is everywhere: a command line that cannot be understood."""


class Stopped(Record):
    """Why the last controller gave up; removed when the next one starts."""

    reason: str
    exit_code: int
    iteration: int | None = None
    stage: str | None = None
    shard: int | None = None


class StageStatus(Record):
    """Shards of one stage of one iteration. Seconds of stages that were run by hand: None."""

    iteration: int
    stage: str
    done: int
    shards: int
    running: int = 0
    waiting: int = 0
    failed: int = 0
    """Not done, and the last attempt ended badly."""
    rows: int | None
    """Known once the stage is complete."""
    seconds: float | None
    """Of work, summed over the shards; known once the stage is complete."""
    quarantined: int | None
    queue_seconds: float | None = None
    """Summed over the shards: submitted, but not started yet."""
    wall_seconds: float | None = None
    """While some shard ran or waited, and a controller was at work."""
    rows_per_second: float | None = None
    """Of all shards together, by the wall clock; while it runs, what its logs say last."""
    eta_seconds: float | None = None
    """While it runs: at the rate so far."""


class LastError(Record):
    """The error that ended the run, or the latest one that it got over."""

    kind: ErrorClass
    exit_code: int
    reason: str
    iteration: int | None
    stage: str | None
    shard: int | None
    ended_the_run: bool


class RunStatus(Record):
    """What `status --json` prints."""

    run: str
    state: RunState
    """`failed`: it gave up, see `error`. `interrupted`: nobody drives it; it can be resumed."""
    iterations: int
    iterations_done: int
    stopped: Stopped | None
    error: LastError | None
    controller: str | None
    """Who drives or drove it: process and machine."""
    heard_seconds_ago: float | None
    command: str | None
    """As it was started; typed again it goes on."""
    eta_seconds: float | None
    """To the end of the run, as fast as the iterations before; None in the first one."""
    waits: list[Running]
    stages: list[StageStatus]
    summary: list[Entry]
    caveat: str
    """What to know of its figures; empty when `report` benchmarks gave them."""


def note_stop(run: Store, stop: Stop) -> None:
    """Keeps the reason for `status`."""
    place = stop.shard
    stopped = Stopped(
        reason=stop.reason,
        exit_code=stop.exit_code,
        iteration=place.iteration if place else None,
        stage=place.stage if place else None,
        shard=place.number if place else None,
    )
    run.write_bytes(STOPPED, stopped.model_dump_json().encode())


def clear_stop(run: Store) -> None:
    """Forgets it: a new controller tries again."""
    run.delete(STOPPED)


def read_status(place: RunPlace) -> RunStatus:
    """One listing, and one small object per finished stage."""
    run = place.store
    config = run.read_json(CONFIG, RunConfig)
    keys = frozenset(item.key for item in run.objects(""))
    state = observe(keys, dict(_choices(run, config, keys)))
    journal = read_journal(run) if JOURNAL in keys else None
    stopped = _read_stopped(run) if STOPPED in keys else None
    finished = [i for i in range(config.iterations) if state.finished(config, i)]
    running = _is_driven(place, journal)
    shown = range(min(len(finished) + 1, config.iterations))
    names = [stage.name for stage in planned_stages(config)]
    reader = _Reader(place, config, state, journal if running else _at_rest(journal))
    stages = [reader.stage(iteration, name) for iteration in shown for name in names]
    done = len(finished) == config.iterations
    return RunStatus(
        run=place.uri,
        state="running"
        if running
        else ("finished" if done else "failed" if stopped else "interrupted"),
        iterations=config.iterations,
        iterations_done=len(finished),
        stopped=None if running else stopped,
        error=None if done else _last_error(None if running else stopped, journal),
        controller=journal.controller if journal else None,
        heard_seconds_ago=round(seconds_since(journal.at), 1) if running and journal else None,
        command=journal.command if journal else None,
        eta_seconds=_run_eta(journal, stages, config, done=finished) if running else None,
        waits=journal.waits if running and journal else [],
        stages=stages,
        summary=summarise(config, state.choices),
        caveat=caveat(config),
    )


def _read_stopped(run: Store) -> Stopped | None:
    """None: the next controller removed it meanwhile."""
    try:
        return run.read_json(STOPPED, Stopped)
    except ArtifactError:
        return None


def _choices(run: Store, config: RunConfig, keys: frozenset[str]) -> Iterator[tuple[int, Choice]]:
    for iteration in range(config.iterations):
        if choice_key(iteration) in keys:
            yield iteration, run.read_json(choice_key(iteration), Choice)


def _is_driven(place: RunPlace, journal: Journal | None) -> bool:
    """By a lock on this machine; of a bucket, also by a controller elsewhere that still writes."""
    if is_held(place.folder):
        return True
    if isinstance(place.store.backend, LocalBackend) or journal is None or journal.ended:
        return False
    return abs(seconds_since(journal.at)) < SILENT_S


def _at_rest(journal: Journal | None) -> Journal | None:
    """A dead controller's journal: what it says of running and waiting shards is past."""
    if journal is None:
        return None
    still = {"running": 0, "waiting": 0}
    clocks = [clock.model_copy(update=still) for clock in journal.clocks]
    return journal.model_copy(update={"clocks": clocks, "running": []})


class _Reader:
    """Reads the status of single stages."""

    def __init__(
        self, place: RunPlace, config: RunConfig, state: State, journal: Journal | None
    ) -> None:
        self._place, self._config, self._state = place, config, state
        self._clocks = {(c.iteration, c.stage): c for c in journal.clocks} if journal else {}
        self._running = journal.running if journal else []

    def stage(self, iteration: int, name: str) -> StageStatus:
        run, key = self._place.store, manifest_key(iteration, STAGES[name].writes)
        complete = key in self._state.keys
        parts = run.read_json(key, Manifest).parts if complete else None
        done = len(self._state.done(self._config, iteration, name))
        shards = num_shards(self._config, name)
        clock = self._clocks.get((iteration, name)) or Clock(iteration=iteration, stage=name)
        rows = None if parts is None else sum(part.rows for part in parts)
        known = clock.wall_seconds > 0
        rate, eta = None, None
        if rows is not None and known:
            rate = rows / clock.wall_seconds
        elif clock.running and done < shards:
            inside = list(self._inside(iteration, name))
            rate = sum(one for _, one in inside) or None
            share = (done + sum(fraction for fraction, _ in inside)) / shards
            eta = clock.wall_seconds * (1 - share) / share if share and known else None
        return StageStatus(
            iteration=iteration,
            stage=name,
            done=done,
            shards=shards,
            running=min(clock.running, shards - done),
            waiting=min(clock.waiting, shards - done),
            failed=min(clock.failed, shards - done),
            rows=rows,
            seconds=None if parts is None else round(sum(part.seconds for part in parts), 3),
            quarantined=None if parts is None else sum(part.quarantined for part in parts),
            queue_seconds=round(clock.queue_seconds, 1) if known else None,
            wall_seconds=round(clock.wall_seconds, 1) if known else None,
            rows_per_second=None if rate is None else round(rate, 2),
            eta_seconds=None if eta is None else round(eta, 1),
        )

    def _inside(self, iteration: int, stage: str) -> Iterator[tuple[float, float]]:
        """Done share and rows per second of running shards, from their logs on this machine."""
        mine = [one for one in self._running if (one.iteration, one.stage) == (iteration, stage)]
        for one in mine[:LOGS_READ]:
            text = log_tail(self._place, self._config, ShardId(iteration, stage, one.shard))
            if found := _PROGRESS.findall(text):
                rows, total, rate = found[-1]
                yield min(1.0, int(rows) / max(1, int(total))), float(rate)


def _last_error(stopped: Stopped | None, journal: Journal | None) -> LastError | None:
    if stopped is not None:
        return LastError(
            kind=error_class(stopped.exit_code),
            exit_code=stopped.exit_code,
            reason=stopped.reason,
            iteration=stopped.iteration,
            stage=stopped.stage,
            shard=stopped.shard,
            ended_the_run=True,
        )
    failures: Iterable[Failure] = journal.failures[-1:] if journal else ()
    for last in failures:
        return LastError(
            kind=last.error_class,
            exit_code=last.exit_code,
            reason=last.reason,
            iteration=last.iteration,
            stage=last.stage,
            shard=last.shard,
            ended_the_run=False,
        )
    return None


def _run_eta(
    journal: Journal | None, stages: list[StageStatus], config: RunConfig, *, done: list[int]
) -> float | None:
    """The mean of the finished iterations for each that is left; at least what a stage needs."""
    if journal is None:
        return None
    times = [journal.active_seconds[i] for i in done if i in journal.active_seconds]
    if not times:
        return None
    mean = sum(times) / len(times)
    current = len(done)
    begun = journal.active_seconds.get(current, 0.0)
    now = max([mean - begun, *(one.eta_seconds or 0.0 for one in stages)], default=0.0)
    return round(max(0.0, now) + mean * max(0, config.iterations - current - 1), 1)


def shown_command(*words: str) -> str:
    """A command of ours, to be typed as it is."""
    return shlex.join(("python", "-m", "controller", *words))
