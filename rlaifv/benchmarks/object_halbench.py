"""Object HalBench and CHAIR on COCO images: three ways from an answer to the objects it names.

| mode | objects are found by | synonym table | lemmas of the reference captions |
|---|---|---|---|
| `judge` (variant D) | a judge's list, spaCy lemmas and nouns | refined | WordNet, always noun |
| `rules` (variant C) | NLTK tokens of the answer, WordNet lemmas, always noun | refined | the same |
| `chair` (variant B) | NLTK tokens, WordNet lemmas by part of speech | original | the same |
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from rlaifv.benchmarks.base import Metrics, Question, over_repeats, unique_responses
from rlaifv.benchmarks.captions import CaptionGrade, caption_metrics
from rlaifv.benchmarks.coco import find_files, image_objects
from rlaifv.benchmarks.files import (
    NumberedRow,
    digest,
    image_bytes,
    read_json,
    read_rows,
    read_text,
    text_field,
)
from rlaifv.benchmarks.judge import Judge, no_judge
from rlaifv.benchmarks.language import NltkTools, Pipeline, load_pipeline, noun_phrases
from rlaifv.benchmarks.prompts import OBJECTS, Prompt, load_prompt
from rlaifv.benchmarks.replies import Ask, Message, Replier, Reply, judged_by
from rlaifv.chair import Mention, Mentions, Tokenise, Vocabulary, mentions, merge_phrases
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.places import local_path
from rlaifv.records import Grade, Instruction, Response

Mode = Literal["judge", "rules", "chair"]
JUDGE_MODEL = "gpt-3.5-turbo-0613"
"""Of the published scores; retired by its vendor."""
MAX_TOKENS = 512
_SHORT = 3
"""Answers of at most so many words name no objects; the judge is not asked (release)."""
_ADDED = {
    "person": ("brother", "pedestrian"),
    "dining table": ("coffee table",),
    "remote": ("remote control",),
}
"""What Object HalBench's table has beyond CHAIR's."""
_MARK = " motor bike"
"""An entry of CHAIR's original table: its double space is kept by that table's rules."""
SYNONYMS_SOURCE = (
    "data/synonyms.txt of LisaAnne/Hallucination (BSD 2-Clause) or eval/data/synonyms_refine.txt "
    "of RLHF-V/RLAIF-V"
)


class Caption(NamedTuple):
    """One answer to be scored."""

    item: str
    position: int
    image_id: int
    text: str
    question: str = ""


class Scored(NamedTuple):
    """The grade of one answer in one repeat."""

    position: int
    repeat: int
    value: CaptionGrade
    reply: str
    """The judge's; empty for rules."""


class SynonymTable(NamedTuple):
    """A vocabulary and which table it is."""

    vocabulary: Vocabulary
    name: str
    """original, refined, `refined, derived from the original`, or other; and the file's digest."""


def read_synonyms(path: Path | None, mode: Mode) -> SynonymTable:
    """The table that a mode needs, from the file that the user has.

    `chair` reads the file as it is. The others need the refined table: from the original one it is
    derived by adding the six entries that it lacks (`person`: brother, pedestrian; `dining table`:
    coffee table; `remote`: remote control) and stripping double spaces. No table is shipped.
    """
    if path is None:
        raise ConfigError(
            f"a synonym table is needed: --synonyms FILE (`vocabulary`): {SYNONYMS_SOURCE}"
        )
    text = read_text(path)
    lines = [line.strip().split(", ") for line in text.split("\n") if line.strip()]
    is_original = any(_MARK in entries for entries in lines)
    is_refined = any("pedestrian" in entries for entries in lines)
    name = "original" if is_original else "refined" if is_refined else "other"
    if mode == "chair":
        vocabulary = Vocabulary.parse(text, table="original", source=str(path))
    else:
        if is_original:
            name = "refined, derived from the original"
            lines = [[*entries, *_ADDED.get(entries[0], ())] for entries in lines]
        joined = "\n".join(", ".join(entries) for entries in lines)
        vocabulary = Vocabulary.parse(joined, table="refined", source=str(path))
    return SynonymTable(vocabulary, f"{name} {digest(text)}")


def tokeniser(mode: Mode, tools: NltkTools) -> Tokenise:
    """Lower-case tokens with lemmas: by part of speech for `chair`, else always as nouns."""
    if mode == "chair":
        return lambda text: tools.tagged_lemmas(tools.tokens(text.lower()))
    return lambda text: tools.noun_lemmas(tools.tokens(text.lower()))


def parse_objects(reply: str) -> list[str] | None:
    """The names in a judge's reply, or None when it is not a list of strings.

    The whole reply, a fenced block, its last line, or the outermost brackets; `()` and `[]` mean
    none (the release's prompt asks for `()` and its parser then refuses it).
    """
    text = reply.strip()
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    candidates = [text, fenced.group(1).strip() if fenced else "", text.split("\n")[-1].strip()]
    bracket = re.search(r"\[.*\]", text, re.DOTALL)
    candidates.append(bracket.group() if bracket else "")
    for candidate in candidates:
        if candidate == "()":
            return []
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return value
    return None


