"""A user's own object benchmark, and what all benchmarks share."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.base import over_repeats
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import Grade, Response

VOCABULARY = "cat, kitten\ndog, puppy\ntennis ball\nbox\n"


def response(question_id: str, text: str, step: int = 0) -> Response:
    return Response(
        benchmark="own",
        question_id=question_id,
        step=step,
        text=text,
        num_tokens=3,
        finish_reason="stop",
    )


def spec(folder: Path, rows: list[dict[str, object]], *, parquet: bool = False) -> BenchmarkSpec:
    (folder / "vocabulary.txt").write_text(VOCABULARY)
    file = folder / ("test.parquet" if parquet else "test.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return BenchmarkSpec(name="own", path=str(file), vocabulary=str(folder / "vocabulary.txt"))


def row(number: int, objects: list[str], image: object) -> dict[str, object]:
    return {"question_id": f"q{number}", "question": "What?", "image": image, "objects": objects}


def test_images_come_from_a_struct_in_parquet_and_from_a_path_in_jsonl(tmp_path: Path) -> None:
    rows = [row(0, ["cat"], {"bytes": b"picture", "path": None})]
    parquet = load_benchmark(spec(tmp_path, rows, parquet=True))
    assert [question.image for question in parquet.questions()] == [b"picture"]
    (tmp_path / "a.png").write_bytes(b"other")
    jsonl = load_benchmark(spec(tmp_path, [row(0, ["cat"], "a.png")]))
    assert [question.image for question in jsonl.questions()] == [b"other"]


def test_metrics_are_ratios_of_sums(tmp_path: Path) -> None:
    rows = [row(0, ["cat", "box"], "x"), row(1, ["dog"], "x"), row(2, [], "x")]
    benchmark = load_benchmark(spec(tmp_path, rows))
    texts = ["Two kittens and a tennis ball.", "A dog, a puppy, a cat.", "Nothing."]
    grades = list(benchmark.grade([response(f"q{n}", text) for n, text in enumerate(texts)]))
    assert benchmark.metrics(grades) == {
        "response_hallucination": 2 / 2,
        "mention_hallucination": 2 / 5,
        "chair_s": 2 / 3,
        "recall": 2 / 3,
        "mean_words": (6 + 6 + 1) / 3,
    }
    assert benchmark.metrics(grades[::-1]) == benchmark.metrics(grades)


def test_without_mentions_the_ratios_are_undefined(tmp_path: Path) -> None:
    benchmark = load_benchmark(spec(tmp_path, [row(0, [], "x")]))
    metrics = benchmark.metrics(list(benchmark.grade([response("q0", "")])))
    assert metrics["mention_hallucination"] is None
    assert metrics["recall"] is None
    assert metrics["mean_words"] == 0


@pytest.mark.parametrize(
    ("rows", "responses", "words"),
    [
        ([row(0, ["unicorn"], "x")], ["q0"], "unicorn"),
        ([row(0, [], "x"), row(0, [], "x")], ["q0"], "row 1, field question_id"),
        ([row(0, [], "x")], ["q7"], "'q7' is not in"),
        ([row(0, [], "x")], ["q0", "q0"], "answered twice"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, rows: list[dict[str, object]], responses: list[str], words: str
) -> None:
    benchmark = load_benchmark(spec(tmp_path, rows))
    with pytest.raises(ArtifactError, match=words):
        list(benchmark.grade([response(name, "A cat.") for name in responses]))


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path) -> None:
    rows = [row(0, ["cat"], "x") | {"question": "one\u2028two\u0085three"}]
    benchmark = load_benchmark(spec(tmp_path, rows))
    assert len(list(benchmark.grade([response("q0", "a cat")]))) == 1


def test_a_missing_image_and_a_missing_vocabulary_are_errors(tmp_path: Path) -> None:
    benchmark = load_benchmark(spec(tmp_path, [row(0, ["cat"], "gone.png")]))
    with pytest.raises(ArtifactError, match=r"row 0, field image.*gone\.png"):
        list(benchmark.questions())
    with pytest.raises(ConfigError, match="vocabulary"):
        load_benchmark(BenchmarkSpec(name="own", path="x.jsonl"))


def grade(question_id: str, repeat: int, reply: str, value: str = "1") -> Grade:
    return Grade(
        benchmark="b",
        question_id=question_id,
        step=0,
        repeat=repeat,
        judge="j",
        judge_reply=reply,
        value=value,
    )


def mean_value(rows: object) -> dict[str, float | None]:
    values = [float(one.value) for one in rows]  # type: ignore[attr-defined]
    return {"m": sum(values) / len(values)}


def test_repeats_are_averaged_and_their_spread_is_given() -> None:
    grades = [grade("a", 0, "x", "1"), grade("a", 1, "y", "3")]
    spread = pytest.approx(2**0.5)
    assert over_repeats(grades, mean_value) == {"repeats_differ": 1, "m": 2.0, "m_spread": spread}


def test_the_spread_of_a_judge_that_ignores_seeds_was_not_measured() -> None:
    grades = [grade("a", repeat, "same") for repeat in range(3)]
    assert over_repeats(grades, mean_value) == {"repeats_differ": 0, "m": 1.0, "m_spread": None}


@pytest.mark.parametrize(("differing", "measured"), [(0, False), (1, False), (2, True), (20, True)])
def test_a_spread_counts_when_a_tenth_of_the_judged_items_got_other_replies(
    differing: int, measured: bool
) -> None:
    grades = [
        grade(f"{n:02d}", repeat, f"reply {repeat if n < differing else 0}", str(repeat))
        for n in range(20)
        for repeat in range(2)
    ]
    grades += [grade(f"short {n}", repeat, "") for n in range(50) for repeat in range(2)]
    found = over_repeats(grades, mean_value)  # what the judge was not asked about does not count
    assert found["repeats_differ"] == differing / 20
    assert (found["m_spread"] is not None) == measured


def test_repeats_must_grade_the_same_questions() -> None:
    with pytest.raises(ArtifactError, match="same questions"):
        over_repeats([grade("a", 0, "x"), grade("b", 1, "y")], mean_value)
