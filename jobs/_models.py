"""Which model made a part: what the provenance says about weights."""

import hashlib
from pathlib import Path

from rlaifv.config import ModelSpec

BLOCK = 1 << 20
SAMPLED = 64 * BLOCK
"""Of larger files, start, middle and end are read: another training changes every weight."""


def describe_model(spec: ModelSpec) -> str:
    """`path family dtype batch weights`: enough to tell two models apart."""
    from rlaifv.models.checkpoint import find_checkpoint  # torch

    folder = find_checkpoint(spec).folder
    revision = f" revision {spec.revision}" if spec.revision else ""
    return (
        f"{spec.path}{revision} {spec.family} {spec.dtype} batch {spec.batch_size} "
        f"weights {weights_digest(folder)}"
    )


def weights_digest(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over name, size and (sampled) bytes of the weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
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
