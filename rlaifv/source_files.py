"""The formats of `prepare.source` and of `train --pairs`: rows by number, whatever the file."""

import array
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rlaifv.config import PrepareConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.places import local_path
from rlaifv.prompts import DESCRIPTION_REQUESTS

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class BadRow(Exception):
    """A row that must be set aside."""

    def __init__(self, field: str, problem: str, value: Any) -> None:
        super().__init__(problem)
        self.field, self.problem, self.value = field, problem, value


class Columns(NamedTuple):
    """What is read of a row; other columns are left alone."""

    types: Mapping[str, str]
    needed: tuple[tuple[str, ...], ...]
    """Of each group one must be there."""
    unique: str
    """The user's own id of a row; must not repeat. `ds_question_id` names the image and may."""


class SourceRow(NamedTuple):
    """A row as it lies in its file."""

    idx: int
    """Number in the whole source."""
    file: str
    row: int
    """Number in the file, from 0; lines of JSON lines count, blank ones included."""
    values: dict[str, Any] | BadRow


class Source(Protocol):
    """Rows by number."""

    name: str
    """For `origin_dataset`."""
    folder: Path
    """Where relative image paths start."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        """Rows by ascending number, a few in memory at a time."""
        ...


def open_source(config: PrepareConfig, columns: Columns | None = None) -> Source:
    """The source that `prepare.source` names; default: `INSTRUCTION_COLUMNS`.

    Raises ConfigError when there is nothing of that name or kind, ArtifactError for a broken
    Parquet file, missing columns or wrong column types, no rows, and repeated `question_id`s.
    """
    columns = columns or INSTRUCTION_COLUMNS
    path = local_path(config.source)
    if path.is_dir():
        parquet = sorted(path.rglob("*.parquet"))
        if not parquet and columns is not INSTRUCTION_COLUMNS:
            raise ConfigError(f"{path}: no Parquet files in it")
        source: Source = (
            ParquetSource(path, parquet, columns) if parquet else ImageFolder(path, config)
        )
    elif path.suffix == ".parquet" and path.exists():
        source = ParquetSource(path.parent, [path], columns)
    elif path.suffix in JSON_SUFFIXES and path.exists():
        source = _open_json(path, columns)
    elif path.exists():
        known = ", ".join((".parquet", *JSON_SUFFIXES))
        raise ConfigError(f"prepare.source: {path}: unknown kind of file; known: {known}")
    elif _HUB_ID.fullmatch(config.source) and path.suffix not in (".parquet", *JSON_SUFFIXES):
        source = HubSource(config.source, columns)
    else:
        raise ConfigError(f"prepare.source: {config.source}: no such file or folder")
    if len(source) == 0:
        raise ArtifactError(f"prepare.source: {config.source}: no rows")
    return source


class JsonLines:
    """One JSON object per line; lines end at a line feed only, so U+2028 is data."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.name, self.folder = path.stem, path.parent
        self._path = path
        self._offsets, self._lines = array.array("q"), array.array("q")
        ids = _UniqueIds(path, columns)
        has_id = re.compile(rf'"{columns.unique}"\s*:'.encode())
        with path.open("rb") as stream:
            offset = 0
            for number, line in enumerate(stream):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                    if has_id.search(line):
                        ids.add(_parse_line(line), row=number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        with self._path.open("rb") as stream:
            for idx in rows:
                stream.seek(self._offsets[idx])
                values = _parse_line(stream.readline())
                yield SourceRow(idx, str(self._path), self._lines[idx], values)


class JsonList:
    """One JSON list, as the release's samplers write it; held in memory as a whole."""

    def __init__(self, path: Path, values: list[Any], columns: Columns) -> None:
        self.name, self.folder = path.stem, path.parent
        self._path, self._values = path, values
        ids = _UniqueIds(path, columns)
        for number in range(len(values)):
            ids.add(self._at(number), row=number)

    def __len__(self) -> int:
        return len(self._values)

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        for idx in rows:
            yield SourceRow(idx, str(self._path), idx, self._at(idx))

    def _at(self, number: int) -> dict[str, Any] | BadRow:
        return _as_object(self._values[number])


class ImageFolder:
    """Every image below a folder, with a question drawn by the image's name."""

    def __init__(self, folder: Path, config: PrepareConfig) -> None:
        self.name, self.folder = folder.name, folder
        self._questions = _read_questions(config.questions)
        files = [path for path in folder.rglob("*") if path.is_file()]
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        self._names = sorted(path.relative_to(folder).as_posix() for path in images)
        if len(files) > len(images):
            log.info("%s: %d files are no images", folder, len(files) - len(images))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        for idx in rows:
            name = self._names[idx]
            key = name.encode("utf-8", "surrogateescape")
            question = random.Random(key).choice(self._questions)
            values = {"question": question, "image_path": name}
            yield SourceRow(idx, str(self.folder).encode("utf-8", "replace").decode(), idx, values)


class ParquetSource:
    """Parquet files with the columns of RLAIF-V-Dataset, or some of them."""

    def __init__(self, folder: Path, paths: Sequence[Path], columns: Columns) -> None:
        self.name, self.folder = paths[0].stem if len(paths) == 1 else folder.name, folder
        self._paths, self._columns = list(paths), columns
        self._groups: list[tuple[int, int, int, int]] = []  # start, rows, file, group
        self._starts: list[int] = []
        total = 0
        ids, unique = _UniqueIds(folder, columns), columns.unique
        for number, path in enumerate(paths):
            self._starts.append(total)
            with _open_parquet(path) as file:
                _check_columns(path, file.schema_arrow, columns)
                if unique in file.schema_arrow.names:
                    column = file.read(columns=[unique]).column(0).to_pylist()
                    for row, value in enumerate(column, total):
                        ids.add({unique: value}, row=row)
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    self._groups.append((total, rows, number, group))
                    total += rows
        self._total = total

    def __len__(self) -> int:
        return self._total

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        left = list(reversed(rows))
        for start, count, number, group in self._groups:
            mine = []
            while left and left[-1] < start + count:
                mine.append(left.pop())
            if not mine:
                continue
            path = self._paths[number]
            for idx, values in zip(mine, self._rows(path, group, mine, start), strict=True):
                yield SourceRow(idx, str(path), idx - self._starts[number], values)

    def _rows(
        self, path: Path, group: int, rows: Sequence[int], start: int
    ) -> Iterator[dict[str, Any]]:
        with _open_parquet(path) as file:
            names = [name for name in file.schema_arrow.names if name in self._columns.types]
            try:
                table = file.read_row_group(group, columns=names)
            except (pa.ArrowException, OSError) as error:
                raise ArtifactError(f"{path}: row group {group}: {error}") from error
        for row in rows:
            (values,) = table.slice(row - start, 1).to_pylist()
            yield values


class HubSource:
    """A data set of the hub, through `datasets`, which downloads and caches it."""

    def __init__(self, name: str, columns: Columns) -> None:
        try:  # only here: nothing else needs the network
            from datasets import Image, load_dataset
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{name}: no such file or folder; for data sets of the hub install `datasets`"
            ) from error
        self.name, self.folder = name, Path()
        try:
            data = load_dataset(name, split="train")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"prepare.source: {name}: no such file or folder, and as a data set of the hub it "
                f"cannot be loaded: {error}"
            ) from error
        if isinstance(data.features.get("image"), Image):
            data = data.cast_column("image", Image(decode=False))
        _check_columns(Path(name), data.features.arrow_schema, columns)
        known = [key for key in data.column_names if key in columns.types]
        self._data = data.select_columns(known)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, rows: Sequence[int]) -> Iterator[SourceRow]:
        for idx in rows:
            yield SourceRow(idx, self.name, idx, self._data[idx])


