"""Many rows in one line: the decoder's layers as compiled functions, attention by FlexAttention.

Rows of prefixes and branches follow each other without padding, so that every matrix product is
one large one; a block mask keeps them apart. Used on a GPU and for Llama's layers; `decoder.Decoder`
runs anything else through transformers.

Shapes:  L tokens of the line;  Q blocks of it;  T tokens of a block;  M positions that are read;
E width;  H heads;  K key-value heads;  D width of a head.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.models.llama.modeling_llama import LlamaModel, repeat_kv, rotate_half

from rlaifv.models import compilations

BLOCK = 128
"""FlexAttention's; lines are padded to a multiple of it. Layers take a line as blocks, so that the
compiler knows this whatever the length: kernels that look for the end are 1.7 times slower."""
MAX_COMPILED = 64
"""Versions of a layer: training and not, adapters, grown shapes. Beyond it, an error is better
than attention that silently runs ten times slower."""

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""[1, K, L, D] each."""


class Owners(NamedTuple):
    """Whose each token of a line is. Numbers rise along the line."""

    own_L: Tensor
    """Number of the token's prefix or branch; padding has one of its own."""
    prefix_L: Tensor
    """The prefix it also sees; for a prefix its own number."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions see positions; shapes broadcast."""
        owner = self.own_L[key]
        return (query >= key) & ((self.own_L[query] == owner) | (self.prefix_L[query] == owner))


def supports(decoder: Any) -> bool:
    """Whether these layers compute what the decoder's own forward does."""
    spread = hasattr(decoder.embed_tokens.weight, "ds_id")  # ZeRO-3: weights come with `forward`
    return type(decoder) is LlamaModel and not decoder.config.attention_dropout and not spread


def block_mask(owners: Owners) -> BlockMask:
    """The mask by blocks: which hold something visible, and which are visible throughout."""
    own_QT, prefix_QT = (part.view(-1, BLOCK) for part in owners)
    own_Q1T, prefix_Q1T = own_QT.unsqueeze(1), prefix_QT.unsqueeze(1)
    low_1Q1, high_1Q1 = own_QT[None, :, :1], own_QT[None, :, -1:]
    seen_QQ = ((low_1Q1 <= own_Q1T) & (own_Q1T <= high_1Q1)).any(-1)
    seen_QQ |= ((low_1Q1 <= prefix_Q1T) & (prefix_Q1T <= high_1Q1)).any(-1)
    throughout_QQ = ((own_Q1T == low_1Q1) | (prefix_Q1T == low_1Q1)).all(-1)
    throughout_QQ &= (low_1Q1 == high_1Q1).squeeze(-1)
    full_QQ = throughout_QQ.tril(-1)
    part_QQ = seen_QQ.tril() & ~full_QQ

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owners.visible(query, key)

    return BlockMask.from_kv_blocks(
        *_listed(part_QQ), *_listed(full_QQ), BLOCK_SIZE=BLOCK, mask_mod=visible
    )


