"""What the report shows, read from the store: bounded, however large the run."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

from controller.plan import WRITERS
from controller.report.questions import find_questions
from controller.summary import Entry, read_choices, summarise
from rlaifv.benchmarks import Question
from rlaifv.config import RunConfig
from rlaifv.pipeline import ARTIFACTS, STAGES, Shard, manifest_key, num_shards, part_key
from rlaifv.records import (
    Answer,
    Choice,
    Claim,
    Grade,
    PreferencePair,
    Record,
    Response,
    Verdict,
)
from rlaifv.store import Manifest, Store

NUM_EXAMPLES = 12
"""Examples in the page, shared out over the iterations; as many before/after answers."""
LOOKED_AT = 256
"""Pairs of an iteration among which examples are looked for: one row group."""
R = TypeVar("R", bound=Record)
Asked = tuple[str, str]
"""Benchmark and question id."""


class StageLine(NamedTuple):
    """What one stage of one iteration did."""

    stage: str
    rows: int
    quarantined: int
    seconds: float
    """Of work, summed over the shards."""
    shards: int


class Iteration(NamedTuple):
    """One iteration that has chosen."""

    number: int
    choice: Choice
    stages: tuple[StageLine, ...]


class Checked(NamedTuple):
    """A claim and its verdict."""

    claim: Claim
    verdict: Verdict


class Judged(NamedTuple):
    """A sampled answer and what became of it."""

    answer: Answer
    claims: tuple[Checked, ...]
    role: str
    """`chosen`, `rejected`, or empty."""

    @property
    def num_rejected(self) -> int:
        return sum(one.verdict.p_yes <= one.verdict.p_no for one in self.claims)


class Example(NamedTuple):
    """A preference pair with all the answers it was taken from."""

    iteration: int
    pair: PreferencePair
    answers: tuple[Judged, ...]


class BeforeAfter(NamedTuple):
    """The same benchmark question, answered by the untrained and by the last policy."""

    before: Response
    after: Response
    grade_before: str
    grade_after: str
    question: Question | None
    """None: the benchmark's files are not at hand."""


class Story(NamedTuple):
    """Everything the page says."""

    config: RunConfig
    entries: list[Entry]
    iterations: tuple[Iteration, ...]
    examples: tuple[Example, ...]
    comparisons: tuple[BeforeAfter, ...]


def gather(run: Store, config: RunConfig) -> Story:
    """Reads what is there of a run; iterations without a choice are left out."""
    choices = read_choices(run, config)
    each = -(-NUM_EXAMPLES // max(1, len(choices)))
    return Story(
        config,
        entries=summarise(config, choices),
        iterations=tuple(
            Iteration(number, choice, tuple(_stages(run, number)))
            for number, choice in choices.items()
        ),
        examples=tuple(
            example for number in choices for example in _examples(run, config, number, limit=each)
        )[:NUM_EXAMPLES],
        comparisons=tuple(_comparisons(run, config, choices)),
    )


def _stages(run: Store, iteration: int) -> Iterator[StageLine]:
    for stage in STAGES.values():
        key = manifest_key(iteration, stage.writes)
        if stage.writes in ARTIFACTS and run.exists(key):
            parts = run.read_json(key, Manifest).parts
            yield StageLine(
                stage.name,
                rows=sum(part.rows for part in parts),
                quarantined=sum(part.quarantined for part in parts),
                seconds=sum(part.seconds for part in parts),
                shards=len(parts),
            )


def _rows(run: Store, config: RunConfig, at: tuple[int, str], record: type[R]) -> Iterator[R]:
    """Rows of every part of an artifact that is there."""
    iteration, artifact = at
    count = num_shards(config, WRITERS[artifact].name)
    for index in range(count):
        key = part_key(iteration, artifact, Shard(index, count))
        if run.exists(key):
            yield from run.read_part(key, record)


def _examples(run: Store, config: RunConfig, iteration: int, *, limit: int) -> list[Example]:
    """The pairs with the largest difference of scores among the first ones, one per image."""
    first = list(
        itertools.islice(_rows(run, config, (iteration, "pairs"), PreferencePair), LOOKED_AT)
    )
    first.sort(key=lambda pair: (pair.rejected_score - pair.chosen_score, pair.pair_id))
    by_image: dict[str, PreferencePair] = {}
    for pair in first:
        by_image.setdefault(pair.image_id, pair)
    pairs = list(by_image.values())[:limit]
    wanted = {pair.instruction_id for pair in pairs}
    answers: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in _rows(run, config, (iteration, "answers"), Answer):
        if answer.instruction_id in wanted:
            answers[answer.instruction_id].append(answer)
    claims = _checked_claims(run, config, iteration=iteration, wanted=wanted)
    return [
        Example(
            iteration,
            pair,
            tuple(_judged(pair, answer, claims) for answer in answers[pair.instruction_id]),
        )
        for pair in pairs
    ]


def _checked_claims(
    run: Store, config: RunConfig, *, iteration: int, wanted: set[str]
) -> dict[str, list[Checked]]:
    """Claims with their verdicts by answer."""
    verdicts = {
        verdict.claim_id: verdict
        for verdict in _rows(run, config, (iteration, "verdicts"), Verdict)
        if verdict.instruction_id in wanted
    }
    claims: defaultdict[str, list[Checked]] = defaultdict(list)
    for claim in _rows(run, config, (iteration, "claims"), Claim):
        if claim.claim_id in verdicts:
            claims[claim.answer_id].append(Checked(claim, verdicts[claim.claim_id]))
    return claims


def _judged(pair: PreferencePair, answer: Answer, claims: Mapping[str, list[Checked]]) -> Judged:
    role = {pair.chosen_id: "chosen", pair.rejected_id: "rejected"}.get(answer.answer_id, "")
    return Judged(answer, tuple(claims.get(answer.answer_id, ())), role)


def _comparisons(
    run: Store, config: RunConfig, choices: Mapping[int, Choice]
) -> Iterator[BeforeAfter]:
    """Questions of the first report benchmark whose answer changed, in its own order."""
    reported = [one for one in config.respond.benchmarks if one.use == "report"]
    if not choices or not reported:
        return
    last = max(choices)
    before, old = _answered(run, config, iteration=0, step=0, choice=choices[0])
    after, new = _answered(
        run, config, iteration=last, step=choices[last].step, choice=choices[last]
    )
    name = reported[0].name
    changed = [
        key
        for key in before
        if key[0] == name and key in after and before[key].text != after[key].text
    ][:NUM_EXAMPLES]
    questions = find_questions(reported[0], [question for _, question in changed])
    for key in changed:
        grades = old.get(key, ""), new.get(key, "")
        yield BeforeAfter(before[key], after[key], *grades, questions.get(key[1]))


def _answered(
    run: Store, config: RunConfig, *, iteration: int, step: int, choice: Choice
) -> tuple[dict[Asked, Response], dict[Asked, str]]:
    """Responses and grades of one checkpoint; only its own parts are read."""
    steps = sorted(candidate.step for candidate in choice.candidates)
    slices, count = config.shards.respond, num_shards(config, "respond")
    start = steps.index(step) * slices
    responses: dict[Asked, Response] = {}
    grades: dict[Asked, str] = {}
    for index in range(start, start + slices):
        shard = Shard(index, count)
        for row in run.read_part(part_key(iteration, "responses", shard), Response):
            responses[row.benchmark, row.question_id] = row
        for grade in run.read_part(part_key(iteration, "grades", shard), Grade):
            grades[grade.benchmark, grade.question_id] = grade.value
    return responses, grades
