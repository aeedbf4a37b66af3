"""Prompts are filled in once, replies are read whole, long answers lose nothing."""

import random

import pytest

from rlaifv.errors import ConfigError
from rlaifv.prompts import (
    DESCRIPTION_REQUESTS,
    QUESTION_PROMPT,
    SPLIT_PROMPT,
    Template,
    chunk_answer,
    parse_bullets,
    parse_questions,
    parse_template,
    question_prompt,
    split_prompt,
)


def test_there_are_sixteen_different_requests() -> None:
    assert len(set(DESCRIPTION_REQUESTS)) == 16
    assert all(request.isascii() and request == request.strip() for request in DESCRIPTION_REQUESTS)


def test_the_built_in_prompts_carry_everything_they_are_given() -> None:
    text = split_prompt(SPLIT_PROMPT, question="What is it?", answer="A cup.\n\nAnd a fork.")
    assert "Question: What is it?\n" in text
    assert "Answer: A cup.\n\nAnd a fork.\n" in text
    text = question_prompt(QUESTION_PROMPT, claims=["There is a cup.", "It is\u2028red."])
    assert "\n- There is a cup.\n- It is red.\n" in text
    for template in (SPLIT_PROMPT, QUESTION_PROMPT):
        assert template.source == "built-in"


def test_a_placeholder_inside_an_answer_stays_text() -> None:
    template = Template("{question} | {answer}", "test")
    assert split_prompt(template, question="{answer}", answer="{claims}") == "{answer} | {claims}"


def test_a_prompt_file_may_contain_other_braces() -> None:
    text = "- {Fact 1}\n{question} {answer} {} {{x}}"
    template = parse_template(text, fields=["question", "answer"], source="p.txt")
    filled = split_prompt(template, question="Q", answer="A")
    assert (filled, template.source) == ("- {Fact 1}\nQ A {} {{x}}", "p.txt")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{question}", "lacks the placeholder {answer}"),
        ("", "lacks the placeholder"),
        ("{question}{answer}{claims}", "{claims} has no value"),
    ],
)
def test_a_prompt_file_with_the_wrong_placeholders_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_template(text, fields=["question", "answer"], source="p.txt")
    assert str(caught.value).startswith("p.txt: ")


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        ("- A cup.\n- A fork.", ["A cup.", "A fork."]),
        ("* A cup.\n* A fork.", ["A cup.", "A fork."]),
        ("\u2022 A cup.\n\u2022 A fork.", ["A cup.", "A fork."]),
        ("1. A cup.\n2) A fork.\n(3) A pan.\n4: A pot.", ["A cup.", "A fork.", "A pan.", "A pot."]),
        ("a) A cup.\nb) A fork.", ["A cup.", "A fork."]),
        ("-A cup.\n-A fork.\n3.A pan.", ["A cup.", "A fork.", "A pan."]),
        ("  - A cup.\n  - A fork.\r\n\r\n", ["A cup.", "A fork."]),
        ("### Facts:\n- A cup.\n\n- A fork.", ["A cup.", "A fork."]),
        ("**Facts:**\n- **A cup.**\n---\n- A *red* fork.", ["A cup.", "A *red* fork."]),
        ("Here are the facts:\n\n- A cup.", ["A cup."]),
        ("```text\n- A cup.\n- A fork.\n```", ["A cup.", "A fork."]),
        ("- A cup on\n  the table.\n- A fork.", ["A cup on the table.", "A fork."]),
        ("- A cup on\nthe table.\n- A fork.", ["A cup on the table.", "A fork."]),
        ("- A cup.\nA fork.\n- A pan.", ["A cup.", "A fork.", "A pan."]),
        ("A cup.\nA fork.", ["A cup.", "A fork."]),
        ("A cup\nA fork", ["A cup", "A fork"]),
        ("  A cup.\n  A fork.", ["A cup.", "A fork."]),
        ("- " + "long " * 12 + "walk in\nNew York.", ["long " * 12 + "walk in New York."]),
        ("- " + "long " * 12 + "walk.\nA fork.", ["long " * 12 + "walk.", "A fork."]),
        ("- 2.5 metres.\n- 12:30 on the clock.\n- -5 degrees.",
         ["2.5 metres.", "12:30 on the clock.", "-5 degrees."]),
        ("2.5 metres.\n-5 degrees.", ["2.5 metres.", "-5 degrees."]),
        ("*Red* is the cup.", ["*Red* is the cup."]),
        ("- The sign says:\n- Stop.", ["The sign says:", "Stop."]),
        ("- Caf\u00e9 \U0001f600.\u2028- \u732b\u3002", ["Caf\u00e9 \U0001f600.", "\u732b\u3002"]),
        ("- \n-\n- ...\n- A cup.", ["A cup."]),
        ("- NONE", []),
        ("None.", []),
        ("", []),
        (" \n\n", []),
    ],
)  # fmt: skip
def test_bullets_are_read_however_they_are_written(reply: str, items: list[str]) -> None:
    assert parse_bullets(reply) == items


