"""What a Job and its pods say of each shard: pure functions over the API's JSON."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from controller.executors.words import last_words
from controller.k8s_manifest import ATTEMPT, KUEUE, MEMORY, SHARDS
from controller.plan import ShardState

Json = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
OOM_EXIT, EVICTED_EXIT, DEADLINE_EXIT = 137, 143, 124
NEVER = frozenset({"InvalidImageName", "ErrImageNeverPull"})
"""Waiting longer cannot help."""
IMAGE = frozenset({*NEVER, "ErrImagePull", "ImagePullBackOff", "ImageInspectError"})


class Sight(NamedTuple):
    """One shard, as a Job shows it."""

    state: ShardState
    starting: bool = False
    """It has a node, and its container does not run yet."""
    hopeless: bool = False
    """It never will."""
    out_of_memory: bool = False


class JobInfo(NamedTuple):
    """What we wrote on a Job when we created it, and whether it has come to an end."""

    name: str
    uid: str
    shards: tuple[int, ...]
    attempt: int
    memory_factor: int
    gang: bool
    complete: bool
    failed: bool
    deleting: bool


def job_info(job: Json) -> JobInfo:
    metadata = job["metadata"]
    notes = metadata.get("annotations", {})
    return JobInfo(
        name=metadata["name"],
        uid=metadata["uid"],
        shards=tuple(json.loads(notes.get(SHARDS, "[]"))),
        attempt=int(notes.get(ATTEMPT, "1")),
        memory_factor=int(notes.get(MEMORY, "1")),
        gang="subdomain" in job["spec"]["template"]["spec"],
        complete=_condition(job, "Complete") is not None,
        failed=_condition(job, "Failed") is not None,
        deleting="deletionTimestamp" in metadata,
    )


def look(job: Json, pods: Sequence[Json]) -> dict[int, Sight]:
    """Every shard of a Job. `pods` are those of this Job that are not gone."""
    info = job_info(job)
    by_index: dict[int, list[Json]] = {}
    for pod in sorted(pods, key=lambda one: str(one["metadata"].get("creationTimestamp", ""))):
        by_index.setdefault(_index(pod), []).append(pod)
    if info.gang:
        return {info.shards[0]: _gang(job, info, pods)}
    status = job.get("status", {})
    done = indices(status.get("completedIndexes", ""))
    lost = indices(status.get("failedIndexes", ""))
    sights = {}
    for index, shard in enumerate(info.shards):
        mine = by_index.get(index, [])
        if index in done or info.complete:
            sights[shard] = Sight(ShardState("ended", max(1, len(mine)), 0))
        elif index in lost or info.failed:
            sights[shard] = _lost(job, info, mine)
        elif info.deleting:
            sights[shard] = Sight(ShardState("running", len(mine), reason="being deleted"))
        else:
            sights[shard] = _alive(job, mine)
    return sights


def indices(text: str) -> frozenset[int]:
    """The numbers in a list such as `0,2-4`."""
    found: set[int] = set()
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _gang(job: Json, info: JobInfo, pods: Sequence[Json]) -> Sight:
    """All pods do one shard: it runs while one of them runs, and fails with the first of them."""
    if info.complete:
        return Sight(ShardState("ended", 1, 0))
    if info.failed:
        ended = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
        first = sorted(ended, key=lambda pod: (_finished(pod), pod["metadata"]["name"]))[:1]
        return _lost(job, info, first)
    if info.deleting:
        return Sight(ShardState("running", 1, reason="being deleted"))
    sights = [_alive(job, [pod]) for pod in pods] or [_alive(job, [])]
    waiting = [sight for sight in sights if sight.state.phase == "waiting"]
    return waiting[0] if waiting else sights[0]


def _finished(pod: Json) -> str:
    ended = _terminated(pod) or {}
    return str(ended.get("finishedAt") or "9999")


def _lost(job: Json, info: JobInfo, pods: Sequence[Json]) -> Sight:
    """A shard that the Job gave up, by its last pod; by the Job's own words when there is none."""
    attempts = max(1, len(pods))
    ended = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    if ended:
        sight = _ending(ended[-1], info)
        return sight._replace(state=sight.state._replace(attempts=attempts))
    condition = _condition(job, "Failed") or {}
    reason = f"{condition.get('reason', 'Failed')}: {condition.get('message', '')}"
    if condition.get("reason") == "DeadlineExceeded":
        words = f"deadline of the Job exceeded (job_deadline_s): {reason}"
        return Sight(ShardState("ended", attempts, DEADLINE_EXIT, words, final=True))
    if condition.get("reason") == "PodFailurePolicy":
        code = re.search(r"exit code (\d+)", reason)
        return Sight(ShardState("ended", attempts, int(code[1]) if code else 1, reason))
    return Sight(ShardState("ended", attempts, EVICTED_EXIT, f"its pod is gone; {reason}"))


