"""OmniLMM-12B and RLAIF-V-12B: an EVA02 tower, a resampler with 256 queries, Mistral.

transformers has no such model. Modules here, names of weights as published: a folder of either
release loads as it is, and is written the same way. Source: the release's code and config
(RLHF-V/RLAIF-V at 83d917b, `omnilmm/`); the resampler is Qwen-VL's (arXiv 2308.12966).

Shapes:  I images;  T features of the tower;  Q queries;  E width of the language model;
B rows;  L tokens;  V vocabulary.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models.eva import EPSILON, EvaTower, TowerShape, stretch
from rlaifv.models.original import read_tensors, read_tokenizer
from rlaifv.models.prompting import Prompter

PATCH_TOKEN, START_TOKEN, END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"
ANSWER_LEAD = "\n<|assistant|>\n"
SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite "
    "answers to the human's questions."
)
"""What the checkpoints were trained with."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 128
"""Of the resampler's attention."""
_BESIDE = ("vision_tower.", "resampler.")


class OmniLMMConfig(MistralConfig):  # type: ignore[misc]  # transformers is not typed
    """Mistral's config and the tower's. `tower`: what differs from EVA02-CLIP-E/14."""

    model_type = "omnilmm"
    num_query: int = 256
    image_size: int = 448
    im_patch_token: int = 32000
    tower: dict[str, int] | None = None
    resampler_heads: int | None = None

    @property
    def tower_shape(self) -> TowerShape:
        return TowerShape(**(self.tower or {}))


def sincos_table(width: int, side: int) -> Tensor:
    """Fixed positions of a square grid, float32 [side * side, width].

    Of each quarter of `width`: sine and cosine of the column, then of the row, at frequencies
    10000 ** -(i / quarter).
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64).unsqueeze(1) * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    columns = waves.expand(side, -1, -1)
    rows = waves.unsqueeze(1).expand(-1, side, -1)
    return torch.cat([columns, rows], -1).reshape(side * side, width).float()


class Resampler(nn.Module):
    """One cross-attention from learned queries on a grid to the tower's features."""

    pos_embed: Tensor

    def __init__(self, *, queries: int, width: int, heads: int, features: int) -> None:
        super().__init__()
        side = round(queries**0.5)
        self.register_buffer("pos_embed", sincos_table(width, side))
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(features, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=EPSILON)
        self.ln_post = nn.LayerNorm(width, eps=EPSILON)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """[I, T, width of the tower] to [I, Q, E]; T is a square."""
        side = round(features.shape[1] ** 0.5)
        values = self.ln_kv(self.kv_proj(features))
        keys = values + stretch(self.pos_embed, side, side, antialias=False)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        attended, _ = self.attn(queries, keys, values, need_weights=False)
        out: Tensor = self.ln_post(attended) @ self.proj
        return out


class OmniLMMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]  # the same
    """What transformers wants to know."""

    config_class = OmniLMMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MistralDecoderLayer", "EvaBlock", "Resampler")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            side = round(len(module.query) ** 0.5)
            module.pos_embed.copy_(sincos_table(module.query.shape[1], side))
            nn.init.normal_(module.query, std=self.config.initializer_range)
            nn.init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
            nn.init.xavier_uniform_(module.attn.in_proj_weight)
        elif isinstance(module, EvaTower):
            nn.init.normal_(module.cls_token, std=self.config.initializer_range)
            nn.init.normal_(module.pos_embed, std=self.config.initializer_range)


class OmniLMMModel(OmniLMMPreTrainedModel):
    """The three parts."""

    def __init__(self, config: OmniLMMConfig) -> None:
        super().__init__(config)
        shape, width = config.tower_shape, config.hidden_size
        self.language_model = MistralModel(config)
        self.vision_tower = EvaTower(shape)
        self.resampler = Resampler(
            queries=config.num_query,
            width=width,
            heads=config.resampler_heads or width // HEAD_WIDTH,
            features=shape.width,
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)


class OmniLMMForCausalLM(OmniLMMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """With the output layer."""

    def __init__(self, config: OmniLMMConfig) -> None:
        super().__init__(config)
        self.model = OmniLMMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,  # the decoder's
    ) -> CausalLMOutputWithPast:
        """One image per row, where its placeholders are; as the release's `generate_vllm`."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and input_ids is not None:
            images = self.model.resampler(self.model.vision_tower(pixel_values))
            rows = []
            for ids_L, embeds_LE, image_QE in zip(input_ids, inputs_embeds, images, strict=True):
                (places,) = torch.where(ids_L == self.config.im_patch_token)
                start, end = int(places[0]), int(places[-1]) + 1
                if end - start != len(image_QE):
                    raise ArtifactError(f"{end - start} placeholders for {len(image_QE)} features")
                rows.append(torch.cat([embeds_LE[:start], image_QE, embeds_LE[end:]]))
            inputs_embeds = torch.stack(rows)
        options.pop("logits_to_keep", None)
        output = self.model.language_model(inputs_embeds=inputs_embeds, **options)
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """As transformers does it, under the published names."""
        weights = options.pop("state_dict", None) or self.state_dict()
        super().save_pretrained(save_directory, state_dict=published(weights), **options)


def rename(names: Iterable[str]) -> dict[str, str]:
    """Published name to the name here of each weight; buffers that follow from the config go."""
    renamed = {}
    for name in names:
        inside = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq"):
            continue
        decoder = name.startswith("model.") and not inside.startswith(_BESIDE)
        renamed[name] = f"model.language_model.{inside}" if decoder else name
    return renamed


def published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    decoder = "model.language_model."
    return {
        f"model.{name.removeprefix(decoder)}" if name.startswith(decoder) else name: tensor
        for name, tensor in weights.items()
    }


def read_config(folder: Path) -> OmniLMMConfig:
    """The config; raises ConfigError for a variant that is not known."""
    values = json.loads((folder / "config.json").read_bytes())
    for key, expected in {"mm_use_im_start_end": True, "use_mm_proj": True}.items():
        if values.get(key, expected) != expected:
            raise ConfigError(f"{folder}: {key} is {values[key]!r}, OmniLMM-12B has {expected!r}")
    config: OmniLMMConfig = OmniLMMConfig.from_dict(values)
    side = round(config.num_query**0.5)
    if side**2 != config.num_query:
        raise ConfigError(f"{folder}: num_query is {config.num_query}, expected a square")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights under the names here; errors as for `rlaifv.models.original.read_weights`."""
    weights = dict(read_tensors(folder))
    return {new: weights[old] for old, new in rename(weights).items()}


