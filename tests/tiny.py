"""Random models of a few hundred kilobytes, made offline in Hugging Face layout."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from rlaifv.models.random_weights import (
    CHAT_TEMPLATE,
    Shape,
    make_tokenizer,
    save_random_llava,
    text_config,
)

TEXT_TEMPLATE = "<s>{% for message in messages %}USER: {{ message['content'] }}{% endfor %} BOT:"


def make_tiny_llava(
    path: Path,
    *,
    seed: int = 0,
    image_size: int = 28,
    patch: int = 14,
    hidden_size: int = 32,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """A random LLaVA in `path`; 4 image tokens by default, 576 with `image_size=336`."""
    shape = Shape(
        hidden=hidden_size, intermediate=2 * hidden_size, image_size=image_size, patch=patch
    )
    return save_random_llava(path, shape, seed=seed, chat_template=chat_template)


def make_tiny_chat(path: Path, *, seed: int = 0) -> Path:
    """A random Llama with a chat template in `path`."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    torch.manual_seed(seed)
    LlamaForCausalLM(text_config(tokenizer, Shape())).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def random_image(seed: int, *, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of noise."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_original_llava(path: Path, plain: Path, *, variant: str = "safetensors") -> Path:
    """The tiny LLaVA of `plain` in the original layout, in `path`, its tower there or beside it.

    `variant`: safetensors, bin, sharded or "tower beside".
    """
    module = LlavaForConditionalGeneration.from_pretrained(str(plain))
    tower, weights = "model.vision_tower.vision_tower.vision_model.", {}
    for name, tensor in module.state_dict().items():
        for new, old in (
            ("model.vision_tower.", tower),
            ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("model.language_model.", "model."),
        ):
            if name.startswith(new):
                weights[old + name.removeprefix(new)] = tensor.clone()
                break
        else:
            weights[name] = tensor.clone()
    tower_folder = path.parent / "tiny-tower"
    module.config.vision_config.save_pretrained(tower_folder)
    if variant == "tower beside":
        inside = {name: weights.pop(name) for name in list(weights) if name.startswith(tower)}
        alone = {
            f"vision_model.{name.removeprefix(tower)}": value for name, value in inside.items()
        }
        save_file(alone, tower_folder / "model.safetensors")
    path.mkdir(parents=True)
    _save_original(path, weights, variant)
    config = module.config.text_config.to_dict() | {
        "model_type": "llava_llama" if variant == "bin" else "llava",
        "mm_vision_tower": "somebody/tiny-tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(plain / name, path / name)
    drop_image_token(path / "tokenizer_config.json")
    return path


def _save_original(path: Path, weights: dict[str, torch.Tensor], variant: str) -> None:
    if variant == "sharded":
        names = sorted(weights)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for shard, held in shards.items():
            save_file({name: weights[name] for name in held}, path / shard)
        where = {name: shard for shard, held in shards.items() for name in held}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    elif variant == "bin":
        torch.save(weights, path / "pytorch_model.bin")
    else:
        save_file(weights, path / "model.safetensors")


def drop_image_token(path: Path) -> None:
    """Original tokenizers have no image token."""
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if "image" not in key}
    kept.pop("extra_special_tokens", None)
    path.write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}))
