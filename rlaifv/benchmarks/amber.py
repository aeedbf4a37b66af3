"""AMBER: objects of descriptions against annotated lists, and exact Yes/No questions."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from rlaifv.benchmarks.base import Metrics, Question, over_repeats, unique_responses
from rlaifv.benchmarks.files import NumberedRow, image_bytes, read_json, read_rows, read_text
from rlaifv.benchmarks.language import NltkTools
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.places import local_path
from rlaifv.records import Count, Grade, Record, Response

Mode = Literal["vectors", "exact"]
Kind = Literal["generative", "state", "number", "action", "existence", "relation"]
KINDS: dict[str, Kind] = {
    "generative": "generative",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-hallucination": "existence",
    "discriminative-relation": "relation",
    "relation": "relation",
}
DIMENSIONS: dict[str, tuple[Kind, ...]] = {
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "relation": ("relation",),
}
VECTORS = "en_core_web_lg"
_SIMILAR = 0.8
_START = 0.001
"""Every denominator of the program starts here."""
Similarity = Callable[[str, str], float]


class Annotation(NamedTuple):
    """What is known of one item."""

    kind: Kind
    truth: tuple[str, ...]
    """Generative: words in the picture, repeats kept; else (`yes`,) or (`no`,)."""
    hallu: tuple[str, ...] = ()
    """Words that models like to invent for this picture."""


class AmberGrade(Record):
    """The counts of one response."""

    kind: Kind
    nouns: Count = 0
    """Nouns of the vocabulary, repeats included."""
    hallucinated: Count = 0
    covered: Count = 0
    num_truth: Count = 0
    marked: Count = 0
    num_hallu: Count = 0
    num_words: Count = 0
    truth: str = ""
    """Discriminative: yes or no."""
    answer: str = ""
    """Discriminative: the response as it is."""
    hallucinated_words: tuple[str, ...] = ()


class AmberData(NamedTuple):
    """The files of the benchmark."""

    annotations: list[Annotation]
    relation: dict[str, list[str]]
    safe_words: frozenset[str]
    vocabulary: frozenset[str]


def read_data(path: Path) -> AmberData:
    """`annotations.json`, `relation.json` and `safe_words.txt` of a folder (or beside the first).

    Raises ArtifactError for a missing file, ids out of order, and a word without associations.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "annotations.json" if path.is_dir() else path
    relation = read_json(folder / "relation.json")
    if not isinstance(relation, dict):
        raise ArtifactError(f"{folder / 'relation.json'}: expected an object of words and lists")
    annotations = [_annotation(row, relation) for row in read_rows(file)]
    lines = read_text(folder / "safe_words.txt").split("\n")
    words = {*relation, *(word for others in relation.values() for word in others)}
    return AmberData(annotations, relation, frozenset(lines) - {""}, frozenset(words))


def _annotation(row: NumberedRow, relation: dict[str, list[str]]) -> Annotation:
    if row.row.get("id") != row.number + 1:
        raise ArtifactError(f"{row.where}, field id: expected {row.number + 1}")
    kind = KINDS.get(str(row.row.get("type")))
    if kind is None:
        raise ArtifactError(f"{row.where}, field type: expected one of {sorted(KINDS)}")
    truth = row.row.get("truth")
    if kind != "generative":
        if truth not in ("yes", "no"):
            raise ArtifactError(f"{row.where}, field truth: expected yes or no, got {truth!r}")
        return Annotation(kind, (truth,))
    hallu = row.row.get("hallu")
    if not isinstance(truth, list) or not isinstance(hallu, list):
        raise ArtifactError(f"{row.where}, fields truth and hallu: expected lists of words")
    strangers = [word for word in (*truth, *hallu) if word not in relation]
    if strangers:
        raise ArtifactError(f"{row.where}: {strangers} are no keys of relation.json")
    return Annotation(kind, tuple(truth), tuple(hallu))


class _Targets:
    """Words that nouns are compared with: all associated words in order, then the words."""

    def __init__(self, words: Sequence[str], relation: dict[str, list[str]]) -> None:
        self._entries = [
            (other, owner) for owner, word in enumerate(words) for other in relation[word]
        ]
        self._entries += [(word, owner) for owner, word in enumerate(words)]
        self.marked = [False] * len(words)

    def mark_first(self, fits: Callable[[str], bool]) -> bool:
        """Marks the owner of the first entry that fits; False without one."""
        for word, owner in self._entries:
            if fits(word):
                self.marked[owner] = True
                return True
        return False


