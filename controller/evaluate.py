"""`python -m controller evaluate`: benchmarks of any model, as a run of two stages."""

import argparse
import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pydantic import ValidationError

from controller.doctor import HUB_ID
from controller.places import run_place, shown
from controller.run import Order, run_config
from controller.tables import Column, render
from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.check import MODES, source_of
from rlaifv.benchmarks.estimate import estimate
from rlaifv.config import BenchmarkSpec, JudgeConfig, RunConfig
from rlaifv.errors import ConfigError
from rlaifv.pipeline import CONFIG, Shard, num_shards, part_key
from rlaifv.places import local_path
from rlaifv.recipes import Wishes, change_config, evaluation
from rlaifv.records import Count, Grade, Record
from rlaifv.store import Store

EVALUATION = "report/evaluation.json"
PUBLISHED = ("object_halbench", "mmhal", "refomb", "amber")
JUDGED = ("object_halbench", "mmhal", "refomb")
NEEDS = {
    "object_halbench": ("vocabulary", "coco", "nltk_data"),
    "amber": ("nltk_data",),
    "objects": ("vocabulary",),
    "mmhal": (),
    "refomb": (),
}
"""Fields of `BenchmarkSpec` by kind that name further files."""
SUFFIXES = (".jsonl", ".json", ".parquet")
SPREAD = "_spread"


class Wanted(NamedTuple):
    """What is to be evaluated, on what."""

    model: str
    benchmarks: tuple[str, ...]
    """`name` or `name=path`."""
    data: str
    """Folder in which bare names are looked for."""
    coco: str | None = None
    synonyms: str | None = None
    nltk_data: str | None = None
    judge: JudgeConfig | None = None
    prompts: Mapping[str, str] = MappingProxyType({})
    """Files that replace our wording, by benchmark."""
    modes: Mapping[str, str] = MappingProxyType({})
    """Modes that are not the default, by benchmark."""


class BenchmarkResult(Record):
    """The metrics of one benchmark, and what made them."""

    benchmark: str
    kind: str
    graded_by: list[str]
    """Mode, tables, tools, judge and its settings, as every grade says; one entry unless parts
    were graded differently."""
    questions: Count
    repeats: Count
    metrics: dict[str, float | None]
    """None: undefined, because a denominator is 0; of a `_spread`: not measured."""
    judge_models: list[str]
    """Names that the endpoint gave itself."""
    input_tokens: Count
    """Of the judge, for the replies used, cached ones included."""
    output_tokens: Count
    cost: float | None
    """Of these tokens at the judge's prices; None without prices."""


class Evaluation(Record):
    """`report/evaluation.json`."""

    model: str
    """Path, family, dtype, batch size and digest of the weights."""
    num_beams: Count
    max_new_tokens: Count
    results: list[BenchmarkResult]


def read_flags(flags: argparse.Namespace, command: tuple[str, ...]) -> tuple[Order, Wanted]:
    """What the command line asks for; raises ConfigError for judge flags that are not allowed."""
    prices = {"input_price": flags.input_price, "output_price": flags.output_price}
    given = {
        "model": flags.judge_model,
        "temperature": flags.judge_temperature,
        "swap": flags.swap or None,
        "repeats": flags.repeats,
        **prices,
    }
    given = {key: value for key, value in given.items() if value is not None}
    settings = [*given, *(["prompt"] if flags.judge_prompt else [])]
    if settings and flags.judge is None:
        names = ", ".join(settings)
        raise ConfigError(f"{names}: settings of a judge, but there is no --judge URL")
    try:
        judge = JudgeConfig(url=flags.judge, **given) if flags.judge is not None else None
    except ValidationError as error:
        raise ConfigError(f"judge flags: {error}") from error
    name = flags.name or default_name(flags.model)
    order = Order(
        Wishes(config_file=flags.config, sets=tuple(flags.set), name=name),
        root=flags.root,
        executor=flags.executor,
        workers=flags.workers,
        threads=flags.threads,
        isolated=flags.isolated,
        cluster=flags.cluster,
        command=command,
    )
    wanted = Wanted(
        flags.model,
        tuple(part.strip() for part in flags.benchmarks.split(",")),
        flags.data or f"{flags.root.rstrip('/')}/benchmarks",
        *(flags.coco, flags.synonyms, flags.nltk_data),
        judge,
        _prompts(flags.judge_prompt),
        _modes(flags.mode),
    )
    return order, wanted


def _prompts(texts: Sequence[str]) -> dict[str, str]:
    prompts = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in JUDGED:
            raise ConfigError(
                f"--judge-prompt {text}: expected NAME=FILE with one of {', '.join(JUDGED)}"
            )
        prompts[name] = _absolute(path, f"--judge-prompt {name}")
    return prompts