def test_no_word_of_a_reply_is_lost_or_cut() -> None:
    rng = random.Random("reply")
    bullets = ["- ", "* ", "1. ", "2) ", "", "\u2022 ", "  ", "   - "]
    for _ in range(300):
        lines = [
            rng.choice(bullets) + " ".join(f"Word{rng.randint(0, 99)}" for _ in range(5)) + "."
            for _ in range(rng.randint(1, 8))
        ]
        reply = rng.choice(["\n", "\n\n"]).join(lines)
        expected = [word for word in reply.split() if word.startswith("Word")]
        assert " ".join(parse_bullets(reply)).split() == expected
    assert parse_bullets("- " + "x" * 20_000) == ["x" * 20_000]


def test_another_number_of_questions_than_claims_is_noticed() -> None:
    reply = "- Is it red?\n- Is it big?"
    assert parse_questions(reply, num_claims=2) == ["Is it red?", "Is it big?"]
    assert parse_questions(reply, num_claims=1) is None
    assert parse_questions(reply, num_claims=3) is None
    assert parse_questions("", num_claims=0) == []


def test_a_short_answer_is_one_chunk() -> None:
    assert chunk_answer("One two.\n\nThree.", max_words=3) == ["One two.\n\nThree."]
    assert chunk_answer(" \n ", max_words=3) == []


def test_a_long_answer_is_cut_between_paragraphs_then_sentences_then_words() -> None:
    answer = "A b c.\n\nD e f.\n\nG h. I j. K l m n o p."
    assert chunk_answer(answer, max_words=6) == ["A b c.\n\nD e f.", "G h. I j.", "K l m n o p."]
    assert chunk_answer(answer, max_words=4) == ["A b c.", "D e f.", "G h. I j.", "K l m n", "o p."]


@pytest.mark.parametrize("max_words", [1, 2, 7, 50])
def test_chunks_keep_every_character_and_the_budget(max_words: int) -> None:
    rng = random.Random(f"chunks/{max_words}")
    parts = ["One. ", "two ", "three! ", "\n\n", "\n", "\u2028", "\u732b\u3002", "x" * 450, "\x00"]
    for _ in range(100):
        answer = "".join(rng.choice(parts) for _ in range(rng.randint(0, 80)))
        chunks = chunk_answer(answer, max_words=max_words)
        assert "".join("".join(chunks).split()) == "".join(answer.split())
        assert all(chunk.strip() and len(chunk.split()) <= max_words for chunk in chunks)
        assert all(len(chunk) <= 201 * max_words + 2 * len(chunk.split()) for chunk in chunks)


def test_a_budget_below_one_word_is_refused() -> None:
    with pytest.raises(ValueError, match="max_words must be positive, got 0"):
        chunk_answer("A b.", max_words=0)
