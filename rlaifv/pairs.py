"""Preference pairs: of two answers to one question, the one with fewer rejected claims is chosen.

The rules are the reference release's (RLHF-V/RLAIF-V at 83d917b, `utils/get_preference_pairs.py` and
`get_pairs_filter_shorten.py`), except that nothing here depends on the order of rows: what is drawn
at random is seeded by run and image.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

from rlaifv.config import PairConfig
from rlaifv.errors import ArtifactError
from rlaifv.records import Answer, Claim, Instruction, PreferencePair, Verdict

RowT = TypeVar("RowT", Answer, Claim, Verdict)

RATIO_STEP, NUM_RATIOS = 0.02, 50
"""The release tries the length ratios 0, 0.02, ..., 0.98."""


class Evidence(NamedTuple):
    """All rows of an iteration that pairs are made of, in any order."""

    answers: Iterable[Answer]
    claims: Iterable[Claim]
    verdicts: Iterable[Verdict]


class PairPlan(NamedTuple):
    """A pair without its image; `to_pair` makes the row that is written."""

    pair_id: str
    """`{chosen_id}>{rejected_id}`."""
    instruction_id: str
    image_id: str
    chosen: Answer
    rejected: Answer
    chosen_score: int
    """Minus the number of rejected claims."""
    rejected_score: int

    @property
    def words_shorter(self) -> int:
        """By how many words the chosen answer is the shorter one; negative: it is longer."""
        return count_words(self.rejected.text) - count_words(self.chosen.text)

    @property
    def equal_text(self) -> bool:
        """Nothing to learn from; shuffled verdicts make such pairs, and training refuses them."""
        return self.chosen.text.strip() == self.rejected.text.strip()


class PairCounts(NamedTuple):
    """Where every answer and every possible pair went."""

    answers: int = 0
    without_instruction: int = 0
    """Answers whose instruction is not there (it was quarantined)."""
    empty: int = 0
    without_claims: int = 0
    inconsistent: int = 0
    """Answers with a claim without verdict, or with two claims that ask the same question."""
    stray_claims: int = 0
    """Claims whose answer is not there."""
    stray_verdicts: int = 0
    """Verdicts whose claim is not there."""
    possible: int = 0
    """Unordered pairs of the remaining answers, each within one instruction."""
    below_margin: int = 0
    over_limit: int = 0
    equal_text: int = 0
    """Dropped, by the length balance or before the limit, because both texts are the same."""
    too_short: int = 0
    """Dropped by the length balance because the chosen answer is much shorter."""
    pairs: int = 0


class PairingResult(NamedTuple):
    """The pairs, sorted by `pair_id`."""

    plans: list[PairPlan]
    counts: PairCounts
    length_ratio: float | None
    """The ratio that the length balance settled on; None: it was off or had nothing to do."""


class Balanced(NamedTuple):
    """What the search for the length ratio keeps."""

    plans: list[PairPlan]
    ratio: float | None
    equal_text: int
    too_short: int


class _Scored(NamedTuple):
    answer: Answer
    score: int


def build_pairs(
    image_ids: Mapping[str, str], evidence: Evidence, *, config: PairConfig, seed: int
) -> PairingResult:
    """The pairs that the verdicts support, and what was dropped on the way.

    `image_ids` maps each instruction to its image, so that no image need be in memory. A claim holds iff p_yes > p_no strictly. Answers without
    claims never pair: silence is not honesty. At most `max_per_image` pairs are taken per image (or
    per instruction), then the lengths are balanced, in the release's order. The order of the rows
    does not matter. Raises ArtifactError when an id occurs twice.
    """
    scored, counts = _score_answers(image_ids, evidence)
    plans, possible = _possible_pairs(scored, image_ids, config.min_margin)
    counts = counts._replace(possible=possible, below_margin=possible - len(plans))
    different = plans if config.balance_length else [one for one in plans if not one.equal_text]
    taken = take_pairs(different, config=config, seed=seed)
    counts = counts._replace(over_limit=len(different) - len(taken))
    balanced = Balanced(taken, None, len(plans) - len(different), 0)
    if config.balance_length:
        balanced = balance_lengths(taken)
    counts = counts._replace(
        equal_text=balanced.equal_text, too_short=balanced.too_short, pairs=len(balanced.plans)
    )
    return PairingResult(balanced.plans, counts, balanced.ratio)


def to_pair(plan: PairPlan, instruction: Instruction, *, ds_name: str) -> PreferencePair:
    """The row of a pair, with the image of its instruction."""
    if plan.instruction_id != instruction.instruction_id:
        raise ValueError(f"{plan.pair_id}: {instruction.instruction_id!r} is not its instruction")
    return PreferencePair(
        ds_name=ds_name,
        image=instruction.image,
        question=instruction.question,
        chosen=plan.chosen.text,
        rejected=plan.rejected.text,
        origin_dataset=instruction.origin_dataset,
        origin_split=instruction.origin_split,
        idx=instruction.idx,
        image_path=instruction.image.path or instruction.image_id,
        pair_id=plan.pair_id,
        instruction_id=plan.instruction_id,
        image_id=plan.image_id,
        chosen_id=plan.chosen.answer_id,
        rejected_id=plan.rejected.answer_id,
        chosen_score=plan.chosen_score,
        rejected_score=plan.rejected_score,
    )


def count_words(text: str) -> int:
    """Words as the release counts them: pieces between white space."""
    return len(text.split())


def take_pairs(plans: Sequence[PairPlan], *, config: PairConfig, seed: int) -> list[PairPlan]:
    """At most `max_per_image` pairs per image (or instruction), sorted by `pair_id`.

    `random` draws them (the release, which is unseeded); `closest_length` takes those whose
    answers differ least in words, so that length says little about which one is chosen.
    """
    groups: defaultdict[str, list[PairPlan]] = defaultdict(list)
    for plan in sorted(plans, key=_pair_id):
        groups[plan.image_id if config.limit_by == "image" else plan.instruction_id].append(plan)
    taken: list[PairPlan] = []
    for key, group in groups.items():
        limit = min(config.max_per_image, len(group))
        if config.pick == "random":
            taken += random.Random(f"{seed}/{key}").sample(group, limit)
        else:
            taken += sorted(group, key=lambda plan: abs(plan.words_shorter))[:limit]
    return sorted(taken, key=_pair_id)


def balance_lengths(plans: Sequence[PairPlan]) -> Balanced:
    """The pairs under the length ratio that makes both mean lengths most alike (release).

    For r in 0, 0.02, ..., 0.98, pairs whose chosen answer is shorter by more than the fraction r of
    the rejected one are dropped, and pairs of equal (stripped) texts; the r with the smallest
    |mean chosen - mean rejected| / mean rejected wins, the lowest on a tie. It counters the score's
    bias towards short answers. Where the release divides by zero, an r that keeps nothing is no
    choice, and a rejected text without words counts as not longer than its chosen one.
    """
    different = [plan for plan in plans if not plan.equal_text]
    lengths = [(count_words(p.chosen.text), count_words(p.rejected.text)) for p in different]
    shorter_by = [(lost - won) / lost if lost else 0.0 for won, lost in lengths]
    best_ratio, smallest = None, float("inf")
    for number in range(NUM_RATIOS):
        ratio = number * RATIO_STEP
        kept = [both for both, by in zip(lengths, shorter_by, strict=True) if by <= ratio]
        won, lost = sum(won for won, _ in kept), sum(lost for _, lost in kept)
        if lost == 0:
            continue
        mean_won, mean_lost = won / len(kept), lost / len(kept)
        difference = abs(mean_won - mean_lost) / mean_lost
        if difference < smallest:
            best_ratio, smallest = ratio, difference
    equal_text = len(plans) - len(different)
    if best_ratio is None:
        return Balanced([], None, equal_text, len(different))
    balanced = [p for p, by in zip(different, shorter_by, strict=True) if by <= best_ratio]
    return Balanced(balanced, best_ratio, equal_text, len(different) - len(balanced))


def _score_answers(
    image_ids: Mapping[str, str], evidence: Evidence
) -> tuple[list[_Scored], PairCounts]:
    """Answers that may pair, with their scores, and what became of the others."""
    answers = _by_id(evidence.answers, "answer_id")
    claims = _by_id(evidence.claims, "claim_id")
    verdicts = _by_id(evidence.verdicts, "claim_id")
    claims_of: defaultdict[str, list[Claim]] = defaultdict(list)
    for claim in claims.values():
        claims_of[claim.answer_id].append(claim)
    counts = PairCounts(
        answers=len(answers),
        stray_claims=sum(claim.answer_id not in answers for claim in claims.values()),
        stray_verdicts=sum(claim_id not in claims for claim_id in verdicts),
    )
    scored: list[_Scored] = []
    for answer_id, answer in sorted(answers.items()):
        own = claims_of[answer_id]
        judged = [verdicts[claim.claim_id] for claim in own if claim.claim_id in verdicts]
        questions = {claim.question for claim in own if claim.claim_id in verdicts}
        if answer.instruction_id not in image_ids:
            counts = counts._replace(without_instruction=counts.without_instruction + 1)
        elif not answer.text.strip():
            counts = counts._replace(empty=counts.empty + 1)
        elif not own:
            counts = counts._replace(without_claims=counts.without_claims + 1)
        elif len(questions) != len(own):
            # The release stores verdicts by the question's text, so both a missing verdict and a
            # repeated question show up as a difference of these counts.
            counts = counts._replace(inconsistent=counts.inconsistent + 1)
        else:
            rejected = sum(verdict.p_yes <= verdict.p_no for verdict in judged)
            scored.append(_Scored(answer, -rejected))
    return scored, counts


def _possible_pairs(
    scored: Sequence[_Scored], image_ids: Mapping[str, str], min_margin: int
) -> tuple[list[PairPlan], int]:
    """The pairs with the margin, and how many unordered pairs there were."""
    of_instruction: defaultdict[str, list[_Scored]] = defaultdict(list)
    for one in scored:
        of_instruction[one.answer.instruction_id].append(one)
    plans: list[PairPlan] = []
    possible = 0
    for instruction_id, group in of_instruction.items():
        for left, right in combinations(group, 2):
            possible += 1
            if abs(left.score - right.score) < min_margin:
                continue
            better, worse = (left, right) if left.score > right.score else (right, left)
            plans.append(
                PairPlan(
                    f"{better.answer.answer_id}>{worse.answer.answer_id}",
                    instruction_id,
                    image_ids[instruction_id],
                    better.answer,
                    worse.answer,
                    better.score,
                    worse.score,
                )
            )
    return plans, possible


def _by_id(rows: Iterable[RowT], field: str) -> dict[str, RowT]:
    """Rows by their id; raises ArtifactError for an id that occurs twice."""
    by_id: dict[str, RowT] = {}
    for row in rows:
        key: str = getattr(row, field)
        if key in by_id:
            kind = type(row).__name__.lower()
            raise ArtifactError(f"{kind}s: {field} {key!r} occurs twice; ids must be unique")
        by_id[key] = row
    return by_id


def _pair_id(plan: PairPlan) -> str:
    return plan.pair_id
