"""What `status` prints: one screen, and what to do next."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from controller.journal import NO_SHARD
from controller.paint import PLAIN, Colour, Paint, duration, paint_for, rate, safe
from controller.places import RunPlace, typed
from controller.status import (
    EXIT_CODES,
    LastError,
    RunState,
    RunStatus,
    StageStatus,
    read_status,
    shown_command,
)
from controller.summary import table
from controller.tables import Column, folded, folded_command, render, room
from rlaifv.pipeline import STAGES
from rlaifv.store import LocalBackend

WATCH_S, WATCH_BUCKET_S = 2.0, 15.0
HOME = "\x1b[H\x1b[J"
"""Cursor to the top left, and everything below erased."""
MARKS: dict[RunState, Colour] = {
    "finished": "green",
    "failed": "red",
    "running": "cyan",
    "interrupted": "yellow",
}
KINDS = {
    "configuration": (
        "wrong configuration, or something that it names is missing",
        "A run's configuration cannot change: to change it, give the new run a --name of its own",
    ),
    "data": ("bad data", "Mend or remove the row or file that it names"),
    "passing": ("something outside failed", "Often it has passed by now"),
    "killed": (
        "ended by a signal",
        "Mostly memory ran out: lower a batch_size or --workers, or ask for more memory",
    ),
    "program": ("error in the program", "The log has the whole traceback"),
}


STORIES = ("pair", "grade", "train", "sample")
"""Stages whose rows tell most, the first one that a run has."""


def _stages(status: RunStatus) -> set[str]:
    return {one.stage for one in status.stages}


def status_text(status: RunStatus, paint: Paint = PLAIN) -> str:
    """The run, its stages, the last error, and what to do next."""
    blocks = [_head(status, paint), _grid(status, paint)]
    if details := _details(status, paint):
        blocks.append(details)
    if quarantined := sum(stage.quarantined or 0 for stage in status.stages):
        blocks.append(f"{quarantined} bad input rows were set aside (folders quarantine/)")
    if status.state != "running" and status.summary:
        blocks.append(table(status.summary, status.caveat))
    blocks += [
        f"{one.stage} shard {one.shard} waits: {safe(one.waits_for)}" for one in status.waits[:3]
    ]
    if status.error is not None:
        blocks.append(_error(status, status.error, paint))
    blocks.append("\n".join(_advice(status, paint)))
    return "\n\n".join(filter(None, blocks))


def watch(place: RunPlace, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """The screen again and again until the run is not running; returns the exit code of that."""
    live, paint = sys.stdout.isatty(), paint_for(sys.stdout)
    every = WATCH_S if isinstance(place.store.backend, LocalBackend) else WATCH_BUCKET_S
    while True:
        status = read_status(place)
        text = status_text(status, paint)
        sys.stdout.write(f"{HOME}{text}\n" if live else f"{text}\n\n")
        sys.stdout.flush()
        if status.state != "running":
            return EXIT_CODES[status.state]
        sleep(every)


def _head(status: RunStatus, paint: Paint) -> str:
    name = status.run.rpartition("/")[2]
    state = paint(status.state, "bold", MARKS[status.state])
    line = f"{paint(name, 'bold')}  {state}  {status.iterations_done} of {status.iterations} iterations done"
    facts = [_name(status)]
    if status.state == "running":
        left = "known after the first iteration"
        if status.eta_seconds is not None:
            left = f"about {duration(status.eta_seconds)}"
        line += f"  time left: {left}"
        if status.controller and status.heard_seconds_ago is not None:
            heard = duration(max(0.0, status.heard_seconds_ago))
            facts.append(f"driven by {status.controller}, heard of {heard} ago")
    return "\n".join([line, *(paint(fact, "dim") for fact in facts)])


def _grid(status: RunStatus, paint: Paint) -> str:
    """Iterations x stages."""
    names = list(dict.fromkeys(stage.stage for stage in status.stages))
    columns = [Column("iteration"), *(Column(name, right=True) for name in names)]
    numbers = sorted({stage.iteration for stage in status.stages})
    cells = [
        [(str(number), ()), *(_cell(one) for one in status.stages if one.iteration == number)]
        for number in numbers
    ]
    texts = [[text for text, _ in row] for row in cells]
    plain = render(columns, texts).split("\n")
    if len(plain[1]) > room():
        columns[0] = Column("iter")
        plain = render(columns, texts).split("\n")
    lines = [paint(plain[0], "bold"), paint(plain[1], "dim")]
    for line, row in zip(plain[2:], cells, strict=True):
        lines.append(_coloured(line, row, paint))
    if any(stage.done < stage.shards for stage in status.stages):
        key = "number: rows, complete  3/8: shards done  *: running  !: failed  .: not begun"
        lines.append(paint(key, "dim"))
    return "\n".join(lines)


def _coloured(line: str, row: Sequence[tuple[str, tuple[Colour, ...]]], paint: Paint) -> str:
    """Colours after the columns were aligned, so that codes take no room."""
    done, rest = "", line
    for text, colours in row:
        before, _, rest = rest.partition(text)
        done += before + paint(text, *colours)
    return done + rest


def _cell(stage: StageStatus) -> tuple[str, tuple[Colour, ...]]:
    if stage.done == stage.shards:
        return ("done" if stage.rows is None else str(stage.rows)), ("green",)
    begun = stage.done or stage.running or stage.waiting or stage.failed
    if not begun:
        return ".", ("dim",)
    marks = ("*" if stage.running else "") + ("!" if stage.failed else "")
    colour: Colour = "red" if stage.failed else "cyan" if stage.running else "yellow"
    return f"{stage.done}/{stage.shards}{marks}", (colour,)


def _details(status: RunStatus, paint: Paint) -> str:
    """The stages of the iteration under way, else of the last one."""
    last = max((one.iteration for one in status.stages if _begun(one)), default=None)
    if last is None:
        return ""
    titles = ("shards", "running", "waiting", "failed", "rows", "rate", "queued", "run", "left")
    rows = [_detail(one) for one in status.stages if one.iteration == last and _begun(one)]
    told = [place for place in range(len(titles) + 1) if any(row[place] for row in rows)]
    columns = [Column(f"iteration {last}"), *(Column(title, right=True) for title in titles)]
    lines = render([columns[n] for n in told], [[row[n] for n in told] for row in rows]).split("\n")
    note = "queued: mean wait of a shard before it starts; run: work, summed over the shards"
    return "\n".join(
        [paint(lines[0], "bold"), paint(lines[1], "dim"), *lines[2:], paint(note, "dim")]
    )


def _begun(stage: StageStatus) -> bool:
    return bool(stage.done or stage.running or stage.waiting or stage.failed)


def _has_rows(stage: StageStatus) -> bool:
    """Checkpoints are rows too, but nobody counts them by the second."""
    return stage.stage not in ("train", "merge")


def _detail(stage: StageStatus) -> list[str]:
    queued, seconds, left = stage.queue_seconds, stage.seconds, stage.eta_seconds
    return [
        stage.stage,
        f"{stage.done}/{stage.shards}",
        *(str(number) if number else "" for number in (stage.running, stage.waiting, stage.failed)),
        "" if stage.rows is None else str(stage.rows),
        rate(stage.rows_per_second) if stage.rows_per_second and _has_rows(stage) else "",
        "" if queued is None else duration(queued / stage.shards),
        "" if seconds is None else duration(seconds),
        "" if left is None else duration(left),
    ]


def _error(status: RunStatus, error: LastError, paint: Paint) -> str:
    kind, hint = KINDS[error.kind]
    head = (
        "It failed" if error.ended_the_run else "The last attempt that failed (it is tried again)"
    )
    if status.state == "interrupted":
        head = "The last attempt that failed"
    lines = [f"{paint(head, 'bold', 'red')}: {kind} ({_ended(error.exit_code)})"]
    place = f"iteration {error.iteration} {error.stage} shard {error.shard}: "
    if error.ended_the_run or error.stage is None:
        place = ""
    lines.append(f"  {folded(safe(place + error.reason), '  ')}")
    if error.stage is not None and error.shard not in (None, NO_SHARD):
        where = ("--iteration", str(error.iteration), "--shard", str(error.shard))
        lines.append(
            f"  log:  {shown_command('logs', _name(status), '--stage', error.stage, *where)}"
        )
    if error.ended_the_run:
        lines.append(f"  {hint}.")
    return "\n".join(lines)


def _ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _name(status: RunStatus) -> str:
    """As one would type it here."""
    return typed(status.run)


def _advice(status: RunStatus, paint: Paint) -> Iterator[str]:
    again = "  the same `run` command as before"
    if status.command:
        again = folded_command(shlex.split(safe(status.command)))
    if status.state == "failed":
        yield paint(
            "Next: once that is mended, start the same run again; it goes on where it was:", "bold"
        )
        yield again
    elif status.state == "interrupted":
        yield paint("Next: nobody drives this run. What is done is kept; go on with:", "bold")
        yield again
    elif status.state == "finished":
        rows = next(
            (STAGES[one].writes for one in STORIES if one in _stages(status)), "instructions"
        )
        if status.summary:
            yield f"report:  {_name(status)}/report/index.html"
        yield f"rows:    {shown_command('show', rows, _name(status), '--limit', '3')}"
        if status.summary:
            yield f"export:  {shown_command('export', 'checkpoint', _name(status), '--to', 'model')}"
    else:
        busy = [one for one in status.stages if one.running]
        yield f"watch:  {shown_command('status', _name(status), '--watch')}"
        if busy:
            yield f"log:    {shown_command('logs', _name(status), '--stage', busy[-1].stage)}"
