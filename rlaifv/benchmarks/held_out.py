"""Questions for choosing checkpoints: COCO images that nothing else of yours uses.

python -m rlaifv.benchmarks.held_out --coco DIR --images DIR --exclude FILE ... --out FILE.jsonl

The result is the `path` of a benchmark of kind `object_halbench`, mode `chair`, use `select`, with
`images` the same folder (docs/benchmarks.md). CHAIR needs no judge, so that choosing costs nothing.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmarks.held_out")

import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from rlaifv.benchmarks.coco import find_files, stream
from rlaifv.benchmarks.files import NumberedRow, read_rows, read_text
from rlaifv.benchmarks.object_halbench import parse_image_id
from rlaifv.cli import ending
from rlaifv.errors import ArtifactError
from rlaifv.prompts import DESCRIPTION_REQUESTS

COUNT = 500
_FIELDS = ("image_id", "image_url", "image_path", "image")


class HeldOut(NamedTuple):
    """One question about one image."""

    image_id: int
    image: str
    """File name in the folder of images."""
    question: str


def held_out_questions(
    coco: Path,
    images: Path,
    *,
    excluded: Collection[int],
    seen: Collection[str] = (),
    count: int = COUNT,
    seed: int = 0,
) -> list[HeldOut]:
    """`count` annotated images of the folder `images`, and a request to describe each.

    `seen`: SHA-256 of pictures that must not be taken whatever they are called. An image's rank
    depends on the seed and its own id only: excluding one more image replaces that image and no
    other. Raises ArtifactError when fewer images are left.
    """
    found = (
        re.search(r"(\d+)\.(?:jpe?g|png)$", path.name, re.IGNORECASE) for path in _files(images)
    )
    names = {int(match[1]): match.string for match in found if match}
    annotated = {
        entry.value["id"]
        for path in find_files(coco).captions
        for entry in stream(path, ("images",))
    }
    left = (annotated & names.keys()) - frozenset(excluded)
    if len(left) < count:
        raise ArtifactError(
            f"{images}: expected at least {count} images that are in the annotations and not "
            f"excluded, found {len(left)} ({len(names)} images, {len(annotated)} annotated)"
        )
    ranked = sorted(left, key=lambda image_id: (_rank(seed, image_id), image_id))
    unseen = (one for one in ranked if not seen or _digest(images / names[one]) not in seen)
    taken = list(itertools.islice(unseen, count))
    if len(taken) < count:
        raise ArtifactError(f"{images}: benchmarks have all but {len(taken)} of the images left")
    return [
        HeldOut(image_id, names[image_id], _question(seed, image_id)) for image_id in sorted(taken)
    ]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    return sorted(folder.iterdir())


def _rank(seed: int, image_id: int) -> bytes:
    return hashlib.sha256(f"{seed}/{image_id}".encode()).digest()


def _question(seed: int, image_id: int) -> str:
    return random.Random(f"{seed}/{image_id}").choice(DESCRIPTION_REQUESTS)


def read_excluded(path: Path) -> set[int]:
    """Image ids from a text file (an id or COCO file name per line) or from rows that name one.

    Rows: JSONL, JSON or Parquet with `image_id`, `image_url`, `image_path` or `image`. Raises
    ArtifactError for a line or row without an image id.
    """
    if path.suffix in (".json", ".jsonl", ".parquet"):
        return {parse_image_id(row, *_FIELDS) for row in read_rows(path)}
    lines = enumerate(read_text(path).split("\n"), 1)
    return {
        parse_image_id(NumberedRow(f"{path}: line {n}", n, {"image_id": line.strip()}), "image_id")
        for n, line in lines
        if line.strip()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the question file; the exit code is the error's."""
    given = flags.held_out().parse_args(argv)

    def work() -> int:
        excluded = {image_id for path in given.exclude for image_id in read_excluded(path)}
        count = given.count or COUNT
        rows = held_out_questions(
            given.coco, given.images, excluded=excluded, count=count, seed=given.seed
        )
        given.out.write_text("".join(f"{json.dumps(row._asdict())}\n" for row in rows))
        print(f"{len(rows)} questions; {len(excluded)} images were excluded")
        return 0

    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
