"""LLaVA's original layout gives what the Hugging Face layout gives."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models import load_model
from rlaifv.models.base import Branches, Decoding, ImageQuestions, Prompt
from rlaifv.models.original import _CLIP_336_SHAPE, make_config, rename
from tests.models_kit import load_engine
from tests.tiny import make_original_llava, make_tiny_llava, random_image

IMAGES = tuple(random_image(seed, size=(30, 30)) for seed in range(2))
SIZES_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}


def _spec(folder: Path, **values: Any) -> ModelSpec:
    return ModelSpec(path=str(folder), dtype="float32", **values)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("plain"), chat_template=None)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    return make_original_llava(tmp_path_factory.mktemp("original") / "m", plain)


def _original_names(layers: int) -> list[str]:
    """State-dict names of a full fine-tune, written down from the published description."""
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = [f"model.layers.{n}.{part}" for n in range(layers) for part in attention + mlp + norms]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")]
    tower = "model.vision_tower.vision_tower.vision_model"
    parts = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    parts += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    names += [
        f"{tower}.encoder.layers.{n}.{part}.{kind}"
        for n in range(24)
        for part in parts
        for kind in ("weight", "bias")
    ]
    names += [
        f"{tower}.embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight")
    ]
    names.append(f"{tower}.embeddings.position_embedding.weight")
    norms = ["pre_layrnorm", "post_layernorm"]
    return names + [f"{tower}.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("sizes", "heads", "count"), [(SIZES_7B, 32, 686), (SIZES_13B, 40, 686 + 8 * 9)]
)
def test_the_key_map_is_complete(sizes: dict[str, int], heads: int, count: int) -> None:
    raw = {**sizes, "num_attention_heads": heads, "vocab_size": 32000}
    config = make_config(raw, CLIPVisionConfig(**_CLIP_336_SHAPE), unk_id=0)
    with torch.device("meta"):
        module = LlavaForConditionalGeneration(config)
    names = _original_names(sizes["num_hidden_layers"])
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    renamed = rename(names + buffers)
    assert len(names) == count
    assert sorted(renamed.values()) == sorted(module.state_dict())


def _everything(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    model = load_model(_spec(folder))
    rows = [Branches(image, "What is it?", ("A dog.", "no")) for image in IMAGES]
    logps = np.concatenate([part for row in model.sequence_logps(rows) for part in row])
    verdicts = model.yes_no([ImageQuestions(image, ("A cat?", "Red?")) for image in IMAGES])
    answers = model.answer([Prompt(image, "What?") for image in IMAGES], decoding=Decoding(6))
    texts = [generation.text for row in answers for generation in row]
    return torch.from_numpy(logps), torch.tensor(verdicts), texts


@pytest.mark.parametrize("variant", ["safetensors", "bin", "sharded", "tower beside"])
def test_it_gives_what_the_other_layout_gives(plain: Path, tmp_path: Path, variant: str) -> None:
    folder = make_original_llava(tmp_path / "m", plain, variant=variant)
    (logps, verdicts, texts), (logps2, verdicts2, texts2) = _everything(plain), _everything(folder)
    torch.testing.assert_close(logps2, logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(verdicts2, verdicts, atol=1e-5, rtol=0)
    assert texts2 == texts


def test_an_image_is_padded_to_a_square_in_the_mean_colour(original: Path) -> None:
    model = load_engine(_spec(original))
    batch = model.encode_branches([Branches(random_image(1, size=(60, 20)), "What?", ("a",))])
    pixels = batch.pixels[0]
    assert pixels.shape == (3, 28, 28)
    assert pixels[:, 0].abs().max() < 0.03  # the mean colour, cut to whole numbers
    assert pixels[:, 14].abs().max() > 0.3


@pytest.mark.parametrize(("name", "who"), [("llava_v1", "human"), ("vicuna_v1", "user")])
def test_a_prompt_is_that_of_the_conversation(original: Path, name: str, who: str) -> None:
    from transformers import AutoTokenizer

    model = load_engine(_spec(original, prompt=name))
    batch = model.encode_branches([Branches(IMAGES[0], "What is it?", ("",))])
    text = AutoTokenizer.from_pretrained(str(original)).decode(batch.packed.ids_BL[0])
    assert text == (
        f"<s>A chat between a curious {who} and an artificial intelligence assistant. The assistant "
        f"gives helpful, detailed, and polite answers to the {who}'s questions. USER: "
        + "<unk>" * 4
        + "\nWhat is it? ASSISTANT:</s>"
    )


def test_a_prompt_that_the_checkpoint_lacks_is_refused(original: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        load_model(_spec(original, prompt="chat_template"))


def test_a_question_with_the_placeholder_is_refused(original: Path) -> None:
    with pytest.raises(ArtifactError, match="row 0: the prompt has 2 image placeholders"):
        load_model(_spec(original)).yes_no([ImageQuestions(IMAGES[0], ("<unk>?",))])


def test_what_is_trained_from_it_loads_again(original: Path, tmp_path: Path) -> None:
    from rlaifv.training.parts import save_full

    save_full(load_engine(_spec(original)).module, tmp_path / "out", like=original)
    first, again = _everything(original), _everything(tmp_path / "out")
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_missing_tower_is_named(original: Path, tmp_path: Path) -> None:
    folder = copytree(original, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="the vision tower somebody/tiny-tower is not there"):
        load_model(_spec(folder))
    copytree(original.parent / "tiny-tower", tmp_path / "tiny-tower")  # its config alone
    with pytest.raises(ArtifactError, match="tiny-tower: neither safetensors"):
        load_model(_spec(folder))
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"1 missing keys.*norm\.weight"):
        load_model(_spec(folder))


def test_a_pickle_with_more_than_weights_is_refused(original: Path, tmp_path: Path) -> None:
    folder = copytree(original, tmp_path / "m")
    copytree(original.parent / "tiny-tower", tmp_path / "tiny-tower")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="more than plain weights"):
        load_model(_spec(folder))
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
    )
    with pytest.raises(ArtifactError, match=r"00001-of-00002\.bin: shard is missing"):
        load_model(_spec(folder))


def test_a_variant_that_is_not_1_5_is_refused(original: Path, tmp_path: Path) -> None:
    folder = copytree(original, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    with pytest.raises(ConfigError, match="mm_projector_type is 'linear'"):
        load_model(_spec(folder))
