"""DPO training of a vision-language policy: one call, from pairs to checkpoints.

Shapes:  P pairs of a forward pass;  T tokens;  M metrics.
"""

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rlaifv.config import ModelSpec, TrainConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import PreferencePair, ReferenceLogps
from rlaifv.training.curves import Curves, StepMetrics
from rlaifv.training.optimizer import MasterAdamW, Updates
from rlaifv.training.policy import Policy
from rlaifv.training.processes import Processes
from rlaifv.training.schedule import MicroBatch, Rank, learning_rate, make_plan, micro_batches
from rlaifv.training.scoring import Answers, batch_metrics, score_pair
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

    def wants_state(self) -> bool:
        """Whether `state` is to be called now; asked after each checkpoint, on the main process.

        A state is many times as large as a checkpoint: one that would make training wait for its
        storage can be left out.
        """
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
    processes = Processes()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        return _Training(request, sink, processes).run()


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


class _Training:
    """One call of `train`."""

    def __init__(self, request: TrainRequest, sink: Sink, processes: Processes) -> None:
        self._request, self._sink, self._processes = request, sink, processes
        self._pairs = {pair.pair_id: pair for pair in request.pairs}
        self._plan = make_plan(self._pairs, request.config, seed=request.seed)
        last, num_steps = request.steps[-1], self._plan.num_steps
        if list(request.steps) != sorted(set(request.steps)) or last > num_steps:
            raise ValueError(f"steps must ascend to at most {num_steps}, got {request.steps}")
        self._identity = _identity(request)
        _warn_of_idle(self._processes.rank.num_processes, request.config)
        _seed_torch(request.seed, "adapter")
        self._policy = Policy(request.policy, request.config, base=request.base)
        self._updates = _make_updates(self._policy, request.config, processes=self._processes)
        self._step = 0
        self._checkpoints: list[TrainedCheckpoint] = []
        self._losses: list[float] = []
        if request.resume_from is not None:
            self._resume(request.resume_from)

    def _resume(self, folder: Path) -> None:
        state = load_state(folder, identity=self._identity)
        self._updates.load(state.tensors, step=state.facts.step, source=str(folder))
        self._step = state.facts.step
        self._checkpoints = list(state.facts.checkpoints)
        log.info("training resumed step=%d", self._step)

    def run(self) -> list[TrainedCheckpoint]:
        request, last = self._request, self._request.steps[-1]
        curves = Curves(request.log_dir if self._processes.is_main else None, start=self._step)
        logged_s = -math.inf
        try:
            batches = itertools.chain(self._plan.batches(self._step), [()])
            for batch, following in itertools.pairwise(batches):
                metrics = self._update(batch, following)
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

    def _update(self, batch: Sequence[str], following: Sequence[str]) -> StepMetrics:
        """One optimiser step on a global batch; the beginning of the next one is read meanwhile."""
        request, processes = self._request, self._processes
        rank, size = processes.rank, request.config.micro_batch_size
        batch, micros = self._passes(batch)
        rows = [self._micro_batch(micro, len(batch)) for micro in micros]
        if following:
            _, (first, *_) = self._passes(following)
            self._policy.read_ahead([self._pairs[pair_id] for pair_id in first.pair_ids])
        gathered_PM = processes.gather(_padded(torch.cat(rows), len(batch))).cpu()
        counted_PM = gathered_PM[gathered_PM[:, 0] > 0]
        _check_losses(counted_PM, _gathered_ids(batch, rank.num_processes, size))
        rate = learning_rate(self._step, self._plan.num_steps, request.config)
        norm = self._updates.update(rate)
        if not math.isfinite(norm):
            raise ArtifactError(
                f"training: the gradient's norm is {norm} for pairs "
                f"{', '.join(sorted(self._culprits(batch, micros)))}; "
                "the update was not made or is not kept"
            )
        self._step += 1
        means_M = counted_PM[:, 1:].double().mean(0).tolist()
        self._losses.append(means_M[0])
        return StepMetrics._make((self._step, *means_M, rate, norm))

    def _passes(self, batch: Sequence[str]) -> tuple[Sequence[str], Sequence[MicroBatch]]:
        """The batch so that passes have like rows, and this process's passes."""
        batch = sorted(batch, key=self._answer_tokens, reverse=True)
        size = self._request.config.micro_batch_size
        return batch, micro_batches(batch, self._processes.rank, size=size)

    def _culprits(self, batch: Sequence[str], micros: Sequence[MicroBatch]) -> Sequence[str]:
        """The pairs of passes whose own gradient is not finite; the whole batch where none is, or
        where gradients are spread over processes."""
        updates, rows = self._updates, list[Tensor]()
        if not isinstance(updates, MasterAdamW):
            return batch
        for micro in micros:
            counted_P = self._micro_batch(micro, len(batch))[:, :1]
            finite = math.isfinite(updates.drop_gradients())
            rows.append(torch.cat([counted_P, torch.full_like(counted_P, finite)], 1))
        rank, size = self._processes.rank, self._request.config.micro_batch_size
        gathered_P2 = self._processes.gather(_padded(torch.cat(rows), len(batch))).cpu()
        finite_P = gathered_P2[gathered_P2[:, 0] > 0][:, 1].tolist()
        pair_ids = _gathered_ids(batch, rank.num_processes, size)
        return [
            name for name, finite in zip(pair_ids, finite_P, strict=True) if not finite
        ] or batch

    def _answer_tokens(self, pair_id: str) -> int:
        row = self._request.reflogps[pair_id]
        return len(row.chosen_token_nats) + len(row.rejected_token_nats)

    def _micro_batch(self, micro: MicroBatch, batch_size: int) -> Tensor:
        """Adds the gradients of some pairs. [P, M]: 1 if counted, then StepMetrics' means."""
        config = self._request.config
        _seed_torch(self._request.seed, "step", self._step, *micro.pair_ids)  # dropout
        pairs = [self._pairs[pair_id] for pair_id in micro.pair_ids]
        scores = self._updates.score(pairs)
        logps, tokens = scores.split(scores.logps_M), scores.split(scores.tokens_M)
        rows = [self._request.reflogps[pair.pair_id] for pair in pairs]
        scored = [
            score_pair(Answers(*policy), Answers(*ids), row, config=config.loss)
            for policy, ids, row in zip(logps, tokens, rows, strict=True)
        ]
        metrics = batch_metrics(scored, config)
        losses_P = metrics.losses_P
        counted_P = (torch.arange(len(pairs), device=losses_P.device) < micro.counted).to(losses_P)
        self._updates.backward((losses_P * counted_P).sum() / batch_size)
        return torch.stack([counted_P, *(column_P.detach() for column_P in metrics)], 1)

    def _hand_over(self) -> None:
        """A checkpoint, then the state that says that it is there."""
        losses, self._losses = self._losses, []
        made = TrainedCheckpoint(
            step=self._step,
            epoch=self._plan.epoch_at(self._step),
            train_loss=math.fsum(losses) / len(losses),
        )
        self._checkpoints.append(made)
        is_main, weights = self._processes.is_main, self._updates.weights()
        if is_main:
            self._sink.checkpoint(made, lambda folder: self._policy.save(folder, weights))
        more = self._step < self._request.steps[-1]
        if more and self._processes.as_main_says(is_main and self._sink.wants_state()):
            tensors = self._updates.state()
            facts = Facts(
                step=self._step, checkpoints=tuple(self._checkpoints), identity=self._identity
            )
            if is_main:
                state = State(facts, tensors)
                self._sink.state(self._step, lambda folder: save_state(state, folder))


