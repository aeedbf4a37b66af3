"""Choosing the next token: greedy, or at random from a filtered distribution.

Shapes:  N rows;  T steps;  V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlaifv.models.base import Decoding


def draw_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Random numbers in [0, 1), float64 [N, T]: row n follows from its seed alone."""
    rows = [np.random.Generator(np.random.PCG64(seed)).random(steps) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def filtered_probabilities(logits_NV: Tensor, decoding: Decoding) -> Tensor:
    """Probabilities, float32 [N, V], after temperature, then top-k, then top-p.

    The order and the meaning are those of transformers' `generate`: top-p looks at the
    probabilities that top-k left, and keeps the token that crosses the threshold. Equal scores
    share their fate, so that the result does not hang on the order of a sort.
    """
    scores_NV = logits_NV / decoding.temperature
    if 0 < decoding.top_k < scores_NV.shape[1]:
        worst_N1 = scores_NV.topk(decoding.top_k).values[:, -1:]
        scores_NV = scores_NV.masked_fill(scores_NV < worst_N1, -torch.inf)
    probabilities_NV = scores_NV.softmax(-1)
    if decoding.top_p < 1:
        sorted_NV = probabilities_NV.sort(descending=True).values
        before_NV = sorted_NV.cumsum(-1) - sorted_NV
        kept_N1 = (before_NV < decoding.top_p).sum(-1, keepdim=True)
        worst_N1 = sorted_NV.gather(1, kept_N1 - 1)
        probabilities_NV = probabilities_NV.masked_fill(probabilities_NV < worst_N1, 0.0)
    return probabilities_NV


def penalised(scores_NV: Tensor, said_NV: Tensor, penalty: float) -> Tensor:
    """Scores with those of tokens that were said made worse (arXiv 1909.05858, section 4.1)."""
    worse_NV = torch.where(scores_NV > 0, scores_NV / penalty, scores_NV * penalty)
    return torch.where(said_NV, worse_NV, scores_NV)


def pick(logits_NV: Tensor, uniforms_N: Tensor, decoding: Decoding) -> Tensor:
    """The next token of each row, [N]; uniforms are not looked at when decoding is greedy.

    Inverse of the cumulative distribution in vocabulary order: small changes of the logits
    rarely change the token, and no generator's state is shared by rows.
    """
    if decoding.temperature == 0:
        return logits_NV.argmax(-1)
    cumulative_NV = filtered_probabilities(logits_NV, decoding).double().cumsum(-1)
    target_N1 = uniforms_N.unsqueeze(1) * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, target_N1, right=True).squeeze(1)
