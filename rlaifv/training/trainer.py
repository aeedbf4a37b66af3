"""DPO training of a vision-language policy: one call, from pairs to checkpoints.

Shapes:  P pairs of a forward pass;  T tokens;  M metrics.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlaifv.config import ModelSpec, TrainConfig
from rlaifv.dpo import PairLogps, pair_metrics, reference_kl, sigmoid_loss
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import PreferencePair, ReferenceLogps
from rlaifv.training.curves import Curves, StepMetrics
from rlaifv.training.optimizer import MasterAdamW
from rlaifv.training.policy import Policy
from rlaifv.training.processes import Processes
from rlaifv.training.schedule import MicroBatch, Rank, learning_rate, make_plan, micro_batches
from rlaifv.training.state import (
    Facts,
    State,
    TrainedCheckpoint,
    digest_rows,
    load_state,
    save_state,
)

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class TrainRequest(NamedTuple):
    """What to train, on what, and when to hand over a checkpoint."""

    policy: ModelSpec
    """With a local path. float32 or bfloat16; the latter is trained with float32 master weights."""
    base: str
    """How an adapter names the policy it belongs to: a hub id or a store URI."""
    pairs: Sequence[PreferencePair]
    """In any order."""
    reflogps: Mapping[str, ReferenceLogps]
    """By pair id: under the policy as it is now, before training."""
    config: TrainConfig
    seed: int
    steps: Sequence[int]
    """Checkpoints after these many steps, ascending (`pipeline.checkpoint_steps`); training ends
    with the last."""
    log_dir: Path | None = None
    """Where TensorBoard's event files go."""
    resume_from: Path | None = None
    """A folder that `Sink.state` has filled."""


class Sink(Protocol):
    """Takes what training produces. `save(folder)` fills an empty folder of the caller's choice."""

    def checkpoint(self, made: TrainedCheckpoint, save: Callable[[Path], None]) -> None:
        """A candidate: a full tree, or an adapter. Offered again after a resume: same bytes."""
        ...

    def state(self, step: int, save: Callable[[Path], None]) -> None:
        """The resumable state after `step`; always later than the checkpoint of that step."""
        ...

    def progress(self, metrics: StepMetrics) -> None:
        """After every optimiser step."""
        ...


def train(request: TrainRequest, sink: Sink) -> list[TrainedCheckpoint]:
    """Trains with DPO (paper, equation 2) and returns every checkpoint, resumed ones included.

    Full fine-tuning of language model and projector, or LoRA; the vision tower stays frozen. Batch
    `n` holds the same pairs whatever the number of processes. A resumed run ends with the weights
    of an uninterrupted one, bit for bit on one CPU process. torch's global random state is left as
    it was found.

    Raises ConfigError for float16, and ArtifactError for a pair without reference log-probabilities
    or with another number of tokens than they have, equal answers, repeated ids, a pair longer than
    `max_length`, a state of another run, and for a loss or gradient that is not finite (before the
    weights change); messages name the pairs.
    """
    _check(request)
    if not request.steps:
        return []
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        return _Training(request, sink).run()


def _check(request: TrainRequest) -> None:
    if request.policy.dtype == "float16":
        raise ConfigError("policy.dtype: float16 cannot be trained; use bfloat16 or float32")
    seen: set[str] = set()
    for pair in request.pairs:
        if pair.pair_id in seen:
            raise ArtifactError(f"pairs: pair {pair.pair_id} occurs twice")
        seen.add(pair.pair_id)
        if pair.chosen == pair.rejected:
            raise ArtifactError(f"pairs: pair {pair.pair_id}: chosen and rejected are equal")
        if pair.pair_id not in request.reflogps:
            raise ArtifactError(f"reflogps: no row for pair {pair.pair_id}")


def _identity(request: TrainRequest) -> dict[str, str]:
    config = request.config.model_dump_json()
    facts = {"config": config, "seed": str(request.seed), "dtype": request.policy.dtype}
    pairs = sorted(request.pairs, key=lambda pair: pair.pair_id)
    return facts | digest_rows(pairs, request.reflogps)


