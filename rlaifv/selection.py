"""Which checkpoint of an iteration becomes the next policy, and the sentence that says why.

The reference release picks by hand the checkpoint that scores best on the benchmarks it reports;
here the rule is code, looks at the selection benchmarks only, and keeps the policy it started from
unless a checkpoint beats it without paying in recall or length.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlaifv.config import ChooseConfig
from rlaifv.errors import ConfigError
from rlaifv.records import Candidate, Choice

Metrics = Mapping[str, float | None]
RECALL, MEAN_WORDS = "recall", "mean_words"
TOLERANCE = 1e-9
"""A drop of exactly the allowed size stays allowed after rounding."""
PAPER_REMARK = (
    "; rule `paper`: chosen without guards on the benchmarks that are reported, as the authors "
    "did, so these scores flatter the checkpoint"
)


class Evaluated(NamedTuple):
    """A checkpoint and its metrics on every benchmark, named `benchmark/metric`; None: undefined."""

    step: int
    """0: the policy that the iteration started from."""
    tree: str | None
    """Store key of the checkpoint's tree; None for step 0."""
    metrics: Metrics


class _Judged(NamedTuple):
    evaluated: Evaluated
    value: float | None
    """Mean of the configured metric over the selection benchmarks."""
    remark: str
    """Why it is not eligible; empty: it is."""


def choose(
    evaluated: Sequence[Evaluated],
    *,
    select: Sequence[str],
    config: ChooseConfig,
    num_pairs: int,
    min_pairs: int,
) -> Choice:
    """The eligible candidate with the lowest metric, the earliest step on a tie.

    `select` names the selection benchmarks. Eligible: the metric is defined, and on each of them
    recall fell by at most `max_recall_drop` (absolute) and mean words by at most `max_length_drop`
    (relative) against step 0, which is a candidate too and stays if nothing beats it. Rule `paper`
    has no such guards, and its reason says what that means. Without selection benchmarks the last
    checkpoint is taken. Raises ValueError without step 0 or with a repeated step, ConfigError when
    a selection benchmark does not report the metric.
    """
    ordered = sorted(evaluated, key=lambda one: one.step)
    steps = [one.step for one in ordered]
    if not steps or steps[0] != 0 or len(set(steps)) < len(steps):
        raise ValueError(f"candidates must be distinct steps with step 0 among them, got {steps}")
    judged = [_judge(one, ordered[0], select=select, config=config) for one in ordered]
    if num_pairs < min_pairs:
        winner = judged[0]
        reason = (
            f"the starting policy stays: {num_pairs} pairs are fewer than the {min_pairs} "
            "that training needs"
        )
    elif len(judged) == 1:
        winner, reason = judged[0], "the starting policy stays: training left no checkpoint"
    elif not select:
        winner = judged[-1]
        reason = (
            f"step {winner.evaluated.step} is the last of {len(judged) - 1} checkpoints; "
            "no benchmark is configured for selection, so nothing was compared"
        )
    else:
        winner = _best(judged)
        reason = _reason(winner, judged, select=select, metric=config.metric)
        if config.rule == "paper":
            reason += PAPER_REMARK
    return Choice(
        step=winner.evaluated.step,
        tree=winner.evaluated.tree,
        metrics=dict(winner.evaluated.metrics),
        baseline=dict(ordered[0].metrics),
        candidates=[_candidate(one, select) for one in judged],
        num_pairs=num_pairs,
        reason=reason,
    )


def _judge(
    one: Evaluated, start: Evaluated, *, select: Sequence[str], config: ChooseConfig
) -> _Judged:
    remarks: list[str] = []
    values: list[float] = []
    for benchmark in select:
        name = f"{benchmark}/{config.metric}"
        if name not in one.metrics:
            known = ", ".join(sorted(one.metrics)) or "none"
            raise ConfigError(
                f"choose.metric: step {one.step} has no metric {name!r}; its metrics: {known}"
            )
        value = one.metrics[name]
        if value is None or not math.isfinite(value):
            remarks.append(f"{name} is undefined")
        else:
            values.append(value)
        if config.rule == "held_out":
            remarks += _guard(one, start, benchmark=benchmark, config=config)
    mean = sum(values) / len(values) if values and len(values) == len(select) else None
    return _Judged(one, mean, "; ".join(remarks))


def _guard(one: Evaluated, start: Evaluated, *, benchmark: str, config: ChooseConfig) -> list[str]:
    """Why recall or length forbid the candidate; a metric that step 0 lacks is no guard."""
    remarks: list[str] = []
    for metric in (RECALL, MEAN_WORDS):
        name = f"{benchmark}/{metric}"
        if name not in start.metrics or one.step == 0:
            continue
        before, now = start.metrics[name], one.metrics.get(name)
        if before is None or now is None or not math.isfinite(before) or not math.isfinite(now):
            side = "at step 0" if before is None or not math.isfinite(before) else "here"
            remarks.append(f"{name} is undefined {side}")
            continue
        if metric == RECALL and before - now > config.max_recall_drop + TOLERANCE:
            remarks.append(
                f"{name} fell from {before:.3f} to {now:.3f}, "
                f"more than {config.max_recall_drop:g} allowed"
            )
        floor = before * (1 - config.max_length_drop)
        if metric == MEAN_WORDS and now < floor - TOLERANCE * max(1.0, floor):
            remarks.append(
                f"{name} fell from {before:.1f} to {now:.1f}, "
                f"more than {config.max_length_drop:.0%} allowed"
            )
    return remarks


def _best(judged: Sequence[_Judged]) -> _Judged:
    """Lowest value, fewest steps on a tie; step 0 when no candidate is eligible."""
    winner: _Judged | None = None
    for one in judged:
        if one.remark or one.value is None:
            continue
        if winner is None or winner.value is None or one.value < winner.value:
            winner = one
    return winner or judged[0]


def _reason(
    winner: _Judged, judged: Sequence[_Judged], *, select: Sequence[str], metric: str
) -> str:
    start, where = judged[0], " and ".join(select)
    rivals = [one for one in judged[1:] if not one.remark]
    counted = f"{len(rivals)} of {len(judged) - 1} checkpoints eligible"
    if winner is start:
        lowest = min((one.value for one in rivals if one.value is not None), default=None)
        against = (
            f"the best eligible checkpoint has {_number(lowest)}"
            if rivals
            else f"no checkpoint is eligible ({judged[1].remark} at step {judged[1].evaluated.step})"
        )
        return (
            f"the starting policy stays: its {metric} on {where} is {_number(start.value)}, and "
            f"{against}; {counted}"
        )
    guards = ", ".join(
        f"{name} {_number(winner.evaluated.metrics.get(name))} "
        f"(starting policy: {_number(start.evaluated.metrics.get(name))})"
        for name in (f"{one}/{key}" for one in select for key in (RECALL, MEAN_WORDS))
        if name in start.evaluated.metrics
    )
    return (
        f"step {winner.evaluated.step} has the lowest {metric} on {where}: "
        f"{_number(winner.value)} against {_number(start.value)} of the starting policy"
        f"{'; ' + guards if guards else ''}; {counted}"
    )


def _candidate(one: _Judged, select: Sequence[str]) -> Candidate:
    metrics = {
        name: value
        for name, value in one.evaluated.metrics.items()
        if name.rpartition("/")[0] in select
    }
    return Candidate(
        step=one.evaluated.step, metrics=metrics, eligible=not one.remark, remark=one.remark
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.4g}"
