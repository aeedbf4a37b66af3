"""Two ways to start a stage as a local process: a fresh interpreter, or a fork of a warm one.

A launcher reports every ending on a queue, from a thread, so that the executor only ever waits in
one place. No stage outlives the controller: two controllers' stages must not overlap.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple, Protocol

PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Of a fork, they may well come from the forking."""
NO_CHANGES: Mapping[str, str] = MappingProxyType({})


class Ended(NamedTuple):
    """A started process has ended."""

    ticket: int
    exit_code: int | None
    """Minus the signal's number when a signal ended it. None: it never ran; start it again."""


class Launcher(Protocol):
    """Starts processes; tickets are the caller's, and used again only after a None.

    To be called from one thread that lasts: the kernel takes a process's parent for dead when the
    thread that forked it ends.
    """

    def start(
        self, ticket: int, argv: Sequence[str], log: Path, env: Mapping[str, str] = NO_CHANGES
    ) -> None:
        """`env` is added to the launcher's environment."""

    def kill(self, ticket: int, number: int) -> None: ...
    def close(self) -> None: ...


def _die_with_parent() -> None:
    """Runs in a new process: the kernel kills it when the controller dies, however that happens."""
    if _PRCTL is not None:
        _PRCTL(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
"""Looked up before any fork: another thread may hold the loader's lock during one."""


class Processes:
    """`python -m jobs.<stage>`, one interpreter each."""

    def __init__(self, environment: Mapping[str, str], ended: "queue.Queue[Ended]") -> None:
        self._environment = dict(environment)
        self._ended = ended
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self, ticket: int, argv: Sequence[str], log: Path, env: Mapping[str, str] = NO_CHANGES
    ) -> None:
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**self._environment, **env},
                start_new_session=True,  # Ctrl-C reaches the controller only, which ends them
                preexec_fn=_die_with_parent,
            )
        self._running[ticket] = process
        threading.Thread(target=self._watch, args=(ticket, process), daemon=True).start()

    def _watch(self, ticket: int, process: subprocess.Popen[bytes]) -> None:
        self._ended.put(Ended(ticket, process.wait()))

    def kill(self, ticket: int, number: int) -> None:
        if ticket in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running[ticket].pid, number)

    def close(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


class ForkServer:
    """Forks of one warm `python -m jobs._forkserver`, which spares every shard the imports.

    The protocol is one JSON object per line, see `jobs/_forkserver.py`. When the server dies, its
    children die with it and are reported as killed; the next start brings up a new one. Fresh
    interpreters take over for good when a fork crashes, and when no fork has ended by itself yet:
    the server has declined (its log says why), or this machine kills its children.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        ended: "queue.Queue[Ended]",
        *,
        log: Path,
        module: str = "jobs._forkserver",
    ) -> None:
        self._environment = dict(environment)
        self._ended = ended
        self._log = log
        self._module = module
        self._server: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._active: dict[int, subprocess.Popen[str]] = {}
        """The server of each ticket that has not ended."""
        self._lock = threading.Lock()
        self._proven = False
        """A fork has ended by itself."""
        self._fresh: Processes | None = None
        """What takes over when forks do not work here."""

    def start(
        self, ticket: int, argv: Sequence[str], log: Path, env: Mapping[str, str] = NO_CHANGES
    ) -> None:
        if self._fresh is not None:
            self._fresh.start(ticket, argv, log, env)
            return
        with self._lock:  # so that `_listen` of a dying server either sees the ticket or is over
            if self._server is None or self._server.poll() is not None:
                self._server = self._serve()
            self._active[ticket] = self._server
        self._say({"id": ticket, "argv": list(argv), "log": str(log.absolute()), "env": dict(env)})

    def kill(self, ticket: int, number: int) -> None:
        self._proven = True  # from here on a signal is ours
        if self._fresh is not None and ticket not in self._active:
            self._fresh.kill(ticket, number)
        self._say({"id": ticket, "kill": int(number)})

    def close(self) -> None:
        if self._fresh is not None:
            self._fresh.close()
        if self._server is None:
            return
        with self._lock:  # end of file: it ends its children, then itself
            _close(self._server.stdin)
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        if self._listener is not None:
            self._listener.join()

    def _serve(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as stream:
            server = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=self._environment,
                text=True,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._listener = threading.Thread(target=self._listen, args=(server,), daemon=True)
        self._listener.start()
        return server

    def _say(self, message: Mapping[str, object]) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            # A pipe that is closed or broken means it died: `_listen` reports its children.
            stream = self._server.stdin if self._server else None
            if stream is not None and not stream.closed:
                stream.write(json.dumps(message) + "\n")
                stream.flush()

    def _listen(self, server: subprocess.Popen[str]) -> None:
        for line in server.stdout or ():
            message = json.loads(line)
            if "exit" in message:
                self._end(message["id"], message["exit"])
        server.wait()
        with self._lock:
            orphans = sorted(ticket for ticket, of in self._active.items() if of is server)
            _close(server.stdin)
            _close(server.stdout)
        for ticket in orphans:
            self._end(ticket, -signal.SIGKILL)

    def _end(self, ticket: int, exit_code: int) -> None:
        with self._lock:
            if self._active.pop(ticket, None) is None:
                return
            self._proven |= exit_code != -signal.SIGKILL
            if self._fresh is None and (not self._proven or -exit_code in CRASHES):
                self._fresh = Processes(self._environment, self._ended)
        self._ended.put(Ended(ticket, exit_code if self._proven else None))


def _close(stream: IO[str] | None) -> None:
    """Closes our end of a pipe, whatever happened to the other."""
    if stream is not None:
        with contextlib.suppress(BrokenPipeError):
            stream.close()
