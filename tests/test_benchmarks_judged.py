"""MMHal-Bench and RefoMB: parsing and aggregation."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.benchmarks.__main__ import main
from rlaifv.benchmarks.mmhal import TYPES, RatingGrade, parse_rating, rating_metrics
from rlaifv.benchmarks.refomb import (
    Compared,
    Comparer,
    ComparisonGrade,
    Item,
    comparison_metrics,
    parse_verdict,
)
from rlaifv.benchmarks.replies import Accept, Ask, Reply, Tally


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good.\nRating: 5", 5),
        ("rating: 0, no information", 0),
        ("Rating: 4 ... so again RATING: 4", 4),
        ("**Rating**: 5", None),
        ("Rating 5", None),
        ("Rating:5", None),
        ("Rating: 6, very informative\nRating: 5, informative", None),
        ("Rating: 7", None),
        ("Rating: 34", 3),
        ("", None),
    ],
)
def test_exactly_one_rating_is_a_rating(reply: str, rating: int | None) -> None:
    assert parse_rating(reply) == rating


def rated(*ratings: int | None) -> list[RatingGrade]:
    return [RatingGrade(index=n, rating=one, num_words=2) for n, one in enumerate(ratings)]


def test_mmhal_metrics_by_hand() -> None:
    metrics = rating_metrics(rated(6, 3, 2, 0, None, 5, 1, 4, 2))
    assert metrics["score"] == pytest.approx(23 / 9)
    assert metrics["response_hallucination"] == pytest.approx(5 / 9)
    # 6 -> 3, 3 -> 0, 2, 0, unparsed 0, 5 -> 2, 1, 4 -> 1, 2
    assert metrics["informativeness"] == pytest.approx(
        (3 + 0 + 2 + 0 + 0 + 2 + 1 + 1 + 2) / 27 * 100
    )
    assert metrics["unparsed"] == 1
    assert metrics["score_attribute"] == 4  # indices 0 and 8
    assert metrics["score_relation"] == 0  # index 4, unparsed
    assert metrics["score_other"] == 4


@given(st.permutations(rated(6, 3, 2, 0, None, 5, 1, 4, 2, 2, 3)))
def test_mmhal_metrics_do_not_depend_on_the_order(grades: list[RatingGrade]) -> None:
    assert rating_metrics(grades) == pytest.approx(
        rating_metrics(sorted(grades, key=lambda one: one.index))
    )


def test_mmhal_without_grades_is_undefined() -> None:
    assert rating_metrics([])["score"] is None


def write_json(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_mmhal_scores_the_release_files(tmp_path: Path) -> None:
    answers = [{"question_type": kind, "model_answer": "Assistant: no."} for kind in TYPES]
    raw = [
        {"choices": [{"message": {"content": f"Rating: {n % 7}"}}], "model": "m"} for n in range(8)
    ]
    merged = [{"gpt4_review": one["choices"][0]["message"]["content"]} for one in raw]  # type: ignore[index]
    results = []
    for name, reviews in (("raw", raw), ("merged", merged)):
        out = tmp_path / f"{name}.out.json"
        code = run(
            *("score", "mmhal", "--answers", write_json(tmp_path / "a.json", answers)),
            *("--reviews", write_json(tmp_path / f"{name}.json", reviews), "--out", str(out)),
        )
        assert code == 0
        results.append(json.loads(out.read_text()))
    assert results[0]["overall"] == results[1]["overall"]
    assert results[0]["overall"]["score"] == pytest.approx(21 / 8)
    assert results[0]["overall"]["hallucination_rate"] == pytest.approx(4 / 8)
    assert results[0]["types"]["other"] == 0
    assert results[0]["overall"]["mean_words"] == 1


def test_mmhal_answers_in_another_order_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_json(tmp_path / "a.json", [{"question_type": "holistic", "answer": "no"}])
    reviews = write_json(tmp_path / "r.json", ["Rating: 1"])
    code = run("score", "mmhal", "--answers", answers, "--reviews", reviews, "--out", "x.json")
    assert code == 65
    assert "expected 'attribute' at this position" in capsys.readouterr().err


def test_replies_to_other_answers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_json(tmp_path / "a.json", [{"answer": "no"}])
    reviews = write_json(tmp_path / "r.json", ["Rating: 1", "Rating: 2"])
    code = run("score", "mmhal", "--answers", answers, "--reviews", reviews, "--out", "x.json")
    assert code == 65
    assert "2 replies to 1 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("[[A]] no, [[B]]", -1), ("so [[B]].", 1), ("[[C]]", 0), ("[B]", None), ("[[D]]", None)],
)
def test_the_first_verdict_counts(reply: str, verdict: int | None) -> None:
    assert parse_verdict(reply) == verdict


def compared(verdict: int, kind: str = "OCR", swapped: int | None = None) -> ComparisonGrade:
    return ComparisonGrade(question_type=kind, verdict=verdict, swapped_verdict=swapped)


def test_refomb_metrics_by_hand() -> None:
    grades = [compared(1), compared(0), compared(-1, "Time"), compared(1, "Time")]
    metrics = comparison_metrics(grades)
    assert metrics["score"] == (1 + 0.5 + 0 + 1) / 4
    assert (metrics["win"], metrics["tie"], metrics["loss"]) == (0.5, 0.25, 0.25)
    assert metrics["score_OCR"] == 0.75
    assert metrics["loss_Time"] == 0.5
    assert metrics["hallucination_score"] is None
    assert metrics["order_agreement"] is None


def test_both_orders_are_averaged_and_their_agreement_is_reported() -> None:
    grades = [compared(1, swapped=1), compared(1, swapped=-1), compared(0, swapped=1)]
    metrics = comparison_metrics(grades)
    assert metrics["score"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert metrics["order_agreement"] == pytest.approx(1 / 3)
    assert metrics["tie"] == pytest.approx(1 / 3)


class AlwaysFirst:
    """A judge that prefers whatever stands first, and finds model B's text cleaner."""

    identity = "first"
    repeats = None

    def ask(self, asks: Sequence[Ask], accept: Accept) -> list[Reply]:
        self.contents = [ask.messages[-1].content for ask in asks]
        return [Reply(text="[[B]]" if ask.subject else "[[A]]", output_tokens=1) for ask in asks]

    def tally(self) -> Tally:
        return Tally(0, 0, 0, 0, 0, None, {})


