"""One preference pair with everything that led to it."""

import json
from collections.abc import Iterable, Iterator
from typing import TypeVar

from controller.plan import WRITERS
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import ARTIFACTS, Shard, num_shards, part_key
from rlaifv.records import Claim, PreferencePair, Record, Verdict
from rlaifv.store import Store

R = TypeVar("R", bound=Record)


class JudgedClaim(Record):
    """A claim and what the labeller says of it; None: it has not been asked."""

    text: str
    question: str
    p_yes: float | None
    p_no: float | None
    holds: bool | None
    """p_yes > p_no, strictly."""


class JudgedAnswer(Record):
    """One side of the pair."""

    answer_id: str
    """Empty for an imported pair, which has no claims."""
    text: str
    score: int
    claims: list[JudgedClaim]


class ShownPair(Record):
    """What `show pair ID --json` prints."""

    iteration: int
    pair_id: str
    question: str
    image_path: str
    chosen: JudgedAnswer
    rejected: JudgedAnswer


def read_pair(run: Store, config: RunConfig, identity: str, iterations: Iterable[int]) -> ShownPair:
    """The pair of that id in the first of the iterations that has it; ArtifactError if none."""
    for iteration in iterations:
        for pair in _rows(run, config, iteration, PreferencePair):
            if pair.pair_id == identity:
                return _with_claims(run, config, iteration, pair)
    raise ArtifactError(
        f"{run}: no pair {identity!r}; `python -m controller show pairs` prints what there is"
    )


def _rows(run: Store, config: RunConfig, iteration: int, record: type[R]) -> Iterator[R]:
    """Rows of every part that is there."""
    artifact = next(name for name, kind in ARTIFACTS.items() if kind is record)
    count = num_shards(config, WRITERS[artifact].name)
    for index in range(count):
        key = part_key(iteration, artifact, Shard(index, count))
        if run.exists(key):
            yield from run.read_part(key, record)


def _with_claims(run: Store, config: RunConfig, iteration: int, pair: PreferencePair) -> ShownPair:
    ids = {pair.chosen_id, pair.rejected_id} - {""}
    claims: list[Claim] = []
    verdicts: dict[str, Verdict] = {}
    if ids:
        claims = [row for row in _rows(run, config, iteration, Claim) if row.answer_id in ids]
        verdicts = {
            row.claim_id: row
            for row in _rows(run, config, iteration, Verdict)
            if row.answer_id in ids
        }

    def answer(identity: str, text: str, score: int) -> JudgedAnswer:
        mine = [_judged(c, verdicts.get(c.claim_id)) for c in claims if c.answer_id == identity]
        return JudgedAnswer(answer_id=identity, text=text, score=score, claims=mine)

    return ShownPair(
        iteration=iteration,
        pair_id=pair.pair_id,
        question=pair.question,
        image_path=pair.image_path,
        chosen=answer(pair.chosen_id, pair.chosen, pair.chosen_score),
        rejected=answer(pair.rejected_id, pair.rejected, pair.rejected_score),
    )


def _judged(claim: Claim, verdict: Verdict | None) -> JudgedClaim:
    return JudgedClaim(
        text=claim.text,
        question=claim.question,
        p_yes=verdict.p_yes if verdict else None,
        p_no=verdict.p_no if verdict else None,
        holds=verdict.p_yes > verdict.p_no if verdict else None,
    )


def pair_text(pair: ShownPair) -> str:
    """For people; texts are quoted in ASCII, so that model output cannot control a terminal."""
    lines = [
        f"pair      {json.dumps(pair.pair_id)}, iteration {pair.iteration}",
        f"image     {json.dumps(pair.image_path)}",
        f"question  {json.dumps(pair.question)}",
    ]
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        lines += ["", f"{name}, score {answer.score}: {json.dumps(answer.text)}"]
        lines += [f"  {_claim_text(claim)}" for claim in answer.claims]
    return "\n".join(lines)


def _claim_text(claim: JudgedClaim) -> str:
    if claim.p_yes is None or claim.p_no is None:
        return f"p(yes) -     not asked  {json.dumps(claim.text)}"
    verdict = "holds    " if claim.holds else "rejected "
    return f"p(yes) {claim.p_yes:.3f}  p(no) {claim.p_no:.3f}  {verdict} {json.dumps(claim.text)}"
