"""`python -m controller compare`: two runs' configurations, final policies and answers.

Where both final policies answered the same questions, a difference has an interval: the questions
are drawn anew 2,000 times, with replacement and for both runs alike (a paired bootstrap), and the
interval holds 95 % of the differences. It says how much the choice of questions matters, not how
much another seed of training would.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from controller.places import RunPlace
from controller.report.gather import Asked
from controller.summary import Entry, read_choices, summarise
from rlaifv.benchmarks.base import Benchmark
from rlaifv.benchmarks.captions import CaptionGrade
from rlaifv.benchmarks.labelled import ClaimsGrade
from rlaifv.benchmarks.of_run import run_benchmarks
from rlaifv.config import RunConfig
from rlaifv.config_values import flat_fields
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import CONFIG, Shard, num_shards, part_key
from rlaifv.records import Grade, Record, Response

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
RATIOS = {
    "response_hallucination": ("hallucinated_captions", "captions_with_objects"),
    "mention_hallucination": ("hallucinated_mentions", "mentions"),
    "chair_s": ("hallucinated_captions", "captions"),
    "recall": ("correct", "truth"),
    "mean_words": ("words", "captions"),
    "rejected_claims": ("rejected", "claims"),
    "rejected_answers": ("rejecting", "claiming"),
    "mean_claims": ("claims", "captions"),
}
"""Metrics of objects and of the labeller's verdicts as ratios of sums over questions."""


class Changed(Record):
    """One setting that differs; JSON texts."""

    key: str
    a: str
    b: str


class Compared(Record):
    """One metric of both final policies."""

    metric: str
    """`benchmark/metric`."""
    a: float | None
    b: float | None
    a_low: float | None = None
    a_high: float | None = None
    b_low: float | None = None
    b_high: float | None = None
    difference: float | None
    """b - a."""
    low: float | None = None
    high: float | None = None
    """95 % of the resampled differences."""
    spread: Literal[
        "paired bootstrap over questions",
        "none: no sums per question",
        "none: other questions",
        "none: undefined",
    ]
    questions: int
    """That both answered."""


class SideBySide(Record):
    """A question that both final policies answered, differently."""

    benchmark: str
    question_id: str
    a: str
    b: str
    a_wrong: list[str] | None
    """Objects named that are not in the picture; None: not an object benchmark."""
    b_wrong: list[str] | None
    a_grade: str
    b_grade: str


class Comparison(Record):
    """What `compare --json` prints."""

    a: str
    b: str
    a_policy: str
    """Which checkpoint was compared."""
    b_policy: str
    config: list[Changed]
    metrics: list[Compared]
    a_iterations: list[Entry]
    b_iterations: list[Entry]
    answered_by_both: int
    answers: list[SideBySide]
    """Those that differ most come first."""


class Side(NamedTuple):
    """One run's final policy."""

    place: RunPlace
    config: RunConfig
    policy: str
    responses: Mapping[Asked, Response]
    grades: Mapping[Asked, str]
    rows: Mapping[str, Sequence[Grade]]
    """By benchmark."""
    entries: list[Entry]


def read_side(place: RunPlace) -> Side:
    """The policy that the last choice left; of a run without choices the one it evaluated.

    Raises ArtifactError when it has answered nothing yet.
    """
    run, config = place.store, place.store.read_json(CONFIG, RunConfig)
    choices = read_choices(run, config)
    entries = summarise(config, choices)
    last, ordinal, policy = 0, 0, "the policy that it evaluated"
    if choices:
        last = max(choices)
        step = choices[last].step
        policy = f"iteration {last}, {f'step {step}' if step else 'the starting policy'}"
        ordinal = sorted(one.step for one in choices[last].candidates).index(step)
    keys = _parts(config, last, ordinal, "grades")
    if not run.exists(keys[0]):
        raise ArtifactError(f"{run}: nothing to compare yet: no choice, and no {keys[0]}")
    rows: dict[str, list[Grade]] = {}
    for key in keys:
        for row in run.read_part(key, Grade):
            rows.setdefault(row.benchmark, []).append(row)
    responses = {
        (one.benchmark, one.question_id): one
        for key in _parts(config, last, ordinal, "responses")
        for one in run.read_part(key, Response)
    }
    grades = {(one.benchmark, one.question_id): one.value for many in rows.values() for one in many}
    return Side(place, config, policy, responses, grades, rows, entries)


