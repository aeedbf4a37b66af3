"""The command line: `python -m controller --help`.

Each command imports what it needs when it is called, so that `--help` is instant.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlaifv.errors import RlaifvError

EXAMPLES = """\
examples:
  python -m controller run --iterations 4            the demo: four iterations in a few minutes
  python -m controller run --set seed=1 --name demo-1
  python -m controller status                        how far the only run below ./runs is
  python -m controller show pairs --limit 3          rows of an artifact, as JSON lines
"""


def parser() -> argparse.ArgumentParser:
    """Every command and flag there is."""
    top = argparse.ArgumentParser(
        prog="python -m controller",
        description="Runs RLAIF-V: sample, verify, pair, train, choose, and again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _run_flags(commands.add_parser("run", help="start a run, or go on with it"))
    status = commands.add_parser("status", help="how far a run is")
    _run_argument(status)
    status.add_argument("--json", action="store_true", help="for programs")
    report = commands.add_parser("report", help="write report/index.html and summary.json anew")
    _run_argument(report)
    show = commands.add_parser("show", help="print config, table, choice, or rows of an artifact")
    show.add_argument("what", help="config, table, choice, instructions, answers, pairs, ...")
    _run_argument(show)
    show.add_argument("--iteration", type=int, default=0, help="default: 0")
    show.add_argument("--limit", type=_positive, default=10, help="rows at most (default: 10)")
    show.add_argument("--json", action="store_true", help="for programs")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "run", nargs="?", help="name below --root, or a path or URI (default: the only one)"
    )
    command.add_argument("--root", default="runs", help="where runs lie (default: ./runs)")


def _run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", default="demo", help="the configuration to begin with (demo)")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the recipe")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one value, after --config; may be repeated",
    )
    command.add_argument("--iterations", type=int, help="how often to go round; may grow later")
    command.add_argument("--seed", type=int, help="the same as --set seed=...")
    command.add_argument("--name", help="the run's name (default: the recipe's)")
    command.add_argument("--root", default="runs", help="path or URI (default: ./runs)")
    command.add_argument(
        "--executor",
        choices=("local", "docker", "kubernetes"),
        default="local",
        help="where stages run (default: local processes)",
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


def _run(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    from controller.run import Order, run
    from rlaifv.recipes import Wishes

    wishes = Wishes(
        recipe=flags.recipe,
        config_file=flags.config,
        sets=tuple(flags.set),
        name=flags.name,
        iterations=flags.iterations,
        seed=flags.seed,
    )
    command = ("python", "-m", "controller", *argv)
    order = Order(
        wishes,
        root=flags.root,
        executor=flags.executor,
        workers=flags.workers,
        threads=flags.threads,
        isolated=flags.isolated,
        command=command,
    )
    return run(order)


def _status(flags: argparse.Namespace) -> int:
    from controller.places import existing_run
    from controller.status import read_status, status_text

    status = read_status(existing_run(flags.root, flags.run))
    print(status.model_dump_json(indent=1) if flags.json else status_text(status))
    return 0


def _report(flags: argparse.Namespace) -> int:
    from controller.places import existing_run, shown
    from controller.report.build import REPORT, write_report
    from controller.summary import write_summary
    from rlaifv.config import RunConfig
    from rlaifv.pipeline import CONFIG

    run = existing_run(flags.root, flags.run).store
    config = run.read_json(CONFIG, RunConfig)
    write_summary(run, config)
    write_report(run, config)
    print(shown(str(run), REPORT))
    return 0


def _show(flags: argparse.Namespace) -> int:
    from controller.places import existing_run
    from controller.show import SHOWN, Wanted, show
    from rlaifv.errors import ConfigError

    if flags.what not in SHOWN:
        raise ConfigError(f"show {flags.what}: expected one of {', '.join(SHOWN)}")
    wanted = Wanted(flags.what, flags.iteration, limit=flags.limit, json=flags.json)
    for line in show(existing_run(flags.root, flags.run).store, wanted):
        print(line)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Mistakes end with a message, not a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    flags = parser().parse_args(words)
    commands = {"status": _status, "report": _report, "show": _show}
    try:
        if flags.command == "run":
            return _run(flags, words)
        return commands[flags.command](flags)
    except RlaifvError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `show pairs | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        from rlaifv.store import explain_os_error

        explained = explain_os_error(error, str(error.filename))
        if not isinstance(explained, RlaifvError):
            raise
        sys.stderr.write(f"error: {explained}\n")
        return explained.exit_code


if __name__ == "__main__":
    sys.exit(main())
