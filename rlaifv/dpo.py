"""Direct preference optimisation as formulas: answer log-probabilities, losses, what to watch.

Everything is float32, pure and differentiable; log-probabilities are in nats.
Shapes:  P pairs;  R rows (answers);  T tokens;  V vocabulary.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlaifv.config import LossConfig

IGNORED = -100
"""Label of a token that is not scored (PyTorch's `ignore_index`)."""


class PairLogps(NamedTuple):
    """Log-probability of each pair's two answers under the policy and the reference, each [P]."""

    policy_chosen_P: Tensor
    policy_rejected_P: Tensor
    reference_chosen_P: Tensor
    reference_rejected_P: Tensor

    def deltas(self) -> Tensor:
        """Log-ratio of the chosen answer minus that of the rejected one, [P]: margins before beta."""
        chosen_P = self.policy_chosen_P - self.reference_chosen_P
        return chosen_P - (self.policy_rejected_P - self.reference_rejected_P)


class PairMetrics(NamedTuple):
    """What training curves show, per pair and without gradient, each [P]."""

    rewards_chosen_P: Tensor
    """beta * (policy - reference)."""
    rewards_rejected_P: Tensor
    margins_P: Tensor
    """Reward of the chosen answer minus that of the rejected one."""
    accuracies_P: Tensor
    """1.0 where the chosen answer has the larger reward, else 0.0; a tie is 0.0."""
    logps_chosen_P: Tensor
    logps_rejected_P: Tensor
    drift_chosen_P: Tensor
    """Policy minus reference log-probability of the chosen answer, in nats."""


# --- log-probabilities ---------------------------------------------------------------------------


def label_logps(logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
    """Log-probability of label t under logits t, 0 where the label is IGNORED: float32 [R, T].

    For logits that are already aligned with their labels (the release's `get_batch_logps_minicpm`
    uses them so, and drops the last position of both).
    """
    scored_RT = labels_RT != IGNORED
    index_RT1 = labels_RT.masked_fill(~scored_RT, 0).unsqueeze(-1)
    logps_RTV = logits_RTV.float().log_softmax(-1)
    return logps_RTV.gather(-1, index_RT1).squeeze(-1).masked_fill(~scored_RT, 0.0)


def token_logps(logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
    """Log-probability of label t under logits t-1: float32 [R, T-1]; the first is never scored.

    Release: `get_batch_logps`, per-token output.
    """
    return label_logps(logits_RTV[:, :-1], labels_RT[:, 1:])


def sum_logps(logps_RT: Tensor) -> Tensor:
    """Log-probability of each answer, [R]: the sum over its tokens (release: the default)."""
    return logps_RT.sum(-1)


def average_logps(logps_RT: Tensor, scored_RT: Tensor) -> Tensor:
    """Mean log-probability per scored token, [R] (release: `dpo_use_average`)."""
    return weighted_average_logps(logps_RT, scored_RT.to(logps_RT.dtype))


def weighted_logps(logps_RT: Tensor, weights_RT: Tensor) -> Tensor:
    """Sum of weight * log-probability, [R] (release: `dpo_token_weighted` without average)."""
    return (logps_RT * weights_RT).sum(-1)


def weighted_average_logps(logps_RT: Tensor, weights_RT: Tensor) -> Tensor:
    """Sum of weight * log-probability over the sum of weights, [R].

    With `changed_token_weights` this is the answer score of DDPO (RLHF-V, arXiv 2312.00849). A row
    whose weights are all 0 gives NaN.
    """
    return weighted_logps(logps_RT, weights_RT) / weights_RT.sum(-1)


def changed_token_weights(
    tokens: Sequence[int], other: Sequence[int], *, changed_weight: float, min_match: int = 3
) -> list[float]:
    """One weight per token of `tokens`: `changed_weight` where it differs from `other`, else 1.

    A token counts as unchanged if it lies in a common run of at least `min_match` tokens; both
    the rule and the 3 are the release's.
    """
    weights = [changed_weight] * len(tokens)
    matcher = difflib.SequenceMatcher(None, tokens, other, autojunk=False)
    for start, _, size in matcher.get_matching_blocks():
        if size >= min_match:
            weights[start : start + size] = [1.0] * size
    return weights


# --- losses: PairLogps in, one value per pair out ------------------------------------------------


def sigmoid_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta * delta), [P]: DPO (paper, equation 2; arXiv 2305.18290, equation 7)."""
    return -functional.logsigmoid(beta * logps.deltas())


def smoothed_loss(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """cDPO, [P]: the DPO loss if a share `label_smoothing` of the pairs is the wrong way round.

    E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023.
    """
    logits_P = beta * logps.deltas()
    kept_P, flipped_P = functional.logsigmoid(logits_P), functional.logsigmoid(-logits_P)
    return -(1 - label_smoothing) * kept_P - label_smoothing * flipped_P


def robust_loss(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, [P]: unbiased under flips at rate `label_smoothing` < 0.5; may be negative.

    Chowdhury et al., arXiv 2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    logits_P = beta * logps.deltas()
    kept_P, flipped_P = functional.logsigmoid(logits_P), functional.logsigmoid(-logits_P)
    biased_P = -(1 - label_smoothing) * kept_P + label_smoothing * flipped_P
    return biased_P / (1 - 2 * label_smoothing)


def ipo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2, [P]: IPO (Azar et al., arXiv 2310.12036, equation 17).

    Its beta is the paper's tau. Feed it length-averaged log-probabilities (`average_logps`), as
    its authors do in TRL: with sums the squared term grows with the answers' length.
    """
    return (logps.deltas() - 1 / (2 * beta)).square()


def hinge_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """max(0, 1 - beta * delta), [P]: SLiC's loss (arXiv 2305.10425) on DPO's margin (2309.06657)."""
    return functional.relu(1 - beta * logps.deltas())


def sft_loss(chosen_logps_P: Tensor) -> Tensor:
    """Minus the policy's log-probability of each chosen answer, [P]; add it with a weight.

    Release: `SFT_weight`, on sums. With averages it is the mean loss per token.
    """
    return -chosen_logps_P


def preference_losses(logps: PairLogps, config: LossConfig, *, beta: float) -> Tensor:
    """The loss that the configuration names, without its SFT term, [P]."""
    if config.kind == "robust":
        return robust_loss(logps, beta=beta, label_smoothing=config.label_smoothing)
    if config.kind == "ipo":
        return ipo_loss(logps, beta=beta)
    if config.kind == "hinge":
        return hinge_loss(logps, beta=beta)
    if config.label_smoothing:
        return smoothed_loss(logps, beta=beta, label_smoothing=config.label_smoothing)
    return sigmoid_loss(logps, beta=beta)


# --- what to watch -------------------------------------------------------------------------------


def pair_metrics(logps: PairLogps, *, beta: float) -> PairMetrics:
    """Rewards beta * (policy - reference) and what follows from them, detached."""
    policy_c, policy_r, reference_c, reference_r = (logps_P.detach() for logps_P in logps)
    drift_chosen_P = policy_c - reference_c
    rewards_chosen_P = beta * drift_chosen_P
    rewards_rejected_P = beta * (policy_r - reference_r)
    return PairMetrics(
        rewards_chosen_P=rewards_chosen_P,
        rewards_rejected_P=rewards_rejected_P,
        margins_P=rewards_chosen_P - rewards_rejected_P,
        accuracies_P=(rewards_chosen_P > rewards_rejected_P).float(),
        logps_chosen_P=policy_c,
        logps_rejected_P=policy_r,
        drift_chosen_P=drift_chosen_P,
    )


def reference_kl(policy_T: Tensor, reference_T: Tensor) -> Tensor:
    """Estimate of KL(reference || policy) in nats per token, scalar, without gradient.

    Mean over tokens of (r - 1) - log r with r = policy / reference: never negative, and unbiased
    only for tokens drawn from the reference (J. Schulman, "Approximating KL divergence", 2020,
    estimator k3). On answers of another model it is a distance on them, no KL: docs/training.md.
    """
    log_ratio_T = (policy_T - reference_T).detach()
    return (torch.expm1(log_ratio_T) - log_ratio_T).mean()


def length_drift(logps: PairLogps, extra_tokens_P: Tensor) -> Tensor:
    """Change of the expected answer length in tokens, policy against reference, [P].

    `extra_tokens_P`: tokens of the chosen answer minus those of the rejected one. Where both were
    sampled from the reference, policy / reference are importance weights; normalised over the pair,
    the chosen answer has sigmoid(delta) where it had 1/2. Positive: longer answers win.
    """
    return (logps.deltas().detach().sigmoid() - 0.5) * extra_tokens_P
