"""Writes the generated parts of the docs (`make docs`), or checks that they are true (`--check`).

A generated part lies between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from controller.flags import parser as controller_parser
from controller.k8s_settings import IMAGE_OF
from jobs import _flags
from rlaifv import config, flags, pipeline, records

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def tracked_files() -> list[str]:
    """Files of the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(
        name for name in set(listing.stdout.split("\n")) if name and (ROOT / name).exists()
    )


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def file_table() -> str:
    """Every Python module outside tests, and its role in its own words."""
    lines = ["| file | role |", "|---|---|"]
    for name in tracked_files():
        if name.endswith(".py") and not name.startswith("tests/"):
            role = first_sentence(ROOT / name)
            if role:
                lines.append(f"| `{name}` | {role} |")
    return "\n".join(lines) + "\n"


def stage_table() -> str:
    """The stages as `rlaifv/pipeline.py` has them."""
    lines = ["| stage | reads | writes | runs on | image |", "|---|---|---|---|---|"]
    for stage in pipeline.STAGES.values():
        reads = ", ".join(stage.reads) or "the source"
        image = IMAGE_OF.get(stage.name, "gpu")
        lines.append(f"| `{stage.name}` | {reads} | {stage.writes} | {stage.runs_on} | {image} |")
    return "\n".join(lines) + "\n"


def field_notes(owner: type) -> dict[str, str]:
    """The docstring under each field of a class."""
    (body,) = (node for node in ast.parse(inspect.getsource(owner)).body)
    if not isinstance(body, ast.ClassDef):
        raise TypeError(f"{owner} is not a class")
    notes: dict[str, str] = {}
    previous = ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            previous = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous:
            notes[previous] = " ".join(str(node.value.value).split())
            previous = ""
    return notes


def artifact_reference() -> str:
    """Columns of every artifact, from the records."""
    parts = []
    for artifact, record in pipeline.ARTIFACTS.items():
        notes = field_notes(record)
        doc = " ".join((record.__doc__ or "").split())
        parts.append(f"### {artifact}\n\n{doc}\n\n| column | type | |\n|---|---|---|")
        for field in records.arrow_schema(record):
            kind = "image" if str(field.type).startswith("struct<bytes") else str(field.type)
            parts.append(f"| `{field.name}` | {kind} | {notes.get(field.name, '')} |")
        parts.append("")
    return "\n".join(parts)


def config_reference() -> str:
    """Every configuration key with its default and source."""
    sections = {
        name: field.annotation
        for name, field in config.RunConfig.model_fields.items()
        if inspect.isclass(field.annotation) and issubclass(field.annotation, config.Section)
    }
    parts = _keys("the run", config.RunConfig, prefix="", without=sections)
    for name, section in sections.items():
        parts += _keys(name, section, prefix=f"{name}.", without=())
    return "\n".join(parts)


def _keys(
    title: str, section: type[config.Section], *, prefix: str, without: Collection[str]
) -> list[str]:
    """A table of a section's own keys."""
    notes = field_notes(section)
    doc = " ".join((section.__doc__ or "").split())
    lines = [f"### {title}\n\n{doc}\n\n| key | default | |\n|---|---|---|"]
    for key, inner in section.model_fields.items():
        if key in without:
            continue
        default = "(required)" if inner.is_required() else repr(inner.default)
        if isinstance(inner.default, config.ModelSpec):
            default = inner.default.path
        lines.append(f"| `{prefix}{key}` | `{default}` | {notes.get(key, '')} |")
    return [*lines, ""]


def parsers() -> list[argparse.ArgumentParser]:
    """Of every program: `python -m controller`, the stages, `python -m rlaifv.*`."""
    stage = _flags.parser("STAGE", f"One shard of a stage: {', '.join(pipeline.STAGES)}.")
    return [controller_parser(), stage, *(make() for make in flags.PROGRAMS.values())]


def command_reference() -> str:
    """Every command with its arguments, from the parsers themselves."""
    parts = []
    waiting = [(parser, "") for parser in parsers()]
    while waiting:
        parser, purpose = waiting.pop(0)
        inner: list[tuple[argparse.ArgumentParser, str]] = []
        lines = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
                inner += [(each, helps[name]) for name, each in action.choices.items()]
            elif action.dest != "help" and action.help != argparse.SUPPRESS:
                needed = "required; " if action.option_strings and action.required else ""
                lines.append(f"| `{argument(action)}` | {needed}{action.help} |")
        waiting = inner + waiting
        about = purpose or (parser.description or "").split("\n")[0]
        parts.append(f"### `{parser.prog}`\n\n{about}\n")
        if lines:
            parts.append("\n".join(["| argument | |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts) + "\n"


def argument(action: argparse.Action) -> str:
    """A flag or a positional argument as one types it."""
    name = ", ".join(action.option_strings)
    value = action.metavar or (action.dest.upper() if name else action.dest)
    if action.choices is not None:
        value = " or ".join(map(str, action.choices))
    if action.nargs == 0:
        return name
    if not name:
        return f"[{value}]" if action.nargs in ("?", "*") else str(value)
    return f"{name} {value}"


GENERATORS: dict[str, Callable[[], str]] = {
    "files": file_table,
    "stages": stage_table,
    "artifacts": artifact_reference,
    "config": config_reference,
    "commands": command_reference,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        fresh = PART.sub(lambda m: f"{m[1]}{GENERATORS[m[2]]()}{m[4]}", text)
        if fresh != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(fresh)
    if stale:
        sys.stdout.write(f"{'stale' if check else 'written'}: {', '.join(stale)}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
