"""The controller is killed at every call of a whole run, and every answer is lost once.

Both against the strict stand-in for the API server. Stages are instant; after each kill a second
controller finishes the run, and the rows, the choice and the Jobs are those of a calm run.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from controller.k8s_client import Answer
from rlaifv.pipeline import choice_key
from rlaifv.records import Choice
from rlaifv.store import Store
from rlaifv.store._local import LocalBackend
from rlaifv.store._store import FileInfo, ObjectInfo
from tests.fake_world import Killed
from tests.k8sfake import Fault
from tests.test_controller_loop import rows_of
from tests.test_kubernetes_executor import World

JOBS = 13
"""Of one iteration of the tiny run."""


class DyingBackend(LocalBackend):
    """Every call may be the last: before a read, before and after a write."""

    def __init__(self, root: Path, tick: Callable[[], None]) -> None:
        super().__init__(root)
        self._tick = tick

    def open(self, key: str) -> BinaryIO:
        self._tick()
        return super().open(key)

    def size(self, key: str) -> int | None:
        self._tick()
        return super().size(key)

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        self._tick()
        return super().objects(prefix)

    def put_file_if_absent(self, key: str, source: Path) -> bool:
        self._tick()
        done = super().put_file_if_absent(key, source)
        self._tick()
        return done

    def put_tree_if_absent(self, key: str, folder: Path, files: Iterable[FileInfo]) -> bool:
        self._tick()
        done = super().put_tree_if_absent(key, folder, files)
        self._tick()
        return done

    def put(self, key: str, data: bytes) -> None:
        self._tick()
        super().put(key, data)
        self._tick()

    def delete(self, key: str) -> None:
        self._tick()
        super().delete(key)
        self._tick()


class Reaper:
    """Kills the controller at its n-th call of any kind; from there on it stays dead."""

    def __init__(self, limit: int | None) -> None:
        self.count, self.limit = 0, limit

    def tick(self) -> None:
        if self.limit is not None and self.count >= self.limit:
            raise Killed
        self.count += 1


def drive_and_die(world: World, limit: int | None) -> int:
    """A controller that dies at call number `limit`, then one that does not; counts the calls."""
    reaper = Reaper(limit)
    inner = world.cluster.transport

    def transport(m: str, t: str, d: bytes | None, h: dict[str, str]) -> Answer:
        reaper.tick()
        answer = inner(m, t, d, h)
        reaper.tick()  # the request arrived, the answer did not
        return answer

    world.cluster.transport = transport  # type: ignore[method-assign, assignment]
    dying = Store(DyingBackend(Path(str(world.run).removeprefix("file://")), reaper.tick))
    try:
        world.drive(run=dying)
    except Killed:
        pass
    finally:
        world.cluster.transport = inner  # type: ignore[method-assign]
    assert world.drive().exit_code == 0
    return reaper.count


def outcome(world: World) -> tuple[object, Choice]:
    """What a run must have come to: its rows and its choice."""
    return rows_of(world.run), world.run.read_json(choice_key(0), Choice)


def assert_clean(world: World, expected: tuple[object, Choice], what: object) -> None:
    created = world.created_jobs()
    assert len(created) == len(set(created)) == JOBS, what
    for job in world.cluster.objects["jobs"].values():  # no orphan: each came to its end
        assert [one["type"] for one in job["status"]["conditions"]] == ["Complete"], what
    manifests = [o.key for o in world.run.objects("") if o.key.endswith("manifest.json")]
    assert len(manifests) == len(set(manifests)) == 9, what
    assert outcome(world) == expected, what


@pytest.fixture
def expected(tmp_path: Path) -> tuple[object, Choice]:
    calm = World(tmp_path / "calm")
    assert calm.drive().exit_code == 0
    return outcome(calm)


@pytest.mark.slow
def test_a_controller_may_die_at_every_call(
    tmp_path: Path, expected: tuple[object, Choice]
) -> None:
    total = drive_and_die(World(tmp_path / "counted"), None)
    assert total > 200
    for limit in range(total):
        world = World(tmp_path / str(limit))
        assert drive_and_die(world, limit) == limit
        assert_clean(world, expected, limit)
    print(f"killed at each of {total} calls")


@pytest.mark.parametrize(
    "fault",
    [Fault(), Fault(429, "slow down", {"Retry-After": "1"}), Fault(500), Fault(503), Fault(408)],
    ids=["answer-lost", "429", "500", "503", "408"],
)
def test_every_call_may_fail_once(
    tmp_path: Path, expected: tuple[object, Choice], fault: Fault
) -> None:
    """Each second request fails: so every call fails once, and is repeated."""
    world = World(tmp_path / "run")
    world.cluster.faults = dict.fromkeys(range(0, 2000, 2), fault)
    assert world.drive().exit_code == 0
    assert_clean(world, expected, fault)
