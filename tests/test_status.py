"""`status`, `logs` and what the controller notes for them."""

import datetime
import io
import random
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from controller.__main__ import main
from controller.journal import JOURNAL, Journal, JournalWriter, error_class
from controller.lock import hold
from controller.logs import find_shard, follow_local, is_local
from controller.loop import Progress
from controller.paint import Paint, duration, paint_for, rate, safe
from controller.places import RunPlace, run_place
from controller.plan import ShardId, ShardState, observe
from controller.run import drive_run, settle_config
from controller.screen import status_text, watch
from controller.status import EXIT_CODES, read_status
from rlaifv.errors import ConfigError
from rlaifv.pipeline import CONFIG
from rlaifv.store import Backend, Store
from tests.commands_support import ORDER, finished_run
from tests.fake_world import FakeExecutor, run_fake_stage, tiny_config

COMMAND = ("python", "-m", "controller", "run", "--name", "my run")


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def start(root: Path) -> RunPlace:
    place = run_place(str(root), "tiny")
    settle_config(place.store, tiny_config(), grow=True)
    return place


def writer(place: RunPlace, clock: Clock) -> JournalWriter:
    return JournalWriter(place.store, command=COMMAND, executor="local", clock=clock)


def look(
    journal: JournalWriter, place: RunPlace, shards: dict[ShardId, ShardState], clock: Clock
) -> None:
    """One turn of the loop, then five seconds."""
    keys = [item.key for item in place.store.objects("")]
    journal.look(Progress(observe(keys, {}), shards))
    clock.now += 5


def test_queue_time_is_told_apart_from_run_time(tmp_path: Path) -> None:
    place, clock = start(tmp_path), Clock()
    journal = writer(place, clock)
    one, two = ShardId(0, "prepare", 0), ShardId(0, "prepare", 1)
    waiting, running = ShardState("waiting"), ShardState("running", 1)
    look(journal, place, {one: running, two: waiting}, clock)
    look(journal, place, {one: running, two: running}, clock)
    run_fake_stage(place.store, tiny_config(), one)
    look(journal, place, {one: ShardState("ended", 1, 0), two: running}, clock)
    look(journal, place, {one: ShardState("ended", 1, 0), two: running}, clock)
    with hold(place.folder):
        status = read_status(place)
    stage = status.stages[0]
    assert (stage.done, stage.running, stage.waiting, stage.failed) == (1, 1, 0, 0)
    assert (stage.queue_seconds, stage.wall_seconds) == (5.0, 15.0)
    assert stage.eta_seconds == 15.0  # half of it took 15 seconds
    assert status.state == "running"
    text = status_text(status)
    (line,) = (line for line in text.split("\n") if line.startswith("prepare"))
    assert line.split() == ["prepare", "1/2", "1", *("2.5", "s", "15", "s")]
    assert "1/2*" in text
    assert "time left: known after the first iteration" in text


def test_the_time_left_is_that_of_the_iterations_before(tmp_path: Path) -> None:
    place = finished_run(tmp_path)
    for item in list(place.store.objects("iteration-1")):
        place.store.delete(item.key)
    at = datetime.datetime.now(datetime.UTC).isoformat()
    journal = Journal(
        controller="process 1 on here",
        command="x",
        executor="local",
        started=at,
        at=at,
        active_seconds={0: 100.0, 1: 30.0},
    )
    place.store.write_bytes(JOURNAL, journal.model_dump_json().encode())
    with hold(place.folder):
        status = read_status(place)
    assert status.eta_seconds == 70.0
    assert "time left: about 1 min 10 s" in status_text(status)
    assert read_status(place).eta_seconds is None  # nobody drives it


def test_a_later_controller_goes_on_with_the_times(tmp_path: Path) -> None:
    place, clock = start(tmp_path), Clock()
    for _ in range(2):
        journal = writer(place, clock)
        look(journal, place, {ShardId(0, "prepare", 0): ShardState("running", 1)}, clock)
        journal.close()
    stored = place.store.read_json(JOURNAL, Journal)
    assert [(one.stage, one.run_seconds, one.running) for one in stored.clocks] == [
        ("prepare", 10.0, 0)
    ]
    assert stored.ended
    assert stored.active_seconds == {0: 10.0}


def test_a_journal_of_another_version_does_not_stop_a_run(tmp_path: Path) -> None:
    place = start(tmp_path)
    place.store.write_bytes(JOURNAL, b'{"no": "journal"}')
    assert read_status(place).state == "interrupted"
    writer(place, Clock()).close()
    assert read_status(place).command == "python -m controller run --name 'my run'"


