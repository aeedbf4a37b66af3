"""The command line: what it prints, how it ends, and what it refuses."""

import argparse
import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from controller.__main__ import main, parser
from controller.lock import hold, is_held
from controller.loop import Progress
from controller.places import RunPlace, run_place
from controller.plan import ShardId, ShardState, observe
from controller.progress import ERASE, Console
from controller.run import Order, drive_run, run_config, settle_config
from controller.status import RunStatus, read_status
from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError, TransientError
from rlaifv.pipeline import CONFIG
from rlaifv.recipes import Wishes
from tests.fake_world import FakeExecutor, tiny_config

ORDER = Order(
    Wishes(),
    root="runs",
    executor="local",
    workers=0,
    threads=1,
    isolated=False,
    command=("python", "-m", "controller", "run", "--name", "my run"),
)
CONFIG_2 = tiny_config()


def start(root: Path, config: RunConfig = CONFIG_2) -> RunPlace:
    """A run that has its configuration and nothing else."""
    place = run_place(str(root), config.name)
    settle_config(place.store, config, grow=True)
    return place


def finish(
    place: RunPlace,
    config: RunConfig = CONFIG_2,
    exit_code: Callable[[ShardId, int], int] = lambda shard, attempt: 0,
) -> int:
    """Drives a run to its end with the stand-ins."""
    executor = FakeExecutor(place.store, config, rng=random.Random(1), exit_code=exit_code)
    return drive_run(ORDER, config, place=place, executor=executor)


def test_what_killed_stages_left_is_gone_when_a_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ORDER._replace(root=str(tmp_path))

    def drive(*_: object, place: RunPlace, **__: object) -> int:
        (place.folder / "iteration-0/answers/.tmp-killed").mkdir(parents=True, exist_ok=True)
        return code

    monkeypatch.setattr("controller.run.drive_run", drive)
    monkeypatch.setattr("controller.run.check_before_local_run", lambda *_: None)
    for code, left in [(75, 1), (0, 0)]:
        assert run_config(order, CONFIG_2) == code
        assert len(list(tmp_path.rglob(".tmp-*"))) == left


def status_of(place: RunPlace) -> RunStatus:
    return read_status(place)


def flags_of(command: argparse.ArgumentParser, name: str) -> dict[str, str]:
    """Long options and positionals of a command and its own commands."""
    words = sorted(
        action.option_strings[-1] if action.option_strings else action.dest
        for action in command._actions
        if not isinstance(action.choices, Mapping) and action.dest != "help"
    )
    found = {name: " ".join(words)} if words else {}
    for action in command._actions:
        if isinstance(action.choices, Mapping):
            for inner, parser_of_it in action.choices.items():
                found |= flags_of(parser_of_it, f"{name} {inner}".strip())
    return found


RUN_FLAGS = (
    "--cluster --config --executor --isolated --iterations --name --processes --recipe --root "
    "--seed --set --threads --workers"
)


def test_flags_only_change_on_purpose() -> None:
    assert flags_of(parser(), "") == {
        "run": RUN_FLAGS,
        "render": RUN_FLAGS,
        "evaluate": (
            "--benchmarks --cluster --coco --config --data --executor --input-price --isolated "
            "--judge --judge-model --judge-prompt --judge-temperature --mode --model --name "
            "--nltk-data --output-price --repeats --root --set --swap --synonyms --threads --workers"
        ),
        "train": (
            "--cluster --config --executor --isolated --model --name --pairs --processes --recipe "
            "--root --seed --set --threads --workers"
        ),
        "status": "--cluster --executor --json --root --watch run",
        "logs": "--cluster --follow --iteration --root --shard --stage run",
        "cancel": "--cluster --root run",
        "retry": "--cluster --root run",
        "report": "--root run",
        "compare": "--html --json --limit --root run_a run_b",
        "ls": "--json --root run",
        "show": "--iteration --json --limit --root --where names what",
        "lineage": "--iteration --json --root run what",
        "verify": "--json --root run",
        "doctor": "--config --json --recipe --root --set",
        "export": "--format --iteration --root --to run what",
        "fork": "--from --root --set new run",
        "gc": "--delete --json --older-than --root run",
        "completion": "shell",
        "import model": "--name --root source",
        "import benchmark": "--root name source",
    }


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import controller.__main__ as c; c.parser().format_help()", "pydantic pyarrow yaml"),
        (
            "import controller.run, controller.status, controller.show, controller.report.build, "
            "controller.doctor, controller.export, controller.fork, controller.gc, "
            "controller.importing, controller.lineage, controller.ls, controller.train, "
            "controller.verify",
            "torch transformers jobs spacy boto3 huggingface_hub",
        ),
    ],
)
def test_the_command_line_stays_light(code: str, absent: str) -> None:
    check = f"import sys; {code}; print(*(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_run_ends_with_the_table_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = start(tmp_path)
    assert finish(place) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["iteration", "checkpoint"]
    assert [line.split()[0] for line in lines[2:5]] == ["untrained", "0", "1"]
    assert lines[-1] == f"report: {tmp_path}/tiny/report/index.html"
    assert (tmp_path / "tiny/report/index.html").is_file()
    assert "iteration 1  sample        24 rows" in err
    assert status_of(place).state == "finished"


