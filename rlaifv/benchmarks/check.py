"""Which files a benchmark needs, where users get them, and whether those at hand are complete."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rlaifv.benchmarks.amber import VECTORS, has_vectors, read_data
from rlaifv.benchmarks.coco import find_files, stream
from rlaifv.benchmarks.files import digest, read_rows, text_field
from rlaifv.benchmarks.language import NltkTools, load_pipeline
from rlaifv.benchmarks.mmhal import read_items as read_mmhal
from rlaifv.benchmarks.object_halbench import parse_image_id, read_synonyms
from rlaifv.benchmarks.refomb import read_items as read_refomb
from rlaifv.errors import ArtifactError, ConfigError, RlaifvError

_COCO_IMAGES = 82_783 + 40_504
_PUBLISHED = {
    "b685537b36fe": "synonyms.txt at 6e4d33c",
    "db22a436c483": "annotations.json at 534babf",
    "c4c1491e9bbc": "relation.json at 534babf",
    "f92cf1123f45": "safe_words.txt at 534babf",
}
"""Digests of published files that are known."""
MODES = {
    "object_halbench": ("judge", "rules", "chair"),
    "mmhal": (),
    "refomb": (),
    "amber": ("vectors", "exact"),
}
_AMBER_KINDS = {
    "generative": 1004,
    "state": 4764,
    "number": 2072,
    "action": 792,
    "existence": 4924,
    "relation": 975 + 689,
}


class Need(NamedTuple):
    """A file that a benchmark needs."""

    flag: str
    """Of the command line, without dashes; empty for installed software."""
    what: str
    source: str
    """Where users get it, and its licence."""
    verify: Callable[[Path | None], str]
    """What was found; raises an error of ours that says what is wrong."""
    modes: tuple[str, ...] = ()
    """That need it; empty: all."""


class Finding(NamedTuple):
    """One line of the check."""

    state: Literal["ok", "bad", "not given", "optional"]
    what: str
    detail: str


def check(
    name: str, places: Mapping[str, Path | None], *, mode: str | None = None
) -> list[Finding]:
    """A finding per needed file of benchmark `name`; `places` is keyed by flag.

    With a mode, what other modes need is left out; without one it is optional. Raises ConfigError
    for a mode that the benchmark does not have.
    """
    if mode is not None and mode not in MODES[name]:
        known = ", ".join(MODES[name]) or "none"
        raise ConfigError(f"{name}: --mode {mode}: no such mode; there are: {known}")
    findings = []
    for need in CHECKS[name]:
        if mode is not None and need.modes and mode not in need.modes:
            continue
        place = places.get(need.flag)
        if need.flag and place is None and need.flag != "nltk_data":
            flag = f"--{need.flag.replace('_', '-')}"
            findings.append(Finding("not given", need.what, f"{flag}; get it: {need.source}"))
            continue
        try:
            findings.append(Finding("ok", need.what, need.verify(place)))
        except RlaifvError as error:
            unneeded = need.modes and mode is None
            state: Literal["bad", "optional"] = "optional" if unneeded else "bad"
            findings.append(Finding(state, need.what, f"{error}; get it: {need.source}"))
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """65: something is bad; 78: something was not given; 0: all that is needed is there."""
    states = {finding.state for finding in findings}
    if "bad" in states:
        return ArtifactError.exit_code
    return ConfigError.exit_code if "not given" in states else 0


def source_of(name: str, flag: str | None = None) -> str:
    """What a benchmark needs, or what a flag of it means, and where users get that."""
    needs = [need for need in CHECKS[name] if need.flag and flag in (None, need.flag)]
    wanted = [need for need in needs if flag is not None or need.flag != "nltk_data"]
    return "; ".join(f"{need.what}: {need.source}" for need in wanted)


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ArtifactError(f"{what}: expected {expected}, found {found}")


def _given(path: Path | None) -> Path:
    assert path is not None  # noqa: S101 - `check` asks for given places only
    return path


def _coco(path: Path | None) -> str:
    files = find_files(_given(path))
    images = {
        entry.value.get("id") for file in files.instances for entry in stream(file, ("images",))
    }
    captioned = {
        entry.value.get("id") for file in files.captions for entry in stream(file, ("images",))
    }
    _expect(f"{path}: images in the instances files", len(images), _COCO_IMAGES)
    _expect(f"{path}: images in the captions files", len(captioned), _COCO_IMAGES)
    return f"{len(images)} images"


def _synonyms(path: Path | None) -> str:
    table = read_synonyms(_given(path), "rules")
    _expect(f"{path}: classes", len(table.vocabulary.classes), 80)
    return f"80 classes, {table.name}; {_published(_given(path))}"


def _object_questions(path: Path | None) -> str:
    rows = [
        (parse_image_id(row, "image_id", "image_url"), text_field(row, "question", "prompt"))
        for row in read_rows(_given(path))
    ]
    _expect(f"{path}: distinct images", len({image_id for image_id, _ in rows}), 300)
    _expect(f"{path}: different prompts", len({question for _, question in rows}), 8)
    return "300 images, 8 prompts"


def _mmhal(path: Path | None) -> str:
    _expect(f"{path}: records", len(read_mmhal(str(path))), 96)
    return "96 records, types in their order"


def _refomb(path: Path | None) -> str:
    items = read_refomb(str(path))
    _expect(f"{path}: rows", len(items), 99)
    _expect(f"{path}: questions", len({(one.image_url, one.question) for one in items}), 99)
    _expect(f"{path}: images", len({one.image_url for one in items}), 73)
    return "99 questions on 73 images"


def _amber(path: Path | None) -> str:
    data = read_data(_given(path))
    _expect(
        f"{path}: items per kind", dict(Counter(x.kind for x in data.annotations)), _AMBER_KINDS
    )
    _expect(f"{path}: words of relation.json", len(data.relation), 340)
    _expect(f"{path}: words of safe_words.txt", len(data.safe_words), 9)
    names = ("annotations.json", "relation.json", "safe_words.txt")
    digests = "; ".join(_published(_given(path) / name) for name in names)
    return f"15220 items, 340 words, 9 safe words; {digests}"


def _published(path: Path) -> str:
    known = _PUBLISHED.get(digest(path.read_bytes()))
    return f"equals {known}" if known else f"{path.name}: digest is of no version we know"


def _nltk(path: Path | None) -> str:
    tools = NltkTools(path)
    tools.check(tagger=False)
    return f"{tools.identity}, punkt_tab and wordnet found"


def _tagger(path: Path | None) -> str:
    NltkTools(path).check(tagger=True)
    return "found"


def _pipeline(_: Path | None) -> str:
    return load_pipeline().name


def _vectors(_: Path | None) -> str:
    if not has_vectors():
        raise ArtifactError(f"{VECTORS} is not installed; without it only mode exact runs")
    return VECTORS


_NLTK_SOURCE = (
    "nltk_data of the NLTK project (punkt_tab, averaged_perceptron_tagger_eng, wordnet; licences "
    "per package); docs/benchmarks.md names packages that carry them"
)
CHECKS: dict[str, tuple[Need, ...]] = {
    "object_halbench": (
        Need(
            "questions",
            "obj_halbench_300_with_image.jsonl (300 COCO val2014 images)",
            "release of RLHF-V/RLAIF-V; code Apache-2.0, data CC BY-NC 4.0 by its README",
            _object_questions,
        ),
        Need(
            "coco",
            "{instances,captions}_{train,val}2014.json",
            "https://cocodataset.org, 2014 Train/Val annotations; CC BY 4.0",
            _coco,
        ),
        Need(
            "synonyms",
            "synonym table of 80 classes",
            "data/synonyms.txt of LisaAnne/Hallucination (BSD 2-Clause), or "
            "eval/data/synonyms_refine.txt of RLHF-V/RLAIF-V",
            _synonyms,
        ),
        Need("nltk_data", "NLTK data", _NLTK_SOURCE, _nltk),
        Need("nltk_data", "NLTK tagger (mode chair)", _NLTK_SOURCE, _tagger, ("chair",)),
        Need(
            "", "spaCy pipeline (mode judge)", "explosion/spacy-models, MIT", _pipeline, ("judge",)
        ),
    ),
    "mmhal": (
        Need(
            "questions",
            "mmhal-bench_with_image.jsonl, or mmhal-bench_answer_template.json without images",
            "RLHF-V/RLAIF-V; licence of MMHal-Bench: not confirmed",
            _mmhal,
        ),
    ),
    "refomb": (
        Need(
            "ground_truth",
            "RefoMB_dev.jsonl (descriptions and GPT-4V's answers; images apart)",
            "RLHF-V/RLAIF-V; data CC BY-NC 4.0 by its README",
            _refomb,
        ),
    ),
    "amber": (
        Need(
            "ground_truth",
            "folder with annotations.json, relation.json, safe_words.txt, query_all.json",
            "junyangwang0410/AMBER, data; Apache-2.0 (images apart, see its README)",
            _amber,
        ),
        Need("nltk_data", "NLTK data", _NLTK_SOURCE, _nltk),
        Need("nltk_data", "NLTK tagger", _NLTK_SOURCE, _tagger),
        Need(
            "",
            f"spaCy vectors {VECTORS} (mode vectors)",
            "explosion/spacy-models, MIT",
            _vectors,
            ("vectors",),
        ),
    ),
}
