"""The command line: `python -m controller --help`.

Each command imports what it needs when it is called, so that `--help` is instant.
"""

import argparse
import sys
from collections.abc import Sequence

from controller.flags import parser
from controller.k8s_cli import COMMANDS, print_cluster_status
from rlaifv.cli import ending
from rlaifv.errors import ArtifactError, ConfigError

__all__ = ["main", "parser"]


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
    order = Order(
        wishes,
        root=flags.root,
        executor=flags.executor,
        workers=flags.workers,
        threads=flags.threads,
        isolated=flags.isolated,
        cluster=flags.cluster,
        command=("python", "-m", "controller", *argv),
        processes=flags.processes,
    )
    return run(order)


def _evaluate(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    from controller.evaluate import evaluate, read_flags

    return evaluate(*read_flags(flags, ("python", "-m", "controller", *argv)))


def _train(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    from controller.train import read_flags, train

    return train(*read_flags(flags, ("python", "-m", "controller", *argv)))


def _status(flags: argparse.Namespace) -> int:
    from controller.paint import paint_for
    from controller.places import existing_run
    from controller.screen import status_text, watch
    from controller.status import EXIT_CODES, read_status

    place = existing_run(flags.root, flags.run)
    if flags.watch and not flags.json:
        return watch(place)
    status = read_status(place)
    paint = paint_for(sys.stdout)
    print(status.model_dump_json(indent=1) if flags.json else status_text(status, paint))
    if flags.executor == "kubernetes" and not flags.json:
        print_cluster_status(flags)
    return EXIT_CODES[status.state]


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


def _compare(flags: argparse.Namespace) -> int:
    from controller.compare import compare
    from controller.compare_text import comparison_text
    from controller.paint import paint_for
    from controller.places import existing_run

    sides = [existing_run(flags.root, name) for name in (flags.run_a, flags.run_b)]
    found = compare(*sides, limit=flags.limit)
    paint = paint_for(sys.stdout)
    print(found.model_dump_json(indent=1) if flags.json else comparison_text(found, paint))
    if flags.html is not None:
        from controller.report.comparison import write_comparison

        write_comparison(flags.html, *sides)
    return 0


def _doctor(flags: argparse.Namespace) -> int:
    from controller.doctor import diagnose, diagnosis_text
    from rlaifv.recipes import Wishes, build_config

    asked = flags.recipe or flags.config or flags.set
    wishes = Wishes(flags.recipe or "demo", flags.config, tuple(flags.set))
    diagnosis = diagnose(flags.root, build_config(wishes) if asked else None)
    print(diagnosis.model_dump_json(indent=1) if flags.json else diagnosis_text(diagnosis))
    return 0 if diagnosis.healthy else ConfigError.exit_code


def _ls(flags: argparse.Namespace) -> int:
    from controller.ls import list_root, list_run, root_text, run_text
    from controller.places import existing_run

    if flags.run is None:
        found = list_root(flags.root)
        print(found.model_dump_json(indent=1) if flags.json else root_text(found))
        return 0
    listing = list_run(existing_run(flags.root, flags.run).store)
    print(listing.model_dump_json(indent=1) if flags.json else run_text(listing))
    return 0


def _show(flags: argparse.Namespace) -> int:
    from controller.places import existing_run
    from controller.show import Wanted, read_where, read_words, show

    target = read_words(flags.what, flags.names)
    wanted = Wanted(
        flags.what,
        flags.iteration,
        limit=flags.limit,
        json=flags.json,
        where=read_where(flags.what, flags.where),
        identity=target.identity,
    )
    for line in show(existing_run(flags.root, target.run).store, wanted):
        print(line)
    return 0


def _lineage(flags: argparse.Namespace) -> int:
    from controller.lineage import lineage, lineage_text
    from controller.places import existing_run

    found = lineage(existing_run(flags.root, flags.run).store, flags.what, flags.iteration)
    print(found.model_dump_json(indent=1) if flags.json else lineage_text(found))
    return 0


def _verify(flags: argparse.Namespace) -> int:
    from controller.places import existing_run
    from controller.verify import verification_text, verify

    verification = verify(existing_run(flags.root, flags.run).store)
    print(verification.model_dump_json(indent=1) if flags.json else verification_text(verification))
    return ArtifactError.exit_code if verification.problems else 0


def _export(flags: argparse.Namespace) -> int:
    from controller.export import export_checkpoint, export_pairs
    from controller.places import existing_run

    run = existing_run(flags.root, flags.run).store
    write = export_pairs if flags.what == "pairs" else export_checkpoint
    print(write(run, flags.to, iteration=flags.iteration))
    return 0


def _gc(flags: argparse.Namespace) -> int:
    from controller.gc import collect, collection_text
    from controller.places import existing_run

    place = existing_run(flags.root, flags.run)
    found = collect(place, delete=flags.delete, older_than_seconds=3600 * flags.older_than)
    print(found.model_dump_json(indent=1) if flags.json else collection_text(found))
    return 0


def _import(flags: argparse.Namespace) -> int:
    from controller.importing import import_benchmark, import_model

    if flags.kind == "model":
        imported = import_model(flags.root, flags.source, name=flags.name)
    else:
        imported = import_benchmark(flags.root, flags.source, name=flags.name)
    print(imported)
    return 0


def _fork(flags: argparse.Namespace) -> int:
    from controller.fork import Wish, fork, fork_text
    from controller.places import existing_run

    wish = Wish(new=flags.new, start=flags.start, sets=tuple(flags.set))
    print(fork_text(*fork(existing_run(flags.root, flags.run), wish)))
    return 0


def _completion(flags: argparse.Namespace) -> int:
    from controller.completion import SCRIPTS

    print(SCRIPTS[flags.shell], end="")
    return 0


def _propose(words: Sequence[str]) -> int:
    from controller.completion import candidates

    for word in candidates(parser(), words):
        print(word)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Mistakes end with a message, not a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["completion"] and words[2:3] == ["--words"]:  # a shell asks, at a TAB
        return ending(lambda: _propose(words[3:]))  # they may be any: nothing for argparse
    flags = parser().parse_args(words)
    starting = {"run": _run, "evaluate": _evaluate, "train": _train}
    commands = {
        "status": _status,
        "report": _report,
        "compare": _compare,
        "show": _show,
        "ls": _ls,
        "lineage": _lineage,
        "verify": _verify,
        "doctor": _doctor,
        "completion": _completion,
        "export": _export,
        "gc": _gc,
        "import": _import,
        "fork": _fork,
        **COMMANDS,
    }
    if flags.command in starting:
        return ending(lambda: starting[flags.command](flags, words))
    return ending(lambda: commands[flags.command](flags))


if __name__ == "__main__":
    sys.exit(main())
