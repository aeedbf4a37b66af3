"""RefoMB: a judge compares each answer with GPT-4V's, given a full description of the picture."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

from rlaifv.benchmarks.base import Metrics, Question, over_repeats, unique_responses
from rlaifv.benchmarks.files import NumberedRow, image_bytes, read_rows, text_field
from rlaifv.benchmarks.judge import Judge, no_judge
from rlaifv.benchmarks.prompts import (
    REFOMB,
    REFOMB_HALLUCINATION,
    REFOMB_HALLUCINATION_SYSTEM,
    REFOMB_SYSTEM,
    Prompt,
    load_prompt,
)
from rlaifv.benchmarks.replies import Ask, Message, Replier, Reply, judged_by
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError
from rlaifv.places import local_path
from rlaifv.records import Count, Grade, Record, Response

JUDGE_MODEL = "gpt-4-1106-preview"
MAX_TOKENS = 2048
REPEATS = 3
"""The README recommends several judgings and their mean; no number is given by the release."""
_VERDICT = re.compile(r"\[\[(A|B|C)\]\]")
_SCORES = {"A": -1, "B": 1, "C": 0}


class Item(NamedTuple):
    """One question of the dev split."""

    image_url: str
    question: str
    description: str
    answer: str
    """GPT-4V's."""
    question_type: str


class ComparisonGrade(Record):
    """The verdicts on one answer against GPT-4V's: 1 the model wins, 0 equal, -1 it loses."""

    question_type: str
    verdict: int
    """GPT-4V as model A, as the release asks."""
    swapped_verdict: int | None = None
    """In the other order, from the model's side; None: not asked."""
    swapped_reply: str = ""
    fewer_hallucinations: int | None = None
    """1 the model has fewer, 0 equal, -1 GPT-4V has fewer; None: not asked."""
    hallucination_reply: str = ""
    num_words: Count = 0
    judge_model: str = ""
    input_tokens: Count = 0
    """Of all requests for this row."""
    output_tokens: Count = 0

    @property
    def score(self) -> float:
        """Mean over the orders that were asked."""
        if self.swapped_verdict is None:
            return float(self.verdict)
        return (self.verdict + self.swapped_verdict) / 2


def parse_verdict(reply: str) -> int | None:
    """The first of [[A]], [[B]], [[C]] as -1, 1, 0; None without one."""
    match = _VERDICT.search(reply)
    return _SCORES[match.group(1)] if match else None


def comparison_metrics(grades: Sequence[ComparisonGrade]) -> Metrics:
    """Of one judging: the win rate with ties at one half, wins, ties and losses as shares, overall
    and per type; the same win rate for having fewer hallucinations; agreement of the two orders.
    """
    metrics = _win_rates(grades, "")
    judged = [grade.fewer_hallucinations for grade in grades]
    known = [one for one in judged if one is not None]
    complete = bool(judged) and len(known) == len(judged)
    metrics["hallucination_score"] = fmean((one + 1) / 2 for one in known) if complete else None
    swapped = [grade for grade in grades if grade.swapped_verdict is not None]
    agree = [grade.verdict == grade.swapped_verdict for grade in swapped]
    metrics["order_agreement"] = fmean(agree) if agree else None
    metrics["mean_words"] = fmean(grade.num_words for grade in grades) if grades else None
    for name in sorted({grade.question_type for grade in grades}):
        of_type = [grade for grade in grades if grade.question_type == name]
        metrics |= _win_rates(of_type, f"_{name}")
    return metrics


def _win_rates(grades: Sequence[ComparisonGrade], suffix: str) -> Metrics:
    scores = [grade.score for grade in grades]
    if not scores:
        return {f"{name}{suffix}": None for name in ("score", "win", "tie", "loss")}
    return {
        f"score{suffix}": fmean((score + 1) / 2 for score in scores),
        f"win{suffix}": fmean(score > 0 for score in scores),
        f"tie{suffix}": fmean(score == 0 for score in scores),
        f"loss{suffix}": fmean(score < 0 for score in scores),
    }


def read_items(path: str) -> list[Item]:
    """The dev file's rows in order; `description` may be called `gt_description`."""
    items = []
    for row in read_rows(local_path(path)):
        items.append(
            Item(
                text_field(row, "image_url"),
                text_field(row, "question"),
                text_field(row, "description", "gt_description"),
                text_field(row, "answer"),
                text_field(row, "type"),
            )
        )
    return items


def read_answer(row: NumberedRow) -> str:
    """A model's answer as the release reads it."""
    return clean_answer(text_field(row, "answer", "text"))


def clean_answer(text: str) -> str:
    """The end-of-text token spelled out, as the release does."""
    return text.replace("<|endoftext|>", "<EOT>")


class Compared(NamedTuple):
    """A model's answer to an item of the dev split."""

    name: str
    position: int
    """Row of the item."""
    text: str
    item: Item
    row: int = 0
    """Where it stands in the caller's list."""


