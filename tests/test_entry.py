"""What all stages share: flags, exit codes, skip-if-done, signals, provenance, the fork server."""

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs._entry import Job, main
from jobs._models import weights_digest
from rlaifv.errors import ArtifactError, ConfigError, RlaifvError, TransientError
from rlaifv.pipeline import CONFIG, STAGES, Shard, part_key
from rlaifv.records import Instruction
from rlaifv.store import Store
from tests.jobs_support import (
    ROOT,
    digests,
    environment,
    make_config,
    make_run,
    make_source,
    run_job,
    spawn_job,
    spawn_stages,
)

PART = part_key(0, "instructions", Shard(0, 1))


@pytest.fixture
def run(tmp_path: Path) -> Store:
    source = make_source(tmp_path / "source", num_rows=6)
    return make_run(tmp_path / "run", make_config(source, model=tmp_path / "no-model"))


def argv(run: Store, *, iteration: int = 0, shard: str = "0/1") -> list[str]:
    return ["--run", str(run), "--iteration", str(iteration), "--shard", shard]


def fails(error: Exception) -> Iterator[Instruction]:
    """Rows that cannot be made."""
    raise error


@pytest.mark.parametrize("name", sorted(STAGES))
def test_help_shows_what_a_stage_reads_and_writes_and_has_three_flags(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(getattr(module, name), ["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"writes: {STAGES[name].writes}" in text
    assert f"reads: {', '.join(STAGES[name].reads)}".rstrip() in text
    assert set(re.findall(r"--\w+", text)) == {"--help", "--run", "--iteration", "--shard"}
    budget = 75 if name == "train" else 50  # train also says how to start several processes
    assert len(inspect.getsource(module).splitlines()) <= budget


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 78), (ArtifactError, 65), (TransientError, 75), (RlaifvError, 1)],
)
def test_an_error_of_ours_becomes_its_exit_code_and_one_line(
    run: Store, capsys: pytest.CaptureFixture[str], error: type[RlaifvError], code: int
) -> None:
    def prepare(job: Job) -> Iterator[Instruction]:
        yield from fails(error("what is wrong"))

    assert main(prepare, argv(run)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(f"ERROR [run 0 prepare 0/1] {error.__name__}: what is wrong")


def test_a_bug_keeps_its_traceback(run: Store) -> None:
    def prepare(job: Job) -> Iterator[Instruction]:
        yield from fails(ZeroDivisionError())

    with pytest.raises(ZeroDivisionError):
        main(prepare, argv(run))
    assert [item.key for item in run.objects("")] == [CONFIG]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "1/3"], "config.json gives prepare 1 shards"),
        (["--shard", "1/1"], "expected I/N"),
        (["--shard", "x"], "expected I/N"),
        (["--iteration", "2"], "--iteration 2: config.json has 2"),
        (["--iteration", "-1"], "--iteration -1"),
    ],
)
def test_a_wrong_flag_is_a_configuration_error(
    run: Store, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    module = importlib.import_module("jobs.prepare")
    assert module.main(module.prepare, [*argv(run), *flags]) == 78
    assert message in capsys.readouterr().err


def test_an_unknown_flag_exits_with_the_code_that_stops_the_run(run: Store) -> None:
    module = importlib.import_module("jobs.prepare")
    with pytest.raises(SystemExit) as ended:
        module.main(module.prepare, [*argv(run), "--fast"])
    assert ended.value.code == 78


def test_a_stage_that_is_done_is_not_run_again(
    run: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(run, "prepare") == 0
    before = run.read_bytes(PART)
    assert run_job(run, "prepare") == 0
    assert "done already" in capsys.readouterr().err
    assert run.read_bytes(PART) == before


def test_a_second_writer_discards_its_rows(run: Store, capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(job: Job) -> Iterator[Instruction]:
        assert run_job(run, "prepare") == 0  # another pod is faster
        yield from ()

    assert main(prepare, argv(run)) == 0
    assert "another writer was first" in capsys.readouterr().err
    assert run.provenance(PART).rows == 6


def test_a_run_without_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(make_store(tmp_path), "prepare") == 65
    assert "config.json: no such artifact" in capsys.readouterr().err
    (tmp_path / CONFIG).write_text("{")
    assert run_job(make_store(tmp_path), "prepare") == 78


def make_store(folder: Path) -> Store:
    from rlaifv.store import open_store

    return open_store(str(folder))


def test_the_provenance_says_where_a_part_comes_from(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAIFV_IMAGE", "image@sha256:1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_job(run, "prepare")
    origin = run.provenance(PART)
    assert (origin.stage, origin.run, origin.shard, origin.rows) == ("prepare", "tiny", "0/1", 6)
    assert (origin.image, origin.threads, origin.seed) == ("image@sha256:1", 3, 0)
    assert origin.notes["group_sizes"] == "4 2"
    assert origin.started_at.endswith("+00:00")


def test_rows_that_follow_no_instruction_are_refused(run: Store) -> None:
    from rlaifv.records import Answer

    run_job(run, "prepare")
    answer = Answer(
        instruction_id="nobody",
        answer_id="nobody/0",
        text="",
        seed=0,
        num_tokens=0,
        finish_reason="stop",
    )
    key = part_key(0, "answers", Shard(0, 1))
    run.write_part(key, [answer], record=Answer, origin=lambda: run.provenance(PART))
    assert run_job(run, "claim") == 65


def test_the_digest_of_weights_sees_every_changed_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1" * 100)
    first = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == first
    (tmp_path / "a.safetensors").write_bytes(b"1" * 99 + b"2")
    assert weights_digest(tmp_path) != first


WAITS = """
import sys, time
from jobs._entry import main
from tests.test_entry import Job

def prepare(job: Job):
    "reads:"
    print("ready", flush=True)
    time.sleep(60)
    yield

sys.exit(main(prepare, sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigterm_ends_a_stage_at_once_and_leaves_nothing(run: Store, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *argv(run)],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    assert time.monotonic() - sent < 2
    process.stdout.close()
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == [CONFIG]
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.slow
def test_a_separate_process_prints_log_lines_and_exits_with_the_code(run: Store) -> None:
    good = spawn_job(run, "prepare")
    assert (good.returncode, good.stdout) == (0, "")
    assert re.search(
        r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO \[run 0 prepare 0/1\] committed rows=6 "
        r"quarantined=0 seconds=\d+\.\d$",
        good.stderr,
        re.MULTILINE,
    )
    assert spawn_job(run, "prepare", shard="7/9").returncode == 78


class Server:
    """A fork server and its replies."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs._forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def say(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        return reply

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(timeout=30)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    assert one.close() == 0


def request(run: Store, stage: str, log: Path, **more: Any) -> dict[str, Any]:
    return {"argv": [f"jobs.{stage}", *argv(run)], "log": str(log), "env": {}, **more}


@pytest.mark.slow
def test_the_fork_server_runs_stages_and_reports_their_exit_codes(
    server: Server, run: Store, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    server.say(id="a", **request(run, "prepare", log))
    assert server.hear()["id"] == "a"
    assert server.hear() == {"id": "a", "exit": 0}
    assert "committed rows=6" in log.read_text()
    server.say(id="b", **request(run, "sample", log))  # there is no such model
    assert server.hear().keys() == {"id", "pid"}
    assert server.hear() == {"id": "b", "exit": 78}
    assert "committed rows=6" in log.read_text()  # appended, not replaced
    assert "ConfigError" in log.read_text()


@pytest.mark.slow
def test_the_fork_server_has_one_thread(server: Server, run: Store, tmp_path: Path) -> None:
    server.say(id=1, **request(run, "prepare", tmp_path / "log"))
    server.hear()
    server.hear()
    assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1  # noqa: PTH208


@pytest.mark.slow
def test_the_environment_of_a_request_reaches_its_stage_only(
    server: Server, run: Store, tmp_path: Path
) -> None:
    more = {"env": {"RLAIFV_IMAGE": "image@sha256:2"}}
    server.say(id=1, **{**request(run, "prepare", tmp_path / "log"), **more})
    server.hear()
    assert server.hear()["exit"] == 0
    assert run.provenance(PART).image == "image@sha256:2"


@pytest.mark.slow
def test_a_fork_writes_the_rows_of_a_process_of_its_own(server: Server, tmp_path: Path) -> None:
    from tests.tiny import make_tiny_llava

    model = make_tiny_llava(tmp_path / "model")
    config = make_config(make_source(tmp_path / "source", num_rows=4), model=model)
    stages = ("prepare", "sample", "claim", "verify", "pair", "reflogp", "train")
    forked, fresh = (make_run(tmp_path / name, config) for name in ("forked", "fresh"))
    for number, stage in enumerate(stages):
        server.say(id=number, **request(forked, stage, tmp_path / "log"))
        server.hear()
        assert server.hear()["exit"] == 0, (tmp_path / "log").read_text()
    spawn_stages(fresh, stages, env=environment())
    artifacts = {stage: STAGES[stage].writes for stage in stages}
    assert digests(forked, config, artifacts) == digests(fresh, config, artifacts)


@pytest.fixture
def hanging(tmp_path: Path) -> Store:
    """A run whose `prepare` waits for ever, for a source that nobody writes."""
    os.mkfifo(tmp_path / "x.jsonl")
    return make_run(tmp_path / "hanging", make_config(tmp_path / "x.jsonl", model=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(15, 143), (9, -9)])
def test_a_signal_is_passed_on_to_the_stage(
    server: Server, hanging: Store, tmp_path: Path, number: int, code: int
) -> None:
    server.say(id=1, **request(hanging, "prepare", tmp_path / "log"))
    pid = server.hear()["pid"]
    assert os.getpgid(pid) == pid
    wait_until_started(pid)
    server.say(id=1, kill=number)
    assert server.hear() == {"id": 1, "exit": code}


@pytest.mark.slow
def test_a_signal_to_a_stage_that_has_ended_is_ignored(
    server: Server, run: Store, tmp_path: Path
) -> None:
    server.say(id=1, **request(run, "prepare", tmp_path / "log"))
    server.hear()
    server.hear()
    server.say(id=1, kill=9)
    server.say(id=2, **request(run, "prepare", tmp_path / "log"))
    assert server.hear()["id"] == 2
    assert server.hear() == {"id": 2, "exit": 0}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end of stdin", "killed"])
def test_no_stage_outlives_the_fork_server(hanging: Store, tmp_path: Path, how: str) -> None:
    server = Server()
    server.say(id=1, **request(hanging, "prepare", tmp_path / "log"))
    pid = server.hear()["pid"]
    if how == "killed":
        server.process.kill()
    server.close()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        os.sched_yield()
    assert not is_running(pid)


def wait_until_started(pid: int) -> None:
    """Until the stage waits for its source: its signal handler is there by then."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if "SIGTERM" in signal_names(pid) and state_of(pid) == "S":
            return
        os.sched_yield()
    raise AssertionError("the stage did not start")


def signal_names(pid: int) -> set[str]:
    """Signals that the process handles itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^SigCgt:\s+(\w+)$", status, re.MULTILINE)
    return {one.name for one in signal.Signals if int(mask, 16) >> (one - 1) & 1}


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_running(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")
