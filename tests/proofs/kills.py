"""Proof: a run whose controller and stages are killed again and again ends with the same rows.

`make proof-kills`. Runs the demo once undisturbed and once under SIGKILLs: of the controller, of the
process that forks its stages, or of a stage, at random moments; a dead controller is started
again with the same command. Then compares every row of every artifact, the choices, the weights of
the chosen checkpoints and the summary. Ends with 1 on any difference, and on anything that a killed
stage left behind. Linux only (/proc).
"""

import argparse
import collections
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from rlaifv.config import RunConfig
from rlaifv.pipeline import choice_key
from rlaifv.records import Choice
from rlaifv.store import open_store

MAX_STARTS = 200
SHORTEST_S, LONGEST_S = 1.0, 8.0
"""Between one kill and the next: from before the first stage starts to several stages later."""
DEATH_S = 5.0
PATIENCE_S = 60.0


def children(pid: int) -> list[int]:
    """Living child processes."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(word) for word in task.read_text().split()]
    return found


def command_of(pid: int) -> bytes:
    """Empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def victims(controller: int) -> dict[str, list[int]]:
    """What could be killed now, by kind."""
    below = children(controller)
    servers = [pid for pid in below if b"_forkserver" in command_of(pid)]
    stages = [pid for pid in below if pid not in servers]
    stages += [pid for server in servers for pid in children(server)]
    return {"controller": [controller], "fork server": servers, "stage": stages}


def kill_one(controller: int, rng: random.Random) -> str | None:
    """Kills the controller, its fork server or a stage; returns which, None when all had ended.

    Half of the kills wait for a stage that runs: else a slow machine only kills what starts.
    """
    kind = rng.choices(["controller", "fork server", "stage"], [4, 1, 5])[0]
    deadline = time.monotonic() + PATIENCE_S
    while not victims(controller)[kind] and is_running(controller):
        if time.monotonic() > deadline:
            kind = "controller"
        time.sleep(0.02)
    if kind == "stage":
        time.sleep(rng.uniform(0, 2))
    found = victims(controller)
    kind = kind if found[kind] else "controller"
    if not is_running(controller):
        return None
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(rng.choice(found[kind]), signal.SIGKILL)
    if kind == "controller":
        deadline = time.monotonic() + DEATH_S
        while survivors := [pid for pids in found.values() for pid in pids if is_running(pid)]:
            if time.monotonic() > deadline:
                raise SystemExit(f"outlived their controller: {survivors}")
            time.sleep(0.05)
    return kind


def run_under_fire(command: list[str], kills: int, rng: random.Random) -> collections.Counter[str]:
    """Runs to the end, killing on the way; returns what was killed how often."""
    killed: collections.Counter[str] = collections.Counter()
    for starts in range(1, MAX_STARTS + 1):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while killed.total() < kills:
            try:
                process.wait(rng.uniform(SHORTEST_S, LONGEST_S))
                break
            except subprocess.TimeoutExpired:
                if (kind := kill_one(process.pid, rng)) is None:
                    break
                killed[kind] += 1
                print(f"kill {killed.total()}: {dict(killed)}", flush=True)
        if process.wait() == 0:
            print(f"{starts} starts of the controller")
            return killed
    raise SystemExit(f"not finished after {MAX_STARTS} starts")


def differences(one: Path, other: Path) -> tuple[list[str], int]:
    """Artifacts that differ and leftovers in `other`, by name, and the number of rows compared."""
    names = {path.relative_to(root) for root in (one, other) for path in root.rglob("*.parquet")}
    different, rows = [str(path) for path in other.rglob(".tmp-*")], 0
    for name in sorted(names):
        if not ((one / name).exists() and (other / name).exists()):
            different.append(f"{name} is in one of them only")
            continue
        tables = [pq.read_table(root / name) for root in (one, other)]
        rows += len(tables[0])
        if not tables[0].equals(tables[1]):
            different.append(str(name))
    stores = [open_store(str(root)) for root in (one, other)]
    for iteration in range(stores[0].read_json("config.json", RunConfig).iterations):
        choices = [store.read_json(choice_key(iteration), Choice) for store in stores]
        if choices[0] != choices[1]:
            different.append(choice_key(iteration))
        elif (
            choices[0].tree and len({_weights(root / choices[0].tree) for root in (one, other)}) > 1
        ):
            different.append(choices[0].tree)
    if len({(root / "report/summary.json").read_bytes() for root in (one, other)}) > 1:
        different.append("report/summary.json")
    return different, rows


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.kills", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/kills"), help="a new folder")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--scenes", type=int, default=100, help="an iteration; the demo has 300")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    options = parser.parse_args()
    base = [sys.executable, "-m", "controller", "run", "--iterations", "4"]
    base += ["--set", f"prepare.instructions_per_iteration={options.scenes}"]
    roots = {name: options.root / name for name in ("undisturbed", "killed")}
    commands = {name: [*base, "--root", str(root)] for name, root in roots.items()}
    started = time.monotonic()
    subprocess.run(commands["undisturbed"], check=True, stderr=subprocess.DEVNULL)
    calm_s = time.monotonic() - started
    killed = run_under_fire(commands["killed"], options.kills, random.Random(options.seed))
    fire_s = time.monotonic() - started - calm_s
    different, rows = differences(*(root / "demo" for root in roots.values()))
    print(f"killed: {dict(killed)}; {calm_s:.0f} s undisturbed, {fire_s:.0f} s with kills")
    print(f"{rows} rows compared; different: {', '.join(different) or 'none'}")
    if killed.total() < options.kills:
        print(f"only {killed.total()} kills: the run ended before the others")
    return 1 if different or killed.total() < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
