"""The Kubernetes executor against a strict stand-in for the API server."""

from pathlib import Path

import pytest

from controller.executors.kubernetes import Clock, KubernetesExecutor
from controller.k8s_client import Api
from controller.k8s_settings import ClusterSettings
from controller.loop import Loop, Watcher
from controller.plan import Planner, ShardId, ShardState, Stop, every_job
from rlaifv.choosing import choose_checkpoint
from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError
from rlaifv.store import Store, open_store
from tests.fake_world import run_fake_stage, tiny_config
from tests.k8sfake import FakeCluster, Fault, Json, Outcome, Pod

GOOD = Outcome()
SETTINGS = ClusterSettings(start_timeout_s=60)


def stages(run: Store, config: RunConfig, then: Pod = lambda job, index, failures: GOOD) -> Pod:
    """Pods that do what their stage would, unless `then` says otherwise."""

    def pod(job: Json, index: int, failures: int) -> Outcome:
        outcome = then(job, index, failures)
        if outcome == GOOD:
            words = job["spec"]["template"]["spec"]["containers"][0]["args"]
            stage, iteration = words[-7].removeprefix("jobs."), int(words[-3])
            shard = words[-1]
            if words[0] == "jobs._indexed":
                shard = words[1].partition("/")[0].split(",")[index]
            number = int(shard.partition("/")[0].replace("$(JOB_COMPLETION_INDEX)", str(index)))
            run_fake_stage(run, config, ShardId(iteration, stage, number))
        return outcome

    return pod


class World:
    """A run, a cluster, and controllers that come and go."""

    def __init__(self, folder: Path, then: Pod = lambda job, index, failures: GOOD) -> None:
        self.config = tiny_config(iterations=1)
        self.run = open_store(str(folder))
        self.cluster = FakeCluster(stages(self.run, self.config, then))
        self.now = 0.0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.cluster.tick()

    def controller(self, settings: ClusterSettings = SETTINGS) -> KubernetesExecutor:
        api = Api(lambda: self.cluster.transport, sleep=lambda seconds: None)
        clock = Clock(lambda: self.now, self.pass_time)
        return KubernetesExecutor(api, settings, str(self.run), clock=clock)

    def drive(self, *, run: Store | None = None) -> Stop:
        executor = self.controller()
        planner = Planner(self.config, str(self.run), executor.unit)
        loop = Loop(
            run or self.run,
            planner=planner,
            executor=executor,
            watcher=Watcher(),
            chooser=choose_checkpoint,
        )
        return loop.drive()

    def created_jobs(self) -> list[str]:
        return [name for kind, name in self.cluster.created if kind == "jobs"]


def test_a_run_makes_each_job_once_and_lets_it_expire_afterwards(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.drive().exit_code == 0
    jobs = world.created_jobs()
    assert len(jobs) == len(set(jobs)) == 13
    assert all("-a1-" in name for name in jobs)
    kept = [
        one["spec"].get("ttlSecondsAfterFinished") for one in world.cluster.objects["jobs"].values()
    ]
    assert kept.count(3600) >= len(kept) - 2  # the last ones are seen by the next controller


def test_a_finished_run_creates_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.drive()
    before = len(world.created_jobs())
    world.cluster.objects["jobs"].clear()
    assert world.drive().exit_code == 0
    assert len(world.created_jobs()) == before


def test_a_lost_answer_to_a_create_adopts_the_job(tmp_path: Path) -> None:
    world = World(tmp_path)
    executor = world.controller()
    executor.states()
    world.cluster.faults[len(world.cluster.calls)] = Fault()
    planner = Planner(world.config, str(world.run), "stage")

    executor.submit(next(iter(every_job(planner))))
    assert len(world.created_jobs()) == 1
    assert executor.states()[ShardId(0, "prepare", 0)].phase == "waiting"


def test_a_foreign_job_of_the_same_name_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    executor = world.controller()
    planner = Planner(world.config, str(world.run), "stage")

    spec = next(iter(every_job(planner)))
    executor.submit(spec)
    (job,) = world.cluster.objects["jobs"].values()
    job["metadata"]["annotations"]["rlaifv/spec"] = "another"
    with pytest.raises(ConfigError, match="is not the one wanted"):
        executor.submit(spec)


def only(stage: str, first: Outcome, *, index: int = 0) -> Pod:
    """Pods that fail once, in one place."""

    def pod(job: Json, number: int, failures: int) -> Outcome:
        labels = job["metadata"]["labels"]
        memory = job["metadata"]["annotations"]["rlaifv/memory-factor"]
        hit = labels["rlaifv/stage"] == stage and number == index and failures == 0
        return first if hit and memory == "1" and first_attempt(job) else GOOD

    return pod


def first_attempt(job: Json) -> bool:
    return bool(job["metadata"]["annotations"]["rlaifv/attempt"] == "1")


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (Outcome(1, "ERROR [x] a bug"), 0),  # the cluster itself starts the pod again
        (Outcome(75, "rate limit"), 0),
        (Outcome(143, evicted=True), 0),
        (Outcome(137), 1),  # the controller submits the one shard again
        (Outcome(137, reason="OOMKilled"), 1),
    ],
)
def test_what_passes_is_done_again_and_only_that(
    tmp_path: Path, outcome: Outcome, again: int
) -> None:
    world = World(tmp_path, only("sample", outcome, index=1))
    assert world.drive().exit_code == 0
    assert len(world.created_jobs()) == 13 + again
    retries = [name for name in world.created_jobs() if "-a2-" in name]
    assert len(retries) == again


