"""Every command and flag of `python -m controller`; imports nothing, so that `--help` is instant."""

import argparse
from pathlib import Path

from controller.completion import SHELLS
from controller.k8s_cli import add_commands
from rlaifv.cli import Parser

EXAMPLES = """\
examples (docs/commands.md has one for every command):
  python -m controller run --iterations 4            the demo: four iterations in a few minutes
  python -m controller run --set seed=1 --name demo-1
  python -m controller status                        how far the only run below ./runs is
  python -m controller show pairs --limit 3          rows of an artifact, as JSON lines
  python -m controller verify demo                   recompute every checksum of a run

exit codes: 0 done, 65 data missing or damaged, 75 try again, 78 a mistake in what was asked for,
1 a bug, 130 Ctrl-C; of status also 1 failed, 3 running, 4 interrupted (docs/recovery.md)
"""
RUN_HELP = "name below --root, or a path or URI (default: the only one)"
JSON_HELP = "for programs"


def parser() -> argparse.ArgumentParser:
    """Every command and flag there is."""
    top: argparse.ArgumentParser = Parser(
        prog="python -m controller",
        description="Runs RLAIF-V: sample, verify, pair, train, choose, and again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _run_flags(commands.add_parser("run", help="start a run, or go on with it"))
    _evaluate_flags(commands.add_parser("evaluate", help="benchmarks of any model"))
    _train_flags(commands.add_parser("train", help="DPO on pairs that exist already"))
    status = commands.add_parser(
        "status",
        help="how far a run is, what went wrong, what to do next",
        description="How far a run is, what went wrong, and what to do next.",
        epilog="exit codes: 0 finished, 1 failed, 3 running, 4 interrupted; errors as everywhere",
    )
    _run_argument(status)
    status.add_argument("--watch", action="store_true", help="again and again while it runs")
    status.add_argument("--json", action="store_true", help=JSON_HELP)
    status.add_argument(
        "--executor",
        choices=("local", "kubernetes"),
        default="local",
        help="kubernetes: also who drives it there, and what runs, waits and failed",
    )
    status.add_argument("--cluster", type=Path, metavar="FILE", help="the cluster's settings")
    add_commands(commands, run_flags=_run_flags, run_argument=_run_argument)
    report = commands.add_parser("report", help="write report/index.html and summary.json anew")
    _run_argument(report)
    _compare_flags(commands.add_parser("compare", help="settings, metrics, answers of two runs"))
    _reading_flags(commands)
    _export_flags(commands.add_parser("export", help="pairs or a checkpoint as a hub folder"))
    _fork_flags(commands.add_parser("fork", help="a new run that keeps the first stages of one"))
    _import_flags(commands.add_parser("import", help="copy a model or benchmark below the root"))
    gc = commands.add_parser("gc", help="what a run no longer needs; a dry run by default")
    _run_argument(gc)
    gc.add_argument("--delete", action="store_true", help="remove it (default: only list it)")
    gc.add_argument(
        "--older-than",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="age of unfinished uploads, trees and temporaries (default: 24)",
    )
    gc.add_argument("--json", action="store_true", help=JSON_HELP)
    doctor = commands.add_parser("doctor", help="prove that a root keeps what a run relies on")
    _root_flag(doctor)
    doctor.add_argument("--recipe", help="also: what a run of this recipe lacks here")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the recipe")
    _set_flag(doctor)
    doctor.add_argument("--json", action="store_true", help=JSON_HELP)
    completion = commands.add_parser("completion", help="a script for your shell's TAB key")
    completion.add_argument("shell", choices=SHELLS, help="whose script to print")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _hours(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours")
    return number


def _root_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", default="runs", help="path or URI (default: ./runs)")


def _set_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one value, after --config; may be repeated",
    )


def _run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", nargs="?", help=RUN_HELP)
    command.add_argument("--root", default="runs", help="where runs lie (default: ./runs)")


def _reading_flags(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    listing = commands.add_parser("ls", help="the runs below the root, or the artifacts of a run")
    listing.add_argument("run", nargs="?", help="name below --root, or a path or URI")
    _root_flag(listing)
    show = commands.add_parser("show", help="print config, table, choice, pair ID, or rows")
    show.add_argument("what", help="config, table, choice, pair ID, instructions, answers, ...")
    show.add_argument("names", nargs="*", metavar="[ID] [RUN]", help=f"ID: for pair; {RUN_HELP}")
    _root_flag(show)
    show.add_argument(
        "--iteration", type=_natural, help="default: 0; a pair is looked for in all of them"
    )
    show.add_argument("--limit", type=_positive, default=10, help="rows at most (default: 10)")
    show.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only rows with this value, e.g. instruction_id=000000007; may be repeated",
    )
    lineage = commands.add_parser("lineage", help="inputs, code, images, seconds of an artifact")
    lineage.add_argument("what", help="instructions, answers, claims, ...")
    _run_argument(lineage)
    lineage.add_argument("--iteration", type=_natural, default=0, help="default: 0")
    verify = commands.add_parser("verify", help="recompute every checksum of a run")
    _run_argument(verify)
    for command in (listing, show, lineage, verify):
        command.add_argument("--json", action="store_true", help=JSON_HELP)


def _compare_flags(command: argparse.ArgumentParser) -> None:
    for name in ("run_a", "run_b"):
        command.add_argument(name, help="name below --root, or a path or URI")
    _root_flag(command)
    command.add_argument("--limit", type=_natural, default=5, help="answers side by side (5)")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    command.add_argument("--json", action="store_true", help=JSON_HELP)


def _export_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", choices=("pairs", "checkpoint"), help="what to take away")
    command.add_argument("--format", choices=("hf",), default="hf", help="Hugging Face's layout")
    _run_argument(command)
    command.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="new folder; must be absent or empty"
    )
    command.add_argument(
        "--iteration",
        type=_natural,
        help="default: the pairs of all; the checkpoint that the last choice left",
    )


