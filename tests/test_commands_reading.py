"""ls, show, lineage, verify, doctor: what they print, and what they refuse."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from controller.doctor import Diagnosis, recipe_findings
from controller.lineage import Lineage
from controller.ls import Listing, Root
from controller.pair import ShownPair
from controller.verify import Verification
from rlaifv.config import BenchmarkSpec, ModelSpec
from rlaifv.pipeline import Shard, part_key
from rlaifv.recipes import demo, evaluation
from rlaifv.records import Claim
from rlaifv.store import open_store
from tests.commands_support import command, finished_run, keeping_config
from tests.fake_world import tiny_config

Capture = pytest.CaptureFixture[str]
SECOND = part_key(0, "answers", Shard(1, 2))


def printed(capsys: Capture) -> str:
    return capsys.readouterr().out


def test_ls_names_runs_and_imported_trees(tmp_path: Path, capsys: Capture) -> None:
    finished_run(tmp_path)
    finished_run(tmp_path, tiny_config().model_copy(update={"name": "other"}))
    with open_store(str(tmp_path)).new_tree("models/org/policy") as folder:
        (folder / "config.json").write_text("{}")
    capsys.readouterr()
    assert command("ls", root=tmp_path) == 0
    assert printed(capsys).split() == ["other", "tiny", "models/org/policy"]
    assert command("ls", "--json", root=tmp_path) == 0
    assert Root.model_validate_json(printed(capsys)).runs == ["other", "tiny"]


def test_ls_of_a_run_counts_parts_rows_and_files(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    (place.folder / SECOND).unlink()
    (place.folder / "iteration-0/answers/manifest.json").unlink()
    capsys.readouterr()
    assert command("ls", "tiny", "--json", root=tmp_path) == 0
    found = {one.key: one for one in Listing.model_validate_json(printed(capsys)).artifacts}
    answers, pairs = found["iteration-0/answers"], found["iteration-0/pairs"]
    assert (answers.parts, answers.of, answers.rows, answers.complete) == (1, 2, None, False)
    assert (pairs.parts, pairs.of, pairs.rows, pairs.complete) == (1, 1, 16, True)
    assert pairs.bytes == (place.folder / part_key(0, "pairs", Shard(0, 1))).stat().st_size
    tree = found["iteration-1/checkpoints/step-000004"]
    assert (tree.artifact, tree.parts, tree.complete) == ("tree", 1, True)
    assert "iteration-1/choice.json" in found
    assert command("ls", "tiny", root=tmp_path) == 0
    assert "unfinished" in printed(capsys)


def test_ls_of_an_empty_run_and_of_no_folder(tmp_path: Path, capsys: Capture) -> None:
    assert command("ls", root=tmp_path) == 0
    assert "no run here" in printed(capsys)
    assert command("ls", root=tmp_path / "gone") == 78


def test_show_prints_only_the_rows_that_were_asked_for(tmp_path: Path, capsys: Capture) -> None:
    finished_run(tmp_path)
    capsys.readouterr()
    where = ["--where", "answer_id=i0-3/2", "--where", "seed=2"]
    assert command("show", "answers", *where, root=tmp_path) == 0
    (row,) = [json.loads(line) for line in printed(capsys).splitlines()]
    assert (row["answer_id"], row["seed"]) == ("i0-3/2", 2)
    assert command("show", "pairs", "--where", "image.path=5.png", root=tmp_path) == 0
    assert len(printed(capsys).splitlines()) == 2
    assert command("show", "answers", "--where", "colour=red", root=tmp_path) == 78
    assert "no field 'colour'" in capsys.readouterr().err


def test_a_pair_is_shown_with_its_claims(tmp_path: Path, capsys: Capture) -> None:
    finished_run(tmp_path)
    capsys.readouterr()
    assert command("show", "pair", "i1-3/11", "--json", root=tmp_path) == 0
    pair = ShownPair.model_validate_json(printed(capsys))
    assert (pair.iteration, pair.image_path, pair.chosen.answer_id) == (1, "3.png", "i1-3/0")
    assert [(one.p_yes, one.holds) for one in pair.chosen.claims] == [(0.9, True), (0.9, True)]
    assert [(one.p_yes, one.holds) for one in pair.rejected.claims] == [(0.9, True), (0.1, False)]
    assert command("show", "pair", "i1-3/11", "tiny", root=tmp_path) == 0
    text = printed(capsys)
    assert "p(yes) 0.100  p(no) 0.800  rejected" in text
    assert text.isascii()
    assert command("show", "pair", "i1-3/11", "--iteration", "0", root=tmp_path) == 65
    assert command("show", "pair", root=tmp_path) == 78


def test_a_pair_without_verdicts_says_so(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    for index in range(2):
        (place.folder / part_key(0, "verdicts", Shard(index, 2))).unlink()
    capsys.readouterr()
    assert command("show", "pair", "i0-1/1", root=tmp_path) == 0
    assert printed(capsys).count("not asked") == 4


def test_lineage_tells_what_the_footers_say(tmp_path: Path, capsys: Capture) -> None:
    finished_run(tmp_path)
    capsys.readouterr()
    assert command("lineage", "answers", "--iteration", "1", "--json", root=tmp_path) == 0
    found = Lineage.model_validate_json(printed(capsys))
    assert (found.rows, found.seconds, len(found.parts)) == (24, 0.5, 2)
    assert found.parts[1].provenance.shard == "1"
    assert command("lineage", "answers", "--iteration", "1", root=tmp_path) == 0
    text = printed(capsys)
    assert "written by  sample 1 of run tiny" in text
    assert found.parts[0].provenance.rows_sha256 in text
    assert command("lineage", "choice", root=tmp_path) == 78
    assert command("lineage", "answers", "--iteration", "7", root=tmp_path) == 65


def test_a_sound_run_is_verified(tmp_path: Path, capsys: Capture) -> None:
    finished_run(tmp_path, keeping_config(lora=True))
    capsys.readouterr()
    assert command("verify", "tiny", root=tmp_path) == 0
    assert "everything is as it was written" in printed(capsys)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (SECOND, f"{SECOND}: "),
        ("iteration-0/checkpoints/step-000004/weights", "step-000004/weights: SHA-256"),
        ("iteration-0/checkpoints/step-000004/_COMPLETE", "not a valid marker"),
        ("iteration-1/grades/manifest.json", "iteration-1/grades/manifest.json"),
    ],
)
def test_one_flipped_byte_is_named(
    tmp_path: Path, capsys: Capture, damaged: str, said: str
) -> None:
    path = finished_run(tmp_path).folder / damaged
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.unlink()
    path.write_bytes(data)
    capsys.readouterr()
    assert command("verify", "tiny", "--json", root=tmp_path) == 65
    problems = Verification.model_validate_json(printed(capsys)).problems
    assert any(said in f"{one.key}: {one.problem}" for one in problems)
    assert command("verify", "tiny", root=tmp_path) == 65


def test_a_part_written_anew_with_other_rows_is_found(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    key = part_key(0, "claims", Shard(0, 2))
    origin = place.store.provenance(key)
    rows = list(place.store.read_part(key, Claim))[:-1]
    place.store.delete(key)
    place.store.write_part(key, rows, record=Claim, origin=lambda: origin)
    assert command("verify", "tiny", root=tmp_path) == 65
    assert f"{key}: rows, bytes, sha256, rows_sha256: not as" in printed(capsys)


def test_a_footer_that_lies_about_its_rows_is_found(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    path = place.folder / part_key(0, "claims", Shard(0, 2))
    table = pq.read_table(path)
    metadata = pq.read_metadata(path).metadata
    metadata[b"rlaifv"] = metadata[b"rlaifv"].replace(b'"rows":24', b'"rows":25')
    path.unlink()
    pq.write_table(table.slice(1).replace_schema_metadata(metadata), path)
    (place.folder / "iteration-0/claims/manifest.json").unlink()
    assert command("verify", "tiny", root=tmp_path) == 65
    out = printed(capsys)
    assert "23 rows, the footer says 25" in out
    assert "rows have SHA-256" in out


def test_a_part_made_from_other_inputs_is_found(tmp_path: Path, capsys: Capture) -> None:
    place = finished_run(tmp_path)
    key = part_key(0, "claims", Shard(0, 2))
    origin = place.store.provenance(key)
    made = origin.model_copy(update={"inputs": {part_key(0, "answers", Shard(0, 2)): "0" * 64}})
    rows = list(place.store.read_part(key, Claim))
    place.store.delete(key)
    place.store.write_part(key, rows, record=Claim, origin=lambda: made)
    (place.folder / "iteration-0/claims/manifest.json").unlink()
    assert command("verify", "tiny", root=tmp_path) == 65
    assert "was made from other rows of iteration-0/answers" in printed(capsys)


def test_a_missing_part_and_a_missing_chosen_tree_are_found(
    tmp_path: Path, capsys: Capture
) -> None:
    place = finished_run(tmp_path)
    place.store.delete(SECOND)
    place.store.delete("iteration-0/checkpoints/step-000004")
    assert command("verify", "tiny", root=tmp_path) == 65
    out = printed(capsys)
    assert f"{SECOND}: not there, but iteration-0/answers/manifest.json lists it" in out
    assert "iteration-0/choice.json: the chosen tree" in out


def test_a_marker_that_names_files_outside_its_tree_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    place = finished_run(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("password")
    marker = place.folder / "iteration-1/checkpoints/step-000004/_COMPLETE"
    for hostile in (str(secret), "../../../../secret", "a/../../b", ""):
        entry = {"path": hostile, "bytes": 8, "sha256": "0" * 64}
        marker.write_text(json.dumps({"files": [entry]}))
        assert command("verify", "tiny", root=tmp_path) == 65
        assert "unsafe path" in printed(capsys)
        to = str(tmp_path / "out")
        assert command("export", "checkpoint", "tiny", "--to", to, root=tmp_path) == 65
        assert "unsafe path" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_doctor_passes_a_folder(tmp_path: Path, capsys: Capture) -> None:
    assert command("doctor", "--json", root=tmp_path) == 0
    found = Diagnosis.model_validate_json(printed(capsys))
    assert {"put-if-absent", "race", "list"} <= {line.check for line in found.findings}
    assert command("doctor", "--recipe", "demo", root=tmp_path) == 0
    out = printed(capsys)
    assert "policy.path" in out
    assert out.rstrip().endswith("fit for a run")
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_refuses_what_it_cannot_write(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "root").write_text("a file")
    assert command("doctor", root=tmp_path / "root") == 78
    assert "Not a directory" in capsys.readouterr().err


def test_the_doctor_says_what_a_recipe_lacks(tmp_path: Path) -> None:
    root = open_store(str(tmp_path))
    with root.new_tree("models/org/policy") as folder:
        (folder / "config.json").write_text("{}")
    bench = BenchmarkSpec(name="mine", path=str(tmp_path / "gone.jsonl"), vocabulary=str(tmp_path))
    base = demo()
    config = base.model_copy(
        update={
            "policy": ModelSpec(path="org/policy"),
            "verify": base.verify.model_copy(update={"labeller": ModelSpec(path="./labeller")}),
            "respond": base.respond.model_copy(update={"benchmarks": (bench,)}),
        }
    )
    found = {line.check: (line.outcome, line.text) for line in recipe_findings(root, config)}
    assert found["policy.path"][0] == "note"
    assert f"--set policy.path={root}/models/org/policy" in found["policy.path"][1]
    assert found["verify.labeller.path"][0] == "fail"
    assert found["benchmark mine.path"][0] == "fail"
    assert found["benchmark mine.vocabulary"][0] == "ok"
    assert found["prepare.source"][0] == "ok"


def test_a_recipe_without_its_files_is_78(tmp_path: Path, capsys: Capture) -> None:
    assert command("doctor", "--recipe", "nope", root=tmp_path) == 78
    assert "no such recipe" in capsys.readouterr().err
    assert command("doctor", "--recipe", "paper", root=tmp_path) == 78
    assert "benchmarks/mmhal.jsonl: no such file" in printed(capsys)


def test_the_doctor_takes_the_configuration_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    given = ("--set", "verify.labeller.path=./gone")
    assert command("doctor", *given, root=tmp_path) == 78
    assert "./gone: no such file or folder" in printed(capsys)


def test_a_new_local_run_says_at_once_what_it_lacks(tmp_path: Path, capsys: Capture) -> None:
    coco = tmp_path / "coco"
    coco.mkdir()
    given = {
        "verify.labeller.path": "./gone",
        "respond.benchmarks": "[]",
        "choose.rule": "held_out",
        "choose.held_out": f"{{coco: {coco}, images: {coco}, vocabulary: {coco}, nltk_data: {tmp_path}}}",
    }
    flags = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    assert command("run", *flags, root=tmp_path / "root") == 78
    said = capsys.readouterr().err
    assert "verify.labeller.path: ./gone: no such file or folder" in said
    assert "choose.held_out.nltk_data: NLTK resource" in said
    assert not list((tmp_path / "root").rglob("config.json"))  # the name is still free


def test_a_source_with_too_few_rows_for_all_iterations_is_refused_before_the_first(
    tmp_path: Path, capsys: Capture
) -> None:
    source = tmp_path / "few.jsonl"
    source.write_text('{"question": "What?", "image": "a.png"}\n' * 5)
    flags = ("--set", f"prepare.source={source}", "--set", "prepare.instructions_per_iteration=2")
    assert command("run", *flags, root=tmp_path / "root") == 78
    assert "has 5 rows, and iterations 0 to 2 take 2 each" in capsys.readouterr().err
    assert command("doctor", *flags, "--set", "iterations=3", root=tmp_path / "root") == 0
    assert "5 rows, for 3 iterations" in printed(capsys)


def test_what_a_run_without_those_stages_names_is_not_asked_for(tmp_path: Path) -> None:
    labeller = ModelSpec(path="./gone")
    config = evaluation("package:rlaifv.demo/policy", ())
    verify = config.verify.model_copy(update={"labeller": labeller})
    config = config.model_copy(update={"verify": verify})
    found = {line.check for line in recipe_findings(open_store(str(tmp_path)), config)}
    assert found == {"policy.path", "respond.benchmarks"}