def test_a_failure_that_is_tried_again_is_told_with_its_log(tmp_path: Path) -> None:
    place, clock = start(tmp_path), Clock()
    journal = writer(place, clock)
    shard = ShardId(0, "prepare", 1)
    said = "killed \x1b[31mred"
    look(journal, place, {shard: ShardState("ended", 1, -9, said)}, clock)
    look(journal, place, {shard: ShardState("running", 2, -9, said)}, clock)
    with hold(place.folder):
        status = read_status(place)
    assert status.error is not None
    assert (status.error.kind, status.error.shard, status.error.ended_the_run) == (
        "killed",
        1,
        False,
    )
    text = status_text(status)
    assert "The last attempt that failed (it is tried again): ended by a signal (signal 9)" in text
    assert "\x1b" not in text
    assert "--stage prepare --iteration 0 --shard 1" in text


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (78, "configuration"),
        (65, "data"),
        (75, "passing"),
        (-9, "killed"),
        (137, "killed"),
        (1, "program"),
    ],
)
def test_every_exit_code_has_a_class(code: int, kind: str) -> None:
    assert error_class(code) == kind


def test_a_killed_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, clock = start(tmp_path), Clock()
    look(writer(place, clock), place, {ShardId(0, "prepare", 0): ShardState("running", 1)}, clock)
    # no close: SIGKILL
    assert main(["status", str(place.folder)]) == EXIT_CODES["interrupted"] == 4
    said = capsys.readouterr().out
    assert "tiny  interrupted  0 of 2 iterations done" in said
    assert "nobody drives this run" in said
    assert said.endswith("  python -m controller run --name 'my run'\n")
    assert "*" not in said.split("\n\n")[1].split("\n")[2]  # nothing is shown as running


def test_a_finished_run_points_at_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = finished_run(tmp_path)
    assert main(["status", str(place.folder)]) == 0
    said = capsys.readouterr().out
    assert f"report:  {tmp_path}/tiny/report/index.html" in said
    assert "untrained" in said


def test_watching_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = start(tmp_path)
    executor = FakeExecutor(place.store, tiny_config(), rng=random.Random(1))
    looks = 0

    def run_meanwhile(seconds: float) -> None:
        nonlocal looks
        looks += 1
        lock.__exit__(None, None, None)
        assert drive_run(ORDER, tiny_config(), place=place, executor=executor) == 0

    lock = hold(place.folder)
    lock.__enter__()
    assert watch(place, sleep=run_meanwhile) == 0
    assert looks == 1
    said = capsys.readouterr().out
    assert said.index("tiny  running") < said.index("tiny  finished")


def test_a_run_without_choices_points_at_what_it_has(tmp_path: Path) -> None:
    config = tiny_config(iterations=1).model_copy(update={"stages": ("prepare", "sample")})
    text = status_text(read_status(finished_run(tmp_path, config)))
    assert "tiny  finished  1 of 1 iterations done" in text
    assert "show answers" in text
    assert "report" not in text


