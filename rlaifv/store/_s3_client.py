"""One bucket: credentials, time bounds and retries for every request, in one place.

botocore's own retries are off: the ones here also cover what it leaves alone (a body that is cut
or trickles, a token that has expired, 409, a digest that does not fit), with one time bound.
"""

import datetime
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, get_args

import boto3
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError
from botocore.response import StreamingBody
from botocore.session import Session as BotocoreSession
from botocore.session import get_session
from botocore.utils import parse_timestamp

from rlaifv.errors import ConfigError
from rlaifv.store._s3_errors import Place, judge

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)
logging.getLogger("botocore").setLevel(logging.WARNING)  # its debug lines hold signatures, tokens
T = TypeVar("T")
Checksums = Literal["when_required", "when_supported"]
THREADS = 8
"""Requests at once for trees and large files."""
PIECE = 256 << 10
"""Bytes of a download in memory per request."""
SINGLE_WRITER = "RLAIFV_S3_SINGLE_WRITER"
ADDRESSING = "RLAIFV_S3_ADDRESSING"


class Settings(NamedTuple):
    """How to talk to the server; the environment gives what boto3's own chain does not."""

    attempts: int = 8
    """Per request; with `backoff_seconds`, 25 s of waiting on average before giving up."""
    backoff_seconds: float = 0.5
    """The n-th wait is drawn from 0 to this times 2**n, at most 20 s (full jitter)."""
    connect_seconds: float = 5.0
    read_seconds: float = 60.0
    """For silence; a body that trickles is bounded by `bytes_per_second` besides."""
    bytes_per_second: int = 100_000
    """A body slower than this is cut and asked for again."""
    addressing: Literal["path", "virtual", "auto"] = "auto"
    """`auto`: path-style for an endpoint of one's own, virtual hosts for AWS."""
    request_checksums: Checksums = "when_supported"
    """S3's additional checksums: SHA-256 of a body, or CRC-32 of the parts of an upload when the
    server says that it checks them. They go into headers, which a server that does not know them
    ignores; boto3's own way, trailers, breaks such servers and is always off. Our own SHA-256 is
    kept and verified either way."""
    response_checksums: Checksums = "when_required"
    single_writer: bool = False
    """The server ignores `If-None-Match`: look first, then write. Loses a race."""

    @staticmethod
    def from_environment() -> "Settings":
        """Raises ConfigError for a value that is not one."""
        attempts = os.environ.get("AWS_MAX_ATTEMPTS", str(Settings().attempts))
        if not attempts.isdecimal() or not int(attempts):
            raise ConfigError(f"AWS_MAX_ATTEMPTS={attempts}: expected a positive number")
        return Settings(
            attempts=int(attempts),
            addressing=cast(
                Literal["path", "virtual", "auto"],
                _one_of(ADDRESSING, ("auto", "path", "virtual")),
            ),
            request_checksums=cast(
                Checksums, _one_of("AWS_REQUEST_CHECKSUM_CALCULATION", get_args(Checksums)[::-1])
            ),
            response_checksums=cast(
                Checksums, _one_of("AWS_RESPONSE_CHECKSUM_VALIDATION", get_args(Checksums))
            ),
            single_writer=_one_of(SINGLE_WRITER, ("0", "1")) == "1",
        )


def _one_of(variable: str, values: Sequence[str]) -> str:
    """The value of an environment variable; the first of `values` when it is not set."""
    value = os.environ.get(variable, "").lower() or values[0]
    if value not in values:
        raise ConfigError(f"{variable}={value}: expected {' or '.join(values)}")
    return value