def named_objects(names: Sequence[str], *, pipeline: Pipeline, vocabulary: Vocabulary) -> Mentions:
    """Variant D: the mentions in a judge's list of names, unique by word.

    Per name, read as "a <name>": the double words among its lemmas if there are any, else its
    maximal noun runs.
    """
    words: list[str] = []
    for name in names:
        tokens = list(pipeline.nlp(f"a {name}"))
        merged = merge_phrases([token.lemma_ for token in tokens], vocabulary)
        starts = [start for _, start in merged[1:]] + [len(tokens)]
        doubles = [
            word for (word, start), end in zip(merged, starts, strict=True) if end - start > 1
        ]
        words += doubles or noun_phrases(tokens)
    unique = list(dict.fromkeys(words))
    # Words of different names must not merge with each other.
    return mentions(unique, vocabulary._replace(phrases={}))


class Scorer:
    """Scores answers under one mode; a judge and a spaCy pipeline in mode `judge` only."""

    def __init__(
        self,
        mode: Mode,
        *,
        synonyms: SynonymTable,
        tools: NltkTools,
        replier: Replier | None = None,
        prompt: Prompt = OBJECTS,
        pipeline: Pipeline | None = None,
    ) -> None:
        if mode == "judge" and replier is None:
            raise ConfigError("object_halbench: mode judge needs --judge URL or --reviews FILE")
        self._mode, self._synonyms, self._tools = mode, synonyms, tools
        self._replier, self._prompt, self._given_pipeline = replier, prompt, pipeline

    @property
    def identity(self) -> str:
        """What goes into every grade."""
        parts = [f"object_halbench {self._mode}", f"synonyms {self._synonyms.name}"]
        if self._mode == "judge" and self._replier is not None:
            parts += [judged_by(self._replier, self._prompt.source), self._pipeline.name]
        return "; ".join([*parts, self._tools.identity])

    def truth(self, coco: Path, image_ids: Collection[int]) -> dict[int, frozenset[str]]:
        """The classes of each image from the COCO files in a folder."""
        return image_objects(
            find_files(coco),
            image_ids,
            vocabulary=self._synonyms.vocabulary,
            tokenise=tokeniser(self._mode, self._tools),
        )

    def score(
        self, captions: Sequence[Caption], truth: dict[int, frozenset[str]]
    ) -> Iterator[Scored]:
        """Per answer its repeats. Raises ArtifactError for an image without ground truth."""
        for caption in captions:
            if caption.image_id not in truth:
                raise ArtifactError(f"{caption.item}: no ground truth for image {caption.image_id}")
        if self._mode == "judge":
            yield from self._judged(captions, truth)
            return
        tokenise = tokeniser(self._mode, self._tools)
        for caption in captions:
            found = mentions(tokenise(caption.text), self._synonyms.vocabulary)
            value = _grade(caption, found, truth[caption.image_id])
            yield Scored(caption.position, 0, value, "")

    def _judged(
        self, captions: Sequence[Caption], truth: dict[int, frozenset[str]]
    ) -> Iterator[Scored]:
        replier = self._replier
        assert replier is not None  # noqa: S101 - the constructor checked it
        repeats = replier.repeats or 1
        long = [caption for caption in captions if len(caption.text.split()) > _SHORT]
        asks = [self._ask(caption, repeat) for caption in long for repeat in range(repeats)]
        replies = replier.ask(asks, lambda text: parse_objects(text) is not None)
        said = {(ask.position, ask.repeat): reply for ask, reply in zip(asks, replies, strict=True)}
        for caption in captions:
            for repeat in range(repeats):
                reply = said.get((caption.position, repeat), Reply(text=""))
                found = named_objects(
                    parse_objects(reply.text) or [],
                    pipeline=self._pipeline,
                    vocabulary=self._synonyms.vocabulary,
                )
                value = _grade(caption, found, truth[caption.image_id]).model_copy(
                    update={
                        "judge_model": reply.model,
                        "input_tokens": reply.input_tokens,
                        "output_tokens": reply.output_tokens,
                    }
                )
                yield Scored(caption.position, repeat, value, reply.text)

    def _ask(self, caption: Caption, repeat: int) -> Ask:
        content = self._prompt.fill(caption.question, caption.text)
        message = Message("system", content)  # the release sends one system message
        return Ask(caption.item, caption.position, (message,), MAX_TOKENS, repeat)

    @cached_property
    def _pipeline(self) -> Pipeline:
        return self._given_pipeline or load_pipeline()


def _grade(caption: Caption, found: Mentions, truth: frozenset[str]) -> CaptionGrade:
    return CaptionGrade(
        image_id=str(caption.image_id),
        found=[_plain(mention) for mention in found.found],
        truth=sorted(truth),
        num_words=len(caption.text.strip().split(" ")),  # as the release: an empty text has one
        words=tuple(found.words),
    )


