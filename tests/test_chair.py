"""Objects are found and counted as CHAIR and Object HalBench do."""

import random
from pathlib import Path

import pytest

from rlaifv.chair import (
    CorpusMetrics,
    Mention,
    Table,
    Vocabulary,
    corpus_metrics,
    mentions,
    plain_tokens,
    score_caption,
    score_text,
)
from rlaifv.errors import ArtifactError

PLAIN = Vocabulary.parse(
    "cup, mug, coffee cup\nknife\nbus\nvase\nperson, man, woman, people\nfire hydrant, hydrant\n"
    "skis\nteddy-bear\nberry\n"
)
COCO = (
    "chair, seat\ntoilet\nbird\ntie\nperson, man, woman\nwine glass\nmotorcycle,  motor bike\n"
    "dining table, table\ntrain\nbowl, plate\nremote, remote control\noven, stove top oven\n"
    "bear, teddy\n"
)
ORIGINAL = Vocabulary.parse(COCO, table="original")
REFINED = Vocabulary.parse(COCO, table="refined")
SYNONYMS = Path(__file__).parents[2] / "shared" / "data" / "chair_synonyms" / "synonyms.txt"


def classes(tokens: str, vocabulary: Vocabulary) -> list[str]:
    return [mention.object_class for mention in mentions(tokens.split(), vocabulary).found]


# -- tables ------------------------------------------------------------------------------------


def test_the_first_entry_names_the_class() -> None:
    assert PLAIN.classes[:2] == ("cup", "knife")
    assert PLAIN.class_of["mug"] == PLAIN.class_of["coffee cup"] == PLAIN.class_of["cup"] == "cup"


def test_the_original_table_keeps_the_space_of_a_double_space() -> None:
    assert " motor bike" in ORIGINAL.class_of
    assert classes("a motor bike", ORIGINAL) == []
    assert classes("a motor bike", REFINED) == ["motorcycle"]


@pytest.mark.parametrize("table", ["original", "refined", "plain"])
def test_an_entry_of_two_classes_is_an_error_with_its_line(table: Table) -> None:
    with pytest.raises(ArtifactError, match=r"s\.txt: line 3: entry 'cup' .* belongs to 'cup'"):
        Vocabulary.parse("cup, mug\n\nbowl, cup\n", table=table, source="s.txt")
    assert Vocabulary.parse("bicycle, bike, bicycle, bike", table=table).classes == ("bicycle",)


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_table_is_an_error(text: str) -> None:
    with pytest.raises(ArtifactError, match="no class"):
        Vocabulary.parse(text)


@pytest.mark.skipif(not SYNONYMS.exists(), reason="the shared data is not here")
def test_the_published_table_has_eighty_classes() -> None:
    vocabulary = Vocabulary.parse(SYNONYMS.read_text(), table="original")
    assert len(vocabulary.classes) == 80
    assert [entry for entry in vocabulary.class_of if entry != entry.strip()] == [
        " motor bike",
        " cheesecake",
    ]
    assert classes("a dining table and a desk", vocabulary) == ["dining table", "dining table"]
    assert len(vocabulary.phrases) == 26 + 24 + 2 + 2


# -- mentions ----------------------------------------------------------------------------------


def test_every_mention_counts_in_order_with_its_position() -> None:
    found = mentions(["man", "near", "seat", "near", "man"], ORIGINAL).found
    assert found == [
        Mention("man", "person", 0),
        Mention("seat", "chair", 2),
        Mention("man", "person", 4),
    ]


@pytest.mark.parametrize(
    ("tokens", "original", "refined"),
    [
        ("baby bird", ["bird"], ["bird"]),
        ("adult animal", [], []),
        ("passenger train", ["train"], ["train"]),
        ("train track", [], []),
        ("home plate", [], []),
        ("bow tie", ["tie"], ["tie"]),
        ("wine glas", ["wine glass"], ["wine glass"]),
        ("toilet seat", ["toilet"], ["toilet"]),
        ("toilet with a seat", ["toilet"], ["toilet"]),
        ("dining table", ["dining table"], ["dining table"]),
        ("remote control", ["remote"], ["remote"]),
        ("stove top oven", ["oven"], ["oven"]),
        ("teddy bear", [], ["bear", "bear"]),
        ("train train track", ["train"], ["train"]),
        ("", [], []),
    ],
)
def test_double_words_are_merged_by_the_table(
    tokens: str, original: list[str], refined: list[str]
) -> None:
    assert classes(tokens, ORIGINAL) == original
    assert classes(tokens, REFINED) == refined


