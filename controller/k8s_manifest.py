"""One pure function from a job to the manifests that run it: an Indexed Job, restricted pods."""

import hashlib
import json
import re
from typing import Any, NamedTuple

from controller.k8s_settings import ClusterSettings, StageSettings
from controller.plan import CONFIG_EXIT, DATA_EXIT, JobSpec

Json = dict[str, Any]
MAX_NAME = 52
"""Of a Job: its pods' host names are `<name>-<index>`, at most 63 characters."""
RUN, RUN_ID, ITERATION, STAGE = "rlaifv/run", "rlaifv/run-id", "rlaifv/iteration", "rlaifv/stage"
SHARDS, SPEC, MEMORY, ATTEMPT = (
    "rlaifv/shards",
    "rlaifv/spec",
    "rlaifv/memory-factor",
    "rlaifv/attempt",
)
KUEUE = "kueue.x-k8s.io/queue-name"
USER = 10001
"""The images' own; any other works too, nothing is written outside /tmp."""
KILLED, TERMINATED = 137, 143
CONTAINER = "stage"
RENDEZVOUS_PORT = 29500


class Attempt(NamedTuple):
    """Which try at these shards this is."""

    number: int = 1
    memory_factor: int = 1
    """2 after one of them ran out of memory."""


FIRST = Attempt()


def run_id(run_uri: str) -> str:
    """Tells runs of one name in different buckets apart; a label value."""
    return hashlib.sha256(run_uri.encode()).hexdigest()[:12]


def selector(run_uri: str) -> str:
    """Selects every Job and pod of a run."""
    return f"{RUN_ID}={run_id(run_uri)}"


def run_uri(spec: JobSpec) -> str:
    return spec.argv[spec.argv.index("--run") + 1]


def job_name(spec: JobSpec, attempt: int) -> str:
    """The same for the same shards, run and attempt, so that a create can be repeated."""
    identity = (run_uri(spec), spec.argv, spec.shards, spec.num_shards, attempt)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    tail = f"-a{attempt}-{digest}"
    head = spec.name
    if len(head) + len(tail) > MAX_NAME:
        config_name, rest = re.fullmatch(r"(.*?)(-\d+-[a-z]+(?:-\d+)?)", head).groups()  # type: ignore[union-attr]
        head = config_name[: MAX_NAME - len(tail) - len(rest)].rstrip("-") + rest
    return head + tail


def manifests(spec: JobSpec, settings: ClusterSettings, attempt: Attempt = FIRST) -> list[Json]:
    """What is to be created, in order: a gang's Service comes before its Job."""
    job = job_manifest(spec, settings, attempt)
    return [*([service_manifest(job)] if is_gang(spec, settings) else []), job]


def job_manifest(spec: JobSpec, settings: ClusterSettings, attempt: Attempt = FIRST) -> Json:
    """The Job of some shards. Its annotation `rlaifv/spec` is the digest of all the rest."""
    stage = settings.of(spec.stage.name)
    gang = is_gang(spec, settings)
    labels = {
        "app.kubernetes.io/name": "rlaifv",
        "app.kubernetes.io/component": "stage",
        RUN: spec.name.rsplit(f"-{spec.iteration}-{spec.stage.name}", 1)[0],
        RUN_ID: run_id(run_uri(spec)),
        ITERATION: str(spec.iteration),
        STAGE: spec.stage.name,
    }
    pods = (stage.nodes or 1) if gang else len(spec.shards)
    body: Json = {
        "completions": pods,
        "parallelism": pods if gang else min(pods, stage.parallelism or pods),
        "completionMode": "Indexed",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules(gang)},
        "activeDeadlineSeconds": settings.job_deadline_s,
        "template": {"metadata": {"labels": labels}, "spec": _pod(spec, settings, attempt)},
        **({"backoffLimit": 0} if gang else {"backoffLimitPerIndex": settings.retries}),
        **({"suspend": True} if settings.queue else {}),
    }
    name = job_name(spec, attempt.number)
    if gang:
        body["template"]["spec"]["subdomain"] = name
    annotations = {
        SHARDS: json.dumps(list(spec.shards), separators=(",", ":")),
        ATTEMPT: str(attempt.number),
        MEMORY: str(attempt.memory_factor),
    }
    metadata: Json = {
        "name": name,
        "namespace": settings.namespace,
        "labels": labels | ({KUEUE: settings.queue} if settings.queue else {}),
        "annotations": annotations,
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": body}
    annotations[SPEC] = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
    return job


def service_manifest(job: Json) -> Json:
    """The headless Service that gives a gang's pods names before they are ready."""
    metadata = job["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {key: metadata[key] for key in ("name", "namespace", "labels")},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": metadata["name"]},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def is_gang(spec: JobSpec, settings: ClusterSettings) -> bool:
    """Whether several pods do one shard together."""
    return spec.stage.runs_on == "gpus" and (settings.of(spec.stage.name).nodes or 1) > 1


def _failure_rules(gang: bool) -> list[Json]:
    """First match counts. 137 may be memory: the controller looks, and submits again."""

    def on(action: str, *codes: int) -> Json:
        wanted = {"containerName": CONTAINER, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": wanted}

    evicted = {"type": "DisruptionTarget", "status": "True"}
    if gang:  # whoever fails: the peers cannot go on without it, so all of them start again
        return [on("FailJob", CONFIG_EXIT, DATA_EXIT, KILLED, TERMINATED)]
    return [
        {"action": "Ignore", "onPodConditions": [evicted]},
        on("FailJob", CONFIG_EXIT),
        on("FailIndex", DATA_EXIT, KILLED, TERMINATED),
    ]


def _pod(spec: JobSpec, settings: ClusterSettings, attempt: Attempt) -> Json:
    stage = settings.of(spec.stage.name)
    images = settings.images
    optional = {
        "nodeSelector": stage.node_selector,
        "tolerations": list(stage.tolerations or ()),
        "priorityClassName": stage.priority_class,
        "imagePullSecrets": [{"name": name} for name in images.pull_secrets],
    }
    return {
        "restartPolicy": "Never",
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_s,
        "activeDeadlineSeconds": stage.deadline_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **{key: value for key, value in optional.items() if value},
        "containers": [_container(spec, settings, attempt)],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": stage.scratch}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": stage.shared_memory}},
            *settings.volumes,
        ],
    }


