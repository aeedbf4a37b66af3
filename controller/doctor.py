"""`python -m controller doctor`: whether a root keeps what a run relies on, and what a recipe lacks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from controller.places import MODELS
from controller.tables import Column, render
from rlaifv.benchmarks.language import NltkTools
from rlaifv.config import ModelSpec, RunConfig
from rlaifv.errors import ArtifactError, ConfigError, RlaifvError
from rlaifv.pipeline import holds_out, labels_grades
from rlaifv.places import local_path
from rlaifv.records import Record
from rlaifv.sources import held_out_rows, iteration_rows, open_source
from rlaifv.store import COMPLETE, Store, open_store, probe

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Outcome = Literal["ok", "note", "fail"]


class Line(Record):
    """One finding."""

    check: str
    outcome: Outcome
    """`fail`: a run would lose or mix data, or could not go on; `note`: worth knowing."""
    text: str


class Diagnosis(Record):
    """What `doctor --json` prints."""

    root: str
    healthy: bool
    findings: list[Line]


class Need(NamedTuple):
    """A file, folder or model that a configuration names."""

    key: str
    """Where in the configuration."""
    name: str
    kind: Literal["model", "source", "file", "server"]
    revision: str | None = None


def diagnose(root: str, config: RunConfig | None = None) -> Diagnosis:
    """Every probe of the store, then what a run of `config` lacks on this machine.

    Raises ConfigError for a root that cannot be meant.
    """
    store = open_store(root)
    lines = [Line(check=f.check, outcome=f.outcome, text=f.text) for f in probe(store)]
    if config is not None:
        lines += recipe_findings(store, config)
    healthy = all(line.outcome != "fail" for line in lines)
    return Diagnosis(root=str(store), healthy=healthy, findings=lines)


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """One line per finding, and the verdict."""
    columns = (Column("check"), Column("outcome"), Column("finding"))
    rows = [(line.check, line.outcome, line.text) for line in diagnosis.findings]
    verdict = "fit for a run" if diagnosis.healthy else "NOT fit for a run: see the lines `fail`"
    return f"{render(columns, rows)}\n{diagnosis.root}: {verdict}"


def check_before_local_run(root: str, config: RunConfig) -> None:
    """Raises ConfigError that lists everything the configuration names and this machine lacks."""
    found = recipe_findings(open_store(root), config)
    if lacking := [f"{line.check}: {line.text}" for line in found if line.outcome == "fail"]:
        raise ConfigError("the run cannot go far:\n  " + "\n  ".join(lacking))


def recipe_findings(root: Store, config: RunConfig) -> Iterator[Line]:
    """One line per thing that the configuration names, and per language resource it needs."""
    for need in _needs(config):
        try:
            outcome, text = _look(root, need)
        except (ConfigError, ArtifactError) as error:
            outcome, text = "fail", str(error)
        yield Line(check=need.key, outcome=outcome, text=text)
    if "prepare" in config.stages and Path(local_path(config.prepare.source)).exists():
        yield _rows_of_source(config)
    yield from _language_findings(config)
    if not config.respond.benchmarks:
        chosen = (
            "held-out questions choose, and their figures are shown"
            if holds_out(config)
            else "the last checkpoint is taken, and nothing is measured"
        )
        text = f"none named: {chosen}"
        yield Line(check="respond.benchmarks", outcome="note", text=text)


def _rows_of_source(config: RunConfig) -> Line:
    """Whether the last iteration finds instructions that none before has taken."""
    held_out = holds_out(config)
    try:
        count = len(open_source(config.prepare))
        aside = 0
        if held_out is not None and held_out.coco is None:
            aside = len(held_out_rows(count, held_out.num_instructions, seed=config.seed))
        last = config.iterations - 1
        iteration_rows(count, config.prepare, seed=config.seed, iteration=last, held_out=aside)
    except RlaifvError as error:
        return Line(
            check="prepare.source", outcome="fail", text=str(error).removeprefix("prepare.source: ")
        )
    text = f"{count} rows, for {config.iterations} iterations"
    return Line(check="prepare.source", outcome="ok", text=text)


def _language_findings(config: RunConfig) -> Iterator[Line]:
    """NLTK's data for what is scored by objects: hours of sampling come before the first score."""
    wanted = {
        f"benchmark {one.name}.nltk_data": (one.nltk_data, one.mode == "chair")
        for one in config.respond.benchmarks
        if one.kind == "object_halbench"
    }
    if (held_out := holds_out(config)) and held_out.coco is not None:
        wanted["choose.held_out.nltk_data"] = (held_out.nltk_data, True)
    for key, (folder, tagger) in wanted.items():
        try:
            NltkTools(None if folder is None else Path(local_path(folder))).check(tagger=tagger)
        except ModuleNotFoundError as error:
            yield Line(check=key, outcome="note", text=f"{error}; not looked for on this machine")
        except RlaifvError as error:
            yield Line(check=key, outcome="fail", text=str(error))
        else:
            yield Line(check=key, outcome="ok", text="what `grade` reads is found")


