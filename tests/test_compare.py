"""Two runs side by side: settings, metrics with spread, answers, and a page of them."""

import json
import math
import random
from pathlib import Path

import pytest

from controller.__main__ import main
from controller.compare import Compared, Comparison, _Graded, _metrics, compare
from controller.compare_text import comparison_text, signed
from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.captions import CaptionGrade
from rlaifv.benchmarks.labelled import CheckedClaim, ClaimsGrade, Labelled
from rlaifv.config import BenchmarkSpec
from rlaifv.records import Grade
from tests.commands_support import finished_run
from tests.fake_world import HOSTILE, tiny_config

BENCHMARK = load_benchmark(BenchmarkSpec(name="test", path="nowhere", vocabulary="nowhere"))


def metrics(a: list[Grade], b: list[Grade]) -> list[Compared]:
    return _metrics("test", _Graded(BENCHMARK, a), _Graded(BENCHMARK, b))


def grades(share_wrong: float, count: int, seed: int) -> list[Grade]:
    """Answers that name one object, which is not there with a probability."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        truth = ["dog"] if rng.random() < share_wrong else ["cat"]
        value = CaptionGrade(found=[("cat", "cat", 0)], truth=truth, num_words=3 + number % 5)
        rows.append(
            Grade(
                benchmark="test",
                question_id=f"q{number}",
                step=1,
                judge="rules",
                judge_reply="",
                value=value.model_dump_json(),
            )
        )
    return rows


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    a, b = grades(0.5, 400, 1), grades(0.3, 400, 2)
    one = next(m for m in metrics(a, b) if m.metric == "test/response_hallucination")
    assert one.spread == "paired bootstrap over questions"
    assert None not in (one.a, one.a_low, one.a_high, one.low, one.high, one.difference)
    width = 2 * 1.96 * math.sqrt((one.a or 0) * (1 - (one.a or 0)) / 400)
    assert (one.a_high or 0) - (one.a_low or 0) == pytest.approx(width, rel=0.1)
    # two independent sets of answers: the variances add up
    both = 2 * 1.96 * math.sqrt((0.25 + 0.21) / 400)
    assert (one.high or 0) - (one.low or 0) == pytest.approx(both, rel=0.15)
    assert (one.low or 0) < (one.difference or 0) < (one.high or 0)


def test_the_same_answers_differ_by_nothing() -> None:
    rows = grades(0.5, 50, 1)
    for one in metrics(rows, rows):
        assert (one.difference, one.low, one.high) == (0.0, 0.0, 0.0)


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    rows = grades(0.5, 200, 1)
    better = [
        rows[n] if n % 50 else grades(0.0, 1, 0)[0].model_copy(update={"question_id": f"q{n}"})
        for n in range(200)
    ]
    one = next(m for m in metrics(rows, better) if m.metric == "test/response_hallucination")
    alone = (one.a_high or 0) - (one.a_low or 0)
    assert (one.high or 0) - (one.low or 0) < alone / 2


def test_without_the_same_questions_there_is_no_interval_and_it_says_so() -> None:
    for one in metrics(grades(0.5, 20, 1), grades(0.5, 30, 1)):
        assert (one.low, one.high, one.spread) == (None, None, "none: other questions")
        assert one.questions == 20


def test_verdicts_of_the_labeller_have_an_interval_too() -> None:
    def verdicts(rejected: int) -> list[Grade]:
        claims = [CheckedClaim(text="x", p_yes=0.9, p_no=0.1)] * 3
        claims += [CheckedClaim(text="y", p_yes=0.1, p_no=0.9)] * rejected
        value = ClaimsGrade(claims=claims, num_words=9).model_dump_json()
        return [row.model_copy(update={"value": value}) for row in grades(0.5, 10, 1)]

    benchmark = Labelled(lambda: iter(()))
    found = _metrics("held_out", _Graded(benchmark, verdicts(1)), _Graded(benchmark, verdicts(2)))
    one = next(each for each in found if each.metric == "held_out/rejected_claims")
    assert (one.a, one.b) == (0.25, 0.4)
    assert (one.a_low, one.a_high) == (0.25, 0.25)
    assert one.low == pytest.approx(0.15)
    assert {each.spread for each in found} == {"paired bootstrap over questions"}
    assert signed(one) == "+15.0"


def test_runs_are_compared_by_their_last_choice(tmp_path: Path) -> None:
    a = finished_run(tmp_path / "a")
    longer = tiny_config(iterations=4).model_copy(update={"seed": 7})
    b = finished_run(tmp_path / "b", longer)
    found = compare(a, b, limit=3)
    assert (found.a_policy, found.b_policy) == ("iteration 1, step 4", "iteration 3, step 2")
    assert {one.key: (one.a, one.b) for one in found.config} == {
        "iterations": ("2", "4"),
        "seed": ("0", "7"),
    }
    values = {one.metric: (one.a, one.b) for one in found.metrics}
    assert values["test/response_hallucination"] == (
        found.a_iterations[1].response_hallucination,
        found.b_iterations[3].response_hallucination,
    )
    assert found.answered_by_both == 8


def test_the_command_prints_text_json_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = finished_run(tmp_path / "a")
    other = tiny_config().model_copy(update={"seed": 1, "name": "other"})
    b = finished_run(tmp_path / "b", other)
    page = tmp_path / "page.html"
    words = ["compare", str(a.folder), str(b.folder)]  # two roots
    assert main([*words, "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert 'name     "tiny"  "other"' in said
    assert "test/response_hallucination" in said
    assert "\x1b" not in said
    assert main([*words, "--json"]) == 0
    assert Comparison.model_validate_json(capsys.readouterr().out).a == a.uri
    text = page.read_text()
    assert "tiny and other" in text
    assert HOSTILE not in text
    assert main(["compare", "tiny", "gone", "--root", str(tmp_path / "a")]) == 78


def test_answers_that_differ_stand_side_by_side(tmp_path: Path) -> None:
    a = finished_run(tmp_path / "a")
    config = tiny_config()
    train = config.train.model_copy(update={"epochs": 1})
    b = finished_run(tmp_path / "b", config.model_copy(update={"train": train}))
    found = compare(a, b, limit=2)
    assert len(found.answers) == 2
    one = found.answers[0]
    assert "Step 4." in one.a
    assert "Step 2." in one.b
    said = comparison_text(found)
    assert f"{one.benchmark} {one.question_id}" in said
    assert "\u2028" not in said
    assert json.loads(found.model_dump_json())["answers"][0]["b"] == one.b


def test_a_run_that_only_evaluates_is_compared_too(tmp_path: Path) -> None:
    a = finished_run(tmp_path / "a")
    only = tiny_config(iterations=1).model_copy(update={"stages": ("respond", "grade")})
    b = finished_run(tmp_path / "b", only)
    found = compare(a, b, limit=8)
    assert found.b_policy == "the policy that it evaluated"
    untrained = found.a_iterations[-1].response_hallucination
    one = next(m for m in found.metrics if m.metric == "test/response_hallucination")
    assert one.b == untrained
    assert one.low is not None
    assert len(found.answers) == found.answered_by_both == 8


def test_a_run_that_has_answered_nothing_is_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = finished_run(tmp_path / "a")
    empty = tmp_path / "b/tiny"
    empty.mkdir(parents=True)
    (empty / "config.json").write_text(tiny_config().model_dump_json())
    assert main(["compare", str(a.folder), str(empty)]) == 65
    assert "nothing to compare yet" in capsys.readouterr().err
