"""One more token for many rows, as one CUDA graph: fixed buffers, few kernels, no host in between.

The prompts' keys and values lie in a line and are read once per prompt and step, whatever the
number of samples; each row's own tokens are merged in by their log-sum-exp. On a CPU the same
function runs without a graph.

Shapes as in `kernels`;  V vocabulary.
"""

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlaifv.models import kernels_plain, lines

FIRST_ROOM = 128
"""Tokens per row that there is room for at first; doubles when it is full."""


class PrefixLine(NamedTuple):
    """Keys and values of B prompts, per layer [K, P, D]."""

    keys: list[Tensor]
    values: list[Tensor]
    starts_B: Tensor
    lengths_B: Tensor
    """int32, like the starts."""

    def select(self, prompts: Tensor) -> "PrefixLine":
        """Some of the prompts; nothing is copied."""
        return self._replace(starts_B=self.starts_B[prompts], lengths_B=self.lengths_B[prompts])


def supports(decoder: Any) -> bool:
    """Whether all is as the kernels take it: plain matrices without bias, SiLU, RMSNorm."""
    if not lines.supports(decoder) or decoder.config.hidden_act != "silu":
        return False
    layers = decoder.layers
    matrices = [part for layer in layers for part in _matrices(layer)]
    norms = [
        norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    return all(type(part) is nn.Linear and part.bias is None for part in matrices) and all(
        type(norm) is LlamaRMSNorm for norm in norms
    )


def _matrices(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    inner = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*inner, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class _Weights(NamedTuple):
    """Of a layer: matrices with the same input are one."""

    norm_E: Tensor
    qkv_XE: Tensor
    out_EX: Tensor
    post_norm_E: Tensor
    gate_up_XE: Tensor
    down_EI: Tensor


def _stacked(matrices: list[nn.Linear]) -> Tensor:
    """The weights below each other; the modules keep theirs as views, so nothing is held twice."""
    first = matrices[0].weight.data
    whole = first._base if first._base is not None else first
    counts = [len(matrix.weight) for matrix in matrices]
    together = len(whole) == sum(counts) and all(
        matrix.weight.data._base is whole for matrix in matrices
    )
    if not together:
        with torch.inference_mode(False):  # they may be trained later
            whole = torch.cat([matrix.weight.data for matrix in matrices])
            for matrix, part in zip(matrices, torch.split(whole, counts), strict=True):
                matrix.weight.data = part
    return whole


def _weights(layer: Any) -> _Weights:
    q, k, v, out, gate, up, down = _matrices(layer)
    return _Weights(
        layer.input_layernorm.weight.data,
        _stacked([q, k, v]),
        out.weight.data,
        layer.post_attention_layernorm.weight.data,
        _stacked([gate, up]),
        down.weight.data,
    )


class StaticSteps:
    """A decoding batch; see `generation.Steps`."""

    def __init__(self, decoder: Any, head: nn.Module, prefix: PrefixLine, num_rows: int) -> None:
        self._decoder, self._head, self._prefix = decoder, head, prefix
        self._weights = [_weights(layer) for layer in decoder.layers]
        like = prefix.keys[0]
        self._step_1 = torch.zeros(1, dtype=torch.int32, device=like.device)
        self._length = 0
        self._positions_N = self._step_1.new_zeros(num_rows, dtype=torch.long)
        self._tokens_N = self._positions_N.clone()
        self._keys = [self._new(num_rows, FIRST_ROOM, keys) for keys in prefix.keys]
        self._values = [self._new(num_rows, FIRST_ROOM, keys) for keys in prefix.keys]
        self._graph: Any = None
        self._logits_NV = torch.empty(0)
        self._ops: types.ModuleType = kernels_plain
        if like.is_cuda:
            from rlaifv.models import kernels  # Triton

            self._ops = kernels

    def _new(self, rows: int, room: int, like_KPD: Tensor) -> Tensor:
        heads, _, width = like_KPD.shape
        return like_KPD.new_empty(rows, heads, room, width)

    def advance(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        """Scores of the token after these, float32 [N, V]; overwritten by the next call."""
        if self._length == self._keys[0].shape[2]:
            self._grow()
        self._tokens_N.copy_(tokens_N)
        self._positions_N.copy_(positions_N)
        self._length += 1
        if not tokens_N.is_cuda:
            return self._forward()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits_NV

    def select(self, rows_N: Tensor, prompts_B: Tensor | None) -> None:
        """Keeps, repeats or reorders rows, and keeps some of the prompts."""
        self._forget()
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer.index_select(0, rows_N)
        self._tokens_N, self._positions_N = self._tokens_N[rows_N], self._positions_N[rows_N]
        if prompts_B is not None:
            self._prefix = self._prefix.select(prompts_B)

    def _grow(self) -> None:
        self._forget()
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                rows, _, room, _ = buffer.shape
                buffers[layer] = self._new(rows, 2 * room, self._prefix.keys[layer])
                buffers[layer][:, :, :room] = buffer

    def _forget(self) -> None:
        """The graph's addresses are about to change."""
        self._graph, self._logits_NV = None, torch.empty(0)

    def _capture(self) -> None:
        """Runs the step once, which compiles kernels, then records it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self._step_1.fill_(self._length - 1)  # that run does not count
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_NV = self._forward()

    def _forward(self) -> Tensor:
        ops, decoder, step_1 = self._ops, self._decoder, self._step_1
        x_NE = decoder.embed_tokens(self._tokens_N)
        cos, sin = decoder.rotary_emb(x_NE, position_ids=self._positions_N.unsqueeze(1))
        cos_ND, sin_ND = cos.squeeze(1), sin.squeeze(1)
        epsilon, scaling = decoder.config.rms_norm_eps, decoder.layers[0].self_attn.scaling
        spans = (self._prefix.starts_B, self._prefix.lengths_B)
        delta_NE: Tensor | None = None
        for layer, w in enumerate(self._weights):
            kept = (self._keys[layer], self._values[layer], step_1)
            normed_NE = ops.add_norm(x_NE, delta_NE, w.norm_E, epsilon)
            query_NHD = ops.rotate_and_keep(linear(normed_NE, w.qkv_XE), cos_ND, sin_ND, *kept)
            prefix = (self._prefix.keys[layer], self._prefix.values[layer], *spans)
            shared = ops.prefix_attention(query_NHD, *prefix, scaling)
            mixed_NX = ops.private_attention(query_NHD, *kept, shared, scaling)
            normed_NE = ops.add_norm(x_NE, linear(mixed_NX, w.out_EX), w.post_norm_E, epsilon)
            delta_NE = linear(ops.gate(linear(normed_NE, w.gate_up_XE)), w.down_EI)
        normed_NE = ops.add_norm(x_NE, delta_NE, decoder.norm.weight, epsilon)
        logits_NV: Tensor = self._head(normed_NE).float()
        step_1 += 1
        return logits_NV
