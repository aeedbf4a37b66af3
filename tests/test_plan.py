"""The plan: order, overlap, resume, failures, and its speed."""

import time
from collections.abc import Iterable

import pytest
from pydantic import ValidationError

from controller.plan import (
    Action,
    Choose,
    Delete,
    Planner,
    ShardId,
    ShardState,
    Stop,
    Submit,
    Unit,
    WriteManifest,
    every_job,
    observe,
    plan,
)
from rlaifv.config import ChooseConfig, HeldOutConfig, RunConfig
from rlaifv.pipeline import STAGES, Shard, done_key, manifest_key, num_shards
from rlaifv.records import Choice
from tests.fake_world import tiny_config

CONFIG = tiny_config()
CHOICE = Choice(
    step=4,
    tree="iteration-0/checkpoints/step-000004",
    metrics={},
    baseline={},
    candidates=[],
    num_pairs=16,
    reason="best",
)


def planner(config: RunConfig = CONFIG, unit: Unit = "shard") -> Planner:
    return Planner(config, "file:///runs/tiny", unit)


def keys_of(stages: Iterable[str], config: RunConfig = CONFIG, iteration: int = 0) -> set[str]:
    """Every part and manifest of these stages."""
    keys = set()
    for stage in stages:
        count = num_shards(config, stage)
        keys |= {done_key(iteration, stage, Shard(i, count)) for i in range(count)}
        keys.add(manifest_key(iteration, STAGES[stage].writes))
    return keys


def submitted(actions: Iterable[Action]) -> set[tuple[str, int]]:
    """(stage, shard) of everything that is to be started."""
    return {
        (action.spec.stage.name, index)
        for action in actions
        if isinstance(action, Submit)
        for index in action.spec.shards
    }


def test_an_empty_run_starts_with_prepare_and_the_untrained_answers() -> None:
    actions = plan(planner(), observe([], {}), {})
    assert submitted(actions) == {("prepare", 0), ("prepare", 1), ("respond", 0), ("respond", 1)}
    first = actions[0]
    assert isinstance(first, Submit)
    assert first.spec.argv_of(0) == (
        *("jobs.prepare", "--run", "file:///runs/tiny", "--iteration", "0", "--shard", "0/2"),
    )


@pytest.mark.parametrize("unit", ["shard", "stage"])
def test_held_out_questions_are_answered_once_prepare_has_stored_them(unit: Unit) -> None:
    respond = CONFIG.respond.model_copy(update={"benchmarks": ()})
    choose = ChooseConfig(rule="held_out", held_out=HeldOutConfig())
    config = CONFIG.model_copy(update={"respond": respond, "choose": choose})
    first = planner(config, unit)
    assert submitted(plan(first, observe([], {}), {})) == {("prepare", 0), ("prepare", 1)}
    second = {done_key(0, "prepare", Shard(1, 2))}
    assert not {s for s, _ in submitted(plan(first, observe(second, {}), {}))} & {"respond"}
    stored = {done_key(0, "prepare", Shard(0, 2))}
    starts = submitted(plan(first, observe(stored, {}), {}))
    assert {("respond", 0), ("respond", 1)} <= starts


def test_a_shard_starts_as_soon_as_its_own_input_part_exists() -> None:
    state = observe([done_key(0, "prepare", Shard(1, 2))], {})
    assert ("sample", 1) in submitted(plan(planner(), state, {}))
    assert ("sample", 0) not in submitted(plan(planner(), state, {}))


def test_the_join_waits_for_every_part() -> None:
    before = keys_of(["prepare", "sample", "claim"])
    half = before | {done_key(0, "verify", Shard(0, 2))}
    assert ("pair", 0) not in submitted(plan(planner(), observe(half, {}), {}))
    whole = half | {done_key(0, "verify", Shard(1, 2))}
    assert ("pair", 0) in submitted(plan(planner(), observe(whole, {}), {}))


def test_answers_of_a_checkpoint_start_while_training_goes_on() -> None:
    keys = keys_of(["prepare", "sample", "claim", "verify", "pair", "reflogp"])
    keys |= {"iteration-0/checkpoints/step-000002/_COMPLETE"}
    keys |= {"iteration-0/checkpoints/step-000004/weights"}  # not complete
    shards = {ShardId(0, "train", 0): ShardState("running", 1)}
    starts = submitted(plan(planner(), observe(keys, {}), shards))
    assert starts == {("respond", 0), ("respond", 1), ("respond", 2), ("respond", 3)}


