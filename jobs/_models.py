"""Which model made a part: what the provenance says about weights and servers."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from jobs._entry import Job
from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError

if TYPE_CHECKING:
    from rlaifv.models.base import VisionLanguageModel

BLOCK = 1 << 20
SAMPLED = 64 * BLOCK
"""Of larger files, start, middle and end are read: another training changes every weight."""
NO_PROCESSOR = ("generation_config.json", "model.safetensors.index.json")
"""Says nothing about how a given text is scored."""


def load_noted(job: Job, role: str, spec: ModelSpec) -> "VisionLanguageModel":
    """The model, and in the provenance what it is."""
    from rlaifv.models import load_model  # torch: not for --help, nor for a shard that is done

    model = load_model(spec)
    job.notes[role] = describe_model(spec)
    return model


def usage_notes(model: object) -> dict[str, str]:
    """What a server was asked and what it cost; of a model that is run here, the batch size that
    fitted in the end."""
    usage: dict[str, str] | None = getattr(model, "usage", None)
    if usage is None:
        return {"batch size": str(getattr(model, "batch_size", ""))}
    return usage


def refuse_mixture(job: Job, **roles: str) -> None:
    """Raises ArtifactError when the parts of an artifact come from different models or servers.

    `roles`: per artifact the note that names its model.
    """
    for artifact, role in roles.items():
        first, *others = job.parts(artifact)
        expected = job.run.provenance(first).notes
        for key in others:
            found = job.run.provenance(key).notes
            for note in (role, "served by"):
                if found.get(note) != expected.get(note):
                    raise ArtifactError(
                        f"{key}: {note} is {found.get(note)!r}, in {first} {expected.get(note)!r}: "
                        "scores of different models are not compared; delete the parts of one"
                    )


def describe_model(spec: ModelSpec) -> str:
    """`path family dtype batch weights`: enough to tell two models apart."""
    if spec.endpoint:
        from rlaifv.models.endpoint import endpoint_identity  # torch, by its package

        ids = f" ids {spec.endpoint.label_token_ids}" if spec.endpoint.label_token_ids else ""
        return f"{endpoint_identity(spec)} top {spec.endpoint.top_logprobs}{ids}"
    from rlaifv.models.files import find_folder  # torch, by its package

    folder = find_folder(spec)
    revision = f" revision {spec.revision}" if spec.revision else ""
    code = f" code {code_digest(folder)}" if spec.trust_remote_code else ""
    return (
        f"{spec.path}{revision} {spec.family} {spec.dtype} batch {spec.batch_size or 'probed'} "
        f"weights {weights_digest(folder)}{code}"
    )


def weights_digest(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over name, size and (sampled) bytes of the weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        starts = range(0, size, BLOCK)
        if size > SAMPLED:
            starts = range(0, size - BLOCK + 1, (size - BLOCK) // 2)
        with path.open("rb") as stream:
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


def code_digest(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over the code that comes with the weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def reference_notes(spec: ModelSpec) -> dict[str, str]:
    """What reference log-probabilities depend on besides the pairs; noted by `reflogp` and asked
    for by `train`."""
    from rlaifv.models.files import find_folder  # torch, by its package

    folder = find_folder(spec)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in NO_PROCESSOR:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return {
        "reference weights": weights_digest(folder),
        "reference dtype": spec.dtype,
        "reference prompt": spec.prompt,
        "reference processor": digest.hexdigest()[:16],
    }
