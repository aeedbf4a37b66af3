"""What every command line here shares: wrong flags, mistakes and interruptions end in one way."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from rlaifv.errors import ConfigError, RlaifvError

T = TypeVar("T")
INTERRUPTED = 130
MISTAKES = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What a path of a user's own leads to, such as a file where a folder was expected."""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are configuration errors: trying again cannot help."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with 78, what is wrong, and where to look."""
        text = f"error: {message}\n{self.format_usage()}`{self.prog} --help` says more\n"
        self.exit(ConfigError.exit_code, text)


def ending(work: Callable[[], int]) -> int:
    """The exit code of a command: its own, or that of the error it ended with.

    A user's mistake, an interruption and a reader that went away (`| head`) are no tracebacks.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except RlaifvError as error:
        return _failed(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        return 0
    except OSError as error:
        return _failed(_explained(error))


def checked(build: Callable[[], T], *, what: str) -> T:
    """What `build` makes of flags; ConfigError, naming the flag, where the value is not allowed."""
    from pydantic import ValidationError  # not for --help

    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{what}: {field}: {first['msg']}") from error


def _explained(error: OSError) -> RlaifvError:
    from rlaifv.store import explain_os_error

    if error.errno in MISTAKES:
        return ConfigError(f"{error.filename}: {error.strerror}")
    if isinstance(error, FileNotFoundError) and error.filename:
        return ConfigError(f"{error.filename}: no such file")
    explained = explain_os_error(error, str(error.filename))
    if not isinstance(explained, RlaifvError):
        raise error
    return explained


def _failed(error: RlaifvError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code
