"""The local executor: bounded processes, their logs, and how they end."""

import os
import queue
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.executors.choose import ExecutorSettings, open_platform
from controller.executors.launchers import Ended, ForkServer
from controller.executors.local import LocalExecutor, LocalSettings
from controller.places import run_place
from controller.plan import JobSpec, Planner, ShardId, every_job
from rlaifv.config import EndpointConfig, ModelSpec
from rlaifv.errors import ConfigError
from rlaifv.pipeline import STAGES, stage_of
from rlaifv.recipes import demo
from tests.fake_world import tiny_config


def spec(folder: Path, *actions: str, stage: str = "sample", shards: int = 1) -> JobSpec:
    """A job of `shards` shards that all do the same."""
    argv = ("tests.fake_stage", str(folder / "mark"), *actions, "--shard", "{shard}")
    return JobSpec("job", 0, STAGES[stage], argv, tuple(range(shards)), shards)


def wait_until(executor: LocalExecutor, condition: Callable[[], bool]) -> None:
    """Lets the executor work until the condition holds; fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        executor.wait(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_ending_is_reported_with_its_reason_and_the_next_attempt_appends(
    tmp_path: Path,
) -> None:
    executor = LocalExecutor(LocalSettings(tmp_path, workers=1, threads=3, isolated=True))
    shard = ShardId(0, "sample", 0)
    job = spec(tmp_path, "fail", "kill", "succeed")
    for attempt, code in [(1, 65), (2, -9), (3, 0)]:
        executor.submit(job)
        wait_until(executor, lambda: executor.states()[shard].phase == "ended")
        state = executor.states()[shard]
        assert (state.attempts, state.exit_code) == (attempt, code)
        if attempt == 1:
            assert state.reason == "ArtifactError: row 7 is bad"
    assert "attempt 0 threads 3" in executor.logs(shard)
    assert "attempt 2 threads 3" in executor.logs(shard)
    log = tmp_path / "logs/iteration-0/sample/00000-of-00001.log"
    assert str(log) in executor.logs(shard)
    assert log.is_file()
    executor.cancel()


def test_no_more_shards_run_at_once_than_there_are_workers(tmp_path: Path) -> None:
    executor = LocalExecutor(LocalSettings(tmp_path, workers=2, isolated=True))
    executor.submit(spec(tmp_path, "sleep", stage="respond", shards=3))
    executor.submit(spec(tmp_path, "sleep", stage="prepare", shards=1))
    executor.wait(0.0)
    running = {shard for shard, state in executor.states().items() if state.phase == "running"}
    assert running == {ShardId(0, "prepare", 0), ShardId(0, "respond", 0)}  # earlier stages first
    executor.cancel()


def test_a_stage_has_a_gpu_to_itself_and_others_do_not_wait_for_one(tmp_path: Path) -> None:
    settings = LocalSettings(tmp_path, workers=9, isolated=True)
    executor = LocalExecutor(settings, gpus=("0", "GPU-7"))
    executor.submit(spec(tmp_path, "sleep", stage="sample", shards=3))
    executor.submit(spec(tmp_path, "sleep", stage="grade", shards=2))
    executor.wait(0.0)
    running = [
        shard.stage for shard, state in executor.states().items() if state.phase == "running"
    ]
    assert sorted(running) == ["grade", "grade", "sample", "sample"]
    logs = [ShardId(0, "sample", number) for number in (0, 1)]
    wait_until(executor, lambda: all("threads 1 gpu" in executor.logs(one) for one in logs))
    assert "threads 1 gpu 0" in executor.logs(logs[0])
    assert "threads 1 gpu GPU-7" in executor.logs(logs[1])
    executor.cancel()


def test_only_what_runs_a_model_here_waits_for_a_gpu(tmp_path: Path) -> None:
    config = tiny_config()
    remote = ModelSpec(path="some/model", endpoint=EndpointConfig(url="https://host/v1"))
    verify = config.verify.model_copy(update={"labeller": remote})
    config = config.model_copy(update={"verify": verify})
    needs = {job.stage.name: job.stage.runs_on for job in every_job(Planner(config, "file:///x"))}
    assert [needs[name] for name in ("sample", "claim", "verify")] == ["gpu", "cpu", "cpu"]
    executor = LocalExecutor(LocalSettings(tmp_path, workers=9, isolated=True), gpus=("0",))
    for name in ("sample", "claim", "verify"):
        job = spec(tmp_path, "sleep", stage=name, shards=2)
        executor.submit(job._replace(stage=stage_of(config, name)))
    executor.wait(0.0)
    running = [one.stage for one, state in executor.states().items() if state.phase == "running"]
    assert sorted(running) == ["claim", "claim", "sample", "verify", "verify"]
    executor.cancel()


def test_processes_that_train_together_get_a_gpu_each(tmp_path: Path) -> None:
    settings = LocalSettings(tmp_path, workers=9, isolated=True, processes=2)
    executor = LocalExecutor(settings, gpus=("0", "1", "2"))
    executor.submit(spec(tmp_path, "sleep", stage="train"))
    executor.submit(spec(tmp_path, "sleep", stage="respond", shards=2))
    executor.wait(0.0)
    running = [
        shard.stage for shard, state in executor.states().items() if state.phase == "running"
    ]
    assert sorted(running) == ["respond", "train"]
    train = ShardId(0, "train", 0)
    wait_until(executor, lambda: "threads 1 gpu 0,1" in executor.logs(train))
    executor.cancel()


def test_cancelling_ends_what_runs(tmp_path: Path) -> None:
    executor = LocalExecutor(LocalSettings(tmp_path, workers=1, isolated=True))
    executor.submit(spec(tmp_path, "sleep"))
    mark = tmp_path / "mark.pid"
    wait_until(executor, mark.exists)
    executor.cancel()
    assert executor.states()[ShardId(0, "sample", 0)].exit_code == -15
    assert not is_alive(int(mark.read_text()))


def test_a_passing_failure_waits_before_its_next_attempt(tmp_path: Path) -> None:
    executor = LocalExecutor(LocalSettings(tmp_path, workers=1, isolated=True))
    shard = ShardId(0, "sample", 0)
    job = spec(tmp_path, "later", "succeed")
    executor.submit(job)
    wait_until(executor, lambda: executor.states()[shard].phase == "ended")
    executor.submit(job)
    executor.wait(0.0)
    assert executor.states()[shard].phase == "waiting"
    wait_until(executor, lambda: executor.states()[shard].exit_code == 0)
    assert executor.states()[shard].attempts == 2
    executor.cancel()


def test_forks_of_a_server_that_dies_are_reported_and_the_next_start_brings_up_another(
    tmp_path: Path,
) -> None:
    ended: queue.Queue[Ended] = queue.Queue()
    server = ForkServer(
        os.environ, ended, log=tmp_path / "server.log", module="tests.fake_forkserver"
    )
    server.start(1, ["exit", "65"], tmp_path / "log")
    assert ended.get(timeout=60) == Ended(1, 65)
    server.start(2, ["stay"], tmp_path / "log")
    server.kill(2, 15)
    assert ended.get(timeout=60) == Ended(2, -15)
    server.start(3, ["stay"], tmp_path / "log")
    server.start(4, ["die"], tmp_path / "log")
    assert sorted(ended.get(timeout=60) for _ in range(2)) == [Ended(3, -9), Ended(4, -9)]
    server.start(5, ["exit", "0"], tmp_path / "log")
    assert ended.get(timeout=60) == Ended(5, 0)
    server.close()
    assert ended.empty()


@pytest.mark.parametrize("mode", ["dead", "deadly", "crashing"])
def test_where_forks_do_not_live_fresh_interpreters_take_over(tmp_path: Path, mode: str) -> None:
    def launch(ended: "queue.Queue[Ended]") -> ForkServer:
        environment = dict(os.environ) | {"RLAIFV_FAKE": mode}
        log = tmp_path / "server.log"
        return ForkServer(environment, ended, log=log, module="tests.fake_forkserver")

    executor = LocalExecutor(LocalSettings(tmp_path, workers=2), launch=launch)
    shards = [ShardId(0, "sample", 0), ShardId(0, "sample", 1)]
    job = spec(tmp_path, "succeed", shards=2)
    executor.submit(job)
    wait_until(executor, lambda: all(executor.states()[one].phase == "ended" for one in shards))
    if mode == "crashing":
        assert {executor.states()[one].exit_code for one in shards} == {-11}
        executor.submit(job)
    wait_until(executor, lambda: all(executor.states()[one].exit_code == 0 for one in shards))
    assert {executor.states()[one].attempts for one in shards} == {2 if mode == "crashing" else 1}
    executor.close()


def test_a_cluster_cannot_run_what_only_this_machine_can_reach(tmp_path: Path) -> None:
    place = run_place(str(tmp_path), "demo")
    with pytest.raises(ConfigError, match="key ROOT of ConfigMap rlaifv-run"):
        open_platform(ExecutorSettings("kubernetes", LocalSettings(tmp_path)), place, demo())
