"""The rules engine takes answers apart without losing or inventing anything."""

import random
import re
import time

import pytest

from rlaifv.claims import split_answer, to_question


def texts(answer: str) -> list[str]:
    return [draft.text for draft in split_answer(answer)]


def questions(answer: str) -> list[str]:
    return [draft.question for draft in split_answer(answer)]


@pytest.mark.parametrize(
    ("claim", "question"),
    [
        ("There is a red cup on the left.", "Is there a red cup on the left?"),
        ("There is also a cup.", "Is there also a cup?"),
        ("There are two cups.", "Are there two cups?"),
        ("There's a cup.", "Is there a cup?"),
        ("There were no cups", "Were there no cups?"),
        ("I can see a fork.", "Is there a fork in the image?"),
        ("I can also see a fork.", "Is there also a fork in the image?"),
        ("You can see two forks in the image.", "Are there two forks in the image?"),
        (
            "The picture shows a plate next to a fork.",
            "Is there a plate next to a fork in the image?",
        ),
        ("The image also shows a cup.", "Is there also a cup in the image?"),
        ("The image shows green trees.", "Does the image show green trees?"),
        ("I can see that the cup is red.", "Is the cup red?"),
        ("The cup is red.", "Is the cup red?"),
        ("Two people are sitting on a bench.", "Are two people sitting on a bench?"),
        ("A man and a woman are sitting.", "Are a man and a woman sitting?"),
        ("A cup can be seen.", "Can a cup be seen?"),
        ("The man has a hat.", "Does the man have a hat?"),
        ("Three cats have been fed.", "Have three cats been fed?"),
        ("Mr. Smith is on the left.", "Is Mr. Smith on the left?"),
        ("In the background, there are some trees.", "Are there some trees in the background?"),
        ("On the left, I can see a cup.", "Is there a cup on the left in the image?"),
        ("In the image, there is a cup.", "Is there a cup in the image?"),
        ("A red cup on a table", "Is there a red cup on a table in the image?"),
        ("Two plates", "Are there two plates in the image?"),
    ],
)
def test_a_claim_becomes_its_question(claim: str, question: str) -> None:
    assert to_question(claim) == question


@pytest.mark.parametrize(
    ("claim", "question"),
    [
        ("The cup is not red.", "Is the cup not red?"),
        ("The cup isn't red.", "Is the cup not red?"),
        ("There is no cup.", "Is there no cup?"),
        ("There aren't any cups.", "Are there not any cups?"),
        ("The man never smiles.", "Is it true that the man never smiles?"),
        ("A dog doesn't bark.", "Is it true that a dog does not bark?"),
        ("No dogs are there.", "Are no dogs there?"),
    ],
)
def test_negation_is_kept(claim: str, question: str) -> None:
    assert to_question(claim) == question


@pytest.mark.parametrize(
    ("claim", "question"),
    [
        ("The man wears a hat.", "Is it true that the man wears a hat?"),
        ("The man who is old is tall.", "Is it true that the man who is old is tall?"),
        ("To the left of it is a cup.", "Is it true that to the left of it is a cup?"),
        ("Two men sit on a bench.", "Is it true that two men sit on a bench?"),
        ('The sign says "Stop: is it red".', 'Does the image show this: "The sign says "Stop: is it red""?'),
        ("Cup: a red one.", 'Does the image show this: "Cup: a red one"?'),
        ("Trees", 'Does the image show this: "Trees"?'),
    ],
)  # fmt: skip
def test_what_no_rule_understands_is_asked_whole(claim: str, question: str) -> None:
    assert to_question(claim) == question


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("There is a cup and a fork.", ["There is a cup.", "There is a fork."]),
        ("There are a cup and two forks.", ["There is a cup.", "There are two forks."]),
        (
            "I can see a cup, two forks and a pan.",
            ["I can see a cup.", "I can see two forks.", "I can see a pan."],
        ),
        (
            "The image shows a cup, a fork, and a pan on the left.",
            [
                "The image shows a cup.",
                "The image shows a fork.",
                "The image shows a pan on the left.",
            ],
        ),
        ("There is also a cup and a fork.", ["There is also a cup.", "There is also a fork."]),
        ("The cup is red and the fork is blue.", ["The cup is red.", "The fork is blue."]),
        ("There is a cup, and there is a fork.", ["There is a cup.", "There is a fork."]),
        ("The cup is red; it is full.", ["The cup is red.", "It is full."]),
        (
            "There is a cup and a fork, and the cup is red.",
            ["There is a cup.", "There is a fork.", "The cup is red."],
        ),
    ],
)
def test_lists_and_clauses_are_taken_apart(answer: str, claims: list[str]) -> None:
    assert texts(answer) == claims


@pytest.mark.parametrize(
    "answer",
    [
        "There is a man between a car and a bus.",
        "There is a red and a blue cup.",
        "There is a cup or a fork.",
        "There is not a cup and a fork.",
        "There is a cup that is red and a fork.",
        "The cup is red and blue.",
        "A cup and a fork are on the table.",
        "The picture shows a plate next to a fork.",
        "The man who has a hat and the dog are old.",
        "I can see black and white stripes.",
        "There is a pair of a cup and a saucer.",
    ],
)
def test_what_belongs_together_stays_together(answer: str) -> None:
    assert texts(answer) == [answer]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n\t\u2028 ",
        "\x00",
        "...!",
        "\U0001f600\U0001f680",
        "What is it?",
        "I think it is a dog.",
        "Perhaps it is a dog.",
        "It seems to be a dog.",
        "The light creates a calm atmosphere.",
        "I'm sorry, but I cannot see it.",
        "Let me know if you need more.",
        "Here is a list of the objects:",
        "# Description",
        "**Objects:**",
        "---",
    ],
)
def test_what_claims_nothing_is_left_out(answer: str) -> None:
    assert split_answer(answer) == []


