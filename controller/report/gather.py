"""What the report shows, read from the store: bounded, however large the run."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from controller.journal import read_journal
from controller.report.events import Curve, read_curves
from controller.report.examples import Example, examples_each, join, pick_pairs
from controller.report.facts import Facts, part_keys, read_facts
from controller.report.questions import find_questions
from controller.summary import Entry, read_choices, shown_benchmarks, summarise
from rlaifv.benchmarks.base import Question
from rlaifv.benchmarks.of_run import run_benchmarks
from rlaifv.config import RunConfig
from rlaifv.pipeline import ARTIFACTS, STAGES, Shard, manifest_key, num_shards, part_key
from rlaifv.records import Choice, Grade, Response
from rlaifv.store import Manifest, Provenance, Store

NUM_COMPARISONS = 36
"""Benchmark questions with the answers before and after."""
MOST_FOOTERS = 256
"""Parts of a stage whose provenance is read for what their servers cost."""
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
    queue_seconds: float | None
    """Summed over the shards; None: no controller noted it."""
    cost: float | None
    """Of an endpoint whose prices are configured."""
    digest: str
    """Of the rows of its first part."""
    origin: Provenance
    """Of its first part."""


class Iteration(NamedTuple):
    """One iteration that has chosen."""

    number: int
    choice: Choice
    stages: tuple[StageLine, ...]
    facts: Facts
    curves: tuple[Curve, ...]
    pairing: Mapping[str, str]
    """What `pair` noted: counts of answers and pairs, and the length ratio."""


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
    journal = read_journal(run)
    queues = {(c.iteration, c.stage): c.queue_seconds for c in journal.clocks} if journal else {}
    iterations, examples = [], []
    for number, choice in choices.items():
        picked = pick_pairs(run, config, number, limit=examples_each(len(choices)))
        facts, rows = read_facts(run, config, number, {one.pair.instruction_id for one in picked})
        examples += join(number, picked, rows)
        lines = tuple(_stages(run, config, number, queues))
        pairing = next((line.origin.notes for line in lines if line.stage == "pair"), {})
        curves = read_curves(run, number)
        iterations.append(Iteration(number, choice, lines, facts, curves, pairing))
    return Story(
        config,
        entries=summarise(config, choices),
        iterations=tuple(iterations),
        examples=tuple(examples),
        comparisons=tuple(_comparisons(run, config, choices)),
    )


def _stages(
    run: Store, config: RunConfig, iteration: int, queues: Mapping[tuple[int, str], float]
) -> Iterator[StageLine]:
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
                queue_seconds=queues.get((iteration, stage.name)),
                cost=_cost(run, config, iteration, stage.name),
                digest=parts[0].rows_sha256,
                origin=run.provenance(parts[0].key),
            )


def _cost(run: Store, config: RunConfig, iteration: int, stage: str) -> float | None:
    """Read from the footers of stages that may have asked an endpoint; scaled up if not of all."""
    models = {
        "sample": config.policy,
        "claim": config.claim.model,
        "verify": config.verify.labeller,
    }
    if stage not in models or models[stage].endpoint is None:
        return None
    keys = part_keys(run, config, iteration, STAGES[stage].writes)
    read = keys[:MOST_FOOTERS]
    costs = [float(run.provenance(key).notes.get("cost", "0")) for key in read]
    return sum(costs) * len(keys) / len(read) if read else None


def _comparisons(
    run: Store, config: RunConfig, choices: Mapping[int, Choice]
) -> Iterator[BeforeAfter]:
    """Questions of the first benchmark shown whose answer changed, in its own order."""
    shown = shown_benchmarks(config)
    if not choices or not shown:
        return
    last = max(choices)
    before, old = answered(run, config, iteration=0, step=0, choice=choices[0])
    after, new = answered(
        run, config, iteration=last, step=choices[last].step, choice=choices[last]
    )
    name = shown[0]
    changed = [
        key
        for key in before
        if key[0] == name and key in after and before[key].text != after[key].text
    ][:NUM_COMPARISONS]
    questions = find_questions(
        lambda: run_benchmarks(run, config, last)[name], [question for _, question in changed]
    )
    for key in changed:
        grades = old.get(key, ""), new.get(key, "")
        yield BeforeAfter(before[key], after[key], *grades, questions.get(key[1]))


def answered(
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
