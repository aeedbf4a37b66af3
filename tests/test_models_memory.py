"""A batch that does not fit is tried again, smaller."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaifv.models import load_model
from rlaifv.models.base import Decoding
from tests.models_kit import make_prompts, make_rows, spec
from tests.tiny import make_tiny_llava


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


def test_a_row_that_fits_nowhere_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(spec(folder, batch_size=2))
    tried = limited(model, monkeypatch, rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        model.answer(make_prompts(), decoding=Decoding(4))
    assert tried == [2, 1]