class Elsewhere:
    """A back end that is no folder of this machine, as far as anybody can tell."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


@pytest.mark.parametrize(
    ("seconds", "ended", "state"),
    [(5, False, "running"), (5, True, "interrupted"), (300, False, "interrupted")],
)
def test_a_bucket_run_is_alive_while_its_controller_writes(
    tmp_path: Path, seconds: int, ended: bool, state: str
) -> None:
    place = start(tmp_path)
    at = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)).isoformat()
    journal = Journal(
        controller="process 7 on pod-1",
        command="x",
        executor="kubernetes",
        started=at,
        at=at,
        ended=ended,
    )
    place.store.write_bytes(JOURNAL, journal.model_dump_json().encode())
    local_log(place, "sample", 0, "of another run of that name\n")
    bucket = place._replace(store=Store(cast(Backend, Elsewhere(place.store.backend))))
    assert read_status(bucket).state == state
    assert not is_local(bucket)  # its logs are on the cluster
    if state == "running":
        assert "driven by process 7 on pod-1, heard of 5" in status_text(read_status(bucket))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint_for(Terminal())("x", "red") == "\x1b[31mx\x1b[0m"
    assert paint_for(io.StringIO())("x", "red") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint_for(Terminal())("x", "red") == "x"


def test_colours_do_not_move_columns(tmp_path: Path) -> None:
    status = read_status(finished_run(tmp_path))
    plain, painted = status_text(status), status_text(status, Paint(on=True))
    for code in ("0", "1", "2", "1;32", "32", "31", "36"):
        painted = painted.replace(f"\x1b[{code}m", "")
    assert painted == plain


def test_the_stages_fit_a_terminal_of_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = read_status(finished_run(tmp_path, tiny_config(lora=True)))
    monkeypatch.setenv("COLUMNS", "200")
    grid = status_text(status).split("\n\n")[1].split("\n")
    assert max(map(len, grid)) > 80
    monkeypatch.setenv("COLUMNS", "80")
    narrow = status_text(status).split("\n\n")[1].split("\n")
    assert max(map(len, narrow)) <= 80
    assert [line.split()[1:] for line in narrow] == [line.split()[1:] for line in grid]


def test_numbers_read_well() -> None:
    assert [duration(one) for one in (3.21, 59.6, 250, 7500, 200_000)] == [
        *("3.2 s", "1 min 00 s", "4 min 10 s", "2 h 05 min", "2 d 7 h"),
    ]
    assert [rate(one) for one in (12.0, 0.5, 0.001)] == ["12.0/s", "30.0/min", "3.6/h"]
    assert safe("a\x1b[2J\u202eb\u2028c\nd") == "a\ufffd[2J\ufffdb\ufffdc\nd"


def local_log(place: RunPlace, stage: str, shard: int, text: str, iteration: int = 0) -> Path:
    path = place.folder / f"logs/iteration-{iteration}/{stage}/{shard:05d}-of-00002.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["retry", "cancel"])
def test_commands_about_jobs_say_that_a_local_run_has_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local_log(start(tmp_path), "sample", 0, "first\n")
    assert main([name, "tiny", "--root", str(tmp_path)]) == 78
    assert "ran on this machine, not on a cluster" in capsys.readouterr().err


def test_logs_of_a_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = start(tmp_path)
    local_log(place, "sample", 0, "first\n")
    later = local_log(place, "sample", 1, "second\n", iteration=1)
    where = ["logs", "tiny", "--root", str(tmp_path), "--stage", "sample"]
    assert main(where) == 0
    assert capsys.readouterr().out == f"second\n(iteration 1 sample shard 1: {later})\n"
    assert main([*where, "--iteration", "0"]) == 0
    assert capsys.readouterr().out.startswith("first\n(iteration 0 sample shard 0:")
    assert main([*where, "--shard", "7"]) == 78
    assert "sample, shard 7 has no log here" in capsys.readouterr().err
    assert main(["logs", "tiny", "--root", str(tmp_path), "--stage", "simple"]) == 78
    assert "expected one of prepare, sample" in capsys.readouterr().err


def test_a_log_is_followed_until_the_shard_is_done(tmp_path: Path) -> None:
    place = start(tmp_path)
    path = local_log(place, "prepare", 0, "one\ntw")
    shard = find_shard(place, "prepare", None, None)
    turns = iter(["o\nthree\n", ""])

    def go_on(seconds: float) -> None:
        with path.open("a") as stream:
            stream.write(next(turns))
        if path.read_text().endswith("three\n"):
            run_fake_stage(place.store, tiny_config(), shard)

    with hold(place.folder):
        lines = list(follow_local(place, shard, sleep=go_on))
    assert lines == ["one", "two\nthree"]


def test_progress_inside_a_shard_counts(tmp_path: Path) -> None:
    place, clock = start(tmp_path), Clock()
    journal = writer(place, clock)
    shards = {ShardId(0, "prepare", n): ShardState("running", 1) for n in range(2)}
    look(journal, place, shards, clock)
    look(journal, place, shards, clock)
    for n in range(2):
        local_log(place, "prepare", n, "INFO [x] progress rows=25/100 rate=2.5/s\n")
    with hold(place.folder):
        stage = read_status(place).stages[0]
    assert stage.rows_per_second == 5.0
    assert stage.eta_seconds == 15.0  # a quarter took five seconds


def test_status_does_not_disturb_a_run(tmp_path: Path) -> None:
    """Looking on while it is driven changes nothing and never fails."""
    place, stop, errors = start(tmp_path), threading.Event(), []

    def look_on() -> None:
        while not stop.is_set():
            try:
                status_text(read_status(place))
            except ConfigError as error:
                errors.append(error)
            time.sleep(0.01)

    thread = threading.Thread(target=look_on)
    thread.start()
    executor = FakeExecutor(place.store, tiny_config(), rng=random.Random(1))
    assert drive_run(ORDER, tiny_config(), place=place, executor=executor) == 0
    stop.set()
    thread.join()
    assert errors == []
    assert place.store.exists(CONFIG)
    assert read_status(place).state == "finished"
