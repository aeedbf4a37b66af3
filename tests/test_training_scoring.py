"""Losses and curves of pairs, by hand and by the release's formulas."""

import difflib
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from rlaifv.config import LossConfig, ModelSpec, TrainConfig
from rlaifv.dpo import PairLogps, length_drift
from rlaifv.models.base import Branches
from rlaifv.models.branches import split_answers
from rlaifv.records import ReferenceLogps
from rlaifv.training.scoring import Answers, batch_metrics, score_pair
from tests.models_kit import load_engine
from tests.tiny import make_tiny_llava
from tests.training_support import make_pair, reference_logps

BETA = 0.1


class Example(NamedTuple):
    """One pair as the loss sees it; the answers share the run 1, 2, 3."""

    policy: Answers
    tokens: Answers
    reference: ReferenceLogps


@pytest.fixture
def example() -> Example:
    return Example(
        Answers(torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-2.0, -1.0, -2.0])),
        Answers(torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 3])),
        ReferenceLogps(
            pair_id="a",
            chosen_token_nats=[-1.5, -2.5, -3.5, -4.5],
            rejected_token_nats=[-1.0, -1.0, -1.0],
        ),
    )


def loss_of(example: Example, config: LossConfig) -> float:
    scored = score_pair(example.policy, example.tokens, example.reference, config=config)
    metrics = batch_metrics([scored], TrainConfig(beta=BETA, loss=config))
    return float(metrics.losses_P.item())


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("config", "expected"),
    [  # chosen -10 against -12, rejected -5 against -3: a delta of 4
        (LossConfig(), softplus(-0.4)),
        (LossConfig(label_smoothing=0.1), 0.9 * softplus(-0.4) + 0.1 * softplus(0.4)),
        (
            LossConfig(kind="robust", label_smoothing=0.1),
            (0.9 * softplus(-0.4) - 0.1 * softplus(0.4)) / 0.8,
        ),
        (LossConfig(kind="hinge"), 0.6),
        (LossConfig(kind="ipo"), 1.0),
        (LossConfig(average=True), softplus(-0.1 * (0.5 + 2 / 3))),
        (LossConfig(kind="ipo", average=True), (0.5 + 2 / 3 - 5) ** 2),
        (LossConfig(sft_weight=0.2), softplus(-0.4) + 0.2 * 10),
        (LossConfig(sft_weight=0.2, average=True), softplus(-0.1 * (0.5 + 2 / 3)) + 0.2 * 2.5),
        # the fourth chosen token is the only changed one: -18 against -21
        (LossConfig(changed_token_weight=3), softplus(-0.1 * (3 + 2))),
        (LossConfig(changed_token_weight=3, average=True), softplus(-0.1 * (0.5 + 2 / 3))),
    ],
)
def test_every_loss_has_the_value_of_its_formula(
    example: Example, config: LossConfig, expected: float
) -> None:
    assert loss_of(example, config) == pytest.approx(expected, rel=1e-6)


def test_curves_are_about_plain_sums_whatever_the_loss(example: Example) -> None:
    config = LossConfig(average=True, changed_token_weight=3)
    scored = score_pair(example.policy, example.tokens, example.reference, config=config)
    metrics = batch_metrics([scored], TrainConfig(beta=BETA, loss=config))
    assert metrics.logps_chosen_P.item() == -10
    assert metrics.drift_chosen_P.item() == 2
    assert metrics.rewards_chosen_P.item() == pytest.approx(0.2)
    assert metrics.rewards_rejected_P.item() == pytest.approx(-0.2)
    ratios = [0.5] * 4 + [-1.0, 0.0, -1.0]
    assert metrics.kl_P.item() == pytest.approx(sum(math.expm1(r) - r for r in ratios) / 7)
    assert metrics.length_drift_P.item() == pytest.approx(1 / (1 + math.exp(-4)) - 0.5)


def test_length_drift_is_the_expected_change_in_tokens() -> None:
    chosen_P = torch.tensor([math.log(3), -1.0, -1.0])
    logps = PairLogps(chosen_P, torch.tensor([0.0, -1.0, 50.0]), *torch.zeros(2, 3))
    extra_P = torch.tensor([8, 8, 8])
    # weights 3 : 1, equal, and all on the answer that is 8 tokens shorter
    assert length_drift(logps, extra_P).tolist() == pytest.approx([2, 0, -4])


# --- the release's variants on a model -----------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("policy"))


def release_weights(tokens: list[int], other: list[int], weight: float) -> list[float]:
    """Muffin's `diff_lib`: unchanged is what lies in a common run of three tokens or more."""
    blocks = difflib.SequenceMatcher(None, tokens, other).get_matching_blocks()
    same = {b.a + i for b in blocks if b.size >= 3 for i in range(b.size)}
    return [1.0 if index in same else weight for index in range(len(tokens))]


def release_logp(
    logits_TV: Tensor, ids: list[int], weights: list[float], *, average: bool
) -> float:
    """`get_batch_logps` with token weights; logits are those before each token."""
    values = [
        w * (logits_TV[t, token] - logits_TV[t].exp().sum().log()).item()
        for t, (token, w) in enumerate(zip(ids, weights, strict=True))
    ]
    return sum(values) / (sum(weights) if average else 1)


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("average", [False, True])
def test_scores_of_a_model_are_those_of_the_releases_formulas(
    folder: Path, average: bool, weight: float
) -> None:
    """dpo_use_average and dpo_token_weighted of muffin, on transformers' own logits."""
    spec = ModelSpec(path=str(folder), dtype="float32")
    engine, pair = load_engine(spec), make_pair(3)
    pair = pair.model_copy(update={"rejected": f"{pair.chosen} and a large green cone"})
    row = Branches(pair.image.bytes, pair.question, (pair.chosen, pair.rejected))
    batch = engine.encode_branches([row])
    tokens = Answers(*split_answers(batch.targets_M, batch.counts)[0])
    with torch.no_grad():
        logps = Answers(*engine.branch_logps(batch)[0])
    config = LossConfig(average=average, changed_token_weight=weight)
    reference = reference_logps(spec, [pair])[pair.pair_id]
    scored = score_pair(logps, tokens, reference, config=config)
    plain = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    first = int(batch.sources_M[0]) + 1  # of the chosen answer, which follows the prefix
    prefix = batch.packed.ids_BL[0, :first].tolist()
    chosen, rejected = tokens.chosen_T.tolist(), tokens.rejected_T.tolist()
    found = (scored.scores.policy_chosen_P.item(), scored.scores.policy_rejected_P.item())
    for ids, other, ours in ((chosen, rejected, found[0]), (rejected, chosen, found[1])):
        with torch.no_grad():
            logits = plain(torch.tensor([[*prefix, *ids]]), pixel_values=batch.pixels).logits
        weights = release_weights(ids, other, weight)
        if weight != 1:
            assert {1.0, weight} == set(weights), "both kinds of token must occur"
        expected = release_logp(logits[0, first - 1 :].double(), ids, weights, average=average)
        assert ours == pytest.approx(expected, abs=1e-5, rel=2e-7)  # or float32's last bit
