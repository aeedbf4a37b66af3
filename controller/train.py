"""`python -m controller train`: DPO on pairs that exist already, as a run of two stages."""

import argparse
import datetime
import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from controller.places import run_place, shown
from controller.run import Order, run_config
from controller.tables import Column, render
from rlaifv import __version__
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import Shard, iteration_key, part_key, quarantine_key
from rlaifv.places import local_path
from rlaifv.recipes import Wishes, change_config, training
from rlaifv.records import Checkpoint, PreferencePair, Quarantined
from rlaifv.sources import PAIR_COLUMNS, open_source, read_pairs
from rlaifv.store import Provenance, Store, open_store

ONE = Shard(0, 1)
PARQUET = ".parquet"


class Wanted(NamedTuple):
    """What is to be trained, on what."""

    pairs: str
    model: str | None
    recipe: str


def read_flags(flags: argparse.Namespace, command: tuple[str, ...]) -> tuple[Order, Wanted]:
    """What the command line asks for."""
    order = Order(
        Wishes(
            config_file=flags.config,
            sets=tuple(flags.set),
            name=flags.name or default_name(flags.pairs),
            seed=flags.seed,
        ),
        root=flags.root,
        executor=flags.executor,
        workers=flags.workers,
        threads=flags.threads,
        isolated=flags.isolated,
        cluster=flags.cluster,
        processes=flags.processes,
        command=command,
    )
    return order, Wanted(flags.pairs, flags.model, flags.recipe)


def default_name(pairs: str) -> str:
    """`train-` and the last word of the source, as a run may be called."""
    last = re.split(r"[/@]", pairs.rstrip("/"))[-1].removesuffix(PARQUET).lower()
    return f"train-{re.sub(r'[^a-z0-9]+', '-', last)[:34].strip('-')}".rstrip("-")


def train(order: Order, wanted: Wanted) -> int:
    """Imports, scores, trains, and a table; returns the exit code. Typed again, it goes on.

    Raises ConfigError for an unknown recipe or source, ArtifactError for a source of another kind.
    """
    base = training(wanted.recipe, _absolute(wanted.pairs), _absolute_or_none(wanted.model))
    config = change_config(base, order.wishes)
    if code := run_config(order, config, before=import_pairs):
        return code
    place = run_place(order.root, config.name)
    rows = list(place.store.read_part(part_key(0, "checkpoints", ONE), Checkpoint))
    print(checkpoint_table(rows))
    print(f"checkpoints: {shown(place.uri, f'{iteration_key(0)}/checkpoints')}")
    print(f"curves: tensorboard --logdir {shown(place.uri, f'{iteration_key(0)}/tensorboard')}")
    return 0


def checkpoint_table(rows: list[Checkpoint]) -> str:
    """Every checkpoint for people."""
    columns = [Column("step", right=True), Column("epoch", right=True), Column("loss", right=True)]
    columns += [Column("kind"), Column("tree")]
    cells = [
        (str(row.step), f"{row.epoch:.2f}", f"{row.train_loss:.4f}", row.kind, row.tree)
        for row in rows
    ]
    return render(columns, cells)


def import_pairs(run: Store, config: RunConfig) -> None:
    """Writes the pairs part of a run from `prepare.source`; nothing when it is there.

    What cannot be trained on goes to `quarantine/pair`. Raises ArtifactError when fewer than
    `train.min_pairs` are left, and what `open_source` does.
    """
    key = part_key(0, "pairs", ONE)
    if run.exists(key):
        return
    started, bad = time.monotonic(), list[Quarantined]()
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def origin() -> Provenance:
        return Provenance(
            stage="import",
            run=config.name,
            iteration=0,
            shard=str(ONE),
            code_version=__version__,
            config_sha256=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            inputs={},
            quarantined=len(bad),
            seconds=round(time.monotonic() - started, 3),
            started_at=started_at,
            seed=config.seed,
            notes={"source": config.prepare.source},
        )

    def good() -> Iterator[PreferencePair]:
        count = 0
        for row in tqdm(read_pairs(source, config.prepare), "pairs", len(source), disable=None):
            if isinstance(row, PreferencePair):
                count += 1
                yield row
            else:
                bad.append(row)
        if count < config.train.min_pairs:
            first = f"; first of the others: {_said(bad[0])}" if bad else ""
            raise ArtifactError(
                f"{config.prepare.source}: {count} pairs can be trained on, train.min_pairs asks "
                f"for {config.train.min_pairs}{first}"
            )
        if bad:
            run.write_part(quarantine_key(0, "pair", ONE), bad, record=Quarantined, origin=origin)

    with _on_this_machine(config.prepare.source) as name:
        local = config.prepare.model_copy(update={"source": name})
        source = open_source(local, PAIR_COLUMNS)
        run.write_part(key, good(), record=PreferencePair, origin=origin)
    for row in bad:
        sys.stderr.write(f"set aside: {_said(row)}\n")


def _said(row: Quarantined) -> str:
    return f"{row.file} row {row.row}, field {row.field}: {row.problem}"


@contextmanager
def _on_this_machine(source: str) -> Iterator[str]:
    """The source's name; of a folder of a bucket, that of a local folder with its Parquet files."""
    if not source.startswith("s3://") or source.endswith((PARQUET, ".json", ".jsonl")):
        yield source
        return
    store = open_store(source)
    keys = [item.key for item in store.objects("") if item.key.endswith(PARQUET)]
    if not keys:
        raise ConfigError(f"--pairs {source}: no *{PARQUET} objects below it")
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        for number, key in enumerate(sorted(keys)):
            link = Path(folder) / f"{number:05d}-{Path(key).name}"
            link.symlink_to(local_path(f"{source.rstrip('/')}/{key}").resolve())
        yield folder


def _absolute(name: str) -> str:
    """Stages may run elsewhere, so paths go into the configuration as absolute ones."""
    return str(Path(name).absolute()) if ":" not in name and Path(name).exists() else name


def _absolute_or_none(name: str | None) -> str | None:
    return None if name is None else _absolute(name)
