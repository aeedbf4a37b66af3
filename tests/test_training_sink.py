"""Checkpoints and states on their way into the store, while training goes on."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs._training import _StoreSink, latest_state
from rlaifv.errors import TransientError
from rlaifv.pipeline import checkpoint_key, train_state_key
from rlaifv.store import Store, open_store
from rlaifv.training import TrainedCheckpoint

WAIT_S = 20


def save(folder: Path) -> None:
    (folder / "weights").write_text("1")


class SlowStore:
    """A store whose trees arrive when the test says so, or fail by their key."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = open_store(str(root))
        self.go, self.begun, self.broken = threading.Event(), list[str](), set[str]()
        put = self.run.backend.put_tree_if_absent

        def put_later(key: str, *tree: object) -> object:
            self.begun.append(key)
            assert self.go.wait(WAIT_S)
            if key in self.broken:
                raise TransientError(f"{key}: the network is gone")
            return put(key, *tree)  # type: ignore[arg-type]

        monkeypatch.setattr(self.run.backend, "put_tree_if_absent", put_later)

    def sink(self, tmp_path: Path) -> _StoreSink:
        return _StoreSink(self.run, 0, curves=tmp_path / "curves")


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    return SlowStore(tmp_path / "run", monkeypatch)


def made(step: int) -> TrainedCheckpoint:
    return TrainedCheckpoint(step=step, epoch=step / 4, train_loss=0.5)


def in_a_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def stored(run: Store, *steps: int) -> list[bool]:
    return [run.tree_exists(checkpoint_key(0, step)) for step in steps]


def test_training_goes_on_while_two_trees_are_stored_and_waits_with_a_third(
    slow: SlowStore, tmp_path: Path
) -> None:
    with slow.sink(tmp_path) as sink:
        sink.checkpoint(made(1), save)
        sink.state(1, save)  # returns: one is being stored, one waits
        assert not sink.wants_state(), "the state before is not stored yet"
        third = in_a_thread(lambda: sink.checkpoint(made(2), save))
        third.join(0.2)
        assert third.is_alive(), "a third tree must wait for the first"
        assert slow.begun == [checkpoint_key(0, 1)]
        assert stored(slow.run, 1) == [False]
        slow.go.set()
        third.join(WAIT_S)
        assert not third.is_alive()
    assert stored(slow.run, 1, 2) == [True, True]
    assert latest_state(slow.run, 0) == train_state_key(0, 1)


def test_only_the_latest_state_is_kept_apart_from_the_candidates(
    slow: SlowStore, tmp_path: Path
) -> None:
    slow.go.set()
    with slow.sink(tmp_path) as sink:
        for step in (1, 2, 3):
            sink.checkpoint(made(step), save)
            sink.state(step, save)
    assert stored(slow.run, 1, 2, 3) == [True, True, True]
    states = [slow.run.tree_exists(train_state_key(0, step)) for step in (1, 2, 3)]
    assert states == [False, False, True]
    assert not train_state_key(0, 3).startswith(checkpoint_key(0, 3).rpartition("/")[0])


def test_a_state_is_not_stored_when_its_checkpoint_was_not(slow: SlowStore, tmp_path: Path) -> None:
    slow.broken.add(checkpoint_key(0, 1))
    slow.go.set()
    sink = slow.sink(tmp_path)
    sink.checkpoint(made(1), save)
    sink.state(1, save)
    with pytest.raises(TransientError, match="the network is gone"):
        sink.__exit__()
    assert stored(slow.run, 1) == [False]
    assert latest_state(slow.run, 0) is None, "a resume would never write the lost checkpoint"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_stored_checkpoint_is_not_stored_again(slow: SlowStore, tmp_path: Path) -> None:
    slow.go.set()
    with slow.sink(tmp_path) as sink:
        sink.checkpoint(made(1), save)
    with slow.sink(tmp_path) as sink:
        sink.checkpoint(made(1), save)
    assert slow.begun == [checkpoint_key(0, 1)]