def grade_description(
    nouns: Sequence[str], annotation: Annotation, *, data: AmberData, similarity: Similarity
) -> AmberGrade:
    """The counts of a description with these noun lemmas (AMBER's generative task).

    A hallu word does not settle a noun: it may mark a second one by similarity, and may still be
    close to something that is there (program).
    """
    truth = _Targets(annotation.truth, data.relation)
    hallu = _Targets(annotation.hallu, data.relation)
    kept = [noun for noun in nouns if noun in data.vocabulary]
    hallucinated = []
    for noun in kept:
        same = functools.partial(str.__eq__, noun)
        close = functools.partial(_is_close, noun, similarity)
        if noun in data.safe_words or truth.mark_first(same):
            continue
        hallu.mark_first(same)
        hallu.mark_first(close)
        if not truth.mark_first(close):
            hallucinated.append(noun)
    return AmberGrade(
        kind="generative",
        nouns=len(kept),
        hallucinated=len(hallucinated),
        covered=sum(truth.marked),
        num_truth=len(truth.marked),
        marked=sum(hallu.marked),
        num_hallu=len(hallu.marked),
        hallucinated_words=tuple(hallucinated),
    )


def _is_close(noun: str, similarity: Similarity, word: str) -> bool:
    return similarity(noun, word) > _SIMILAR


def exact_similarity(first: str, second: str) -> float:
    """Without word vectors: only the same word is similar. Another metric than AMBER's."""
    return float(first == second)


def vector_similarity() -> tuple[Similarity, str]:
    """spaCy's similarity with the vectors of `en_core_web_lg`, and its name and version."""
    try:
        import spacy

        nlp = spacy.load(VECTORS)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"AMBER mode vectors needs spaCy's {VECTORS}: {error}; mode exact does without it, "
            "but its scores are not AMBER's"
        ) from error
    parse = functools.cache(nlp)

    @functools.cache
    def similarity(first: str, second: str) -> float:
        return float(parse(first).similarity(parse(second)))

    return similarity, f"{VECTORS} {nlp.meta.get('version', '?')}, spacy {spacy.__version__}"


def has_vectors() -> bool:
    """Whether mode `vectors` can run."""
    from importlib.util import find_spec

    return find_spec("spacy") is not None and find_spec(VECTORS) is not None


def amber_metrics(grades: Sequence[AmberGrade]) -> Metrics:
    """CHAIR, Cover, Hal, Cog and per kind Accuracy, Precision, Recall, F1, in percent, rounded to
    one decimal as the program prints them (its denominators start at 0.001), and the unrounded
    fractions that other benchmarks have too. None: no such item was answered.
    """
    described = [grade for grade in grades if grade.kind == "generative"]
    metrics = _generative(described)
    for name, kinds in DIMENSIONS.items():
        metrics |= _yes_no([one for one in grades if one.kind in kinds], name, len(kinds))
        if len(kinds) > 1:
            for kind in kinds:
                metrics |= _yes_no([one for one in grades if one.kind == kind], kind, 1)
    asked = [grade for grade in grades if grade.kind != "generative"]
    present = {grade.kind for grade in asked}
    complete = all(present & set(kinds) for kinds in DIMENSIONS.values())
    return metrics | _yes_no(asked if complete else [], "", 1)


def _generative(grades: Sequence[AmberGrade]) -> Metrics:
    names = ("CHAIR", "Cover", "Hal", "Cog")
    fractions = ("response_hallucination", "mention_hallucination", "recall", "mean_words")
    if not grades:
        return dict.fromkeys((*names, *fractions))
    nouns, wrong = sum(one.nouns for one in grades), sum(one.hallucinated for one in grades)
    truth, covered = sum(one.num_truth for one in grades), sum(one.covered for one in grades)
    hallu, marked = sum(one.num_hallu for one in grades), sum(one.marked for one in grades)
    clean = sum(one.hallucinated == 0 for one in grades)
    return {
        "CHAIR": round(wrong / (nouns + _START) * 100, 1),
        "Cover": round(covered / (truth + _START) * 100, 1),
        "Hal": round(100 - clean / (len(grades) + _START) * 100, 1),
        "Cog": round(marked / (hallu + _START) * 100, 1),
        "response_hallucination": 1 - clean / len(grades),
        "mention_hallucination": wrong / nouns if nouns else None,
        "recall": covered / truth if truth else None,
        "mean_words": sum(one.num_words for one in grades) / len(grades),
    }


