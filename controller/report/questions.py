"""Questions and pictures of a benchmark, for the report."""

from collections.abc import Callable, Sequence

from rlaifv.benchmarks.base import Benchmark, Question
from rlaifv.errors import RlaifvError


def find_questions(load: Callable[[], Benchmark], wanted: Sequence[str]) -> dict[str, Question]:
    """Some questions by id; empty when the benchmark's files or tools are not on this machine.

    A report is written where the run's results are, which need not be where its data is.
    """
    left, found = set(wanted), {}
    try:
        for question in load().questions():
            if question.question_id in left:
                left.discard(question.question_id)
                found[question.question_id] = question
            if not left:
                break
    except (RlaifvError, OSError, ImportError):
        return {}
    return found
