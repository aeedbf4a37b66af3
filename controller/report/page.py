"""The report as one HTML page: nothing is loaded, and every text of a model is escaped."""

import html
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from controller.report.chart import Series, curve
from controller.report.gather import BeforeAfter, Checked, Example, Iteration, Judged, Story
from controller.report.picture import img
from controller.report.style import CSS
from controller.summary import METRICS, Entry, percent
from rlaifv.benchmarks.captions import CaptionGrade

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: whatever an answer holds, nothing runs and nothing is fetched."""
LONGEST_TEXT = 4000
"""Characters of an answer that are shown."""
TITLES = {
    "response_hallucination": "response-level hallucination",
    "mention_hallucination": "mention-level hallucination",
    "recall": "recall",
    "mean_words": "mean words",
}


def text(value: str) -> str:
    """Hostile text as HTML; NUL is not allowed there, and very long text is cut, saying so."""
    if len(value) > LONGEST_TEXT:
        value = f"{value[:LONGEST_TEXT]} [... {len(value) - LONGEST_TEXT} more characters]"
    return html.escape(value.replace("\0", "\ufffd"))


def render_page(story: Story) -> str:
    """The whole page."""
    name = text(story.config.name)
    body = [
        _head(story),
        _curve(story.entries),
        _table(story.entries),
        "<h2>Iterations</h2>",
        *(_iteration(one, open_=one is story.iterations[-1]) for one in story.iterations),
        _examples(story.examples),
        _comparisons(story.comparisons),
        "<h2>Configuration</h2><details><summary>config.json</summary>"
        f"<pre>{html.escape(story.config.model_dump_json(indent=1))}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>RLAIF-V: {name}</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
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
    note = (
        "Response level: share of answers with at least one object that is not in the picture. "
        "Mention level: share of the named objects. Both are measured on questions that neither "
        "training nor the choice of checkpoints saw."
    )
    return f'<h1>{title}</h1><p class="soft">{lead} {note}</p><div class="tiles">{tiles}</div>'


def _tile(metric: str, first: Entry, last: Entry) -> str:
    values = [getattr(first, metric), getattr(last, metric)]
    before, after = (_figure(metric, value) for value in values)
    return (
        f'<div class="tile"><span class="soft small">{TITLES[metric]}</span><b>{after}</b>'
        f'<span class="soft small">before: {before}</span></div>'
    )


def _figure(metric: str, value: float | None) -> str:
    if metric.rpartition("/")[2] == "mean_words":
        return "-" if value is None else f"{value:.1f}"
    return percent(value)


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The untrained policy first."""
    return sorted(entries, key=lambda one: -1 if one.iteration is None else one.iteration)


def _curve(entries: Sequence[Entry]) -> str:
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
    return (
        f'<h2>The loop</h2><figure class="card"><div class="wide">{curve(series, ticks)}</div>'
        f'<figcaption class="small">{caption}</figcaption></figure>'
    )


