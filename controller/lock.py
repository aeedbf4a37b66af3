"""One controller per run on one machine."""

import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlaifv.errors import ConfigError, TransientError

LOCK = "controller.lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the run in `folder` for as long as the block lasts.

    The kernel lets go when the process ends, however it ends; the file itself means nothing.
    Raises TransientError if another controller holds it, ConfigError if it cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: cannot be a run's folder: {error.strerror}") from error
    with (folder / LOCK).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise TransientError(
                f"{folder}: another controller drives this run ({holder}); "
                "wait for it, or look on with `python -m controller status`"
            ) from error
        stream.truncate(0)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        stream.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether a controller on this machine drives the run in `folder`."""
    try:
        with (folder / LOCK).open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except FileNotFoundError:
        pass
    return False
