"""Finding a checkpoint and loading it strictly: every weight present, none left over."""

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError
from rlaifv.models import omnilmm, original
from rlaifv.models.attention import IMPLEMENTATION
from rlaifv.models.files import check_files, check_loaded, find_folder, read_config
from rlaifv.models.placement import place

log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A folder in Hugging Face layout, or in that of the original LLaVA or of OmniLMM."""

    folder: Path
    model_type: str
    reader: Literal["transformers", "original", "omnilmm"] = "transformers"
    """Who understands config.json and the weights: the module of that name beside this one."""


def find_checkpoint(spec: ModelSpec) -> Checkpoint:
    """The checkpoint that `spec` means; errors as for `files.find_folder`."""
    folder = find_folder(spec)
    values = read_config(folder)
    if original.is_original(values):
        return Checkpoint(folder, "llava", "original")
    if "model_type" not in values:
        raise ArtifactError(f"{folder / 'config.json'}: no readable model_type: it names none")
    model_type = str(values["model_type"])
    return Checkpoint(folder, model_type, "omnilmm" if model_type == "omnilmm" else "transformers")


def load_module(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    *,
    dtype: str,
    attention: str = IMPLEMENTATION,
    spread: bool = False,
) -> PreTrainedModel:
    """The weights in evaluation mode, on the GPU if there is one; see `placement.place`.

    Raises ConfigError for pickled weights, ArtifactError for files that are missing or broken and
    for weights that are missing, left over or of another shape.
    """
    folder = checkpoint.folder
    transformers_logging.disable_progress_bar()
    if checkpoint.reader == "transformers":
        check_files(folder)
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
    check_loaded(folder, info)
    loaded: PreTrainedModel = place(module, spread=spread).eval()
    log.info("model loaded path=%s type=%s dtype=%s", folder, checkpoint.model_type, dtype)
    return loaded


def end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's, and those of the generation config."""
    generation: GenerationConfig | None = module.generation_config
    configured = generation.eos_token_id if generation is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    ids = {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}
    return tuple(sorted(ids))
