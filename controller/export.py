"""`python -m controller export`: pairs as a data set folder, a checkpoint as a model folder."""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from controller.cards import dataset_card, model_card
from controller.summary import read_choices
from controller.trees import blocks, check_file, tree_files
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import CONFIG, Shard, part_key
from rlaifv.places import policy_tree
from rlaifv.store import Store

CARD = "README.md"


def export_pairs(run: Store, target: Path, *, iteration: int | None = None) -> Path:
    """A folder that `datasets.load_dataset` opens: one Parquet file per iteration, and a card.

    Default: the iterations that have pairs. The files are the parts themselves, provenance
    included. Raises ConfigError for a target that is not empty, ArtifactError without pairs.
    """
    config = run.read_json(CONFIG, RunConfig)
    wanted = range(config.iterations) if iteration is None else [iteration]
    keys = {k: part_key(k, "pairs", Shard(0, 1)) for k in wanted}
    keys = {k: key for k, key in keys.items() if run.exists(key)}
    if not keys:
        raise ArtifactError(f"{run}: no pairs yet; see `python -m controller status`")
    rows = {k: run.provenance(key).rows for k, key in keys.items()}

    def fill(folder: Path) -> None:
        for k, key in keys.items():
            _write(folder / "data" / f"iteration-{k}.parquet", blocks(run, key))
        (folder / CARD).write_text(dataset_card(config, rows), encoding="utf-8")

    return _new_folder(target, fill)


def export_checkpoint(run: Store, target: Path, *, iteration: int | None = None) -> Path:
    """A model folder in Hugging Face layout with a card: the policy after an iteration's choice.

    Default: after the last choice. Adapters leave as the full tree they were merged into. Every
    SHA-256 is verified. Raises ConfigError for a target that is not empty, ArtifactError when no
    checkpoint was chosen by then or its tree is damaged.
    """
    config = run.read_json(CONFIG, RunConfig)
    choices = read_choices(run, config)
    last = max(choices, default=None) if iteration is None else iteration
    if last is None or last not in choices:
        which = "" if last is None else f" in iteration {last}"
        raise ArtifactError(f"{run}: no checkpoint was chosen{which} yet")
    tree = policy_tree(run, config, last + 1)
    if tree is None:
        raise ArtifactError(
            f"{run}: no checkpoint was better than the untrained policy, {config.policy.path}"
        )
    files = tree_files(run, tree)

    def fill(folder: Path) -> None:
        for file in files:
            if problem := check_file(run, file):
                raise ArtifactError(f"{run}/{file.key}: {problem}")
            _write(folder / file.info.path, blocks(run, file.key))
        card = model_card(config, choices[last], tree=tree, digest=run.tree_digest(tree))
        (folder / CARD).write_text(card, encoding="utf-8")

    return _new_folder(target, fill)


def _new_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """The folder appears when it is complete; nothing is left behind otherwise."""
    if "://" in str(target) or ":/" in str(target):
        raise ConfigError(f"--to {target}: expected a folder on this machine")
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target}: is there already, and is not an empty folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"--to {target}: cannot be a folder: {error.strerror}") from error
    try:
        inner = staging / "folder"
        inner.mkdir()
        fill(inner)
        inner.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _write(path: Path, data: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.writelines(data)
