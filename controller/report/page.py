"""The report as one HTML page: nothing is loaded, and every text of a model is escaped.

At most 14 MB: examples and answers have byte budgets (`browser`), everything else is figures.
"""

import html
from collections.abc import Mapping, Sequence

from controller.report.browser import comparisons_section, examples_section
from controller.report.chart import Series, curve
from controller.report.gather import Story
from controller.report.markup import figure, html_table, section, text
from controller.report.script import SCRIPT, script_digest
from controller.report.sections import (
    TITLES,
    candidates_section,
    figure_of,
    labeller_section,
    lineage_section,
    pairs_section,
    time_section,
    training_section,
)
from controller.report.style import CSS
from controller.summary import METRICS, Entry, caveat
from rlaifv.config import RunConfig
from rlaifv.pipeline import labels_grades

LINKS = {
    "loop": "The loop",
    "candidates": "Checkpoints",
    "examples": "Examples",
    "answers": "Before and after",
    "pairs": "Pairs",
    "labeller": "Labeller",
    "training": "Training",
    "time": "Time",
    "lineage": "Lineage",
    "configuration": "Configuration",
}


def policy() -> str:
    """Content security policy: nothing is fetched, and no script but ours runs."""
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {script_digest()}"


def render_page(story: Story) -> str:
    """The whole page."""
    name = text(story.config.name)
    body = "".join(
        [
            _loop(story.entries),
            candidates_section(story.config, story.iterations),
            examples_section(story.examples),
            comparisons_section(story.comparisons),
            pairs_section(story.iterations),
            labeller_section(story.iterations),
            training_section(story.iterations),
            time_section(story.config, story.iterations),
            lineage_section(story.iterations),
            _configuration(story),
        ]
    )
    return frame(f"RLAIF-V: {name}", _head(story), body)


def frame(title: str, head: str, body: str, names: Mapping[str, str] = LINKS) -> str:
    """A page of ours around HTML of ours; `title` is escaped already."""
    links = "".join(
        f'<a href="#{anchor}">{name}</a>'
        for anchor, name in names.items()
        if f'<section id="{anchor}">' in body
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n"
        f'<body><main><header>{head}<nav aria-label="Sections">{links}</nav></header>'
        f"{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(story: Story) -> str:
    done, name = len(story.iterations), text(story.config.name)
    lead = f"Run <b>{name}</b>, seed {story.config.seed}: {done} of {story.config.iterations} iterations."
    if not story.entries:
        return f"<h1>RLAIF-V</h1><p>{lead} Nothing has been chosen yet.</p>"
    last, first = story.entries[-2], story.entries[-1]
    before, after = first.response_hallucination, last.response_hallucination
    title = "The policy after the last iteration"
    if before and after is not None:
        percents = round(100 * (after - before) / before)
        way = "fewer" if percents < 0 else "more"
        title = "As many answers as before name something not in the picture"
        if percents:
            title = f"{abs(percents)} % {way} answers that name something not in the picture"
    tiles = "".join(_tile(metric, first, last) for metric in METRICS)
    unseen = "Measured on questions that neither training nor the choice of checkpoints saw."
    note = text(f"{_levels(story.config)} {caveat(story.config) or unseen}")
    return f'<h1>{title}</h1><p class="soft">{lead} {note}</p><div class="tiles">{tiles}</div>'


def _levels(config: RunConfig) -> str:
    if labels_grades(config):
        return (
            "Response level: share of answers with at least one claim that the labeller rejects. "
            "Mention level: share of such claims."
        )
    return (
        "Response level: share of answers with at least one object that is not in the picture. "
        "Mention level: share of the named objects."
    )


def _tile(metric: str, first: Entry, last: Entry) -> str:
    values = [getattr(first, metric), getattr(last, metric)]
    before, after = (figure_of(metric, value) for value in values)
    return (
        f'<div class="tile"><span class="soft small">{TITLES[metric]}</span><b>{after}</b>'
        f'<span class="soft small">before: {before}</span></div>'
    )


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The untrained policy first."""
    return sorted(entries, key=lambda one: -1 if one.iteration is None else one.iteration)


def _loop(entries: Sequence[Entry]) -> str:
    ordered = _in_order(entries)
    if not ordered:
        return ""
    ticks = ["untrained", *(f"iteration {one.iteration}" for one in ordered[1:])]
    series = [
        Series("response", "response", [one.response_hallucination for one in ordered]),
        Series("mention", "mention", [one.mention_hallucination for one in ordered]),
        Series("recall", "recall", [one.recall for one in ordered]),
    ]
    caption = "Hallucination at response and mention level (lower is better), recall dashed."
    chart = figure(curve(series, ticks), caption)
    return section("loop", "The loop", chart, _table(ordered))


def _table(ordered: Sequence[Entry]) -> str:
    rows = []
    for one in ordered:
        untrained = one.iteration is None
        chosen = f"step {one.checkpoint}" if one.checkpoint else "the policy stayed"
        figures = [figure_of(metric, getattr(one, metric)) for metric in METRICS]
        name = "untrained" if untrained else f"iteration {one.iteration}"
        rows.append(
            [name, "" if untrained else chosen, *figures, "" if untrained else f"{one.pairs}"]
        )
    titles = ["policy", "checkpoint", *(TITLES[metric] for metric in METRICS), "pairs"]
    return html_table(titles, rows, left=2)


def _configuration(story: Story) -> str:
    """What the run was asked for; `text` would cut it."""
    config = html.escape(story.config.model_dump_json(indent=1))
    body = f"<details><summary>config.json</summary><pre>{config}</pre></details>"
    return section("configuration", "Configuration", body)
