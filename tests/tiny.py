"""Random models of a few hundred kilobytes, made offline in Hugging Face layout."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlamaForCausalLM

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