ROW_COLUMNS = {
    "image": "struct<bytes, path>, binary or string",
    "question": "string",
    "raw_question": "string",
    "prompt": "string",
    "image_path": "string",
    "image_id": "string or integer",
    "ds_question_id": "string or integer",
    "origin_dataset": "string",
    "origin_split": "string",
}
_TEXT_AND_IMAGE = (("question", "raw_question", "prompt"), ("image", "image_path"))
INSTRUCTION_COLUMNS = Columns(
    {**ROW_COLUMNS, "question_id": "string or integer"}, _TEXT_AND_IMAGE, unique="question_id"
)
PAIR_COLUMNS = Columns(
    {
        **ROW_COLUMNS,
        "chosen": "string",
        "rejected": "string",
        "ds_name": "string",
        "idx": "string or integer",
        "pair_id": "string",
        "instruction_id": "string",
        "chosen_id": "string",
        "rejected_id": "string",
        "chosen_score": "integer",
        "rejected_score": "integer",
    },
    (*_TEXT_AND_IMAGE, ("chosen",), ("rejected",)),
    unique="pair_id",
)
"""Those of the published RLAIF-V-Dataset, and what our own pairs have besides."""


def _check_columns(path: Path, schema: pa.Schema, columns: Columns) -> None:
    """Raises ArtifactError naming the column: a wrong type is wrong in every row."""
    for field in schema:
        expected = columns.types.get(field.name)
        if expected is None or pa.types.is_null(field.type) or _fits(field.type, expected):
            continue
        raise ArtifactError(
            f"{path}: column {field.name!r} has type {field.type}, expected {expected}"
        )
    names = set(schema.names)
    for needed in columns.needed:
        if not names & set(needed):
            raise ArtifactError(f"{path}: no column {' or '.join(needed)}; it has {sorted(names)}")