def _listed(blocks_QQ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and which: those first."""
    counts_Q = blocks_QQ.sum(-1, dtype=torch.int32)
    order_QQ = blocks_QQ.int().sort(dim=-1, descending=True, stable=True).indices
    return counts_Q[None, None], order_QQ.int()[None, None].contiguous()


def run(
    decoder: Any,
    embeds_1LE: Tensor,
    positions_1L: Tensor,
    owners: Owners,
    sources_M: Tensor,
    *,
    keep: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Hidden states [M, E] at some positions; keeps gradients.

    The last layer computes keys and values of all tokens, and the rest only where it is read.
    `keep` is handed each layer's number, keys and values; only without gradients.
    """
    rope = decoder.rotary_emb(embeds_1LE, position_ids=positions_1L)
    mask = block_mask(owners)
    *layers, last = decoder.layers
    x_QTE, blocks = _blocks(embeds_1LE), (_blocks(rope[0]), _blocks(rope[1]))
    if torch.is_grad_enabled() and not x_QTE.requires_grad:
        x_QTE.requires_grad_()  # the same for every layer, or the first is compiled apart
    for number, layer in enumerate(layers):
        if keep is not None:
            x_QTE, keys, values = compiled(_layer_and_kv)(layer, x_QTE, blocks, mask)
            keep(number, keys, values)
        elif layer.gradient_checkpointing and layer.training and _drops(layer):
            x_QTE = checkpoint(compiled(_layer), layer, x_QTE, blocks, mask, use_reentrant=False)
        elif layer.gradient_checkpointing and layer.training:
            x_QTE = compiled(_recomputed_layer)(layer, x_QTE, blocks, mask)
        else:
            x_QTE = compiled(_layer)(layer, x_QTE, blocks, mask)
    x_1LE = _line(x_QTE)
    every_L = torch.arange(len(owners.own_L), device=sources_M.device)
    mask_ML = owners.visible(sources_M[:, None], every_L[None, :])
    x_ME, keys, values = _last_layer(last, x_1LE, rope, mask_ML, sources_M)
    if keep is not None:
        keep(len(layers), keys, values)
    return cast(Tensor, decoder.norm(x_ME))


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU one compilation serves all layers and sizes; on a CPU the function itself.

    Sizes vary from the start: compiled for the first ones and then again for all others, results
    would depend in their last bits on what a process has seen before.
    """
    if not torch.cuda.is_available():
        return function
    compilations.load()
    torch._dynamo.config.recompile_limit = MAX_COMPILED
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # It warns of operations in place, once per process, whatever a checkpointed region holds.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    return torch.compile(function, dynamic=True)


def _heads(x_1LX: Tensor, width: int) -> Tensor:
    return x_1LX.view(*x_1LX.shape[:2], -1, width).transpose(1, 2)


def _rotated(x_1HLD: Tensor, cos_1LD: Tensor, sin_1LD: Tensor) -> Tensor:
    half_turned = cast(Tensor, rotate_half(x_1HLD))
    return x_1HLD * cos_1LD.unsqueeze(1) + half_turned * sin_1LD.unsqueeze(1)


def _blocks(x_1LX: Tensor) -> Tensor:
    return x_1LX.reshape(-1, BLOCK, x_1LX.shape[2])


def _line(x_QTX: Tensor) -> Tensor:
    return x_QTX.view(1, x_QTX.shape[0] * BLOCK, x_QTX.shape[2])


def _layer_and_kv(
    layer: Any, x_QTE: Tensor, blocks: Rope, mask: BlockMask
) -> tuple[Tensor, Tensor, Tensor]:
    x_1LE, rope = _line(x_QTE), (_line(blocks[0]), _line(blocks[1]))
    attention = layer.self_attn
    normed_1LE = layer.input_layernorm(x_1LE)
    query = _heads(attention.q_proj(normed_1LE), attention.head_dim)
    keys = _heads(attention.k_proj(normed_1LE), attention.head_dim)
    values = _heads(attention.v_proj(normed_1LE), attention.head_dim)
    query, keys = _rotated(query, *rope), _rotated(keys, *rope)
    mixed_1HLD = flex_attention(
        query,
        keys,
        values,
        block_mask=mask,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    x_1LE = x_1LE + attention.o_proj(mixed_1HLD.transpose(1, 2).flatten(2))
    x_1LE = x_1LE + layer.mlp(layer.post_attention_layernorm(x_1LE))
    return x_1LE.view_as(x_QTE), keys, values


def _layer(layer: Any, x_QTE: Tensor, blocks: Rope, mask: BlockMask) -> Tensor:
    return _layer_and_kv(layer, x_QTE, blocks, mask)[0]


def _recomputed_layer(layer: Any, x_QTE: Tensor, blocks: Rope, mask: BlockMask) -> Tensor:
    """Keeps its input and what attention made; the backward pass computes the rest again.

    Compiled as a whole, so that it leaves out what no gradient needs: the last matrix product.
    Not for layers with dropout: torch 2.11 cannot draw the same numbers again inside.
    """
    out_QTE: Tensor = checkpoint(
        _layer, layer, x_QTE, blocks, mask, use_reentrant=False, context_fn=_keeping_attention
    )
    return out_QTE


def _drops(layer: Any) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in layer.modules())


def _keeping_attention() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    if operation is torch.ops.higher_order.flex_attention:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _last_layer(
    layer: Any, x_1LE: Tensor, rope: Rope, mask_ML: Tensor, sources_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Like any layer, but only some positions ask."""
    attention = layer.self_attn
    normed_1LE = layer.input_layernorm(x_1LE)
    keys = _heads(attention.k_proj(normed_1LE), attention.head_dim)
    values = _heads(attention.v_proj(normed_1LE), attention.head_dim)
    query = _heads(attention.q_proj(normed_1LE[:, sources_M]), attention.head_dim)
    cos, sin = rope
    query = _rotated(query, cos[:, sources_M], sin[:, sources_M])
    keys, groups = _rotated(keys, cos, sin), attention.num_key_value_groups
    mixed_1HMD = scaled_dot_product_attention(
        query,
        repeat_kv(keys, groups),
        repeat_kv(values, groups),
        attn_mask=mask_ML[None, None],
        scale=attention.scaling,
    )
    x_1ME = x_1LE[:, sources_M] + attention.o_proj(mixed_1HMD.transpose(1, 2).flatten(2))
    return (x_1ME + layer.mlp(layer.post_attention_layernorm(x_1ME)))[0], keys, values
