"""What we rely on in an API server; held against the stand-in and against a real one."""

from typing import Any

import pytest

from controller.k8s_client import Api, ApiError
from controller.k8s_manifest import job_manifest, selector
from controller.k8s_settings import ClusterSettings
from controller.plan import JobSpec
from rlaifv.pipeline import STAGES

RUN = "s3://bucket/contract"
JOBS = "/apis/batch/v1/namespaces/rlaifv/jobs"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/rlaifv/leases"


def suspended_job(name: str) -> dict[str, Any]:
    """A Job that creates no pod."""
    argv = ("jobs.pair", "--run", RUN, "--iteration", "0", "--shard", "{shard}")
    spec = JobSpec(f"{name}-0-pair", 0, STAGES["pair"], argv, (0,), 1)
    return job_manifest(spec, ClusterSettings(queue="nobody"))


def refused(status: int) -> Any:
    return pytest.raises(ApiError, check=lambda error: error.status == status)


def check_server(api: Api) -> None:
    """Raises AssertionError for an answer that we do not expect."""
    job = suspended_job("one")
    created = api.create(JOBS, job)
    path = f"{JOBS}/{created['metadata']['name']}"
    assert created["metadata"]["uid"]
    with refused(409):
        api.create(JOBS, job)
    unknown = suspended_job("two")
    unknown["spec"]["completion"] = 1
    with refused(400):
        api.create(JOBS, unknown)
    long = suspended_job("three")
    long["metadata"]["name"] = "a" * 64
    with refused(422):
        api.create(JOBS, long)
    with refused(404):
        api.get(f"{JOBS}/absent")
    other = suspended_job("four")
    other["metadata"]["labels"]["rlaifv/run-id"] = "another"
    api.create(JOBS, other)
    listed = api.items(JOBS, labelSelector=selector(RUN))
    assert [one["metadata"]["uid"] for one in listed] == [created["metadata"]["uid"]]
    patched = api.patch(path, {"spec": {"ttlSecondsAfterFinished": 5}})
    assert patched["spec"]["ttlSecondsAfterFinished"] == 5
    assert patched["metadata"]["resourceVersion"] != created["metadata"]["resourceVersion"]
    api.delete(path, uid="00000000-0000-0000-0000-000000000000")
    assert api.get(path)["metadata"]["uid"] == created["metadata"]["uid"]
    check_stale_writes(api)
    for name in (created, other):
        api.delete(f"{JOBS}/{name['metadata']['name']}")
    api.delete(path)


def check_stale_writes(api: Api) -> None:
    """A replace with an old resourceVersion loses."""
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "contract"},
        "spec": {"holderIdentity": "a", "leaseDurationSeconds": 5},
    }
    first = api.create(LEASES, lease)
    body = first | {"spec": first["spec"] | {"holderIdentity": "b"}}
    second = api.replace(f"{LEASES}/contract", body)
    assert second["spec"]["holderIdentity"] == "b"
    with refused(409):
        api.replace(f"{LEASES}/contract", body)
    api.delete(f"{LEASES}/contract")
