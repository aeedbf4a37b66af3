"""The report's figures: candidates, pairs, labeller, training, time, lineage."""

from collections.abc import Iterator, Mapping, Sequence

from controller.paint import duration
from controller.report.chart import Bar, Candidate, bars, candidate_curve, short_number, small_curve
from controller.report.events import SHOWN
from controller.report.facts import MOST_CLAIMS, NUM_BINS, Words
from controller.report.gather import Iteration, StageLine
from controller.report.markup import figure, html_table, section, text
from controller.summary import percent
from rlaifv.benchmarks.labelled import REJECTED_ANSWERS, REJECTED_CLAIMS
from rlaifv.benchmarks.of_run import selecting
from rlaifv.config import RunConfig
from rlaifv.pipeline import STAGES, stage_of

TITLES = {
    "response_hallucination": "response-level hallucination",
    "mention_hallucination": "mention-level hallucination",
    "recall": "recall",
    "mean_words": "mean words",
    REJECTED_CLAIMS: "claims that the labeller rejects",
    REJECTED_ANSWERS: "answers with such a claim",
}
CURVES = (
    ("response", ("response_hallucination", REJECTED_ANSWERS)),
    ("mention", ("mention_hallucination", REJECTED_CLAIMS)),
    ("recall", ("recall",)),
)
"""CSS classes and metrics of the candidate curve; of several the one that was measured."""
FUNNEL = {
    "answers": "answers",
    "empty": "without text",
    "without_claims": "without claims",
    "inconsistent": "claims and verdicts do not match",
    "possible": "pairs of answers to a question",
    "below_margin": "scores too close",
    "over_limit": "over the limit per image",
    "equal_text": "equal texts",
    "too_short": "preferred answer too short (length balance)",
    "pairs": "pairs kept",
    "length_ratio": "length ratio of the balance",
}
"""What `pair` notes, in order."""


def figure_of(metric: str, value: float | None) -> str:
    """A metric as people read it."""
    if metric.rpartition("/")[2] == "mean_words":
        return "-" if value is None else f"{value:.1f}"
    return percent(value)


def candidates_section(config: RunConfig, iterations: Sequence[Iteration]) -> str:
    """Every checkpoint that could have been chosen."""
    selects = selecting(config)
    points = []
    for iteration in iterations:
        for one in iteration.choice.candidates:
            values = tuple(_mean_metric(one.metrics, selects, names) for _, names in CURVES)
            chosen = one.step == iteration.choice.step
            points.append(Candidate(iteration.number, one.step, values, chosen))
    what = "Hallucination at response level, at mention level, and recall (dashed)"
    if any(REJECTED_CLAIMS in name for point in iterations for name in point.choice.metrics):
        what = "Share of answers with a claim that the labeller rejects, and of such claims"
    caption = (
        f"{what}, on the questions that the choice is made on. A ring marks the chosen "
        "checkpoint; the first point of each iteration is the policy it started from."
    )
    known = any(value is not None for point in points for value in point.values)
    svg = candidate_curve([name for name, _ in CURVES], points) if known else ""
    details = "".join(_iteration(one, open_=one is iterations[-1]) for one in iterations)
    return section("candidates", "Checkpoints", figure(svg, caption), details)


def _mean_metric(
    metrics: Mapping[str, float | None], benchmarks: Sequence[str], names: Sequence[str]
) -> float | None:
    keys = [f"{benchmark}/{name}" for benchmark in benchmarks for name in names]
    values = [value for key in keys if (value := metrics.get(key)) is not None]
    return sum(values) / len(values) if values else None


def _iteration(iteration: Iteration, *, open_: bool) -> str:
    choice = iteration.choice
    chosen = f"step {choice.step}" if choice.step else "the starting policy"
    head = f"Iteration {iteration.number}: {chosen} chosen, {choice.num_pairs} pairs"
    return (
        f'<details class="card"{" open" if open_ else ""}><summary>{head}</summary>'
        f'<p class="text">{text(choice.reason)}</p>{_candidates(iteration)}</details>'
    )


def _candidates(iteration: Iteration) -> str:
    choice = iteration.choice
    names = list(dict.fromkeys(name for one in choice.candidates for name in one.metrics))
    names = [name for name in names if name.rpartition("/")[2] in TITLES]
    rows, marked = [], None
    for place, one in enumerate(choice.candidates):
        if one.step == choice.step:
            marked = place
        label = f"step {one.step}" if one.step else "step 0, start"
        verdict = "chosen" if one.step == choice.step else "" if one.eligible else "not eligible"
        remark = f'{verdict} <span class="soft">{text(one.remark)}</span>'
        rows.append([label, remark, *(figure_of(name, one.metrics.get(name)) for name in names)])
    titles = ["checkpoint", "", *(text(_metric_title(name)) for name in names)]
    return html_table(titles, rows, left=2, marked=marked)


