"""A batch that does not fit is tried again, smaller."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs._models import usage_notes
from rlaifv.models import load_model, load_scorer, load_text_model
from rlaifv.models.base import Decoding
from rlaifv.models.branches import to_host
from tests.models_kit import make_prompts, make_rows, spec
from tests.tiny import make_tiny_chat, make_tiny_llava


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llava(tmp_path)


def limited(model: Any, monkeypatch: pytest.MonkeyPatch, *, rows: int) -> list[int]:
    """Lets no more than `rows` rows at a time into the model; the sizes that were tried."""
    merge, tried = model._side.merge, list[int]()

    def checked(ids_BL: Tensor, *features: Tensor) -> Tensor:
        tried.append(len(ids_BL))
        if len(ids_BL) > rows:
            raise torch.OutOfMemoryError("no memory")
        embeds: Tensor = merge(ids_BL, *features)
        return embeds

    monkeypatch.setattr(model._side, "merge", checked)
    return tried


def test_batches_shrink_until_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, decoding = make_prompts(), Decoding(4)
    expected = load_model(spec(folder, batch_size=8)).answer(prompts, decoding=decoding)
    model = load_model(spec(folder, batch_size=8))
    tried = limited(model, monkeypatch, rows=2)
    assert model.answer(prompts, decoding=decoding) == expected
    assert tried[:3] == [8, 4, 2]
    assert max(tried[2:]) == 2
    assert model.batch_size == 2
    assert len(model.sequence_logps(make_rows())) == len(make_rows())


def test_the_largest_batch_that_fits_is_found_from_above(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, decoding = make_prompts(), Decoding(4)
    expected = load_model(spec(folder, batch_size=9)).answer(prompts, decoding=decoding)
    model = load_model(spec(folder, batch_size=0))
    tried = limited(model, monkeypatch, rows=4)
    assert model.answer(prompts, decoding=decoding) == expected
    assert tried[:2] == [9, 4]
    assert usage_notes(model) == {"batch size": "4"}


def test_scoring_and_replies_shrink_as_well(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load_scorer(spec(folder, batch_size=3))
    tried = limited(scorer, monkeypatch, rows=1)
    assert len(scorer.sequence_logps(make_rows())) == len(make_rows())
    assert tried == [3, 1, 1, 1]
    chat: Any = load_text_model(spec(make_tiny_chat(tmp_path / "chat"), batch_size=0))
    embed, sizes = chat._decoder.embed, list[int]()

    def checked(ids_BP: Tensor) -> Tensor:
        sizes.append(len(ids_BP))
        if ids_BP.ndim == 2 and ids_BP.shape[1] > 1 and len(ids_BP) > 1:
            raise torch.OutOfMemoryError("no memory")
        embedded: Tensor = embed(ids_BP)
        return embedded

    monkeypatch.setattr(chat._decoder, "embed", checked)
    assert len(chat.reply(["What?", "And?"], seeds=[0, 1], decoding=Decoding(2))) == 2
    assert sizes[:2] == [2, 1]


def test_memory_that_is_short_when_results_are_asked_for_shrinks_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = load_scorer(spec(folder, batch_size=8)), make_rows()
    expected = model.sequence_logps(rows)
    short = True

    def scarce(tensor: Tensor) -> Callable[[], Tensor]:
        def fails() -> Tensor:
            raise torch.OutOfMemoryError("no memory")

        return fails if short else to_host(tensor)

    monkeypatch.setattr("rlaifv.models.shared_prefix.to_host", scarce)
    first, second = model.queue_sequence_logps(rows), model.queue_sequence_logps(rows[:1])
    short = False
    for results, kept in ((second(), expected[:1]), (first(), expected)):
        for row, other in zip(results, kept, strict=True):
            for logps, others in zip(row, other, strict=True):
                assert logps == pytest.approx(others, abs=1e-5)
    assert model.batch_size == 1


def test_groups_queued_before_memory_was_short_use_the_size_that_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, decoding = make_prompts(), Decoding(4)
    expected = load_model(spec(folder, batch_size=8)).answer(prompts, decoding=decoding)
    model = load_model(spec(folder, batch_size=8))
    tried = limited(model, monkeypatch, rows=2)
    first, second = (model.queue_answer(prompts, decoding=decoding) for _ in range(2))
    assert not tried  # only images are read
    assert (first(), second()) == (expected, expected)
    assert (tried[:3], max(tried[3:])) == ([8, 4, 2], 2)


def test_a_row_that_fits_nowhere_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(spec(folder, batch_size=2))
    tried = limited(model, monkeypatch, rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        model.answer(make_prompts(), decoding=Decoding(4))
    assert tried == [2, 1]
