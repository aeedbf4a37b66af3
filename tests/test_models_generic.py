"""Any image-text model of transformers, through its own forward."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
)

from rlaifv.config import ModelSpec
from rlaifv.models import load_local, load_trainable
from rlaifv.models.base import Decoding, ImageQuestions, Prompt
from rlaifv.models.check import CHECKS, check
from rlaifv.models.generic import GenericModel
from tests.models_kit import EOS_IDS, IMAGES, QUESTIONS, make_prompts, make_rows, spec, with_eos
from tests.tiny import make_tiny_llava
from tests.tiny_families import FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_eos(make_tiny_llava(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder: Path) -> GenericModel:
    processor = AutoProcessor.from_pretrained(str(folder), backend="pil")
    module = LlavaForConditionalGeneration.from_pretrained(str(folder)).eval()
    return GenericModel(module, processor, batch_size=2, eos_ids=EOS_IDS, source="tiny")


@pytest.mark.parametrize("share", [True, False])
def test_it_gives_what_the_engine_gives(
    model: GenericModel, folder: Path, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not share:
        monkeypatch.setattr(model, "_can_be_copied", lambda _cache: False)
    engine = load_trainable(spec(folder))
    for row, other in zip(
        model.sequence_logps(make_rows()), engine.sequence_logps(make_rows()), strict=True
    ):
        for logps, expected in zip(row, other, strict=True):
            assert logps == pytest.approx(expected, abs=1e-5)
    asked = [ImageQuestions(image, QUESTIONS) for image in IMAGES]
    verdicts, expected_verdicts = model.yes_no(asked), engine.yes_no(asked)
    torch.testing.assert_close(
        torch.tensor(verdicts), torch.tensor(expected_verdicts), atol=1e-6, rtol=0
    )
    prompts = make_prompts((3, 4))[:3]
    for decoding in (
        Decoding(6),
        Decoding(6, temperature=0.7, top_k=20),
        Decoding(6, num_beams=3),
    ):
        assert model.answer(prompts, decoding=decoding) == engine.answer(prompts, decoding=decoding)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return FAMILIES[name](tmp_path_factory.mktemp("families") / name)


@pytest.mark.slow
def test_other_families_conform(family: Path) -> None:
    loaded = load_local(ModelSpec(path=str(family), dtype="float32"))
    assert isinstance(loaded, GenericModel)
    findings = check(loaded, tolerance=1e-4)
    assert [finding.problem for finding in findings] == [""] * len(CHECKS)


def test_other_families_answer_as_transformers_generates_and_share_what_can_be(
    family: Path,
) -> None:
    model = load_local(ModelSpec(path=str(family), dtype="float32"))
    assert isinstance(model, GenericModel)
    inputs = model._inputs(IMAGES[0], "What is it?", 0)
    ids = model.module.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = ids[0, inputs["input_ids"].shape[1] :].tolist()
    ((answer,),) = model.answer([Prompt(IMAGES[0], "What is it?")], decoding=Decoding(6))
    assert answer == model._prompter.generation(expected, model._eos_ids)
    recurrent = family.name.startswith("minicpmv4")  # its cache cannot be continued twice
    assert model._can_be_copied(model._run(inputs).cache) is not recurrent
