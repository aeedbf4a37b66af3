"""export, gc, import, fork: what they make, and what they refuse."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from controller.fork import FORK, Fork
from controller.gc import Collection
from controller.importing import import_benchmark, import_model
from controller.places import RunPlace, run_place
from rlaifv.config import BenchmarkSpec, RunConfig
from rlaifv.errors import ConfigError
from rlaifv.pipeline import CONFIG, Shard, checkpoint_key, part_key, train_state_key
from rlaifv.recipes import Wishes, build_config
from rlaifv.store import COMPLETE, open_store
from tests.commands_support import command, finished_run, go_on, keeping_config
from tests.fake_world import HOSTILE, tiny_config

Capture = pytest.CaptureFixture[str]


def card(folder: Path) -> dict[str, Any]:
    """The card's header."""
    text = (folder / "README.md").read_text()
    header: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return header


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- export -------------------------------------------------------------------------------------


def test_exported_pairs_are_the_parts_with_a_card(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    out = tmp_path / "deep/out"
    assert command("export", "pairs", "tiny", "--to", str(out), root=tmp_path) == 0
    assert capsys.readouterr().out.strip() == str(out)
    part = place.folder / part_key(1, "pairs", Shard(0, 1))
    assert (out / "data/iteration-1.parquet").read_bytes() == part.read_bytes()
    (config,) = card(out)["configs"]
    files = {entry["split"]: entry["path"] for entry in config["data_files"]}
    assert files == {
        "iteration_0": "data/iteration-0.parquet",
        "iteration_1": "data/iteration-1.parquet",
    }
    assert command("export", "pairs", "tiny", "--to", str(out), root=tmp_path) == 78
    assert "not an empty folder" in capsys.readouterr().err
    one = str(tmp_path / "one")
    words = ["export", "pairs", "tiny", "--to", one, "--iteration", "1"]
    assert command(*words, root=tmp_path) == 0
    assert [path.name for path in (tmp_path / "one/data").iterdir()] == ["iteration-1.parquet"]
    assert command(*words[:-1], "9", root=tmp_path) == 65


@pytest.mark.slow
def test_datasets_opens_exported_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finished_run(tmp_path)
    out = str(tmp_path / "out")
    assert command("export", "pairs", "tiny", "--to", out, root=tmp_path) == 0
    loaded = datasets.load_dataset(out, cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {
        "iteration_0": 16,
        "iteration_1": 16,
    }
    row = loaded["iteration_1"][3]
    assert row["image"].size == (40, 30)
    assert HOSTILE in row["chosen"]


def test_an_exported_checkpoint_is_the_chosen_tree_with_a_card(tmp_path: Path) -> None:
    finished_run(tmp_path)
    out = tmp_path / "out"
    assert command("export", "checkpoint", "tiny", "--to", str(out), root=tmp_path) == 0
    assert (out / "weights").read_text() == "1 4"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "weights"]
    assert card(out)["library_name"] == "transformers"
    assert "test/response_hallucination" in (out / "README.md").read_text()


def test_an_exported_adapter_is_the_merged_tree(tmp_path: Path) -> None:
    finished_run(tmp_path, keeping_config(lora=True))
    out = tmp_path / "out"
    words = ["export", "checkpoint", "tiny", "--to", str(out), "--iteration", "0"]
    assert command(*words, root=tmp_path) == 0
    assert (out / "weights").read_text() == "merged 0"


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    (place.folder / checkpoint_key(1, 4) / "weights").write_text("1 5")
    out = tmp_path / "out"
    assert command("export", "checkpoint", "tiny", "--to", str(out), root=tmp_path) == 65
    assert "SHA-256" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_source_name_cannot_break_out_of_a_card(tmp_path: Path) -> None:
    config = tiny_config()
    source = "x`|\n---\nlicense: mit\n# " + HOSTILE
    config = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"source": source})}
    )
    finished_run(tmp_path, config)
    out = tmp_path / "out"
    assert command("export", "pairs", "tiny", "--to", str(out), root=tmp_path) == 0
    assert "license" not in card(out)
    lines = (out / "README.md").read_text().splitlines()
    assert lines.count("---") == 2
    (line,) = [line for line in lines if line.startswith("| instructions |")]
    assert line.count("|") == 3
    assert line.count("`") == 2


