"""What `kernels` computes, in plain PyTorch: for the CPU, and as the measure of those kernels.

Shapes as in `kernels`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def add_norm(x_NE: Tensor, delta_NE: Tensor | None, weight_E: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x + delta, which also replaces x."""
    if delta_NE is not None:
        x_NE += delta_NE
    wide_NE = x_NE.float()
    wide_NE = wide_NE * (wide_NE.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return wide_NE.to(x_NE.dtype) * weight_E


def gate(gate_up_NX: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]; the two lie side by side in X = 2 * I."""
    gated_NI, up_NI = gate_up_NX.chunk(2, -1)
    return functional.silu(gated_NI) * up_NI


def rotate_and_keep(
    qkv_NX: Tensor,
    cos_ND: Tensor,
    sin_ND: Tensor,
    keys_NKTD: Tensor,
    values_NKTD: Tensor,
    step_1: Tensor,
) -> Tensor:
    """Rotated queries [N, H, D]; the rotated key and the value go into the caches at `step_1`."""
    _, kv_heads, _, width = keys_NKTD.shape
    heads_NHD = qkv_NX.view(len(qkv_NX), -1, width).float()
    turns_NHD, value_NKD = heads_NHD[:, :-kv_heads], heads_NHD[:, -kv_heads:]
    low, high = turns_NHD.chunk(2, -1)
    turned_NHD = torch.cat([-high, low], -1)
    rotated_NHD = turns_NHD * cos_ND[:, None].float() + turned_NHD * sin_ND[:, None].float()
    rotated_NHD = rotated_NHD.to(qkv_NX.dtype)
    keys_NKTD.index_copy_(2, step_1.long(), rotated_NHD[:, -kv_heads:].unsqueeze(2))
    values_NKTD.index_copy_(2, step_1.long(), value_NKD.to(qkv_NX.dtype).unsqueeze(2))
    return rotated_NHD[:, :-kv_heads].contiguous()


def prefix_attention(
    query_NHD: Tensor,
    keys_KPD: Tensor,
    values_KPD: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the prompts' tokens alone, float32 [N, H, D], and its log2-sum-exp [N, H]."""
    groups = query_NHD.shape[1] // len(keys_KPD)
    outs, lses = [], []
    queries = query_NHD.float().chunk(len(starts_B))
    spans = zip(starts_B.tolist(), lengths_B.tolist(), strict=True)
    for query_SHD, (start, length) in zip(queries, spans, strict=True):
        keys_HLD = keys_KPD[:, start : start + length].float().repeat_interleave(groups, 0)
        values_HLD = values_KPD[:, start : start + length].float().repeat_interleave(groups, 0)
        scores_SHL = torch.einsum("shd,hld->shl", query_SHD, keys_HLD) * scaling
        outs.append(torch.einsum("shl,hld->shd", scores_SHL.softmax(-1), values_HLD))
        lses.append(scores_SHL.logsumexp(-1) / math.log(2))
    return torch.cat(outs), torch.cat(lses)


def private_attention(
    query_NHD: Tensor,
    keys_NKTD: Tensor,
    values_NKTD: Tensor,
    step_1: Tensor,
    prefix: tuple[Tensor, Tensor],
    scaling: float,
) -> Tensor:
    """Attention over the tokens up to `step_1`, merged with that over the prefix: [N, H * D]."""
    groups, end = query_NHD.shape[1] // keys_NKTD.shape[1], int(step_1) + 1
    keys_NHTD = keys_NKTD[:, :, :end].float().repeat_interleave(groups, 1)
    values_NHTD = values_NKTD[:, :, :end].float().repeat_interleave(groups, 1)
    scores_NHT = torch.einsum("nhd,nhtd->nht", query_NHD.float(), keys_NHTD) * scaling
    own_NHD = torch.einsum("nht,nhtd->nhd", scores_NHT.softmax(-1), values_NHTD)
    own_lse_NH = scores_NHT.logsumexp(-1) / math.log(2)
    prefix_NHD, prefix_lse_NH = prefix
    share_NH1 = torch.sigmoid((own_lse_NH - prefix_lse_NH) * math.log(2)).unsqueeze(-1)
    merged_NHD = prefix_NHD * (1 - share_NH1) + own_NHD * share_NH1
    return merged_NHD.to(query_NHD.dtype).flatten(1)