def _metric_title(name: str) -> str:
    benchmark, _, metric = name.rpartition("/")
    return f"{TITLES[metric]} ({benchmark})"


def pairs_section(iterations: Sequence[Iteration]) -> str:
    """Score differences, length balance, claims per answer, of the iterations together."""
    margins, claims = _added(iterations, "margins"), _added(iterations, "claims")
    if not margins and not claims:
        return ""
    every = max(1, len(claims) // 10)
    charts = [
        figure(
            bars("pairs by score difference", [Bar(str(n), margins[n]) for n in sorted(margins)]),
            "Pairs by score difference: so many more rejected claims has the rejected answer.",
        ),
        figure(
            bars(
                "answers by number of claims",
                [Bar(f"{n}+" if n == MOST_CLAIMS else str(n), claims[n]) for n in sorted(claims)],
                every=every,
            ),
            "Answers by number of claims.",
        ),
    ]
    rows = [_lengths(one) for one in iterations]
    titles = [
        "iteration",
        *("pairs", "preferred before", "other before", "difference"),
        *("preferred after", "other after", "difference"),
    ]
    lead = (
        "Mean words of the preferred and of the other answer: before over every two answers to a "
        "question whose scores differ enough, after over the pairs that were kept. A difference "
        "far from 0 would teach the policy to answer longer or shorter."
    )
    return section(
        "pairs",
        "Pairs",
        f'<div class="charts">{"".join(charts)}</div>',
        f"<h3>Length balance</h3><p class='soft small'>{lead}</p>{html_table(titles, rows, left=1)}",
        _funnel(iterations),
    )


def _added(iterations: Sequence[Iteration], name: str) -> dict[int, int]:
    total: dict[int, int] = {}
    for iteration in iterations:
        for key, count in getattr(iteration.facts, name).items():
            total[key] = total.get(key, 0) + count
    return total


def _lengths(iteration: Iteration) -> list[str]:
    facts = iteration.facts
    pairs = str(facts.after.pairs) if facts.after else "0"
    return [str(iteration.number), pairs, *_words(facts.before), *_words(facts.after)]


def _words(words: Words | None) -> list[str]:
    if words is None:
        return ["-", "-", "-"]
    return [f"{words.chosen:.1f}", f"{words.rejected:.1f}", f"{words.chosen - words.rejected:+.1f}"]


def _funnel(iterations: Sequence[Iteration]) -> str:
    noted = [name for name in FUNNEL if any(name in one.pairing for one in iterations)]
    if not noted:
        return ""
    rows = [
        [FUNNEL[name], *(text(one.pairing.get(name, "-")) for one in iterations)] for name in noted
    ]
    titles = ["", *(f"iteration {one.number}" for one in iterations)]
    table = html_table(titles, rows, left=1)
    return f"<details><summary>From answers to pairs</summary>{table}</details>"


def labeller_section(iterations: Sequence[Iteration]) -> str:
    """How sure the labeller is."""
    total = [sum(one.facts.p_yes[n] for one in iterations) for n in range(NUM_BINS)]
    if not any(total):
        return ""
    values = []
    for n, count in enumerate(total):
        low, high = n / NUM_BINS, (n + 1) / NUM_BINS
        values.append(
            Bar(f"{low:.2g}", count, "yes" if low >= 0.5 else "no" if high <= 0.5 else "")
        )
    rows = []
    for one in iterations:
        facts, claims = one.facts, sum(one.facts.p_yes)
        unsure = sum(facts.p_yes[n] for n in range(NUM_BINS) if 0.25 <= n / NUM_BINS < 0.75)
        shares = [
            share / claims if claims else None for share in (facts.accepted, facts.ties, unsure)
        ]
        mass = "-" if facts.mass is None else f"{facts.mass:.3f}"
        rows.append([str(one.number), str(claims), *map(percent, shares), mass])
    titles = ["iteration", "claims", "accepted", "ties", "0.25 ≤ p(yes) < 0.75", "p(yes) + p(no)"]
    caption = "Claims by p(yes), all iterations. A claim is accepted where p(yes) > p(no)."
    lead = (
        "A labeller worth its time is sure: most claims stand at the ends. p(yes) + p(no) far "
        "below 1 means that it does not answer the question; many ties, that it cannot tell."
    )
    inner = "The same without the two ends, where the labeller is not sure."
    charts = figure(bars("claims by p(yes)", values, every=4), caption)
    charts += figure(bars("claims by p(yes) without the ends", values[1:-1], every=4), inner)
    return section(
        "labeller",
        "Labeller",
        f'<div class="charts">{charts}</div>',
        html_table(titles, rows, left=1),
        lead=lead,
    )


def training_section(iterations: Sequence[Iteration]) -> str:
    """Curves of every iteration in one picture per number."""
    charts = []
    for tag, title in SHOWN.items():
        lines = [
            (f"iteration {one.number}", curve.steps, curve.values)
            for one in iterations
            for curve in one.curves
            if curve.tag == tag
        ]
        if svg := small_curve(title, lines):
            ends = ", ".join(f"{short_number(values[-1])}" for _, _, values in lines)
            charts.append(figure(svg, f"{title}; at the end: {ends}"))
    if not charts:
        return ""
    names = "".join(
        f'<li class="key-{place % 6}">iteration {one.number}</li>'
        for place, one in enumerate(iterations)
    )
    legend = f'<ul class="keys small">{names}</ul>'
    return section("training", "Training", legend, f'<div class="charts">{"".join(charts)}</div>')


def time_section(config: RunConfig, iterations: Sequence[Iteration]) -> str:
    """Seconds of work, waiting and cost per stage."""
    by_stage: dict[str, dict[int, StageLine]] = {}
    for iteration in iterations:
        for line in iteration.stages:
            by_stage.setdefault(line.stage, {})[iteration.number] = line
    if not by_stage:
        return ""
    rows, costs = [], []
    for stage, lines in by_stage.items():
        work = sum(line.seconds for line in lines.values())
        queues = [line.queue_seconds for line in lines.values() if line.queue_seconds is not None]
        costs += [line.cost for line in lines.values() if line.cost is not None]
        each = [
            duration(lines[one.number].seconds) if one.number in lines else "-"
            for one in iterations
        ]
        rows.append(
            [
                stage,
                stage_of(config, stage).runs_on,
                *each,
                duration(work),
                duration(sum(queues)) if queues else "-",
                str(sum(line.rows for line in lines.values())),
                str(sum(line.quarantined for line in lines.values())),
            ]
        )
    titles = [
        *("stage", "runs on"),
        *(f"iteration {one.number}" for one in iterations),
        *("work", "waited", "rows", "set aside"),
    ]
    money = f"<p>Paid to endpoints, at the configured prices: {sum(costs):.2f}</p>" if costs else ""
    lead = (
        "Work, summed over the shards, as each noted it: what has to be paid for. Waited: shards "
        "that were submitted and had no place yet, summed likewise."
    )
    return section(
        "time",
        "Time and cost",
        html_table(titles, rows, left=2),
        money,
        _gpu(config, by_stage),
        lead=lead,
    )


def _gpu(config: RunConfig, by_stage: dict[str, dict[int, StageLine]]) -> str:
    seconds = {"gpu": 0.0, "cpu": 0.0}
    for stage, lines in by_stage.items():
        kind = "cpu" if stage_of(config, stage).runs_on == "cpu" else "gpu"
        seconds[kind] += sum(line.seconds for line in lines.values())
    return (
        f"<p>Stages that want a GPU: {duration(seconds['gpu'])} of work; the others: "
        f"{duration(seconds['cpu'])}. A shard that trains on several GPUs counts once.</p>"
    )


def lineage_section(iterations: Sequence[Iteration]) -> str:
    """What made each artifact, by the footers of its first part."""
    tables = "".join(_lineage(one) for one in iterations)
    lead = (
        "From the footers of the first part of each artifact; <code>python -m controller lineage"
        "</code> shows all of them, <code>verify</code> recomputes every checksum."
    )
    return section("lineage", "Lineage", tables, lead=lead)


def _lineage(iteration: Iteration) -> str:
    rows = list(_lineage_rows(iteration))
    if not rows:
        return ""
    titles = ["artifact", "parts", "SHA-256 of the rows", "code", "image", "made from"]
    table = html_table(titles, rows, left=6)
    head = f"Iteration {iteration.number}"
    return f'<details class="card"><summary>{head}</summary>{table}</details>'


def _lineage_rows(iteration: Iteration) -> Iterator[list[str]]:
    for line in iteration.stages:
        origin = line.origin
        inputs = "<br>".join(
            f"{text(key)} <code>{text(digest[:12])}</code>"
            for key, digest in sorted(origin.inputs.items())[:4]
        )
        more = len(origin.inputs) - 4
        yield [
            STAGES[line.stage].writes,
            str(line.shards),
            f"<code>{text(line.digest[:12])}</code>",
            text(origin.code_version),
            text(origin.image[-30:] or "local process"),
            inputs + (f"<br>and {more} more" if more > 0 else ""),
        ]