def test_a_judge_that_prefers_the_first_answer_is_seen_by_swapping() -> None:
    item = Item("a.jpg", "Q?", "A dog.", "gpt", "OCR")
    comparer = Comparer(AlwaysFirst(), hallucination=AlwaysFirst(), swap=True)
    rows = list(comparer.compare([Compared("a", 0, "ours", item)]))
    assert [repeat for _, repeat, _, _ in rows] == [0, 1, 2]  # three judgings by default
    grade = rows[0][2]
    assert (grade.verdict, grade.swapped_verdict, grade.fewer_hallucinations) == (-1, 1, 1)
    assert grade.score == 0
    assert grade.output_tokens == 3
    assert comparison_metrics([grade])["order_agreement"] == 0


def test_gpt_4v_is_model_a_unless_swapped() -> None:
    judge = AlwaysFirst()
    item = Item("a.jpg", "Q?", "A dog.", "gpt", "OCR")
    list(Comparer(judge).compare([Compared("a", 0, "ours", item)]))
    assert judge.contents[0].index("gpt") < judge.contents[0].index("ours")
    list(Comparer(judge, swap=True).compare([Compared("a", 0, "ours", item)]))
    assert judge.contents[0].index("ours") < judge.contents[0].index("gpt")


def dev_row(number: int, spelling: str) -> dict[str, object]:
    return {
        "image_url": f"{number}.jpg",
        "question": f"q{number}",
        spelling: "A dog.",
        "type": "OCR",
        "answer": "gpt",
        "id": number,
    }


@pytest.mark.parametrize("spelling", ["description", "gt_description"])
def test_refomb_reviews_are_joined_by_row_and_by_review_text(tmp_path: Path, spelling: str) -> None:
    dev = write_json(tmp_path / "dev.json", [dev_row(n, spelling) for n in range(3)])
    answers = [{"image_url": f"{n}.jpg", "prompt": f"q{n}", "text": "x"} for n in (2, 0, 1)]
    verdicts = ["A", "B", "C"]
    reviews = [
        {"image": n, "modelB": "m", "review": f"item {n} [[{verdicts[n]}]]"} for n in (1, 2, 0)
    ]
    hall = [{"review_text": one["review"], "review_res": "[[B]]"} for one in reviews]
    out = tmp_path / "out.json"
    code = run(
        *("score", "refomb", "--answers", write_json(tmp_path / "a.json", answers)),
        *("--ground-truth", dev, "--reviews", write_json(tmp_path / "r.json", reviews)),
        *("--hallucination-reviews", write_json(tmp_path / "h.json", hall), "--out", str(out)),
    )
    assert code == 0
    result = json.loads(out.read_text())
    assert [one["verdict"] for one in result["items"]] == [-1, 1, 0]
    assert result["overall"]["score"] == 0.5
    assert result["overall"]["hallucination_score"] == 1.0
    assert (result["overall"]["wins"], result["overall"]["losses"]) == (1, 1)


def test_refomb_refuses_partial_answers_and_reviews_without_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = write_json(tmp_path / "dev.json", [dev_row(n, "description") for n in range(2)])
    answers = [{"image_url": f"{n}.jpg", "question": f"q{n}", "answer": "x"} for n in range(2)]
    command = ("score", "refomb", "--ground-truth", dev, "--out", str(tmp_path / "o.json"))
    reviews = write_json(tmp_path / "r.json", ["[[A]]", "none"])
    few = write_json(tmp_path / "few.json", answers[:1])
    assert run(*command, "--answers", few, "--reviews", reviews) == 65
    assert "1 of 2 questions have no answer" in capsys.readouterr().err
    every = write_json(tmp_path / "all.json", answers)
    assert run(*command, "--answers", every, "--reviews", reviews) == 65
    assert "cannot be used: 'none'" in capsys.readouterr().err


def test_several_review_files_are_repeats(tmp_path: Path) -> None:
    answers = write_json(tmp_path / "a.json", [{"type": "OCR", "answer": "x"}] * 2)
    first = write_json(tmp_path / "1.json", ["[[A]]", "[[B]]"])
    second = write_json(tmp_path / "2.json", ["[[B]]", "[[B]]"])
    out = tmp_path / "o.json"
    command = ("score", "refomb", "--answers", answers, "--out", str(out))
    assert run(*command, "--reviews", first, "--reviews", second) == 0
    overall = json.loads(out.read_text())["overall"]
    assert overall["score"] == 0.75
    assert overall["score_spread"] == pytest.approx(0.5**1.5)
