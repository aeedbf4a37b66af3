"""Locks of torch's extension builds: waited for while somebody holds them, removed when nobody can."""

import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from rlaifv.training import builds
from rlaifv.training.builds import wait_for_builds


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builds, "LOOK_S", 0.01)
    (tmp_path / "op").mkdir()
    return tmp_path / "op/lock"


def test_without_builds_there_is_nothing_to_wait_for(lock: Path) -> None:
    wait_for_builds()
    assert not lock.exists()


def test_the_lock_of_a_killed_build_is_removed(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - 700,) * 2)
    wait_for_builds()
    assert not lock.exists()


def test_a_lock_that_is_held_or_young_is_waited_for(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    os.utime(lock, (time.time() - 700,) * 2)
    waiting = threading.Thread(target=wait_for_builds, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "a build that goes on was not waited for"
    baton.release()
    waiting.join(5)
    assert not waiting.is_alive()

    lock.touch()  # nobody's, but another machine may hold it
    waiting = threading.Thread(target=wait_for_builds, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert lock.exists()
    lock.unlink()
    waiting.join(5)
    assert not waiting.is_alive()