# --- gc -----------------------------------------------------------------------------------------


def make_waste(place: RunPlace) -> None:
    """What killed writers and a training leave behind, two days old."""
    with place.store.new_tree(train_state_key(1, 2)) as folder:
        (folder / "state").write_text("large")
    unfinished = place.folder / "iteration-1/checkpoints/step-000009"
    temporary = place.folder / "iteration-1/pairs/.tmp-abc"
    for folder in (unfinished, temporary):
        folder.mkdir()
        (folder / "weights").write_text("half")
        for path in (folder / "weights", folder):
            os.utime(path, (time.time() - 200_000,) * 2)


def test_gc_lists_first_and_removes_when_told(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path, keeping_config())
    make_waste(place)
    before = snapshot(place.folder)
    capsys.readouterr()
    assert command("gc", "tiny", "--json", root=tmp_path) == 0
    found = Collection.model_validate_json(capsys.readouterr().out)
    assert {(item.kind, item.key) for item in found.items} == {
        ("checkpoint", "iteration-0/checkpoints/step-000002"),
        ("checkpoint", "iteration-1/checkpoints/step-000002"),
        ("training state", "iteration-1/train_state/step-000002"),
        ("tree", "iteration-1/checkpoints/step-000009"),
        ("temporary", "iteration-1/pairs/.tmp-abc"),
    }
    assert [item.bytes for item in found.items if item.kind in ("tree", "temporary")] == [4, 4]
    assert snapshot(place.folder) == before
    assert command("gc", "tiny", "--delete", root=tmp_path) == 0
    assert "removed" in capsys.readouterr().out
    left = snapshot(place.folder)
    gone = {key for key in before if key not in left}
    for item in found.items:
        assert any(key.startswith(f"{item.key}/") for key in gone)
    assert all(any(key.startswith(f"{i.key}/") for i in found.items) for key in gone)
    assert command("verify", "tiny", root=tmp_path) == 0
    capsys.readouterr()
    assert command("gc", "tiny", root=tmp_path) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_gc_leaves_alone_what_a_writer_may_be_at_work_on(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    (place.folder / "iteration-1/pairs/.tmp-new").mkdir()
    (place.folder / "iteration-1/choice.json").unlink()
    with place.store.new_tree(checkpoint_key(1, 2)) as folder:
        (folder / "weights").write_text("a candidate of an iteration without choice")
    assert command("gc", "tiny", root=tmp_path) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_gc_does_not_delete_while_the_run_is_driven(tmp_path: Path, capsys: Capture) -> None:
    from controller.lock import hold

    place = finished_run(tmp_path, keeping_config())
    with hold(place.folder):
        assert command("gc", "tiny", root=tmp_path) == 0
        assert command("gc", "tiny", "--delete", root=tmp_path) == 75
    assert place.store.tree_exists(checkpoint_key(0, 2))


# --- import -------------------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".hidden").write_text("no")
    (folder / COMPLETE).write_text("not ours")
    return folder


def test_an_imported_model_is_a_tree_with_digests(tmp_path: Path, capsys: Capture) -> None:
    source = model_folder(tmp_path / "policy")
    assert command("import", "model", str(source), root=tmp_path / "root") == 0
    uri = capsys.readouterr().out.splitlines()[0]
    assert uri == (tmp_path / "root/models/policy").as_uri()
    store = open_store(str(tmp_path / "root"))
    names = [info.path for info in store.tree_files("models/policy")]
    assert names == ["config.json", "model.safetensors"]
    (source / "model.safetensors").write_bytes(b"changed")
    copied = store.tree_path("models/policy") / "model.safetensors"
    assert copied.read_bytes() == b"weights"
    assert command("import", "model", str(source), root=tmp_path / "root") == 78
    assert "with other files (first: 'model.safetensors')" in capsys.readouterr().err
    (source / "model.safetensors").write_bytes(b"weights")
    assert command("import", "model", str(source), root=tmp_path / "root") == 0


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "policy")
    (source / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled weights are not imported"):
        import_model(str(tmp_path), str(source))
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        import_model(str(tmp_path), str(source))


def test_a_hub_id_without_a_hub_says_what_to_do(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert command("import", "model", "nobody/nothing@main", root=tmp_path) == 78
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../evil", "a/../b", "/abs", "a/b/c", "", ".hidden", "a\nb", "a/"]
)
def test_a_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="expected letters"):
        import_benchmark(str(tmp_path / "root"), str(tmp_path / "file.jsonl"), name=name)
    assert not (tmp_path / "root").exists()