def test_a_summary_lists_the_iterations_and_then_the_untrained_policy(tmp_path: Path) -> None:
    finish(start(tmp_path))
    entries = json.loads((tmp_path / "tiny/report/summary.json").read_text())
    assert entries[0] == {
        "iteration": 0,
        "checkpoint": 4,
        "response_hallucination": 0.5,
        "mention_hallucination": 0.25,
        "recall": 1.0,
        "mean_words": 4.0,
        "pairs": 16,
    }
    assert [entry["iteration"] for entry in entries] == [0, 1, None]
    assert (entries[-1]["response_hallucination"], entries[-1]["pairs"]) == (1.0, 0)


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(FakeExecutor):
        def wait(self, timeout_s: float) -> None:
            if len(self.started) > 4:
                raise KeyboardInterrupt
            super().wait(timeout_s)

    place = start(tmp_path)
    executor = Interrupted(place.store, CONFIG_2, rng=random.Random(1))
    assert drive_run(ORDER, CONFIG_2, place=place, executor=executor) == 130
    assert "go on with:\n  python -m controller run --name 'my run'" in capsys.readouterr().err
    assert status_of(place).state == "interrupted"
    assert finish(place) == 0


def test_a_run_that_gives_up_tells_why_in_its_exit_code_and_in_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = start(tmp_path)
    assert finish(place, exit_code=lambda shard, _: 65 if shard.stage == "claim" else 0) == 65
    assert "the run stopped: iteration 0 claim shard" in capsys.readouterr().err
    status = status_of(place)
    assert status.state == "failed"
    assert status.stopped is not None
    assert "reason 65" in status.stopped.reason
    assert status.error is not None
    assert (status.error.kind, status.error.stage, status.error.ended_the_run) == (
        "data",
        "claim",
        True,
    )
    assert main(["status", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "It failed: bad data (exit code 65)\n  iteration 0 claim shard" in said
    assert f"logs {tmp_path}/tiny --stage claim --iteration 0 --shard {status.error.shard}" in said
    assert "  python -m controller run --name 'my run'" in said


def test_a_damaged_artifact_ends_the_run_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = start(tmp_path)
    key = "iteration-0/instructions/00000-of-00002.parquet"
    place.store.write_bytes(key, b"half a file")
    assert finish(place) == 65
    said = " ".join(capsys.readouterr().err.split())  # as long a line as it takes
    assert f"{key}: not a complete Parquet file" in said


def test_status_of_a_run_that_somebody_drives_is_running(tmp_path: Path) -> None:
    place = start(tmp_path)
    with hold(place.folder):
        assert status_of(place).state == "running"
    assert status_of(place).state == "interrupted"


def test_status_for_programs_is_the_same_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = start(tmp_path)
    finish(place)
    capsys.readouterr()
    assert main(["status", "tiny", "--root", str(tmp_path), "--json"]) == 0
    status = RunStatus.model_validate_json(capsys.readouterr().out)
    assert status == status_of(place)
    sample = next(one for one in status.stages if one.stage == "sample")
    assert (sample.done, sample.shards, sample.rows, sample.seconds) == (2, 2, 24, 0.5)


def test_two_controllers_do_not_drive_one_run(tmp_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(hold(tmp_path))
        with pytest.raises(TransientError, match="another controller drives this run"):
            stack.enter_context(hold(tmp_path))
    with hold(tmp_path):
        pass


def test_another_configuration_is_refused_with_the_differing_fields(tmp_path: Path) -> None:
    place = start(tmp_path)
    pair = CONFIG_2.pair.model_copy(update={"max_per_image": 7})
    other = CONFIG_2.model_copy(update={"pair": pair, "seed": 1})
    with pytest.raises(ConfigError) as error:
        settle_config(place.store, other, grow=True)
    assert "pair.max_per_image: 2 -> 7" in str(error.value)
    assert "seed: 0 -> 1" in str(error.value)
    assert place.store.read_json(CONFIG, RunConfig) == CONFIG_2


def test_iterations_may_grow_but_not_shrink(tmp_path: Path) -> None:
    place = start(tmp_path)
    grown = CONFIG_2.model_copy(update={"iterations": 5})
    assert settle_config(place.store, grown, grow=True) == grown
    assert place.store.read_json(CONFIG, RunConfig) == grown
    assert settle_config(place.store, CONFIG_2, grow=False) == grown  # not asked for: as stored
    with pytest.raises(ConfigError, match="iterations: 5 -> 2"):
        settle_config(place.store, CONFIG_2, grow=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--recipe", "nope"], "no such recipe"),
        (["run", "--set", "a.b=1"], "unknown key 'a.b'"),
        (["run", "--executor", "kubernetes"], "a store that all of them reach"),
        (["run", "--root", "ftp://x"], "unknown scheme"),
        (["status"], "no run here"),
        (["status", "gone"], "no run here"),
        (["show", "nothing"], "expected one of config, table"),
        (["report"], "no run here"),
    ],
)
def test_a_mistake_ends_with_a_message_and_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    root = [] if "--root" in argv else ["--root", str(tmp_path)]
    assert main([*argv, *root]) == 78
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


def test_show_prints_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(start(tmp_path))
    root = ["--root", str(tmp_path)]
    capsys.readouterr()
    assert main(["show", "pairs", "--limit", "2", *root]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert set(rows[0]["image"]) == {"bytes", "path"}
    assert rows[0]["image"]["bytes"] > 0
    assert main(["show", "config", *root]) == 0
    assert RunConfig.model_validate_json(capsys.readouterr().out) == CONFIG_2
    assert main(["show", "table", *root]) == 0
    assert "untrained" in capsys.readouterr().out
    assert main(["show", "choice", "--iteration", "1", *root]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    assert main(["show", "answers", "--iteration", "9", *root]) == 65


def test_several_runs_have_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path)
    start(tmp_path, CONFIG_2.model_copy(update={"name": "other"}))
    assert main(["status", "--root", str(tmp_path)]) == 78
    assert "There are: other, tiny" in capsys.readouterr().err
    assert main(["status", f"{tmp_path}/other"]) == 4


def test_failures_are_told_while_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(shard: ShardId, attempt: int) -> int:
        return -9 if shard == ShardId(0, "sample", 1) and attempt == 1 else 0

    assert finish(start(tmp_path), exit_code=once) == 0
    said = "iteration 0 sample shard 1: attempt 1 was ended by signal 9: reason -9"
    assert capsys.readouterr().err.count(said) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_live_line_that_goes_away() -> None:
    terminal = Terminal()
    console = Console(CONFIG_2, terminal)
    running = {ShardId(0, "sample", 1): ShardState("running", 1)}
    console.look(Progress(observe([], {}), running))
    console.close()
    live = terminal.getvalue().split(ERASE)
    assert live[1].split(None, 1)[1] == "iteration 0 of 2  sample 0/2 done, 1 running"
    assert live[-1] == ""


@pytest.mark.parametrize("flag", ["--workers", "--threads"])
def test_a_number_that_cannot_be_is_refused(flag: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(["run", flag, "0"])
    assert error.value.code == 78


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", "--root", str(tmp_path / "file" / "below")]) == 78
    assert "file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_stages_too(tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "controller", "run", "--isolated", "--root", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stderr is not None
        assert "run demo at" in process.stderr.readline()
        process.send_signal(number)
        err = process.stderr.read()
    assert process.returncode == code
    typed = " ".join(err.replace("\\\n", "").split())
    assert f"go on with: python -m controller run --isolated --root {tmp_path}" in typed
    assert not is_held(tmp_path / "demo")
