"""Between the store and `rlaifv.training`: where trees, states and curves go."""

import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jobs._entry import Job
from rlaifv.pipeline import checkpoint_key, iteration_key, train_state_key
from rlaifv.places import policy_tree
from rlaifv.records import PreferencePair, ReferenceLogps
from rlaifv.store import Store
from rlaifv.training import StepMetrics, TrainedCheckpoint, TrainRequest
from rlaifv.training import train as train_policy

log = logging.getLogger(__name__)


def run_training(
    job: Job,
    *,
    pairs: Sequence[PreferencePair],
    reflogps: Mapping[str, ReferenceLogps],
    steps: Sequence[int],
) -> list[TrainedCheckpoint]:
    """Trains from the latest stored state; every checkpoint, earlier ones included."""
    tree = policy_tree(job.run, job.config, job.iteration)
    state = latest_state(job.run, job.iteration)
    with tempfile.TemporaryDirectory(prefix="curves-") as curves:
        request = TrainRequest(
            policy=job.policy(),
            base=f"{job.run}/{tree}" if tree else job.config.policy.path,
            pairs=pairs,
            reflogps=reflogps,
            config=job.config.train,
            seed=job.config.seed,
            steps=steps,
            log_dir=Path(curves),
            resume_from=None if state is None else job.run.tree_path(state),
        )
        sink = _StoreSink(job.run, job.iteration, curves=Path(curves))
        made = train_policy(request, sink)
        sink.store_curves()
    return made


def latest_state(run: Store, iteration: int) -> str | None:
    """Key of the last complete training state."""
    states = _states(run, iteration)
    return states[-1] if states else None


def _states(run: Store, iteration: int) -> list[str]:
    folder = train_state_key(iteration, 0).rpartition("/")[0]
    trees = {re.sub(r"(/step-\d+)/.*", r"\1", item.key) for item in run.objects(folder)}
    return sorted(tree for tree in trees if run.tree_exists(tree))


class _StoreSink:
    """A `training.Sink` that writes trees."""

    def __init__(self, run: Store, iteration: int, *, curves: Path) -> None:
        self._run, self._iteration, self._curves = run, iteration, curves

    def checkpoint(self, made: TrainedCheckpoint, save: Callable[[Path], None]) -> None:
        key = checkpoint_key(self._iteration, made.step)
        if self._run.tree_exists(key):
            log.info("checkpoint step=%d is stored already", made.step)
            return
        with self._run.new_tree(key) as folder:
            save(folder)
        log.info("checkpoint step=%d loss=%.4f tree=%s", made.step, made.train_loss, key)

    def state(self, step: int, save: Callable[[Path], None]) -> None:
        """Stores the new state, then removes the older ones: there is one at any time."""
        older = _states(self._run, self._iteration)
        key = train_state_key(self._iteration, step)
        with self._run.new_tree(key) as folder:
            save(folder)
        for tree in older:
            if tree != key:
                self._run.delete(tree)
        self.store_curves()

    def progress(self, metrics: StepMetrics) -> None:
        log.debug("step=%d loss=%.4f", metrics.step, metrics.loss)

    def store_curves(self) -> None:
        """Copies TensorBoard's event files, which are no artifacts, beside the artifacts."""
        for path in sorted(self._curves.rglob("*")):
            if path.is_file():
                name = path.relative_to(self._curves).as_posix()
                key = f"{iteration_key(self._iteration)}/tensorboard/{name}"
                self._run.write_bytes(key, path.read_bytes())