def _parts(config: RunConfig, iteration: int, ordinal: int, artifact: str) -> list[str]:
    slices, count = config.shards.respond, num_shards(config, "respond")
    numbers = range(ordinal * slices, (ordinal + 1) * slices)
    return [part_key(iteration, artifact, Shard(n, count)) for n in numbers]


def compare(a: RunPlace, b: RunPlace, *, limit: int) -> Comparison:
    """Both runs; `limit` answers side by side."""
    left, right = read_side(a), read_side(b)
    both = [key for key in left.responses if key in right.responses]
    return Comparison(
        a=a.uri,
        b=b.uri,
        a_policy=left.policy,
        b_policy=right.policy,
        config=_config_differences(left.config, right.config),
        metrics=[
            one
            for name in left.rows
            if name in right.rows
            for one in _metrics(name, _Graded.of(left, name), _Graded.of(right, name))
        ],
        a_iterations=left.entries,
        b_iterations=right.entries,
        answered_by_both=len(both),
        answers=_answers(left, right, both)[:limit],
    )


class _Graded(NamedTuple):
    """What one side has of a benchmark."""

    benchmark: Benchmark
    rows: Sequence[Grade]

    @classmethod
    def of(cls, side: Side, name: str) -> "_Graded":
        return cls(run_benchmarks(side.place.store, side.config, 0)[name], side.rows[name])


def _config_differences(a: RunConfig, b: RunConfig) -> list[Changed]:
    left, right = (flat_fields(one.model_dump(mode="json")) for one in (a, b))
    absent = object()
    return [
        Changed(key=key, a=_json(left.get(key, absent)), b=_json(right.get(key, absent)))
        for key in sorted(left.keys() | right.keys())
        if left.get(key, absent) != right.get(key, absent)
    ]


def _json(value: Any) -> str:
    return "(absent)" if type(value) is object else json.dumps(value)


def _metrics(benchmark: str, a: _Graded, b: _Graded) -> list[Compared]:
    left, right = (side.benchmark.metrics(side.rows) for side in (a, b))
    spreads = _Bootstrap.of(a.rows, b.rows)
    found = []
    for name in left:
        if name not in right or name.endswith("_spread"):
            continue
        values = left[name], right[name]
        if None in values:
            spreads_here, why = None, "none: undefined"
        else:
            spreads_here, why = spreads.intervals(name)
        known = spreads_here or [(None, None)] * 3
        ((a_low, a_high), (b_low, b_high), (low, high)) = known
        first, second = values
        difference = None if first is None or second is None else second - first
        found.append(
            Compared.model_validate(
                {
                    "metric": f"{benchmark}/{name}",
                    "a": first,
                    "b": second,
                    **{"a_low": a_low, "a_high": a_high, "b_low": b_low, "b_high": b_high},
                    **{"difference": difference, "low": low, "high": high},
                    "spread": why,
                    "questions": spreads.questions,
                }
            )
        )
    return found


Interval = tuple[float | None, float | None]


