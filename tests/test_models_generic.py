"""Any image-text model of transformers, through its own forward."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from rlaifv.config import ModelSpec
from rlaifv.errors import ConfigError
from rlaifv.models import generic, load_local, load_trainable
from rlaifv.models.base import Decoding, ImageQuestions
from rlaifv.models.check import CHECKS, check
from rlaifv.models.generic import GenericModel
from rlaifv.models.random_weights import CHAT_TEMPLATE, Shape, make_tokenizer, text_config
from tests.models_kit import EOS_IDS, IMAGES, QUESTIONS, make_prompts, make_rows, spec, with_eos
from tests.tiny import make_tiny_llava


def make_tiny_llava_next(folder: Path) -> Path:
    """A random LLaVA-NeXT: several tiles per image, so that token counts depend on the image."""
    tokenizer, pinpoints = make_tokenizer(), [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        text_config=text_config(tokenizer, Shape()),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",  # noqa: S106 - no password
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


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
        monkeypatch.setattr(generic, "_can_be_copied", lambda _cache: False)
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


def test_llava_next_conforms(tmp_path: Path) -> None:
    made = make_tiny_llava_next(tmp_path / "next")
    loaded = load_local(ModelSpec(path=str(made), dtype="float32"))
    assert isinstance(loaded, GenericModel)
    findings = check(loaded, tolerance=1e-4)
    assert [finding.problem for finding in findings] == [""] * len(CHECKS)
    with pytest.raises(ConfigError, match="'llava_next' can answer and label, not train"):
        load_trainable(ModelSpec(path=str(made), dtype="float32"))
