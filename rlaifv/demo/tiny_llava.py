"""A LLaVA of half a million parameters, its tokenizer and its processor, made from nothing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from rlaifv.demo.scenes import CELL_PX, GRID, IMAGE_PX

NUM_PATCHES = GRID * GRID
VOCABULARY_SIZE = 512
VISION_WIDTH = 64
TEXT_WIDTH = 96
IMAGE_TOKEN = "<image>"  # noqa: S105  # a token of the vocabulary, no secret
_SPECIAL_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
}
IGNORED = -100
"""Label of a token that the loss leaves out (PyTorch's `ignore_index`)."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %} ASSISTANT:{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""The shape of LLaVA-1.5's prompt. An answer follows without a space: byte-level pre-tokenisation
splits at the colon, so prompt and answer can be tokenised apart."""


class Turn(NamedTuple):
    """What is asked and what is answered."""

    question: str
    answer: str


class Example(NamedTuple):
    """A picture and turns about it that do not see one another."""

    pixels: npt.NDArray[np.uint8]
    turns: tuple[Turn, ...]


class Batch(NamedTuple):
    """Padded on the right. B: examples, L: tokens, H: height and width of the image."""

    input_ids_BL: torch.Tensor
    position_ids_BL: torch.Tensor
    attention_mask_B1LL: torch.Tensor
    """True where a token (first L) may look at another: its own turn and the image before it."""
    labels_BL: torch.Tensor
    """IGNORED except for the answers and their end tokens."""
    pixels_B3HH: torch.Tensor


def make_processor(texts: Iterable[str]) -> LlavaProcessor:
    """Byte-level BPE learned from texts (any string round-trips) and a PIL image processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[*_SPECIAL_TOKENS.values(), IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL_TOKENS,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PX},
        crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor,
        fast,
        patch_size=CELL_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Untrained weights from PyTorch's global generator: seed it before."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=CELL_PX,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        _start_as_lookup(layer.self_attn)
    return model


@torch.no_grad()
def _start_as_lookup(attention: LlamaAttention) -> None:
    """Keys equal to queries, output the inverse of values: look for what is alike and copy it.

    A noun then finds the patch that resembles it from the first step on. From random weights this
    matching is a plateau of thousands of steps.
    """
    std = TEXT_WIDTH**-0.5
    nn.init.normal_(attention.q_proj.weight, std=std)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    nn.init.normal_(attention.v_proj.weight, std=std)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T / 2)


def normalise(pixels: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """What the image processor makes of images of scene size: float32 [B, 3, H, H] in -1 to 1."""
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1.0


def encode_prompt(processor: LlavaProcessor, question: str) -> list[int]:
    """Token ids of one image and a question, ready to be answered."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    image_token = processor.image_token
    expanded = text.replace(image_token, image_token * NUM_PATCHES)
    ids: list[int] = processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    return ids


def make_batch(processor: LlavaProcessor, examples: Sequence[Example]) -> Batch:
    """All turns of an example in one row behind one image: the loss of each is that of it alone."""
    rows = [_pack(processor, example) for example in examples]
    shape = (len(rows), max(len(row.ids) for row in rows))
    input_ids_BL = torch.full(shape, processor.tokenizer.pad_token_id)
    position_ids_BL = torch.zeros(shape, dtype=torch.long)
    # Padding belongs to a turn of its own, so that no row of the mask is empty.
    turn_BL = torch.full(shape, -1)
    labels_BL = torch.full(shape, IGNORED)
    for index, row in enumerate(rows):
        here = (index, slice(len(row.ids)))
        input_ids_BL[here] = torch.tensor(row.ids)
        position_ids_BL[here] = torch.tensor(row.positions)
        turn_BL[here] = torch.tensor(row.turns)
        labels_BL[here] = torch.tensor(row.labels)
    same_turn_BLL = turn_BL[:, :, None] == turn_BL[:, None, :]
    shared_BLL = (turn_BL == 0)[:, None, :]
    causal_LL = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    attention_mask_BLL = (same_turn_BLL | shared_BLL) & causal_LL
    pixels_B3HH = normalise([example.pixels for example in examples])
    return Batch(input_ids_BL, position_ids_BL, attention_mask_BLL[:, None], labels_BL, pixels_B3HH)


class _Row(NamedTuple):
    ids: list[int]
    positions: list[int]
    turns: list[int]
    """0 for the tokens that all turns share, else the turn's number from 1."""
    labels: list[int]


def _pack(processor: LlavaProcessor, example: Example) -> _Row:
    tokenizer = processor.tokenizer
    prompts = [encode_prompt(processor, turn.question) for turn in example.turns]
    num_shared = prompts[0].index(processor.image_token_id) + NUM_PATCHES
    row = _Row(
        prompts[0][:num_shared],
        list(range(num_shared)),
        [0] * num_shared,
        [IGNORED] * num_shared,
    )
    for number, (prompt, turn) in enumerate(zip(prompts, example.turns, strict=True), start=1):
        question = prompt[num_shared:]
        answer = tokenizer(turn.answer, add_special_tokens=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        length = len(question) + len(answer)
        row.ids.extend(question + answer)
        row.positions.extend(range(num_shared, num_shared + length))
        row.turns.extend([number] * length)
        row.labels.extend([IGNORED] * len(question) + answer)
    return row
