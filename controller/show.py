"""`python -m controller show`: what is stored, as text or JSON."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from controller.pair import pair_text, read_pair
from controller.plan import WRITERS
from controller.summary import caveat, read_choices, summarise, table
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import ARTIFACTS, CHOICE, CONFIG, Shard, choice_key, num_shards, part_key
from rlaifv.records import Choice
from rlaifv.store import Store

TABLE, PAIR = "table", "pair"
SHOWN = (CONFIG.removesuffix(".json"), TABLE, CHOICE, PAIR, *ARTIFACTS)


class Wanted(NamedTuple):
    """What to show, and how much of it."""

    what: str
    iteration: int | None
    """None: 0; of a pair: wherever it is."""
    limit: int
    json: bool
    where: tuple[tuple[str, str], ...] = ()
    """Rows whose fields have these values."""
    identity: str = ""
    """Of a pair."""


class Target(NamedTuple):
    """What the words after `show` mean."""

    identity: str
    run: str | None


def read_words(what: str, words: Sequence[str]) -> Target:
    """`pair ID [RUN]`, or `WHAT [RUN]`; raises ConfigError for anything else."""
    if what not in SHOWN:
        raise ConfigError(f"show {what}: expected one of {', '.join(SHOWN)}")
    ids = 1 if what == PAIR else 0
    if len(words) < ids:
        raise ConfigError("show pair: expected the pair's id; `show pairs` lists them")
    if len(words) > ids + 1:
        raise ConfigError(f"show {what}: too many words: {' '.join(words)}")
    return Target("".join(words[:ids]), words[ids] if len(words) > ids else None)


def read_where(what: str, conditions: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`key=value` of each condition; raises ConfigError for a field that rows do not have."""
    fields = ARTIFACTS[what].model_fields if what in ARTIFACTS else {}
    parsed = []
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise ConfigError(f"--where {condition}: expected key=value")
        if key.partition(".")[0] not in fields:
            raise ConfigError(
                f"--where {condition}: {what} has no field {key!r}; "
                f"expected one of {', '.join(fields) or '(none: it has no rows)'}"
            )
        parsed.append((key, value))
    return tuple(parsed)


def show(run: Store, wanted: Wanted) -> Iterator[str]:
    """Lines to print. Raises ArtifactError for what is not there yet."""
    config = run.read_json(CONFIG, RunConfig)
    if wanted.what == TABLE:
        entries = summarise(config, read_choices(run, config))
        dumped = json.dumps([entry.model_dump() for entry in entries], indent=1)
        yield dumped if wanted.json else table(entries, caveat(config))
    elif wanted.what == PAIR:
        iterations = range(config.iterations) if wanted.iteration is None else [wanted.iteration]
        pair = read_pair(run, config, wanted.identity, iterations)
        dumped = json.dumps(pair.model_dump(), indent=1)  # ASCII, as below
        yield dumped if wanted.json else pair_text(pair)
    elif wanted.what in ARTIFACTS:
        for row in itertools.islice(_rows(run, config, wanted), wanted.limit):
            yield json.dumps(row)  # ASCII: model output must not control a terminal
    elif wanted.what == CHOICE:
        choice = run.read_json(choice_key(wanted.iteration or 0), Choice)
        yield choice.model_dump_json(indent=1)
    else:
        yield config.model_dump_json(indent=1)


def _rows(run: Store, config: RunConfig, wanted: Wanted) -> Iterator[dict[str, Any]]:
    count = num_shards(config, WRITERS[wanted.what].name)
    iteration = wanted.iteration or 0
    keys = [part_key(iteration, wanted.what, Shard(i, count)) for i in range(count)]
    there = [key for key in keys if run.exists(key)]
    if not there:
        raise ArtifactError(f"{run}/{keys[0]}: not there (yet); see `python -m controller status`")
    for key in there:
        for row in run.read_part(key, ARTIFACTS[wanted.what]):
            plain = {name: _plain(value) for name, value in row.model_dump().items()}
            if all(_field(plain, name) == value for name, value in wanted.where):
                yield plain


def _field(row: dict[str, Any], name: str) -> str | None:
    """A field's text; `image.path` is a field of a field."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    """Images are named, not printed."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return {"bytes": len(value["bytes"]), "path": value["path"]}
    return value
