"""The optimiser: AdamW on float32 master weights, whatever precision the model computes in."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlaifv.config import TrainConfig
from rlaifv.errors import ArtifactError, RlaifvError
from rlaifv.records import PreferencePair
from rlaifv.training.policy import Policy, TokenScores
from rlaifv.training.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")


class Updates(Protocol):
    """How gradients become weights; every process of a gang makes every call."""

    def load(self, tensors: Mapping[str, Tensor], *, step: int, source: str) -> None:
        """Restores what `state` returned after `step` updates; before anything else.

        Strict: raises ArtifactError for a missing, unexpected or differently shaped tensor.
        """
        ...

    def score(self, pairs: Sequence[PreferencePair]) -> TokenScores:
        """`Policy.forward`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this process's share of the loss."""
        ...

    def update(self, learning_rate: float) -> float:
        """One clipped update with the gradients of all processes; their norm before clipping.

        Weights are left alone when the norm is not finite.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, by name: `weights/...`, `exp_avg/...`, `exp_avg_sq/...`.

        May be empty on all processes but the main one.
        """
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """What `Policy.save` needs on the main process."""
        ...


def weight_decay_groups(tensors: Iterable[Tensor], decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: no decay for vectors (biases, norms), as transformers' Trainer."""
    listed = list(tensors)
    matrices = [tensor for tensor in listed if tensor.ndim > 1]
    vectors = [tensor for tensor in listed if tensor.ndim <= 1]
    groups = [(matrices, decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": rate} for params, rate in groups if params]


def check_tensors(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, source: str
) -> None:
    """Raises ArtifactError unless `tensors` are what `state` returns for these parameters."""
    kinds = ("weights", *MOMENTS)
    expected = {f"{kind}/{name}": tensor for name, tensor in parameters.items() for kind in kinds}
    if differing := sorted(expected.keys() ^ tensors.keys()):
        raise ArtifactError(
            f"{source}: {len(differing)} tensors are missing or unexpected, first {differing[0]}"
        )
    for key, tensor in expected.items():
        found = tensors[key]
        if found.shape != tensor.shape or found.dtype != torch.float32:
            raise ArtifactError(
                f"{source}: {key} is {found.dtype} {list(found.shape)}, "
                f"float32 {list(tensor.shape)} was expected"
            )


def _move_gradient(master: Tensor, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient


class MasterAdamW:
    """AdamW with transformers' (and so the release's) defaults: betas 0.9 and 0.999, epsilon 1e-8.

    A parameter that is not float32 gets a float32 copy, which the optimiser updates; the model sees
    that copy rounded. At the release's rate of 5e-7 an update is far below bfloat16's resolution
    and would otherwise be lost. Gradients of micro-batches are summed in float32 too. This is what
    DeepSpeed's bf16 optimiser does, and unlike autocast it leaves the model as it was when the
    reference log-probabilities were computed: the first loss is ln 2.

    Several processes each hold everything and add up their gradients.
    """

    def __init__(self, policy: Policy, config: TrainConfig, *, processes: Processes) -> None:
        self._policy, self._processes = policy, processes
        self._parameters = policy.trainable()
        self._max_norm = config.max_grad_norm
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self._parameters.items()
        }
        for name, parameter in self._parameters.items():
            if (master := self._masters[name]) is not parameter:
                hook = partial(_move_gradient, master)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        groups = weight_decay_groups(self._masters.values(), config.weight_decay)
        self._adamw = torch.optim.AdamW(groups, lr=0.0, fused=True)

    def score(self, pairs: Sequence[PreferencePair]) -> TokenScores:
        scores: TokenScores = self._policy(pairs)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Adds gradients in float32, each as soon as it is there: none is held in both precisions."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, learning_rate: float) -> float:
        """One update; see `Updates`.

        Raises RlaifvError when a parameter has no gradient: it would silently stay as it is.
        """
        masters = self._masters.items()
        if missing := [name for name, master in masters if master.grad is None]:
            raise RlaifvError(f"training: no gradient reached {missing[0]} ({len(missing)} in all)")
        self._processes.add_up(master.grad for _, master in masters if master.grad is not None)
        norm = nn.utils.clip_grad_norm_(self._masters.values(), self._max_norm)
        if norm.isfinite():
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
            self._publish()
        self._adamw.zero_grad(set_to_none=True)
        return norm.item()

    def drop_gradients(self) -> float:
        """Forgets what `backward` has added since the last update; its norm, of this process alone."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Of every process: they all hold the same."""
        tensors = {f"weights/{name}": master.detach() for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self._adamw.state[master][moment]
        return tensors

    def load(self, tensors: Mapping[str, Tensor], *, step: int, source: str) -> None:
        """Restores what `state` returned after `step` updates; see `Updates`."""
        check_tensors(tensors, self._masters, source=source)
        for name, master in self._masters.items():
            with torch.no_grad():
                master.copy_(tensors[f"weights/{name}"])
            moments = {
                kind: tensors[f"{kind}/{name}"].to(master.device, copy=True) for kind in MOMENTS
            }
            count = torch.tensor(float(step), device=master.device)
            self._adamw.state[master] = {"step": count, **moments}
        self._publish()

    def weights(self) -> dict[str, Tensor] | None:
        """Nothing: the policy has them."""
        return None

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            if (master := self._masters[name]) is not parameter:
                parameter.copy_(master)
