"""Which checkpoint of an iteration becomes the next policy, and the sentence that says why.

The reference release picks by hand the checkpoint that scores best on the benchmarks it reports;
here the rule is code, looks at what selects only, and keeps the policy it started from unless a
checkpoint beats it without paying in recall or length.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rlaifv.config import ChooseConfig, Criterion
from rlaifv.errors import ConfigError
from rlaifv.records import Candidate, Choice

Metrics = Mapping[str, float | None]
RESPONSE_HALLUCINATION, RECALL, MEAN_WORDS = "response_hallucination", "recall", "mean_words"
TOLERANCE = 1e-9
"""A drop of exactly the allowed size stays allowed after rounding."""
PAPER_BASIS = (
    "rule `paper`: chosen without guards on the benchmarks that are reported, as the authors did, "
    "so these scores flatter the checkpoint"
)


class Evaluated(NamedTuple):
    """A checkpoint and its metrics on every benchmark, named `benchmark/metric`; None: undefined."""

    step: int
    """0: the policy that the iteration started from."""
    tree: str | None
    """Store key of the checkpoint's tree; None for step 0."""
    metrics: Metrics


class Grounds(NamedTuple):
    """What checkpoints are compared on."""

    select: Sequence[str]
    """Names of the benchmarks that select; empty: the last checkpoint is taken."""
    criteria: Sequence[Criterion]
    basis: str = ""
    """Ends the reason: what a reader must know of the comparison."""


class _Judged(NamedTuple):
    evaluated: Evaluated
    values: tuple[float | None, ...]
    """Of each criterion."""
    cost: float | None
    """Weighted mean of the values, those negated of which more is better; None: undefined."""
    recall: float
    """Mean over what selects, for ties; 0 where it is not measured."""
    remark: str
    """Why it is not eligible; empty: it is."""


def choose(
    evaluated: Sequence[Evaluated],
    grounds: Grounds,
    *,
    config: ChooseConfig,
    num_pairs: int,
    min_pairs: int,
) -> Choice:
    """The eligible candidate with the best weighted mean of the criteria; ties as configured.

    Eligible: every criterion is defined, and on each benchmark that selects recall fell by at most
    `max_recall_drop` (absolute) and mean words changed by at most `max_length_drop` downwards and
    `max_length_growth` upwards (relative) against step 0, which is a candidate too and stays if
    nothing beats it. Rule `paper` has no such guards. Without benchmarks that select the last
    checkpoint is taken. Raises ValueError without step 0 or with a repeated step, ConfigError when
    a benchmark does not report a criterion's metric.
    """
    ordered = sorted(evaluated, key=lambda one: one.step)
    steps = [one.step for one in ordered]
    if not steps or steps[0] != 0 or len(set(steps)) < len(steps):
        raise ValueError(f"candidates must be distinct steps with step 0 among them, got {steps}")
    judged = [_judge(one, ordered[0], grounds, config) for one in ordered]
    if num_pairs < min_pairs:
        winner = judged[0]
        reason = (
            f"the starting policy stays: {num_pairs} pairs are fewer than the {min_pairs} "
            "that training needs"
        )
    elif len(judged) == 1:
        winner, reason = judged[0], "the starting policy stays: training left no checkpoint"
    elif not grounds.select:
        winner = judged[-1]
        reason = (
            f"step {winner.evaluated.step} is the last of {len(judged) - 1} checkpoints; "
            "no benchmark is configured for selection, so nothing was compared"
        )
    else:
        winner = _best(judged, config)
        parts = [_reason(winner, judged, grounds), grounds.basis]
        reason = "; ".join(part for part in parts if part)
    return Choice(
        step=winner.evaluated.step,
        tree=winner.evaluated.tree,
        metrics=dict(winner.evaluated.metrics),
        baseline=dict(ordered[0].metrics),
        candidates=[_candidate(one, grounds.select) for one in judged],
        num_pairs=num_pairs,
        reason=reason,
    )


def _judge(one: Evaluated, start: Evaluated, grounds: Grounds, config: ChooseConfig) -> _Judged:
    remarks: list[str] = []
    values = [_value(one, criterion, grounds.select, remarks) for criterion in grounds.criteria]
    if config.rule == "held_out":
        for benchmark in grounds.select:
            remarks += _guard(one, start, benchmark=benchmark, config=config)
    weighted = [
        criterion.weight * (value if criterion.better == "lower" else -value)
        for criterion, value in zip(grounds.criteria, values, strict=True)
        if value is not None
    ]
    complete = bool(grounds.select) and bool(values) and len(weighted) == len(values)
    total = sum(criterion.weight for criterion in grounds.criteria)
    recalls = [one.metrics.get(f"{name}/{RECALL}") or 0.0 for name in grounds.select]
    return _Judged(
        one,
        tuple(values),
        sum(weighted) / total if complete else None,
        sum(recalls) / len(recalls) if recalls else 0.0,
        "; ".join(remarks),
    )