def _needs(config: RunConfig) -> Iterator[Need]:
    """Of the stages that the run has."""
    stages, named = set(config.stages), dict[str, str | None]()
    yield _model("policy", config.policy)
    if "verify" in stages or labels_grades(config):
        yield _model("verify.labeller", config.verify.labeller)
    if "claim" in stages or labels_grades(config):
        if config.claim.model.family != "rules":
            yield _model("claim.model", config.claim.model)
        named["claim.split_prompt"] = config.claim.split_prompt
        named["claim.question_prompt"] = config.claim.question_prompt
    if "prepare" in stages:
        yield Need("prepare.source", config.prepare.source, "source")
        named["prepare.questions"] = config.prepare.questions
    for one in config.respond.benchmarks:
        key = f"benchmark {one.name}"
        named |= {
            f"{key}.{field}": getattr(one, field)
            for field in ("path", "vocabulary", "images", "coco", "nltk_data")
        }
        named[f"{key}.judge.prompt"] = one.judge.prompt if one.judge else None
    if held_out := holds_out(config):
        key = "choose.held_out"
        named |= {
            f"{key}.{field}": getattr(held_out, field)
            for field in ("coco", "images", "vocabulary", "nltk_data")
        }
        named |= {f"{key}.exclude {n}": name for n, name in enumerate(held_out.exclude)}
    for key, name in named.items():
        if name is not None:
            yield Need(key, name, "file")


def _model(key: str, spec: ModelSpec) -> Need:
    if spec.endpoint:
        return Need(f"{key}.endpoint.url", spec.endpoint.url, "server")
    return Need(f"{key}.path", spec.path, "model", spec.revision)


def _look(root: Store, need: Need) -> tuple[Outcome, str]:
    if need.name.startswith("s3://"):
        return _look_in_store(need.name)
    if need.kind == "server":
        return "note", f"{need.name}: must answer where the stages run; not asked from here"
    path = local_path(need.name)
    if path.exists():
        return "ok", f"{need.name}: found"
    if need.kind == "file" or not HUB_ID.fullmatch(need.name):
        return "fail", f"{need.name}: no such file or folder on this machine"
    if need.kind == "source":
        return "note", f"{need.name}: taken for a data set of the hub; not looked for there"
    for key in (f"{MODELS}/{need.name}", f"{MODELS}/{need.name}@{need.revision}"):
        if root.tree_exists(key):
            return "note", f"{need.name}: imported; name it with --set {need.key}={root}/{key}"
    return _look_in_hub_cache(need)


def _look_in_store(uri: str) -> tuple[Outcome, str]:
    parent, _, key = uri.rstrip("/").rpartition("/")
    store = open_store(parent)
    if store.tree_exists(key) or store.exists(key):
        return "ok", f"{uri}: found"
    return "fail", f"{uri}: no such object, and no complete tree (no {COMPLETE})"


def _look_in_hub_cache(need: Need) -> tuple[Outcome, str]:
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ModuleNotFoundError:
        return "note", f"{need.name}: a hub id; huggingface_hub is not installed here to look"
    cached = try_to_load_from_cache(need.name, "config.json", revision=need.revision)
    if isinstance(cached, str) and list(Path(cached).parent.glob("*.safetensors")):
        return "ok", f"{need.name}: in the hub's cache on this machine"
    advice = f"python -m controller import model {need.name}"
    if constants.HF_HUB_OFFLINE:
        return "fail", f"{need.name}: not in the hub's cache, and HF_HUB_OFFLINE is set; {advice}"
    return "note", f"{need.name}: to be downloaded from the hub by every machine; or {advice}"
