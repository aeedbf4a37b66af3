"""Every program's command line: `--help` without libraries, and mistakes without tracebacks."""

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.flags import parser as controller_parser
from jobs._flags import parser_of_file
from rlaifv.cli import INTERRUPTED, Parser, ending
from rlaifv.errors import TransientError
from rlaifv.flags import PROGRAMS
from rlaifv.pipeline import STAGES

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "boto3", "transformers", "spacy", "kubernetes", "openai", "datasets", "nltk"}
MODULES = [
    "controller",
    *(f"jobs.{name}" for name in STAGES),
    *(f"rlaifv.{name}" for name in PROGRAMS),
]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Every parser and, below it, those of its commands."""
    waiting = [controller_parser(), *(make() for make in PROGRAMS.values())]
    waiting += [parser_of_file(ROOT / f"jobs/{name}.py") for name in STAGES]
    while waiting:
        parser = waiting.pop()
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


@pytest.mark.parametrize("module", MODULES)
def test_help_is_printed_before_any_library_is_imported(module: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m {module}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & HEAVY


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda parser: parser.prog.split(" ", 2)[2])
def test_every_command_says_what_it_is_for_and_ends_a_mistake_with_78(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(parser, Parser)
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action.dest
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--no-such-flag"])
    assert ended.value.code == 78
    assert "--help` says more" in capsys.readouterr().err


def test_a_flag_has_one_name_and_one_kind_of_value_everywhere() -> None:
    kinds: dict[str, set[bool]] = {}
    for parser in parsers():
        for action in parser._actions:
            for name in action.option_strings:
                kinds.setdefault(name, set()).add(action.nargs == 0)
    assert [name for name, takes_none in kinds.items() if len(takes_none) > 1] == []
    words = {name.strip("-").replace("-", "") for name in kinds}
    assert len(words) == len(kinds), "two spellings of one flag"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransientError("busy"), 75),
        (KeyboardInterrupt(), INTERRUPTED),
        (FileNotFoundError(2, "No such file or directory", "/x/questions.jsonl"), 78),
        (NotADirectoryError(20, "Not a directory", "/x/file/y"), 78),
        (PermissionError(13, "Permission denied", "/x"), 78),
        (OSError(28, "No space left on device", "/x"), 75),
    ],
)
def test_what_a_user_can_mend_ends_with_its_code_and_a_line(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert ending(work) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("\n") == (code != INTERRUPTED)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        ending(lambda: 1 // 0)


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from rlaifv.cli import ending\n"
    code += "sys.exit(ending(lambda: print('x' * 1_000_000) or 0))"
    (tmp_path / "loud.py").write_text(code)
    line = f"set -o pipefail; {sys.executable} {tmp_path / 'loud.py'} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


def test_help_of_a_stage_read_from_its_file_is_what_the_stage_prints() -> None:
    text = io.StringIO()
    parser_of_file(ROOT / "jobs/pair.py").print_help(text)
    assert "reads: instructions, answers, claims, verdicts" in text.getvalue()


def test_every_command_that_reads_has_json() -> None:
    writes = [
        "run",
        "evaluate",
        "train",
        "render",
        "cancel",
        "retry",
        "report",
        "export",
        "fork",
        "import",
        "completion",
    ]
    by_name = {parser.prog.split(" ", 2)[2]: parser for parser in parsers()}
    reading = {name: parser for name, parser in by_name.items() if name.startswith("controller ")}
    for name, parser in reading.items():
        words = name.split()
        if words[1] not in (*writes, "logs"):  # logs print what a stage said, as it said it
            assert "--json" in parser._option_string_actions, name
    for name in ("rlaifv.benchmarks check", "rlaifv.models.check"):
        assert "--json" in by_name[name]._option_string_actions
