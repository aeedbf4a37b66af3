"""A user's own data as instructions or pairs: JSON lines, Parquet, a folder of images, or a hub id.

Rows are read by number, so that an iteration's slice costs no more memory than a few rows. A bad
row becomes a `Quarantined`; only what makes the whole source unusable raises.
"""

import base64
import binascii
import functools
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rlaifv.config import PrepareConfig
from rlaifv.errors import ConfigError
from rlaifv.images import BadImageError, decode
from rlaifv.records import Image, Instruction, PreferencePair, Quarantined
from rlaifv.source_files import PAIR_COLUMNS, BadRow, Source, SourceRow, open_source

__all__ = [
    "PAIR_COLUMNS",
    "Source",
    "Taken",
    "iteration_rows",
    "open_source",
    "read_instructions",
    "read_pairs",
]

log = logging.getLogger(__name__)

QUESTION_FIELDS = ("question", "raw_question", "prompt")
IMAGE_ID_FIELDS = ("image_id", "ds_question_id")
BASE64_FROM = 100
"""Characters above which the release takes `image` for base64 and not for a path."""
EXCERPT = 200
DECODED_AT_ONCE = 64


class Taken(NamedTuple):
    """An iteration's share of a source."""

    rows: list[int]
    """Row numbers, ascending."""
    reused: int
    """How many of them earlier iterations have had."""


