"""Held-out instructions: how much of an answer the labeller rejects, claim by claim.

No truth is at hand: the labeller is the one whose verdicts made the training pairs, and it may
favour what it liked before. It needs no annotation and no judge.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from rlaifv.benchmarks.base import Metrics, Question, over_repeats, unique_responses
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import Count, Grade, Instruction, Record, Response

REJECTED_CLAIMS, REJECTED_ANSWERS = "rejected_claims", "rejected_answers"


class CheckedClaim(Record):
    """One claim of an answer and the labeller's verdict; it holds iff p_yes > p_no."""

    text: str
    p_yes: float
    p_no: float


class ClaimsGrade(Record):
    """What the labeller says of one answer."""

    claims: list[CheckedClaim]
    num_words: Count


class Answered(NamedTuple):
    """An answer to be checked."""

    question_id: str
    image: bytes
    question: str
    answer: str


class Labeller(Protocol):
    """Splits answers into claims and asks for each."""

    identity: str
    """Models and prompts; known once `check` has run."""

    def check(self, answers: Sequence[Answered]) -> list[list[CheckedClaim]]:
        """The claims of each answer, in order; an answer may have none."""
        ...


def claims_metrics(grades: Sequence[ClaimsGrade]) -> Metrics:
    """rejected_claims: rejected / all claims; rejected_answers: answers with a rejected claim /
    answers that claim anything; claims and words per answer."""
    rejected = [sum(one.p_yes <= one.p_no for one in grade.claims) for grade in grades]
    claims = [len(grade.claims) for grade in grades]
    claiming = sum(count > 0 for count in claims)
    return {
        REJECTED_CLAIMS: sum(rejected) / sum(claims) if sum(claims) else None,
        REJECTED_ANSWERS: sum(count > 0 for count in rejected) / claiming if claiming else None,
        "mean_claims": sum(claims) / len(grades) if grades else None,
        "mean_words": sum(grade.num_words for grade in grades) / len(grades) if grades else None,
    }


class Labelled:
    """The benchmark; a labeller is needed for `grade` only."""

    def __init__(
        self, rows: Callable[[], Iterator[Instruction]], labeller: Labeller | None = None
    ) -> None:
        self._rows, self._labeller = rows, labeller

    def questions(self) -> Iterator[Question]:
        for row in self._rows():
            yield Question(row.instruction_id, row.question, row.image.bytes)

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        if self._labeller is None:
            raise ConfigError("held-out instructions are graded by stage `grade` only")
        unique_responses(responses)
        wanted = {response.question_id for response in responses}
        asked = {one.question_id: one for one in self.questions() if one.question_id in wanted}
        if strangers := sorted(wanted - asked.keys()):
            raise ArtifactError(f"responses: {strangers[0]!r} is no held-out instruction")
        answers = [
            Answered(one.question_id, asked[one.question_id].image, question, one.text)
            for one in responses
            for question in [asked[one.question_id].question]
        ]
        checked = self._labeller.check(answers)
        for response, claims in zip(responses, checked, strict=True):
            value = ClaimsGrade(claims=claims, num_words=len(response.text.split()))
            yield Grade(
                benchmark=response.benchmark,
                question_id=response.question_id,
                step=response.step,
                judge=self._labeller.identity,
                judge_reply="",
                value=value.model_dump_json(),
            )

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        return over_repeats(
            grades,
            lambda rows: claims_metrics(
                [ClaimsGrade.model_validate_json(row.value) for row in rows]
            ),
        )
