"""The examples and the before/after answers, ready for the filters of the page's script.

The first examples stand in the page; the others lie in `<template>`s, which cost next to nothing
until the script shows them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from controller.report.examples import Checked, Example, Judged
from controller.report.gather import BeforeAfter
from controller.report.markup import section, text
from controller.report.picture import img
from rlaifv.benchmarks.captions import CaptionGrade

SHOWN_AT_ONCE = 6
EXAMPLE_BYTES = 11_000_000
COMPARISON_BYTES = 2_000_000
"""Of HTML at most; the page says how many were left out. The rest of the page is below 1 MB."""


def examples_section(examples: Sequence[Example]) -> str:
    """The example browser."""
    if not examples:
        return ""
    articles, dropped = _within(map(_example, _interleaved(examples)), EXAMPLE_BYTES)
    left_out = f" {dropped} more did not fit into the page." if dropped else ""
    key = (
        f"{len(articles)} pairs of training data: in each iteration a third with the widest "
        f"difference of scores, the others at random.{left_out} Each claim shows the labeller's "
        "p(yes). Struck through: it did not say yes. The answer with fewer such claims is "
        "preferred."
    )
    numbers = sorted({one.iteration for one in examples})
    shown, later = articles[:SHOWN_AT_ONCE], articles[SHOWN_AT_ONCE:]
    stored = "".join(f"<template>{article}</template>" for article in later)
    return section(
        "examples",
        "What the policy learned from",
        _filters(numbers, max(one.margin for one in examples)),
        f'<div id="shown">{"".join(shown)}</div>',
        '<p id="none" hidden>No example passes these filters.</p>',
        '<button id="more" type="button" hidden>Show more</button>',
        f'<div id="stored" hidden>{stored}</div>',
        "<noscript><p>Without JavaScript only the first examples are shown.</p></noscript>",
        lead=key,
    )


class Wording(NamedTuple):
    """What a page calls two sets of answers to the same questions."""

    title: str
    lead: str
    before: str
    after: str
    choice: str


TRAINED = Wording(
    "The same question, before and after",
    "Questions that were never trained on. Better: fewer things named that are not there.",
    "untrained",
    "after the last iteration",
    "after training",
)


def comparisons_section(
    comparisons: Sequence[BeforeAfter], wording: Wording = TRAINED, most: int = COMPARISON_BYTES
) -> str:
    """Two answers to each question, side by side."""
    articles, _ = _within((_comparison(one, wording) for one in comparisons), most)
    if not articles:
        return ""
    options = {"": "all", "better": "better", "worse": "worse", "same": "neither"}
    choices = "".join(f'<option value="{key}">{name}</option>' for key, name in options.items())
    form = (
        f'<form class="filters" id="compare" hidden><label>{wording.choice} '
        f'<select name="way">{choices}</select></label><output></output></form>'
    )
    return section("answers", wording.title, form, *articles, lead=wording.lead)


def _interleaved(examples: Sequence[Example]) -> Iterator[Example]:
    """One of each iteration in turn, so that a page that is full lacks the last of each."""
    groups: dict[int, list[Example]] = {}
    for one in examples:
        groups.setdefault(one.iteration, []).append(one)
    for place in range(max(map(len, groups.values()), default=0)):
        for number in sorted(groups, reverse=True):
            if place < len(groups[number]):
                yield groups[number][place]


def _within(articles: Iterable[str], most: int) -> tuple[list[str], int]:
    """Those that fit, and how many do not."""
    kept, dropped, size = [], 0, 0
    for article in articles:
        length = len(article.encode("utf-8", "replace"))
        if size + length > most:
            dropped += 1
            continue
        size += length
        kept.append(article)
    return kept, dropped


def _filters(iterations: Sequence[int], widest: int) -> str:
    which = "".join(f'<option value="{one}">{one}</option>' for one in iterations)
    least = "".join(f'<option value="{one}">{one}</option>' for one in range(1, widest + 1))
    return (
        '<form class="filters" id="filters" hidden>'
        f'<label>iteration <select name="iteration"><option value="">all</option>{which}</select>'
        f'</label><label>score difference at least <select name="margin">{least}</select></label>'
        '<label>order <select name="order"><option value="">mixed</option>'
        '<option value="rejected">most rejected claims</option>'
        '<option value="margin">widest score difference</option></select></label>'
        '<label>contains <input name="words" type="search" autocomplete="off"></label>'
        '<output aria-live="polite"></output></form>'
    )


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
    rejected = max((one.num_rejected for one in example.answers if one.role), default=0)
    data = f'data-iteration="{example.iteration}" data-margin="{example.margin}"'
    where = f"iteration {example.iteration}, score difference {example.margin}"
    return (
        f'<article class="card example" {data} data-rejected="{rejected}"><div>{example.picture}'
        f'<p class="soft small">{where}<br>{text(example.pair.pair_id)}</p></div>'
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


def _comparison(one: BeforeAfter, wording: Wording) -> str:
    where = text(f"{one.before.benchmark}, {one.before.question_id}")
    asked, image = (one.question.question, one.question.image) if one.question else ("", None)
    question = f'<p class="text"><b>{text(asked)}</b></p>' if asked else ""
    sides = "".join(
        f'<div class="answer {role}"><span class="tag">{tag}</span><p class="text">'
        f'{text(answer.text)}</p><p class="soft small text">{_grade(grade)}</p></div>'
        for role, tag, answer, grade in (
            ("before", wording.before, one.before, one.grade_before),
            ("after", wording.after, one.after, one.grade_after),
        )
    )
    return (
        f'<article class="card example" data-way="{_way(one)}"><div>{img(image)}'
        f'<p class="soft small">{where}</p></div>'
        f'<div>{question}<div class="two">{sides}</div></div></article>'
    )


def _way(one: BeforeAfter) -> str:
    """By the number of things named that are not there; `unknown` for other benchmarks."""
    wrong = []
    for value in (one.grade_before, one.grade_after):
        try:
            grade = CaptionGrade.model_validate_json(value)
        except ValidationError:
            return "unknown"
        wrong.append(len({name for _, name, _ in grade.found} - set(grade.truth)))
    return "same" if wrong[0] == wrong[1] else "better" if wrong[1] < wrong[0] else "worse"


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
