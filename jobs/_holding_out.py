"""What `prepare` sets aside, so that checkpoints are compared on what they were not trained on."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs._entry import Job
from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.files import read_rows
from rlaifv.benchmarks.held_out import held_out_questions, read_excluded
from rlaifv.benchmarks.object_halbench import parse_image_id
from rlaifv.config import HeldOutConfig, RunConfig
from rlaifv.pipeline import holds_out
from rlaifv.places import local_path
from rlaifv.records import Image, Instruction, Quarantined
from rlaifv.sources import Source, held_out_rows, read_instructions

LEFT_OUT = "left out, for they show a held-out picture"
"""Note of an instructions part."""
_COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.(?:jpe?g|png)$", re.IGNORECASE)


class HeldOut(NamedTuple):
    """Questions of which no instruction may show the picture."""

    rows: list[Instruction]
    source_rows: int = 0
    """How many of the source's rows they are."""
    pictures: frozenset[str] = frozenset()
    """SHA-256 of their encoded images, and their ids."""

    def shows(self, row: Instruction) -> bool:
        """Whether an instruction shows one of the pictures, by its bytes or its name."""
        return bool(self.pictures) and not self.pictures.isdisjoint(_names(row))


def hold_out(job: Job, source: Source) -> HeldOut:
    """The same in every shard and iteration; empty where something else selects, or nothing.

    The first shard stores it. Raises ArtifactError when there are not enough COCO images.
    """
    wanted = holds_out(job.config)
    if wanted is None:
        return HeldOut([])
    if wanted.coco is not None:
        rows, taken = list(_coco_rows(job.config, wanted)), 0
    else:
        seed = job.config.seed
        numbers = held_out_rows(len(source), wanted.num_instructions, seed=seed)
        made = read_instructions(source, numbers, job.config.prepare)
        rows, taken = [row for row in made if isinstance(row, Instruction)], len(numbers)
    job.notes |= {"held out": str(len(rows)), LEFT_OUT: "0"}
    job.held_out = rows if job.shard.index == 0 else []
    return HeldOut(rows, taken, frozenset(name for row in rows for name in _names(row)))


def usable(job: Job, source: Source, rows: Sequence[int], aside: HeldOut) -> Iterator[Instruction]:
    """Instructions that are neither quarantined nor show a held-out picture; both are counted."""
    for row in read_instructions(source, rows, job.config.prepare):
        if isinstance(row, Quarantined):
            job.quarantine(row)
        elif aside.shows(row):
            job.notes[LEFT_OUT] = str(int(job.notes[LEFT_OUT]) + 1)
        else:
            yield row


def _names(row: Instruction) -> Iterator[str]:
    yield hashlib.sha256(row.image.bytes).hexdigest()
    yield row.image_id
    for name in (row.image.path or "", row.image_id):
        if match := _COCO_NAME.search(name):
            yield f"COCO {int(match[1])}"


def _coco_rows(config: RunConfig, wanted: HeldOutConfig) -> Iterator[Instruction]:
    coco, images = local_path(wanted.coco or ""), local_path(wanted.images or "")
    found = held_out_questions(
        coco,
        images,
        excluded=_benchmark_ids(config, wanted),
        seen=_benchmark_pictures(config),
        count=wanted.num_images,
        seed=config.seed,
    )
    for one in found:
        yield Instruction(
            instruction_id=str(one.image_id),
            image_id=f"{one.image_id:012d}.jpg",
            question=one.question,
            image=Image(bytes=(images / one.image).read_bytes(), path=one.image),
            origin_dataset="COCO 2014",
            origin_split="{}",
            idx=one.image_id,
        )


def _benchmark_ids(config: RunConfig, wanted: HeldOutConfig) -> set[int]:
    named = [read_excluded(Path(local_path(name))) for name in wanted.exclude]
    for spec in config.respond.benchmarks:
        if spec.kind == "object_halbench":
            rows = read_rows(local_path(spec.path))
            named.append({parse_image_id(row, "image_id", "image_url") for row in rows})
    return {image_id for ids in named for image_id in ids}


def _benchmark_pictures(config: RunConfig) -> set[str]:
    """Digests of the pictures of the other benchmarks, which may be of COCO under other names.

    AMBER's are not read: they are 15,220 times 1,004 pictures, of COCO's test split and elsewhere.
    """
    return {
        hashlib.sha256(question.image).hexdigest()
        for spec in config.respond.benchmarks
        if spec.kind in ("objects", "mmhal", "refomb")
        for question in load_benchmark(spec).questions()
    }
