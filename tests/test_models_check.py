"""The conformance check holds for what is right and fails for what is broken."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlaifv.models import load_trainable
from rlaifv.models.base import Branches, Floats, ImageQuestions, YesNo
from rlaifv.models.check import CHECKS, Finding, check, findings_text, main
from rlaifv.models.shared_prefix import SharedPrefixModel
from tests.models_kit import spec
from tests.tiny import make_original_llava, make_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path) -> SharedPrefixModel:
    loaded = load_trainable(spec(folder))
    assert isinstance(loaded, SharedPrefixModel)
    return loaded


def test_both_layouts_of_llava_conform(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_original_llava(tmp_path / "original", folder)
    for path in (folder, original):
        assert main([str(path)]) == 0
        said = capsys.readouterr().out
        assert said.count("holds  ") == len(CHECKS)
        assert said.count("differs by ") == 5
        assert said.endswith(f"{path}: all {len(CHECKS)} checks hold\n")


def test_a_broken_checkpoint_ends_with_the_errors_code(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 78


def _failing(model: SharedPrefixModel) -> set[str]:
    return {finding.check.split()[0] for finding in check(model, tolerance=1e-4) if finding.problem}


def test_an_image_that_answers_for_another_is_found(
    model: SharedPrefixModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = model.sequence_logps

    def stale(rows: Sequence[Branches]) -> list[list[Floats]]:
        return original([row._replace(image=rows[0].image) for row in rows])

    monkeypatch.setattr(model, "sequence_logps", stale)
    assert "images" in _failing(model)


def test_the_verdict_counts_what_fails() -> None:
    findings = [Finding("a", "", 1e-6), Finding("b", "scores differ by 1 > 0.1", 1.0)]
    lines = findings_text("tiny", findings).splitlines()
    assert lines[1].startswith("FAILS  b")
    assert lines[1].endswith("scores differ by 1 > 0.1")
    assert lines[2] == "tiny: 1 of 2 checks fail: not to be trusted"


def test_wrong_words_are_found(model: SharedPrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.yes_no

    def swapped(rows: Sequence[ImageQuestions]) -> list[list[YesNo]]:
        return [[YesNo(v.p_no, v.p_yes) for v in row] for row in original(rows)]

    monkeypatch.setattr(model, "yes_no", swapped)
    assert _failing(model) == {"yes"}


def test_a_cut_prompt_is_found(model: SharedPrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.sequence_logps

    def cut(rows: Sequence[Branches]) -> list[list[Floats]]:
        return original([row._replace(question=row.question[:100]) for row in rows])

    monkeypatch.setattr(model, "sequence_logps", cut)
    assert _failing(model) == {"a"}
