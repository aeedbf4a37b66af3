"""One warm process that forks a stage per request, because importing the models takes seconds.

One JSON object per line. On stdin `{"id": 7, "argv": ["jobs.sample", "--run", ...], "log": path,
"env": {...}}` starts a stage and `{"id": 7, "kill": 15}` sends a signal to its process group; on
stdout come `{"id": 7, "pid": 123}` and, when it has ended, `{"id": 7, "exit": 0}` (minus the signal's
number when a signal ended it). At the end of stdin all stages are killed and the server exits.

A stage runs as `python -m jobs.sample ...` would: same rows, output in the log, its own group.
Nothing here starts a thread, and nothing is computed before the fork. Where an import has started
a thread, or there is a GPU, it says so and exits at once. Threads of torch are
those of the server's environment: `env` comes too late for them.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

WARM = (
    "jobs._training",
    "rlaifv.claims",
    "rlaifv.models",
    "rlaifv.training.merge",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
)
"""What stages import on their own, before or (transformers' lazy modules) while they load a model."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
READ_BYTES = 1 << 16


class Request(NamedTuple):
    """A stage to be run."""

    argv: tuple[str, ...]
    log: str
    env: dict[str, str]


class _Server:
    """Children by id; `serve` returns in each child with what it is to run, and None at the end."""

    def __init__(self, replies: int) -> None:
        self._replies = replies
        self._id_of_pid: dict[int, Any] = {}
        self._wakeup, signal_end = socket.socketpair()
        for end in (self._wakeup, signal_end):
            end.setblocking(False)
        self._signal_end = signal_end
        signal.set_wakeup_fd(signal_end.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> Request | None:
        buffer = b""
        while True:
            ready, _, _ = select.select([0, self._wakeup.fileno()], [], [])
            if self._wakeup.fileno() in ready:
                self._wakeup.recv(READ_BYTES)
                self._reap()
            if 0 not in ready:
                continue
            data = os.read(0, READ_BYTES)
            if not data:
                self._kill_all()
                return None
            *lines, buffer = (buffer + data).split(b"\n")
            for line in filter(None, lines):
                if request := self._handle(json.loads(line)):
                    return request

    def _handle(self, message: dict[str, Any]) -> Request | None:
        """None, but in a new child its request."""
        if "kill" in message:
            for pid, identity in self._id_of_pid.items():
                if identity == message["id"]:
                    _signal_group(pid, message["kill"])
            return None
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(server)
            return Request(tuple(message["argv"]), message["log"], message.get("env") or {})
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # both sides do it, so that a kill cannot come too early
        self._id_of_pid[pid] = message["id"]
        self._say(id=message["id"], pid=pid)
        return None

    def _become_child(self, server: int) -> None:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(1)  # it died before the line above
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._wakeup.close()
        self._signal_end.close()
        os.close(self._replies)
        _redirect(os.devnull, os.O_RDONLY, 0)

    def _reap(self) -> None:
        while self._id_of_pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            identity = self._id_of_pid.pop(pid)
            self._say(id=identity, exit=os.waitstatus_to_exitcode(status))

    def _kill_all(self) -> None:
        for pid in self._id_of_pid:
            _signal_group(pid, signal.SIGKILL)

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the end of stdin comes next
            os.write(self._replies, json.dumps(message).encode() + b"\n")


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _redirect(path: str, flags: int, target: int) -> None:
    descriptor = os.open(path, flags, 0o666)
    os.dup2(descriptor, target)
    os.close(descriptor)


def main() -> Request | None:
    """Serves until stdin ends. Returns what to run in a child, None in the server."""
    # pyarrow's allocator would start a thread of its own.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    replies = os.dup(1)
    os.dup2(2, 1)  # what an import prints must not look like a reply
    for name in WARM:
        with contextlib.suppress(ImportError):  # the stage that needs it will say so
            importlib.import_module(name)
    if reason := _unsound():
        sys.exit(f"no forks here: {reason}")
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page it looks at
    return _Server(replies).serve()


def _unsound() -> str | None:
    """Why forks of this process would not work as fresh interpreters do, if so."""
    import torch

    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        return "an import has started a thread"
    if torch.cuda.is_available():
        return "there is a GPU, and an import may have initialised it"
    return None


class _Ending:
    """Ends the process with the exit code that Python would give, without its slow teardown."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        code: object = 0
        if isinstance(error, SystemExit):
            code = error.code or 0
        elif error is not None:
            traceback.print_exception(error)
            code = 1
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run(request: Request) -> None:
    """In a child: the stage, to the log; leaves by SystemExit, or by what the stage raises."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for target in (1, 2):
        _redirect(request.log, flags, target)
    os.environ.update(request.env)
    module, *argv = request.argv
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with _Ending():
        asked = main()
        if asked is not None:
            run(asked)
