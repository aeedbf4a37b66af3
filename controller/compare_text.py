"""What `compare` prints."""

from collections.abc import Iterator

from controller.compare import Changed, Compared, Comparison, SideBySide
from controller.paint import PLAIN, Paint, safe
from controller.summary import table
from controller.tables import Column, render

MOST_CHANGES = 40
FRACTIONS = {
    *("response_hallucination", "mention_hallucination", "recall", "chair_s"),
    *("rejected_claims", "rejected_answers"),
}


def comparison_text(found: Comparison, paint: Paint = PLAIN) -> str:
    """Settings, metrics, iterations, answers."""
    blocks = [
        f"A  {paint(safe(found.a), 'bold')}  ({found.a_policy})\n"
        f"B  {paint(safe(found.b), 'bold')}  ({found.b_policy})",
        _config(found.config),
    ]
    if found.metrics:
        blocks += [_metrics(found.metrics, paint), "\n".join(_notes(found))]
    else:
        blocks.append("No benchmark was answered by both.")
    for letter, entries in (("A", found.a_iterations), ("B", found.b_iterations)):
        if entries:
            blocks.append(f"{letter}, iteration by iteration\n{table(entries)}")
    blocks += [_answer(one, paint) for one in found.answers]
    return "\n\n".join(blocks)


def _config(changes: list[Changed]) -> str:
    if not changes:
        return "The configurations are equal."
    rows = [(safe(one.key), safe(one.a), safe(one.b)) for one in changes[:MOST_CHANGES]]
    text = render((Column("setting"), Column("A"), Column("B")), rows)
    left = len(changes) - MOST_CHANGES
    return text + (f"\nand {left} more; --json has all" if left > 0 else "")


def _metrics(metrics: list[Compared], paint: Paint) -> str:
    columns = (
        Column("metric"),
        *(Column(title, right=True) for title in ("A", "B", "B - A", "95 % interval")),
    )
    rows = [
        (one.metric, number(one, one.a), number(one, one.b), signed(one), interval(one))
        for one in metrics
    ]
    lines = render(columns, rows).split("\n")
    for place, one in enumerate(metrics, 2):
        if is_clear(one):
            lines[place] = paint(lines[place], "bold")
    return "\n".join(lines)


def _notes(found: Comparison) -> Iterator[str]:
    if any(one.low is not None for one in found.metrics):
        yield (
            "interval: paired bootstrap over the questions (2,000 resamples, seed 0). It says how "
            "much the choice of questions matters, not another training seed."
        )
    for why in sorted({one.spread for one in found.metrics if one.spread.startswith("none")}):
        yield f"without an interval ({why.removeprefix('none: ')}): " + ", ".join(
            one.metric for one in found.metrics if one.spread == why
        )


def is_percent(one: Compared) -> bool:
    """Whether the metric is a fraction that people read in percent."""
    return one.metric.rpartition("/")[2] in FRACTIONS


def number(one: Compared, value: float | None) -> str:
    """As people read it."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if is_percent(one) else f"{value:.2f}"


def signed(one: Compared) -> str:
    """The difference, in points where the metric is in percent."""
    if one.difference is None:
        return "-"
    return f"{100 * one.difference:+.1f}" if is_percent(one) else f"{one.difference:+.2f}"


def interval(one: Compared) -> str:
    """Of the difference."""
    if one.low is None or one.high is None:
        return "-"
    factor, places = (100, 1) if is_percent(one) else (1, 2)
    return f"{factor * one.low:+.{places}f} to {factor * one.high:+.{places}f}"


def is_clear(one: Compared) -> bool:
    """Whether the interval of the difference leaves out 0."""
    return one.low is not None and one.high is not None and not one.low <= 0 <= one.high


def _answer(one: SideBySide, paint: Paint) -> str:
    lines = [paint(safe(f"{one.benchmark} {one.question_id}"), "bold")]
    for letter, text, wrong in (("A", one.a, one.a_wrong), ("B", one.b, one.b_wrong)):
        lines.append(f"  {letter}: {safe(text)}")
        if wrong:
            lines.append("     " + paint(f"not in the picture: {safe(', '.join(wrong))}", "red"))
    return "\n".join(lines)