def _table(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    rows = []
    for one in _in_order(entries):
        untrained = one.iteration is None
        chosen = f"step {one.checkpoint}" if one.checkpoint else "the policy stayed"
        figures = [_figure(metric, getattr(one, metric)) for metric in METRICS]
        name = "untrained" if untrained else f"iteration {one.iteration}"
        rows.append(
            [name, "" if untrained else chosen, *figures, "" if untrained else f"{one.pairs}"]
        )
    titles = ["policy", "checkpoint", *(TITLES[metric] for metric in METRICS), "pairs"]
    return _html_table(titles, rows, left=2)


def _html_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int,
    marked: int | None = None,
) -> str:
    """Cells are HTML already; the first `left` columns are text, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}>{cell}</{tag}>" if place < left else f'<{tag} class="n">{cell}</{tag}>'
            for place, cell in enumerate(row)
        )

    body = "".join(
        f'<tr class="chosen">{cells("td", row)}</tr>'
        if place == marked
        else f"<tr>{cells('td', row)}</tr>"
        for place, row in enumerate(rows)
    )
    head = f"<thead><tr>{cells('th', titles)}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _iteration(iteration: Iteration, *, open_: bool) -> str:
    choice = iteration.choice
    chosen = f"step {choice.step}" if choice.step else "the starting policy"
    head = f"Iteration {iteration.number}: {chosen} chosen, {choice.num_pairs} pairs"
    rows = [
        [
            line.stage,
            *(f"{line.rows}", f"{line.quarantined}", f"{line.shards}", f"{line.seconds:.1f}"),
        ]
        for line in iteration.stages
    ]
    titles = ["stage", "rows", "quarantined", "shards", "seconds of work"]
    return (
        f'<details class="card"{" open" if open_ else ""}><summary>{head}</summary>'
        f'<p class="text">{text(choice.reason)}</p>'
        f"<h3>Candidates</h3>{_candidates(iteration)}"
        f"<h3>Stages</h3>{_html_table(titles, rows, left=1)}</details>"
    )


def _candidates(iteration: Iteration) -> str:
    choice = iteration.choice
    names = list(dict.fromkeys(name for one in choice.candidates for name in one.metrics))
    names = [name for name in names if name.rpartition("/")[2] in METRICS]
    rows, marked = [], None
    for place, one in enumerate(choice.candidates):
        if one.step == choice.step:
            marked = place
        label = f"step {one.step}" if one.step else "step 0, start"
        verdict = "chosen" if one.step == choice.step else "" if one.eligible else "not eligible"
        remark = f'{verdict} <span class="soft">{text(one.remark)}</span>'
        rows.append([label, remark, *(_figure(name, one.metrics.get(name)) for name in names)])
    titles = ["checkpoint", "", *(text(_metric_title(name)) for name in names)]
    return _html_table(titles, rows, left=2, marked=marked)


def _metric_title(name: str) -> str:
    benchmark, _, metric = name.rpartition("/")
    return f"{TITLES[metric]} ({benchmark})"


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    key = (
        '<p class="soft">Each claim shows the labeller\'s p(yes). Struck through: it did not say '
        "yes. The answer with fewer such claims is preferred.</p>"
    )
    return f"<h2>What the policy learned from</h2>{key}" + "".join(map(_example, examples))


def _example(example: Example) -> str:
    order = {"chosen": 0, "rejected": 1, "": 2}
    ranked = sorted(example.answers, key=lambda one: (order[one.role], one.answer.answer_id))
    pair = [_answer(one) for one in ranked if one.role]
    others = [_answer(one) for one in ranked if not one.role]
    more = (
        f"<details><summary>the other answers ({len(others)})</summary>{''.join(others)}</details>"
        if others
        else ""
    )
    return (
        f'<article class="card example"><div>{img(example.pair.image.bytes)}'
        f'<p class="soft small">iteration {example.iteration}, {text(example.pair.pair_id)}</p></div>'
        f'<div><p class="text"><b>{text(example.pair.question)}</b></p>{"".join(pair)}{more}</div>'
        "</article>"
    )


def _answer(judged: Judged) -> str:
    tag = judged.role or "not used"
    score = f"{judged.num_rejected} of {len(judged.claims)} claims rejected"
    claims = "".join(map(_claim, judged.claims))
    return (
        f'<div class="answer {judged.role}"><span class="tag">{tag}</span> '
        f'<span class="soft small">{score}</span>'
        f'<p class="text">{text(judged.answer.text)}</p><ul class="claims">{claims}</ul></div>'
    )


def _claim(checked: Checked) -> str:
    verdict = checked.verdict
    if verdict.p_yes <= verdict.p_no:
        kind = "no"
    else:
        kind = "mid" if verdict.p_yes < 2 * verdict.p_no else "yes"
    title = text(f"{checked.claim.question} p(no) {verdict.p_no:.2f}")
    return (
        f'<li class="{kind}" title="{title}"><span>{text(checked.claim.text)}</span> '
        f"<i>{verdict.p_yes:.2f}</i></li>"
    )


def _comparisons(comparisons: Sequence[BeforeAfter]) -> str:
    if not comparisons:
        return ""
    return "<h2>The same question, before and after</h2>" + "".join(map(_comparison, comparisons))


def _comparison(one: BeforeAfter) -> str:
    where = text(f"{one.before.benchmark}, {one.before.question_id}")
    asked, image = (one.question.question, one.question.image) if one.question else ("", None)
    question = f'<p class="text"><b>{text(asked)}</b></p>' if asked else ""
    sides = "".join(
        f'<div class="answer {role}"><span class="tag">{tag}</span><p class="text">'
        f'{text(answer.text)}</p><p class="soft small text">{_grade(grade)}</p></div>'
        for role, tag, answer, grade in (
            ("rejected", "untrained", one.before, one.grade_before),
            ("chosen", "after the last iteration", one.after, one.grade_after),
        )
    )
    return (
        f'<article class="card example"><div>{img(image)}<p class="soft small">{where}</p></div>'
        f'<div>{question}<div class="two">{sides}</div></div></article>'
    )


def _grade(value: str) -> str:
    """What an object benchmark found in an answer; another benchmark's own record as it is."""
    try:
        grade = CaptionGrade.model_validate_json(value)
    except ValidationError:
        return text(value)
    named = dict.fromkeys(object_class for _, object_class, _ in grade.found)
    there = [one for one in named if one in grade.truth]
    wrong = [one for one in named if one not in grade.truth]
    missing = [one for one in grade.truth if one not in named]
    words = [f"right: {text(', '.join(there) or 'nothing')}"]
    words.append(
        f'<b class="wrong">not in the picture: {text(", ".join(wrong))}</b>' if wrong else ""
    )
    words.append(f"not named: {text(', '.join(missing))}" if missing else "")
    return "; ".join(filter(None, words))
