"""CHAIR-style scoring: which object classes a text mentions, and which of them are not there.

Objects are found by a synonym table (Rohrbach et al., EMNLP 2018), double words are merged
greedily from the left, and every metric is a ratio of sums. How a text becomes tokens is the
caller's choice (NLTK with lemmas for the published numbers); `plain_tokens` needs no dependency.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Literal, NamedTuple

from rlaifv.errors import ArtifactError

Tokenise = Callable[[str], list[str]]
Table = Literal["original", "refined", "plain"]

_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "animal", "cub"),
)
_VEHICLES = ("jet", "train")
_NOT_OBJECTS = ("home plate", "train track")
"""Merged so that `plate` and `train` are not seen; in no table, hence no mention."""
_ORIGINAL_DOUBLE_WORDS = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light"),
    *("traffic signal", "stop light", "fire hydrant", "stop sign", "parking meter"),
    *("suit case", "sports ball", "baseball bat", "baseball glove", "tennis racket"),
    *("wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier"),
    *("potted plant", "bow tie", "laptop computer"),
)


class Vocabulary(NamedTuple):
    """A parsed synonym table."""

    classes: tuple[str, ...]
    """In the order of the file."""
    class_of: Mapping[str, str]
    """Every synonym, the class names included, to its class."""
    phrases: Mapping[str, str]
    """Words of two or more tokens, to what replaces them."""
    longest_phrase: int
    seat_rule: bool
    """Where a toilet is mentioned, a seat is not a chair."""
    words: Set[str]
    """Every single word of a synonym: what `plain_tokens` may reduce a plural to."""

    @classmethod
    def parse(cls, text: str, *, table: Table = "plain", source: str = "synonyms") -> "Vocabulary":
        """One class per line, entries separated by `, `, class name first.

        `original`: CHAIR's table, entries not stripped (the double space before `motor bike` and
        `cheesecake` is part of the published numbers), its fixed list of double words. `refined`:
        Object HalBench's, entries stripped, double words from the table. `plain`: any other table,
        without COCO's special rules, phrases of any length. Raises ArtifactError naming the line of
        an entry that is empty or belongs to two classes.
        """
        class_of: dict[str, str] = {}
        classes: list[str] = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            entries = line.strip().split(", ")
            if table != "original":
                entries = [entry.strip() for entry in entries]
            for entry in entries:
                if not entry or class_of.get(entry, entries[0]) != entries[0]:
                    raise ArtifactError(
                        f"{source}: line {number}: entry {entry!r} is empty or already belongs to "
                        f"{class_of.get(entry)!r}; every synonym must belong to one class"
                    )
                class_of[entry] = entries[0]
            classes.append(entries[0])
        if not classes:
            raise ArtifactError(f"{source}: no class; expected one per line, synonyms after `, `")
        phrases = _phrases(class_of, table)
        return cls(
            tuple(classes),
            class_of,
            phrases,
            max((len(phrase.split()) for phrase in phrases), default=1),
            table != "plain",
            frozenset(word for entry in class_of for word in entry.split()),
        )


class Mention(NamedTuple):
    """One mention of an object; repeated mentions count again."""

    word: str
    object_class: str
    position: int
    """Index of its first token; as in the reference programs shifted after a removed `seat`."""


class Mentions(NamedTuple):
    """What a token list mentions."""

    words: list[str]
    """All tokens after double words were merged (the reference's `words`)."""
    found: list[Mention]


class CaptionScore(NamedTuple):
    """One text against the set of objects that are in its image."""

    found: tuple[Mention, ...]
    hallucinated: tuple[Mention, ...]
    """Mentions of classes that are not in the image."""
    correct: tuple[str, ...]
    """Distinct mentioned classes that are in the image, sorted."""
    num_truth: int
    num_words: int

    @property
    def recall(self) -> float:
        """Distinct correct classes per class of the image; 0 for an empty image (reference)."""
        return len(self.correct) / self.num_truth if self.num_truth else 0.0


class CorpusMetrics(NamedTuple):
    """Sums over texts, and the ratios of them; a ratio is None when its denominator is 0."""

    captions: int = 0
    """N"""
    captions_with_objects: int = 0
    """C: texts with at least one mention."""
    hallucinated_captions: int = 0
    """H: texts with at least one mention of a class that is not in the image."""
    mentions: int = 0
    """M"""
    hallucinated_mentions: int = 0
    """W"""
    correct: int = 0
    """O: distinct correct classes, summed over texts."""
    truth: int = 0
    """G: sizes of the images' sets, summed over texts."""
    words: int = 0

    @property
    def chair_s(self) -> float | None:
        """CHAIRs = H / N."""
        return _ratio(self.hallucinated_captions, self.captions)

    @property
    def response_hallucination(self) -> float | None:
        """H / C: Object HalBench's response-level hallucination (`CHAIRs_refine`)."""
        return _ratio(self.hallucinated_captions, self.captions_with_objects)

    @property
    def mention_hallucination(self) -> float | None:
        """CHAIRi = W / M: mention-level hallucination."""
        return _ratio(self.hallucinated_mentions, self.mentions)

    @property
    def recall(self) -> float | None:
        """O / G."""
        return _ratio(self.correct, self.truth)

    @property
    def mean_words(self) -> float | None:
        return _ratio(self.words, self.captions)

    def metrics(self) -> dict[str, float | None]:
        """The ratios by name, as selection and reports use them."""
        return {
            "response_hallucination": self.response_hallucination,
            "mention_hallucination": self.mention_hallucination,
            "chair_s": self.chair_s,
            "recall": self.recall,
            "mean_words": self.mean_words,
        }


def merge_phrases(tokens: Sequence[str], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Tokens with double words replaced, longest first from the left, and their first indices."""
    merged: list[tuple[str, int]] = []
    start = 0
    while start < len(tokens):
        for length in range(min(vocabulary.longest_phrase, len(tokens) - start), 1, -1):
            phrase = vocabulary.phrases.get(" ".join(tokens[start : start + length]))
            if phrase is not None:
                merged.append((phrase, start))
                start += length
                break
        else:
            merged.append((tokens[start], start))
            start += 1
    return merged


def mentions(tokens: Sequence[str], vocabulary: Vocabulary) -> Mentions:
    """The objects that a list of normalised, lower-case tokens mentions, in order."""
    merged = merge_phrases(tokens, vocabulary)
    words = [word for word, _ in merged]
    kept = words
    if vocabulary.seat_rule and "toilet" in words:
        kept = [word for word in words if word != "seat"]
    # The indices are deliberately not shortened with the words: see Mention.position.
    found = [
        Mention(word, vocabulary.class_of[word], merged[place][1])
        for place, word in enumerate(kept)
        if word in vocabulary.class_of
    ]
    return Mentions(words, found)


def score_caption(found: Sequence[Mention], truth: Set[str], *, num_words: int) -> CaptionScore:
    """Mentions of one text against the classes in its image; `num_words` is the caller's count."""
    classes = {mention.object_class for mention in found}
    return CaptionScore(
        tuple(found),
        tuple(mention for mention in found if mention.object_class not in truth),
        tuple(sorted(classes & truth)),
        len(truth),
        num_words,
    )


def score_text(
    text: str, truth: Set[str], *, vocabulary: Vocabulary, tokenise: Tokenise
) -> CaptionScore:
    """`score_caption` of a text; words are the pieces between white space."""
    found = mentions(tokenise(text), vocabulary).found
    return score_caption(found, truth, num_words=len(text.split()))


def corpus_metrics(scores: Iterable[CaptionScore]) -> CorpusMetrics:
    """The sums over all texts; their order does not matter."""
    totals = [0] * len(CorpusMetrics._fields)
    for score in scores:
        row = (
            1,
            bool(score.found),
            bool(score.hallucinated),
            len(score.found),
            len(score.hallucinated),
            len(score.correct),
            score.num_truth,
            score.num_words,
        )
        totals = [total + int(one) for total, one in zip(totals, row, strict=True)]
    return CorpusMetrics(*totals)


_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_IRREGULAR = {
    **{"men": "man", "women": "woman", "people": "person", "children": "child", "mice": "mouse"},
    **{"feet": "foot", "teeth": "tooth", "geese": "goose", "oxen": "ox"},
}


def plain_tokens(text: str, *, vocabulary: Vocabulary) -> list[str]:
    """Lower-case words, plurals reduced to a word of the vocabulary; others stay as they are.

    Looking for a known singular needs no list of exceptions (`vases` and `buses` both come out
    right). Hyphenated words come apart unless the vocabulary has them.
    """
    tokens: list[str] = []
    for match in _WORD.finditer(text.lower()):
        word = match.group().replace("\u2019", "'").removesuffix("'s")
        parts = [word] if _singular(word, vocabulary.words) else word.split("-")
        tokens += [_singular(part, vocabulary.words) or part for part in parts]
    return tokens


def _singular(word: str, known: Set[str]) -> str | None:
    """The first known form among the word, its irregular singular, and regular ones."""
    forms = [word, _IRREGULAR.get(word, "")]
    if word.endswith("ves"):
        forms += [word[:-3] + "fe", word[:-3] + "f"]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("s"):
        forms.append(word[:-1])
    if word.endswith("es"):
        forms.append(word[:-2])
    return next((form for form in forms if form in known), None)


def _phrases(class_of: Mapping[str, str], table: Table) -> dict[str, str]:
    """The double-word table; windows of two tokens only in the COCO tables."""
    if table == "plain":
        return {entry: entry for entry in class_of if " " in entry}
    listed = (
        _ORIGINAL_DOUBLE_WORDS
        if table == "original"
        else tuple(entry for entry in class_of if len(entry.split(" ")) == 2)
    )
    phrases = {phrase: phrase for phrase in (*listed, *_NOT_OBJECTS)}
    for animal in _ANIMALS:
        phrases[f"baby {animal}"] = phrases[f"adult {animal}"] = animal
    phrases |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
    return phrases | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
