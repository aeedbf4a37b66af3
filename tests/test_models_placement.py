"""A model whose layers lie in several places gives what it gives in one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlaifv.errors import ConfigError
from rlaifv.models import load_trainable, placement
from rlaifv.models.base import Decoding, ImageQuestions
from rlaifv.models.decoder import Decoder
from rlaifv.models.random_weights import TINY_OMNILMM, save_random_omnilmm
from tests.models_kit import IMAGES, QUESTIONS, make_prompts, make_rows, spec
from tests.tiny import make_tiny_llava


def _make(kind: str, folder: Path) -> Path:
    if kind == "llava":
        return make_tiny_llava(folder)
    return save_random_omnilmm(folder, TINY_OMNILMM)


@pytest.mark.parametrize("kind", ["llava", "omnilmm"])
def test_it_gives_the_same_with_layers_elsewhere(kind: str, tmp_path: Path) -> None:
    folder = _make(kind, tmp_path / "model")
    whole, spread = load_trainable(spec(folder)), load_trainable(spec(folder))
    module: Any = spread.module
    decoder = "model.language_model"
    parts = [f"model.{name}" for name, _ in module.model.named_children()]
    parts += [f"{decoder}.{name}" for name, _ in module.model.language_model.named_children()]
    parts += [f"{decoder}.layers.0", f"{decoder}.layers.1", "lm_head"]
    devices = {name: "cpu" for name in parts if name not in (decoder, f"{decoder}.layers")}
    devices[f"{decoder}.layers.1"] = "disk"
    offload = {"offload_dir": str(tmp_path / "disk"), "main_device": "cpu"}
    placement.dispatch(module, devices, **offload)
    weight = module.model.language_model.layers[1].self_attn.q_proj.weight
    assert weight.device.type == "meta", "the layer should be on disk between its passes"
    assert placement.is_spread(module)
    assert not Decoder(module).in_lines
    for one, other in zip(
        spread.sequence_logps(make_rows()), whole.sequence_logps(make_rows()), strict=True
    ):
        for logps, expected in zip(one, other, strict=True):
            assert logps == pytest.approx(expected, abs=1e-6)
    asked = [ImageQuestions(image, QUESTIONS) for image in IMAGES]
    torch.testing.assert_close(
        torch.tensor(spread.yes_no(asked)), torch.tensor(whole.yes_no(asked)), atol=1e-7, rtol=0
    )
    prompts = make_prompts((3, 4))[:3]
    for decoding in (Decoding(5, temperature=0.7, top_k=20), Decoding(5, num_beams=3)):
        assert spread.answer(prompts, decoding=decoding) == whole.answer(prompts, decoding=decoding)


def test_parts_fill_devices_in_order_and_the_tower_stays_whole(tmp_path: Path) -> None:
    module: Any = load_trainable(spec(save_random_omnilmm(tmp_path / "o", TINY_OMNILMM))).module
    every = sum(p.numel() * p.element_size() for p in module.parameters())
    devices = placement.device_map(module, {"cpu": every * 2 // 3, "disk": every})
    assert set(devices.values()) == {"cpu", "disk"}
    assert devices["model.vision_tower"] == devices["model.resampler"] == "disk"
    assert devices["model.language_model.embed_tokens"] == "cpu"
    with pytest.raises(ConfigError, match=r"do not fit on 2 devices of .* no room for"):
        placement.device_map(module, {"cpu": 4000, 0: 4000})
