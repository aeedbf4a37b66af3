"""LLaVA-1.5 in its original layout (`liuhaotian/llava-v1.5-*`, `openbmb/RLAIF-V-7B`).

One Llama config with `mm_*` keys and other weight names; the CLIP tower lies inside the checkpoint
(full fine-tunes) or beside it. Both become what transformers' own LLaVA takes. Sources: the two
releases' published configs and state dicts; renamed so, logits are those of the original code.
"""

import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.places import local_path

CLIP_336 = "openai/clip-vit-large-patch14-336"
"""The tower of LLaVA-1.5; its shape is known here, so that it need not be there."""
_CLIP_336_SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range"),
)
_TOWER = "model.vision_tower.vision_tower.vision_model."
_RENAMES = (
    (_TOWER, "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
)
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Old releases of transformers saved these; they follow from the config."""


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json describes this layout."""
    known = config.get("model_type") in ("llava", "llava_llama")
    return known and "mm_vision_tower" in config and "text_config" not in config


def rename(names: Iterable[str]) -> dict[str, str]:
    """Original name to transformers' name of each weight; buffers are left out."""
    renamed = {}
    for name in names:
        if name.endswith(_BUFFERS):
            continue
        renamed[name] = name
        for old, new in _RENAMES:
            if name.startswith(old):
                renamed[name] = new + name.removeprefix(old)
                break
    return renamed


def read_config(folder: Path) -> LlavaConfig:
    """The config; raises ConfigError for variants other than LLaVA-1.5."""
    raw = json.loads((folder / "config.json").read_bytes())
    tower = _find_tower(folder, raw["mm_vision_tower"])
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
    expected |= {"mm_use_im_patch_token": False, "rope_scaling": None}
    for key, value in expected.items():
        if (found := raw.get(key, value)) != value:
            raise ConfigError(f"{folder}: {key} is {found!r}, LLaVA-1.5 has {value!r}")
    try:
        return make_config(
            raw, _tower_config(folder, tower), unk_id=_unk_id(read_tokenizer(folder))
        )
    except KeyError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error} is missing") from error


def make_config(raw: dict[str, Any], tower: CLIPVisionConfig, *, unk_id: int) -> LlavaConfig:
    """The config for the text and `mm_*` keys of `raw`.

    The placeholder of the image is `<unk>`: the vocabulary has no token for it, no text contains
    it, and a row more in the output layer would change every probability.
    """
    text = LlamaConfig(
        **{key: raw[key] for key in _TEXT_KEYS if key in raw},
        rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)},
    )
    patches = raw.get("mm_vision_select_feature", "patch") == "patch"
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=unk_id,
        projector_hidden_act="gelu",
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default" if patches else "full",
        image_seq_length=(tower.image_size // tower.patch_size) ** 2 + int(not patches),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )
    config.image_aspect_ratio = raw.get("image_aspect_ratio", "pad")
    return config


def has_original_processor(folder: Path) -> bool:
    """Whether a folder is this layout, or was trained from it and still has no processor."""
    config = json.loads((folder / "config.json").read_bytes())
    files = ("processor_config.json", "preprocessor_config.json")
    trained = "image_aspect_ratio" in config and not any((folder / name).exists() for name in files)
    return is_original(config) or trained


def make_processor(folder: Path, config: LlavaConfig) -> LlavaProcessor:
    """Tokenizer and image transform: pad to a square in CLIP's mean colour, resize, normalise.

    Raises ConfigError for an `image_aspect_ratio` other than `pad` and `square`.
    """
    ratio = config.image_aspect_ratio
    if ratio not in ("pad", "square", None):
        raise ConfigError(f"{folder}: image_aspect_ratio is {ratio!r}, expected 'pad' or 'square'")
    tower, tokenizer = config.vision_config, read_tokenizer(folder)
    return LlavaProcessor(
        LlavaImageProcessorPil(
            size={"shortest_edge": tower.image_size},
            crop_size={"height": tower.image_size, "width": tower.image_size},
            do_pad=ratio == "pad",
        ),
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=tokenizer.unk_token,
    )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder, which transformers cannot find by its config."""
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), config=LlamaConfig(), local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise ArtifactError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def _unk_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.unk_token_id is None:
        raise ConfigError("the tokenizer has no unknown token to stand for the image")
    return int(tokenizer.unk_token_id)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights under transformers' names, the tower's from beside if they are not inside.

    Raises ArtifactError for shards that are missing or broken, ConfigError when there is no tower.
    Pickled files are read with `weights_only`, which runs no code.
    """
    weights = dict(read_tensors(folder))
    if not any(name.startswith(_TOWER) for name in weights):
        named = json.loads((folder / "config.json").read_bytes())["mm_vision_tower"]
        tower = _find_tower(folder, named)
        if tower is None:
            raise ConfigError(
                f"{folder}: has no vision tower inside, and {named} is neither a folder nor a "
                f"folder beside it; put it at {folder.parent / Path(named).name}"
            )
        for name, tensor in read_tensors(tower):
            if name.startswith("vision_model."):
                weights[_TOWER + name.removeprefix("vision_model.")] = tensor
    return {new: weights[old] for old, new in rename(weights).items()}


def _find_tower(folder: Path, named: str) -> Path | None:
    name = Path(named).name
    places = (folder / named, folder / name, folder.parent / name, local_path(named))
    return next((place for place in places if (place / "config.json").exists()), None)


def _tower_config(folder: Path, tower: Path | None) -> CLIPVisionConfig:
    if tower is not None:
        return CLIPVisionConfig.from_pretrained(str(tower), local_files_only=True)
    named = json.loads((folder / "config.json").read_bytes())["mm_vision_tower"]
    if Path(named).name != Path(CLIP_336).name:
        raise ConfigError(f"{folder}: the vision tower {named} is not there; LLaVA-1.5: {CLIP_336}")
    return CLIPVisionConfig(**_CLIP_336_SHAPE)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder, file by file; pickled ones without running their code.

    Raises ArtifactError for files that are missing, broken or hold more than weights.
    """
    for path in _weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                yield from load_file(path).items()
            else:
                yield from torch.load(
                    path, map_location="cpu", weights_only=True, mmap=True
                ).items()
        except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: truncated, corrupt or not weights: {error}") from error
        except pickle.UnpicklingError as error:
            raise ArtifactError(f"{path}: more than plain weights, refused: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The shards that an index names, or the only file; safetensors where both are there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ArtifactError(f"{index}: unreadable: {error}") from error
            for shard in shards:
                if not (folder / shard).exists():
                    raise ArtifactError(f"{folder / shard}: shard is missing")
            return [folder / shard for shard in shards]
        if (folder / name).exists():
            return [folder / name]
    raise ArtifactError(f"{folder}: neither safetensors nor pytorch_model.bin is there")
