"""Pairs for the example browser: the widest differences of scores, and a fair sample."""

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from controller.report.facts import Wanted, part_keys
from controller.report.picture import img
from rlaifv.config import RunConfig
from rlaifv.records import Answer, Claim, Image, PreferencePair, Verdict, parse_rows
from rlaifv.store import Store

NUM_EXAMPLES = 240
"""Examples in the page, shared out over the iterations."""
FEWEST = 8
"""Of each iteration, however many there are."""
MOST_GROUPS = 4
"""Row groups of an iteration's pairs whose pictures are read: some 120 MB of photographs."""
WIDEST = 3
"""One in so many examples is taken for its difference of scores, the others at random."""
_COLUMNS = ("pair_id", "image_id", "chosen_score", "rejected_score")


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
    """Without the picture's bytes."""
    picture: str
    """As HTML, made small."""
    answers: tuple[Judged, ...]

    @property
    def margin(self) -> int:
        return self.pair.chosen_score - self.pair.rejected_score


class Picked(NamedTuple):
    """A pair for the page, before its answers are known."""

    pair: PreferencePair
    picture: str


class _Row(NamedTuple):
    pair_id: str
    image_id: str
    margin: int
    place: tuple[str, int, int]
    """Part, row group, row."""


def examples_each(iterations: int) -> int:
    """Examples of one iteration."""
    return max(FEWEST, NUM_EXAMPLES // max(1, iterations))


def pick_pairs(run: Store, config: RunConfig, iteration: int, *, limit: int) -> list[Picked]:
    """Pairs of different images, always the same ones; their pictures are made small at once."""
    rows = _choose(list(_rows(run, config, iteration)), limit)
    by_group: dict[tuple[str, int], list[_Row]] = {}
    for row in rows:
        by_group.setdefault(row.place[:2], []).append(row)
    picked: dict[str, Picked] = {}
    for (key, group), mine in sorted(by_group.items()):
        names = list(PreferencePair.model_fields)
        (table,) = run.read_columns(key, names, groups=[group])
        found = table.take(pa.array([row.place[2] for row in mine])).to_pylist()
        for pair in parse_rows(PreferencePair, found, file=f"{run}/{key}"):
            small = pair.model_copy(update={"image": Image(bytes=b"", path=pair.image.path)})
            picked[pair.pair_id] = Picked(small, img(pair.image.bytes))
    return [picked[row.pair_id] for row in rows]


def _rows(run: Store, config: RunConfig, iteration: int) -> Iterator[_Row]:
    """The pairs of a few row groups, spread evenly."""
    groups: list[tuple[str, int, pa.Table]] = []
    for key in part_keys(run, config, iteration, "pairs"):
        groups += [(key, n, table) for n, table in enumerate(run.read_columns(key, _COLUMNS))]
    step = max(1, -(-len(groups) // MOST_GROUPS))
    for key, number, table in groups[::step]:
        columns = (table.column(name).to_pylist() for name in _COLUMNS)
        for row, (pair_id, image_id, high, low) in enumerate(zip(*columns, strict=True)):
            yield _Row(pair_id, image_id, high - low, (key, number, row))


def _choose(rows: Sequence[_Row], limit: int) -> list[_Row]:
    """A third by the difference of scores, the others by a digest of their id."""
    ordered = sorted(rows, key=lambda row: (-row.margin, _digest(row.pair_id)))
    widest = _one_per_image(ordered, set())[: -(-limit // WIDEST)]
    seen = {row.image_id for row in widest}
    sampled = _one_per_image(sorted(rows, key=lambda row: _digest(row.pair_id)), seen)
    rest = heapq.nsmallest(limit - len(widest), sampled, key=lambda row: _digest(row.pair_id))
    return [*widest, *rest]


def _one_per_image(rows: Sequence[_Row], seen: set[str]) -> list[_Row]:
    first: dict[str, _Row] = {}
    for row in rows:
        if row.image_id not in seen:
            first.setdefault(row.image_id, row)
    return list(first.values())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def join(iteration: int, picked: Sequence[Picked], rows: Wanted) -> list[Example]:
    """The pairs with their answers, claims and verdicts."""
    answers: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in rows.answers:
        answers[answer.instruction_id].append(answer)
    claims: defaultdict[str, list[Checked]] = defaultdict(list)
    for claim in rows.claims:
        if verdict := rows.verdicts.get(claim.claim_id):
            claims[claim.answer_id].append(Checked(claim, verdict))
    return [
        Example(
            iteration,
            pair,
            picture,
            tuple(_judged(pair, answer, claims) for answer in answers[pair.instruction_id]),
        )
        for pair, picture in picked
    ]


def _judged(pair: PreferencePair, answer: Answer, claims: Mapping[str, list[Checked]]) -> Judged:
    role = {pair.chosen_id: "chosen", pair.rejected_id: "rejected"}.get(answer.answer_id, "")
    return Judged(answer, tuple(claims.get(answer.answer_id, ())), role)
