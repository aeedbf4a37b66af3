"""The errors an operator can act on; each carries the exit code that a Job's failure policy reads.

RlaifvError            1   a bug, or anything without a better name: retried, then failed
|- ConfigError        78   the configuration is wrong: the whole run stops        (EX_CONFIG)
|- ArtifactError      65   an input is missing or invalid: this shard stops       (EX_DATAERR)
`- TransientError     75   rate limit, store timeout: the shard is tried again    (EX_TEMPFAIL)
"""

from typing import ClassVar


class RlaifvError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(RlaifvError):
    """The configuration, a flag or the environment is wrong; trying again cannot help."""

    exit_code: ClassVar[int] = 78


class ArtifactError(RlaifvError):
    """An artifact or input is missing or invalid; the message names file, row and field."""

    exit_code: ClassVar[int] = 65


class TransientError(RlaifvError):
    """Something outside failed in a way that usually passes; the same call may succeed later."""

    exit_code: ClassVar[int] = 75
