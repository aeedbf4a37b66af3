"""The chosen checkpoint hallucinates least among those that keep recall and length."""

import pytest

from rlaifv.config import ChooseConfig, Criterion
from rlaifv.errors import ConfigError
from rlaifv.records import Choice
from rlaifv.selection import PAPER_BASIS, Evaluated, Grounds, choose

CONFIG = ChooseConfig()
LOWEST = (Criterion(metric="response_hallucination"),)


def checkpoint(
    step: int, hall: float | None, recall: float | None = 0.9, mean_words: float | None = 30.0
) -> Evaluated:
    metrics = {
        "scenes/response_hallucination": hall,
        "scenes/recall": recall,
        "scenes/mean_words": mean_words,
        "other/response_hallucination": 0.99,
    }
    return Evaluated(step, f"tree-{step}" if step else None, metrics)


def pick(
    *evaluated: Evaluated,
    num_pairs: int = 100,
    config: ChooseConfig = CONFIG,
    criteria: tuple[Criterion, ...] = LOWEST,
    basis: str = "",
) -> Choice:
    grounds = Grounds(["scenes"], criteria, basis)
    return choose(evaluated, grounds, config=config, num_pairs=num_pairs, min_pairs=8)


def test_the_lowest_hallucination_is_chosen() -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, 0.3), checkpoint(8, 0.2), checkpoint(12, 0.25))
    assert (choice.step, choice.tree, choice.num_pairs) == (8, "tree-8", 100)
    assert choice.metrics["scenes/response_hallucination"] == 0.2
    assert choice.baseline["scenes/response_hallucination"] == 0.5
    for part in ("step 8", "response_hallucination", "0.2 against 0.5", "3 of 3 checkpoints"):
        assert part in choice.reason


def test_the_paper_s_rule_has_no_guards_and_says_on_what_it_chose() -> None:
    rows = [checkpoint(0, 0.5), checkpoint(4, 0.3), checkpoint(8, 0.2, recall=0.1)]
    assert pick(*rows).step == 4
    assert "flatter" not in pick(*rows).reason
    choice = pick(*rows, config=ChooseConfig(rule="paper"), basis=PAPER_BASIS)
    assert choice.step == 8
    assert "on the benchmarks that are reported, as the authors did" in choice.reason


def test_the_order_of_candidates_does_not_matter() -> None:
    rows = [checkpoint(0, 0.5), checkpoint(4, 0.2), checkpoint(8, 0.2)]
    assert pick(*rows) == pick(*reversed(rows))


def test_a_tie_goes_to_fewer_steps() -> None:
    assert pick(checkpoint(0, 0.5), checkpoint(8, 0.2), checkpoint(4, 0.2)).step == 4
    assert pick(checkpoint(0, 0.2), checkpoint(4, 0.2)).step == 0


def test_step_0_stays_when_nothing_beats_it() -> None:
    choice = pick(checkpoint(0, 0.1), checkpoint(4, 0.3), checkpoint(8, 0.2))
    assert (choice.step, choice.tree) == (0, None)
    assert "the starting policy stays" in choice.reason
    assert "is 0.1, and the best eligible checkpoint has 0.2" in choice.reason


@pytest.mark.parametrize(("recall", "step"), [(0.88, 4), (0.879, 0), (0.95, 4)])
def test_recall_may_fall_by_exactly_the_allowed_amount(recall: float, step: int) -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, 0.1, recall=recall))
    assert choice.step == step
    assert choice.candidates[1].eligible == (step == 4)


@pytest.mark.parametrize(
    ("mean_words", "step"), [(24.0, 4), (23.9, 0), (45.0, 4), (45.1, 0), (90.0, 0)]
)
def test_length_may_change_by_exactly_the_allowed_share(mean_words: float, step: int) -> None:
    assert pick(checkpoint(0, 0.5), checkpoint(4, 0.1, mean_words=mean_words)).step == step


def test_the_upper_bound_on_length_can_be_lifted_and_is_named() -> None:
    rows = [checkpoint(0, 0.5), checkpoint(4, 0.1, mean_words=90.0)]
    assert pick(*rows, config=ChooseConfig(max_length_growth=None)).step == 4
    remark = pick(*rows).candidates[1].remark
    assert remark == "scenes/mean_words rose from 30.0 to 90.0, more than 50% allowed"


@pytest.mark.parametrize(("tie_break", "step"), [("earliest", 4), ("latest", 12), ("recall", 8)])
def test_ties_are_broken_as_configured(tie_break: str, step: int) -> None:
    config = ChooseConfig.model_validate({"tie_break": tie_break})
    rows = [checkpoint(4, 0.2), checkpoint(8, 0.2, recall=0.95), checkpoint(12, 0.2)]
    assert pick(checkpoint(0, 0.5), *rows, config=config).step == step


