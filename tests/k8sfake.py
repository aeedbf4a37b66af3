"""A strict stand-in for an API server with a Job controller, in this process.

It keeps uid and resourceVersion, refuses what a real one refuses (409, 404, 410, 422, wrong
preconditions, fields nobody knows) and can lose answers. tests/cluster/test_contract.py holds the
same assertions against a real server.
"""

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import urllib3

from controller.k8s_client import Answer

Json = dict[str, Any]
KINDS = ("jobs", "pods", "services", "events", "leases")
JOB_FIELDS = {
    "completions",
    "parallelism",
    "completionMode",
    "podReplacementPolicy",
    "podFailurePolicy",
    "activeDeadlineSeconds",
    "template",
    "backoffLimit",
    "backoffLimitPerIndex",
    "suspend",
    "ttlSecondsAfterFinished",
}


class Outcome(NamedTuple):
    """How a pod ends."""

    exit_code: int = 0
    message: str = ""
    reason: str = ""
    """Of the container, such as OOMKilled."""
    evicted: bool = False
    pod_reason: str = ""
    waiting: str = ""
    """Not at all: its container waits with this reason."""


class Fault(NamedTuple):
    """What happens to one request instead."""

    status: int = 0
    """0: the connection breaks after the request was done."""
    message: str = ""
    headers: Mapping[str, str] = {}


Pod = Callable[[Json, int, int], Outcome]
"""(job, index, failures so far) -> what its pod does."""


