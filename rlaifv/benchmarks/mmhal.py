"""MMHal-Bench: 96 questions of eight types, rated 0 to 6 by a judge that reads, not sees."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

from rlaifv.benchmarks.base import Metrics, Question, over_repeats, unique_responses
from rlaifv.benchmarks.files import NumberedRow, image_bytes, read_rows, text_field
from rlaifv.benchmarks.judge import Judge, no_judge
from rlaifv.benchmarks.prompts import MMHAL, Prompt, load_prompt
from rlaifv.benchmarks.replies import Ask, Message, Replier, judged_by
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError
from rlaifv.places import local_path
from rlaifv.records import Count, Grade, Record, Response

TYPES: tuple[str, ...] = ("attribute", "adversarial", "comparison", "counting")
TYPES += ("relation", "environment", "holistic", "other")
"""Of the item at each index, cyclic."""
JUDGE_MODEL = "gpt-4-1106-preview"
MAX_TOKENS = 512
NO_HALLUCINATION = 3
"""The lowest rating without hallucination."""
_RATINGS = range(7)


class Item(NamedTuple):
    """A question with what the judge is told."""

    image_content: str
    question: str
    gt_answer: str


class RatingGrade(Record):
    """The judge's rating of one answer."""

    index: Count
    """Of the question; its type follows from it."""
    rating: int | None
    """None: the reply does not hold exactly one rating; it counts as 0 (release)."""
    num_words: Count
    judge_model: str = ""
    input_tokens: Count = 0
    output_tokens: Count = 0


def parse_rating(reply: str) -> int | None:
    """The one value s for which the lower-cased reply contains `rating: s`; None for none or more.

    The same rating twice is one value; `**Rating**: 5` and `Rating 5` hold none (release).
    """
    lowered = reply.lower()
    found = [rating for rating in _RATINGS if f"rating: {rating}" in lowered]
    return found[0] if len(found) == 1 else None


def rating_metrics(grades: Sequence[RatingGrade]) -> Metrics:
    """Score, hallucination rate and informativeness of one judging, and the score per type.

    score: mean rating; hallucination rate: share below 3; informativeness: mean of s - 3 (s >= 3)
    or s, over 3, in percent. An unparsed reply is a 0 and is counted.
    """
    ratings = [grade.rating or 0 for grade in grades]
    informative = [one - 3 if one >= NO_HALLUCINATION else one for one in ratings]
    hallucinated = [one < NO_HALLUCINATION for one in ratings]
    metrics: Metrics = {
        "score": _mean(ratings),
        "response_hallucination": _mean(hallucinated),
        "informativeness": fmean(informative) / 3 * 100 if informative else None,
        "unparsed": float(sum(grade.rating is None for grade in grades)),
        "mean_words": _mean([grade.num_words for grade in grades]),
    }
    for number, name in enumerate(TYPES):
        of_type = [grade.rating or 0 for grade in grades if grade.index % len(TYPES) == number]
        metrics[f"score_{name}"] = _mean(of_type)
    return metrics


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def read_items(path: str) -> list[Item]:
    """The benchmark's records in order. Raises ArtifactError for a row out of the types' cycle."""
    items = []
    for row in read_rows(local_path(path)):
        check_type(row)
        content = row.row.get("image_content")
        if not isinstance(content, list):
            raise ArtifactError(f"{row.where}, field image_content: expected a list of strings")
        items.append(
            Item(
                ", ".join(str(name) for name in content),
                text_field(row, "question"),
                text_field(row, "gt_answer"),
            )
        )
    return items


def check_type(row: NumberedRow) -> None:
    """Rows belong to questions by position, so a type out of its place means a wrong order."""
    given = row.row.get("question_type")
    expected = TYPES[row.number % len(TYPES)]
    if given is not None and given != expected:
        raise ArtifactError(
            f"{row.where}, field question_type: expected {expected!r} at this position, got "
            f"{given!r}; rows are matched by position"
        )


