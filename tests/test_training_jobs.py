"""`jobs.train` and `jobs.reflogp` together, by one process and by a gang."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlaifv.config import ModelSpec, RunConfig
from rlaifv.pipeline import Shard, choice_key, merged_key, part_key
from rlaifv.records import Checkpoint, Choice, PreferencePair, ReferenceLogps
from rlaifv.store import Provenance, Store, open_store
from tests.jobs_support import ROOT, environment, make_config, make_run, run_job
from tests.tiny import make_tiny_llava
from tests.training_support import LORA, make_pair, reference_logps

ONE = Shard(0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


def run_with_pairs(folder: Path, model: Path, *, num_pairs: int = 10) -> Store:
    config = make_config(folder / "unused", model=model)
    run = make_run(folder, config)
    write_pairs(run, config, num_pairs)
    return run


def write_pairs(run: Store, config: RunConfig, num_pairs: int, *, iteration: int = 0) -> None:
    def origin() -> Provenance:
        return Provenance(
            stage="pair", run=config.name, iteration=iteration, shard="0/1", code_version="0",
            config_sha256="", inputs={}, seed=0,
        )  # fmt: skip

    rows = (make_pair(index) for index in range(num_pairs))
    run.write_part(part_key(iteration, "pairs", ONE), rows, record=PreferencePair, origin=origin)


def test_reference_of_other_pairs_or_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_pairs(tmp_path / "run", model)
    assert run_job(run, "reflogp") == 0
    (tmp_path / "run" / part_key(0, "pairs", ONE)).unlink()
    config = make_config(tmp_path / "unused", model=model)
    write_pairs(run, config, 9)
    assert run_job(run, "train") == 65
    assert "made with another pairs" in capsys.readouterr().err
    (tmp_path / "run" / part_key(0, "pairs", ONE)).unlink()
    write_pairs(run, config, 10)
    template = model / "chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept + " ")
    assert run_job(run, "train") == 65
    assert "made with another reference processor" in capsys.readouterr().err
    template.write_text(kept)
    make_tiny_llava(model, seed=5)
    assert run_job(run, "train") == 65
    assert "made with another reference weights" in capsys.readouterr().err
    make_tiny_llava(model)
    assert run_job(run, "train") == 0


def test_a_merged_adapter_is_policy_and_reference_of_the_next_iteration(
    model: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "unused", model=model, lora=LORA)
    run = make_run(tmp_path / "run", config)
    write_pairs(run, config, 10)
    for stage in ("reflogp", "train"):
        assert run_job(run, stage) == 0
    last = list(run.read_part(part_key(0, "checkpoints", ONE), Checkpoint))[-1]
    choice = Choice(
        step=last.step, tree=last.tree, metrics={}, baseline={}, candidates=[],
        num_pairs=last.num_pairs, reason="for the test",
    )  # fmt: skip
    run.write_json_once(choice_key(0), choice)
    assert run_job(run, "merge") == 0
    write_pairs(run, config, 10, iteration=1)
    for stage in ("reflogp", "train"):
        assert run_job(run, stage, iteration=1) == 0
    merged = merged_key(0, last.step)
    policy = ModelSpec(path=str(run.tree_path(merged)), dtype="float32")
    expected = reference_logps(policy, [make_pair(index) for index in range(10)])
    found, before = (
        {row.pair_id: row for row in run.read_part(part_key(k, "reflogps", ONE), ReferenceLogps)}
        for k in (1, 0)
    )
    assert found != before
    for pair_id, row in expected.items():
        ours = torch.tensor(found[pair_id].chosen_token_nats)
        torch.testing.assert_close(ours, torch.tensor(row.chosen_token_nats), atol=1e-5, rtol=0)
    for artifact in ("reflogps", "checkpoints"):
        inputs = run.provenance(part_key(1, artifact, ONE)).inputs
        assert inputs["policy"] == run.tree_digest(merged)
    (events,) = (tmp_path / "run/iteration-1/tensorboard").iterdir()
    curves = EventAccumulator(str(events))
    curves.Reload()
    assert curves.Scalars("loss")[0].value == pytest.approx(math.log(2), abs=1e-6)
    adapter = next((tmp_path / "run/iteration-1/checkpoints").glob("step-*/adapter_config.json"))
    assert json.loads(adapter.read_text())["base_model_name_or_path"] == f"{run}/{merged}"


@pytest.mark.slow
def test_gang_started_by_torchruns_variables_writes_what_one_process_writes(
    model: Path, tmp_path: Path
) -> None:
    alone, gang = (run_with_pairs(tmp_path / name, model) for name in ("alone", "gang"))
    for run in (alone, gang):
        assert run_job(run, "reflogp") == 0
    assert run_job(alone, "train") == 0
    command = [sys.executable, "-m", "jobs.train", "--run", str(gang), "--iteration", "0"]
    env = environment(PET_NPROC_PER_NODE="2", PET_STANDALONE="1")
    subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, timeout=300)
    rows = [
        list(open_store(str(r)).read_part(part_key(0, "checkpoints", ONE), Checkpoint))
        for r in (alone, gang)
    ]
    assert [row.step for row in rows[0]] == [row.step for row in rows[1]]
    for left, right in zip(*rows, strict=True):
        assert left.train_loss == pytest.approx(right.train_loss, abs=1e-4)
        trees = (alone.tree_path(left.tree), gang.tree_path(right.tree))
        ours, theirs = (load_file(tree / "model.safetensors") for tree in trees)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=0, msg=name)
    assert list((tmp_path / "gang").rglob("events.out.tfevents*"))
