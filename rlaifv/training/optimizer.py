"""AdamW on float32 master weights, whatever precision the model computes in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlaifv.config import TrainConfig
from rlaifv.errors import ArtifactError, RlaifvError

MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW with transformers' (and so the release's) defaults: betas 0.9 and 0.999, epsilon 1e-8.

    A parameter that is not float32 gets a float32 copy, which the optimiser updates; the model sees
    that copy rounded. At the release's rate of 5e-7 an update is far below bfloat16's resolution
    and would otherwise be lost. Gradients of micro-batches are summed in float32 too. This is what
    DeepSpeed's bf16 optimiser does, and unlike autocast it leaves the model as it was when the
    reference log-probabilities were computed: the first loss is ln 2.

    Weight decay spares vectors (biases, norms), as transformers' Trainer does.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self._parameters = dict(parameters)
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self._parameters.items()
        }
        matrices = [master for master in self._masters.values() if master.ndim > 1]
        vectors = [master for master in self._masters.values() if master.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, fused=True
        )

    def collect(self) -> None:
        """Moves the gradients of one backward pass to the master weights."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradients down to `max_norm`; their norm before, which may be non-finite.

        Raises RlaifvError when a parameter has none: it would silently stay as it is.
        """
        if missing := [name for name, master in self._masters.items() if master.grad is None]:
            raise RlaifvError(f"training: no gradient reached {missing[0]} ({len(missing)} in all)")
        return nn.utils.clip_grad_norm_(self._masters.values(), max_norm)

    def step(self, learning_rate: float) -> None:
        """One update; the gradients are gone afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._publish()

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, by name: `weights/...`, `exp_avg/...`, `exp_avg_sq/...`."""
        tensors = {f"weights/{name}": master.detach() for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self._adamw.state[master][moment]
        return tensors

    def load(self, tensors: Mapping[str, Tensor], *, step: int, source: str) -> None:
        """Restores what `state` returned after `step` updates.

        Strict: raises ArtifactError for a missing, unexpected or differently shaped tensor.
        """
        kinds = ("weights", *MOMENTS)
        expected = {f"{kind}/{name}": m for name, m in self._masters.items() for kind in kinds}
        if differing := sorted(expected.keys() ^ tensors.keys()):
            raise ArtifactError(
                f"{source}: {len(differing)} tensors are missing or unexpected, first {differing[0]}"
            )
        for key, master in expected.items():
            if tensors[key].shape != master.shape or tensors[key].dtype != torch.float32:
                raise ArtifactError(
                    f"{source}: {key} is {tensors[key].dtype} {list(tensors[key].shape)}, "
                    f"float32 {list(master.shape)} was expected"
                )
        for name, master in self._masters.items():
            with torch.no_grad():
                master.copy_(tensors[f"weights/{name}"])
            moments = {kind: tensors[f"{kind}/{name}"].to(master.device) for kind in MOMENTS}
            count = torch.tensor(float(step), device=master.device)
            self._adamw.state[master] = {"step": count, **moments}
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            if (master := self._masters[name]) is not parameter:
                parameter.copy_(master)
