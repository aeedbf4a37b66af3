"""LoRA through PEFT: adapters on the language model, and their way back into full weights."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlaifv.config import LoraConfig
from rlaifv.errors import ArtifactError
from rlaifv.training.parts import language_model_name, projector_names

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def target_pattern(module: PreTrainedModel) -> str:
    """A regular expression for every linear layer of the language model, and for nothing else.

    Names like `q_proj` alone would also hit the vision tower; `lm_head` is left out as in the
    release.
    """
    prefix = language_model_name(module)
    leaves = {
        name.rpartition(".")[2]
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(f"{prefix}.")
    }
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(leaves - {'lm_head'}))})"


def attach(module: PreTrainedModel, config: LoraConfig, *, base: str) -> PeftModel:
    """The module with fresh adapters, in place; the initial values follow torch's global generator.

    A trained projector is one of PEFT's `modules_to_save`: it lies in the adapter's own file, so
    that whoever loads the adapter cannot forget it. `base` is written into the adapter's config.

    Adapters have the module's precision, with or without ZeRO (as in the release; the optimiser
    keeps float32 weights). PEFT's default, float32, copies every layer's input to float32.
    """
    projector = list(projector_names(module)) if config.train_projector else None
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias="none",
        target_modules=target_pattern(module),
        modules_to_save=projector,
    )
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        model: PeftModel = get_peft_model(module, peft_config, autocast_adapter_dtype=False)
    model.peft_config["default"].base_model_name_or_path = base
    return model


def save_adapter(
    model: PeftModel, folder: Path, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """PEFT's own files: `PeftModel.from_pretrained(base, folder)` loads them as they are.

    `weights`: the trained tensors by their name in the base module, when not the model's own.
    """
    state = None
    if weights is not None:
        state = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def load_adapter(module: PreTrainedModel, folder: Path) -> PeftModel:
    """The module with a saved adapter, for inference.

    Strict, which PEFT is not: raises ArtifactError when the file's tensors are not exactly those
    that its configuration asks for.
    """
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise ArtifactError(f"{folder}: not an adapter: {ADAPTER_WEIGHTS} is missing")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
        try:
            model: PeftModel = PeftModel.from_pretrained(module, str(folder))
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"{folder}: does not fit the base model: {error}") from error
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = load_file(folder / ADAPTER_WEIGHTS)
    if differing := sorted(loaded.keys() ^ saved.keys()):
        raise ArtifactError(
            f"{folder}: {len(differing)} tensors do not match the base model, first {differing[0]}"
        )
    for name, tensor in saved.items():
        if not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise ArtifactError(f"{folder}: {name} was not loaded")
    return model.eval()