def test_words_keep_the_seat_that_is_no_mention() -> None:
    found = mentions(["a", "toilet", "seat", "by", "the", "seat", "of", "a", "man"], ORIGINAL)
    assert found.words == ["a", "toilet", "by", "the", "seat", "of", "a", "man"]
    # The reference's index list is not shortened with the words: `man` is token 8, not 7.
    assert found.found == [Mention("toilet", "toilet", 1), Mention("man", "person", 7)]


def test_the_seat_rule_is_the_coco_tables_only() -> None:
    assert classes("toilet seat", Vocabulary.parse(COCO)) == ["toilet", "chair"]


def test_a_plain_table_has_phrases_of_any_length() -> None:
    vocabulary = Vocabulary.parse("oven, stove top oven\nstove, stove top\n")
    assert classes("a stove top oven on a stove top", vocabulary) == ["oven", "stove"]


# -- plain tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Two CUPS, one cup's!", ["two", "cup", "one", "cup"]),
        ("knives buses vases berries", ["knife", "bus", "vase", "berry"]),
        ("men, women & children", ["man", "woman", "children"]),
        ("people", ["people"]),
        ("fire hydrants", ["fire", "hydrant"]),
        ("skis glasses this", ["skis", "glasses", "this"]),
        ("a teddy-bear, a cup-like mug", ["a", "teddy-bear", "a", "cup", "like", "mug"]),
        ("\u732b cup\U0001f600cup\u2028cup\x00cup", ["\u732b", "cup", "cup", "cup", "cup"]),
        ("cup_cup.cup", ["cup", "cup", "cup"]),
        ("", []),
        (" \n", []),
    ],
)
def test_plain_tokens_find_known_singulars(text: str, tokens: list[str]) -> None:
    assert plain_tokens(text, vocabulary=PLAIN) == tokens


def test_a_cupboard_is_no_cup() -> None:
    tokens = plain_tokens("A cupboard, a cupcake and buster.", vocabulary=PLAIN)
    assert mentions(tokens, PLAIN).found == []


# -- scores ------------------------------------------------------------------------------------


def score(text: str, *truth: str) -> CorpusMetrics:
    one = score_text(
        text, set(truth), vocabulary=PLAIN, tokenise=lambda t: plain_tokens(t, vocabulary=PLAIN)
    )
    return corpus_metrics([one])


def test_a_caption_is_scored_by_mentions_and_by_distinct_classes() -> None:
    found = mentions(["cup", "mug", "knife", "bus", "knife"], PLAIN).found
    one = score_caption(found, {"cup", "bus", "vase", "person"}, num_words=5)
    assert [mention.word for mention in one.hallucinated] == ["knife", "knife"]
    assert (one.correct, one.num_truth, one.recall) == (("bus", "cup"), 4, 0.5)
    assert corpus_metrics([one]) == CorpusMetrics(1, 1, 1, 5, 2, 2, 4, 5)


def test_corpus_metrics_are_ratios_of_sums() -> None:
    tokenised = [
        ("cup cup knife", {"cup"}),
        ("bus", {"bus", "vase"}),
        ("sky", {"vase"}),
        ("", set()),
    ]
    scores = [
        score_caption(mentions(text.split(), PLAIN).found, truth, num_words=len(text.split()))
        for text, truth in tokenised
    ]
    corpus = corpus_metrics(scores)
    assert corpus.chair_s == 1 / 4
    assert corpus.response_hallucination == 1 / 2
    assert corpus.mention_hallucination == 1 / 4
    assert corpus.recall == 2 / 4
    assert corpus.mean_words == 5 / 4
    random.Random(0).shuffle(scores)
    assert corpus_metrics(scores) == corpus
    assert set(corpus.metrics()) == {
        *("response_hallucination", "mention_hallucination", "chair_s", "recall", "mean_words")
    }


def test_a_ratio_without_denominator_is_undefined() -> None:
    assert set(corpus_metrics([]).metrics().values()) == {None}
    nothing = score("Blue sky.", "cup")
    assert nothing.response_hallucination is None
    assert nothing.mention_hallucination is None
    assert (nothing.chair_s, nothing.recall, nothing.mean_words) == (0.0, 0.0, 2.0)
    assert score("A cup.").recall is None


def test_plural_and_two_word_objects_are_scored() -> None:
    assert score("Two mugs near fire hydrants.", "cup", "fire hydrant").chair_s == 0.0
    assert score("Two mugs near fire hydrants.", "cup").mention_hallucination == 0.5