def test_memory_is_doubled_once(tmp_path: Path) -> None:
    def pod(job: Json, index: int, failures: int) -> Outcome:
        killed = job["metadata"]["labels"]["rlaifv/stage"] == "verify" and index == 0
        return Outcome(137, reason="OOMKilled") if killed else GOOD

    world = World(tmp_path, pod)
    stop = world.drive()
    assert "out of memory at 8Gi; twice the setting" in stop.reason
    verify = [name for name in world.created_jobs() if "verify" in name]
    assert len(verify) == 2


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (Outcome(78, "2026 ERROR [x] train.beta: not a number"), 78, "train.beta: not a number"),
        (Outcome(65, "2026 ERROR [x] part 3 row 7"), 65, "part 3 row 7"),
        (Outcome(1, "2026 ERROR [x] a bug"), 1, "failed 3 times, last with exit code 1: a bug"),
        (Outcome(waiting="ErrImageNeverPull"), 1, "never started: image cannot be pulled"),
        (Outcome(waiting="ImagePullBackOff"), 1, "ImagePullBackOff: says the kubelet"),
        (Outcome(143, pod_reason="DeadlineExceeded"), 124, "not done 86400 s after it started"),
    ],
)
def test_what_does_not_pass_stops_the_run_with_its_reason(
    tmp_path: Path, outcome: Outcome, code: int, words: str
) -> None:
    def pod(job: Json, index: int, failures: int) -> Outcome:
        return outcome if job["metadata"]["labels"]["rlaifv/stage"] == "claim" else GOOD

    stop = World(tmp_path, pod).drive()
    assert stop.exit_code == code
    assert words in stop.reason


def test_a_mended_run_forgives_failed_jobs(tmp_path: Path) -> None:
    broken = True

    def pod(job: Json, index: int, failures: int) -> Outcome:
        bad = broken and job["metadata"]["labels"]["rlaifv/stage"] == "claim"
        return Outcome(65, "bad row") if bad else GOOD

    world = World(tmp_path, pod)
    assert world.drive().exit_code == 65
    broken = False
    assert world.drive().exit_code == 0


def test_jobs_that_vanish_are_done_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    executor = world.controller()
    planner = Planner(world.config, str(world.run), "stage")

    executor.submit(next(iter(every_job(planner))))
    world.cluster.remove("jobs", world.created_jobs()[0])
    assert executor.states() == {}


def test_a_queue_and_a_quota_are_waited_for_and_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    executor = world.controller(SETTINGS.model_copy(update={"queue": "research"}))
    planner = Planner(world.config, str(world.run), "stage")

    spec = next(iter(every_job(planner)))
    start = len(world.cluster.calls)
    quota = Fault(403, "exceeded quota: jobs, used 1, limited 1")
    world.cluster.faults |= dict.fromkeys(range(start, start + 8), quota)
    executor.submit(spec)
    assert world.created_jobs() == []
    executor.states()  # tries again
    state = executor.states()[ShardId(0, "prepare", 0)]
    assert state == ShardState("waiting", 0, reason="queued: research")


def test_cancel_removes_every_job(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.drive()
    world.controller().cancel()
    assert world.cluster.objects["jobs"] == {}
    assert world.cluster.objects["pods"] == {}
