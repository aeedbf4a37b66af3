"""The stages on tiny random models: same rows however they are run."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import rlaifv.models
from rlaifv.config import BenchmarkSpec, LoraConfig, ModelSpec, RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.models.base import VisionLanguageModel
from rlaifv.pipeline import (
    STAGES,
    Shard,
    checkpoint_key,
    choice_key,
    merged_key,
    part_key,
    train_state_key,
)
from rlaifv.records import (
    Answer,
    Checkpoint,
    Choice,
    Claim,
    Grade,
    Instruction,
    Merge,
    PreferencePair,
    Quarantined,
    ReferenceLogps,
    Response,
    Verdict,
)
from rlaifv.store import FileInfo, Store
from tests.jobs_support import (
    LOOP,
    TO_VERIFY,
    all_rows,
    digests,
    environment,
    make_benchmark,
    make_config,
    make_run,
    make_source,
    run_job,
    run_stages,
    spawn_stages,
)
from tests.test_models_memory import limited
from tests.tiny import make_tiny_chat, make_tiny_llava

pytestmark = pytest.mark.slow
ONE = Shard(0, 1)
ARTIFACT_OF = {stage: STAGES[stage].writes for stage in LOOP if stage != "choose"}
ROWS = (
    ("prepare", Instruction),
    ("sample", Answer),
    ("claim", Claim),
    ("verify", Verdict),
    ("pair", PreferencePair),
    ("reflogp", ReferenceLogps),
    ("train", Checkpoint),
    ("respond", Response),
    ("grade", Grade),
)


class World:
    """A tiny model, a source with two bad rows, a benchmark."""

    def __init__(self, folder: Path) -> None:
        self.model = make_tiny_llava(folder / "model")
        self.source = make_source(folder / "source", num_rows=22, bad=(3, 9))
        self.benchmark: BenchmarkSpec = make_benchmark(folder / "benchmark")

    def config(self, **changes: Any) -> RunConfig:
        return make_config(self.source, model=self.model, benchmarks=[self.benchmark], **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with its first iteration done, in one shard."""
    run = make_run(tmp_path_factory.mktemp("finished") / "run", world.config())
    run_stages(run, world.config(), LOOP)
    return run


def test_one_three_and_eight_shards_give_the_same_rows(
    world: World, finished: Store, tmp_path: Path
) -> None:
    expected = {stage: all_rows(finished, world.config(), stage, record) for stage, record in ROWS}
    assert all(expected.values())
    assert len(expected["prepare"]) == 18  # two are set aside, in different groups
    for count in (3, 8):
        config = world.config(num_shards=count)
        run = make_run(tmp_path / str(count), config)
        run_stages(run, config, LOOP)
        for stage, record in ROWS:
            assert all_rows(run, config, stage, record) == expected[stage], (count, stage)
        for row in all_rows(run, config, "train", Checkpoint):
            assert run.tree_digest(row.tree) == finished.tree_digest(row.tree)
        assert run.read_bytes(choice_key(0)) == finished.read_bytes(choice_key(0))


def test_pairs_are_in_the_same_order_for_every_number_of_shards(
    world: World, finished: Store, tmp_path: Path
) -> None:
    config = world.config(num_shards=3)
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, (*TO_VERIFY, "pair"))
    key = part_key(0, "pairs", ONE)
    assert run.provenance(key).rows_sha256 == finished.provenance(key).rows_sha256


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_process_of_its_own_gives_the_same_rows_whatever_its_hash_seed(
    world: World, finished: Store, tmp_path: Path, hash_seed: str
) -> None:
    config = world.config()
    run = make_run(tmp_path / "run", config)
    spawn_stages(run, LOOP, env=environment(PYTHONHASHSEED=hash_seed))
    assert digests(run, config, ARTIFACT_OF) == digests(finished, config, ARTIFACT_OF)
    assert run.read_bytes(choice_key(0)) == finished.read_bytes(choice_key(0))


def test_the_loop_goes_on_with_the_chosen_policy(world: World, finished: Store) -> None:
    choice = finished.read_json(choice_key(0), Choice)
    rows = all_rows(finished, world.config(), "train", Checkpoint)
    assert [row.step for row in sorted(rows, key=lambda row: row.step)] == [
        candidate.step for candidate in choice.candidates[1:]
    ]
    assert all(finished.tree_exists(row.tree) for row in rows)
    assert set(choice.baseline) == set(choice.metrics)
    assert choice.num_pairs == len(all_rows(finished, world.config(), "pair", PreferencePair))


