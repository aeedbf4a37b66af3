"""Observe, plan, act, until the plan says stop."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from controller.executors.base import Executor
from controller.plan import (
    Action,
    Choose,
    Delete,
    Planner,
    ShardId,
    ShardState,
    State,
    Stop,
    Submit,
    WriteManifest,
    observe,
    plan,
)
from controller.summary import write_summary
from rlaifv.config import RunConfig
from rlaifv.pipeline import STAGES, Shard, choice_key, done_key, manifest_key, num_shards
from rlaifv.records import Choice
from rlaifv.store import Manifest, Store

POLL_S = 0.3
"""A checkpoint's tree appears without any job ending; so we look this often at least."""
LISTING_SHARE = 10
"""Wait at least this many times as long as a listing took."""

Chooser = Callable[[Store, RunConfig, int], Choice]
Guard = Callable[[], None]
"""Called before each action; raises TransientError when another controller has taken the run."""


def unguarded() -> None:
    """For runs that only one machine can reach: a file lock is enough."""


class Progress(NamedTuple):
    """What a watcher is told."""

    state: State
    shards: Mapping[ShardId, ShardState]


class Watcher:
    """Is told what happens; the base class says nothing."""

    def look(self, progress: Progress) -> None:
        """Called on every turn of the loop."""

    def stage_done(self, iteration: int, manifest: Manifest) -> None:
        """Called once per stage whose manifest this controller wrote."""

    def chosen(self, iteration: int, choice: Choice) -> None:
        """Called once per choice that this controller committed."""


class Watchers(Watcher):
    """Several, told one after the other."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def look(self, progress: Progress) -> None:
        for watcher in self._watchers:
            watcher.look(progress)

    def stage_done(self, iteration: int, manifest: Manifest) -> None:
        for watcher in self._watchers:
            watcher.stage_done(iteration, manifest)

    def chosen(self, iteration: int, choice: Choice) -> None:
        for watcher in self._watchers:
            watcher.chosen(iteration, choice)


class Loop:
    """Drives one run with one executor."""

    def __init__(
        self,
        run: Store,
        *,
        planner: Planner,
        executor: Executor,
        watcher: Watcher,
        chooser: Chooser,
        guard: Guard = unguarded,
    ) -> None:
        self._run = run
        self._planner = planner
        self._executor = executor
        self._watcher = watcher
        self._chooser = chooser
        self._guard = guard
        self._choices: dict[int, Choice] = {}

    def drive(self) -> Stop:
        """Runs to the end; raises what a store or the choice raises."""
        while True:
            shards = self._executor.states()  # before the listing: an ended shard's part is in it
            started = time.monotonic()
            state = self.observe()
            seconds = time.monotonic() - started
            self._watcher.look(Progress(state, shards))
            actions = plan(self._planner, state, shards)
            for action in actions:
                if isinstance(action, Stop):
                    return action
                self._act(action)
            only_submitted = all(isinstance(action, Submit) for action in actions)
            self._executor.wait(max(POLL_S, LISTING_SHARE * seconds) if only_submitted else 0.0)

    def observe(self) -> State:
        """The stored state, with one listing and each choice read once."""
        state = read_state(self._run, self._planner.config, known=self._choices)
        self._choices.update(state.choices)
        return state

    def _act(self, action: Action) -> None:
        self._guard()
        if isinstance(action, Submit):
            self._executor.submit(action.spec)
        elif isinstance(action, WriteManifest):
            self._write_manifest(action)
        elif isinstance(action, Choose):
            self._choose(action.iteration)
        elif isinstance(action, Delete):
            for tree in action.trees:
                self._run.delete(tree)

    def _write_manifest(self, action: WriteManifest) -> None:
        count = num_shards(self._planner.config, action.stage)
        keys = [done_key(action.iteration, action.stage, Shard(i, count)) for i in range(count)]
        manifest = Manifest(stage=action.stage, parts=[self._run.part_info(key) for key in keys])
        key = manifest_key(action.iteration, STAGES[action.stage].writes)
        if self._run.write_json_once(key, manifest):
            self._watcher.stage_done(action.iteration, manifest)

    def _choose(self, iteration: int) -> None:
        choice = self._chooser(self._run, self._planner.config, iteration)
        if self._run.write_json_once(choice_key(iteration), choice):
            self._choices[iteration] = choice
            write_summary(self._run, self._planner.config)
            self._watcher.chosen(iteration, choice)


def read_state(run: Store, config: RunConfig, *, known: Mapping[int, Choice]) -> State:
    """What is stored of a run; choices in `known` are not read again."""
    keys = frozenset(item.key for item in run.objects(""))
    choices = {
        iteration: known.get(iteration) or run.read_json(choice_key(iteration), Choice)
        for iteration in range(config.iterations)
        if choice_key(iteration) in keys
    }
    return observe(keys, choices)