def test_links_to_folders_and_odd_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "loop").symlink_to(folder)
    with pytest.raises(ConfigError, match="a link to a folder"):
        import_benchmark(str(tmp_path / "root"), str(folder), name="bench")
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match="not a plain file"):
        import_benchmark(str(tmp_path / "root"), str(folder), name="bench")
    (folder / "pipe").unlink()
    with pytest.raises(ConfigError, match="no files"):
        import_benchmark(str(tmp_path / "root"), str(folder), name="bench")
    assert not (tmp_path / "root").exists()


def test_an_imported_benchmark_keeps_its_folders(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "bench"
    (folder / "images").mkdir(parents=True)
    (folder / "questions.jsonl").write_text("{}\n")
    (folder / "images/1.png").write_bytes(b"png")
    words = ["import", "benchmark", "mine", str(folder)]
    assert command(*words, root=tmp_path / "root") == 0
    tree = open_store(str(tmp_path / "root")).tree_path("benchmarks/mine")
    assert (tree / "images/1.png").read_bytes() == b"png"
    one = ["import", "benchmark", "one", str(folder / "questions.jsonl")]
    capsys.readouterr()
    assert command(*one, root=tmp_path / "root") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("/benchmarks/one/questions.jsonl")
    assert command("import", "benchmark", "x", str(tmp_path / "gone"), root=tmp_path) == 78


# --- fork ---------------------------------------------------------------------------------------


def fork(root: Path, *words: str) -> int:
    return command("fork", "tiny", "new", *words, root=root)


def test_a_fork_keeps_what_lies_before_and_computes_the_rest(
    tmp_path: Path, capsys: Capture
) -> None:
    origin = finished_run(tmp_path)
    before = snapshot(origin.folder)
    assert fork(tmp_path, "--from", "train@1", "--set", "train.beta=0.5") == 0
    out = capsys.readouterr().out
    assert "train.beta: 0.1 -> 0.5" in out
    assert f"run --config {tmp_path}/new/config.json --root {tmp_path}" in out
    new = run_place(str(tmp_path), "new")
    kept = snapshot(new.folder)
    record = Fork.model_validate_json(kept.pop(FORK))
    config = RunConfig.model_validate_json(kept.pop(CONFIG))
    assert (config.name, config.train.beta) == ("new", 0.5)
    assert all(before[key] == data for key, data in kept.items())
    stages = {key.split("/")[1] for key in kept if key.startswith("iteration-1/")}
    assert stages == {
        *("instructions", "answers", "claims", "verdicts", "pairs", "reflogps"),
    }
    assert "iteration-0/choice.json" in kept
    assert f"iteration-0/checkpoints/step-000004/{COMPLETE}" in kept
    assert record.copied["iteration-0/checkpoints/step-000004"] == origin.store.tree_digest(
        "iteration-0/checkpoints/step-000004"
    )
    part = part_key(1, "pairs", Shard(0, 1))
    assert (new.folder / part).stat().st_ino == (origin.folder / part).stat().st_ino
    assert go_on(new, config) == 0
    assert command("verify", "new", root=tmp_path) == 0
    assert snapshot(origin.folder) == before


def test_the_command_that_a_fork_prints_asks_for_its_configuration(tmp_path: Path) -> None:
    finished_run(tmp_path)
    assert fork(tmp_path, "--from", "train@1", "--set", "train.learning_rate=3e-07") == 0
    place = run_place(str(tmp_path), "new")
    wishes = Wishes(config_file=place.folder / CONFIG)
    assert build_config(wishes) == place.store.read_json(CONFIG, RunConfig)


def test_a_fork_from_choose_has_every_grade_and_names_lost_trees(
    tmp_path: Path, capsys: Capture
) -> None:
    finished_run(tmp_path)
    assert fork(tmp_path, "--from", "choose@1", "--set", "choose.max_recall_drop=0.5") == 0
    assert "step-000002: gone from the origin" in capsys.readouterr().out
    new = run_place(str(tmp_path), "new")
    assert new.store.read_json(FORK, Fork).gone == ["iteration-1/checkpoints/step-000002"]
    assert new.store.exists("iteration-1/grades/manifest.json")
    assert not new.store.exists("iteration-1/choice.json")
    assert go_on(new, new.store.read_json(CONFIG, RunConfig)) == 0


def test_a_new_judge_is_a_fork_from_grade(tmp_path: Path) -> None:
    origin = finished_run(tmp_path)
    config = origin.store.read_json(CONFIG, RunConfig)
    judged = [
        one.model_copy(update={"mode": "rules"}).model_dump(mode="json")
        for one in config.respond.benchmarks
    ]
    wish = f"respond.benchmarks={json.dumps(judged)}"
    assert fork(tmp_path, "--from", "choose@1", "--set", wish) == 78
    assert fork(tmp_path, "--from", "grade@1", "--set", wish) == 0
    other = BenchmarkSpec(name="third", path="nowhere").model_dump(mode="json")
    wish = f"respond.benchmarks={json.dumps([*judged, other])}"
    words = ["fork", "tiny", "other", "--from", "grade@1", "--set", wish]
    assert command(*words, root=tmp_path) == 78


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "train", "--set", "pair.max_per_image=1"], "pair.max_per_image: 2 -> 1"),
        (["--from", "pair", "--set", "seed=3"], "seed: 0 -> 3 (stage prepare)"),
        (["--from", "prepare@1", "--set", "seed=3"], "all iterations must agree"),
        (["--from", "train@1", "--set", "train.epochs=3"], "all iterations must agree"),
        (["--from", "train@1", "--set", "train.lora.rank=4"], "all iterations must agree"),
        (["--from", "respond", "--set", "shards.respond=3"], "step-000002: gone"),
        (["--from", "train", "--set", "recipe=mine"], "no stage reads it"),
        (["--from", "nothing"], "expected one of prepare"),
        (["--from", "train@x"], "expected a number"),
        (["--from", "train@2"], "iterations 0 to 1"),
        (["--from", "train", "--set", "train.nope=1"], "unknown key"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(
    tmp_path: Path, capsys: Capture, words: list[str], said: str
) -> None:
    finished_run(tmp_path)
    assert fork(tmp_path, *words) == 78
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../evil", "a/b", "UPPER", "", "tiny"])
def test_a_fork_needs_a_name_of_its_own(tmp_path: Path, name: str) -> None:
    finished_run(tmp_path)
    before = sorted(path.name for path in tmp_path.parent.rglob("config.json"))
    assert command("fork", "tiny", name, "--from", "train", root=tmp_path) == 78
    assert sorted(path.name for path in tmp_path.parent.rglob("config.json")) == before


def test_an_interrupted_fork_is_finished_by_the_same_command_only(
    tmp_path: Path, capsys: Capture
) -> None:
    finished_run(tmp_path)
    assert fork(tmp_path, "--from", "train@1") == 0
    whole = snapshot(tmp_path / "new")
    (tmp_path / "new" / CONFIG).unlink()  # as if killed before the end
    (tmp_path / "new" / part_key(1, "pairs", Shard(0, 1))).unlink()
    assert fork(tmp_path, "--from", "train@0") == 78
    assert "another fork was begun" in capsys.readouterr().err
    assert fork(tmp_path, "--from", "train@1") == 0
    assert snapshot(tmp_path / "new") == whole
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert command("fork", "tiny", "full", "--from", "train", root=tmp_path) == 78


def test_exported_parts_keep_their_provenance(tmp_path: Path) -> None:
    finished_run(tmp_path)
    out = tmp_path / "out"
    assert command("export", "pairs", "tiny", "--to", str(out), root=tmp_path) == 0
    metadata = pq.read_metadata(out / "data/iteration-0.parquet").metadata
    assert json.loads(metadata[b"rlaifv"])["stage"] == "pair"
