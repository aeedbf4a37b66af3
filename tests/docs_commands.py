"""The commands of README and docs: where they stand, and what the real parsers make of them.

A command stands in a fenced `sh` block. It is run by `make docs-run` unless it ends with
`# needs ...` or its block begins with such a line; then it is only parsed. Inline code that begins
with `python -m` or `make` is parsed too, except in the generated table of files: those are words of
docstrings.
"""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from controller.flags import parser as controller_parser
from jobs._flags import parser_of_file
from rlaifv.flags import PROGRAMS
from rlaifv.pipeline import STAGES
from rlaifv.recipes import RECIPES, Wishes, build_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "PERFORMANCE.md",
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "command-reference.md"),
]
OTHERS = {"torchrun", "docker", "kubectl", "aws", "duckdb", "."}
"""Programs that are not ours; whatever they run of ours is parsed."""
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILES = re.compile(r"<!-- generated: files -->.*?<!-- end -->", re.DOTALL)
_INLINE = re.compile(r"`((?:python -m|make) [^`]+)`")
_NEEDS = re.compile(r"(?:^|\s)# needs ")
_STARTS = re.compile(r"\s*(?:\w+=\S+ )*(?:python -m|make|torchrun|docker|kubectl) ", re.MULTILINE)


class Command(NamedTuple):
    """One command line of a page."""

    page: Path
    line: int
    text: str
    runs: bool
    """Whether `make docs-run` runs it: it stands in a block, and is not marked."""
    marked: bool = False
    """Whether it says `# needs ...`."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def commands(page: Path) -> Iterator[Command]:
    """Those of `sh` blocks, in order, then those within sentences."""
    text = page.read_text(encoding="utf-8")
    for block in _FENCE.finditer(text):
        if block[1] != "sh":
            continue
        first = text.count("\n", 0, block.start()) + 2
        lines = re.sub(r"\\\n\s*", " ", block[2]).splitlines()
        marked = bool(lines) and lines[0].startswith("#") and bool(_NEEDS.search(lines[0]))
        for line in lines:
            if line.strip() and not line.startswith("#"):
                needs = marked or bool(_NEEDS.search(line))
                yield Command(page, first, line, runs=not needs, marked=needs)
    for span in _INLINE.finditer(_FENCE.sub("", _FILES.sub("", text))):
        number = text.count("\n", 0, text.index(span[0])) + 1
        yield Command(page, number, " ".join(span[1].split()), runs=False)


def stray(page: Path) -> list[str]:
    """Commands in blocks that are not `sh`, or in indented ones."""
    text = page.read_text(encoding="utf-8")
    found = [b[2] for b in _FENCE.finditer(text) if b[1] != "sh" and _STARTS.match(b[2])]
    rest = _FENCE.sub("", text)
    return found + re.findall(r"^ {4,}(?:python -m|make|torchrun) .*$", rest, re.MULTILINE)


def words_of(text: str) -> list[str]:
    """Without comment, and without the variables set in front."""
    words = shlex.split(text, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


def check(text: str) -> None:
    """Raises ValueError for a command line that our programs would not take."""
    words = words_of(text)
    for start, word in enumerate(words):  # torchrun and docker: what is ours comes last
        if word in ("jobs.train", "jobs.sample") and words[0] in OTHERS:
            return check(f"python -m {shlex.join(words[start:])}")
    if words[0] == "make":
        return _check_make(words[1:])
    if words[:2] != ["python", "-m"]:
        if words[0] not in OTHERS:
            raise ValueError(f"unknown program {words[0]}")
        return None
    program, arguments = words[2], words[3:]
    if program.startswith("tests."):
        if importlib.util.find_spec(program) is None:
            raise ValueError(f"no module {program}")
        return None
    parser = _parser(program)
    if not arguments:  # the name of a program, within a sentence
        return None
    try:
        flags = parser.parse_args(arguments)
    except SystemExit as end:
        if end.code:
            raise ValueError(f"{program} does not take {arguments}") from end
        return None
    return _check_config(program, flags)


def _parser(program: str) -> argparse.ArgumentParser:
    package, _, name = program.partition(".")
    if program == "controller":
        return controller_parser()
    if package == "jobs" and name in STAGES:
        return parser_of_file(ROOT / f"jobs/{name}.py")
    if package == "rlaifv" and name in PROGRAMS:
        return PROGRAMS[name]()
    raise ValueError(f"no program {program}")


def _check_config(program: str, flags: argparse.Namespace) -> None:
    recipe = getattr(flags, "recipe", None)
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe}")
    if program == "controller" and flags.command == "run":
        build_config(Wishes(recipe=flags.recipe, sets=tuple(flags.set)))


def _check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        if "=" not in target and not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
            raise ValueError(f"no make target {target}")