def _modes(texts: Sequence[str]) -> dict[str, str]:
    modes = {}
    for text in texts:
        name, _, mode = text.partition("=")
        if mode not in MODES.get(name, ()):
            known = "; ".join(f"{one}: {', '.join(each)}" for one, each in MODES.items() if each)
            raise ConfigError(f"--mode {text}: expected NAME=MODE; there are: {known}")
        modes[name] = mode
    return modes


def default_name(model: str) -> str:
    """`eval-` and the last word of the model's path, as a run may be called."""
    last = re.split(r"[/@]", model.rstrip("/"))[-1].lower()
    return f"eval-{re.sub(r'[^a-z0-9]+', '-', last)[:35].strip('-')}".rstrip("-")


def evaluate(order: Order, wanted: Wanted) -> int:
    """Answers, grades, and a table; returns the exit code. Typed again, it goes on.

    Raises ConfigError for a model that is not there, and at once for all benchmarks that are
    unknown, lack a file, or need a judge.
    """
    model = _model_path(wanted.model)
    specs = benchmark_specs(wanted)
    config = change_config(evaluation(model, specs), order.wishes)
    for line in estimates(config):
        print(line, flush=True)
    if code := run_config(order, config):
        return code
    place = run_place(order.root, config.name)
    found = read_evaluation(place.store)
    text = json.dumps(found.model_dump(), indent=1) + "\n"
    place.store.write_bytes(EVALUATION, text.encode())
    print(evaluation_table(found))
    print(f"evaluation: {shown(place.uri, EVALUATION)}")
    return 0


def estimates(config: RunConfig) -> Iterator[str]:
    """A line per judged benchmark: what the judge will be asked at most."""
    for spec in config.respond.benchmarks:
        found = estimate(spec, answer_tokens=config.respond.max_new_tokens)
        if found is not None:
            cost = "no prices given" if found.max_cost is None else f"cost {found.max_cost:.4g}"
            yield (
                f"{spec.name}: the judge is asked at most {found.requests} times (less what is "
                f"cached), at most {found.input_tokens} input and {found.max_output_tokens} output "
                f"tokens, {cost}"
            )


def benchmark_specs(wanted: Wanted) -> tuple[BenchmarkSpec, ...]:
    """What the names mean; raises ConfigError with everything that is missing."""
    specs, problems = [], []
    for text in wanted.benchmarks:
        try:
            spec = benchmark_spec(text, wanted)
            load_benchmark(spec)  # refuses what it cannot do before a model is loaded
        except ConfigError as error:
            problems.append(str(error))
            continue
        specs.append(spec)
        problems += [f"--benchmarks {spec.name}: {problem}" for problem in _missing(spec)]
    if problems:
        raise ConfigError("\n  ".join(["not everything is here:", *problems][len(problems) < 2 :]))
    return tuple(specs)


def _missing(spec: BenchmarkSpec) -> Iterator[str]:
    """Files that grading needs and that the specification leaves out."""
    if spec.kind == "object_halbench":
        for field, flag in (("coco", "coco"), ("vocabulary", "synonyms")):
            if getattr(spec, field) is None:
                yield f"no --{flag}: {source_of(spec.kind, flag)}"


def benchmark_spec(text: str, wanted: Wanted) -> BenchmarkSpec:
    """The benchmark that `name` or `name=path` means.

    Raises ConfigError for a name without path that is not a published benchmark, and for files
    that are not there.
    """
    name, equals, path = text.partition("=")
    if not name or (equals and not path):
        raise ConfigError(f"--benchmarks {text!r}: expected NAME or NAME=PATH")
    kind = name if name in PUBLISHED else "objects"
    if not equals:
        if kind == "objects":
            close = difflib.get_close_matches(name, PUBLISHED, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"--benchmarks {name}: expected one of {', '.join(PUBLISHED)}, or NAME=PATH{hint}"
            )
        path = _located(wanted.data, name, () if kind == "amber" else SUFFIXES) or ""
    elif ":" not in path:
        path = _absolute(path, f"--benchmarks {name}")
    if not path:
        raise ConfigError(
            f"--benchmarks {name}: neither a folder nor a file {name} ({', '.join(SUFFIXES)}) in "
            f"{wanted.data}; name it ({name}=PATH) or say where it is (--data DIR); get it: "
            f"{source_of(name)}"
        )
    data = {field: _data_file(wanted, field) for field in NEEDS[kind]}
    judge = wanted.judge if kind in JUDGED else None
    if judge is not None:
        judge = judge.model_copy(update={"prompt": wanted.prompts.get(name)})
    return BenchmarkSpec.model_validate(
        {
            "name": name,
            "kind": kind,
            "path": path,
            "judge": judge,
            "mode": wanted.modes.get(name),
            **data,
        }
    )


