"""Stages as processes of this machine, at most so many at once."""

import os
import queue
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from controller.executors.launchers import Ended, ForkServer, Launcher, Processes
from controller.executors.words import last_words
from controller.plan import TRANSIENT_EXIT, JobSpec, ShardId, ShardState, Unit
from rlaifv.pipeline import STAGES, iteration_key

MAX_WORKERS = 8
"""Default bound: more stages at once rather run out of memory than of cores."""
MAX_BACKOFF_S = 30.0
GRACE_S = 5.0
TAIL_BYTES = 8000
ORDER = {name: place for place, name in enumerate(STAGES)}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LocalSettings(NamedTuple):
    """How stages run on this machine. Only `threads` can change the last bits of a number."""

    folder: Path
    """Of the run on this machine: logs lie in `logs/iteration-K/<stage>/`."""
    workers: int = 0
    """Stages at once; 0: as many as the cores hold, at most 8."""
    threads: int = 1
    """Threads of each stage; fixed whatever the machine, and recorded, because sums of floats
    depend on it."""
    isolated: bool = False
    """A fresh interpreter for each shard instead of a fork of a warm one."""
    processes: int = 1
    """That train together (GPUs of this machine): `jobs.train` becomes torchrun."""


def default_workers(threads: int) -> int:
    """As many as the cores hold, between 1 and 8."""
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // threads))


def visible_gpus() -> tuple[str, ...]:
    """This machine's CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return tuple(str(n) for n, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))


class _Shard(NamedTuple):
    spec: JobSpec
    state: ShardState
    not_before: float = 0.0
    """Monotonic seconds; a passing failure waits a while before its next attempt."""


class LocalExecutor:
    """Bounded parallel processes; earlier stages go first.

    Where there are GPUs, a stage that uses one has it to itself: two models rarely fit.
    """

    unit: Unit = "shard"

    def __init__(
        self,
        settings: LocalSettings,
        *,
        launch: "Callable[[queue.Queue[Ended]], Launcher] | None" = None,
        gpus: tuple[str, ...] | None = None,
    ) -> None:
        """`launch` makes another launcher than the one that `settings` ask for.

        `gpus`: names for CUDA_VISIBLE_DEVICES; default: all that this machine has.
        """
        self._folder = settings.folder
        self._workers = settings.workers or default_workers(settings.threads)
        environment = dict(os.environ) | {
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **{name: str(settings.threads) for name in THREAD_VARIABLES},
        }
        if settings.processes > 1:
            environment |= {"PET_NPROC_PER_NODE": str(settings.processes), "PET_STANDALONE": "1"}
        self._ended: queue.Queue[Ended] = queue.Queue()
        self._launcher: Launcher = (
            launch(self._ended)
            if launch
            else Processes(environment, self._ended)
            if settings.isolated
            else ForkServer(environment, self._ended, log=self._folder / "logs/forkserver.log")
        )
        self._shards: dict[ShardId, _Shard] = {}
        self._waiting: set[ShardId] = set()
        self._running: dict[int, ShardId] = {}
        self._tickets = 0
        self._gpus = visible_gpus() if gpus is None else gpus
        self._processes = settings.processes
        self._gpus_of: dict[int, list[str]] = {}
        """The GPUs of each running ticket that has some."""

    def submit(self, spec: JobSpec) -> None:
        for index in spec.shards:
            identity = ShardId(spec.iteration, spec.stage.name, index)
            before = self._shards.get(identity)
            state = before.state if before else ShardState("waiting")
            delay = 0.0
            if state.exit_code == TRANSIENT_EXIT:
                delay = min(MAX_BACKOFF_S, 2.0 ** (state.attempts - 1))
            shard = _Shard(spec, state._replace(phase="waiting"), time.monotonic() + delay)
            self._shards[identity] = shard
            self._waiting.add(identity)

    def states(self) -> Mapping[ShardId, ShardState]:
        self._collect(0.0)
        return {identity: shard.state for identity, shard in self._shards.items()}

    def wait(self, timeout_s: float) -> None:
        now = time.monotonic()
        queued = sorted(
            self._waiting, key=lambda one: (one.iteration, ORDER[one.stage], one.number)
        )
        overtaken = False
        for identity in queued:
            if len(self._running) >= self._workers:
                break
            if self._shards[identity].not_before > now:
                continue
            needed = self._num_gpus(identity)
            if needed and (overtaken or needed > len(self._free_gpus())):
                overtaken = True  # a stage that waits for several GPUs must get them some day
                continue
            self._start(identity)
        self._collect(timeout_s)

    def logs(self, shard: ShardId) -> str:
        path = self.log_path(shard)
        return f"{_tail(path)}\n({path})"

    def log_path(self, shard: ShardId) -> Path:
        """The file that takes what a shard says, every attempt after the one before."""
        count = self._shards[shard].spec.num_shards
        folder = self._folder / "logs" / iteration_key(shard.iteration) / shard.stage
        return folder / f"{shard.number:05d}-of-{count:05d}.log"

    def close(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._waiting.clear()
        for ticket in list(self._running):
            self._launcher.kill(ticket, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self._running and (left := deadline - time.monotonic()) > 0:
            self._collect(left)
        for ticket in list(self._running):
            self._launcher.kill(ticket, signal.SIGKILL)
        self._launcher.close()

    def _num_gpus(self, identity: ShardId) -> int:
        wanted = {"gpu": 1, "gpus": self._processes}.get(
            self._shards[identity].spec.stage.runs_on, 0
        )
        return min(wanted, len(self._gpus))

    def _free_gpus(self) -> list[str]:
        taken = {name for names in self._gpus_of.values() for name in names}
        return [name for name in self._gpus if name not in taken]

    def _start(self, identity: ShardId) -> None:
        shard = self._shards[identity]
        log = self.log_path(identity)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._waiting.discard(identity)
        self._tickets += 1
        self._running[self._tickets] = identity
        state = shard.state._replace(phase="running", attempts=shard.state.attempts + 1)
        self._shards[identity] = shard._replace(state=state)
        if number := self._num_gpus(identity):
            self._gpus_of[self._tickets] = self._free_gpus()[:number]
        self._launch(self._tickets, identity)

    def _launch(self, ticket: int, identity: ShardId) -> None:
        argv = self._shards[identity].spec.argv_of(identity.number)
        gpus = self._gpus_of.get(ticket)
        env = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        self._launcher.start(ticket, argv, self.log_path(identity), env)

    def _collect(self, timeout_s: float) -> None:
        """Notes every ending so far; waits for the first one at most `timeout_s`."""
        while True:
            try:
                ended = self._ended.get(timeout=timeout_s) if timeout_s else self._ended.get(False)
            except queue.Empty:
                return
            timeout_s = 0.0
            identity = self._running.pop(ended.ticket)
            shard = self._shards[identity]
            if ended.exit_code is None:  # another way of starting has taken over
                self._running[ended.ticket] = identity
                self._launch(ended.ticket, identity)
                continue
            self._gpus_of.pop(ended.ticket, None)
            reason = last_words(_tail(self.log_path(identity))) if ended.exit_code else ""
            state = shard.state._replace(phase="ended", exit_code=ended.exit_code, reason=reason)
            self._shards[identity] = shard._replace(state=state)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            return stream.read().decode(errors="replace").rstrip()
    except FileNotFoundError:
        return ""