class Comparer:
    """Compares answers with GPT-4V's through an endpoint or files of replies."""

    def __init__(
        self,
        replier: Replier,
        *,
        hallucination: Replier | None = None,
        prompt: Prompt = REFOMB,
        swap: bool = False,
    ) -> None:
        """`hallucination` reads the reviews for the hallucination score; None: not asked."""
        self._replier, self._hallucination = replier, hallucination
        self._prompt, self._swap = prompt, swap

    @property
    def identity(self) -> str:
        """What goes into every grade."""
        orders = "both orders" if self._swap else "GPT-4V first"
        parts = [f"refomb {orders}", judged_by(self._replier, self._prompt.source)]
        if self._hallucination is not None:
            other = judged_by(self._hallucination, REFOMB_HALLUCINATION.source)
            parts.append(f"hallucinations: {other}")
        return "; ".join(parts)

    def compare(
        self, answers: Sequence[Compared]
    ) -> Iterator[tuple[Compared, int, ComparisonGrade, str]]:
        """(answer, repeat, grade, review) per answer and repeat."""
        repeats = self._replier.repeats or REPEATS
        pairs = [(answer, repeat) for answer in answers for repeat in range(repeats)]
        reviews = self._verdicts([self._ask(*pair, swapped=False) for pair in pairs])
        others: Sequence[Reply | None] = [None] * len(pairs)
        if self._swap:
            others = self._verdicts([self._ask(*pair, swapped=True) for pair in pairs])
        counts: Sequence[Reply | None] = [None] * len(pairs)
        if self._hallucination is not None:
            asks = [
                _hallucination_ask(*pair, review.text)
                for pair, review in zip(pairs, reviews, strict=True)
            ]
            counts = self._hallucination.ask(asks, _has_verdict)
        for (answer, repeat), review, other, count in zip(
            pairs, reviews, others, counts, strict=True
        ):
            yield answer, repeat, _grade(answer, review, other, count), review.text

    def _verdicts(self, asks: Sequence[Ask]) -> list[Reply]:
        return self._replier.ask(asks, _has_verdict)

    def _ask(self, answer: Compared, repeat: int, *, swapped: bool) -> Ask:
        item = answer.item
        both = (answer.text, item.answer) if swapped else (item.answer, answer.text)
        content = self._prompt.fill(item.description, item.question, *both)
        messages = (Message("system", REFOMB_SYSTEM), Message("user", content))
        return Ask(answer.name, answer.position, messages, MAX_TOKENS, repeat)


def _hallucination_ask(answer: Compared, repeat: int, review: str) -> Ask:
    messages = (
        Message("system", REFOMB_HALLUCINATION_SYSTEM),
        Message("user", REFOMB_HALLUCINATION.fill(review)),
    )
    name = f"{answer.name} (hallucinations)"
    return Ask(name, answer.position, messages, MAX_TOKENS, repeat, subject=review)


def _has_verdict(reply: str) -> bool:
    return parse_verdict(reply) is not None


def _grade(
    answer: Compared, review: Reply, other: Reply | None, count: Reply | None
) -> ComparisonGrade:
    verdict = parse_verdict(review.text)
    swapped = parse_verdict(other.text) if other else None
    if verdict is None:
        raise ArtifactError(f"{answer.name}: the review has no verdict")
    replies = [reply for reply in (review, other, count) if reply is not None]
    return ComparisonGrade(
        question_type=answer.item.question_type,
        verdict=verdict,
        swapped_verdict=None if swapped is None else -swapped,
        swapped_reply=other.text if other else "",
        fewer_hallucinations=parse_verdict(count.text) if count else None,
        hallucination_reply=count.text if count else "",
        num_words=len(answer.text.split()),
        judge_model=review.model,
        input_tokens=sum(reply.input_tokens for reply in replies),
        output_tokens=sum(reply.output_tokens for reply in replies),
    )


class RefoMB:
    """Kind `refomb`: `path` is the dev file, `images` the folder of the pictures it names."""

    def __init__(self, spec: BenchmarkSpec) -> None:
        if spec.judge is None:
            raise no_judge(spec.name)
        self._spec, self._config = spec, spec.judge

    def questions(self) -> Iterator[Question]:
        path = local_path(self._spec.path)
        folder = local_path(self._spec.images) if self._spec.images else path.parent
        for row in read_rows(path):
            image = image_bytes(row, "image", "image_url", folder=folder)
            yield Question(str(row.number), text_field(row, "question"), image)

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        unique_responses(responses)
        answers = []
        for place, response in enumerate(responses):
            position = int(response.question_id) if response.question_id.isdecimal() else -1
            if not 0 <= position < len(self._items):
                raise ArtifactError(
                    f"responses: question {response.question_id!r} is not in {self._spec.path}"
                )
            name, text = f"{position} at step {response.step}", clean_answer(response.text)
            answers.append(Compared(name, position, text, self._items[position], place))
        comparer = self._comparer
        for answer, repeat, value, review in comparer.compare(answers):
            response = responses[answer.row]
            yield Grade(
                benchmark=response.benchmark,
                question_id=response.question_id,
                step=response.step,
                repeat=repeat,
                judge=comparer.identity,
                judge_reply=review,
                value=value.model_dump_json(),
            )

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        return over_repeats(
            grades,
            lambda rows: comparison_metrics(
                [ComparisonGrade.model_validate_json(row.value) for row in rows]
            ),
        )

    @cached_property
    def _items(self) -> list[Item]:
        return read_items(self._spec.path)

    @cached_property
    def _comparer(self) -> Comparer:
        judge = Judge(self._config, default_model=JUDGE_MODEL, max_tokens=MAX_TOKENS)
        file = self._config.prompt
        return Comparer(
            judge,
            hallucination=judge,
            prompt=load_prompt(REFOMB, local_path(file) if file else None),
            swap=self._config.swap,
        )