class OmniLMM:
    """The image side of `OmniLMMForCausalLM`: a `shared_prefix.VisionSide`."""

    def __init__(self, module: OmniLMMForCausalLM) -> None:
        self.module = module

    def features(self, pixels: Tensor) -> Tensor:
        """Of the tower, before the resampler, [I, T, width of the tower]."""
        tower = self.module.model.vision_tower
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            features: Tensor = tower(pixels)
            return features

    def merge(self, ids_BL: Tensor, features: Tensor, image_of_row_B: Tensor) -> Tensor:
        """Embeddings [B, L, E] with the resampler's output in place of the placeholders."""
        embeds_BLE: Tensor = self.module.get_input_embeddings()(ids_BL)
        images_IQE = self.module.model.resampler(features)
        mask_BL1 = (ids_BL == self.module.config.im_patch_token).unsqueeze(-1)
        return embeds_BLE.masked_scatter(mask_BL1, images_IQE.to(embeds_BLE)[image_of_row_B])

    def full_logits(self, ids_L: Tensor, pixels_1: Tensor) -> Tensor:
        """One plain row, [L, V]."""
        output = self.module(input_ids=ids_L.unsqueeze(0), pixel_values=pixels_1, use_cache=False)
        logits_LV: Tensor = output.logits[0]
        return logits_LV


class OmniLMMProcessor:
    """Zephyr's conversation, and pictures squeezed into a square as in the release."""

    chat_template = "zephyr"
    image_token = PATCH_TOKEN

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int) -> None:
        self.tokenizer, self._size = tokenizer, image_size

    def apply_chat_template(self, messages: list[dict[str, Any]], **_options: Any) -> str:
        """One user turn and the start of the answer; one placeholder for the image."""
        ((_, question),) = [message["content"] for message in messages]
        eos = self.tokenizer.eos_token
        image = f"{START_TOKEN}{PATCH_TOKEN}{END_TOKEN}"
        return f"<|system|>\n{SYSTEM}{eos}\n<|user|>\n{image}\n{question['text']}{eos}{ANSWER_LEAD}"

    def image_processor(
        self, pictures: Sequence[Image.Image], **_options: Any
    ) -> dict[str, Tensor]:
        """`pixel_values` [I, 3, size, size]."""
        size = (self._size, self._size)
        resized = [np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in pictures]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return {"pixel_values": (pixels - mean) / std}


class OmniLMMPrompter(Prompter):
    """An answer's tokens are those that it has behind `<|assistant|>`, not those it has alone."""

    def __init__(self, processor: OmniLMMProcessor, *, queries: int, source: str) -> None:
        super().__init__(processor, source=source, prompt="chat_template")
        self._queries = queries
        self._lead: list[int] = processor.tokenizer(ANSWER_LEAD, add_special_tokens=False)[
            "input_ids"
        ]

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, end of sequence included."""
        ids = self._tokenizer(f"{ANSWER_LEAD}{text}", add_special_tokens=False)["input_ids"]
        if ids[: len(self._lead)] != self._lead:
            raise ArtifactError(f"{text[:40]!r}: melts into the prompt's last token")
        return [*ids[len(self._lead) :], self.eos_id]

    def num_image_tokens(self, pixels: Tensor) -> int:
        """One per query, whatever the image."""
        return self._queries


def make_prompter(folder: Path, config: OmniLMMConfig) -> OmniLMMPrompter:
    """Tokenizer and image transform; raises ConfigError when tokens are not where they belong."""
    tokenizer = read_tokenizer(folder)
    found = tokenizer.convert_tokens_to_ids([PATCH_TOKEN, START_TOKEN, END_TOKEN])
    if found[0] != config.im_patch_token or len(set(found)) != 3:
        raise ConfigError(
            f"{folder}: {PATCH_TOKEN}, {START_TOKEN}, {END_TOKEN} are {found} in the tokenizer, "
            f"expected three tokens, the first {config.im_patch_token}"
        )
    processor = OmniLMMProcessor(tokenizer, config.image_size)
    return OmniLMMPrompter(processor, queries=config.num_query, source=str(folder))
