"""GPU kernels of a decoding step: what lies between its matrix products, in Triton.

Each does the arithmetic of the plain function of the same name in `steps`, which the CPU runs and
which the tests hold these against (in Triton's interpreter). Sums and softmax are in float32.

Shapes:  B prompts;  S samples per prompt;  N = B * S rows;  H heads;  K key-value heads;
G = H / K;  D width of a head, a power of two;  P prefix tokens of all prompts in a line;
T room for tokens since the prefix;  E width;  I width inside the MLP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
QUERIES, TOKENS, HEADS = 16, 64, 32
"""Of a tile."""
OWN_TOKENS, OWN_WARPS = 32, 1
"""Of a tile of a row's own tokens."""


def add_norm(x_NE: Tensor, delta_NE: Tensor | None, weight_E: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x + delta, which also replaces x."""
    out_NE = torch.empty_like(x_NE)
    rows, width = x_NE.shape
    _add_norm[(rows,)](
        x_NE, delta_NE if delta_NE is not None else x_NE, weight_E, out_NE, epsilon,
        E=width, BLOCK=triton.next_power_of_2(width), ADD=delta_NE is not None, num_warps=8,
    )  # fmt: skip
    return out_NE


@triton.jit
def _add_norm(
    x, delta, weight, out, epsilon, E: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < E
    at = row * E + column
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        value = value + tl.load(delta + at, mask=inside, other=0.0)
        tl.store(x + at, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / E + epsilon)
    scaled = wide.to(value.dtype) * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + at, scaled, mask=inside)


def gate(gate_up_NX: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]; the two lie side by side in X = 2 * I."""
    rows, width = gate_up_NX.shape[0], gate_up_NX.shape[1] // 2
    out_NI = gate_up_NX.new_empty(rows, width)
    _gate[(rows, triton.cdiv(width, 2048))](gate_up_NX, out_NI, I=width, BLOCK=2048)
    return out_NI


@triton.jit
def _gate(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    gated = tl.load(gate_up + row * 2 * I + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * I + I + column, mask=inside, other=0.0)
    wide = gated.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gated.dtype)
    tl.store(out + row * I + column, silu * up, mask=inside)


def rotate_and_keep(
    qkv_NX: Tensor,
    cos_ND: Tensor,
    sin_ND: Tensor,
    keys_NKTD: Tensor,
    values_NKTD: Tensor,
    step_1: Tensor,
) -> Tensor:
    """Rotated queries [N, H, D]; the rotated key and the value go into the caches at `step_1`."""
    rows, kv_heads, room, width = keys_NKTD.shape
    heads = qkv_NX.shape[1] // width - 2 * kv_heads
    query_NHD = qkv_NX.new_empty(rows, heads, width)
    _rotate[(rows, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        qkv_NX, cos_ND, sin_ND, query_NHD, keys_NKTD, values_NKTD, step_1,
        H=heads, K=kv_heads, T=room, D=width, HEADS=HEADS,
    )  # fmt: skip
    return query_NHD


@triton.jit
def _rotate(
    qkv, cos, sin, query, keys, values, step,
    H: tl.constexpr, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, D // 2)[None, :]
    inside = (head < H + 2 * K) & (half < D)
    at = qkv + row * (H + 2 * K) * D + head * D + half
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + row * D + half).to(tl.float32)
    s = tl.load(sin + row * D + half).to(tl.float32)
    rotates = head < H + K
    new_low = tl.where(rotates, low * c - high * s, low).to(query.dtype.element_ty)
    new_high = tl.where(rotates, high * c + low * s, high).to(query.dtype.element_ty)
    to_query = query + (row * H + head) * D + half
    slot = tl.load(step)
    to_key = keys + ((row * K + head - H) * T + slot) * D + half
    to_value = values + ((row * K + head - H - K) * T + slot) * D + half
    is_query, is_value = inside & (head < H), inside & (head >= H + K)
    is_key = inside & (head >= H) & (head < H + K)
    tl.store(to_query, new_low, mask=is_query)
    tl.store(to_query + D // 2, new_high, mask=is_query)
    tl.store(to_key, new_low, mask=is_key)
    tl.store(to_key + D // 2, new_high, mask=is_key)
    tl.store(to_value, new_low, mask=is_value)
    tl.store(to_value + D // 2, new_high, mask=is_value)


def prefix_attention(
    query_NHD: Tensor,
    keys_KPD: Tensor,
    values_KPD: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the prompts' tokens alone, float32 [N, H, D], and its log2-sum-exp [N, H].

    A prompt's keys are read once for all its samples.
    """
    (rows, heads, width), (kv_heads, total, _) = query_NHD.shape, keys_KPD.shape
    prompts = len(starts_B)
    queries = rows // prompts * (heads // kv_heads)
    out_NHD = torch.empty_like(query_NHD, dtype=torch.float32)
    lse_NH = out_NHD.new_empty(rows, heads)
    _prefix[(prompts, kv_heads, triton.cdiv(queries, QUERIES))](
        query_NHD, keys_KPD, values_KPD, starts_B, lengths_B, out_NHD, lse_NH, total, scaling,
        S=rows // prompts, G=heads // kv_heads, H=heads, D=width,
        QUERIES=QUERIES, TOKENS=TOKENS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_NHD, lse_NH


@triton.jit
def _prefix(
    query, keys, values, starts, lengths, out, lse, total, scaling,
    S: tl.constexpr, G: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    prompt, kv_head = tl.program_id(0), tl.program_id(1)
    index = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    inside = index < S * G
    place = (prompt * S + index // G) * H + kv_head * G + index % G  # row and head
    column = tl.arange(0, D)
    to_query = place[:, None] * D + column[None, :]
    q = tl.load(query + to_query, mask=inside[:, None], other=0.0)
    length = tl.load(lengths + prompt)
    first = (kv_head * total + tl.load(starts + prompt)).to(tl.int64)
    best = tl.full([QUERIES], -float("inf"), tl.float32)
    mass = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, D], tl.float32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = (token < length)[:, None]
        at = (first + token)[:, None] * D + column[None, :]
        key = tl.load(keys + at, mask=there, other=0.0)
        value = tl.load(values + at, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * (scaling * LOG2E)
        scores = tl.where((token < length)[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        mass = mass * fade + tl.sum(weights, 1)
        new = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        sums = sums * fade[:, None] + new
        best = new_best
    tl.store(out + to_query, sums / mass[:, None], mask=inside[:, None])
    tl.store(lse + place, best + tl.log2(mass), mask=inside)


def private_attention(
    query_NHD: Tensor,
    keys_NKTD: Tensor,
    values_NKTD: Tensor,
    step_1: Tensor,
    prefix: tuple[Tensor, Tensor],
    scaling: float,
) -> Tensor:
    """Attention over the tokens up to `step_1`, merged with that over the prefix: [N, H * D]."""
    rows, kv_heads, room, width = keys_NKTD.shape
    heads = query_NHD.shape[1]
    out_NX = query_NHD.new_empty(rows, heads * width)
    _private[(rows, heads)](
        query_NHD, keys_NKTD, values_NKTD, step_1, *prefix, out_NX, scaling,
        H=heads, K=kv_heads, T=room, D=width, TOKENS=OWN_TOKENS, num_warps=OWN_WARPS,
    )  # fmt: skip
    return out_NX


@triton.jit
def _private(
    query, keys, values, step, prefix_out, prefix_lse, out, scaling,
    H: tl.constexpr, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, D)
    place = row * H + head
    q = tl.load(query + place * D + column).to(tl.float32) * (scaling * LOG2E)
    first = (row * K + head // (H // K)) * T
    best = tl.load(prefix_lse + place)  # the prefix is the first part of a softmax in parts
    mass = best * 0.0 + 1.0
    sums = tl.load(prefix_out + place * D + column)
    length = tl.load(step) + 1
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = (token < length)[:, None]
        at = (first + token)[:, None] * D + column[None, :]
        key = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
        value = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(token < length, tl.sum(key * q[None, :], 1), -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp2(scores - new_best)
        fade = tl.exp2(best - new_best)
        mass = mass * fade + tl.sum(weights, 0)
        sums = sums * fade + tl.sum(weights[:, None] * value, 0)
        best = new_best
    tl.store(out + place * D + column, (sums / mass).to(out.dtype.element_ty))
