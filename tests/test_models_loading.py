"""Checkpoints are loaded whole or not at all."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models import load_model, load_text_model
from rlaifv.models.base import Branches, Decoding, Prompt
from tests.tiny import make_tiny_chat, make_tiny_llava, random_image


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return copytree(original, tmp_path / "copy")


def _load(folder: Path) -> object:
    return load_model(ModelSpec(path=str(folder), dtype="float32"))


def test_a_whole_checkpoint_loads_in_the_precision_asked_for(folder: Path) -> None:
    model = load_model(ModelSpec(path=f"file://{folder}", family="llava", batch_size=2))
    ((answer,),) = model.answer([Prompt(random_image(0), "What?")], decoding=Decoding(2))
    assert answer.num_tokens <= 2


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "language_model.model.norm.weight"
    assert name in weights
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["language_model.model.extra.weight"] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"norm\.weight|extra\.weight") as caught:
        _load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (("patch_size",), 28, "28x28 pixels and 1 tokens"),
        (("patch_size",), 7, "28x28 pixels and 16 tokens"),
        (("vision_feature_select_strategy",), "full", "28x28 pixels and 5 tokens"),
        (("image_processor", "crop_size"), {"height": 56, "width": 56}, "56x56 pixels and 16 tok"),
    ],
)
def test_a_processor_whose_image_tokens_do_not_fit_the_tower_is_refused(
    folder: Path, place: tuple[str, ...], value: object, found: str
) -> None:
    path = folder / "processor_config.json"
    config = inner = json.loads(path.read_text())
    for name in place[:-1]:
        inner = inner[name]
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=f"{found}.*, the vision tower takes 28x28 and 4"):
        _load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"model-00001-of-00002\.safetensors: shard is missing"):
        _load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated or corrupt"):
        _load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled \(pytorch_model\.bin\)"):
        _load(folder)


def test_no_weights_at_all_are_reported(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors"):
        _load(folder)


def test_a_missing_tokenizer_is_reported(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match="processor cannot be loaded"):
        _load(folder)


def test_the_wrong_family_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="family is 'text'"):
        load_model(ModelSpec(path=str(folder), family="text"))
    chat = make_tiny_chat(tmp_path / "chat")
    with pytest.raises(ConfigError, match="no vision-language family 'llama'"):
        _load(chat)
    with pytest.raises(ConfigError, match="cannot be loaded as a chat model"):
        load_text_model(ModelSpec(path=str(folder), family="text"))


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        _load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        _load(tmp_path)


def test_a_hub_id_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="nobody/nothing: no such folder"):
        _load(Path("nobody/nothing"))


def test_without_a_chat_template_the_prompt_is_llava_v1(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_tiny_llava(tmp_path / "m", chat_template=None)
    model = load_model(ModelSpec(path=str(folder), dtype="float32"))
    batch = model.encode_branches([Branches(random_image(0), "What is it?", ("",))])  # type: ignore[attr-defined]
    text = AutoTokenizer.from_pretrained(str(folder)).decode(batch.packed.ids_BL[0])
    assert text == (
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions. USER: "
        + "<image>" * 4
        + "\nWhat is it? ASSISTANT:</s>"
    )