def _make_updates(policy: Policy, config: TrainConfig, *, processes: Processes) -> Updates:
    if not config.zero_stage:
        return MasterAdamW(policy, config, processes=processes)
    from rlaifv.training.zero import ZeroAdamW  # DeepSpeed takes seconds to import

    return ZeroAdamW(policy, config, processes=processes)


def _warn_of_idle(num_processes: int, config: TrainConfig) -> None:
    slices = config.global_batch_size // config.micro_batch_size
    if num_processes > slices:
        log.warning(
            "train.global_batch_size %d in passes of train.micro_batch_size %d keeps %d processes "
            "busy; there are %d",
            config.global_batch_size,
            config.micro_batch_size,
            slices,
            num_processes,
        )


def _padded(rows_PM: Tensor, num_rows: int) -> Tensor:
    """Zeros below, so that all processes have equally many rows."""
    return functional.pad(rows_PM, (0, 0, 0, num_rows - len(rows_PM)))


def _gathered_ids(batch: Sequence[str], num_processes: int, size: int) -> list[str]:
    """Whose pair each counted row of the gathered metrics is: rank by rank."""
    ranks = (Rank(index, num_processes) for index in range(num_processes))
    passes = (micro for rank in ranks for micro in micro_batches(batch, rank, size=size))
    return [pair_id for micro in passes for pair_id in micro.pair_ids[: micro.counted]]


def _check_losses(metrics_PM: Tensor, pair_ids: Sequence[str]) -> None:
    finite_P = metrics_PM.isfinite().all(1).tolist()
    if culprits := [name for name, finite in zip(pair_ids, finite_P, strict=True) if not finite]:
        raise ArtifactError(
            f"training: the loss is not finite for pairs {', '.join(sorted(culprits))}; "
            "the weights were not changed"
        )