class Rater:
    """Rates answers through an endpoint or a file of replies."""

    def __init__(self, replier: Replier, prompt: Prompt = MMHAL) -> None:
        self._replier, self._prompt = replier, prompt

    @property
    def identity(self) -> str:
        """What goes into every grade."""
        return f"mmhal; {judged_by(self._replier, self._prompt.source)}"

    def rate(
        self, answers: Sequence["RatedAnswer"]
    ) -> Iterator[tuple["RatedAnswer", int, RatingGrade, str]]:
        """(answer, repeat, grade, reply) per answer and repeat; an unparsed reply is kept."""
        repeats = self._replier.repeats or 1
        pairs = [(answer, repeat) for answer in answers for repeat in range(repeats)]
        asks = [self._ask(answer, repeat) for answer, repeat in pairs]
        replies = self._replier.ask(asks, lambda _: True)
        for (answer, repeat), reply in zip(pairs, replies, strict=True):
            grade = RatingGrade(
                index=answer.number,
                rating=parse_rating(reply.text),
                num_words=len(answer.text.split()),
                judge_model=reply.model,
                input_tokens=reply.input_tokens,
                output_tokens=reply.output_tokens,
            )
            yield answer, repeat, grade, reply.text

    def _ask(self, answer: "RatedAnswer", repeat: int) -> Ask:
        item = answer.item or Item("", "", "")  # a file of replies needs no question
        content = self._prompt.fill(item.image_content, item.question, item.gt_answer, answer.text)
        return Ask(answer.name, answer.number, (Message("user", content),), MAX_TOKENS, repeat)


class RatedAnswer(NamedTuple):
    """An answer and the question at its position."""

    name: str
    number: int
    text: str
    item: Item | None
    row: int = 0
    """Where it stands in the caller's list."""


class MMHal:
    """Kind `mmhal`: `path` is the file with images (base64) and reference answers."""

    def __init__(self, spec: BenchmarkSpec) -> None:
        if spec.judge is None:
            raise no_judge(spec.name)
        self._spec = spec
        self._prompt = spec.judge.prompt
        self._config = spec.judge

    def questions(self) -> Iterator[Question]:
        path = local_path(self._spec.path)
        folder = local_path(self._spec.images) if self._spec.images else path.parent
        for row in read_rows(path):
            check_type(row)
            image = image_bytes(row, "image", "image_path", "image_id", folder=folder)
            yield Question(str(row.number), text_field(row, "question"), image)

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        unique_responses(responses)
        answers = []
        for place, response in enumerate(responses):
            index = int(response.question_id) if response.question_id.isdecimal() else -1
            if not 0 <= index < len(self._items):
                raise ArtifactError(
                    f"responses: question {response.question_id!r} is not in {self._spec.path}"
                )
            text = clean_answer(response.text)
            name = f"{index} at step {response.step}"
            answers.append(RatedAnswer(name, index, text, self._items[index], place))
        rater = self._rater
        for answer, repeat, value, reply in rater.rate(answers):
            response = responses[answer.row]
            yield Grade(
                benchmark=response.benchmark,
                question_id=response.question_id,
                step=response.step,
                repeat=repeat,
                judge=rater.identity,
                judge_reply=reply,
                value=value.model_dump_json(),
            )

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        return over_repeats(
            grades,
            lambda rows: rating_metrics(
                [RatingGrade.model_validate_json(row.value) for row in rows]
            ),
        )

    @cached_property
    def _items(self) -> list[Item]:
        return read_items(self._spec.path)

    @cached_property
    def _rater(self) -> Rater:
        prompt = load_prompt(MMHAL, local_path(self._prompt) if self._prompt else None)
        return Rater(Judge(self._config, default_model=JUDGE_MODEL, max_tokens=MAX_TOKENS), prompt)


def clean_answer(text: str) -> str:
    """The answer as the release reads it."""
    return text.replace("Assistant:", "").strip()
