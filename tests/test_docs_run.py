"""Runs the commands of README and docs as they stand, page by page, in one folder: `make docs-run`.

Only the sizes differ: `python` is a script here that adds tiny settings to `run`. Targets of make
are what CI and the other tests run; here make must know them and what they depend on.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlaifv import demo
from tests.docs_commands import PAGES, ROOT, Command, commands, words_of

pytestmark = pytest.mark.slow
SCENES = 8
SHIM = """#!/bin/sh
if [ "$1 $2 $3" = "-m controller run" ]; then exec {python} "$@" {tiny}; fi
exec {python} "$@"
"""


def tiny_settings(folder: Path) -> str:
    """Flags that make the demo's run a matter of seconds, for a POSIX shell."""
    benchmarks = []
    for name, source, use in (
        ("selection", demo.SELECTION, "select"),
        ("test", demo.TEST, "report"),
    ):
        path = folder / f"{name}.parquet"
        pq.write_table(pq.read_table(demo.PATH / source).slice(0, 6), path)
        vocabulary = str(demo.PATH / demo.VOCABULARY)
        benchmarks.append({"name": name, "path": str(path), "vocabulary": vocabulary, "use": use})
    settings = {
        "prepare.instructions_per_iteration": SCENES,
        "sample.num_answers": 4,
        "shards.group_size": 4,
        "train.epochs": 1,
        "train.min_pairs": 1,
        "respond.benchmarks": benchmarks,
    }
    return " ".join(f"--set '{key}={json.dumps(value)}'" for key, value in settings.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would stand: own pictures, own rows, and the interpreter."""
    here: Path = tmp_path_factory.mktemp("reader")
    (here / "photos").mkdir()
    rows = pq.read_table(demo.PATH / demo.INSTRUCTIONS).slice(0, SCENES).to_pylist()
    with (here / "rows.jsonl").open("w") as lines:
        for number, row in enumerate(rows):
            path = here / "photos" / f"{number}.png"
            path.write_bytes(row["image"]["bytes"])
            question = {"question": row["question"], "image_path": str(path)}
            lines.write(json.dumps(question) + "\n")
    programs, data = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("data")
    (programs / "python").write_text(SHIM.format(python=sys.executable, tiny=tiny_settings(data)))
    (programs / "python").chmod(0o755)
    return here


def run(command: Command, folder: Path, path: str) -> str:
    """The end of what it said; fails with all of it."""
    words = words_of(command.text)
    text = command.text
    if words[0] == ".":
        return "(left out: the environment is this one)"
    if words[0] == "make":
        text = f"make -n -C {ROOT} {' '.join(words[1:])}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["timeout", "--signal=KILL", "600", "bash", "-c", text],  # its children too
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=660,
    )
    said = re.search(r"# .*\bends with (\d+)", text)
    expected = int(said[1]) if said else 0
    assert done.returncode == expected, f"{command}: {command.text}\n{done.stdout[-3000:]}"
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(command.runs for command in commands(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_commands_of_a_page_do_what_the_page_says(page: Path, folder: Path) -> None:
    """README is the first page, so that its run is there for the others."""
    shim = folder.parent / "bin0"
    assert shutil.which("python", path=str(shim))
    path = f"{shim}:{os.environ['PATH']}"
    for command in commands(page):
        if command.runs:
            started = time.monotonic()
            run(command, folder, path)
            print(f"{command}  {time.monotonic() - started:6.1f} s  {command.text.strip()}")


def test_what_readme_ran_is_a_finished_run_with_a_report(folder: Path) -> None:
    assert (folder / "runs/demo/iteration-3/choice.json").is_file()
    report = (folder / "runs/demo/report/index.html").read_text()
    assert report.startswith("<!doctype html>") or "<html" in report[:200]
    assert len(list((folder / "runs/mine/iteration-0/instructions").glob("*.parquet"))) == 2
