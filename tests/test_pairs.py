"""Preference pairs follow the release's rules, whatever the order of the rows."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from rlaifv.config import PairConfig
from rlaifv.errors import ArtifactError
from rlaifv.pairs import (
    Evidence,
    PairingResult,
    PairPlan,
    balance_lengths,
    build_pairs,
    take_pairs,
    to_pair,
)
from rlaifv.records import Answer, Claim, Image, Instruction, Verdict

ALL = PairConfig(max_per_image=1000, balance_length=False)
YES, NO, TIE = (0.7, 0.2), (0.2, 0.7), (0.5, 0.5)
Judged = Sequence[tuple[float, float] | None]


def answer(answer_id: str, text: str = "some text") -> Answer:
    instruction_id = answer_id.split("/")[0]
    return Answer(
        instruction_id=instruction_id,
        answer_id=answer_id,
        text=text,
        seed=0,
        num_tokens=1,
        finish_reason="stop",
    )


def claim(answer_id: str, number: int, question: str = "") -> Claim:
    return Claim(
        instruction_id=answer_id.split("/")[0],
        answer_id=answer_id,
        claim_id=f"{answer_id}/{number}",
        text="There is a cup.",
        question=question or f"Is there thing {number}?",
    )


def verdict(of: Claim, p: tuple[float, float]) -> Verdict:
    return Verdict(
        instruction_id=of.instruction_id,
        answer_id=of.answer_id,
        claim_id=of.claim_id,
        p_yes=p[0],
        p_no=p[1],
    )


def evidence(judged: dict[str, Judged], texts: dict[str, str] | None = None) -> Evidence:
    """Answers by id with one (p_yes, p_no) per claim; None: the claim has no verdict."""
    texts = texts or {}
    answers = [answer(key, texts.get(key, f"text of {key}")) for key in judged]
    claims = [claim(key, n) for key, ps in judged.items() for n in range(len(ps))]
    verdicts = [
        verdict(one, p)
        for one, p in zip(claims, (p for ps in judged.values() for p in ps), strict=True)
        if p is not None
    ]
    return Evidence(answers, claims, verdicts)


def listed(rows: Evidence) -> tuple[list[Answer], list[Claim], list[Verdict]]:
    return list(rows.answers), list(rows.claims), list(rows.verdicts)


def build(rows: Evidence, config: PairConfig = ALL, seed: int = 0, **images: str) -> PairingResult:
    ids = {one.instruction_id: f"image of {one.instruction_id}" for one in rows.answers}
    return build_pairs(ids | images, rows, config=config, seed=seed)


def ids(plans: Sequence[PairPlan]) -> list[str]:
    return [plan.pair_id for plan in plans]


def test_the_answer_with_fewer_rejected_claims_is_chosen() -> None:
    (plan,) = build(evidence({"i/0": [NO, NO, YES], "i/1": [NO, YES]})).plans
    assert (plan.chosen.answer_id, plan.rejected.answer_id) == ("i/1", "i/0")
    assert (plan.chosen_score, plan.rejected_score) == (-1, -2)


def test_a_tie_rejects_the_claim() -> None:
    (plan,) = build(evidence({"i/0": [TIE], "i/1": [YES]})).plans
    assert plan.chosen.answer_id == "i/1"


def test_the_score_counts_rejections_and_is_no_rate() -> None:
    result = build(evidence({"i/0": [NO], "i/1": [NO, YES, YES, YES]}))
    assert result.plans == []
    assert result.counts.below_margin == 1


@pytest.mark.parametrize(
    ("rejected", "margin", "num_pairs"),
    [
        ((), 1, 0),
        ((0,), 1, 0),
        ((0, 0), 1, 0),
        ((0, 1), 1, 1),
        ((0, 1, 2), 1, 3),
        ((0, 1, 2), 2, 1),
    ],
)
def test_pairs_need_the_margin(rejected: tuple[int, ...], margin: int, num_pairs: int) -> None:
    rows = evidence({f"i/{n}": [NO] * count + [YES] for n, count in enumerate(rejected)})
    result = build(rows, ALL.model_copy(update={"min_margin": margin}))
    assert len(result.plans) == num_pairs


def test_answers_of_different_instructions_never_pair() -> None:
    assert build(evidence({"i/0": [NO], "j/0": [YES]})).counts.possible == 0


def test_an_answer_without_claims_never_pairs() -> None:
    result = build(evidence({"i/0": [], "i/1": [NO]}))
    assert (result.plans, result.counts.without_claims) == ([], 1)


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_answer_never_pairs(text: str) -> None:
    result = build(evidence({"i/0": [YES], "i/1": [NO]}, {"i/0": text}))
    assert (result.plans, result.counts.empty) == ([], 1)


def test_a_missing_verdict_drops_the_answer() -> None:
    result = build(evidence({"i/0": [YES, None], "i/1": [NO], "i/2": [YES]}))
    assert ids(result.plans) == ["i/2>i/1"]
    assert result.counts.inconsistent == 1


def test_two_claims_with_the_same_question_drop_the_answer() -> None:
    rows = evidence({"i/0": [YES, YES], "i/1": [NO], "i/2": [YES]})
    claims = [claim(one.answer_id, int(one.claim_id[-1]), "Same?") for one in rows.claims]
    result = build(rows._replace(claims=claims))
    assert ids(result.plans) == ["i/2>i/1"]
    assert result.counts.inconsistent == 1


def test_rows_without_their_parents_are_counted() -> None:
    rows = evidence({"i/0": [YES], "i/1": [NO]})
    lost = claim("k/7", 0)
    rows = Evidence(
        [*rows.answers, answer("k/8")], [*rows.claims, lost], [*rows.verdicts, verdict(lost, NO)]
    )
    unknown = verdict(claim("k/9", 0), YES)
    result = build_pairs(
        {"i": "image"}, rows._replace(verdicts=[*rows.verdicts, unknown]), config=ALL, seed=0
    )
    counts = result.counts
    assert ids(result.plans) == ["i/0>i/1"]
    assert (counts.without_instruction, counts.stray_claims, counts.stray_verdicts) == (1, 1, 1)


@pytest.mark.parametrize("part", ["answers", "claims", "verdicts"])
def test_an_id_that_occurs_twice_is_an_error(part: str) -> None:
    rows = evidence({"i/0": [YES], "i/1": [NO]})
    doubled = rows._replace(**{part: [*getattr(rows, part), getattr(rows, part)[0]]})
    with pytest.raises(ArtifactError, match=rf"{part}: .*_id 'i/0.* occurs twice"):
        build(doubled)


def test_no_rows_give_no_pairs() -> None:
    result = build(Evidence([], [], []), PairConfig())
    assert (result.plans, result.length_ratio, result.counts.pairs) == ([], None, 0)


def test_the_counts_add_up() -> None:
    rng = random.Random("counts")
    for _ in range(50):
        config = PairConfig(max_per_image=rng.choice([1, 2, 9]))
        counts = build(_random_rows(rng), config).counts
        dropped = counts.below_margin + counts.over_limit + counts.equal_text + counts.too_short
        assert counts.possible == dropped + counts.pairs


# -- which pairs are taken ---------------------------------------------------------------------

MANY = evidence({f"{i}/{n}": [NO] * n + [YES] for i in "ij" for n in range(6)})


def test_at_most_so_many_pairs_are_taken_per_image() -> None:
    config = PairConfig(max_per_image=2, balance_length=False)
    assert len(build(MANY, config).plans) == 4
    assert len(build(MANY, config, i="same", j="same").plans) == 2


def test_the_limit_can_be_per_question() -> None:
    config = PairConfig(max_per_image=2, balance_length=False, limit_by="question")
    assert len(build(MANY, config, i="same", j="same").plans) == 4


def test_random_picks_depend_on_seed_and_image_only() -> None:
    config = PairConfig(max_per_image=3, balance_length=False)
    both = ids(build(MANY, config).plans)
    alone = evidence({f"i/{n}": [NO] * n + [YES] for n in range(6)})
    assert ids(build(alone, config).plans) == [one for one in both if one.startswith("i")]
    others = {tuple(ids(build(MANY, config, seed=seed).plans)) for seed in range(5)}
    assert len(others) > 1


def test_closest_length_takes_the_smallest_difference_of_words_and_ids_break_ties() -> None:
    texts = {"i/0": "a", "i/1": "a a a a", "i/2": "a a a", "i/3": "b b b b"}
    rows = evidence({key: [NO] * int(key[-1]) + [YES] for key in texts}, texts)
    config = PairConfig(max_per_image=3, balance_length=False, pick="closest_length")
    # Differences: 1>3 0, 1>2 and 2>3 1, 0>2 2, 0>1 and 0>3 3.
    assert ids(build(rows, config).plans) == ["i/1>i/2", "i/1>i/3", "i/2>i/3"]
    one = config.model_copy(update={"max_per_image": 2})
    assert ids(build(rows, one).plans) == ["i/1>i/2", "i/1>i/3"]


def test_images_do_not_share_their_draw() -> None:
    rows = evidence({f"i{i}/{n}": [NO] * n + [YES] for i in range(9) for n in range(6)})
    taken = build(rows, PairConfig(max_per_image=1, balance_length=False)).plans
    assert len({(one.chosen.answer_id[-1], one.rejected.answer_id[-1]) for one in taken}) > 1


def test_a_much_longer_chosen_answer_is_not_close() -> None:
    texts = {"i/0": words(10), "i/1": words(2), "i/2": words(3)}
    rows = evidence({key: [NO] * int(key[-1]) + [YES] for key in texts}, texts)
    config = PairConfig(max_per_image=1, balance_length=False, pick="closest_length")
    assert ids(build(rows, config).plans) == ["i/1>i/2"]


@pytest.mark.parametrize("pick", ["random", "closest_length"])
def test_pairs_are_taken_whatever_order_they_come_in(pick: Any) -> None:
    plans = build(MANY).plans
    config = PairConfig(max_per_image=3, pick=pick)
    assert take_pairs(plans[::-1], config=config, seed=0) == take_pairs(
        plans, config=config, seed=0
    )


@pytest.mark.parametrize("pick", ["random", "closest_length"])
def test_pairs_ignore_the_order_of_rows(pick: Any) -> None:
    rng = random.Random("order")
    config = PairConfig(pick=pick)
    for _ in range(20):
        rows = _random_rows(rng)
        shuffled = listed(rows)
        for part in shuffled:
            rng.shuffle(part)
        assert build(rows, config) == build(Evidence(*shuffled), config)


@pytest.mark.slow
def test_pairs_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "from tests.test_pairs import MANY, build, ids\n"
        "from rlaifv.config import PairConfig\n"
        "print(ids(build(MANY, PairConfig()).plans))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_pairs_are_sorted_by_id() -> None:
    found = ids(build(MANY).plans)
    assert found == sorted(found)
    assert len(found) == 30


# -- the release's rules, restated -------------------------------------------------------------


def _random_rows(rng: random.Random) -> Evidence:
    answers, claims, verdicts = [], [], []
    for i in range(rng.randint(1, 3)):
        for n in range(rng.randint(0, 5)):
            one = answer(f"i{i}/{n}", " ".join([f"w{n}"] * rng.randint(0, 6)))
            answers.append(one)
            for c in range(rng.randint(0, 4)):
                asked = claim(one.answer_id, c, f"Q{rng.randint(0, 30)}?")
                claims.append(asked)
                if rng.random() < 0.95:
                    verdicts.append(verdict(asked, rng.choice([YES, NO, TIE])))
    return Evidence(answers, claims, verdicts)


def _release_pairs(rows: Evidence, diff: int) -> set[tuple[str, str]]:
    """Verdicts in a dict by question text, all pairs by score, then the consistency filter."""
    answers, claims, verdicts = listed(rows)
    votes: dict[str, dict[str, int]] = {}
    sums: dict[str, int] = {}
    for one in verdicts:
        question = next(c.question for c in claims if c.claim_id == one.claim_id)
        label = 1 if one.p_yes > one.p_no else 0
        votes.setdefault(one.answer_id, {})[question] = label
        sums[one.answer_id] = sums.get(one.answer_id, 0) + label - 1
    pairs: set[tuple[str, str]] = set()
    for left, right in combinations(sums, 2):
        if left.split("/")[0] != right.split("/")[0] or abs(sums[left] - sums[right]) < diff:
            continue
        chosen, rejected = (left, right) if sums[left] > sums[right] else (right, left)
        texts = {a.answer_id: a.text for a in answers}
        if all(
            len(votes[side]) == sum(c.answer_id == side for c in claims) and texts[side]
            for side in (chosen, rejected)
        ):
            pairs.add((chosen, rejected))
    return pairs


def test_the_possible_pairs_are_those_of_the_releases_rules() -> None:
    rng = random.Random("release")
    total = 0
    for _ in range(300):
        rows, diff = _random_rows(rng), rng.choice([1, 1, 2])
        result = build(rows, ALL.model_copy(update={"min_margin": diff}))
        found = {(plan.chosen.answer_id, plan.rejected.answer_id) for plan in result.plans}
        assert found == _release_pairs(rows, diff)
        total += len(found)
    assert total > 300


# -- balance of lengths ------------------------------------------------------------------------


def plan(number: int, chosen: str, rejected: str) -> PairPlan:
    key = f"p{number:03d}"
    texts = answer(f"{key}/0", chosen), answer(f"{key}/1", rejected)
    return PairPlan(key, key, key, *texts, 0, -1)


def words(count: int, word: str = "w") -> str:
    return " ".join([word] * count)


def test_the_length_ratio_evens_out_the_means() -> None:
    # By words 12>10, 9>10, 4>10: r < 0.1 keeps the first (20 % apart), 0.1 <= r < 0.6 the first two
    # (5 %), r >= 0.6 all (17 %).
    plans = [plan(0, words(12), words(10)), plan(1, words(9), words(10)), plan(2, "w", words(10))]
    balanced = balance_lengths(plans)
    assert ids(balanced.plans) == ["p000", "p001"]
    assert (balanced.ratio, balanced.too_short) == (0.1, 1)


def test_the_lowest_ratio_wins_a_tie() -> None:
    assert balance_lengths([plan(0, words(5, "a"), words(5, "b"))]).ratio == 0.0


def test_pairs_of_equal_text_are_dropped() -> None:
    balanced = balance_lengths([plan(0, " same\n", "same"), plan(1, "one", "two")])
    assert ids(balanced.plans) == ["p001"]
    assert balanced.equal_text == 1


@pytest.mark.parametrize("balance", [True, False])
def test_equal_texts_with_different_verdicts_are_no_pair(balance: bool) -> None:
    texts = {"i/0": "a cat", "i/1": "a cat", "i/2": "a big dog"}
    rows = evidence({"i/0": [NO], "i/1": [NO, NO], "i/2": [YES]}, texts)
    config = PairConfig(max_per_image=9, pick="closest_length", balance_length=balance)
    result = build(rows, config)
    assert "i/0>i/1" not in ids(result.plans)
    assert result.counts.equal_text == 1


def test_without_balance_equal_texts_take_no_place_of_others() -> None:
    texts = {"i/0": "a cat", "i/1": "a cat", "i/2": "a big dog"}
    rows = evidence({"i/0": [NO], "i/1": [NO, NO], "i/2": [YES]}, texts)
    config = PairConfig(max_per_image=2, pick="closest_length", balance_length=False)
    assert ids(build(rows, config).plans) == ["i/2>i/0", "i/2>i/1"]


def test_an_empty_remainder_is_no_choice() -> None:
    # Every ratio below 0.5 keeps nothing, where the release divides by zero.
    balanced = balance_lengths([plan(0, words(1, "a"), words(2))])
    assert (ids(balanced.plans), balanced.ratio) == (["p000"], 0.5)
    assert balance_lengths([plan(0, "same", "same")]).plans == []
    assert balance_lengths([]).plans == []


def test_an_empty_rejected_text_does_not_divide_by_zero() -> None:
    balanced = balance_lengths([plan(0, "three words here", ""), plan(1, "a b", "c d")])
    assert ids(balanced.plans) == ["p000", "p001"]


def test_the_length_balance_equals_a_plain_search() -> None:
    rng = random.Random("balance")
    for _ in range(100):
        plans = [
            plan(n, words(rng.randint(1, 30), "c"), words(rng.randint(1, 30), rng.choice("cr")))
            for n in range(rng.randint(1, 12))
        ]
        results = []
        for step in range(50):
            kept = []
            for one in plans:
                won, lost = len(one.chosen.text.split()), len(one.rejected.text.split())
                if (lost - won) / lost > step * 0.02 or one.chosen.text == one.rejected.text:
                    continue
                kept.append((one.pair_id, won, lost))
            if kept:
                won_mean = sum(won for _, won, _ in kept) / len(kept)
                lost_mean = sum(lost for _, _, lost in kept) / len(kept)
                results.append((abs(won_mean - lost_mean) / lost_mean, step, kept))
        best = min(results)[2] if results else []
        assert ids(balance_lengths(plans).plans) == [key for key, _, _ in best]


def test_the_limit_comes_before_the_balance() -> None:
    texts = {"i/0": "a", "i/1": words(10), "i/2": words(10, "b")}
    rows = evidence({key: [NO] * int(key[-1]) + [YES] for key in texts}, texts)
    config = PairConfig(max_per_image=1, pick="closest_length")
    result = build(rows, config)
    assert ids(result.plans) == ["i/1>i/2"]
    assert (result.counts.over_limit, result.counts.too_short) == (2, 0)


# -- rows --------------------------------------------------------------------------------------


def instruction(instruction_id: str, path: str | None) -> Instruction:
    return Instruction(
        instruction_id=instruction_id,
        image_id="img-7",
        question="What is it?",
        image=Image(bytes=b"\x89PNG", path=path),
        origin_dataset="coco",
        origin_split="{}",
        idx=3,
    )


def test_a_pair_carries_image_ids_and_origin() -> None:
    texts = {"i/0": "ein \u2603\u2028\x00", "i/1": "b"}
    (one,) = build(evidence({"i/0": [YES], "i/1": [NO]}, texts), i="img-7").plans
    pair = to_pair(one, instruction("i", "a/b.jpg"), ds_name="my-run")
    assert (pair.pair_id, pair.chosen_id, pair.rejected_id) == ("i/0>i/1", "i/0", "i/1")
    assert (pair.chosen, pair.rejected) == ("ein \u2603\u2028\x00", "b")
    assert (pair.ds_name, pair.image_path, pair.image_id) == ("my-run", "a/b.jpg", "img-7")
    assert (pair.origin_dataset, pair.idx, pair.rejected_score) == ("coco", 3, -1)
    assert to_pair(one, instruction("i", None), ds_name="r").image_path == "img-7"


def test_a_pair_refuses_the_image_of_another_instruction() -> None:
    (one,) = build(evidence({"i/0": [YES], "i/1": [NO]})).plans
    with pytest.raises(ValueError, match="'j' is not its instruction"):
        to_pair(one, instruction("j", None), ds_name="r")


def test_no_limit_is_exceeded_by_any_pick() -> None:
    plans = [plan(n, words(n + 1), words(9)) for n in range(5)]
    same = [one._replace(image_id="x") for one in plans]
    for limit in (1, 4, 5, 9):
        assert len(take_pairs(same, config=PairConfig(max_per_image=limit), seed=1)) == min(
            limit, 5
        )