def _data_file(wanted: Wanted, field: str) -> str | None:
    """What was named for a field of `BenchmarkSpec`, what is in the data folder, or None."""
    name, given, suffixes = {
        "vocabulary": ("synonyms", wanted.synonyms, (".txt",)),
        "coco": ("coco", wanted.coco, ()),
        "nltk_data": ("nltk-data", wanted.nltk_data, ()),
    }[field]
    if given is not None:
        return given if ":" in given else _absolute(given, f"--{name}")
    return _located(wanted.data, name, suffixes)


def _located(data: str, name: str, suffixes: Sequence[str]) -> str | None:
    """The file `data/name.<suffix>`, the only such file in `data/name`, or (no suffix) a folder."""
    if data.startswith("s3://"):
        return None
    place = local_path(data) / name
    if not suffixes:
        return str(place.absolute()) if place.is_dir() else None
    files = [place.with_name(f"{name}{suffix}") for suffix in suffixes]
    if place.is_dir():
        files += [path for path in sorted(place.iterdir()) if path.suffix in suffixes]
    found = [path for path in files if path.is_file()]
    return str(found[0].absolute()) if len(found) == 1 else None


def _absolute(path: str, what: str) -> str:
    """Stages may run elsewhere, so paths go into the configuration as absolute ones."""
    if not Path(path).exists():
        raise ConfigError(f"{what}: {path}: no such file or folder")
    return str(Path(path).absolute())


def _model_path(model: str) -> str:
    """A folder made absolute, or a name; raises ConfigError for a folder that is not there."""
    if Path(model).exists():
        return str(Path(model).absolute())
    if ":" not in model and not HUB_ID.fullmatch(model):
        raise ConfigError(f"--model {model}: no such folder, and no hub id (OWNER/NAME)")
    return model


def read_evaluation(run: Store) -> Evaluation:
    """The metrics of the stored grades of a complete run of `evaluate`."""
    config = run.read_json(CONFIG, RunConfig)
    count = num_shards(config, "grade")
    grades: dict[str, list[Grade]] = defaultdict(list)
    for index in range(count):
        for row in run.read_part(part_key(0, "grades", Shard(index, count)), Grade):
            grades[row.benchmark].append(row)
    notes = run.provenance(part_key(0, "responses", Shard(0, count))).notes
    return Evaluation(
        model=notes["model"],
        num_beams=config.respond.num_beams,
        max_new_tokens=config.respond.max_new_tokens,
        results=[_result(spec, grades[spec.name]) for spec in config.respond.benchmarks],
    )


def _result(spec: BenchmarkSpec, grades: Sequence[Grade]) -> BenchmarkResult:
    values = [json.loads(grade.value) for grade in grades]
    inputs = sum(value.get("input_tokens", 0) for value in values)
    outputs = sum(value.get("output_tokens", 0) for value in values)
    prices = (spec.judge.input_price, spec.judge.output_price) if spec.judge else (None, None)
    cost = None
    if prices[0] is not None and prices[1] is not None:
        cost = (inputs * prices[0] + outputs * prices[1]) / 1e6
    return BenchmarkResult(
        benchmark=spec.name,
        kind=spec.kind,
        graded_by=sorted({grade.judge for grade in grades}),
        questions=len({grade.question_id for grade in grades}),
        repeats=len({grade.repeat for grade in grades}),
        metrics=load_benchmark(spec).metrics(grades),
        judge_models=sorted({value.get("judge_model") or "" for value in values} - {""}),
        input_tokens=inputs,
        output_tokens=outputs,
        cost=cost,
    )


def evaluation_table(found: Evaluation) -> str:
    """Metrics of each benchmark for people, and below it who graded."""
    columns = [Column("benchmark"), Column("metric")]
    columns += [Column("value", right=True), Column("spread", right=True)]
    rows = [row for result in found.results for row in _rows(result)]
    notes = (
        f"{one.benchmark}: {one.questions} questions, {one.repeats} judging(s); {by}"
        for one in found.results
        for by in one.graded_by
    )
    return "\n".join([f"model: {found.model}", render(columns, rows), *notes, *_costs(found)])


def _rows(result: BenchmarkResult) -> Iterable[tuple[str, str, str, str]]:
    metrics: Mapping[str, float | None] = result.metrics
    for name, value in metrics.items():
        if not name.endswith(SPREAD):
            spread = ""
            if f"{name}{SPREAD}" in metrics:
                measured = metrics[f"{name}{SPREAD}"]
                spread = "not measured" if measured is None else f"{measured:.3g}"
            yield result.benchmark, name, "-" if value is None else f"{value:.4g}", spread


def _costs(found: Evaluation) -> Iterable[str]:
    for one in found.results:
        if one.input_tokens or one.output_tokens:
            cost = "" if one.cost is None else f", cost {one.cost:.4g}"
            yield (
                f"{one.benchmark}: judged by {', '.join(one.judge_models)}: {one.input_tokens} "
                f"input and {one.output_tokens} output tokens{cost}"
            )