def _container(spec: JobSpec, settings: ClusterSettings, attempt: Attempt) -> Json:
    stage = settings.of(spec.stage.name)
    memory = _times(stage.memory or "", attempt.memory_factor)
    gpus = {settings.gpu_resource: str(stage.gpus)} if stage.gpus else {}
    environment = {
        "RLAIFV_IMAGE": stage.image or "",
        "OMP_NUM_THREADS": str(settings.threads),
        "MKL_NUM_THREADS": str(settings.threads),
        "OPENBLAS_NUM_THREADS": str(settings.threads),
        **(stage.env or {}),
        **(_gang_environment(spec, settings, attempt) if is_gang(spec, settings) else {}),
    }
    return {
        "name": CONTAINER,
        "image": stage.image,
        "imagePullPolicy": settings.images.pull_policy,
        "args": _arguments(spec, gang=is_gang(spec, settings)),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "envFrom": [{"secretRef": {"name": name, "optional": True}} for name in settings.secrets],
        "resources": {
            "requests": {"cpu": stage.cpu, "memory": memory, **gpus},
            "limits": {"memory": memory, **gpus},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            *settings.mounts,
        ],
    }


def _arguments(spec: JobSpec, *, gang: bool) -> list[str]:
    """The image's entry point is `python -m`; Kubernetes fills in the pod's index."""
    if gang:
        return ["jobs._gang", *spec.argv_of(spec.shards[0])]
    if len(spec.shards) == 1:
        return list(spec.argv_of(spec.shards[0]))
    if spec.shards == tuple(range(spec.num_shards)):
        shard = f"$(JOB_COMPLETION_INDEX)/{spec.num_shards}"
        return [word.replace("{shard}", shard) for word in spec.argv]
    chosen = f"{','.join(map(str, spec.shards))}/{spec.num_shards}"
    return ["jobs._indexed", chosen, *spec.argv]


def _gang_environment(spec: JobSpec, settings: ClusterSettings, attempt: Attempt) -> dict[str, str]:
    """torchrun's own variables; the rank comes from the pod's index."""
    stage: StageSettings = settings.of(spec.stage.name)
    name = job_name(spec, attempt.number)
    return {
        "PET_NNODES": str(stage.nodes),
        "PET_NPROC_PER_NODE": str(stage.gpus or 1),
        "PET_MASTER_ADDR": f"{name}-0.{name}.{settings.namespace}.svc",
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
        "PET_MAX_RESTARTS": "0",
        "RLAIFV_GANG_TIMEOUT": str(settings.gang_timeout_s),
    }


def _times(quantity: str, factor: int) -> str:
    if factor == 1:
        return quantity
    number, unit = re.fullmatch(r"([0-9.]+)(.*)", quantity).groups()  # type: ignore[union-attr]
    return f"{float(number) * factor:g}{unit}"
