"""Our own engines: which of them a checkpoint's family needs."""

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models.base import TextModel
from rlaifv.models.branches import TrainableModel
from rlaifv.models.checkpoint import Checkpoint, end_tokens, find_checkpoint, load_module
from rlaifv.models.generic import GenericModel
from rlaifv.models.llava import Llava, check_processor
from rlaifv.models.omnilmm import OmniLMM, OmniLMMForCausalLM, make_prompter
from rlaifv.models.original import has_original_processor, make_processor
from rlaifv.models.processors import load_processor
from rlaifv.models.prompting import Prompter
from rlaifv.models.shared_prefix import SharedPrefixModel
from rlaifv.models.text import ChatModel


def load_trainable(spec: ModelSpec, *, spread: bool = False) -> TrainableModel:
    """A checkpoint's engine; see `rlaifv.models.load_trainable`."""
    if spec.endpoint:
        raise ConfigError(f"model {spec.path}: an endpoint cannot be trained, nor score answers")
    checkpoint = find_checkpoint(spec)
    family = spec.family if spec.family != "auto" else checkpoint.model_type
    if family != checkpoint.model_type:
        raise ConfigError(
            f"model {spec.path}: family is {family!r}, but config.json says "
            f"model_type {checkpoint.model_type!r}"
        )
    if family == "llava":
        return _load_llava(checkpoint, spec, spread)
    if family == "omnilmm":
        return _load_omnilmm(checkpoint, spec, spread)
    if family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return _load_generic(checkpoint, spec, spread)
    if family == "minicpmv":
        raise ConfigError(
            f"model {spec.path}: family 'minicpmv' is run by the code beside its weights, and only "
            "labels and answers: say family minicpmv, trust_remote_code and revision"
        )
    raise ConfigError(f"model {spec.path}: no vision-language family {family!r}")


def _load_llava(checkpoint: Checkpoint, spec: ModelSpec, spread: bool) -> TrainableModel:
    source = str(checkpoint.folder)
    module = load_module(checkpoint, LlavaForConditionalGeneration, dtype=spec.dtype, spread=spread)
    if has_original_processor(checkpoint.folder):
        processor = make_processor(checkpoint.folder, module.config)
    else:
        processor = load_processor(source)
    prompter = Prompter(processor, source=source, prompt=spec.prompt)
    check_processor(prompter, module.config, source=source)
    return SharedPrefixModel(
        Llava(module),
        prompter,
        batch_size=spec.batch_size,
        eos_ids=end_tokens(module, processor.tokenizer),
    )


def _load_omnilmm(checkpoint: Checkpoint, spec: ModelSpec, spread: bool) -> TrainableModel:
    if spec.prompt not in ("auto", "chat_template"):
        raise ConfigError(f"model {spec.path}: prompt is {spec.prompt!r}, OmniLMM has its own")
    module = load_module(checkpoint, OmniLMMForCausalLM, dtype=spec.dtype, spread=spread)
    prompter = make_prompter(checkpoint.folder, module.config)
    return SharedPrefixModel(
        OmniLMM(module), prompter, batch_size=spec.batch_size, eos_ids=(prompter.eos_id,)
    )


def _load_generic(checkpoint: Checkpoint, spec: ModelSpec, spread: bool) -> TrainableModel:
    source = str(checkpoint.folder)
    module = load_module(
        checkpoint, AutoModelForImageTextToText, dtype=spec.dtype, attention="sdpa", spread=spread
    )
    processor = load_processor(source)
    eos_ids = end_tokens(module, processor.tokenizer)
    return GenericModel(
        module, processor, batch_size=spec.batch_size, eos_ids=eos_ids, source=source
    )


def load_text_model(spec: ModelSpec) -> TextModel:
    """A chat model without images; errors as for `load_model`."""
    checkpoint = find_checkpoint(spec)
    source = str(checkpoint.folder)
    if checkpoint.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model {spec.path}: model_type {checkpoint.model_type!r} cannot be loaded as a chat "
            "model without images"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{source}: the tokenizer cannot be loaded: {error}") from error
    module = load_module(checkpoint, AutoModelForCausalLM, dtype=spec.dtype)
    return ChatModel(module, tokenizer, batch_size=spec.batch_size, source=source)
