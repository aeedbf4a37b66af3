"""`compare --html`: two runs on one page, in the report's dress."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from controller.compare import Comparison, Side, compare, read_side
from controller.compare_text import interval, number, signed
from controller.places import RunPlace
from controller.report.browser import Wording, comparisons_section
from controller.report.chart import Series, curve
from controller.report.gather import BeforeAfter
from controller.report.markup import figure, html_table, section, text
from controller.report.page import frame
from controller.report.questions import find_questions
from controller.summary import Entry
from rlaifv.benchmarks.base import Benchmark, Question
from rlaifv.benchmarks.of_run import run_benchmarks

LINKS = {
    "loop": "Metrics",
    "candidates": "Iterations",
    "answers": "Answers",
    "configuration": "Configuration",
}
MOST_ANSWERS = 200
MOST_BYTES = 8_000_000
WORDING = Wording(
    "The same question to both",
    "Questions that they answered differently, the widest differences first. Better: B names "
    "fewer things that are not there.",
    *("A", "B", "B is"),
)


def write_comparison(file: Path, a: RunPlace, b: RunPlace) -> None:
    """Writes the page; at most 200 answers, below 10 MB."""
    found = compare(a, b, limit=MOST_ANSWERS)
    page = _page(found, read_side(a), read_side(b))
    file.write_bytes(page.encode("utf-8", "replace"))


def _page(found: Comparison, left: Side, right: Side) -> str:
    names = [text(one.config.name) for one in (left, right)]
    head = (
        f"<h1>{names[0]} and {names[1]}</h1>"
        f'<p class="soft">A: {text(found.a)}, {text(found.a_policy)}<br>'
        f"B: {text(found.b)}, {text(found.b_policy)}</p>"
    )
    body = _metrics(found) + _loops(found) + _answers(found, left, right) + _config(found)
    return frame(f"RLAIF-V: {names[0]} and {names[1]}", head, body, LINKS)


def _metrics(found: Comparison) -> str:
    rows = [
        [text(one.metric), number(one, one.a), number(one, one.b), signed(one), interval(one)]
        for one in found.metrics
    ]
    if not rows:
        return section("loop", "Metrics", "<p>No benchmark was answered by both.</p>")
    lead = (
        "Difference: B minus A, with the 95 % interval of a paired bootstrap over the questions "
        "(2,000 resamples). It says how much the choice of questions matters, not another seed."
    )
    titles = ["metric", "A", "B", "difference", "95 % interval"]
    return section("loop", "Metrics", html_table(titles, rows, left=1), lead=lead)


def _loops(found: Comparison) -> str:
    """Both curves of response-level hallucination, the untrained policies first."""
    lines = [_values(entries) for entries in (found.a_iterations, found.b_iterations)]
    most = max(map(len, lines))
    if most < 2:
        return ""
    ticks = ["untrained", *(f"iteration {n}" for n in range(most - 1))]
    padded = [[*values, *[None] * (most - len(values))] for values in lines]
    series = [Series("response", "A", padded[0]), Series("recall", "B", padded[1])]
    chart = figure(curve(series, ticks), "Response-level hallucination of A and of B (dashed).")
    return section("candidates", "Iteration by iteration", chart)


def _values(entries: Sequence[Entry]) -> list[float | None]:
    ordered = sorted(entries, key=lambda one: -1 if one.iteration is None else one.iteration)
    return [one.response_hallucination for one in ordered]


def _answers(found: Comparison, left: Side, right: Side) -> str:
    return comparisons_section(list(_pairs(found, left, right)), WORDING, MOST_BYTES)


def _pairs(found: Comparison, left: Side, right: Side) -> Iterator[BeforeAfter]:
    def load(name: str) -> Benchmark:
        return run_benchmarks(left.place.store, left.config, 0)[name]

    questions: dict[tuple[str, str], Question] = {}
    for benchmark in {one.benchmark for one in found.answers}:
        wanted = [one.question_id for one in found.answers if one.benchmark == benchmark]
        known = find_questions(partial(load, benchmark), wanted)
        questions |= {(benchmark, name): question for name, question in known.items()}
    for one in found.answers:
        key = one.benchmark, one.question_id
        yield BeforeAfter(
            left.responses[key],
            right.responses[key],
            one.a_grade,
            one.b_grade,
            questions.get(key),
        )


def _config(found: Comparison) -> str:
    if not found.config:
        return section("configuration", "Configuration", "<p>The configurations are equal.</p>")
    rows = [[text(one.key), text(one.a), text(one.b)] for one in found.config]
    table = html_table(["setting", "A", "B"], rows, left=3)
    return section("configuration", "Configuration", table)
