"""From token log-probabilities to the loss and the metrics of pairs.

Shapes:  P pairs;  T tokens of an answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlaifv.config import LossConfig, TrainConfig
from rlaifv.dpo import (
    PairLogps,
    changed_token_weights,
    length_drift,
    pair_metrics,
    preference_losses,
    reference_kl,
    sft_loss,
    weighted_average_logps,
    weighted_logps,
)
from rlaifv.errors import ArtifactError
from rlaifv.models.branches import to_device
from rlaifv.records import ReferenceLogps


class Answers(NamedTuple):
    """Something of each of a pair's two answers, per token."""

    chosen_T: Tensor
    rejected_T: Tensor


class ScoredPair(NamedTuple):
    """Of one pair, scalars."""

    scores: PairLogps
    """What the loss compares: sums or means of log-probabilities, weighted or not."""
    sums: PairLogps
    """Plain sums, which metrics are about whatever the loss."""
    kl: Tensor
    extra_tokens: int
    """Of the chosen answer beyond those of the rejected one."""


class BatchMetrics(NamedTuple):
    """Of each pair; the order of `curves.StepMetrics`. Only the losses have gradients."""

    losses_P: Tensor
    rewards_chosen_P: Tensor
    rewards_rejected_P: Tensor
    margins_P: Tensor
    accuracies_P: Tensor
    logps_chosen_P: Tensor
    logps_rejected_P: Tensor
    drift_chosen_P: Tensor
    kl_P: Tensor
    length_drift_P: Tensor


def score_pair(
    policy: Answers, tokens: Answers, reference: ReferenceLogps, *, config: LossConfig
) -> ScoredPair:
    """Scores of one pair; raises ArtifactError where the reference is of other tokens."""
    lists = (reference.chosen_token_nats, reference.rejected_token_nats)
    for name, policy_T, nats in zip(("chosen", "rejected"), policy, lists, strict=True):
        if len(policy_T) != len(nats):
            raise ArtifactError(
                f"reflogps: pair {reference.pair_id}: {len(nats)} {name} tokens, but the policy "
                f"has {len(policy_T)}: another tokenizer or answer made them"
            )
    device = policy.chosen_T.device
    references = [to_device(torch.tensor(nats, dtype=torch.float32), device) for nats in lists]
    weights = _token_weights(tokens, config)
    combine = weighted_average_logps if config.average else weighted_logps
    every = (*policy, *references)
    return ScoredPair(
        PairLogps(*(combine(one_T, w_T) for one_T, w_T in zip(every, weights * 2, strict=True))),
        PairLogps(*(logps_T.sum() for logps_T in every)),
        reference_kl(torch.cat(policy), torch.cat(references)),
        len(lists[0]) - len(lists[1]),
    )


def _token_weights(tokens: Answers, config: LossConfig) -> list[Tensor]:
    """Of the chosen and of the rejected answer."""
    if config.changed_token_weight == 1:
        return [torch.ones_like(ids_T, dtype=torch.float32) for ids_T in tokens]
    chosen, rejected = (ids_T.tolist() for ids_T in tokens)
    pairs = ((chosen, rejected), (rejected, chosen))
    return [
        torch.tensor(
            changed_token_weights(ids, other, changed_weight=config.changed_token_weight),
            device=tokens.chosen_T.device,
        )
        for ids, other in pairs
    ]


def batch_metrics(pairs: Sequence[ScoredPair], config: TrainConfig) -> BatchMetrics:
    """Losses and metrics of some pairs."""
    scores = PairLogps(*map(torch.stack, zip(*(pair.scores for pair in pairs), strict=True)))
    sums = PairLogps(*map(torch.stack, zip(*(pair.sums for pair in pairs), strict=True)))
    losses_P = preference_losses(scores, config.loss, beta=config.beta)
    if config.loss.sft_weight:
        losses_P = losses_P + config.loss.sft_weight * sft_loss(scores.policy_chosen_P)
    extra_tokens = torch.tensor([pair.extra_tokens for pair in pairs])
    extra_tokens_P = to_device(extra_tokens, losses_P.device)
    return BatchMetrics(
        losses_P,
        *pair_metrics(sums, beta=config.beta),
        torch.stack([pair.kl for pair in pairs]),
        length_drift(sums, extra_tokens_P),
    )
