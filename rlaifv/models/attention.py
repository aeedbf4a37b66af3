"""Which token sees which, and attention in which many rows share the keys of one prefix.

Shapes:  B prompts;  L tokens of a row;  P prefix tokens;  S samples per prompt;  N = B * S rows;
T tokens since the prefix;  H heads;  K key-value heads;  G = H / K;  D width of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "rlaifv"
"""Pass it to `from_pretrained(attn_implementation=...)`: the one place where attention is chosen.

It is PyTorch's SDPA, plus the shared prefix. A faster kernel goes here and nowhere else.
"""

PREFIX = 0
PADDING = -1


def segment_mask(segments_BL: Tensor) -> Tensor:
    """Who may look at whom, bool [B, 1, L, L]: causal; a branch sees the prefix and itself.

    Segments are PREFIX, 1, 2, ... for the branches, PADDING after the end. Padding sees padding,
    so that no row of the mask is empty (softmax of nothing is NaN, and NaN times 0 is NaN).
    """
    length = segments_BL.shape[1]
    query_BL1, key_B1L = segments_BL.unsqueeze(2), segments_BL.unsqueeze(1)
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    visible_BLL = (query_BL1 == key_B1L) | (key_B1L == PREFIX)
    return (visible_BLL & causal_LL).unsqueeze(1)


class SharedPrefix(NamedTuple):
    """Keys and values of B prompts, per layer [B, K, P, D]; read by all samples of a prompt."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias_B11P: Tensor
    """0 where there is a token, -inf at padding; float32."""

    def select(self, prompts: Tensor) -> "SharedPrefix":
        """The same for some of the prompts."""
        keys = tuple(layer.index_select(0, prompts.to(layer.device)) for layer in self.keys)
        values = tuple(layer.index_select(0, prompts.to(layer.device)) for layer in self.values)
        return SharedPrefix(keys, values, self.bias_B11P.index_select(0, prompts))


class PrivateCache:
    """Keys and values since the prefix, per layer [N, K, T, D]; what the model calls a cache.

    Buffers grow by doubling. After each pass call `advance`.
    """

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._length = 0

    def update(self, keys_NK1D: Tensor, values_NK1D: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Adds one token per row; everything so far. Called by the layers."""
        end = self._length + 1
        if layer not in self._keys or self._keys[layer].shape[2] < end:
            self._keys[layer] = self._grown(self._keys.get(layer), keys_NK1D)
            self._values[layer] = self._grown(self._values.get(layer), values_NK1D)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._length] = keys_NK1D[:, :, 0]
        values[:, :, self._length] = values_NK1D[:, :, 0]
        return keys[:, :, :end], values[:, :, :end]

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        capacity = 16 if old is None else 2 * old.shape[2]
        grown = like.new_empty(rows, heads, capacity, width)
        if old is not None:
            grown[:, :, : old.shape[2]] = old
        return grown

    def advance(self) -> None:
        self._length += 1

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows."""
        for buffers in (self._keys, self._values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer.index_select(0, rows.to(buffer.device))

    def get_seq_length(self, layer: int = 0) -> int:
        return self._length


def _prefix_attention(
    query_NHD: Tensor, private: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor], bias: Tensor
) -> Tensor:
    """Attention of one scaled query per row over prefix and private tokens: [N, 1, H, D].

    One softmax over both parts, so the result is that of the concatenated keys; the prefix is
    read once per prompt, not once per sample.
    """
    (keys_NKTD, values_NKTD), (keys_BKPD, values_BKPD) = private, prefix
    (prompts, heads, width), rows = (*keys_BKPD.shape[:2], keys_BKPD.shape[3]), len(query_NHD)
    samples, group = rows // prompts, query_NHD.shape[1] // heads

    def by_prompt(x_NKGX: Tensor) -> Tensor:  # -> [B, K, S * G, X]
        parts = x_NKGX.view(prompts, samples, heads, group, -1)
        return parts.transpose(1, 2).reshape(prompts, heads, samples * group, -1)

    def by_row(x_BKRX: Tensor) -> Tensor:  # -> [N, K, G, X]
        parts = x_BKRX.view(prompts, heads, samples, group, -1)
        return parts.transpose(1, 2).reshape(rows, heads, group, -1)

    query_NKGD = query_NHD.view(rows, heads, group, width)
    scores_BKRP = by_prompt(query_NKGD) @ keys_BKPD.transpose(2, 3)
    scores_NKGT = query_NKGD @ keys_NKTD.transpose(2, 3)
    scores_BKRX = torch.cat([scores_BKRP.float() + bias, by_prompt(scores_NKGT).float()], -1)
    weights_BKRX = scores_BKRX.softmax(-1).to(query_NHD.dtype)
    length = keys_BKPD.shape[2]
    out_NKGD = by_row(weights_BKRX[..., :length] @ values_BKPD)
    out_NKGD = out_NKGD + by_row(weights_BKRX[..., length:].contiguous()) @ values_NKTD
    return out_NKGD.reshape(rows, 1, heads * group, width)


def _attend(
    module: nn.Module,
    query_NHLD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # the signature is transformers'
) -> tuple[Tensor, Tensor | None]:
    shared: SharedPrefix | None = options.pop("shared_prefix", None)
    if shared is None:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query_NHLD, key, value, attention_mask, **options
        )
        return output
    layer: int = module.layer_idx  # type: ignore[assignment]
    query_NHD = query_NHLD[:, :, 0] * options["scaling"]
    prefix = (shared.keys[layer], shared.values[layer])
    bias_B11P = shared.bias_B11P.to(query_NHD.device)  # layers may lie on several devices
    return _prefix_attention(query_NHD, (key, value), prefix, bias_B11P), None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
