"""Objects of COCO 2014 images: instance categories and objects named in reference captions.

The four official files are streamed: memory holds a buffer and the wanted images, not the
hundreds of megabytes of polygons that `pycocotools.COCO` keeps.
"""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rlaifv.chair import Tokenise, Vocabulary, mentions
from rlaifv.errors import ArtifactError

_CHUNK = 1 << 20
"""Characters read at a time."""
_KINDS = ("instances", "captions")
SOURCE = "https://cocodataset.org (2014 Train/Val annotations), CC BY 4.0"


class CocoFiles(NamedTuple):
    """The files of one edition."""

    instances: tuple[Path, Path]
    captions: tuple[Path, Path]


class Entry(NamedTuple):
    """An element of one of a file's top-level lists."""

    key: str
    value: dict[str, Any]


def find_files(folder: Path) -> CocoFiles:
    """`{instances,captions}_{train,val}2014.json` in `folder` or its `annotations`.

    The 2017 edition has the same images and annotations under another split; it is taken when
    complete and 2014 is not. Raises ArtifactError naming the files that are missing.
    """
    places = [folder, folder / "annotations"]
    for year in ("2014", "2017"):
        for place in places:
            found = [
                tuple(place / f"{kind}_{split}{year}.json" for split in ("train", "val"))
                for kind in _KINDS
            ]
            if all(path.is_file() for pair in found for path in pair):
                instances, captions = ((pair[0], pair[1]) for pair in found)
                return CocoFiles(instances, captions)
    names = [f"{kind}_{split}2014.json" for kind in _KINDS for split in ("train", "val")]
    absent = [name for name in names if not any((place / name).is_file() for place in places)]
    raise ArtifactError(f"{folder}: missing {', '.join(absent)}; get them from {SOURCE}")


def image_objects(
    files: CocoFiles,
    wanted: Collection[int],
    *,
    vocabulary: Vocabulary,
    tokenise: Tokenise,
) -> dict[int, frozenset[str]]:
    """Classes of each wanted image: its instances (crowds too) and its captions, both splits.

    Each caption is read by itself. Raises ArtifactError for an image that no file knows, and for
    a category that is not in the vocabulary.
    """
    wanted = frozenset(wanted)
    known: set[int] = set()
    objects: dict[int, set[str]] = {image_id: set() for image_id in wanted}
    for path in files.instances:
        for image_id, names in _instances(path, wanted, known).items():
            try:
                objects[image_id] |= {vocabulary.class_of[name] for name in names}
            except KeyError as error:
                raise ArtifactError(
                    f"{path}: category {error} is not in the synonym table"
                ) from error
    for path in files.captions:
        for entry in stream(path, ("images", "annotations")):
            captioned = _image_id(path, entry, wanted, known)
            if captioned is None or entry.key == "images":
                continue
            found = mentions(tokenise(str(entry.value["caption"])), vocabulary).found
            objects[captioned].update(mention.object_class for mention in found)
    strangers = sorted(wanted - known)
    if strangers:
        raise ArtifactError(
            f"{files.captions[0].parent}: {len(strangers)} images are in no annotation file, the "
            f"first is {strangers[0]}"
        )
    return {image_id: frozenset(classes) for image_id, classes in objects.items()}


def _instances(path: Path, wanted: frozenset[int], known: set[int]) -> dict[int, set[str]]:
    """Category names per wanted image of one instances file; categories may come last in it."""
    names: dict[int, str] = {}
    found: dict[int, set[int]] = {}
    for entry in stream(path, ("images", "annotations", "categories")):
        if entry.key == "categories":
            names[entry.value["id"]] = entry.value["name"]
            continue
        image_id = _image_id(path, entry, wanted, known)
        if image_id is not None and entry.key == "annotations":
            found.setdefault(image_id, set()).add(entry.value["category_id"])
    try:
        return {image: {names[number] for number in numbers} for image, numbers in found.items()}
    except KeyError as error:
        raise ArtifactError(f"{path}: category_id {error} is not among its categories") from error


def _image_id(path: Path, entry: Entry, wanted: frozenset[int], known: set[int]) -> int | None:
    """The entry's image when it is wanted; it is then known to exist."""
    image_id = entry.value.get("id" if entry.key == "images" else "image_id")
    if not isinstance(image_id, int):
        raise ArtifactError(f"{path}: {entry.key}: an entry without an image id: {entry.value}")
    if image_id not in wanted:
        return None
    known.add(image_id)
    return image_id


def stream(path: Path, keys: Collection[str]) -> Iterator[Entry]:
    """The entries of the named top-level lists of a JSON object, in the file's order.

    Memory is bounded by the largest entry. Raises ArtifactError for a missing file, one that ends
    early, and an entry that is not an object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            reader = _Reader(file, path)
            for key in reader.members():
                for value in reader.elements():
                    if key not in keys:
                        continue
                    if not isinstance(value, dict):
                        raise ArtifactError(f"{path}: {key}: expected objects, got {value!r:.50}")
                    yield Entry(key, value)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error


class _Reader:
    """A cursor in one large JSON object whose large members are lists."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._buffer, self._position = "", 0
        self._decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode

    def members(self) -> Iterator[str]:
        """The keys; the caller consumes each value with `elements` before the next."""
        self._expect("{")
        if self._peek() == "}":
            return
        while True:
            key = self._value()
            self._expect(":")
            yield str(key)
            if self._either(",", "}") == "}":
                return

    def elements(self) -> Iterator[Any]:
        """The elements of a list; any other value as the only element."""
        if self._peek() != "[":
            self._value()
            return
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        while True:
            yield self._value()
            if self._either(",", "]") == "]":
                return

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except ValueError as error:
                if not self._more():
                    raise ArtifactError(f"{self._path}: not valid JSON: {error}") from error
                continue
            if end < len(self._buffer) or not self._more():  # a number may go on
                self._position = end
                return value

    def _peek(self) -> str:
        """The next character that is not white space."""
        while True:
            buffer, position = self._buffer, self._position
            while position < len(buffer) and buffer[position] in " \t\r\n":
                position += 1
            self._position = position
            if position < len(buffer):
                return buffer[position]
            if not self._more():
                raise ArtifactError(f"{self._path}: ends early: not a complete JSON object")

    def _either(self, first: str, second: str) -> str:
        found = self._peek()
        if found not in (first, second):
            raise ArtifactError(f"{self._path}: expected {first!r} or {second!r}, got {found!r}")
        self._position += 1
        return found

    def _expect(self, character: str) -> None:
        self._either(character, character)

    def _more(self) -> bool:
        chunk = self._file.read(_CHUNK)
        self._buffer = self._buffer[self._position :] + chunk
        self._position = 0
        return bool(chunk)