def held_out_rows(num_rows: int, wanted: int, *, seed: int) -> list[int]:
    """The end of the permutation, which no iteration takes; at most a fifth of the rows."""
    count = min(wanted, num_rows // 5)
    return sorted(_order(num_rows, seed)[num_rows - count :])


def _order(num_rows: int, seed: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(f"{seed}/instructions").shuffle(order)
    return order


def iteration_rows(
    num_rows: int, config: PrepareConfig, *, seed: int, iteration: int, held_out: int = 0
) -> Taken:
    """The next slice of a seeded permutation of the source's rows but the last `held_out`.

    Slices of different iterations are disjoint until the source is exhausted. Then `stop` takes
    what is left and raises ConfigError when nothing is, and `reuse` starts over. The fewer
    iterations came before, the less depends on `instructions_per_iteration`: it may not change.
    """
    num_rows -= held_out
    order = _order(num_rows + held_out, seed)[:num_rows]
    wanted = min(config.instructions_per_iteration, num_rows)
    start = iteration * config.instructions_per_iteration
    if config.when_exhausted == "stop":
        aside = f" besides {held_out} that are held out" if held_out else ""
        if start >= num_rows:
            raise ConfigError(
                f"prepare.source: {config.source} has {num_rows} rows{aside}, and iterations 0 to "
                f"{iteration - 1} take {config.instructions_per_iteration} each: none is left for "
                f"iteration {iteration}; give more data, fewer iterations, or set "
                "prepare.when_exhausted=reuse"
            )
        return Taken(sorted(order[start : start + wanted]), 0)
    taken = [order[position % num_rows] for position in range(start, start + wanted)]
    reused = max(0, min(wanted, start + wanted - num_rows))
    if reused:
        log.warning("%s is exhausted: %d rows are used again", config.source, reused)
    return Taken(sorted(taken), reused)


def read_instructions(
    source: Source, rows: Sequence[int], config: PrepareConfig
) -> Iterator[Instruction | Quarantined]:
    """One result per row, in order: an instruction with a picture that decodes, or why not."""
    for row in source.read(rows):
        try:
            yield _instruction(source, row, config)
        except BadRow as bad:
            yield _set_aside(row, bad)


def read_pairs(source: Source, config: PrepareConfig) -> Iterator[PreferencePair | Quarantined]:
    """One result per row, in order: a pair that can be trained on, or why not.

    Set aside are images that do not decode, empty answers, and answers that are equal. A row
    without `pair_id` gets its number in the source. Pictures are decoded by threads.
    """
    make = functools.partial(_pair_or_not, source, config)
    rows = iter(source.read(range(len(source))))
    with ThreadPoolExecutor() as pool:
        while group := list(itertools.islice(rows, DECODED_AT_ONCE)):
            yield from pool.map(make, group)


def _set_aside(row: SourceRow, bad: BadRow) -> Quarantined:
    return Quarantined(
        artifact="source",
        file=row.file,
        row=row.row,
        field=bad.field,
        problem=bad.problem,
        excerpt=excerpt(bad.value),
    )


def excerpt(value: Any) -> str:
    """The start of a value of any type, storable: bytes and odd characters are escaped."""
    text = value if isinstance(value, str) else repr(value)
    return text[:EXCERPT].replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def _instruction(source: Source, row: SourceRow, config: PrepareConfig) -> Instruction:
    values = _values(row)
    question = _question(values)
    image = _picture(source, values, config)
    return Instruction(
        instruction_id=f"{row.idx:09d}",
        image_id=_image_id(values, image),
        question=question,
        image=image,
        origin_dataset=_text(values, "origin_dataset") or source.name,
        origin_split=_json_text(values.get("origin_split")),
        idx=row.idx,
    )


def _pair_or_not(
    source: Source, config: PrepareConfig, row: SourceRow
) -> PreferencePair | Quarantined:
    try:
        return _pair(source, row, config)
    except BadRow as bad:
        return _set_aside(row, bad)


def _pair(source: Source, row: SourceRow, config: PrepareConfig) -> PreferencePair:
    values = _values(row)
    question = _question(values)
    chosen, rejected = (_text(values, field) for field in ("chosen", "rejected"))
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(field, "the answer is empty or missing", values.get(field))
    if chosen == rejected:
        raise BadRow("rejected", "equal to the chosen answer", rejected)
    image = _picture(source, values, config)
    number = f"{row.idx:09d}"
    return PreferencePair(
        ds_name=_text(values, "ds_name") or source.name,
        image=image,
        question=question,
        chosen=chosen,
        rejected=rejected,
        origin_dataset=_text(values, "origin_dataset") or source.name,
        origin_split=_json_text(values.get("origin_split")),
        idx=_integer(values, "idx", default=row.idx),
        image_path=_text(values, "image_path") or image.path or "",
        pair_id=_text(values, "pair_id") or number,
        instruction_id=_text(values, "instruction_id") or number,
        image_id=_image_id(values, image),
        chosen_id=_text(values, "chosen_id"),
        rejected_id=_text(values, "rejected_id"),
        chosen_score=_integer(values, "chosen_score", default=0),
        rejected_score=_integer(values, "rejected_score", default=0),
    )


def _values(row: SourceRow) -> dict[str, Any]:
    if isinstance(row.values, BadRow):
        raise row.values
    return row.values


def _picture(source: Source, values: Mapping[str, Any], config: PrepareConfig) -> Image:
    """The image of a row, which decodes."""
    image = _image(values, folder=source.folder)
    try:
        decode(image.bytes, max_pixels=config.max_image_pixels)
    except BadImageError as error:
        field = "image" if values.get("image") else "image_path"
        raise BadRow(field, str(error), image.path or "") from error
    return image


def _integer(values: Mapping[str, Any], field: str, *, default: int) -> int:
    value = values.get(field)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _question(values: Mapping[str, Any]) -> str:
    for field in QUESTION_FIELDS:
        if values.get(field) is not None:
            text = _text(values, field)
            if not text.strip():
                raise BadRow(field, "the question is empty", values[field])
            return text
    raise BadRow("question", f"missing; one of {', '.join(QUESTION_FIELDS)} is needed", values)


def _text(values: Mapping[str, Any], field: str) -> str:
    """A string that can be stored; empty when there is none."""
    value = values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(field, f"a string was expected, got {type(value).__name__}", value)
    if "\0" in value:
        raise BadRow(field, "contains a NUL character", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(field, "not valid Unicode (a lone surrogate)", value) from error
    return value


def _json_text(value: Any) -> str:
    """`origin_split` is a JSON string in the published data; other values become one."""
    if isinstance(value, str):
        return _text({"origin_split": value}, "origin_split")
    return json.dumps({} if value is None else value)


def _image(values: Mapping[str, Any], *, folder: Path) -> Image:
    """The encoded image of a row: bytes, base64 or a file, whichever the row has."""
    value = values.get("image")
    if isinstance(value, Mapping):  # Hugging Face's struct
        path = _text(value, "path") or None
        data = value.get("bytes")
        if isinstance(data, bytes):
            return Image(bytes=data, path=path or _text(values, "image_path") or None)
        value = path
    if isinstance(value, bytes):
        return Image(bytes=value, path=_text(values, "image_path") or None)
    if value is not None:
        text = _text({"image": value}, "image")
        if len(text) > BASE64_FROM and not _exists(folder, text):
            return Image(bytes=_from_base64(text), path=_text(values, "image_path") or None)
        if text:
            return _read("image", text, folder=folder)
    if name := _text(values, "image_path"):
        return _read("image_path", name, folder=folder)
    inner = values.get("metainfos")
    if isinstance(inner, Mapping) and (name := _text(inner, "image_path")):
        return _read("metainfos.image_path", name, folder=folder)
    raise BadRow("image", "missing; image, image_path or metainfos.image_path is needed", values)


def _exists(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:  # too long for a name
        return False


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        problem = f"longer than {BASE64_FROM} characters, but neither a file nor base64: {error}"
        raise BadRow("image", problem, text) from error


def _read(field: str, name: str, *, folder: Path) -> Image:
    path = folder / name
    try:
        if not path.is_file():
            raise BadRow(field, f"no such file: {path}", name)
        return Image(bytes=path.read_bytes(), path=name)
    except OSError as error:
        raise BadRow(field, f"cannot be read: {error.strerror}: {path}", name) from error


def _image_id(values: Mapping[str, Any], image: Image) -> str:
    for field in IMAGE_ID_FIELDS:
        value = values.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if text := _text(values, field):
            return text
    return image.path or _text(values, "image_path") or hashlib.sha256(image.bytes).hexdigest()
