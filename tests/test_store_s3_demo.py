"""The demo on S3 servers: rows equal those on the local disk, kills of the server or not; no secret.

Here one iteration; `make proof-s3` does the same with four.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaifv.store import Store, open_store
from tests.s3servers import ACCESS_KEY, BUCKET, SECRET_KEY, Server, running, use

ITERATIONS = int(os.environ.get("PROOF_ITERATIONS", "1"))
ROOT = Path(__file__).parents[1]
PLANTED = {"OPENAI_API_KEY": "sk-planted-0123456789", "HF_TOKEN": "hf_planted0123456789"}
SECRETS = (ACCESS_KEY, SECRET_KEY, *PLANTED.values())
DOWN_SECONDS = 3.0


def run_demo(root: str, folder: Path, *flags: str, iterations: int = ITERATIONS) -> str:
    """Every stage in a process of its own, a fork unless told otherwise; returns what it wrote."""
    command = [sys.executable, "-m", "controller", "run", "--root", root]
    done = subprocess.run(
        [*command, "--iterations", str(iterations), *flags],
        cwd=folder,
        env=os.environ | PLANTED | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def digests(run: Store) -> dict[str, str]:
    """What the rows of every part are, and what every tree holds."""
    found = {}
    for item in run.objects(""):
        if item.key.endswith(".parquet"):
            found[item.key] = run.provenance(item.key).rows_sha256
        elif item.key.endswith("/_COMPLETE"):
            tree = item.key.removesuffix("/_COMPLETE")
            found[tree] = run.tree_digest(tree)
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("local")
    run_demo(str(folder / "runs"), folder)
    return digests(open_store(str(folder / "runs/demo")))


@contextlib.contextmanager
def watching(action: "Watch") -> Iterator["Watch"]:
    """Calls `action.look` twenty times a second until the block ends; its error is raised then."""
    over = threading.Event()
    errors: list[Exception] = []

    def watch() -> None:
        try:
            while not over.wait(0.05):
                action.look()
        except Exception as error:  # of a thread: raised by the test
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield action
    finally:
        over.set()
        thread.join()
    assert not errors, errors


class Watch:
    """Reads every process's arguments and, if told so, kills the server once per iteration."""

    def __init__(self, server: Server, data: Path | None) -> None:
        self._server, self._data = server, data
        self.kills = 0
        self.arguments: set[str] = set()

    def look(self) -> None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                self.arguments.add(entry.read_bytes().decode(errors="replace"))
        if self._data is None or self.kills == ITERATIONS:
            return
        answers = self._data / f"iteration-{self.kills}/answers"
        if answers.is_dir() and next(answers.glob("*.parquet"), None):
            self.kills += 1
            self._server.kill()
            time.sleep(DOWN_SECONDS)
            self._server.start()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kind", "killed"),
    [
        ("versitygw", True),
        *([("versitygw", False), ("ministack", False)] if ITERATIONS > 1 else []),
    ],
)
def test_the_demo_on_s3_has_the_rows_of_the_local_run(
    kind: str,
    killed: bool,
    local: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with running(kind, tmp_path / "server") as server:
        use(server.endpoint, monkeypatch, tmp_path)
        data = tmp_path / "server/data" / BUCKET / "runs/demo" if killed else None
        with watching(Watch(server, data)) as watch:
            started = time.monotonic()
            said = run_demo(f"s3://{BUCKET}/runs", tmp_path)
            seconds = time.monotonic() - started
        assert watch.kills == (ITERATIONS if killed else 0)
        run = open_store(f"s3://{BUCKET}/runs/demo")
        assert digests(run) == local
        stored = {item.key: run.read_bytes(item.key) for item in run.objects("")}
        logs = {str(log): log.read_bytes() for log in tmp_path.glob("runs/**/*.log")}
        assert "report/index.html" in stored
        assert logs
        assert any("controller" in line and "--root" in line for line in watch.arguments)
        for secret in SECRETS:
            assert secret not in said
            assert not [line for line in watch.arguments if secret in line]
            assert not [name for name, text in (stored | logs).items() if secret.encode() in text]
    print(
        f"{kind}: {ITERATIONS} iterations in {seconds:.0f} s, server killed {watch.kills} times: "
        f"{len(local)} parts and trees equal the local run's; {len(SECRETS)} planted secrets in "
        f"none of {len(stored)} objects, {len(logs)} logs, {len(watch.arguments)} command lines"
    )


FEW = ("prepare.instructions_per_iteration=24", "train.epochs=1", "train.checkpoints_per_epoch=1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stages_as_fresh_interpreters_on_s3_have_the_rows_of_local_forks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = [word for change in FEW for word in ("--set", change)]
    run_demo(str(tmp_path / "local"), tmp_path, *flags, iterations=1)
    with running("versitygw", tmp_path / "server") as server:
        use(server.endpoint, monkeypatch, tmp_path)
        with watching(Watch(server, None)) as watch:
            run_demo(f"s3://{BUCKET}/runs", tmp_path, "--isolated", *flags, iterations=1)
        found = digests(open_store(f"s3://{BUCKET}/runs/demo"))
    assert found == digests(open_store(str(tmp_path / "local/demo")))
    assert {key.split("/")[1] for key in found} >= {"answers", "reflogps", "checkpoints", "grades"}
    for stage in ("prepare", "sample", "train", "respond"):
        assert any(f"\0-m\0jobs.{stage}\0" in line for line in watch.arguments)
