"""AMBER: the generative rules one by one, the discriminative figures by hand, the real files."""

import json
from pathlib import Path

import pytest

from rlaifv.benchmarks.__main__ import main
from rlaifv.benchmarks.amber import (
    AmberData,
    AmberGrade,
    Annotation,
    Kind,
    amber_metrics,
    exact_similarity,
    grade_description,
    read_data,
)
from rlaifv.errors import ArtifactError
from tests.nltk_folder import make_nltk_folder, shared_data

RELATION = {
    "dog": ["puppy", "hound"],
    "ship": ["boat", "vessel"],
    "man": ["guy", "puppy"],
    "cloud": ["sky cloud"],
    "sun": [],
    "light": [],
}
WORDS = frozenset(RELATION) | {word for others in RELATION.values() for word in others}
DATA = AmberData([], RELATION, frozenset({"light"}), frozenset(WORDS))


def graded(
    nouns: str,
    truth: str,
    hallu: str = "",
    similar: dict[tuple[str, str], float] | None = None,
) -> AmberGrade:
    known = similar or {}
    return grade_description(
        nouns.split(),
        Annotation("generative", tuple(truth.split()), tuple(hallu.split())),
        data=DATA,
        similarity=lambda a, b: known.get((a, b), exact_similarity(a, b)),
    )


def test_words_outside_the_vocabulary_do_not_count() -> None:
    assert graded("dog unicorn dog", "dog").nouns == 2


def test_a_noun_that_is_neither_there_nor_similar_is_hallucinated() -> None:
    grade = graded("dog sun sun", "dog ship")
    assert (grade.hallucinated, grade.covered, grade.num_truth) == (2, 1, 2)
    assert grade.hallucinated_words == ("sun", "sun")


def test_a_safe_word_stays_in_the_count_and_is_never_hallucinated() -> None:
    grade = graded("light dog", "ship")
    assert (grade.nouns, grade.hallucinated) == (2, 1)


def test_associated_words_cover_their_first_owner() -> None:
    grade = graded("puppy", "man dog")
    assert (grade.covered, grade.hallucinated) == (1, 0)
    assert graded("puppy dog", "man dog").covered == 2


def test_a_duplicated_truth_word_is_covered_once() -> None:
    grade = graded("ship boat ship", "ship ship")
    assert (grade.covered, grade.num_truth) == (1, 2)


def test_a_hallu_word_is_marked_and_still_hallucinated() -> None:
    grade = graded("sun", "dog", "sun cloud")
    assert (grade.marked, grade.num_hallu, grade.hallucinated) == (1, 2, 1)


def test_a_noun_may_mark_two_hallu_words_and_be_close_to_a_truth_word() -> None:
    similar = {("sun", "sky cloud"): 0.9, ("sun", "dog"): 0.81}
    grade = graded("sun", "dog", "sun cloud", similar)
    assert (grade.marked, grade.covered, grade.hallucinated) == (2, 1, 0)


def test_a_similarity_of_exactly_the_threshold_is_not_enough() -> None:
    assert graded("sun", "dog", similar={("sun", "dog"): 0.8}).hallucinated == 1


def test_generative_figures_by_hand() -> None:
    first = graded("dog sun sun", "dog ship", "sun cloud")
    empty = graded("", "man")
    metrics = amber_metrics([first, empty])
    assert metrics["CHAIR"] == 66.6  # 2 / 3.001: the program's denominators start at 0.001
    assert metrics["Cover"] == 33.3
    assert metrics["Hal"] == 50.0
    assert metrics["Cog"] == 50.0
    assert metrics["mention_hallucination"] == 2 / 3
    assert metrics["Accuracy"] is None


def asked(kind: Kind, truth: str, answer: str) -> AmberGrade:
    return AmberGrade(kind=kind, truth=truth, answer=answer)


def test_discriminative_figures_by_hand() -> None:
    grades = [
        asked("existence", "no", "No"),
        asked("existence", "no", "Yes"),
        asked("existence", "no", "No."),
        asked("state", "yes", "Yes"),
        asked("state", "yes", "No"),
        asked("number", "no", "No"),
        asked("relation", "yes", "yes"),
    ]
    metrics = amber_metrics(grades)
    # denominators + 0.001 (attribute: three counters, + 0.003), then rounded to one decimal
    assert metrics["existence_Accuracy"] == 33.3
    assert metrics["existence_Precision"] == 99.9  # 1 / 1.001
    assert metrics["existence_Recall"] == 33.3
    assert metrics["existence_F1"] == round(2 * 0.999 * 0.333 / (0.999 + 0.333 + 0.001) * 100, 1)
    assert metrics["attribute_Accuracy"] == 66.6  # 2 / 3.003
    assert metrics["attribute_Precision"] == 49.9  # 1 / 2.003
    assert metrics["state_Precision"] == 0.0
    assert metrics["action_Accuracy"] is None
    assert metrics["Accuracy"] == 42.9  # 3 / 7.001, rounded up from 42.85
    assert metrics["Precision"] == 66.6
    assert metrics["Recall"] == 50.0
    assert metrics["F1"] == round(2 * 0.666 * 0.5 / (0.666 + 0.5 + 0.0001) * 100, 1)


def test_overall_figures_need_all_three_dimensions() -> None:
    assert amber_metrics([asked("existence", "no", "No")])["Accuracy"] is None


def shared() -> Path:
    return shared_data("amber")


def test_the_published_files_are_read() -> None:
    data = read_data(shared())
    assert len(data.annotations) == 15220
    assert data.annotations[1].truth.count("ship") == 2
    assert "orange" in data.safe_words
    assert main(["check", "amber", "--nltk-data", "/none"]) == 65
    assert main(["check", "amber", "--ground-truth", str(shared()), "--nltk-data", "/none"]) == 65


def test_annotations_out_of_order_are_refused(tmp_path: Path) -> None:
    (tmp_path / "relation.json").write_text("{}")
    (tmp_path / "safe_words.txt").write_text("")
    (tmp_path / "annotations.json").write_text('[{"id": 2, "type": "relation", "truth": "no"}]')
    with pytest.raises(ArtifactError, match="row 0, field id: expected 1"):
        read_data(tmp_path)


def test_responses_are_scored_from_files(tmp_path: Path) -> None:
    nltk_data = make_nltk_folder(tmp_path / "nltk")
    rows = [
        {"id": 1, "response": "A lake and a mountain under the sky, and a bird."},
        {"id": 1005, "response": "Yes"},
        {"id": 8633, "response": "No"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    out = tmp_path / "o.json"
    code = main(
        [
            *("score", "amber", "--mode", "exact", "--answers", str(tmp_path / "a.json")),
            *("--ground-truth", str(shared()), "--nltk-data", str(nltk_data), "--out", str(out)),
        ]
    )
    assert code == 0
    result = json.loads(out.read_text())
    assert result["items"][0]["covered"] == 3
    assert result["items"][0]["hallucinated_words"] == ["bird"]
    assert result["overall"]["CHAIR"] == 25.0
    assert result["overall"]["Cog"] == 20.0
    assert result["kinds"]["existence"]["Accuracy"] == 99.9
    assert "not AMBER's metric" in result["judge"]["identity"]
