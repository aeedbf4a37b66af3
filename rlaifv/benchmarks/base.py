"""What every benchmark is: questions to answer, grades of answers, metrics over grades."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, stdev
from typing import NamedTuple, Protocol

from rlaifv.errors import ArtifactError
from rlaifv.records import Grade, Response

Metrics = dict[str, float | None]
"""By name; None: undefined, because a denominator is 0."""


class Question(NamedTuple):
    """One benchmark question."""

    question_id: str
    question: str
    image: bytes
    """Encoded, as `rlaifv.images.decode` takes it."""


class Benchmark(Protocol):
    """Questions, grading and metrics of one benchmark. Files are read when first needed."""

    def questions(self) -> Iterator[Question]:
        """All questions, always in the same order. Raises ArtifactError for a bad row."""
        ...

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        """One grade per response and repeat, in the order of the responses.

        `Grade.value` is the JSON of the benchmark's own grade record. Raises ArtifactError for a
        response to an unknown question, TransientError when a judge left items unanswered (what it
        did answer is cached, so that another call asks only for those).
        """
        ...

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        """Pure: of one step's grades (all repeats), in any order; needs no file.

        With several repeats the mean over them, and `<name>_spread`, their standard deviation.
        """
        ...


MEASURED = 0.1
"""Share of the judged items whose replies must differ between repeats before a spread counts."""


def over_repeats(grades: Sequence[Grade], one: Callable[[Sequence[Grade]], Metrics]) -> Metrics:
    """`one` per repeat, averaged; `<name>_spread` is the sample standard deviation.

    `repeats_differ`: the share of judged items (not of empty replies) that got different replies in
    different repeats. Below a tenth the spread is None, not measured: a judge that ignores its seed
    says the same again, and the few replies that differ all the same (asked again, served by
    another model) would make it look exact. Raises ArtifactError unless each repeat grades the same
    questions.
    """
    by_repeat: dict[int, list[Grade]] = defaultdict(list)
    for grade in grades:
        by_repeat[grade.repeat].append(grade)
    if len(by_repeat) < 2:
        return one(sorted(grades, key=lambda grade: grade.question_id))
    repeats = [
        sorted(rows, key=lambda row: row.question_id) for _, rows in sorted(by_repeat.items())
    ]
    asked = [[row.question_id for row in rows] for rows in repeats]
    if any(ids != asked[0] for ids in asked):
        counts = [len(ids) for ids in asked]
        raise ArtifactError(f"grades: the repeats do not cover the same questions, got {counts}")
    differ = _repeats_differ(repeats)
    measured = differ is not None and differ >= MEASURED
    values = [one(rows) for rows in repeats]
    merged: Metrics = {"repeats_differ": differ}
    for name in values[0]:
        known = [value for value in (metrics[name] for metrics in values) if value is not None]
        complete = len(known) == len(values)
        merged[name] = fmean(known) if complete else None
        merged[f"{name}_spread"] = stdev(known) if complete and measured else None
    return merged


def _repeats_differ(repeats: Sequence[Sequence[Grade]]) -> float | None:
    replies = [{row.judge_reply for row in rows} for rows in zip(*repeats, strict=True)]
    judged = [said for said in replies if said != {""}]
    return fmean(len(said) > 1 for said in judged) if judged else None


def unique_responses(responses: Sequence[Response]) -> None:
    """Raises ArtifactError when a question was answered twice at one step."""
    seen: set[tuple[int, str]] = set()
    for response in responses:
        key = (response.step, response.question_id)
        if key in seen:
            raise ArtifactError(
                f"responses: question {response.question_id} of {response.benchmark} is answered "
                f"twice at step {response.step}"
            )
        seen.add(key)