def _seed_torch(*parts: object) -> None:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class _Scores(NamedTuple):
    """Of one pair, scalars: PairLogps' fields, and the KL estimate."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    kl: Tensor


class _Training:
    """One call of `train`."""

    def __init__(self, request: TrainRequest, sink: Sink) -> None:
        self._request, self._sink = request, sink
        self._pairs = {pair.pair_id: pair for pair in request.pairs}
        self._plan = make_plan(self._pairs, request.config, seed=request.seed)
        last, num_steps = request.steps[-1], self._plan.num_steps
        if list(request.steps) != sorted(set(request.steps)) or last > num_steps:
            raise ValueError(f"steps must ascend to at most {num_steps}, got {request.steps}")
        self._identity = _identity(request)
        self._processes = Processes()
        _seed_torch(request.seed, "adapter")
        self._policy = Policy(request.policy, request.config, base=request.base)
        self._scorer = self._processes.wrap(self._policy)
        self._optimizer = MasterAdamW(self._policy.trainable(), request.config)
        self._step = 0
        self._checkpoints: list[TrainedCheckpoint] = []
        self._losses: list[float] = []
        if request.resume_from is not None:
            self._resume(request.resume_from)

    def _resume(self, folder: Path) -> None:
        state = load_state(folder, identity=self._identity)
        self._optimizer.load(state.tensors, step=state.facts.step, source=str(folder))
        self._step = state.facts.step
        self._checkpoints = list(state.facts.checkpoints)
        log.info("training resumed step=%d", self._step)

    def run(self) -> list[TrainedCheckpoint]:
        request, last = self._request, self._request.steps[-1]
        curves = Curves(request.log_dir if self._processes.is_main else None, start=self._step)
        logged_s = -math.inf
        try:
            for batch in self._plan.batches(self._step):
                metrics = self._update(batch)
                curves.add(metrics)
                self._sink.progress(metrics)
                if time.monotonic() - logged_s > LOG_EVERY_S or self._step == last:
                    logged_s = time.monotonic()
                    log.info("training step=%d/%d loss=%.4f", self._step, last, metrics.loss)
                if self._step in request.steps:
                    self._hand_over()
                if self._step == last:
                    break
        finally:
            curves.close()
        return self._checkpoints

    def _update(self, batch: Sequence[str]) -> StepMetrics:
        """One optimiser step on a global batch."""
        request, processes = self._request, self._processes
        rank, size = processes.rank, request.config.micro_batch_size
        _seed_torch(request.seed, "step", self._step, rank.number)
        rows = [self._micro_batch(m, len(batch)) for m in micro_batches(batch, rank, size=size)]
        norm = self._optimizer.clip(request.config.max_grad_norm)
        gathered_PM = processes.gather(torch.cat(rows)).cpu()
        _check_finite(gathered_PM, norm.item(), _gathered_ids(batch, rank.num_processes, size))
        rate = learning_rate(self._step, self._plan.num_steps, request.config)
        self._optimizer.step(rate)
        self._step += 1
        means_M = gathered_PM[gathered_PM[:, 0] > 0, 1:].double().mean(0).tolist()
        self._losses.append(means_M[0])
        return StepMetrics._make((self._step, *means_M, rate, norm.item()))

    def _micro_batch(self, micro: MicroBatch, batch_size: int) -> Tensor:
        """Adds the gradients of some pairs. [P, M]: 1 if counted, then StepMetrics' means."""
        beta = self._request.config.beta
        pairs = [self._pairs[pair_id] for pair_id in micro.pair_ids]
        answers = self._scorer(pairs)
        scores = [self._scores(pair, logps) for pair, logps in zip(pairs, answers, strict=True)]
        *columns, kl_P = (torch.stack(column) for column in zip(*scores, strict=True))
        logps = PairLogps(*columns)
        losses_P = sigmoid_loss(logps, beta=beta)
        counted_P = (torch.arange(len(pairs)) < micro.counted).to(losses_P)
        self._processes.backward((losses_P * counted_P).sum(), batch_size=batch_size)
        self._optimizer.collect()
        return torch.stack([counted_P, losses_P.detach(), *pair_metrics(logps, beta=beta), kl_P], 1)

    def _scores(self, pair: PreferencePair, policy: Sequence[Tensor]) -> _Scores:
        row = self._request.reflogps[pair.pair_id]
        lists = (row.chosen_token_nats, row.rejected_token_nats)
        names = ("chosen", "rejected")
        for name, policy_T, nats in zip(names, policy, lists, strict=True):
            if len(policy_T) != len(nats):
                raise ArtifactError(
                    f"reflogps: pair {pair.pair_id}: {len(nats)} {name} tokens, but the policy "
                    f"has {len(policy_T)}: another tokenizer or answer made them"
                )
        reference = [torch.tensor(nats, dtype=torch.float32).to(policy[0].device) for nats in lists]
        kl = reference_kl(torch.cat(list(policy)), torch.cat(reference))
        return _Scores._make([*(logps_T.sum() for logps_T in (*policy, *reference)), kl])

    def _hand_over(self) -> None:
        """A checkpoint, then the state that says that it is there."""
        losses, self._losses = self._losses, []
        made = TrainedCheckpoint(
            step=self._step,
            epoch=self._plan.epoch_at(self._step),
            train_loss=math.fsum(losses) / len(losses),
        )
        self._checkpoints.append(made)
        if not self._processes.is_main:
            return
        self._sink.checkpoint(made, self._policy.save)
        if self._step < self._request.steps[-1]:
            facts = Facts(
                step=self._step, checkpoints=tuple(self._checkpoints), identity=self._identity
            )
            state = State(facts, self._optimizer.state())
            self._sink.state(self._step, lambda folder: save_state(state, folder))


def _gathered_ids(batch: Sequence[str], num_processes: int, size: int) -> list[str]:
    """Whose pair each row of the gathered metrics is: rank by rank."""
    ranks = (Rank(index, num_processes) for index in range(num_processes))
    passes = (micro for rank in ranks for micro in micro_batches(batch, rank, size=size))
    return [pair_id for micro in passes for pair_id in micro.pair_ids]


def _check_finite(metrics_PM: Tensor, norm: float, pair_ids: Sequence[str]) -> None:
    """The losses of single pairs name the culprit; a gradient can only name the batch."""
    finite_P = metrics_PM.isfinite().all(1).tolist()
    if culprits := [name for name, finite in zip(pair_ids, finite_P, strict=True) if not finite]:
        raise ArtifactError(
            f"training: the loss is not finite for pairs {', '.join(sorted(set(culprits)))}; "
            "the weights were not changed"
        )
    if not math.isfinite(norm):
        raise ArtifactError(
            f"training: the gradient's norm is {norm} for the batch of pairs "
            f"{', '.join(sorted(set(pair_ids)))}; the weights were not changed"
        )
