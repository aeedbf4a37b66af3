"""The resumable state of a training run: a folder that is read back exactly or refused."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlaifv.errors import ArtifactError
from rlaifv.records import PreferencePair, ReferenceLogps

TENSORS = "training_state.safetensors"
FACTS = "training_state.json"


class TrainedCheckpoint(BaseModel):
    """A checkpoint that training has handed over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    epoch: float
    train_loss: float
    """Mean loss of the steps since the previous checkpoint."""


class Facts(BaseModel):
    """Everything but tensors. Order of pairs, learning rate and random numbers follow from it:
    all are functions of the seed and the step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    checkpoints: tuple[TrainedCheckpoint, ...]
    identity: dict[str, str]
    """What must be equal for a resume to mean anything."""


class State(NamedTuple):
    """A run after `facts.step` optimiser steps."""

    facts: Facts
    tensors: Mapping[str, Tensor]


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for: every process of a gang reads all of them,
    81 GB for a policy of 7B."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safe_open(path, framework="pt"))
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def digest_rows(
    pairs: Iterable[PreferencePair], reference: Mapping[str, ReferenceLogps]
) -> dict[str, str]:
    """Digests of texts and of reference log-probabilities, in the order of `pairs`."""
    texts, logps = hashlib.sha256(), hashlib.sha256()
    for pair in pairs:
        for text in (pair.pair_id, pair.question, pair.chosen, pair.rejected):
            texts.update(f"{len(text)}:{text}".encode())
        logps.update(reference[pair.pair_id].model_dump_json().encode())
    return {"pairs": texts.hexdigest(), "reflogps": logps.hexdigest()}


def save_state(state: State, folder: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, folder / TENSORS)
    (folder / FACTS).write_text(state.facts.model_dump_json(indent=1), encoding="ascii")


def load_state(folder: Path, *, identity: Mapping[str, str]) -> State:
    """Raises ArtifactError when it cannot be read or belongs to another run, naming the part."""
    try:
        facts = Facts.model_validate_json((folder / FACTS).read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{folder / FACTS}: not a training state: {error}") from error
    for name in sorted(facts.identity.keys() | identity.keys()):
        saved, wanted = facts.identity.get(name), identity.get(name)
        if saved != wanted:
            raise ArtifactError(
                f"{folder}: the training state is of another run: {name} is {saved!r}, "
                f"{wanted!r} was expected"
            )
    if not (folder / TENSORS).exists():
        raise ArtifactError(f"{folder}: not a training state: {TENSORS} is missing")
    return State(facts, _Stored(folder / TENSORS))
