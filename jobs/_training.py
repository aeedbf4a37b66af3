"""Between the store and `rlaifv.training`: where trees, states and curves go."""

import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
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
        with _StoreSink(job.run, job.iteration, curves=Path(curves)) as sink:
            return train_policy(request, sink)


def latest_state(run: Store, iteration: int) -> str | None:
    """Key of the last complete training state."""
    states = _states(run, iteration)
    return states[-1] if states else None


def _states(run: Store, iteration: int) -> list[str]:
    folder = train_state_key(iteration, 0).rpartition("/")[0]
    trees = {re.sub(r"(/step-\d+)/.*", r"\1", item.key) for item in run.objects(folder)}
    return sorted(tree for tree in trees if run.tree_exists(tree))


class _StoreSink:
    """A `training.Sink`: trees are filled at once and stored by a thread while training goes on.

    One tree at a time, in order (a state never comes before its checkpoint), and at most one more
    waits: then training does. A state is left out while the one before is still being stored. What
    goes wrong is raised by a later call, or at the end, and nothing is stored after it.
    """

    def __init__(self, run: Store, iteration: int, *, curves: Path) -> None:
        self._run, self._iteration, self._curves = run, iteration, curves
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._uploads: deque[Future[None]] = deque()
        self._state: Future[None] | None = None

    def __enter__(self) -> "_StoreSink":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait(pending=0)
            self._store_curves()
        finally:
            self._uploader.shutdown()

    def checkpoint(self, made: TrainedCheckpoint, save: Callable[[Path], None]) -> None:
        key = checkpoint_key(self._iteration, made.step)
        if self._run.tree_exists(key):
            log.info("checkpoint step=%d is stored already", made.step)
            return
        self._upload(key, save)
        log.info("checkpoint step=%d loss=%.4f tree=%s", made.step, made.train_loss, key)

    def wants_state(self) -> bool:
        """Not while the one before is still on its way."""
        return self._state is None or self._state.done()

    def state(self, step: int, save: Callable[[Path], None]) -> None:
        """Stores the new state, then removes the older ones."""
        key = train_state_key(self._iteration, step)

        def remove_older() -> None:
            for tree in _states(self._run, self._iteration):
                if tree < key:
                    self._run.delete(tree)
            self._store_curves()

        self._state = self._upload(key, save, then=remove_older)

    def _upload(
        self, key: str, save: Callable[[Path], None], *, then: Callable[[], None] | None = None
    ) -> Future[None]:
        self._wait(pending=1)
        before = self._uploads[-1] if self._uploads else None
        with ExitStack() as stack:
            folder = stack.enter_context(self._run.new_tree(key))
            save(folder)
            rest = stack.pop_all()  # the end of `new_tree`: checksums, upload, marker

        def store() -> None:
            with rest:
                if before is not None:
                    before.result()  # a state without its checkpoint would lose the checkpoint
            if then is not None:
                then()

        upload = self._uploader.submit(store)
        self._uploads.append(upload)
        return upload

    def _wait(self, *, pending: int) -> None:
        while len(self._uploads) > pending:
            self._uploads.popleft().result()

    def progress(self, metrics: StepMetrics) -> None:
        log.debug("step=%d loss=%.4f", metrics.step, metrics.loss)

    def _store_curves(self) -> None:
        """Copies TensorBoard's event files, which are no artifacts, beside the artifacts."""
        for path in sorted(self._curves.rglob("*")):
            if path.is_file():
                name = path.relative_to(self._curves).as_posix()
                key = f"{iteration_key(self._iteration)}/tensorboard/{name}"
                self._run.write_bytes(key, path.read_bytes())
