"""Finding a checkpoint's folder, and whether its files are whole.

Nothing of transformers: the images of labellers that need an old release of it come here too.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # here in every release
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError, TransientError
from rlaifv.places import local_path

_PICKLES = ("*.bin", "*.pt", "*.pth")
_INDEX = "model.safetensors.index.json"
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def find_folder(spec: ModelSpec) -> Path:
    """The folder that `spec.path` means; a hub id is downloaded, or taken from the hub's cache.

    Raises ConfigError when there is nothing of that name, TransientError when the hub fails.
    """
    folder = local_path(spec.path)
    if not folder.is_dir():
        return _download(spec)
    if spec.trust_remote_code and spec.revision:
        raise ConfigError(
            f"model {spec.path}: is a folder here, so revision {spec.revision} says nothing about "
            f"its code; write ./{spec.path} without a revision if this folder is meant"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The values of config.json; raises ConfigError when it is missing, ArtifactError if broken."""
    config = folder / "config.json"
    try:
        values = json.loads(config.read_bytes())
        return dict(values)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: not a checkpoint: config.json is missing") from error
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{config}: no readable model_type: {error}") from error


def _download(spec: ModelSpec) -> Path:
    patterns = [*_PATTERNS, "*.py"] if spec.trust_remote_code else [*_PATTERNS]
    try:
        folder = snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns)
        if not any(Path(folder).glob("*.safetensors")):  # LLaVA's original layout
            snapshot_download(spec.path, revision=spec.revision, allow_patterns=["*.bin"])
        return Path(folder)
    except HFValidationError as error:
        raise ConfigError(f"model {spec.path}: no such folder, and no hub id") from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model {spec.path}: no such folder, and the hub cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = ConfigError if 400 <= status < 500 and status != 429 else TransientError
        raise kind(f"model {spec.path}: the hub answers {status}") from error


def check_files(folder: Path) -> None:
    """Raises ConfigError for pickled weights, ArtifactError for missing or broken shards."""
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not weights and pickles:
        raise ConfigError(
            f"{folder}: the weights are pickled ({pickles[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    index = folder / _INDEX
    if index.exists():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{index}: unreadable: {error}") from error
        if missing := sorted(shards - {path.name for path in weights}):
            raise ArtifactError(f"{folder / missing[0]}: shard is missing (named by {_INDEX})")
    elif not (folder / "model.safetensors").exists():
        raise ArtifactError(f"{folder}: neither model.safetensors nor {_INDEX} is there")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: truncated or corrupt: {error}") from error


def check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Raises ArtifactError when transformers' loading info tells of weights that do not fit."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(kind) or ())):
            what = kind.replace("_", " ")
            raise ArtifactError(f"{folder}: {len(found)} {what}, first {found[0]}")