class FakeCluster:
    """`transport` is what `Api` talks to; `tick` lets the cluster go on a little."""

    def __init__(self, pod: Pod) -> None:
        self.objects: dict[str, dict[str, Json]] = {kind: {} for kind in KINDS}
        self.calls: list[tuple[str, str]] = []
        self.created: list[tuple[str, str]] = []
        self.faults: dict[int, Fault] = {}
        """By the number of the request, from 0."""
        self._pod = pod
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)

    # --- requests -------------------------------------------------------------------------

    def transport(
        self, method: str, target: str, data: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        number = len(self.calls)
        parts = urlsplit(target)
        self.calls.append((method, parts.path))
        fault = self.faults.get(number)
        if fault and fault.status:
            return _answer(fault.status, {"message": fault.message}, fault.headers)
        body = json.loads(data) if data else None
        answer = self._answer(method, parts.path, dict(parse_qsl(parts.query)), body)
        if fault:
            raise urllib3.exceptions.ProtocolError("Connection aborted")
        return answer

    def _answer(
        self, method: str, path: str, query: Mapping[str, str], body: Json | None
    ) -> Answer:
        words = path.split("/namespaces/")[1].split("/")[1:]
        kind, name = words[0], words[1] if len(words) > 1 else ""
        found = self.objects[kind]
        if method == "POST":
            return self._create(kind, body or {})
        if not name:
            return _answer(200, self._list(found, query))
        if words[2:] == ["log"]:
            return Answer(200, {}, b"a log")
        if name not in found:
            return _answer(404, {"message": f'{kind} "{name}" not found'})
        if method == "GET":
            return _answer(200, found[name])
        if method == "DELETE":
            return self._delete(kind, found[name], body or {})
        if method == "PATCH":
            assert set(body or {}) == {"spec"}, body
            found[name]["spec"] |= (body or {})["spec"]
        else:
            version = (body or {})["metadata"].get("resourceVersion")
            if version != found[name]["metadata"]["resourceVersion"]:
                return _answer(409, {"message": "the object has been modified"})
            found[name]["spec"] = (body or {})["spec"]
        self._touch(found[name])
        return _answer(200, found[name])

    def _create(self, kind: str, body: Json) -> Answer:
        name = body["metadata"]["name"]
        if kind == "jobs" and (unknown := set(body["spec"]) - JOB_FIELDS):
            return _answer(400, {"message": f"unknown field {sorted(unknown)[0]}"})
        if len(name) > 63 or name in self.objects[kind]:
            code = 409 if name in self.objects[kind] else 422
            return _answer(code, {"message": f'{kind} "{name}" already exists'})
        thing = copy.deepcopy(body)
        thing["metadata"] |= {"uid": f"uid-{next(self._uids)}", "creationTimestamp": "2026-01-01"}
        thing["status"] = {}
        self._touch(thing)
        self.objects[kind][name] = thing
        self.created.append((kind, name))
        return _answer(201, thing)

    def _delete(self, kind: str, thing: Json, body: Json) -> Answer:
        wanted = body.get("preconditions", {}).get("uid", thing["metadata"]["uid"])
        if wanted != thing["metadata"]["uid"]:
            return _answer(409, {"message": "the UID in the precondition does not match"})
        self.remove(kind, thing["metadata"]["name"])
        return _answer(200, {"status": "Success"})

    def _list(self, found: Mapping[str, Json], query: Mapping[str, str]) -> Json:
        pairs = [item.split("=") for item in query.get("labelSelector", "").split(",") if item]
        fields = [item.split("=") for item in query.get("fieldSelector", "").split(",") if item]
        chosen = [
            thing
            for thing in found.values()
            if all(thing["metadata"].get("labels", {}).get(k) == v for k, v in pairs)
            and all(_field(thing, k) == v for k, v in fields)
        ]
        start, limit = int(query.get("continue", "0")), int(query.get("limit", "500"))
        rest = {"continue": str(start + limit)} if start + limit < len(chosen) else {}
        return {"metadata": rest, "items": chosen[start : start + limit]}

    # --- the cluster's own work -----------------------------------------------------------

    def tick(self) -> None:
        """Each active Job runs one pod of each unfinished index."""
        for job in list(self.objects["jobs"].values()):
            ended = {one["type"] for one in job["status"].get("conditions", [])}
            if not job["spec"].get("suspend") and not ended & {"Complete", "Failed"}:
                self._work(job)

    def remove(self, kind: str, name: str) -> None:
        """As by TTL or by hand, with what it owns."""
        uid = self.objects[kind].pop(name)["metadata"]["uid"]
        for things in self.objects.values():
            for key in [key for key, one in things.items() if _owner(one) == uid]:
                del things[key]

    def _work(self, job: Json) -> None:
        status = job["status"]
        done: set[int] = status.setdefault("_done", set())
        lost: set[int] = status.setdefault("_lost", set())
        failed = False
        for index in sorted(set(range(job["spec"]["completions"])) - done - lost):
            pods = self.objects["pods"].values()
            failures = sum(_of(pod, job, index) and not _waits(pod) for pod in pods)
            outcome = self._pod(job, index, failures)
            self._add_pod(job, index, outcome)
            if outcome.waiting:
                continue
            if outcome.exit_code == 0 and not outcome.evicted:
                done.add(index)
                continue
            action = _action(job, outcome)
            over = failures + 1 > job["spec"].get("backoffLimitPerIndex", 0)
            if action == "FailJob" or "backoffLimit" in job["spec"]:
                failed = True
                break
            if action == "FailIndex" or (action == "Count" and over):
                lost.add(index)
        status["completedIndexes"] = ",".join(map(str, sorted(done)))
        status["failedIndexes"] = ",".join(map(str, sorted(lost)))
        everything = len(done) + len(lost) == job["spec"]["completions"]
        if failed or (everything and lost):
            status["conditions"] = [{"type": "Failed", "status": "True", "reason": "FailedIndexes"}]
        elif everything:
            status["conditions"] = [{"type": "Complete", "status": "True"}]
        self._touch(job)

    def _add_pod(self, job: Json, index: int, outcome: Outcome) -> None:
        number = next(self._uids)
        template = job["spec"]["template"]
        name = f"{job['metadata']['name']}-{index}-{number:05d}"
        for old in [k for k, p in self.objects["pods"].items() if _waits(p) and _of(p, job, index)]:
            del self.objects["pods"][old]
        state: Json = {
            "terminated": {
                "exitCode": outcome.exit_code,
                "reason": outcome.reason,
                "message": outcome.message,
                "finishedAt": f"{number:06d}",
            }
        }
        if outcome.waiting:
            state = {"waiting": {"reason": outcome.waiting, "message": "says the kubelet"}}
        good = outcome.exit_code == 0 and not outcome.evicted
        phase = "Pending" if outcome.waiting else "Succeeded" if good else "Failed"
        conditions = [
            {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        ]
        self.objects["pods"][name] = {
            "metadata": {
                "name": name,
                "uid": f"uid-{number}",
                "labels": template["metadata"]["labels"],
                "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
                "creationTimestamp": f"{number:06d}",
                "ownerReferences": [{"uid": job["metadata"]["uid"]}],
            },
            "spec": template["spec"],
            "status": {
                "phase": phase,
                "reason": outcome.pod_reason,
                "conditions": conditions if outcome.evicted else [],
                "containerStatuses": [{"state": state}],
            },
        }

    def _touch(self, thing: Json) -> None:
        thing["metadata"]["resourceVersion"] = str(next(self._versions))


def _action(job: Json, outcome: Outcome) -> str:
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", []):
        if "onPodConditions" in rule and outcome.evicted:
            return str(rule["action"])
        if outcome.exit_code in rule.get("onExitCodes", {}).get("values", []):
            return str(rule["action"])
    return "Count"


def _waits(pod: Json) -> bool:
    return bool(pod["status"]["phase"] == "Pending")


def _of(pod: Json, job: Json, index: int) -> bool:
    mine = pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
    return bool(mine) and _owner(pod) == job["metadata"]["uid"]


def _owner(thing: Json) -> str:
    owners = thing["metadata"].get("ownerReferences") or [{}]
    return str(owners[0].get("uid", ""))


def _field(thing: Json, path: str) -> str:
    value: Any = thing
    for part in path.split("."):
        value = value.get(part, {})
    return str(value)


def _answer(status: int, body: Json, headers: Mapping[str, str] = {}) -> Answer:
    return Answer(status, headers, json.dumps(body, default=sorted).encode())
