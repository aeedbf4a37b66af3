"""The figures of a run: one entry per iteration, as JSON and as a table."""

import json
from collections.abc import Mapping, Sequence

from controller.tables import Column, folded, render
from rlaifv.benchmarks.labelled import REJECTED_ANSWERS, REJECTED_CLAIMS
from rlaifv.benchmarks.of_run import selecting
from rlaifv.config import RunConfig
from rlaifv.pipeline import choice_key, labels_grades
from rlaifv.records import Choice, Record
from rlaifv.store import Store

SUMMARY = "report/summary.json"
METRICS = ("response_hallucination", "mention_hallucination", "recall", "mean_words")
LABELLED = {"response_hallucination": REJECTED_ANSWERS, "mention_hallucination": REJECTED_CLAIMS}
"""What stands for a metric where the labeller's verdicts are all there is."""


class Entry(Record):
    """One line of `report/summary.json`.

    Rates are fractions, measured on the benchmarks of `shown_benchmarks` (their mean when there are
    several); None: not measured.
    """

    iteration: int | None
    """None: the untrained policy."""
    checkpoint: int
    """Step of the chosen checkpoint; 0: the policy that the iteration started from."""
    response_hallucination: float | None
    """Share of answers that name at least one object which is not in the picture; where only the
    labeller measures, share of answers with a claim that it rejects."""
    mention_hallucination: float | None
    """Share of named objects which are not in the picture, or of claims that it rejects."""
    recall: float | None
    mean_words: float | None
    pairs: int


def summarise(config: RunConfig, choices: Mapping[int, Choice]) -> list[Entry]:
    """Entries of the iterations that have chosen, then the untrained policy as the last one."""
    entries = [
        _entry(config, choices[iteration], iteration=iteration) for iteration in sorted(choices)
    ]
    if 0 in choices:
        first = choices[0]
        untrained = first.model_copy(update={"step": 0, "metrics": first.baseline, "num_pairs": 0})
        entries.append(_entry(config, untrained, iteration=None))
    return entries


def _entry(config: RunConfig, choice: Choice, *, iteration: int | None) -> Entry:
    values = {name: report_metric(config, choice.metrics, name) for name in METRICS}
    return Entry(iteration=iteration, checkpoint=choice.step, pairs=choice.num_pairs, **values)


def report_metric(
    config: RunConfig, metrics: Mapping[str, float | None], name: str
) -> float | None:
    """Mean of a metric over the benchmarks of `shown_benchmarks` that define it."""
    known = {f"{one}/{same}" for one in shown_benchmarks(config) for same in _names(name)}
    values = [value for key, value in metrics.items() if key in known and value is not None]
    return sum(values) / len(values) if values else None


def _names(metric: str) -> tuple[str, ...]:
    return (metric, LABELLED[metric]) if metric in LABELLED else (metric,)


def shown_benchmarks(config: RunConfig) -> list[str]:
    """Names of the benchmarks whose `use` is `report`; where none is, of those that select."""
    reported = [one.name for one in config.respond.benchmarks if one.use == "report"]
    return reported or selecting(config)


def caveat(config: RunConfig) -> str:
    """What a reader of the figures must know; empty when `report` benchmarks gave them."""
    shown = shown_benchmarks(config)
    if not shown:
        return "Nothing was measured: no benchmark is configured (respond.benchmarks)."
    if any(one.use == "report" for one in config.respond.benchmarks):
        return ""
    verdicts = " (labeller's verdicts)" if labels_grades(config) else ""
    return f"Measured on {', '.join(shown)}{verdicts}, where checkpoints are chosen."


def read_choices(run: Store, config: RunConfig) -> dict[int, Choice]:
    """Choices committed so far, by iteration."""
    return {
        iteration: run.read_json(choice_key(iteration), Choice)
        for iteration in range(config.iterations)
        if run.exists(choice_key(iteration))
    }


def write_summary(run: Store, config: RunConfig) -> list[Entry]:
    """Writes `report/summary.json` anew from the stored choices."""
    entries = summarise(config, read_choices(run, config))
    text = json.dumps([entry.model_dump() for entry in entries], indent=1) + "\n"
    run.write_bytes(SUMMARY, text.encode())
    return entries


def table(entries: Sequence[Entry], note: str = "") -> str:
    """The same for people in 80 columns, the untrained policy first, a note below."""
    if not entries:
        return "No iteration has chosen a checkpoint yet."
    columns = (
        Column("iteration"),
        Column("checkpoint"),
        Column("response", right=True),
        Column("mention", right=True),
        Column("recall", right=True),
        Column("words", right=True),
        Column("pairs", right=True),
    )
    ordered = sorted(entries, key=lambda one: -1 if one.iteration is None else one.iteration)
    lines = render(columns, [_cells(entry) for entry in ordered])
    return f"{lines}\n{folded(note)}" if note else lines


def _cells(entry: Entry) -> tuple[str, ...]:
    untrained = entry.iteration is None
    checkpoint = f"step {entry.checkpoint}" if entry.checkpoint else "kept (step 0)"
    return (
        "untrained" if untrained else str(entry.iteration),
        "-" if untrained else checkpoint,
        percent(entry.response_hallucination),
        percent(entry.mention_hallucination),
        percent(entry.recall),
        "-" if entry.mean_words is None else f"{entry.mean_words:.1f}",
        "-" if untrained else str(entry.pairs),
    )


def percent(value: float | None) -> str:
    """A fraction as people read it."""
    return "-" if value is None else f"{100 * value:.1f} %"