def test_training_that_wrote_fewer_checkpoints_leaves_nothing_waiting() -> None:
    keys = keys_of(["prepare", "sample", "claim", "verify", "pair", "reflogp", "train"])
    starts = submitted(plan(planner(), observe(keys, {}), {}))
    assert starts == {("respond", index) for index in range(6)}


def test_what_exists_or_runs_is_not_started() -> None:
    keys = {done_key(0, "prepare", Shard(0, 2)), done_key(0, "respond", Shard(0, 6))}
    shards = {
        ShardId(0, "prepare", 1): ShardState("running", 1),
        ShardId(0, "sample", 0): ShardState("waiting"),
        ShardId(0, "respond", 1): ShardState("running", 1),
    }
    assert submitted(plan(planner(), observe(keys, {}), shards)) == {("grade", 0)}


def test_a_complete_stage_gets_its_manifest_once() -> None:
    keys = keys_of(["prepare"]) - {manifest_key(0, "instructions")}
    assert WriteManifest(0, "prepare") in plan(planner(), observe(keys, {}), {})
    actions = plan(planner(), observe(keys_of(["prepare"]), {}), {})
    assert WriteManifest(0, "prepare") not in actions


NO_MERGE = [name for name in STAGES if name not in ("choose", "merge")]


def test_the_choice_comes_after_every_grade() -> None:
    keys = keys_of(NO_MERGE)
    assert plan(planner(), observe(keys, {}), {}) == [Choose(0)]
    missing = keys - {done_key(0, "grade", Shard(5, 6))}
    assert Choose(0) not in plan(planner(), observe(missing, {}), {})


def test_the_next_iteration_follows_the_choice() -> None:
    keys = keys_of(NO_MERGE) | {"iteration-0/choice.json"}
    actions = plan(planner(), observe(keys, {0: CHOICE}), {})
    assert {action.spec.iteration for action in actions if isinstance(action, Submit)} == {1}


def test_an_adapter_is_merged_before_the_next_iteration() -> None:
    config = tiny_config(lora=True)
    keys = keys_of(NO_MERGE, config) | {"iteration-0/choice.json"}
    state = observe(keys, {0: CHOICE})
    assert submitted(plan(planner(config), state, {})) == {("merge", 0)}
    state = observe(keys | {done_key(0, "merge", Shard(0, 1))}, {0: CHOICE})
    assert ("prepare", 0) in submitted(plan(planner(config), state, {}))


def test_a_kept_policy_is_not_merged() -> None:
    config = tiny_config(lora=True)
    keys = keys_of(NO_MERGE, config) | {"iteration-0/choice.json"}
    kept = CHOICE.model_copy(update={"step": 0, "tree": None})
    starts = submitted(plan(planner(config), observe(keys, {0: kept}), {}))
    assert ("merge", 0) not in starts
    assert ("prepare", 0) in starts


def test_trees_that_were_not_chosen_go_and_the_chosen_one_stays() -> None:
    trees = ["step-000002", "step-000004", "step-000004-merged"]
    keys = keys_of(NO_MERGE) | {"iteration-0/choice.json"}
    keys |= {f"iteration-0/checkpoints/{tree}/_COMPLETE" for tree in trees}
    keys |= {"iteration-0/train_state/step-000004/optimizer.bin"}
    actions = plan(planner(), observe(keys, {0: CHOICE}), {})
    gone = ("iteration-0/train_state/step-000004", "iteration-0/checkpoints/step-000002")
    assert Delete(gone) in actions
    keeping = CONFIG.train.model_copy(update={"keep_unselected": True})
    config = CONFIG.model_copy(update={"train": keeping})
    actions = plan(planner(config), observe(keys, {0: CHOICE}), {})
    assert Delete(gone[:1]) in actions


def test_the_end_is_a_stop_with_exit_code_0() -> None:
    config = tiny_config(iterations=1)
    keys = keys_of(NO_MERGE, config) | {"iteration-0/choice.json"}
    (stop,) = plan(planner(config), observe(keys, {0: CHOICE}), {})
    assert isinstance(stop, Stop)
    assert stop.exit_code == 0