def test_more_can_be_better_and_several_figures_are_weighed() -> None:
    rows = [checkpoint(0, 0.5, 0.8), checkpoint(4, 0.3, 0.9), checkpoint(8, 0.2, 0.85)]
    most = (Criterion(metric="recall", better="higher"),)
    choice = pick(*rows, criteria=most)
    assert choice.step == 4
    assert "step 4 has the highest recall on scenes: 0.9 against 0.8" in choice.reason
    both = Criterion(metric="response_hallucination"), *most
    assert pick(*rows, criteria=both).step == 8  # 0.1 gained, 0.05 lost
    heavy = both[0], Criterion(metric="scenes/recall", better="higher", weight=3)
    choice = pick(*rows, criteria=heavy)
    assert choice.step == 4
    assert "response_hallucination on scenes and recall on scenes: 0.3 and 0.9" in choice.reason


def test_a_remark_says_why_a_candidate_is_not_eligible() -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, 0.1, 0.5, 10.0), checkpoint(8, 0.4))
    assert choice.step == 8
    remark = choice.candidates[1].remark
    assert "scenes/recall fell from 0.900 to 0.500, more than 0.02 allowed" in remark
    assert "scenes/mean_words fell from 30.0 to 10.0, more than 20% allowed" in remark
    assert choice.candidates[2].remark == ""


def test_when_no_checkpoint_is_eligible_the_reason_says_so() -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, 0.1, recall=0.1))
    assert choice.step == 0
    assert "no checkpoint is eligible" in choice.reason
    assert "0 of 1 checkpoints eligible" in choice.reason


@pytest.mark.parametrize("undefined", [None, float("nan")])
def test_an_undefined_metric_is_not_eligible(undefined: float | None) -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, undefined), checkpoint(8, 0.4))
    assert choice.step == 8
    assert choice.candidates[1].remark == "scenes/response_hallucination is undefined"


def test_an_undefined_recall_is_not_eligible() -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, 0.1, recall=None))
    assert (choice.step, choice.candidates[1].remark) == (0, "scenes/recall is undefined here")


def test_a_checkpoint_beats_an_undefined_starting_policy() -> None:
    choice = pick(checkpoint(0, None), checkpoint(4, 0.3))
    assert choice.step == 4
    assert "0.3 against undefined" in choice.reason


def test_with_nothing_defined_step_0_stays() -> None:
    choice = pick(checkpoint(0, None), checkpoint(4, None))
    assert choice.step == 0
    assert "is undefined" in choice.reason


def test_too_few_pairs_keep_the_starting_policy() -> None:
    choice = pick(checkpoint(0, 0.5), num_pairs=7)
    assert choice.step == 0
    assert choice.reason == (
        "the starting policy stays: 7 pairs are fewer than the 8 that training needs"
    )


def test_no_checkpoint_keeps_the_starting_policy() -> None:
    choice = pick(checkpoint(0, 0.5))
    assert choice.reason == "the starting policy stays: training left no checkpoint"


def test_without_selection_benchmarks_the_last_checkpoint_is_taken() -> None:
    rows = [checkpoint(0, 0.1), checkpoint(8, 0.9), checkpoint(4, 0.2)]
    choice = choose(rows, Grounds([], LOWEST), config=CONFIG, num_pairs=100, min_pairs=8)
    assert (choice.step, choice.tree) == (8, "tree-8")
    assert "last of 2 checkpoints; no benchmark is configured" in choice.reason
    assert choice.metrics["scenes/recall"] == 0.9


def test_several_selection_benchmarks_are_averaged_and_all_guard() -> None:
    def row(step: int, a: float, b: float, recall_b: float) -> Evaluated:
        metrics = {"a/response_hallucination": a, "b/response_hallucination": b}
        return Evaluated(step, f"t{step}", metrics | {"b/recall": recall_b})

    rows = [row(0, 0.5, 0.5, 0.8), row(1, 0.1, 0.5, 0.8), row(2, 0.4, 0.1, 0.8), row(3, 0, 0, 0.7)]
    choice = choose(rows, Grounds(["a", "b"], LOWEST), config=CONFIG, num_pairs=9, min_pairs=8)
    assert choice.step == 2
    assert "a and b: 0.25 against 0.5" in choice.reason
    assert not choice.candidates[3].eligible


def test_candidates_show_the_selection_benchmarks_only() -> None:
    choice = pick(checkpoint(0, 0.5), checkpoint(4, 0.3))
    assert "other/response_hallucination" not in choice.candidates[1].metrics
    assert "other/response_hallucination" in choice.metrics


def test_an_unknown_metric_is_a_configuration_error() -> None:
    criteria = (Criterion(metric="halucination"),)
    with pytest.raises(ConfigError, match="'scenes/halucination'; its metrics: other/response"):
        pick(checkpoint(0, 0.5), checkpoint(4, 0.3), criteria=criteria)


@pytest.mark.parametrize("steps", [(), (4,), (0, 4, 4), (0, 0)])
def test_step_0_must_be_there_and_steps_differ(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="distinct steps with step 0"):
        pick(*(checkpoint(step, 0.1) for step in steps))