class Bucket:
    """Requests to one bucket. Threads may share it; a forked process gets connections of its own."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._process = 0

    def call(self, what: str, action: Callable[["S3Client"], T]) -> T:
        """The result of `action`, made again after a failure that may pass.

        `what` names the object in messages. Raises ConfigError, ArtifactError or TransientError.
        """
        renewed = False
        for attempt in range(1, self.settings.attempts + 1):
            client = self.client()
            try:
                return action(client)
            except (ClientError, BotoCoreError) as error:
                place = Place(self.name, client.meta.endpoint_url)
                verdict = judge(error, what=what, place=place)
                renew = verdict.renew and not renewed
                if not (verdict.again or renew) or attempt == self.settings.attempts:
                    raise verdict.error from error
                log.info("attempt %d of %d: %s", attempt, self.settings.attempts, verdict.error)
                if renew:
                    renewed = True
                    self._drop(client)
            bound = min(20.0, self.settings.backoff_seconds * 2 ** (attempt - 1))
            time.sleep(random.uniform(0, bound))
        raise AssertionError("the last attempt returns or raises")

    def read(self, body: StreamingBody, expected: int) -> bytes:
        """A whole body; one that trickles or is cut raises a botocore error, for `call`."""
        with self._in_time(body, expected):
            data = body.read()
        if len(data) != expected:
            raise IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
        return data

    def pour(self, body: StreamingBody, expected: int, sink: Callable[[bytes], object]) -> None:
        """The same, `PIECE` bytes at a time."""
        count = 0
        with self._in_time(body, expected):
            while piece := body.read(PIECE):
                sink(piece)
                count += len(piece)
        if count != expected:
            raise IncompleteReadError(actual_bytes=count, expected_bytes=expected)

    @contextmanager
    def _in_time(self, body: StreamingBody, expected: int) -> Iterator[None]:
        seconds = self.settings.read_seconds + expected / self.settings.bytes_per_second
        # recv() returns a trickle byte by byte, each within its own timeout; only this ends it.
        watchdog = threading.Timer(seconds, body._raw_stream.shutdown)  # type: ignore[attr-defined]
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            body.close()

    def client(self) -> "S3Client":
        """boto3's client, made when first needed: a process that was forked must not share one."""
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client, self._process = self._connect(), os.getpid()
            return self._client

    def _drop(self, client: "S3Client") -> None:
        with self._lock:
            if self._client is client:
                self._client = None  # the next one reads the credentials anew

    def _connect(self) -> "S3Client":
        settings = self.settings
        config = Config(
            connect_timeout=settings.connect_seconds,
            read_timeout=settings.read_seconds,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=4 * THREADS,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation=settings.response_checksums,
        )
        if settings.addressing != "auto":
            config = config.merge(Config(s3={"addressing_style": settings.addressing}))
        try:
            client = boto3.session.Session(botocore_session=_session()).client("s3", config=config)
        except BotoCoreError as error:
            raise judge(error, what="S3", place=Place(self.name, "")).error from error
        except ValueError as error:  # "Invalid endpoint: ..."
            raise ConfigError("AWS_ENDPOINT_URL: not the URL of an endpoint") from error
        if "@" in client.meta.endpoint_url:  # would end up in tracebacks
            raise ConfigError("AWS_ENDPOINT_URL: must not hold a user or a password")
        client.meta.events.register("before-sign.s3.UploadPart", _sign_without_body)
        return client


def _session() -> BotocoreSession:
    """botocore's own; its way to read dates takes more than half the time of a long listing."""
    session = get_session()
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_timestamp)
    return session


def _timestamp(value: str) -> datetime.datetime:
    if str(value).endswith("Z"):
        with suppress(ValueError):
            return datetime.datetime.fromisoformat(value)
    return parse_timestamp(value)


def _sign_without_body(request: AWSRequest, **_: object) -> None:
    """Spares the SHA-256 of a part whose CRC-32 the server checks; the header of that is signed.

    Nothing rests on that CRC: the file's own SHA-256 is in its metadata and in the tree's marker,
    whose bodies and headers are signed. boto3 does the same, over TLS only.
    """
    if "x-amz-checksum-crc32" in request.headers:
        config: Config = request.context["client_config"]
        s3 = cast(Any, {**(config.s3 or {}), "payload_signing_enabled": False})  # type: ignore[attr-defined]
        unsigned = Config(s3=s3)
        request.context["client_config"] = config.merge(unsigned)
