"""The commands about a cluster: their flags, and what each does. Imports when called."""

import argparse
import getpass
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from controller.k8s_commands import Cluster

Flags = Callable[[argparse.ArgumentParser], None]


def add_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    *,
    run_flags: Flags,
    run_argument: Flags,
) -> None:
    """Adds render, logs, cancel and retry."""
    add = commands.add_parser
    run_flags(add("render", help="print the Kubernetes Jobs of a whole run; needs no cluster"))
    logs = add("logs", help="the log of a shard, from here or from a cluster")
    logs.add_argument("--stage", required=True, help="sample, verify, train, ...")
    logs.add_argument("--iteration", type=int, help="default: the latest (a cluster: 0)")
    logs.add_argument("--shard", type=int, help="its number (default: the latest; a cluster: 0)")
    logs.add_argument("-f", "--follow", action="store_true", help="until it has ended")
    cancel = add("cancel", help="end a run's controller and its Jobs on a cluster")
    retry = add("retry", help="delete a run's failed Jobs on a cluster")
    for command in (logs, cancel, retry):
        run_argument(command)
        command.add_argument("--cluster", type=Path, metavar="FILE", help="the cluster's settings")


def _render(flags: argparse.Namespace) -> int:
    from controller.k8s_commands import render
    from controller.k8s_settings import read_settings
    from rlaifv.recipes import Wishes, build_config

    sets = tuple(flags.set)
    wishes = Wishes(flags.recipe, flags.config, sets, flags.name, flags.iterations, flags.seed)
    config = build_config(wishes)
    uri = f"{flags.root.rstrip('/')}/{config.name}"
    print(render(config, uri, read_settings(flags.cluster)), end="")
    return 0


def _logs(flags: argparse.Namespace) -> int:
    from controller.k8s_commands import follow, logs
    from controller.logs import check_shard, find_shard, follow_local, is_local, local_log
    from controller.places import existing_run
    from controller.plan import ShardId

    place = existing_run(flags.root, flags.run)
    if flags.cluster is None and is_local(place):
        local = find_shard(place, flags.stage, flags.iteration, flags.shard)
        for line in follow_local(place, local) if flags.follow else local_log(place, local):
            print(line, flush=True)
        return 0
    check_shard(place, flags.stage, flags.iteration or 0, flags.shard or 0)
    cluster = _cluster(flags)
    shard = ShardId(flags.iteration or 0, flags.stage, flags.shard or 0)
    for line in follow(cluster, shard) if flags.follow else [logs(cluster, shard)]:
        print(line, flush=True)
    return 0


def _cancel(flags: argparse.Namespace) -> int:
    from controller.k8s_commands import cancel

    _not_local(flags, "Ctrl-C where it was started ends it")
    count = cancel(_cluster(flags), f"{getpass.getuser()} on {socket.gethostname()}")
    print(f"{count} Jobs ended; what is finished stays, and `run` goes on from there")
    return 0


def _retry(flags: argparse.Namespace) -> int:
    from controller.k8s_commands import retry

    _not_local(flags, "start the same run again, and it tries what failed (see `status`)")
    for name in retry(_cluster(flags)):
        print(f"deleted Job {name}")
    print("a controller at work submits them again; if none is, start the same run again")
    return 0


def _not_local(flags: argparse.Namespace, instead: str) -> None:
    """Raises ConfigError for a run of this machine: there is no Job to look for."""
    from controller.logs import is_local
    from controller.places import existing_run
    from rlaifv.errors import ConfigError

    place = existing_run(flags.root, flags.run)
    if flags.cluster is None and is_local(place):
        raise ConfigError(f"{place.uri}: ran on this machine, not on a cluster: {instead}")


def print_cluster_status(flags: argparse.Namespace) -> None:
    """The part of `status --executor kubernetes` that only the cluster knows."""
    from controller.k8s_commands import status_lines

    print("", *status_lines(_cluster(flags)), sep="\n")


def _cluster(flags: argparse.Namespace) -> "Cluster":
    from controller.k8s_commands import open_cluster
    from controller.places import existing_run

    return open_cluster(existing_run(flags.root, flags.run), flags.cluster)


COMMANDS = {"render": _render, "logs": _logs, "cancel": _cancel, "retry": _retry}
