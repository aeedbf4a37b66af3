"""`python -m controller verify`: recomputes every checksum of a run."""

import hashlib
import json
import re
from collections.abc import Iterator

from pydantic import ValidationError

from controller.loop import read_state
from controller.trees import check_file, tree_files
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import ARTIFACTS, CONFIG, HELD_OUT, choice_key
from rlaifv.records import Instruction, Quarantined, Record
from rlaifv.store import COMPLETE, Manifest, PartInfo, Provenance, Store

_PART = re.compile(r"iteration-\d+/(?:(quarantine|held_out)/)?([a-z]+)/\d{5,}-of-\d{5,}\.parquet")
_MANIFEST = re.compile(r"iteration-\d+/[a-z]+/manifest\.json")


class Problem(Record):
    """Something that differs from what was written."""

    key: str
    problem: str


class Verification(Record):
    """What `verify --json` prints."""

    run: str
    parts: int
    trees: int
    manifests: int
    problems: list[Problem]


class _Check:
    """One pass over a run; what a part says of itself is kept for the manifests and the inputs."""

    def __init__(self, run: Store, keys: frozenset[str]) -> None:
        self._run = run
        self.keys = keys
        self.infos: dict[str, PartInfo] = {}
        self.inputs: dict[str, dict[str, str]] = {}

    def part(self, key: str, record: type[Record]) -> Iterator[Problem]:
        """Reads every page and row."""
        info = self._run.part_info(key)
        origin: Provenance = self._run.provenance(key)
        self.infos[key], self.inputs[key] = info, origin.inputs
        digest, rows = hashlib.sha256(), 0
        for row in self._run.read_part(key, record):
            digest.update(row.model_dump_json().encode() + b"\n")
            rows += 1
        if rows != info.rows:
            yield Problem(key=key, problem=f"{rows} rows, the footer says {info.rows}")
        if digest.hexdigest() != info.rows_sha256:
            text = f"rows have SHA-256 {digest.hexdigest()}, the footer says {info.rows_sha256}"
            yield Problem(key=key, problem=text)

    def manifest(self, key: str) -> Iterator[Problem]:
        """Compares the manifest with the parts themselves."""
        for said in self._run.read_json(key, Manifest).parts:
            found = self.infos.get(said.key)
            if said.key not in self.keys:
                yield Problem(key=said.key, problem=f"not there, but {key} lists it")
            elif found is not None and found != said:
                names = [name for name in PartInfo.model_fields if _differ(said, found, name)]
                yield Problem(key=said.key, problem=f"{', '.join(names)}: not as {key} says")

    def origins(self, key: str) -> Iterator[Problem]:
        """Was the part made from the inputs that lie beside it?"""
        for name, digest in self.inputs[key].items():
            found = self.infos.get(name)
            if found is not None and found.rows_sha256 != digest:
                yield Problem(key=key, problem=f"was made from other rows of {name}")

    def tree(self, tree: str) -> Iterator[Problem]:
        """Digests every file."""
        for file in tree_files(self._run, tree):
            if problem := check_file(self._run, file):
                yield Problem(key=file.key, problem=problem)


def _differ(left: PartInfo, right: PartInfo, name: str) -> bool:
    return bool(getattr(left, name) != getattr(right, name))


def verify(run: Store) -> Verification:
    """Reads everything: manifests' SHA-256, digests of rows, files of trees, inputs, choices.

    What was never finished (a stage without manifest, a tree without marker) is no problem.
    Raises ArtifactError or ConfigError only when the run's configuration cannot be read.
    """
    state = read_state(run, run.read_json(CONFIG, RunConfig), known={})
    check = _Check(run, state.keys)
    keys = sorted(state.keys)
    problems: list[Problem] = []
    parts = [(key, record) for key in keys if (record := _record(key))]
    for key, record in parts:
        problems += _problems(key, check.part(key, record))
    manifests = [key for key in keys if _MANIFEST.fullmatch(key)]
    for key in manifests:
        problems += _problems(key, check.manifest(key))
    for key in sorted(check.inputs):
        problems += check.origins(key)
    trees = sorted(
        tree
        for found in state.trees.values()
        for tree in found
        if f"{tree}/{COMPLETE}" in state.keys
    )
    for tree in trees:
        problems += _problems(tree, check.tree(tree))
    for iteration, choice in state.choices.items():
        if choice.tree is not None and choice.tree not in trees:
            text = f"the chosen tree {choice.tree} is not there"
            problems.append(Problem(key=choice_key(iteration), problem=text))
    return Verification(
        run=str(run),
        parts=len(parts),
        trees=len(trees),
        manifests=len(manifests),
        problems=problems,
    )


def _record(key: str) -> type[Record] | None:
    match = _PART.fullmatch(key)
    if not match:
        return None
    aside: dict[str, type[Record]] = {"quarantine": Quarantined, HELD_OUT: Instruction}
    return aside[match[1]] if match[1] else ARTIFACTS.get(match[2])


def _problems(key: str, found: Iterator[Problem]) -> Iterator[Problem]:
    """The problems of one check; one that cannot go on is a problem itself."""
    try:
        yield from found
    except (ArtifactError, ValidationError) as error:
        yield Problem(key=key, problem=str(error))


def verification_text(found: Verification) -> str:
    """One line per problem; keys come from a listing, so they are quoted."""
    lines = [f"{json.dumps(one.key)[1:-1]}: {_ascii(one.problem)}" for one in found.problems]
    counts = f"{found.parts} parts, {found.manifests} manifests, {found.trees} trees"
    verdict = f"{len(lines)} problems" if lines else "everything is as it was written"
    return "\n".join([*lines, f"{found.run}: {counts} verified: {verdict}"])


def _ascii(text: str) -> str:
    return json.dumps(text)[1:-1]
