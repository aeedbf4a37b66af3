"""The three flags of every stage; imports no library, so that `--help` is instant."""

import argparse
import ast
import sys
from pathlib import Path

from rlaifv.cli import Parser


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of the stage `name`: `--run --iteration --shard`, for ever."""
    made = Parser(prog=f"python -m jobs.{name}", description=doc)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--run", required=True, help="URI of the run, e.g. file:///runs/demo")
    made.add_argument("--iteration", required=True, type=int, help="0, 1, 2, ...")
    made.add_argument("--shard", default="0/1", help="which shard of how many, e.g. 3/8")
    return made


def parser_of_file(path: Path) -> argparse.ArgumentParser:
    """The same by a stage's file, read but not imported."""
    name = path.stem
    functions = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return parser(name, ast.get_docstring(next(functions)))


def look_first(file: str) -> None:
    """Parses the command line before a stage imports anything; `main` parses again.

    Help and mistakes then end at once.
    """
    parser_of_file(Path(file)).parse_args(sys.argv[1:])
