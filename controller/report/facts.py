"""Figures over all rows of an iteration, streamed: a row group in memory, and numbers per answer."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from controller.plan import WRITERS
from rlaifv.config import RunConfig
from rlaifv.pairs import count_words
from rlaifv.pipeline import ARTIFACTS, Shard, num_shards, part_key
from rlaifv.records import Answer, Claim, Record, Verdict, parse_rows
from rlaifv.store import Store

GROUPS_AT_ONCE = 16
"""Row groups read together: 4,096 rows without pictures are some 10 MB."""
NUM_BINS = 20
"""Of the p(yes) histogram."""
MOST_CLAIMS = 20
"""Answers with more claims are counted as if they had so many."""
R = TypeVar("R", bound=Record)


class Words(NamedTuple):
    """Mean words of the preferred and of the other answer."""

    chosen: float
    rejected: float
    pairs: int


class Facts(NamedTuple):
    """What the rows of an iteration say together."""

    margins: dict[int, int]
    """Pairs by difference of scores."""
    before: Words | None
    """Over every two answers to a question whose scores differ enough."""
    after: Words | None
    """Over the pairs that were kept."""
    claims: dict[int, int]
    """Answers by number of claims."""
    answers: int
    p_yes: tuple[int, ...]
    """Claims by p(yes), in `NUM_BINS` equal bins."""
    accepted: int
    """Claims with p(yes) > p(no)."""
    ties: int
    """Claims with p(yes) = p(no): they count as rejected."""
    mass: float | None
    """Mean p(yes) + p(no): how often the labeller answers the question at all."""


class Wanted(NamedTuple):
    """Rows of the instructions that the page shows."""

    answers: list[Answer]
    claims: list[Claim]
    verdicts: dict[str, Verdict]


def tables(
    run: Store, config: RunConfig, at: tuple[int, str], names: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Some row groups at a time, of every part of an artifact that is there."""
    iteration, artifact = at
    for key in part_keys(run, config, iteration, artifact):
        columns = names or list(ARTIFACTS[artifact].model_fields)
        yield from run.read_columns(key, columns, at_once=GROUPS_AT_ONCE)


def part_keys(run: Store, config: RunConfig, iteration: int, artifact: str) -> list[str]:
    """Of the parts that are there."""
    count = num_shards(config, WRITERS[artifact].name)
    keys = [part_key(iteration, artifact, Shard(index, count)) for index in range(count)]
    return [key for key in keys if run.exists(key)]


def read_facts(
    run: Store, config: RunConfig, iteration: int, wanted: Collection[str]
) -> tuple[Facts, Wanted]:
    """One pass over each artifact; `wanted` are ids of instructions whose rows are kept."""
    names = pa.array(sorted(wanted), pa.string())
    rows = Wanted([], [], {})
    labels = _Labels()
    for table in tables(run, config, (iteration, "verdicts")):
        labels.add(table)
        for verdict in _kept(table, names, Verdict):
            rows.verdicts[verdict.claim_id] = verdict
    words: dict[str, tuple[str, int]] = {}
    for table in tables(run, config, (iteration, "answers")):
        columns = (
            table.column(name).to_pylist() for name in ("answer_id", "instruction_id", "text")
        )
        for answer_id, instruction_id, text in zip(*columns, strict=True):
            words[answer_id] = (instruction_id, count_words(text))
        rows.answers.extend(_kept(table, names, Answer))
    if names:
        for table in tables(run, config, (iteration, "claims")):
            rows.claims.extend(_kept(table, names, Claim))
    margins, after = _pairs(run, config, iteration)
    claims = Counter(min(MOST_CLAIMS, labels.claims[answer_id]) for answer_id in words)
    facts = Facts(
        margins=margins,
        before=_before(words, labels, config.pair.min_margin),
        after=after,
        claims=dict(sorted(claims.items())),
        answers=len(words),
        p_yes=tuple(int(one) for one in labels.bins),
        accepted=labels.accepted,
        ties=labels.ties,
        mass=labels.mass / labels.count if labels.count else None,
    )
    return facts, rows


def _kept(table: pa.Table, wanted: pa.Array, record: type[R]) -> Iterator[R]:
    if not wanted:
        return
    found = table.filter(pc.is_in(table.column("instruction_id"), wanted))
    yield from parse_rows(record, found.to_pylist(), file=record.__name__)


class _Labels:
    """Sums over verdicts."""

    def __init__(self) -> None:
        self.bins = np.zeros(NUM_BINS, np.int64)
        self.count = self.accepted = self.ties = 0
        self.mass = 0.0
        self.claims: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()

    def add(self, table: pa.Table) -> None:
        yes, no = (table.column(name).to_numpy() for name in ("p_yes", "p_no"))
        self.bins += np.histogram(yes, NUM_BINS, (0.0, 1.0))[0]
        self.count += len(yes)
        self.accepted += int((yes > no).sum())
        self.ties += int((yes == no).sum())
        self.mass += float((yes + no).sum())
        answers = table.column("answer_id").to_pylist()
        self.claims.update(answers)
        self.rejected.update(a for a, bad in zip(answers, yes <= no, strict=True) if bad)


def _pairs(run: Store, config: RunConfig, iteration: int) -> tuple[dict[int, int], Words | None]:
    margins: Counter[int] = Counter()
    won = lost = count = 0
    names = ("chosen", "rejected", "chosen_score", "rejected_score")
    for table in tables(run, config, (iteration, "pairs"), names):
        columns = (table.column(name).to_pylist() for name in names)
        for chosen, rejected, high, low in zip(*columns, strict=True):
            margins[high - low] += 1
            won += count_words(chosen)
            lost += count_words(rejected)
            count += 1
    return dict(sorted(margins.items())), Words(won / count, lost / count, count) if count else None


def _before(words: dict[str, tuple[str, int]], labels: _Labels, min_margin: int) -> Words | None:
    """Mean lengths over every two answers with claims whose scores differ by the margin."""
    groups: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for answer_id, (instruction_id, length) in words.items():
        if labels.claims[answer_id]:
            groups[instruction_id].append((labels.rejected[answer_id], length))
    won = lost = count = 0
    for group in groups.values():
        for one, other in combinations(group, 2):
            if abs(one[0] - other[0]) >= min_margin:
                better, worse = sorted((one, other))
                won, lost, count = won + better[1], lost + worse[1], count + 1
    return Words(won / count, lost / count, count) if count else None
