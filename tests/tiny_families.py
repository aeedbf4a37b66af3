"""Random models of other families with their processors, a few hundred kilobytes each.

Processors are written as files, since some of them cannot be made without torchvision.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from rlaifv.models.random_weights import CHAT_TEMPLATE, Shape, make_tokenizer, text_config

_CLIP = {
    **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
}
_TEXT = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "bos_token_id": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2},
    **{"max_position_embeddings": 2048, "initializer_range": 0.2},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _template(image: str) -> str:
    return CHAT_TEMPLATE.replace("<image>", image)


def _save(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    processor: Mapping[str, Any] | None = None,
    *,
    template: str = CHAT_TEMPLATE,
) -> Path:
    torch.manual_seed(0)
    values = dict(config)
    model_type = values.pop("model_type")
    made = AutoConfig.for_model(model_type, **values)
    AutoModelForImageTextToText.from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _tokenizer(named: dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(named.values()), special_tokens=True)
    base = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens=named,
        **{
            f"{kind}_token": getattr(tokenizer, f"{kind}_token")
            for kind in ("unk", "bos", "eos", "pad")
        },
    )
    return base


def llava_next(folder: Path) -> Path:
    """Several tiles per image, so that token counts depend on the image."""
    tokenizer, pinpoints = make_tokenizer(), [[28, 56], [56, 28], [56, 56]]
    config = {
        "model_type": "llava_next",
        "vision_config": _CLIP,
        "text_config": text_config(tokenizer, Shape()),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_grid_pinpoints": pinpoints,
        "vision_feature_layer": -2,
    }
    _save(folder, config, tokenizer)
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


def _qwen(folder: Path, model_type: str, vision: Mapping[str, Any], patch: int) -> Path:
    tokenizer = _tokenizer(
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        }
    )
    ids = tokenizer.convert_tokens_to_ids
    config = {
        "model_type": model_type,
        "vision_config": {"patch_size": patch, "depth": 2, "num_heads": 4, **vision},
        "text_config": {**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": _MROPE},
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    processor = {
        **{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch},
        **{"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 16 * (2 * patch) ** 2},
        **{"temporal_patch_size": 2, "merge_size": 2},
    }
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return _save(folder, config, tokenizer, processor, template=_template(image))


def qwen2_5_vl(folder: Path) -> Path:
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1], "initializer_range": 0.2}
    return _qwen(folder, "qwen2_5_vl", vision, 14)


def qwen3_vl(folder: Path) -> Path:
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }
    return _qwen(folder, "qwen3_vl", vision, 16)


def internvl(folder: Path) -> Path:
    tokenizer = _tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "image_size": [28, 28], "patch_size": [7, 7]},
        "initializer_range": 0.2,
    }
    config = {
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": {**_TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": 4,
    }
    _save(
        folder,
        config,
        tokenizer,
        {
            **{"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True},
            **{"min_patches": 1, "max_patches": 4, "size": {"height": 28, "width": 28}},
        },
        template=_template("<IMG_CONTEXT>"),
    )
    values = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    (folder / "processor_config.json").write_text(json.dumps(values))
    return folder


def minicpmv4_6(folder: Path) -> Path:
    return _minicpmv(folder, "minicpmv4_6")


def minicpmv4_7(folder: Path) -> Path:
    return _minicpmv(folder, "minicpmv4_7")


def _minicpmv(folder: Path, model_type: str) -> Path:
    tokenizer = _tokenizer(
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image_start>",
            "image_end_token": "</image_start>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        }
    )
    ids = tokenizer.convert_tokens_to_ids
    config = {
        "model_type": model_type,
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "image_size": 56, "patch_size": 14, "insert_layer_id": 1},
        },
        "text_config": {
            **_TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
            "layer_types": ["linear_attention", "full_attention"],
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
        "insert_layer_id": 1,
        "image_size": 56,
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
    }
    if model_type == "minicpmv4_7":
        config |= {
            "image_start_id": ids("<image_start>"),
            "image_end_id": ids("</image_start>"),
            "slice_start_id": ids("<slice>"),
            "slice_end_id": ids("</slice>"),
            "newline_id": ids("\u010a"),
        }
    return _save(
        folder,
        config,
        tokenizer,
        {
            **{"image_processor_type": "MiniCPMV4_6ImageProcessor", "max_slice_nums": 4},
            **{"scale_resolution": 56, "patch_size": 14},
        },
        template=_template("<|image_pad|>"),
    )


FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    made.__name__: made
    for made in (llava_next, qwen2_5_vl, qwen3_vl, internvl, minicpmv4_6, minicpmv4_7)
}