def _fits(kind: pa.DataType, expected: str) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    if pa.types.is_integer(kind):
        return "integer" in expected
    if pa.types.is_struct(kind):
        names = {kind.field(number).name: kind.field(number).type for number in range(len(kind))}
        inner = names.get("bytes")
        binary = inner is not None and (
            pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
        )
        return "struct" in expected and binary
    return "binary" in expected and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: not a readable Parquet file: {error}") from error


def _open_json(path: Path, columns: Columns) -> Source:
    """JSON lines, or a list if the first character says so."""
    with path.open("rb") as stream:
        start = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start != b"[":
        return JsonLines(path, columns)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not a valid JSON list: {error}") from error
    return JsonList(path, values, columns)


def _parse_line(line: bytes) -> dict[str, Any] | BadRow:
    try:
        return _as_object(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return BadRow("(line)", f"not UTF-8: byte {error.start}: {error.reason}", line)
    except (ValueError, RecursionError) as error:
        return BadRow("(line)", f"not valid JSON: {error}", line.decode("utf-8", "replace"))


def _as_object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("(line)", f"a JSON object was expected, got {type(value).__name__}", value)


def _read_questions(name: str | None) -> Sequence[str]:
    if name is None:
        return DESCRIPTION_REQUESTS
    try:
        text = local_path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prepare.questions: {name}: cannot be read: {error}") from error
    questions = [line.strip() for line in text.split("\n") if line.strip()]
    if not questions:
        raise ConfigError(f"prepare.questions: {name}: no question in it")
    return questions


class _UniqueIds:
    """Refuses an id that was there before."""

    def __init__(self, file: Path, columns: Columns) -> None:
        self._file, self._field = file, columns.unique
        self._row_of: dict[Any, int] = {}

    def add(self, values: dict[str, Any] | BadRow, *, row: int) -> None:
        value = None if isinstance(values, BadRow) else values.get(self._field)
        if not isinstance(value, str | int):
            return
        first = self._row_of.setdefault(value, row)
        if first != row:
            raise ArtifactError(
                f"{self._file}: row {row}, field {self._field}: {value!r} is also the id of row {first}; "
                "ids must be unique"
            )