class _Bootstrap(NamedTuple):
    """Sums per question of both runs, rows of the same questions, and how often each is drawn."""

    a: Any
    b: Any
    draws: Any
    """(resamples, questions), counts."""
    questions: int
    why_not: str

    @classmethod
    def of(cls, a: Sequence[Grade], b: Sequence[Grade]) -> "_Bootstrap":
        """Without draws where questions differ or grades are not of an object benchmark."""
        left, right = ({row.question_id: row for row in rows} for rows in (a, b))
        ids = sorted(left.keys() & right.keys())
        if left.keys() != right.keys():
            return cls(None, None, None, len(ids), "none: other questions")
        try:
            sums = [_sums([rows[one] for one in ids]) for rows in (left, right)]
        except ValidationError:
            return cls(None, None, None, len(ids), "none: no sums per question")
        if len(left) != len(a) or len(right) != len(b):  # several judgings of an answer
            return cls(None, None, None, len(ids), "none: no sums per question")
        rng = np.random.default_rng(SEED)
        shares = np.full(len(ids), 1 / max(1, len(ids)))
        draws = rng.multinomial(len(ids), shares, size=RESAMPLES)
        return cls(sums[0], sums[1], draws, len(ids), "")

    def intervals(self, metric: str) -> tuple[list[Interval] | None, str]:
        """Of a, of b, of b - a; and by which method, or why there are none."""
        if self.why_not or metric not in RATIOS:
            return None, self.why_not or "none: no sums per question"
        values = [_ratio(self.draws, sums, metric) for sums in (self.a, self.b)]
        spreads = [*values, values[1] - values[0]]
        return [_interval(one) for one in spreads], "paired bootstrap over questions"


def _sums(rows: Sequence[Grade]) -> dict[str, Any]:
    """Per question, the counts that the ratios are made of.

    Raises ValidationError for grades that are neither of objects nor of claims.
    """
    try:
        counts = [_objects(CaptionGrade.model_validate_json(row.value)) for row in rows]
    except ValidationError:
        counts = [_claims(ClaimsGrade.model_validate_json(row.value)) for row in rows]
    names = counts[0] if counts else {}
    return {name: np.array([int(one[name]) for one in counts]) for name in names}


def _objects(grade: CaptionGrade) -> dict[str, int]:
    score = grade.score()
    return {
        "captions": 1,
        "captions_with_objects": bool(score.found),
        "hallucinated_captions": bool(score.hallucinated),
        "mentions": len(score.found),
        "hallucinated_mentions": len(score.hallucinated),
        "correct": len(score.correct),
        "truth": score.num_truth,
        "words": score.num_words,
    }


def _claims(grade: ClaimsGrade) -> dict[str, int]:
    rejected = sum(one.p_yes <= one.p_no for one in grade.claims)
    return {
        "captions": 1,
        "claiming": bool(grade.claims),
        "rejecting": bool(rejected),
        "claims": len(grade.claims),
        "rejected": rejected,
        "words": grade.num_words,
    }


def _ratio(draws: Any, sums: Mapping[str, Any], metric: str) -> Any:
    """Shape (resamples,); NaN where a resample has no denominator."""
    above, below = (draws @ sums[name] for name in RATIOS[metric])
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def _interval(values: Any) -> Interval:
    known = values[np.isfinite(values)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _answers(left: Side, right: Side, both: Sequence[Asked]) -> list[SideBySide]:
    found = []
    for key in both:
        a, b = left.responses[key].text, right.responses[key].text
        if a == b:
            continue
        grades = left.grades.get(key, ""), right.grades.get(key, "")
        found.append(
            SideBySide(
                benchmark=key[0],
                question_id=key[1],
                a=a,
                b=b,
                a_wrong=wrong_objects(grades[0]),
                b_wrong=wrong_objects(grades[1]),
                a_grade=grades[0],
                b_grade=grades[1],
            )
        )
    return sorted(found, key=lambda one: (-_apart(one), one.benchmark, one.question_id))


def wrong_objects(grade: str) -> list[str] | None:
    """Objects that an answer names and the picture lacks; None: another kind of grade."""
    try:
        parsed = CaptionGrade.model_validate_json(grade)
    except ValidationError:
        return None
    return sorted({name for _, name, _ in parsed.found} - set(parsed.truth))


def _apart(one: SideBySide) -> int:
    return abs(len(one.a_wrong or []) - len(one.b_wrong or []))