def _import_flags(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    model = kinds.add_parser("model", help="weights, from a folder or the hub")
    model.add_argument("source", metavar="ID_OR_PATH[@REVISION]", help="of the model")
    model.add_argument("--name", help="below <root>/models/ (default: the id, or the folder's)")
    _root_flag(model)
    benchmark = kinds.add_parser("benchmark", help="a file or folder of questions or images")
    benchmark.add_argument("name", help="below <root>/benchmarks/")
    benchmark.add_argument("source", metavar="PATH", help="of the file or folder")
    _root_flag(benchmark)


def _fork_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="name below --root, or a path or URI")
    command.add_argument("new", help="name of the new run, beside the old one")
    command.add_argument(
        "--from",
        dest="start",
        required=True,
        metavar="STAGE[@ITERATION]",
        help="the first stage to be computed anew (iteration: 0)",
    )
    _set_flag(command)
    _root_flag(command)


def _run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", default="demo", help="the configuration to begin with (demo)")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the recipe")
    _set_flag(command)
    command.add_argument("--iterations", type=int, help="how often to go round; may grow later")
    command.add_argument("--seed", type=int, help="the same as --set seed=...")
    command.add_argument("--name", help="the run's name (default: the recipe's)")
    _root_flag(command)
    _executor_flags(command)
    _processes_flag(command)


def _evaluate_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="PATH", help="folder, hub id or URI")
    command.add_argument(
        "--benchmarks",
        required=True,
        metavar="NAME[=PATH],...",
        help="object_halbench, mmhal, refomb, amber; another name is a benchmark of objects",
    )
    command.add_argument("--data", metavar="DIR", help="their files (default: ROOT/benchmarks)")
    for name in ("coco", "synonyms", "nltk-data"):
        command.add_argument(f"--{name}", metavar="PATH", help=f"default: DATA/{name}")
    command.add_argument(
        "--mode",
        action="append",
        default=[],
        metavar="NAME=MODE",
        help="object_halbench: judge, rules, chair; amber: vectors, exact (default: the first "
        "that can be)",
    )
    command.add_argument("--judge", metavar="URL", help="any OpenAI-compatible endpoint")
    command.add_argument("--judge-model", help="default: the judge of the published scores")
    command.add_argument(
        "--judge-prompt",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="replaces our wording for a benchmark; may be repeated",
    )
    command.add_argument("--judge-temperature", type=float, help="default: 0")
    command.add_argument("--swap", action="store_true", help="refomb: both orders of the answers")
    command.add_argument("--repeats", type=_positive, help="judgings per answer")
    command.add_argument("--input-price", type=float, help="of the judge, per million tokens")
    command.add_argument("--output-price", type=float, help="the same for what it writes")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML: other settings")
    _set_flag(command)
    command.add_argument("--name", help="the run's name (default: eval- and the model's)")
    _root_flag(command)
    _executor_flags(command)


def _train_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pairs",
        required=True,
        metavar="SOURCE",
        help="hub id, Parquet or JSON lines (file, folder, s3://) with RLAIF-V-Dataset's columns",
    )
    command.add_argument("--model", metavar="PATH", help="folder, hub id or URI (the recipe's)")
    command.add_argument("--recipe", default="llava15_7b", help="numbers to use (llava15_7b)")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML: other settings")
    _set_flag(command)
    command.add_argument("--seed", type=int, help="the same as --set seed=...")
    command.add_argument("--name", help="the run's name (default: train- and the source's)")
    _root_flag(command)
    _executor_flags(command)
    _processes_flag(command)


def _processes_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--processes", type=_positive, default=1, help="local: GPUs that train together (1)"
    )


def _executor_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--executor",
        choices=("local", "docker", "kubernetes"),
        default="local",
        help="where stages run (default: local processes)",
    )
    command.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="docker, kubernetes: images, namespace, resources (YAML; k8s/examples/)",
    )
    command.add_argument(
        "--workers",
        type=_positive,
        default=0,
        help="local: stages at once (default: the cores, max. 8)",
    )
    command.add_argument(
        "--threads",
        type=_positive,
        default=1,
        help="local: threads per stage (default: 1); rows are bit-equal at an equal number only",
    )
    command.add_argument(
        "--isolated",
        action="store_true",
        help="local: a fresh interpreter per shard instead of a warm fork; slower, same rows",
    )