def test_every_checkpoint_answers_and_is_graded(world: World, finished: Store) -> None:
    responses = all_rows(finished, world.config(), "respond", Response)
    steps = {row.step for row in all_rows(finished, world.config(), "train", Checkpoint)} | {0}
    expected = sorted((step, f"q{n}") for step in steps for n in range(5))
    assert sorted((row.step, row.question_id) for row in responses) == expected
    grades = all_rows(finished, world.config(), "grade", Grade)
    assert sorted((row.step, row.question_id) for row in grades) == expected


def test_quarantined_rows_are_stored_and_counted(finished: Store) -> None:
    origin = finished.provenance(part_key(0, "instructions", ONE))
    rows = list(finished.read_part(part_key(0, "quarantine/prepare", ONE), Quarantined))
    assert origin.quarantined == len(rows) == 2
    assert {row.row for row in rows} == {3, 9}


def test_the_provenance_names_models_and_inputs(finished: Store) -> None:
    origin = finished.provenance(part_key(0, "answers", ONE))
    instructions = part_key(0, "instructions", ONE)
    assert origin.inputs[instructions] == finished.provenance(instructions).rows_sha256
    assert "batch 3 weights " in origin.notes["policy"]
    assert "labeller" in finished.provenance(part_key(0, "verdicts", ONE)).notes
    assert finished.provenance(part_key(0, "claims", ONE)).notes["engine"] == "rules"


def test_the_provenance_says_which_batch_fitted_into_memory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config(num_shards=2)
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, ("prepare",))
    load = rlaifv.models.load_local
    with monkeypatch.context() as patched:

        def tight(spec: ModelSpec) -> VisionLanguageModel:
            model = load(spec)
            limited(model, patched, rows=1)
            return model

        patched.setattr(rlaifv.models, "load_local", tight)
        assert run_job(run, "sample", shard="0/2") == 0
    assert run_job(run, "sample", shard="1/2") == 0
    keys = [part_key(0, "answers", Shard(index, 2)) for index in range(2)]
    assert [run.provenance(key).notes["batch size"] for key in keys] == ["1", "3"]
    run_stages(run, config, ("claim", "verify", "pair"))  # parts of one model for all that


def test_shuffled_verdicts_are_the_same_numbers_dealt_otherwise(
    world: World, finished: Store, tmp_path: Path
) -> None:
    config = world.config()
    config = config.model_copy(
        update={"verify": config.verify.model_copy(update={"control": "shuffled"})}
    )
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, TO_VERIFY)
    plain = all_rows(finished, config, "verify", Verdict)
    shuffled = all_rows(run, config, "verify", Verdict)
    assert [row.claim_id for row in plain] == [row.claim_id for row in shuffled]
    assert plain != shuffled
    assert sorted(row.p_yes for row in plain) == sorted(row.p_yes for row in shuffled)


class Killed(Exception):
    """Stands for a SIGKILL between two writes."""


def stop_at(run: Store, doomed: str) -> Store:
    """The same run, dying when a tree of this name is about to be committed."""
    commit: Callable[[str, Path, Iterable[FileInfo]], bool] = run.backend.put_tree_if_absent

    def put(key: str, folder: Path, files: Iterable[FileInfo]) -> bool:
        if key == doomed:
            raise Killed
        return commit(key, folder, files)

    run.backend.put_tree_if_absent = put  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("at", ["checkpoint", "state", "second checkpoint"])
def test_training_that_was_killed_ends_with_the_same_rows_and_weights(
    world: World,
    finished: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    config = world.config()
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, ("prepare", "sample", "claim", "verify", "pair", "reflogp"))
    rows = sorted(all_rows(finished, config, "train", Checkpoint), key=lambda row: row.step)
    doomed = {
        "checkpoint": rows[0].tree,
        "state": train_state_key(0, rows[0].step),
        "second checkpoint": rows[1].tree,
    }[at]
    with monkeypatch.context() as patched:
        patched.setattr("jobs._entry.open_store", lambda uri: stop_at(reopened(run), doomed))
        with pytest.raises(Killed):
            run_job(run, "train")
    assert run_job(run, "train") == 0
    assert sorted(all_rows(run, config, "train", Checkpoint), key=lambda row: row.step) == rows
    assert [run.tree_digest(row.tree) for row in rows] == [
        finished.tree_digest(row.tree) for row in rows
    ]


