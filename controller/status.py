"""How far a run is, from what is stored: works for one that runs, stopped, or was killed."""

from collections.abc import Sequence
from typing import Literal

from controller.lock import is_held
from controller.loop import read_state
from controller.places import RunPlace, shown
from controller.plan import State, Stop, planned_stages
from controller.summary import Entry, summarise, table
from controller.tables import Column, render
from rlaifv.config import RunConfig
from rlaifv.pipeline import CONFIG, STAGES, manifest_key, num_shards
from rlaifv.records import Record
from rlaifv.store import Manifest, Store

STOPPED = "stopped.json"


class Stopped(Record):
    """Why the last controller gave up; removed when the next one starts."""

    reason: str
    exit_code: int


class StageStatus(Record):
    """Shards of one stage of one iteration."""

    iteration: int
    stage: str
    done: int
    shards: int
    rows: int | None
    """Known once the stage is complete."""
    seconds: float | None
    """Of work, summed over the shards."""
    quarantined: int | None


class RunStatus(Record):
    """What `status --json` prints."""

    run: str
    state: Literal["finished", "running", "stopped", "interrupted"]
    """`stopped`: it gave up, see `stopped`. `interrupted`: nobody drives it; it can be resumed."""
    iterations: int
    iterations_done: int
    stopped: Stopped | None
    stages: list[StageStatus]
    summary: list[Entry]


def note_stop(run: Store, stop: Stop) -> None:
    """Keeps the reason for `status`."""
    stopped = Stopped(reason=stop.reason, exit_code=stop.exit_code)
    run.write_bytes(STOPPED, stopped.model_dump_json().encode())


def clear_stop(run: Store) -> None:
    """Forgets it: a new controller tries again."""
    run.delete(STOPPED)


def read_status(place: RunPlace) -> RunStatus:
    """One listing, and one small object per finished stage."""
    run = place.store
    config = run.read_json(CONFIG, RunConfig)
    state = read_state(run, config, known={})
    finished = [i for i in range(config.iterations) if state.finished(config, i)]
    stopped = run.read_json(STOPPED, Stopped) if STOPPED in state.keys else None
    running = is_held(place.folder)
    return RunStatus(
        run=place.uri,
        state=(
            "running"
            if running
            else "finished"
            if len(finished) == config.iterations
            else "stopped"
            if stopped
            else "interrupted"
        ),
        iterations=config.iterations,
        iterations_done=len(finished),
        stopped=None if running else stopped,
        stages=[
            _stage(run, config, state, at=(iteration, name))
            for iteration in range(min(len(finished) + 1, config.iterations))
            for name in (stage.name for stage in planned_stages(config))
        ],
        summary=summarise(config, state.choices),
    )


def _stage(run: Store, config: RunConfig, state: State, *, at: tuple[int, str]) -> StageStatus:
    iteration, name = at
    key = manifest_key(iteration, STAGES[name].writes)
    parts = run.read_json(key, Manifest).parts if key in state.keys else None
    return StageStatus(
        iteration=iteration,
        stage=name,
        done=len(state.done(config, iteration, name)),
        shards=num_shards(config, name),
        rows=None if parts is None else sum(part.rows for part in parts),
        seconds=None if parts is None else round(sum(part.seconds for part in parts), 3),
        quarantined=None if parts is None else sum(part.quarantined for part in parts),
    )


def status_text(status: RunStatus) -> str:
    """One screen, and what to do next."""
    names = list(dict.fromkeys(stage.stage for stage in status.stages))
    columns = [Column("iteration"), *(Column(name, right=True) for name in names)]
    rows = [
        [str(iteration), *(_cell(stage) for stage in status.stages if stage.iteration == iteration)]
        for iteration in sorted({stage.iteration for stage in status.stages})
    ]
    head = (
        f"{status.run}: {status.state}, {status.iterations_done} of {status.iterations} iterations"
    )
    blocks = [head, render(columns, rows)]
    if quarantined := sum(stage.quarantined or 0 for stage in status.stages):
        blocks.append(f"{quarantined} bad input rows were set aside (folders quarantine/)")
    if status.summary:
        blocks.append(table(status.summary))
    return "\n\n".join([*blocks, *_advice(status)])


def _cell(stage: StageStatus) -> str:
    if stage.done == 0:
        return "."
    if stage.done < stage.shards:
        return f"{stage.done}/{stage.shards}"
    return "done" if stage.rows is None else f"{stage.rows} rows"


def _advice(status: RunStatus) -> Sequence[str]:
    if status.state == "stopped" and status.stopped is not None:
        return [f"It stopped: {status.stopped.reason}", "Mend that and start the same run again."]
    if status.state == "interrupted":
        return ["Nobody drives it. Start the same run again: it goes on where it was."]
    if status.state == "finished":
        return [f"report: {shown(status.run, 'report/index.html')}"]
    return []
