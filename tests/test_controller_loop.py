"""A whole run in a simulated world: every order, every death, the same end."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from controller.loop import Loop, Watcher
from controller.plan import Planner, ShardId, Stop, Unit
from rlaifv.choosing import choose_checkpoint
from rlaifv.config import RunConfig
from rlaifv.pipeline import STAGES
from rlaifv.records import Choice
from rlaifv.store import FileInfo, LocalBackend, Manifest, Store, open_store
from tests.fake_world import FakeExecutor, Killed, tiny_config


class Listener(Watcher):
    """Notes which stages and choices it was told of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def stage_done(self, iteration: int, manifest: Manifest) -> None:
        self.heard.append(f"{iteration} {manifest.stage}")

    def chosen(self, iteration: int, choice: Choice) -> None:
        self.heard.append(f"{iteration} choose")


def drive(run: Store, config: RunConfig, executor: FakeExecutor) -> tuple[Stop, list[str]]:
    listener = Listener()
    loop = Loop(
        run,
        planner=Planner(config, str(run), executor.unit),
        executor=executor,
        watcher=listener,
        chooser=choose_checkpoint,
    )
    return loop.drive(), listener.heard


def rows_of(run: Store) -> dict[str, str]:
    """What a run ends with: digests of rows and trees, bytes of choices."""
    digests = {}
    for item in run.objects(""):
        if item.key.endswith(".parquet"):
            digests[item.key] = run.provenance(item.key).rows_sha256
        elif item.key.endswith(("choice.json", "weights")):
            digests[item.key] = run.read_bytes(item.key).decode()
        elif not item.key.startswith("report/"):  # `run` writes those at the end in any case
            digests[item.key] = ""
    return digests


@pytest.mark.parametrize("unit", ["shard", "stage"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_ends_with_every_stage_done_once(tmp_path: Path, unit: Unit, lora: bool) -> None:
    config, run = tiny_config(lora=lora), open_store(str(tmp_path))
    executor = FakeExecutor(run, config, rng=random.Random(1), unit=unit)
    stop, heard = drive(run, config, executor)
    assert stop.exit_code == 0
    stages = [name for name in STAGES if lora or name != "merge"]
    assert sorted(heard) == sorted(f"{k} {name}" for k in range(2) for name in stages)
    assert len(executor.started) == len(set(executor.started))


def test_a_finished_run_is_not_redone(tmp_path: Path) -> None:
    config, run = tiny_config(), open_store(str(tmp_path))
    drive(run, config, FakeExecutor(run, config, rng=random.Random(1)))
    executor = FakeExecutor(run, config, rng=random.Random(2))
    stop, heard = drive(run, config, executor)
    assert (stop.exit_code, heard, executor.started) == (0, [], [])


def test_more_iterations_go_on_after_the_last(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    drive(run, tiny_config(), FakeExecutor(run, tiny_config(), rng=random.Random(1)))
    longer = tiny_config(iterations=3)
    executor = FakeExecutor(run, longer, rng=random.Random(2))
    assert drive(run, longer, executor)[0].exit_code == 0
    assert {shard.iteration for shard in executor.started} == {2}


def test_passing_failures_do_not_change_the_rows(tmp_path: Path) -> None:
    config = tiny_config()
    calm, stormy = open_store(str(tmp_path / "calm")), open_store(str(tmp_path / "stormy"))
    drive(calm, config, FakeExecutor(calm, config, rng=random.Random(1)))

    def exit_code(shard: ShardId, attempt: int) -> int:
        return random.Random(f"{shard} {attempt}").choice([0, 0, -9, 75])

    executor = FakeExecutor(stormy, config, rng=random.Random(2), exit_code=exit_code)
    assert drive(stormy, config, executor)[0].exit_code == 0
    assert rows_of(calm) == rows_of(stormy)


@pytest.mark.parametrize(("exit_code", "attempts"), [(78, 1), (65, 1), (1, 3)])
def test_a_lasting_failure_ends_the_run_with_its_reason(
    tmp_path: Path, exit_code: int, attempts: int
) -> None:
    config, run = tiny_config(), open_store(str(tmp_path))

    def broken(shard: ShardId, attempt: int) -> int:
        return exit_code if shard.stage == "verify" and shard.number == 1 else 0

    executor = FakeExecutor(run, config, rng=random.Random(1), exit_code=broken)
    stop, _ = drive(run, config, executor)
    assert stop.exit_code == exit_code
    assert f"reason {exit_code}" in stop.reason
    assert executor.started.count(ShardId(0, "verify", 1)) == attempts


class MortalBackend(LocalBackend):
    """A back end whose user dies at the n-th write, before or after it took effect."""

    def __init__(self, root: Path, *, writes_left: int, late: bool) -> None:
        super().__init__(root)
        self.writes_left = writes_left
        self.late = late

    def put_file_if_absent(self, key: str, source: Path) -> bool:
        return bool(self._count(super().put_file_if_absent, key, source))

    def put_tree_if_absent(self, key: str, folder: Path, files: Iterable[FileInfo]) -> bool:
        return bool(self._count(super().put_tree_if_absent, key, folder, files))

    def put(self, key: str, data: bytes) -> None:
        self._count(super().put, key, data)

    def delete(self, key: str) -> None:
        self._count(super().delete, key)

    def _count(self, write: Any, *arguments: Any) -> object:
        self.writes_left -= 1
        if self.writes_left == 0 and not self.late:
            raise Killed
        result = write(*arguments)
        if self.writes_left == 0:
            raise Killed
        return result


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_death_at_every_write_ends_with_the_same_artifacts(tmp_path: Path, late: bool) -> None:
    config = tiny_config(lora=True, shards=1, iterations=1)
    calm = open_store(str(tmp_path / "calm"))
    drive(calm, config, FakeExecutor(calm, config, rng=random.Random(1)))
    expected = rows_of(calm)
    for writes in range(1, 200):
        folder = tmp_path / f"mortal-{writes}"
        mortal = Store(MortalBackend(folder, writes_left=writes, late=late))
        try:
            drive(mortal, config, FakeExecutor(mortal, config, rng=random.Random(writes)))
        except Killed:
            again = open_store(str(folder))
            drive(again, config, FakeExecutor(again, config, rng=random.Random(-writes)))
            assert rows_of(again) == expected
        else:
            break
    assert writes > 20
