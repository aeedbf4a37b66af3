"""Reading benchmark files: rows of JSON, JSONL or Parquet, and the images they name."""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlaifv.errors import ArtifactError

Row = dict[str, Any]


class NumberedRow(NamedTuple):
    """A row and the words that name it in an error message."""

    where: str
    number: int
    """From 0."""
    row: Row


def read_rows(path: Path, *, plain: bool = False) -> Iterator[NumberedRow]:
    """Rows of a `.parquet`, a JSON list or a JSONL file, in order.

    JSONL is split at line feeds only: U+2028, U+2029 and U+0085 are legal inside JSON strings and
    occur in model output. `plain`: a row may be a mere string, read as `{"text": ...}`. Raises
    ArtifactError for a missing file, a bad line or a row that is not an object.
    """
    values = _parquet(path) if path.suffix == ".parquet" else _json(path)
    for number, value in enumerate(values):
        where = f"{path}: row {number}"
        if plain and isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: expected an object, got {type(value).__name__}")
        yield NumberedRow(where, number, value)


def read_json(path: Path) -> Any:
    """A whole JSON file; raises ArtifactError when it is missing or not JSON."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """A UTF-8 file; raises ArtifactError when it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8: {error}") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


def _json(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, the values of CHAIR's `imgToEval`, or one value per line."""
    text = read_text(path)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        yield from whole
        return
    if isinstance(whole, dict) and isinstance(whole.get("imgToEval"), dict):
        yield from whole["imgToEval"].values()
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"{path}: line {number}: not valid JSON: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path}: not a readable Parquet file: {error}") from error


def text_field(row: NumberedRow, *names: str) -> str:
    """The first of the fields that the row has; raises ArtifactError unless it is a string."""
    for name in names:
        if name in row.row:
            value = row.row[name]
            if isinstance(value, str):
                return value
            raise ArtifactError(
                f"{row.where}, field {name}: expected a string, got {type(value).__name__}"
            )
    raise ArtifactError(f"{row.where}: no field {' or '.join(names)}; it has {sorted(row.row)}")


def image_bytes(row: NumberedRow, *names: str, folder: Path) -> bytes:
    """The encoded image in the first of the fields that the row has.

    A struct `{bytes, path}`, bytes, a base64 string, or a file name below `folder`. Raises
    ArtifactError naming the row when there is none or the file is missing.
    """
    name = next((name for name in names if row.row.get(name)), None)
    if name is None:
        raise ArtifactError(f"{row.where}: no image; expected field {' or '.join(names)}")
    value = row.row[name]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ArtifactError(f"{row.where}, field {name}: no image bytes and no path")
    file = folder / value if len(value) < 1000 else None
    if file is not None and file.is_file():
        return file.read_bytes()
    if len(value) > 200 or name == "image_base64":
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ArtifactError(f"{row.where}, field {name}: not base64: {error}") from error
    raise ArtifactError(f"{row.where}, field {name}: no such file: {folder / value}")


def digest(data: str | bytes) -> str:
    """The first 12 hex digits of the SHA-256: enough to recognise a file in a report."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:12]
