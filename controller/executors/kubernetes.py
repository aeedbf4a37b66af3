"""Stages as Indexed Jobs. The cluster executes; the store alone knows what is done.

A Job found on the cluster counts as submitted, so a controller that was killed goes on where it
was. Jobs that had failed before this controller started are forgiven: it was started again.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from controller.k8s_client import Api, ApiError
from controller.k8s_manifest import (
    ITERATION,
    SPEC,
    STAGE,
    Attempt,
    job_manifest,
    selector,
    service_manifest,
)
from controller.k8s_settings import ClusterSettings
from controller.k8s_states import INDEX, JobInfo, Sight, job_info, look
from controller.plan import JobSpec, ShardId, ShardState, Unit
from rlaifv.errors import ConfigError, TransientError

log = logging.getLogger(__name__)
Json = dict[str, Any]
FAILED_STAY = 24
"""Times `keep_finished_s`: somebody may want to look."""
NEVER_STARTED_EXIT = 1
LOG_LINES = 200


class Clock(NamedTuple):
    """Time, and passing it."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class KubernetesExecutor:
    """Submits, observes by listing, and never ends a Job unless asked to."""

    unit: Unit = "stage"

    def __init__(
        self, api: Api, settings: ClusterSettings, run_uri: str, *, clock: Clock | None = None
    ) -> None:
        self._api = api
        self._settings = settings
        self._selector = selector(run_uri)
        self._clock = clock or Clock()
        self._first = True
        self._observes_only = False
        self._forgiven: set[str] = set()
        self._ended: dict[str, dict[ShardId, Sight]] = {}
        """Shards of finished Jobs by uid, kept when a Job is gone; attempts are counted on them."""
        self._order: dict[str, int] = {}
        self._unkept: dict[str, JobInfo] = {}
        self._numbers: dict[ShardId, int] = {}
        """The latest attempt at each shard that the cluster knows of."""
        self._held: dict[str, tuple[JobSpec, str]] = {}
        self._out_of_memory: set[ShardId] = set()
        self._starting: dict[tuple[str, int], float] = {}
        self._services: set[str] = set()

    def observe_only(self) -> None:
        """For looking on: changes nothing on the cluster, and forgives no failed Job."""
        self._observes_only, self._first = True, False

    # --- the protocol ---------------------------------------------------------------------

    def submit(self, spec: JobSpec) -> None:
        """Creates the Job, or adopts it if an earlier try has; one that is refused is held."""
        self._held.pop(spec.name, None)
        mine = {ShardId(spec.iteration, spec.stage.name, shard) for shard in spec.shards}
        number = 1 + max(self._numbers.get(shard, 0) for shard in mine)
        attempt = Attempt(number, 2 if mine & self._out_of_memory else 1)
        try:
            self._create(job_manifest(spec, self._settings, attempt))
        except TransientError as error:
            self._held[spec.name] = (spec, f"not accepted yet: {error}")

    def states(self) -> Mapping[ShardId, ShardState]:
        for spec, _ in list(self._held.values()):
            self.submit(spec)
        if not self._observes_only:
            for info in list(self._unkept.values()):
                self._let_expire(info)
        jobs = self._api.items(self._path("jobs"), labelSelector=self._selector)
        self._numbers = {}
        for job in jobs:
            info = job_info(job)
            for number in info.shards:
                shard = ShardId(*_place(job), number)
                self._numbers[shard] = max(self._numbers.get(shard, 0), info.attempt)
        if self._first:
            self._forgiven = {job_info(job).uid for job in jobs if job_info(job).failed}
            self._first = False
        sights = self._look(jobs)
        return self._merged(sights)

    def wait(self, timeout_s: float) -> None:
        if timeout_s:
            self._clock.sleep(max(timeout_s, self._settings.poll_s))

    def logs(self, shard: ShardId) -> str:
        pod = self._newest_pod(shard)
        if pod is None:
            return f"{shard}: no pod (any more)"
        name = pod["metadata"]["name"]
        where = f"kubectl -n {self._settings.namespace} logs {name}"
        try:
            text = self._api.text(
                f"{self._core('pods')}/{name}/log", tailLines=str(LOG_LINES), timestamps="false"
            )
        except ApiError as error:
            return f"{error}\n({where})"
        return f"{text.rstrip()}\n({where})"

    def close(self) -> None:
        """Leaves Jobs running: the next controller finds them."""

    def cancel(self) -> None:
        """Deletes every Job of the run, with its pods."""
        self._held.clear()
        for job in self._api.items(self._path("jobs"), labelSelector=self._selector):
            info = job_info(job)
            self._api.delete(f"{self._path('jobs')}/{info.name}", uid=info.uid)

    # --- creating -------------------------------------------------------------------------

    def _create(self, manifest: Json) -> None:
        metadata = manifest["metadata"]
        path = f"{self._path('jobs')}/{metadata['name']}"
        try:
            job = self._api.create(self._path("jobs"), manifest)
            log.info("created Job %s", metadata["name"])
        except ApiError as error:
            if error.status != 409:
                raise ConfigError(f"Job {metadata['name']} is not accepted: {error}") from error
            job = self._api.get(path)
            if job["metadata"].get("annotations", {}).get(SPEC) != metadata["annotations"][SPEC]:
                raise ConfigError(
                    f"Job {metadata['name']} exists in namespace {self._settings.namespace} and is "
                    "not the one wanted; delete it, or give the run another name"
                ) from error
            log.info("adopted Job %s, uid %s", metadata["name"], job["metadata"]["uid"])
        self._ensure_service(job)

    def _ensure_service(self, job: Json) -> None:
        info = job_info(job)
        if not info.gang or info.uid in self._services or info.complete or info.failed:
            return
        service = service_manifest(job)
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": info.name, "uid": info.uid}
        service["metadata"]["ownerReferences"] = [owner]
        try:
            self._api.create(self._core("services"), service)
        except ApiError as error:
            if error.status != 409:
                raise
        self._services.add(info.uid)

    # --- observing ------------------------------------------------------------------------

    def _look(self, jobs: list[Json]) -> dict[str, dict[ShardId, Sight]]:
        """Shards by the uid of the Job that shows them."""
        fresh = [job for job in jobs if job["metadata"]["uid"] not in self._ended]
        if not fresh:
            return {}
        by_job: dict[str, list[Json]] = {}
        for pod in self._api.items(self._core("pods"), labelSelector=self._selector):
            owners = pod["metadata"].get("ownerReferences") or [{}]
            by_job.setdefault(owners[0].get("uid", ""), []).append(pod)
        found = {}
        for job in fresh:
            info = job_info(job)
            pods = by_job.get(info.uid, [])
            if not self._observes_only:
                self._ensure_service(job)
            sights = {
                ShardId(*_place(job), number): self._judge(info, number, sight)
                for number, sight in look(self._explain(job, pods), pods).items()
            }
            self._order[info.uid] = info.attempt
            found[info.uid] = sights
            if info.complete or info.failed:
                self._ended[info.uid] = sights
                self._unkept[info.uid] = info
                if info.uid not in self._forgiven:
                    self._out_of_memory |= {i for i, one in sights.items() if one.out_of_memory}
        return found

    def _merged(self, fresh: Mapping[str, dict[ShardId, Sight]]) -> dict[ShardId, ShardState]:
        """One state per shard: its newest Job's, with the attempts of the ones before."""
        merged: dict[ShardId, ShardState] = {}
        everything = {**self._ended, **fresh}
        for uid in sorted(everything, key=lambda one: (self._order[one], one)):
            if uid in self._forgiven:
                continue
            for shard, sight in everything[uid].items():
                before = merged[shard].attempts if shard in merged else 0
                state = sight.state
                merged[shard] = state._replace(attempts=before + state.attempts)
        for spec, reason in self._held.values():
            for number in spec.shards:
                shard = ShardId(spec.iteration, spec.stage.name, number)
                before = merged[shard].attempts if shard in merged else 0
                merged[shard] = ShardState("waiting", before, reason=reason)
        return merged

    def _judge(self, info: JobInfo, number: int, sight: Sight) -> Sight:
        """Gives up on a pod that has a node and does not start; its Job is deleted."""
        key = (info.uid, number)
        if not sight.starting:
            self._starting.pop(key, None)
            return sight
        since = self._starting.setdefault(key, self._clock.now())
        waited = self._clock.now() - since
        if not sight.hopeless and waited < self._settings.start_timeout_s:
            return sight
        if not self._observes_only:
            self._api.delete(f"{self._path('jobs')}/{info.name}", uid=info.uid)
        said = f"never started: {sight.state.reason}"
        state = ShardState("ended", sight.state.attempts + 1, NEVER_STARTED_EXIT, said, final=True)
        return Sight(state)

    def _explain(self, job: Json, pods: list[Json]) -> Json:
        """Without pods the Job's last event says why: a quota, an admission that refuses."""
        if pods or job["spec"].get("suspend") or job_info(job).complete or job_info(job).failed:
            return job
        fields = f"involvedObject.name={job['metadata']['name']},reason=FailedCreate"
        events = self._api.items(self._core("events"), fieldSelector=fields)
        return job | {"event": events[-1]["message"]} if events else job

    def _let_expire(self, info: JobInfo) -> None:
        """The Job's result was reported before this call: the cluster may forget it now."""
        seconds = self._settings.keep_finished_s * (FAILED_STAY if info.failed else 1)
        try:
            self._api.patch(
                f"{self._path('jobs')}/{info.name}", {"spec": {"ttlSecondsAfterFinished": seconds}}
            )
        except ApiError as error:
            if error.status != 404:
                raise
        del self._unkept[info.uid]

    def _newest_pod(self, shard: ShardId) -> Json | None:
        labels = f"{self._selector},{ITERATION}={shard.iteration},{STAGE}={shard.stage}"
        jobs = {
            job["metadata"]["uid"]: job_info(job)
            for job in self._api.items(self._path("jobs"), labelSelector=labels)
        }
        mine = []
        for pod in self._api.items(self._core("pods"), labelSelector=labels):
            info = jobs.get((pod["metadata"].get("ownerReferences") or [{}])[0].get("uid", ""))
            index = int(pod["metadata"].get("annotations", {}).get(INDEX, "0"))
            if info and (info.gang or info.shards[index] == shard.number):
                mine.append(pod)
        return max(mine, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)

    def _path(self, kind: str) -> str:
        return f"/apis/batch/v1/namespaces/{self._settings.namespace}/{kind}"

    def _core(self, kind: str) -> str:
        return f"/api/v1/namespaces/{self._settings.namespace}/{kind}"


def _place(job: Json) -> tuple[int, str]:
    labels = job["metadata"]["labels"]
    return int(labels[ITERATION]), labels[STAGE]