def test_openings_are_no_part_of_the_claim() -> None:
    assert texts("Yes, there is a cup. Additionally, it is red. Overall, the table is full.") == [
        "There is a cup.",
        "It is red.",
        "The table is full.",
    ]


def test_sentences_are_found_inside_abbreviations_and_numbers() -> None:
    assert texts("Mr. Smith is 1.80 m tall. The U.S. flag is red! He is old.") == [
        "Mr. Smith is 1.80 m tall.",
        "The U.S. flag is red!",
        "He is old.",
    ]


def test_lists_and_markdown_are_read_line_by_line() -> None:
    answer = "Here are the objects:\n\n1. **A red cup**\n2) a fork\n- The pan is *big*\n\n### Note\nIt is\nlate."
    assert texts(answer) == ["A red cup.", "A fork.", "The pan is big.", "It is late."]


def test_a_wrapped_line_goes_on_but_a_paragraph_ends() -> None:
    assert texts("The pan is\r\nbig\n\nit is red\n## Note\nit is old") == [
        "The pan is big.",
        "It is red.",
        "It is old.",
    ]


def test_a_repeated_claim_counts_once() -> None:
    assert texts("There is a cup. There is a fork. There is a cup.") == [
        "There is a cup.",
        "There is a fork.",
    ]


def test_a_short_answer_is_claimed_to_answer_the_question() -> None:
    (draft,) = split_answer("Red.", question="What colour\nis it?")
    assert draft.text == "Red."
    assert draft.question == 'Is "Red" a correct answer to "What colour is it?"?'
    (draft,) = split_answer("The cup is red.", question="What colour is it?")
    assert draft.question == "Is the cup red?"
    assert questions("The image shows trees.") == [
        one.question for one in split_answer("The image shows trees.", question="What is it?")
    ]
    (draft,) = split_answer("A cup.", question="Describe the picture.")
    assert draft.question == "Is there a cup in the image?"
    assert split_answer("", question="What colour is it?") == []


def test_unicode_line_breaks_nul_and_emoji_are_harmless() -> None:
    answer = "The cup is red.\u2028The fork\x00is blue \U0001f600.\x85Das \u00d6l is gr\u00fcn."
    assert texts(answer) == [
        "The cup is red.",
        "The fork is blue \U0001f600.",
        "Das \u00d6l is gr\u00fcn.",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "a" * 20_000,
        "The cup is red and the " * 900,
        "creates a " * 2_000,
        "is " * 6_000,
        "There is " + "a cup and " * 2_000 + "a fork.",
        "a, " * 6_000,
        "( " * 10_000,
        "\U0001f600 " * 10_000,
        "In the " * 3_000,
        "In the a, " * 2_000 + "there is a cup.",
        "I can see that " * 1_300 + "it is red.",
        "a. " * 6_000,
    ],
)
def test_a_strange_answer_of_20k_characters_is_quick(answer: str) -> None:
    start = time.process_time()
    drafts = split_answer(answer)
    assert time.process_time() - start < 1.0
    assert all(draft.text and draft.question.endswith("?") for draft in drafts)


def _random_answer(rng: random.Random) -> str:
    nouns = [f"w{n}" for n in range(40)]
    heads = ["There is", "I can see", "The image shows", "The cup is", "A man holds"]
    joins = [", ", " and ", ", and ", " next to ", ", while the dog is near "]
    sentences = []
    for _ in range(rng.randint(1, 12)):
        parts = [f"a {rng.choice(nouns)}" for _ in range(rng.randint(1, 4))]
        body = parts[0] + "".join(rng.choice(joins) + part for part in parts[1:])
        sentences.append(f"{rng.choice(heads)} {body}.")
    return rng.choice([" ", "\n", "\n- "]).join(sentences)


def test_every_thing_of_an_answer_is_in_a_claim_and_in_its_question() -> None:
    rng = random.Random("nothing lost")
    for _ in range(200):
        answer = _random_answer(rng)
        drafts = split_answer(answer)
        said = set(re.findall(r"w\d+", answer))
        assert {word for draft in drafts for word in re.findall(r"w\d+", draft.text)} == said
        for draft in drafts:
            assert re.findall(r"w\d+", draft.text) == re.findall(r"w\d+", draft.question)


def test_a_long_answer_keeps_its_last_claim() -> None:
    answer = " ".join(f"There is a w{n}." for n in range(1_200))
    assert len(answer) > 20_000
    assert texts(answer) == [f"There is a w{n}." for n in range(1_200)]


def test_every_claim_has_text_and_a_question_of_one_line() -> None:
    rng = random.Random("any text")
    pieces = [
        *"aI.?!:;,-*#`\"'()\n\r\t\x00\u2028\u732b\U0001f600",
        " is ",
        " and ",
        "There is ",
        " a ",
    ]
    for _ in range(500):
        answer = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 40)))
        for draft in split_answer(answer, question=rng.choice(["", "What?"])):
            assert draft.text.strip()
            assert draft.question.endswith("?")
            assert len(draft.question.splitlines()) == 1
            assert "\x00" not in draft.text + draft.question


def test_ten_thousand_sentences_take_seconds() -> None:
    sentence = "There is a red w{} on the left and a w{}. "
    answers = ["".join(sentence.format(a * b, b) for a in range(20)) for b in range(50)]
    start = time.process_time()
    claims = sum(len(split_answer(answer)) for answer in answers)
    assert claims > 1_000
    assert time.process_time() - start < 1.0
