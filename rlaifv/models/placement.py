"""Where a model's weights lie: on one device, or layer by layer on several that share the work."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from rlaifv.errors import ConfigError

log = logging.getLogger(__name__)

ROOM = 0.8
"""Share of a GPU's memory that weights may take; the rest is for keys, values and logits."""


def place(module: PreTrainedModel, *, spread: bool) -> PreTrainedModel:
    """The module on the GPU; on all visible GPUs when one is too small for it and `spread` is set.

    Without a GPU it stays where it is. Raises ConfigError when all of them are too small.
    """
    if not torch.cuda.is_available():
        return module
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(_count(spread))]
    if sum(_bytes(module).values()) <= ROOM * sizes[0] or len(sizes) == 1:
        placed: PreTrainedModel = module.to("cuda")
        return placed
    return dispatch(module, device_map(module, {i: int(ROOM * s) for i, s in enumerate(sizes)}))


def _count(spread: bool) -> int:
    return torch.cuda.device_count() if spread else 1


def _bytes(module: PreTrainedModel) -> dict[str, int]:
    return {name: p.numel() * p.element_size() for name, p in module.named_parameters()}


def device_map(module: PreTrainedModel, memory: Mapping[int | str, int]) -> dict[str, Any]:
    """Parts in order, each on the first device with room; the image's tower stays whole.

    Raises ConfigError when there is too little memory (bytes per device).
    """
    from accelerate import infer_auto_device_map

    tower = getattr(module.model, "vision_tower", None)
    whole = [*(module._no_split_modules or ()), *([type(tower).__name__] if tower else ())]
    devices: dict[str, Any] = infer_auto_device_map(
        module, max_memory=dict(memory), no_split_module_classes=whole, offload_buffers=True
    )
    if beyond := [name for name, device in devices.items() if device not in memory]:
        raise ConfigError(
            f"the weights ({sum(_bytes(module).values()) / 2**30:.1f} GB) do not fit on "
            f"{len(memory)} devices of {min(memory.values()) / 2**30:.1f} GB: no room for {beyond[0]}"
        )
    return devices


def dispatch(
    module: PreTrainedModel, devices: Mapping[str, Any], **options: Any
) -> PreTrainedModel:
    """Parts to their devices, inputs after them, by accelerate's hooks and with its `options`."""
    from accelerate import dispatch_model

    skipped = [*(getattr(module, "_skip_keys_device_placement", None) or ()), "shared_prefix"]
    log.info("model spread over devices: %s", devices)
    spread: PreTrainedModel = dispatch_model(
        module, dict(devices), skip_keys=skipped, force_hooks=True, **options
    )
    return spread


def is_spread(module: PreTrainedModel) -> bool:
    """Whether `dispatch` put it on several devices."""
    return getattr(module, "hf_device_map", None) is not None