def reopened(run: Store) -> Store:
    from rlaifv.store import open_store

    return open_store(str(run))


def test_too_few_pairs_leave_the_policy_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world.config()
    train = config.train.model_copy(update={"min_pairs": 1000})
    config = config.model_copy(update={"train": train})
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, LOOP)
    choice = run.read_json(choice_key(0), Choice)
    assert (choice.step, choice.tree) == (0, None)
    assert "fewer than the 1000" in choice.reason
    assert "no training:" in capsys.readouterr().err
    run_stages(run, config, ("prepare", "sample"), iteration=1)
    inputs = run.provenance(part_key(1, "answers", ONE)).inputs
    assert inputs["policy"] == config.policy.path


def test_a_checkpoint_that_is_not_there_yet_is_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world.config()
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, (*TO_VERIFY, "pair", "reflogp"))
    assert run_job(run, "respond", shard="1/3") == ArtifactError.exit_code
    assert "iteration-0/checkpoints/step-00000" in capsys.readouterr().err


def test_an_adapter_answers_and_a_chosen_one_is_merged(world: World, tmp_path: Path) -> None:
    config = world.config(lora=LoraConfig(rank=4))
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, LOOP[:-1])
    (first, *_) = sorted(all_rows(run, config, "train", Checkpoint), key=lambda row: row.step)
    assert first.kind == "lora"
    responses = all_rows(run, config, "respond", Response)
    assert {row.step for row in responses} >= {0, first.step}
    choice = Choice(
        step=first.step,
        tree=first.tree,
        metrics={},
        baseline={},
        candidates=[],
        num_pairs=first.num_pairs,
        reason="for the test",
    )
    run.write_json_once(choice_key(0), choice)
    run_stages(run, config, ("merge",))
    (merged,) = all_rows(run, config, "merge", Merge)
    assert merged.tree == merged_key(0, first.step)
    assert run.tree_exists(merged.tree)
    assert merged.max_logit_difference < 1e-3
    run_stages(run, config, ("prepare", "sample"), iteration=1)


def test_nothing_is_merged_without_adapters(world: World, finished: Store) -> None:
    run_stages(finished, world.config(), ("merge",))
    assert all_rows(finished, world.config(), "merge", Merge) == []


def test_a_chat_model_splits_answers_the_same_way_in_every_sharding(
    world: World, tmp_path: Path
) -> None:
    chat = ModelSpec(
        path=str(make_tiny_chat(tmp_path / "chat")), family="text", dtype="float32", batch_size=4
    )
    rows = []
    for count in (1, 3):
        config = world.config(num_shards=count)
        claim = config.claim.model_copy(update={"model": chat, "max_new_tokens": 24})
        config = config.model_copy(update={"claim": claim})
        run = make_run(tmp_path / str(count), config)
        run_stages(run, config, ("prepare", "sample", "claim"))
        rows.append(all_rows(run, config, "claim", Claim))
        notes = run.provenance(part_key(0, "claims", Shard(0, count))).notes
        assert notes["engine"] == "model"
        assert notes["split_prompt"].startswith("built-in ")
    assert rows[0] == rows[1]
    assert rows[0]


def test_checkpoints_can_be_answered_before_training_has_ended(
    world: World, finished: Store, tmp_path: Path
) -> None:
    config = world.config()
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, (*TO_VERIFY, "pair", "reflogp"))
    first = min(all_rows(finished, config, "train", Checkpoint), key=lambda row: row.step)
    with run.new_tree(checkpoint_key(0, first.step)) as folder:
        for path in finished.tree_path(first.tree).iterdir():
            if path.name != "_COMPLETE":
                (folder / path.name).write_bytes(path.read_bytes())
    assert run_job(run, "respond", shard="1/3") == 0
    key = part_key(0, "responses", Shard(1, 3))
    assert run.provenance(key).rows_sha256 == finished.provenance(key).rows_sha256


def test_choosing_by_hand_writes_what_the_rule_says(world: World, finished: Store) -> None:
    from rlaifv.choosing import choose_checkpoint

    stored = json.loads(finished.read_bytes(choice_key(0)))
    assert Choice.model_validate(stored) == choose_checkpoint(finished, world.config(), 0)
