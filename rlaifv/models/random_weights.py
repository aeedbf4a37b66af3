"""LLaVAs and OmniLMMs of any shape with random weights, made offline: for benchmarks and tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlaifv.models.omnilmm import (
    END_TOKEN,
    PATCH_TOKEN,
    START_TOKEN,
    OmniLMMConfig,
    OmniLMMForCausalLM,
)

SPECIAL_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
}
PLACEHOLDER = "<image>"
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} ASSISTANT:"
)
_CORPUS = (
    "USER: Is there a red cup in the image? Please answer yes or no. ASSISTANT: Yes",
    "USER: Describe the image in detail. ASSISTANT: The picture shows a small dog.",
    "There is a blue chair and two green bottles stand on a wooden table near the window.",
    "I can also see a white cat, a black lamp and a person on the left.",
    *["yes", "Yes", "no", "No"] * 50,
)

OMNILMM_12B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
"""With the config's defaults: the published model."""
TINY_OMNILMM: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 40},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_query": 4, "resampler_heads": 4},
    "tower": {"width": 24, "blocks": 2, "heads": 4, "mlp": 48, "patch": 8, "table": 3},
    "initializer_range": 0.2,
}


class Shape(NamedTuple):
    """Sizes of a LLaVA. The defaults give a few hundred kilobytes and 4 image tokens."""

    hidden: int = 32
    intermediate: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int | None = None
    """None: the tokenizer's."""
    vision_hidden: int = 32
    vision_layers: int = 3
    vision_heads: int | None = None
    """None: as many as `heads`."""
    image_size: int = 28
    patch: int = 14
    initializer_range: float = 0.2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 512 tokens; `yes`, `Yes`, `no` and `No` are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[*SPECIAL_TOKENS.values(), PLACEHOLDER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": PLACEHOLDER},
        **SPECIAL_TOKENS,
    )


def text_config(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> LlamaConfig:
    """The language model of a shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        initializer_range=shape.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_processor(shape: Shape, *, chat_template: str | None = CHAT_TEMPLATE) -> LlavaProcessor:
    """Tokenizer and image transform of a shape."""
    size = {"height": shape.image_size, "width": shape.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=size),
        make_tokenizer(),
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=PLACEHOLDER,
        chat_template=chat_template,
    )


def make_llava(processor: LlavaProcessor, shape: Shape) -> LlavaForConditionalGeneration:
    """A model with weights from torch's global generator, on torch's default device and type."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=4 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads or shape.heads,
            image_size=shape.image_size,
            patch_size=shape.patch,
        ),
        text_config=text_config(tokenizer, shape),
        image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        vision_feature_layer=-2,
        image_seq_length=(shape.image_size // shape.patch) ** 2,
    )
    return LlavaForConditionalGeneration(config)


def save_random_llava(
    folder: Path, shape: Shape, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """A whole checkpoint in `folder`; changes torch's global generator."""
    processor = make_processor(shape, chat_template=chat_template)
    torch.manual_seed(seed)
    make_llava(processor, shape).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_random_omnilmm(folder: Path, shape: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A whole checkpoint with the published names in `folder`; changes torch's global generator."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([PATCH_TOKEN, START_TOKEN, END_TOKEN], special_tokens=True)
    config = OmniLMMConfig(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 2048, **shape},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        im_patch_token=tokenizer.convert_tokens_to_ids(PATCH_TOKEN),
    )
    torch.manual_seed(seed)
    OmniLMMForCausalLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder
