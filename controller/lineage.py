"""`python -m controller lineage`: where the parts of an artifact come from, by their own footers."""

import json

from controller.plan import WRITERS
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import ARTIFACTS, CONFIG, Shard, num_shards, part_key
from rlaifv.records import Record
from rlaifv.store import Provenance, Store


class PartLineage(Record):
    """One part."""

    key: str
    provenance: Provenance


class Lineage(Record):
    """What `lineage --json` prints."""

    run: str
    artifact: str
    iteration: int
    rows: int
    seconds: float
    """Of work, summed over the parts."""
    missing: list[str]
    """Parts that are not there yet."""
    parts: list[PartLineage]


def lineage(run: Store, artifact: str, iteration: int) -> Lineage:
    """Reads the footer of every part. Raises ConfigError for an artifact that has none."""
    if artifact not in ARTIFACTS:
        raise ConfigError(f"lineage {artifact}: expected one of {', '.join(ARTIFACTS)}")
    count = num_shards(run.read_json(CONFIG, RunConfig), WRITERS[artifact].name)
    keys = [part_key(iteration, artifact, Shard(index, count)) for index in range(count)]
    there = [key for key in keys if run.exists(key)]
    if not there:
        raise ArtifactError(f"{run}/{keys[0]}: not there (yet); see `python -m controller status`")
    parts = [PartLineage(key=key, provenance=run.provenance(key)) for key in there]
    return Lineage(
        run=str(run),
        artifact=artifact,
        iteration=iteration,
        rows=sum(part.provenance.rows for part in parts),
        seconds=round(sum(part.provenance.seconds for part in parts), 3),
        missing=[key for key in keys if key not in there],
        parts=parts,
    )


def lineage_text(found: Lineage) -> str:
    """A paragraph per part."""
    lines = [
        f"{found.run}: {found.artifact} of iteration {found.iteration}: {found.rows} rows, "
        f"{found.seconds} s of work"
    ]
    for part in found.parts:
        lines += ["", part.key, *_part_lines(part.provenance)]
    lines += [f"not there yet: {key}" for key in found.missing]
    return "\n".join(lines)


def _part_lines(origin: Provenance) -> list[str]:
    facts = {
        "written by": f"{origin.stage} {origin.shard} of run {_quoted(origin.run)}",
        "rows": f"{origin.rows}, {origin.quarantined} set aside, SHA-256 {origin.rows_sha256}",
        "time": f"{origin.seconds} s from {_quoted(origin.started_at) or 'an unknown time'}",
        "code": _quoted(origin.code_version),
        "image": _quoted(origin.image) or "none (a local process)",
        "config": f"SHA-256 {_quoted(origin.config_sha256)}, seed {origin.seed}",
        "threads": str(origin.threads),
    }
    lines = [f"  {name:<10}  {text}" for name, text in facts.items()]
    lines += [f"  input       {_quoted(k)}  {_quoted(v)}" for k, v in sorted(origin.inputs.items())]
    lines += [f"  note        {_quoted(k)}: {_quoted(v)}" for k, v in sorted(origin.notes.items())]
    return lines


def _quoted(text: str) -> str:
    """ASCII without control characters, without the quotes."""
    return json.dumps(text)[1:-1]