def _plain(mention: Mention) -> tuple[str, str, int]:
    return (mention.word, mention.object_class, mention.position)


def clean_answer(text: str) -> str:
    """The answer as the release reads it."""
    return text.replace("Assistant:", "").strip()


def parse_image_id(row: NumberedRow, *names: str) -> int:
    """The COCO image id: a number, or a file name that ends in one."""
    name = next((name for name in names if name in row.row), None)
    value = row.row[name] if name else None
    match = re.search(r"(\d+)(?:\.\w+)?$", str(value))
    if isinstance(value, bool) or not isinstance(value, int | str) or match is None:
        raise ArtifactError(f"{row.where}, field {' or '.join(names)}: no image id, got {value!r}")
    return int(match.group(1))


def _asked_of(row: NumberedRow) -> tuple[str, str]:
    """Image id and question."""
    image_id = parse_image_id(row, "image_id", "image_url")
    return str(image_id), text_field(row, "question", "prompt")


def read_ground_truth(path: Path) -> dict[int, frozenset[str]]:
    """`{"<image id>": ["person", ...]}`; raises ArtifactError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected an object of image ids and lists of class names")
    truth: dict[int, frozenset[str]] = {}
    for key, names in value.items():
        if not key.isdecimal() or not isinstance(names, list):
            raise ArtifactError(f"{path}: {key!r}: expected an image id and a list of class names")
        truth[int(key)] = frozenset(names)
    return truth


class ObjectHalBench:
    """Kind `object_halbench`: `path` is the question file, `coco` the annotations' folder."""

    def __init__(self, spec: BenchmarkSpec) -> None:
        self._spec = spec
        mode = spec.mode or ("judge" if spec.judge else "rules")
        if mode not in ("judge", "rules", "chair"):
            raise ConfigError(f"benchmark {spec.name}: mode must be judge, rules or chair")
        if mode == "judge" and spec.judge is None:
            raise no_judge(spec.name)
        self._mode: Mode = mode

    def questions(self) -> Iterator[Question]:
        path = local_path(self._spec.path)
        folder = local_path(self._spec.images) if self._spec.images else path.parent
        for row in read_rows(path):
            image = image_bytes(row, "image", "image_path", folder=folder)
            yield Question(*_asked_of(row), image)

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        unique_responses(responses)
        asked = self._asked
        captions = []
        for position, response in enumerate(responses):
            if response.question_id not in asked:
                raise ArtifactError(
                    f"responses: question {response.question_id!r} is not in {self._spec.path}"
                )
            text = response.text if self._mode == "chair" else clean_answer(response.text)
            question = asked[response.question_id]
            item = f"{response.question_id} at step {response.step}"
            captions.append(Caption(item, position, int(response.question_id), text, question))
        if self._spec.coco is None:
            raise ConfigError(f"benchmark {self._spec.name}: `coco` must name a folder")
        scorer = self._scorer
        truth = scorer.truth(local_path(self._spec.coco), {one.image_id for one in captions})
        for scored in scorer.score(captions, truth):
            response = responses[scored.position]
            yield Grade(
                benchmark=response.benchmark,
                question_id=response.question_id,
                step=response.step,
                repeat=scored.repeat,
                judge=scorer.identity,
                judge_reply=scored.reply,
                value=scored.value.model_dump_json(),
            )

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        return over_repeats(grades, caption_metrics)

    @cached_property
    def _asked(self) -> dict[str, str]:
        """Question by image id."""
        asked: dict[str, str] = {}
        for row in read_rows(local_path(self._spec.path)):
            key, question = _asked_of(row)
            if key in asked:
                raise ArtifactError(f"{row.where}: image {key} again; one question per image")
            asked[key] = question
        return asked

    @cached_property
    def _scorer(self) -> Scorer:
        spec = self._spec
        prompt = local_path(spec.judge.prompt) if spec.judge and spec.judge.prompt else None
        return Scorer(
            self._mode,
            synonyms=read_synonyms(
                local_path(spec.vocabulary) if spec.vocabulary else None, self._mode
            ),
            tools=NltkTools(local_path(spec.nltk_data) if spec.nltk_data else None),
            replier=Judge(spec.judge, default_model=JUDGE_MODEL, max_tokens=MAX_TOKENS)
            if spec.judge and self._mode == "judge"
            else None,
            prompt=load_prompt(OBJECTS, prompt),
        )


class HeldOutImages(ObjectHalBench):
    """COCO images that nothing else uses; their questions lie in the run (`rlaifv/pipeline.py`)."""

    def __init__(self, spec: BenchmarkSpec, rows: Callable[[], Iterator[Instruction]]) -> None:
        super().__init__(spec)
        self._rows = rows

    def questions(self) -> Iterator[Question]:
        for row in self._rows():
            yield Question(row.instruction_id, row.question, row.image.bytes)

    @cached_property
    def _asked(self) -> dict[str, str]:
        return {question.question_id: question.question for question in self.questions()}
