"""The cluster's facts: images, namespace, resources. Nothing here can change a row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError
from rlaifv.pipeline import STAGES, labels_grades

Positive = Annotated[int, Field(gt=0)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
ImageKind = Literal["core", "eval", "gpu"]
IMAGE_OF: Mapping[str, ImageKind] = {
    "prepare": "eval",
    "pair": "core",
    "grade": "eval",
    "choose": "core",
}
"""The smallest image that has what a stage imports; every other stage runs in `gpu`."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Images(_Section):
    """Container images; with a digest, the rows' provenance says exactly what made them."""

    core: str = "rlaifv-core:latest"
    eval: str = "rlaifv-eval:latest"
    gpu: str = "rlaifv-gpu:latest"
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


class StageSettings(_Section):
    """What a pod of a stage gets; what is None comes from `defaults`, then from the code."""

    image: str | None = None
    """Default: the one of `images` that fits the stage."""
    cpu: Quantity | None = None
    """Requested; there is no CPU limit, which would only waste idle cores."""
    memory: Quantity | None = None
    """Requested and limit; doubled once when it was not enough."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """Per pod. Default: 0, also for stages that like a GPU."""
    shared_memory: Quantity | None = None
    """Size limit of /dev/shm; it counts as memory."""
    scratch: Quantity | None = None
    """Size limit of /tmp, which also holds the cache of downloaded models and checkpoints."""
    parallelism: Positive | None = None
    """Pods at once. Default: all shards."""
    nodes: Positive | None = None
    """`train` only: pods that train together (a gang), each with `gpus` processes."""
    deadline_s: Positive | None = None
    """Of one pod, from when it starts on a node: waiting in a queue is not run time."""
    node_selector: dict[str, str] | None = None
    tolerations: tuple[dict[str, Any], ...] | None = None
    priority_class: str | None = None
    env: dict[str, str] | None = None
    """Not for secrets; merged over `defaults.env`."""


DEFAULTS = StageSettings(
    cpu="1",
    memory="4Gi",
    gpus=0,
    shared_memory="1Gi",
    scratch="50Gi",
    nodes=1,
    deadline_s=24 * 3600,
    node_selector={},
    tolerations=(),
    env={},
)


class ClusterSettings(_Section):
    """The controller's settings file: `--cluster FILE`."""

    namespace: str = "rlaifv"
    images: Images = Images()
    defaults: StageSettings = StageSettings()
    stages: dict[str, StageSettings] = Field(default_factory=dict)
    secrets: tuple[str, ...] = ("rlaifv-s3", "rlaifv-judge")
    """Secrets whose keys become environment variables of every stage; one may be absent."""
    service_account: str = "rlaifv-stage"
    gpu_resource: str = "nvidia.com/gpu"
    threads: Positive = 1
    """Of each stage's process, recorded with its rows: bit-equal at an equal number only."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Pods that the cluster starts again by itself, per shard, after a bug (1) or 75."""
    start_timeout_s: Positive = 300
    """For a pod that has a node: to pull its image and start."""
    gang_timeout_s: Positive = 600
    """For the pods of a gang to find rank 0."""
    job_deadline_s: Positive = 7 * 24 * 3600
    """Of a whole Job, queueing included: a bound on evictions without end."""
    keep_finished_s: Annotated[int, Field(ge=0)] = 3600
    """How long a Job whose result is stored stays for `kubectl`; a failed one, 24 times that."""
    grace_s: Positive = 30
    poll_s: Annotated[float, Field(gt=0)] = 1.0
    queue: str | None = None
    """A Kueue LocalQueue: Jobs begin suspended, and the queue lets them go."""
    volumes: tuple[dict[str, Any], ...] = ()
    """Besides /tmp and /dev/shm, for example a claim with model weights."""
    mounts: tuple[dict[str, Any], ...] = ()

    def for_run(self, config: RunConfig) -> "ClusterSettings":
        """The same, with what `verify` gets for `grade` too where that asks the labeller."""
        if not labels_grades(config):
            return self
        verify = self.stages.get("verify", StageSettings())
        grade = verify.model_copy(update={"image": verify.image or self.images.gpu})
        return self.model_copy(update={"stages": {**self.stages, "grade": grade}})

    def of(self, stage: str) -> StageSettings:
        """Every field of a stage's settings, filled."""
        layers = (DEFAULTS, self.defaults, self.stages.get(stage, StageSettings()))
        values: dict[str, Any] = {}
        env: dict[str, str] = {}
        for layer in layers:
            values |= {key: value for key, value in layer if value is not None}
            env |= layer.env or {}
        return StageSettings(**{**values, "env": env, "image": self._image(stage, values)})

    def _image(self, stage: str, values: Mapping[str, Any]) -> str:
        kind = IMAGE_OF.get(stage, "gpu")
        return str(values.get("image") or getattr(self.images, kind))


def read_settings(path: Path | None) -> ClusterSettings:
    """The settings in a YAML file, or the defaults; raises ConfigError naming every bad key."""
    if path is None:
        return ClusterSettings()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        settings = ClusterSettings.model_validate(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--cluster {path}: not YAML: {error}") from error
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or '(whole)'}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError("\n".join([f"--cluster {path}: not valid", *lines])) from error
    if unknown := sorted(set(settings.stages) - set(STAGES)):
        raise ConfigError(f"--cluster {path}: stages.{unknown[0]}: expected {', '.join(STAGES)}")
    if odd := [name for name, one in settings.stages.items() if one.nodes and name != "train"]:
        raise ConfigError(f"--cluster {path}: stages.{odd[0]}.nodes: only train has several nodes")
    return settings
