"""A user's own object benchmark: pictures, what is truly in them, and a vocabulary.

The file is Parquet or JSONL with `question_id`, `image` (struct `{bytes, path}` or a path beside
the file), `question` and `objects` (class names). Objects are found with plain words: no
language tool is needed.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from rlaifv.benchmarks.base import Metrics, Question, over_repeats, unique_responses
from rlaifv.benchmarks.captions import CaptionGrade, caption_metrics
from rlaifv.benchmarks.files import (
    NumberedRow,
    digest,
    image_bytes,
    read_rows,
    read_text,
    text_field,
)
from rlaifv.chair import Vocabulary, mentions, plain_tokens
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.places import local_path
from rlaifv.records import Grade, Response


class ObjectBenchmark:
    """Kind `objects`; metrics as Object HalBench names them, over the user's own vocabulary."""

    def __init__(self, spec: BenchmarkSpec) -> None:
        if spec.vocabulary is None:
            raise ConfigError(f"benchmark {spec.name}: kind objects needs `vocabulary`, a file")
        self._spec = spec
        self._path = local_path(spec.path)
        self._vocabulary_path = local_path(spec.vocabulary)

    def questions(self) -> Iterator[Question]:
        for row in self._rows():
            image = image_bytes(row, "image", "image_path", folder=self._image_folder)
            yield Question(text_field(row, "question_id"), text_field(row, "question"), image)

    def grade(self, responses: Sequence[Response]) -> Iterator[Grade]:
        unique_responses(responses)
        judge = f"rules plain/1 vocabulary={digest(read_text(self._vocabulary_path))}"
        for response in responses:
            truth = self._truth.get(response.question_id)
            if truth is None:
                raise ArtifactError(
                    f"responses: question {response.question_id!r} is not in {self._path}"
                )
            found = mentions(
                plain_tokens(response.text, vocabulary=self._vocabulary), self._vocabulary
            )
            value = CaptionGrade(
                found=[(one.word, one.object_class, one.position) for one in found.found],
                truth=truth,
                num_words=len(response.text.split()),
            )
            yield Grade(
                benchmark=response.benchmark,
                question_id=response.question_id,
                step=response.step,
                judge=judge,
                judge_reply="",
                value=value.model_dump_json(),
            )

    def metrics(self, grades: Sequence[Grade]) -> Metrics:
        return over_repeats(grades, caption_metrics)

    @property
    def _image_folder(self) -> Path:
        return local_path(self._spec.images) if self._spec.images else self._path.parent

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        text = read_text(self._vocabulary_path)
        return Vocabulary.parse(text, source=str(self._vocabulary_path))

    @cached_property
    def _truth(self) -> dict[str, list[str]]:
        truth: dict[str, list[str]] = {}
        for row in self._rows():
            question_id = text_field(row, "question_id")
            if question_id in truth:
                raise ArtifactError(f"{row.where}, field question_id: {question_id!r} again")
            truth[question_id] = self._objects(row)
        return truth

    def _rows(self) -> Iterator[NumberedRow]:
        return read_rows(self._path)

    def _objects(self, row: NumberedRow) -> list[str]:
        objects = row.row.get("objects")
        if not isinstance(objects, list):
            raise ArtifactError(f"{row.where}, field objects: expected a list of class names")
        strangers = sorted({str(name) for name in objects} - set(self._vocabulary.classes))
        if strangers:
            raise ArtifactError(
                f"{row.where}, field objects: {strangers} are no classes of {self._vocabulary_path}"
            )
        return sorted(set(objects))
