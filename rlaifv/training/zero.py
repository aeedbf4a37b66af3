"""DeepSpeed ZeRO behind the interface of `MasterAdamW`: the same tensors, spread over processes.

What is saved and restored has the names and shapes of a single process: a state fits any number of
processes, and only one of them writes it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from rlaifv.config import TrainConfig
from rlaifv.records import PreferencePair
from rlaifv.training.optimizer import MOMENTS, check_tensors, weight_decay_groups
from rlaifv.training.policy import Policy, TokenScores
from rlaifv.training.processes import Processes


class ZeroAdamW:
    """A policy and its optimiser under ZeRO-2 or ZeRO-3; see `optimizer.MasterAdamW`.

    Each process loads the whole policy before the weights are spread, so it must fit one device in
    its own precision (7B in bfloat16: 13.5 GB). The vision tower, which is frozen, stays whole.
    """

    def __init__(self, policy: Policy, config: TrainConfig, *, processes: Processes) -> None:
        processes.prepare_for_deepspeed()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._policy, self._config, self._processes = policy, config, processes
        self._parameters = policy.trainable()
        self._tower: dict[str, Tensor] = {}
        self._engine: Any = None

    def load(self, tensors: Mapping[str, Tensor], *, step: int, source: str) -> None:
        """Restores what `state` returned after `step` updates, on any number of processes."""
        check_tensors(tensors, self._parameters, source=source)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"weights/{name}"])
        self._start(step)
        for name, parameter in self._parameters.items():
            self._restore(parameter, tensors[f"weights/{name}"], None)
            for moment in MOMENTS:
                self._restore(parameter, tensors[f"{moment}/{name}"], moment)

    def score(self, pairs: Sequence[PreferencePair]) -> TokenScores:
        if self._engine is None:
            self._start(0)
        scores: TokenScores = self._engine(pairs)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Adds gradients. The peers' are averaged, not added, hence the factor."""
        factor = self._processes.rank.num_processes
        self._engine.backward(loss * factor, scale_wrt_gas=False)

    def update(self, learning_rate: float) -> float:
        """One update; the gradient's norm before clipping.

        Where the norm is not finite, ZeRO-2 leaves the weights alone; ZeRO-3 need not.
        """
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> dict[str, Tensor]:
        """On the main process as `MasterAdamW.state`; all processes must call it."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            self._keep(tensors, f"weights/{name}", safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                full = safe_get_full_optimizer_state(parameter, moment)
                self._keep(tensors, f"{moment}/{name}", full)
        return tensors

    def weights(self) -> dict[str, Tensor] | None:
        """ZeRO-3: the policy's weights on the main process (for LoRA the trained ones), by name.

        None when every process has them in the policy. All processes must call it.
        """
        if self._config.zero_stage < 3:
            return None
        trained_only = self._config.lora is not None
        tensors = {} if trained_only else dict(self._tower)
        for name, parameter in self._policy.module.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                self._keep(tensors, name, parameter.detach())
        return tensors

    def _keep(self, tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self._processes.is_main:
            tensors[name] = tensor.to("cpu", copy=True)

    def _start(self, step: int) -> None:
        """Hands the policy to DeepSpeed, as if `step` updates had been made."""
        groups = weight_decay_groups(self._parameters.values(), self._config.weight_decay)
        dtype = next(iter(self._parameters.values())).dtype
        if self._config.zero_stage == 3:
            self._tower = self._policy.hide_tower()
        self._engine, *_ = deepspeed.initialize(
            model=self._policy,
            optimizer=torch.optim.AdamW(groups, lr=0.0),
            config=_settings(self._config, dtype=dtype),
        )
        for master in self._masters():
            state = self._engine.optimizer.optimizer.state[master]
            state["step"] = torch.tensor(float(step))
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master)
        if self._config.zero_stage == 2:  # tells parameters where their moments are
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> Iterator[Tensor]:
        """The flat float32 weights that this process updates."""
        optimizer = self._engine.optimizer
        if self._config.zero_stage == 3:
            yield from optimizer.fp32_partitioned_groups_flat
        else:
            yield from optimizer.single_partition_of_fp32_groups

    def _restore(self, parameter: nn.Parameter, full: Tensor, moment: str | None) -> None:
        """Sets this process's share of a master weight, or of one of its moments."""
        if self._config.zero_stage == 2:
            full = full.to(parameter.device)
            if moment is None:
                safe_set_full_fp32_param(parameter, full)
            else:
                safe_set_full_optimizer_state(parameter, full, moment)
            return
        size = safe_get_local_fp32_param(parameter).numel()
        first = self._processes.rank.number * size
        share = full.flatten()[first : first + size]
        share = nn.functional.pad(share, (0, size - share.numel()))  # of the last process
        if moment is None:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, moment)


def _settings(config: TrainConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: gradients are added and exchanged in float32 (release: bf16)."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "contiguous_gradients": True}
    if config.offload:
        pinned = torch.cuda.is_available()
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,  # counted by DeepSpeed, never used
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `update` says when
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # would have to be compiled on the spot
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
