"""Rules of the project that a program can check."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from rlaifv import errors, pipeline, records

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("rlaifv", "jobs", "controller") for path in (ROOT / folder).rglob("*.py")
)
READS_ENVIRONMENT = {
    "controller/executors/choose.py",
    "controller/executors/docker.py",
    "controller/executors/local.py",
    "controller/k8s_client.py",
    "controller/paint.py",
    "jobs/_entry.py",
    "jobs/_forkserver.py",
    "jobs/_gang.py",
    "jobs/_indexed.py",
    "rlaifv/benchmark_iteration.py",
    "rlaifv/benchmark_store.py",
    "rlaifv/benchmarks/judge.py",
    "rlaifv/models/endpoint.py",
    "rlaifv/store/_cache.py",
    "rlaifv/store/_s3.py",
    "rlaifv/store/_s3_client.py",
    "rlaifv/training/processes.py",
}


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", sorted(pipeline.STAGES))
def test_every_stage_has_a_job_whose_docstring_says_what_it_reads_and_writes(name: str) -> None:
    stage = pipeline.STAGES[name]
    function = getattr(importlib.import_module(f"jobs.{name}"), name)
    doc = inspect.getdoc(function) or ""
    said = dict(re.findall(r"^(reads|writes): ?(.*)$", doc, re.MULTILINE))
    reads = tuple(part.strip() for part in said["reads"].split(",")) if said["reads"] else ()
    assert (reads, said["writes"]) == (stage.reads, stage.writes)


def test_every_artifact_is_written_by_one_stage() -> None:
    written = [stage.writes for stage in pipeline.STAGES.values()]
    assert sorted(written) == sorted([*pipeline.ARTIFACTS, pipeline.CHOICE])


@pytest.mark.parametrize("record", [*pipeline.ARTIFACTS.values(), records.Quarantined])
def test_a_record_rejects_unknown_fields(record: type[records.Record]) -> None:
    assert record.model_config.get("extra") == "forbid"
    assert record.model_config.get("frozen") is True


def test_exit_codes_are_distinct() -> None:
    classes = [errors.ConfigError, errors.ArtifactError, errors.TransientError]
    assert sorted(each.exit_code for each in classes) == [65, 75, 78]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_named_modules_read_the_environment(path: Path) -> None:
    reads = re.search(r"\bos\.(environ|getenv)\b", path.read_text())
    assert not reads or module_name(path) in READS_ENVIRONMENT


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_file_and_its_functions_keep_to_the_budget(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_broad_handler_cleans_up_and_raises_again(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            name = getattr(node.type, "id", "")
            assert node.type is not None
            broad = name in ("Exception", "BaseException")
            last = node.body[-1]
            assert not broad or (isinstance(last, ast.Raise) and last.exc is None), node.lineno
