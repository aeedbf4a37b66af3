"""`python -m controller show`: what is stored, as text or JSON."""

import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from controller.plan import WRITERS
from controller.summary import read_choices, summarise, table
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import ARTIFACTS, CHOICE, CONFIG, Shard, choice_key, num_shards, part_key
from rlaifv.records import Choice
from rlaifv.store import Store

TABLE = "table"
SHOWN = (CONFIG.removesuffix(".json"), TABLE, CHOICE, *ARTIFACTS)


class Wanted(NamedTuple):
    """What to show, and how much of it."""

    what: str
    iteration: int
    limit: int
    json: bool


def show(run: Store, wanted: Wanted) -> Iterator[str]:
    """Lines to print. Raises ArtifactError for what is not there yet."""
    config = run.read_json(CONFIG, RunConfig)
    if wanted.what == TABLE:
        entries = summarise(config, read_choices(run, config))
        dumped = json.dumps([entry.model_dump() for entry in entries], indent=1)
        yield dumped if wanted.json else table(entries)
    elif wanted.what in ARTIFACTS:
        for row in itertools.islice(_rows(run, config, wanted), wanted.limit):
            yield json.dumps(row)  # ASCII: model output must not control a terminal
    elif wanted.what == CHOICE:
        yield run.read_json(choice_key(wanted.iteration), Choice).model_dump_json(indent=1)
    else:
        yield config.model_dump_json(indent=1)


def _rows(run: Store, config: RunConfig, wanted: Wanted) -> Iterator[dict[str, Any]]:
    count = num_shards(config, WRITERS[wanted.what].name)
    keys = [part_key(wanted.iteration, wanted.what, Shard(i, count)) for i in range(count)]
    there = [key for key in keys if run.exists(key)]
    if not there:
        raise ArtifactError(f"{run}/{keys[0]}: not there (yet); see `python -m controller status`")
    for key in there:
        for row in run.read_part(key, ARTIFACTS[wanted.what]):
            yield {name: _plain(value) for name, value in row.model_dump().items()}


def _plain(value: Any) -> Any:
    """Images are named, not printed."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return {"bytes": len(value["bytes"]), "path": value["path"]}
    return value
