"""`python -m controller run`: builds the configuration, holds the run, drives it to its end."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from controller.doctor import check_before_local_run
from controller.executors.base import Executor
from controller.executors.choose import ExecutorSettings, open_platform
from controller.executors.local import LocalSettings
from controller.journal import JournalWriter
from controller.loop import Guard, Loop, Watchers, unguarded
from controller.places import RunPlace, run_place, shown, shown_here, typed
from controller.plan import Planner, Stop
from controller.progress import Console
from controller.report.build import REPORT, write_report
from controller.status import clear_stop, note_stop, shown_command
from controller.summary import caveat, table, write_summary
from controller.tables import folded, folded_command
from rlaifv.choosing import choose_checkpoint
from rlaifv.config import RunConfig
from rlaifv.config_values import changed_fields
from rlaifv.errors import ConfigError, RlaifvError
from rlaifv.pipeline import CONFIG
from rlaifv.recipes import Wishes, build_config
from rlaifv.store import LocalBackend, Store, check_before_run


class Order(NamedTuple):
    """What a user asks `run` to do."""

    wishes: Wishes
    root: str
    executor: str
    workers: int
    threads: int
    isolated: bool
    command: tuple[str, ...]
    """As typed; said again to resume."""
    cluster: Path | None = None
    """Settings file for containers and clusters."""
    processes: int = 1
    """Of `train` on this machine."""


class Terminated(BaseException):
    """SIGTERM arrived: end like Ctrl-C, with its own exit code."""


def run(order: Order) -> int:
    """Runs or resumes; returns the exit code."""
    return run_config(order, build_config(order.wishes))


def run_config(
    order: Order, config: RunConfig, *, before: Callable[[Store, RunConfig], None] | None = None
) -> int:
    """The same with a configuration of the caller's, into which the wishes went already.

    `before` writes what the run's stages read and none of them makes.
    """
    place = run_place(order.root, config.name)
    if order.processes > 1 and order.executor != "local":
        raise ConfigError("--processes: local only; `gpus` and `nodes` of --cluster say it there")
    local = LocalSettings(
        place.folder, order.workers, order.threads, order.isolated, order.processes
    )
    if order.executor == "local" and not place.store.exists(CONFIG):
        check_before_local_run(order.root, config)
    platform = open_platform(ExecutorSettings(order.executor, local, order.cluster), place, config)
    shared = not isinstance(place.store.backend, LocalBackend)
    if shared and (warning := check_before_run(place.store)):  # raises where data would be lost
        _say(f"warning: {warning}")
    with platform.hold() as guard:
        config = settle_config(place.store, config, grow=order.wishes.iterations is not None)
        place.store.sweep()  # nothing else writes: we hold the run
        clear_stop(place.store)
        if before is not None:
            before(place.store, config)
        code = drive_run(order, config, place=place, executor=platform.executor, guard=guard)
        if code == 0:  # every stage is done: what is left of others was killed
            place.store.sweep()
        return code


def settle_config(run: Store, config: RunConfig, *, grow: bool) -> RunConfig:
    """Writes `config.json` the first time; later compares with it.

    Only `iterations` may grow; when they were not asked for (`grow` is false), the stored number
    stands. Raises ConfigError naming every field that differs.
    """
    if run.write_json_once(CONFIG, config):
        return config
    stored = run.read_json(CONFIG, RunConfig)
    if not grow:
        config = config.model_copy(update={"iterations": stored.iterations})
    if changes := changed_fields(stored, config):
        lines = "\n  ".join(changes)
        raise ConfigError(
            f"{run}: this run was started with another configuration:\n  {lines}\n"
            "Ask for the same one to resume it, or give the new one a name of its own (--name)."
        )
    if config.iterations > stored.iterations:
        run.write_bytes(CONFIG, (config.model_dump_json(indent=1) + "\n").encode())
    return config


def drive_run(
    order: Order,
    config: RunConfig,
    *,
    place: RunPlace,
    executor: Executor,
    guard: Guard = unguarded,
) -> int:
    """Drives a run that is held to its end, and says how it ended; returns the exit code."""
    console = Console(config, sys.stderr)
    journal = JournalWriter(place.store, command=order.command, executor=order.executor)
    planner = Planner(config, place.uri, executor.unit)
    loop = Loop(
        place.store,
        planner=planner,
        executor=executor,
        watcher=Watchers(console, journal),
        chooser=choose_checkpoint,
        guard=guard,
    )
    try:
        with _terminable():
            console.say(f"run {config.name} at {place.uri}")
            stop = loop.drive()
    except RlaifvError as error:  # a damaged artifact, or a choice that cannot be made
        stop = Stop(str(error), error.exit_code)
    except (KeyboardInterrupt, Terminated) as interrupt:
        console.close()
        executor.close()
        _say("stopped; nothing that was finished is lost")
        _say(f"go on with:\n{folded_command(order.command)}")
        return 130 if isinstance(interrupt, KeyboardInterrupt) else 143
    finally:
        executor.close()
        console.close()
        journal.close()
    return _end(stop, config, run=place.store, command=order.command)


def _end(stop: Stop, config: RunConfig, *, run: Store, command: tuple[str, ...]) -> int:
    entries = write_summary(run, config)
    if entries:
        write_report(run, config)
        print(table(entries, caveat(config)))
        print(f"report: {shown_here(shown(str(run), REPORT))}")
    if stop.exit_code == 0:
        return 0
    note_stop(run, stop)
    _say(folded(f"the run stopped: {stop.reason}", "  "))
    _say(f"more: {shown_command('status', typed(str(run)))}")
    _say(f"once that is mended, go on with:\n{folded_command(command)}")
    # From 128 on, who reads it thinks of a signal.
    return stop.exit_code if 0 < stop.exit_code < 128 else 1


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that stages are ended before the controller is."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
