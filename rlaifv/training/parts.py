"""The parts of a vision-language model by role, and its complete Hugging Face folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import LlavaConfig, PreTrainedModel

from rlaifv.models.original import has_original_processor, make_processor

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def _name_of(module: PreTrainedModel, part: nn.Module) -> str:
    names: dict[nn.Module, str] = {child: name for name, child in module.named_modules()}
    return names[part]


def language_model_name(module: PreTrainedModel) -> str:
    """Dotted path of the decoder (without `lm_head`)."""
    return _name_of(module, module.get_decoder())


def vision_tower(module: PreTrainedModel) -> nn.Module:
    """The image encoder, which is never trained (the release runs it without gradients)."""
    tower: nn.Module = module.get_encoder(modality="image")
    return tower


def tower_place(module: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the vision tower, and the attribute under which it does."""
    parent, _, name = _name_of(module, vision_tower(module)).rpartition(".")
    return module.get_submodule(parent), name


def projector_names(module: PreTrainedModel) -> tuple[str, ...]:
    """Dotted paths of what lies between vision tower and decoder: their trainable siblings."""
    language, vision = language_model_name(module), _name_of(module, vision_tower(module))
    parent = language.rpartition(".")[0]
    siblings = module.get_submodule(parent).named_children()
    paths = (f"{parent}.{name}" if parent else name for name, _ in siblings)
    return tuple(path for path in paths if path not in (language, vision, "lm_head"))


def freeze_all_but_language_and_projector(module: PreTrainedModel) -> None:
    """What full fine-tuning trains (release: `fully_tune`, whose tower gets no gradient either)."""
    module.requires_grad_(True)
    vision_tower(module).requires_grad_(False)


def recompute_activations(module: PreTrainedModel) -> None:
    """Gradient checkpointing of the decoder's layers: a third more compute, far less memory."""
    decoder = module.get_decoder()
    if hasattr(decoder, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        decoder.activation_checkpointing_enable({"use_reentrant": False})
    else:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})


def save_full(
    module: PreTrainedModel,
    folder: Path,
    *,
    like: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """A folder for `from_pretrained`, vLLM and others: weights (or `weights`) and config of `module`.

    Tokenizer, processor, chat template and whatever else is not weights are copied from the folder
    `like`, byte for byte. LLaVA's original layout has no processor: then ours is written.
    """
    module.save_pretrained(str(folder), state_dict=None if weights is None else dict(weights))
    for source in sorted(like.iterdir()):
        target = folder / source.name
        if source.is_file() and not source.name.endswith(WEIGHTS) and not target.exists():
            shutil.copyfile(source, target)
    if isinstance(module.config, LlavaConfig) and has_original_processor(folder):
        make_processor(folder, module.config).save_pretrained(str(folder))
