"""S3 servers on 127.0.0.1 for tests: versitygw (Go, files in a folder) and ministack (PyPI).

The programs are made once and kept in ~/.cache/rlaifv-dev. Without Go, or when one cannot be
installed, tests skip with the reason; with CI=true they fail instead. So are the AWS command line
and DuckDB, for tests that read a bucket as people do.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

TOOLS = Path(os.environ.get("RLAIFV_DEV_CACHE", "~/.cache/rlaifv-dev")).expanduser()
GO_MODULE = Path(__file__).parents[1] / "k8s/dev/s3"
ACCESS_KEY = "AKIAPLANTEDFORTESTS1"
SECRET_KEY = "planted/secret+for/tests0123456789abcdef"  # noqa: S105 - of servers on loopback
BUCKET = "rlaifv-test"
STARTING_SECONDS = 60


def unavailable(reason: str) -> None:
    """Skips the test; fails it where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def versitygw_program() -> Path:
    """Built from the module's go.mod (a minute, once per version); skips without Go."""
    program = TOOLS / f"versitygw-{hash_of(GO_MODULE / 'go.sum')}"
    with _one_at_a_time():
        if program.exists():
            return program
        if shutil.which("go") is None:
            unavailable("versitygw: Go is not installed")
        partial = program.with_suffix(f".{os.getpid()}")
        package = "github.com/versity/versitygw/cmd/versitygw"
        _make(["go", "build", "-ldflags", "-s -w", "-o", str(partial), package], cwd=GO_MODULE)
        partial.replace(program)
    return program


def python_tool(program: str, *packages: str) -> Path:
    """A program of PyPI packages in an environment of their own; skips when that fails."""
    folder = TOOLS / "-".join(sorted(packages)).replace("==", "-")
    with _one_at_a_time():
        if not (folder / "complete").exists():
            _make([sys.executable, "-m", "venv", "--clear", str(folder)])
            _make([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages])
            (folder / "complete").touch()
    return folder / "bin" / program


def ministack_program() -> Path:
    return python_tool("ministack", "ministack==1.5.33")


def aws_program() -> Path:
    """The AWS command line, as people have it."""
    return python_tool("aws", "awscli==1.46.2")


def duckdb_python() -> Path:
    """A Python with DuckDB and its S3 extension, which DuckDB itself would download."""
    return python_tool("python", "duckdb==1.4.4", "duckdb-ext-httpfs==1.4.4.20260205")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Test processes that need the same program wait for the first."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with (TOOLS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        unavailable(f"{' '.join(command)}: {done.stderr[-500:]}")


def hash_of(path: Path) -> str:
    from rlaifv.store import file_digest

    return file_digest(path)[:12]


class Server:
    """One running program, its endpoint, and the means to kill and start it again."""

    def __init__(self, command: list[str], port: int, *, log: Path, extra: Mapping[str, str]):
        self._command, self._log = command, log
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(log.parent), **extra}
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: IO[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Returns when it answers."""
        self._stream = self._log.open("ab")
        self._process = subprocess.Popen(
            self._command, stdout=self._stream, stderr=self._stream, env=self._environment
        )
        client = plain_client(self.endpoint)
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            with contextlib.suppress(BotoCoreError, ClientError):
                client.list_buckets()
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{self._command[0]} does not start: {self._log.read_text()[-1000:]}")

    def kill(self) -> None:
        """Ends it as `kill -9` does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._stream is not None:
            self._stream.close()


def plain_client(endpoint: str):  # type: ignore[no-untyped-def]
    """boto3 itself, to look at the server past our own code."""
    return boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1").client(
        "s3", endpoint_url=endpoint, config=Config(retries={"total_max_attempts": 1})
    )


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The environment of a user of `endpoint`, with a cache and no configuration of their own."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("RLAIFV_CACHE", str(folder / "cache"))


@contextlib.contextmanager
def running(kind: str, folder: Path) -> Iterator[Server]:
    """`versitygw` or `ministack` with an empty bucket, data below `folder`; killed afterwards."""
    port = free_port()
    if kind == "versitygw":
        (folder / "data").mkdir(parents=True, exist_ok=True)
        command = [str(versitygw_program()), "--port", f"127.0.0.1:{port}", "--keep-alive"]
        command += ["--quiet", "posix", str(folder / "data")]
        extra = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    else:
        command = [str(ministack_program())]
        extra = {
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "SERVICES": "s3",
            "TMPDIR": str(folder),
        }
        folder.mkdir(parents=True, exist_ok=True)
    server = Server(command, port, log=folder / "server.log", extra=extra)
    server.start()
    try:
        plain_client(server.endpoint).create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.kill()