def _yes_no(grades: Sequence[AmberGrade], prefix: str, counters: int) -> Metrics:
    """Positive is No; anything but exactly Yes or No is wrong and no No.

    `counters`: how many of the program's counters are summed, each starting at 0.001.
    """
    names = [f"{prefix}_{name}".strip("_") for name in ("Accuracy", "Precision", "Recall", "F1")]
    if not grades:
        return dict.fromkeys(names)
    start = _START * counters
    said_no = [one for one in grades if one.answer == "No"]
    truly_no = [one for one in grades if one.truth == "no"]
    right_no = sum(one.truth == "no" for one in said_no)
    right = right_no + sum(one.answer == "Yes" and one.truth == "yes" for one in grades)
    accuracy = round(right / (len(grades) + start) * 100, 1)
    precision = round(right_no / (len(said_no) + start) * 100, 1)
    recall = round(right_no / (len(truly_no) + start) * 100, 1)
    smooth = 0.001 if prefix == "existence" else 0.0001
    share_p, share_r = precision / 100, recall / 100
    f1 = round(2 * share_p * share_r / (share_p + share_r + smooth) * 100, 1)
    return dict(zip(names, (accuracy, precision, recall, f1), strict=True))


class AmberScorer:
    """Grades responses under one mode."""

    def __init__(
        self,
        data: AmberData,
        *,
        mode: Mode,
        tools: NltkTools,
        similarity: Similarity | None = None,
    ) -> None:
        """`similarity`: for tests; default: the mode's own."""
        self._data, self._tools, self._mode = data, tools, mode
        self._given = similarity

    @property
    def identity(self) -> str:
        """What goes into every grade."""
        return f"amber {self._mode}; {self._similarity[1]}; {self._tools.identity}"

    def grade(self, item: int, text: str) -> AmberGrade:
        """Of the response to item `item` (from 1). Raises ArtifactError for an unknown item."""
        if not 1 <= item <= len(self._data.annotations):
            raise ArtifactError(f"responses: id {item}: the annotations have no such item")
        annotation = self._data.annotations[item - 1]
        if annotation.kind != "generative":
            return AmberGrade(kind=annotation.kind, truth=annotation.truth[0], answer=text)
        grade = grade_description(
            self._tools.nouns(text),
            annotation,
            data=self._data,
            similarity=self._similarity[0],
        )
        return grade.model_copy(update={"num_words": len(text.split())})

    @cached_property
    def _similarity(self) -> tuple[Similarity, str]:
        if self._given is not None:
            return self._given, "similarity given by the caller"
        if self._mode == "vectors":
            return vector_similarity()
        return exact_similarity, "no word vectors: not AMBER's metric"


class Amber:
    """Kind `amber`: `path` is the folder of the data files, `images` that of the pictures."""

    def __init__(self, spec: BenchmarkSpec) -> None:
        self._spec = spec
        mode = spec.mode or ("vectors" if has_vectors() else "exact")
        if mode not in ("vectors", "exact"):
            raise ConfigError(f"benchmark {spec.name}: mode must be vectors or exact")
        self._mode: Mode = mode

    def questions(self) -> Iterator[Question]:
        folder = local_path(self._spec.path)
        images = local_path(self._spec.images) if self._spec.images else folder / "images"
        for row in read_rows(folder / "query_all.json"):
            query = row.row.get("query")
            if not isinstance(query, str):
                raise ArtifactError(f"{row.where}, field query: expected a string")
            image = image_bytes(row, "image", folder=images)
            yield Question(str(row.row.get("id")), query, image)

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        unique_responses(responses)
        scorer = self._scorer
        for response in responses:
            item = int(response.question_id) if response.question_id.isdecimal() else 0
            yield Grade(
                benchmark=response.benchmark,
                question_id=response.question_id,
                step=response.step,
                judge=scorer.identity,
                judge_reply="",
                value=scorer.grade(item, response.text).model_dump_json(),
            )

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        return over_repeats(
            grades,
            lambda rows: amber_metrics([AmberGrade.model_validate_json(row.value) for row in rows]),
        )

    @cached_property
    def _scorer(self) -> AmberScorer:
        nltk_data = local_path(self._spec.nltk_data) if self._spec.nltk_data else None
        data = read_data(local_path(self._spec.path))
        return AmberScorer(data, mode=self._mode, tools=NltkTools(nltk_data))
