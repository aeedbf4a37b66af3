import math

import pytest
import torch
from torch import Tensor

from rlaifv.dpo import (
    IGNORED,
    PairLogps,
    average_logps,
    changed_token_weights,
    hinge_loss,
    ipo_loss,
    label_logps,
    pair_metrics,
    reference_kl,
    robust_loss,
    sft_loss,
    sigmoid_loss,
    smoothed_loss,
    sum_logps,
    token_logps,
    weighted_average_logps,
    weighted_logps,
)


@pytest.fixture
def example() -> tuple[Tensor, Tensor]:
    """Two rows of logits and labels whose log-probabilities the reference release computed."""
    generator = torch.Generator().manual_seed(0)
    logits_RTV = torch.randn(2, 7, 11, generator=generator)
    labels_RT = torch.randint(0, 11, (2, 7), generator=generator)
    labels_RT[:, :3] = IGNORED
    assert labels_RT.tolist() == [[IGNORED] * 3 + [9, 3, 0, 7], [IGNORED] * 3 + [4, 10, 9, 3]]
    return logits_RTV, labels_RT


def test_summed_log_probabilities_equal_the_release(example: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(
        sum_logps(token_logps(*example)), torch.tensor([-10.873729, -13.206488])
    )


def test_averaged_log_probabilities_equal_the_release(example: tuple[Tensor, Tensor]) -> None:
    scored_RT = example[1][:, 1:] != IGNORED
    means_R = average_logps(token_logps(*example), scored_RT)
    torch.testing.assert_close(means_R, torch.tensor([-2.718432, -3.301622]))


def test_token_weighted_log_probabilities_equal_the_release(
    example: tuple[Tensor, Tensor],
) -> None:
    logps_RT = token_logps(*example)
    weights_RT = (example[1][:, 1:] != IGNORED).float()
    weights_RT[:, 4] *= 2
    sums = weighted_logps(logps_RT, weights_RT)
    torch.testing.assert_close(sums, torch.tensor([-13.4546, -17.1145]), atol=1e-4, rtol=0)
    means = weighted_average_logps(logps_RT, weights_RT)
    torch.testing.assert_close(means, torch.tensor([-2.6909, -3.4229]), atol=1e-4, rtol=0)


def test_unshifted_log_probabilities_equal_the_release(example: tuple[Tensor, Tensor]) -> None:
    logits_RTV, labels_RT = example
    sums = sum_logps(label_logps(logits_RTV[:, :-1], labels_RT[:, :-1]))
    torch.testing.assert_close(sums, torch.tensor([-11.8953, -8.5494]), atol=1e-4, rtol=0)


def test_half_precision_logits_are_normalised_in_float32(example: tuple[Tensor, Tensor]) -> None:
    logits_RTV = example[0].bfloat16()
    expected = token_logps(logits_RTV.float(), example[1])
    assert torch.equal(token_logps(logits_RTV, example[1]), expected)


def test_dpo_loss_and_rewards_equal_the_release() -> None:
    logps = PairLogps(*torch.tensor([[-10.873729], [-13.206488], [-2.718432], [-3.301622]]))
    assert sigmoid_loss(logps, beta=0.1).item() == pytest.approx(0.609490, abs=1e-5)
    metrics = pair_metrics(logps, beta=0.1)
    assert metrics.rewards_chosen_P.item() == pytest.approx(-0.8155, abs=1e-4)
    assert metrics.rewards_rejected_P.item() == pytest.approx(-0.9905, abs=1e-4)
    assert metrics.margins_P.item() == pytest.approx(0.1750, abs=1e-4)
    assert metrics.accuracies_P.item() == 1.0
    assert metrics.drift_chosen_P.item() == pytest.approx(-8.155297, abs=1e-4)


def test_policy_equal_to_reference_gives_ln_2_and_a_tie_is_not_accurate() -> None:
    logps_P = torch.tensor([-3.0, -70.0])
    logps = PairLogps(logps_P, logps_P - 1, logps_P, logps_P - 1)
    torch.testing.assert_close(sigmoid_loss(logps, beta=0.1), torch.full((2,), math.log(2)))
    assert pair_metrics(logps, beta=0.1).accuracies_P.tolist() == [0.0, 0.0]


@pytest.fixture
def margin_of_two() -> PairLogps:
    return PairLogps(*torch.tensor([[-4.0], [-7.0], [-5.0], [-6.0]]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_label_smoothing_mixes_both_directions(margin_of_two: PairLogps) -> None:
    loss = smoothed_loss(margin_of_two, beta=0.5, label_smoothing=0.1).item()
    assert loss == pytest.approx(-0.9 * math.log(sigmoid(1)) - 0.1 * math.log(sigmoid(-1)))
    plain = smoothed_loss(margin_of_two, beta=0.5, label_smoothing=0.0)
    assert torch.equal(plain, sigmoid_loss(margin_of_two, beta=0.5))


def test_robust_loss_is_unbiased_under_flips(margin_of_two: PairLogps) -> None:
    chosen, rejected, chosen_reference, rejected_reference = margin_of_two
    flipped = PairLogps(rejected, chosen, rejected_reference, chosen_reference)
    kept_loss = robust_loss(margin_of_two, beta=0.5, label_smoothing=0.2)
    flipped_loss = robust_loss(flipped, beta=0.5, label_smoothing=0.2)
    expected = 0.8 * kept_loss + 0.2 * flipped_loss
    torch.testing.assert_close(expected, sigmoid_loss(margin_of_two, beta=0.5))


def test_robust_loss_refuses_a_coin_flip(margin_of_two: PairLogps) -> None:
    with pytest.raises(ValueError, match=r"\[0, 0\.5\)"):
        robust_loss(margin_of_two, beta=0.5, label_smoothing=0.5)


def test_ipo_pulls_the_margin_to_a_target(margin_of_two: PairLogps) -> None:
    assert ipo_loss(margin_of_two, beta=0.25).item() == 0.0
    assert ipo_loss(margin_of_two, beta=0.5).item() == 1.0


def test_hinge_stops_at_a_margin_of_one(margin_of_two: PairLogps) -> None:
    assert hinge_loss(margin_of_two, beta=0.5).item() == 0.0
    assert hinge_loss(margin_of_two, beta=0.1).item() == pytest.approx(0.8)


def test_the_supervised_term_raises_the_chosen_answer() -> None:
    logps_P = torch.tensor([-4.0, -2.0], requires_grad=True)
    sft_loss(logps_P).mean().backward()  # type: ignore[no-untyped-call]
    assert logps_P.grad is not None
    assert logps_P.grad.tolist() == [-0.5, -0.5]


def test_only_changed_tokens_get_the_weight() -> None:
    chosen, rejected = [1, 2, 3, 9, 4, 5], [1, 2, 3, 8, 8, 4, 5]
    assert changed_token_weights(chosen, rejected, changed_weight=5.0) == [1, 1, 1, 5, 5, 5]
    weights = changed_token_weights(rejected, chosen, changed_weight=5.0, min_match=2)
    assert weights == [1, 1, 1, 5, 5, 1, 1]


def test_kl_is_zero_for_equal_policies_and_positive_otherwise() -> None:
    reference_T = torch.tensor([-1.0, -2.0, -0.5])
    assert reference_kl(reference_T, reference_T).item() == 0.0
    for shift in (0.3, -0.3):
        expected = math.expm1(shift) - shift
        assert reference_kl(reference_T + shift, reference_T).item() == pytest.approx(
            expected, rel=1e-5
        )