def _ending(pod: Json, info: JobInfo) -> Sight:
    """Why a failed pod failed."""
    status = pod.get("status", {})
    ended = _terminated(pod)
    words = last_words((ended or {}).get("message", "")) if (ended or {}).get("message") else ""
    code = int(ended["exitCode"]) if ended else EVICTED_EXIT
    if status.get("reason") == "DeadlineExceeded":
        limit = pod["spec"].get("activeDeadlineSeconds")
        said = f"deadline exceeded: not done {limit} s after it started (deadline_s)"
        return Sight(ShardState("ended", 1, DEADLINE_EXIT, said, final=True))
    if ended and ended.get("reason") == "OOMKilled":
        limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory")
        final = info.memory_factor > 1
        next_time = "twice the setting: raise `memory`" if final else "trying with twice that"
        said = f"out of memory at {limit}; {next_time}"
        return Sight(ShardState("ended", 1, OOM_EXIT, said, final=final), out_of_memory=True)
    disruption = _condition(pod, "DisruptionTarget")
    if disruption or status.get("reason") in ("Evicted", "NodeShutdown", "Terminated", "Shutdown"):
        source = disruption or status
        said = f"evicted: {source.get('reason', '')}: {source.get('message', '')}".rstrip(": ")
        return Sight(ShardState("ended", 1, EVICTED_EXIT, said))
    if ended is None:
        said = f"never started: {status.get('reason', '')} {status.get('message', '')}".strip()
        return Sight(ShardState("ended", 1, EVICTED_EXIT, said))
    return Sight(ShardState("ended", 1, code or 1, words or f"exit code {code}, without a word"))


def _alive(job: Json, pods: Sequence[Json]) -> Sight:
    """A shard that the Job has not given up: running, or waiting for something."""
    before = [pod for pod in pods if pod.get("status", {}).get("phase") in ("Failed", "Succeeded")]
    current = [pod for pod in pods if pod not in before]
    attempts = len(before)
    if not current:
        if job["spec"].get("suspend"):
            queue = job["metadata"].get("labels", {}).get(KUEUE, "")
            return Sight(ShardState("waiting", attempts, reason=f"queued: {queue}".rstrip(": ")))
        if (
            before and before[-1]["status"]["phase"] == "Succeeded"
        ):  # the Job has not counted it yet
            return Sight(ShardState("running", attempts))
        reason = job.get("event") or _last_failure(before)
        return Sight(ShardState("waiting", attempts, reason=reason))
    pod = current[-1]
    status = pod.get("status", {})
    containers = status.get("containerStatuses") or [{}]
    state = containers[0].get("state", {})
    if "running" in state or status.get("phase") == "Running":
        return Sight(ShardState("running", attempts + 1))
    scheduled = _condition(pod, "PodScheduled", value="False")
    if scheduled:
        said = f"{str(scheduled.get('reason', '')).lower()}: {scheduled.get('message', '')}"
        return Sight(ShardState("waiting", attempts, reason=said))
    waiting = state.get("waiting", {})
    reason = waiting.get("reason", "")
    said = f"{reason}: {waiting.get('message', '')}".strip(": ")
    if reason in IMAGE:
        said = f"image cannot be pulled: {said}"
    return Sight(
        ShardState("waiting", attempts, reason=said), starting=True, hopeless=reason in NEVER
    )


def _last_failure(pods: Sequence[Json]) -> str:
    if not pods:
        return ""
    ended = _terminated(pods[-1]) or {}
    return f"after exit code {ended.get('exitCode', '?')}: {last_words(ended.get('message', ''))}"


def _index(pod: Json) -> int:
    return int(pod["metadata"].get("annotations", {}).get(INDEX, "0"))


def _terminated(pod: Json) -> Json | None:
    containers: Iterable[Json] = pod.get("status", {}).get("containerStatuses") or ()
    for container in containers:
        ended: Json | None = container.get("state", {}).get("terminated")
        if ended:
            return ended
    return None


def _condition(thing: Json, kind: str, *, value: str = "True") -> Mapping[str, Any] | None:
    conditions = thing.get("status", {}).get("conditions") or ()
    return next((c for c in conditions if c["type"] == kind and c["status"] == value), None)