def _names(criterion: Criterion, select: Sequence[str]) -> list[str]:
    """The metrics that a criterion means: of one benchmark, or of all that select."""
    if "/" in criterion.metric:
        return [criterion.metric]
    return [f"{benchmark}/{criterion.metric}" for benchmark in select]


def _value(
    one: Evaluated, criterion: Criterion, select: Sequence[str], remarks: list[str]
) -> float | None:
    """The mean of a criterion's metrics; None, and a remark, where one is undefined."""
    names = _names(criterion, select)
    values: list[float] = []
    for name in names:
        if name not in one.metrics:
            known = ", ".join(sorted(one.metrics)) or "none"
            raise ConfigError(
                f"choose.criteria: step {one.step} has no metric {name!r}; its metrics: {known}"
            )
        value = one.metrics[name]
        if value is None or not math.isfinite(value):
            remarks.append(f"{name} is undefined")
        else:
            values.append(value)
    return sum(values) / len(values) if values and len(values) == len(names) else None


def _guard(
    one: Evaluated, start: Evaluated, *, benchmark: str, config: ChooseConfig
) -> Iterator[str]:
    """Why recall or length forbid the candidate; a metric that step 0 lacks is no guard."""
    for metric in (RECALL, MEAN_WORDS):
        name = f"{benchmark}/{metric}"
        if name not in start.metrics or one.step == 0:
            continue
        before, now = start.metrics[name], one.metrics.get(name)
        if before is None or now is None or not math.isfinite(before) or not math.isfinite(now):
            side = "at step 0" if before is None or not math.isfinite(before) else "here"
            yield f"{name} is undefined {side}"
        elif metric == RECALL:
            if before - now > config.max_recall_drop + TOLERANCE:
                yield (
                    f"{name} fell from {before:.3f} to {now:.3f}, "
                    f"more than {config.max_recall_drop:g} allowed"
                )
        else:
            yield from _length_guard(name, before, now, config)


def _length_guard(name: str, before: float, now: float, config: ChooseConfig) -> Iterator[str]:
    slack = TOLERANCE * max(1.0, before)
    drop, growth = config.max_length_drop, config.max_length_growth
    if now < before * (1 - drop) - slack:
        yield f"{name} fell from {before:.1f} to {now:.1f}, more than {drop:.0%} allowed"
    if growth is not None and now > before * (1 + growth) + slack:
        yield f"{name} rose from {before:.1f} to {now:.1f}, more than {growth:.0%} allowed"


def _best(judged: Sequence[_Judged], config: ChooseConfig) -> _Judged:
    """Lowest cost, ties as configured; step 0 when no candidate is eligible."""
    eligible = [one for one in judged if not one.remark and one.cost is not None]
    if not eligible:
        return judged[0]
    lowest = min(one.cost for one in eligible if one.cost is not None)
    tied = [one for one in eligible if one.cost == lowest]
    if config.tie_break == "latest":
        return tied[-1]
    if config.tie_break == "recall":
        return max(tied, key=lambda one: one.recall)  # of several the first, the earliest
    return tied[0]


def _reason(winner: _Judged, judged: Sequence[_Judged], grounds: Grounds) -> str:
    start = judged[0]
    rivals = [one for one in judged[1:] if not one.remark]
    counted = f"{len(rivals)} of {len(judged) - 1} checkpoints eligible"
    named = [_on(criterion, grounds.select) for criterion in grounds.criteria]
    if winner is start:
        best = min(
            (one for one in rivals if one.cost is not None),
            key=lambda one: one.cost or 0.0,
            default=None,
        )
        against = (
            f"the best eligible checkpoint has {_figures(best)}"
            if best is not None
            else f"no checkpoint is eligible ({judged[1].remark} at step {judged[1].evaluated.step})"
        )
        return (
            f"the starting policy stays: its {' and '.join(named)} is {_figures(start)}, and "
            f"{against}; {counted}"
        )
    words = {"lower": "lowest", "higher": "highest"}
    most = words[grounds.criteria[0].better] if len(named) == 1 else "best mean of"
    guards = ", ".join(
        f"{name} {_number(winner.evaluated.metrics.get(name))} "
        f"(starting policy: {_number(start.evaluated.metrics.get(name))})"
        for name in (f"{one}/{key}" for one in grounds.select for key in (RECALL, MEAN_WORDS))
        if name in start.evaluated.metrics
    )
    return (
        f"step {winner.evaluated.step} has the {most} {' and '.join(named)}: "
        f"{_figures(winner)} against {_figures(start)} of the starting policy"
        f"{'; ' + guards if guards else ''}; {counted}"
    )


def _on(criterion: Criterion, select: Sequence[str]) -> str:
    """A criterion as the reason names it."""
    if "/" in criterion.metric:
        benchmark, _, metric = criterion.metric.rpartition("/")
        return f"{metric} on {benchmark}"
    return f"{criterion.metric} on {' and '.join(select)}"


def _figures(one: _Judged) -> str:
    return " and ".join(_number(value) for value in one.values)


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