@pytest.mark.parametrize(
    ("attempts", "exit_code", "ends"),
    [
        *[(1, 78, True), (1, 65, True)],
        *[(1, 1, False), (2, 1, False), (3, 1, True)],
        *[(9, 75, False), (10, 75, True)],
        *[(9, -9, False), (10, -9, True), (9, 137, False)],
        *[(2, 0, False), (3, 0, True)],
    ],
)
def test_a_failed_shard_is_tried_again_up_to_a_bound(
    attempts: int, exit_code: int, ends: bool
) -> None:
    failed = ShardState("ended", attempts, exit_code, "no space left on device")
    actions = plan(planner(), observe([], {}), {ShardId(0, "prepare", 1): failed})
    if ends:
        (stop,) = actions
        assert isinstance(stop, Stop)
        assert stop.exit_code == exit_code
        assert "iteration 0 prepare shard 1" in stop.reason
        assert exit_code == 0 or "no space left on device" in stop.reason
    else:
        assert ("prepare", 1) in submitted(actions)


def test_whole_stages_wait_for_all_their_inputs_and_checkpoints_go_one_by_one() -> None:
    keys = {done_key(0, "prepare", Shard(0, 2))}
    actions = plan(planner(unit="stage"), observe(keys, {}), {})
    jobs = {action.spec.name: action.spec for action in actions if isinstance(action, Submit)}
    assert list(jobs) == ["tiny-0-prepare", "tiny-0-respond-0"]
    assert jobs["tiny-0-prepare"].shards == (1,)  # what exists is not redone
    assert jobs["tiny-0-respond-0"].shards == (0, 1)


def part(*stages: str, config: RunConfig = CONFIG) -> RunConfig:
    """A run of some stages only."""
    values = config.model_dump(mode="json") | {"stages": stages, "iterations": 1}
    return RunConfig.model_validate(values)


def test_a_run_may_have_a_part_of_the_pipeline() -> None:
    config = part("respond", "grade")
    assert num_shards(config, "respond") == config.shards.respond  # the policy alone
    assert submitted(plan(planner(config), observe([], {}), {})) == {("respond", 0), ("respond", 1)}
    keys = keys_of(["respond"], config) | {done_key(0, "grade", Shard(0, 2))}
    assert submitted(plan(planner(config), observe(keys, {}), {})) == {("grade", 1)}
    keys = keys_of(["respond", "grade"], config)
    (stop,) = plan(planner(config), observe(keys, {}), {})
    assert isinstance(stop, Stop)
    assert stop.exit_code == 0
    assert {job.stage.name for job in every_job(planner(config))} == {"respond", "grade"}


def test_training_on_imported_pairs_keeps_its_trees() -> None:
    config = part("reflogp", "train")
    pairs = {done_key(0, "pair", Shard(0, 1))}
    actions = plan(planner(config), observe(pairs, {}), {})
    assert submitted(actions) == {("reflogp", 0), ("reflogp", 1)}
    assert WriteManifest(0, "pair") in actions
    keys = keys_of(["pair", "reflogp", "train"], config)
    trees = {
        "iteration-0/checkpoints/step-000002/_COMPLETE",
        "iteration-0/train_state/step-000002/s",
    }
    assert plan(planner(config), observe(keys | trees, {}), {}) == [
        Delete(("iteration-0/train_state/step-000002",))
    ]


@pytest.mark.parametrize(
    ("stages", "lacking"),
    [
        (("reflogp", "train"), "reflogp reads pairs, which are not here"),
        (("grade",), "grade reads responses"),
        (("respond", "grade", "choose"), "choose reads checkpoints"),
    ],
)
def test_a_part_without_its_inputs_stops_instead_of_waiting(
    stages: tuple[str, ...], lacking: str
) -> None:
    config = part(*stages)
    (stop,) = (one for one in plan(planner(config), observe([], {}), {}) if isinstance(one, Stop))
    assert stop.exit_code == 78
    assert lacking in stop.reason


@pytest.mark.parametrize(
    "changes",
    [{"stages": ["train"], "iterations": 2}, {"stages": []}, {"stages": ["train", "train"]}],
)
def test_stages_that_cannot_be_a_run_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="stages"):
        RunConfig.model_validate(CONFIG.model_dump(mode="json") | {"iterations": 1} | changes)


def test_every_stage_has_a_name_in_the_configuration() -> None:
    assert CONFIG.stages == tuple(STAGES)


@pytest.mark.parametrize("unit", ["shard", "stage"])
def test_ten_thousand_shards_are_planned_in_under_a_second(unit: Unit) -> None:
    config = tiny_config(shards=10_000)
    keys, seconds = keys_of(["prepare"], config), []
    for _ in range(3):  # in one of them Python may look for garbage in all that the tests have made
        started = time.process_time()
        state = observe(keys, {})
        actions = plan(planner(config, unit), state, {})
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1.0
    assert ("sample", 9_999) in submitted(actions)
