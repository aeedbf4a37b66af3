"""Finding a checkpoint and loading it strictly: every weight present, none left over."""

import json
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError, TransientError
from rlaifv.models import omnilmm, original
from rlaifv.models.attention import IMPLEMENTATION
from rlaifv.places import local_path

log = logging.getLogger(__name__)

_PICKLES = ("*.bin", "*.pt", "*.pth")
_INDEX = "model.safetensors.index.json"


class Checkpoint(NamedTuple):
    """A folder in Hugging Face layout, or in that of the original LLaVA or of OmniLMM."""

    folder: Path
    model_type: str
    reader: Literal["transformers", "original", "omnilmm"] = "transformers"
    """Who understands config.json and the weights: the module of that name beside this one."""


def find_checkpoint(spec: ModelSpec) -> Checkpoint:
    """The folder that `spec.path` means; a hub id is downloaded, or taken from the hub's cache.

    Raises ConfigError when there is nothing of that name, TransientError when the hub fails.
    """
    folder = local_path(spec.path)
    if not folder.is_dir():
        folder = _download(spec)
    config = folder / "config.json"
    try:
        values = json.loads(config.read_bytes())
        if original.is_original(values):
            return Checkpoint(folder, "llava", "original")
        model_type = values["model_type"]
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: not a checkpoint: config.json is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{config}: no readable model_type: {error}") from error
    return Checkpoint(
        folder, str(model_type), "omnilmm" if model_type == "omnilmm" else "transformers"
    )


def _download(spec: ModelSpec) -> Path:
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
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


def load_module(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    *,
    dtype: str,
    attention: str = IMPLEMENTATION,
) -> PreTrainedModel:
    """The weights in evaluation mode, on the GPU if there is one.

    Raises ConfigError for pickled weights, ArtifactError for files that are missing or broken and
    for weights that are missing, left over or of another shape.
    """
    folder = checkpoint.folder
    transformers_logging.disable_progress_bar()
    if checkpoint.reader == "transformers":
        _check_files(folder)
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    else:
        reader = original if checkpoint.reader == "original" else omnilmm
        source = {"pretrained_model_name_or_path": None}
        source |= {"config": reader.read_config(folder), "state_dict": reader.read_weights(folder)}
    try:
        module, info = model_class.from_pretrained(
            **source,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, with the names
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: the weights cannot be loaded: {error}") from error
    _check_info(folder, info)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: PreTrainedModel = module.to(device).eval()
    log.info("model loaded path=%s type=%s dtype=%s", folder, checkpoint.model_type, dtype)
    return loaded


def _check_files(folder: Path) -> None:
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


def _check_info(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(kind) or ())):
            what = kind.replace("_", " ")
            raise ArtifactError(f"{folder}: {len(found)} {what}, first {found[0]}")


def end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's, and those of the generation config."""
    generation: GenerationConfig | None = module.generation_config
    configured = generation.eos_token_id if generation is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    ids = {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}
    return tuple(sorted(ids))
