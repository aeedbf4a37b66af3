"""What commands say fits a terminal, and can still be typed or copied."""

import io
import shlex

import pytest

from controller.progress import Console
from controller.summary import table
from controller.tables import Column, folded, folded_command, render
from rlaifv.records import Candidate, Choice
from tests.fake_world import tiny_config


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_long_lines_break_at_spaces_only() -> None:
    path = f"/{'deep/' * 20}file"
    lines = folded(f"the run stopped: {path}: no such folder\nand so on", "  ").split("\n")
    assert lines == ["the run stopped:", f"  {path}:", "  no such folder", "  and so on"]


def test_a_folded_command_is_the_same_command_with_flags_beside_their_values() -> None:
    flags = ("--name", "my run", "--root", "/r" * 20)
    words = ("python", "-m", "controller", "run", *flags, "--set", "prepare.seed=20" * 2)
    text = folded_command(words)
    assert tuple(shlex.split(text.replace("\\\n", ""))) == words  # as a shell joins them
    assert all(len(line) <= 80 for line in text.split("\n"))
    assert not any(line.endswith(("--set \\", "--root \\")) for line in text.split("\n"))


@pytest.mark.parametrize(("width", "gap"), [(30, 2), (39, 2), (40, 1)])
def test_columns_stand_closer_where_that_makes_them_fit(width: int, gap: int) -> None:
    row = render([Column("a"), Column("b")], [["x" * width, "y" * width]]).split("\n")[2]
    assert row == "x" * width + " " * gap + "y" * width


def test_a_table_of_nothing_says_so() -> None:
    assert table([], "Measured on x.") == "No iteration has chosen a checkpoint yet."


def test_a_policy_that_stays_is_said_in_one_line() -> None:
    stream = io.StringIO()
    metrics: dict[str, float | None] = {"test/response_hallucination": 0.572}
    start, other = (
        Candidate(step=step, metrics=metrics, eligible=True, remark="") for step in (0, 8)
    )
    stays = Choice(
        step=0,
        tree=None,
        metrics=metrics,
        baseline=metrics,
        candidates=[start, other],
        num_pairs=9,
        reason="the starting policy stays: " + "very long " * 20,
    )
    Console(tiny_config(), stream).chosen(0, stays)
    said = "iteration 0  choose   the policy stays; 57.2 % of answers hallucinate\n"
    assert stream.getvalue().endswith(said)
