"""`python -m controller train --pairs ...`: pairs of others in, checkpoints out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from controller.__main__ import main
from controller.train import default_name, import_pairs
from rlaifv.config import RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import CONFIG, Shard, part_key, quarantine_key
from rlaifv.recipes import Wishes, change_config, training
from rlaifv.records import Checkpoint, PreferencePair, Quarantined, ReferenceLogps
from rlaifv.store import Store, open_store
from tests.jobs_support import make_run, random_image
from tests.tiny import make_tiny_llava

ONE = Shard(0, 1)
PUBLISHED = pa.schema(
    [
        ("ds_name", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("origin_dataset", pa.string()),
        ("origin_split", pa.string()),
        ("idx", pa.int64()),
        ("image_path", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)
"""openbmb/RLAIF-V-Dataset, as it lies on the hub."""
ORIGIN = {"model": "llava15_7b", "feedback_model": "llava_next_34b", "type": "question answering"}
LONG = 3


def published_row(number: int, **changes: object) -> dict[str, Any]:
    row = {
        "ds_name": "RLAIF-V",
        "image": {"bytes": random_image(number), "path": f"{number}.jpg"},
        "question": "What is in the picture?",
        "chosen": f"A picture of noise number {number}.",
        "rejected": f"A dog and {number} cats on a sofa.",
        "origin_dataset": "COCO",
        "origin_split": json.dumps(ORIGIN),
        "idx": 1000 + number,
        "image_path": f"llava15_7b/{number}.jpg",
    }
    return row | changes


def write_published(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=PUBLISHED), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files of ten rows; one pair of them cannot be used, one is too long."""
    rows = [published_row(number) for number in range(20)]
    rows[5]["rejected"] = rows[5]["chosen"]
    rows[LONG]["chosen"] = "noise " * 200
    write_published(tmp_path / "data/RLAIF-V-Dataset_000.parquet", rows[:10])
    write_published(tmp_path / "data/RLAIF-V-Dataset_001.parquet", rows[10:])
    return tmp_path / "data"


def config_of(source: str | Path, **changes: object) -> RunConfig:
    base = training("llava15_7b", str(source), None)
    return change_config(base, Wishes(name="t")).model_copy(update=changes)


def imported(tmp_path: Path, source: str | Path) -> Store:
    config = config_of(source)
    run = make_run(tmp_path / "run", config)
    import_pairs(run, config)
    return run


def pairs_of(run: Store) -> list[PreferencePair]:
    return list(run.read_part(part_key(0, "pairs", ONE), PreferencePair))


def test_published_rows_become_pairs_and_unusable_ones_are_set_aside(
    source: Path, tmp_path: Path
) -> None:
    run = imported(tmp_path, source)
    pairs = pairs_of(run)
    assert [pair.idx for pair in pairs] == [1000 + n for n in range(20) if n != 5]
    assert json.loads(pairs[0].origin_split) == ORIGIN
    assert pairs[0].image.bytes == random_image(0)
    assert pairs[0].pair_id == "000000000"
    assert pairs[0].image_path == "llava15_7b/0.jpg"
    (bad,) = run.read_part(quarantine_key(0, "pair", ONE), Quarantined)
    assert (bad.row, bad.field, bad.problem) == (5, "rejected", "equal to the chosen answer")
    assert run.provenance(part_key(0, "pairs", ONE)).quarantined == 1


def test_our_own_pairs_come_back_as_they_were(source: Path, tmp_path: Path) -> None:
    run = imported(tmp_path / "a", source)
    again = imported(tmp_path / "b", tmp_path / "a/run/iteration-0/pairs")
    assert pairs_of(again) == pairs_of(run)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"chosen": " "}, "chosen: the answer is empty or missing"),
        ({"chosen": None}, "chosen: the answer is empty or missing"),
        ({"question": ""}, "question: the question is empty"),
        ({"image": {"bytes": random_image(1)[:70], "path": None}}, "image: truncated or corrupt"),
    ],
)
def test_bad_rows_are_set_aside_with_their_field(
    changes: dict[str, object], problem: str, tmp_path: Path
) -> None:
    rows = [published_row(number) for number in range(9)] + [published_row(9, **changes)]
    run = imported(tmp_path, write_published(tmp_path / "x.parquet", rows))
    assert len(pairs_of(run)) == 9
    (bad,) = run.read_part(quarantine_key(0, "pair", ONE), Quarantined)
    assert bad.row == 9
    assert f"{bad.field}: {bad.problem}".startswith(problem)


def test_json_lines_with_image_files_are_pairs_too(tmp_path: Path) -> None:
    rows = []
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(random_image(number))
        row = published_row(number) | {"image": f"{number}.png", "pair_id": f"mine-{number}"}
        rows.append(json.dumps(row))
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    assert [pair.pair_id for pair in pairs_of(imported(tmp_path, tmp_path / "x.jsonl"))] == [
        f"mine-{number}" for number in range(8)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*rows, rows[2]]))
    with pytest.raises(ArtifactError, match="'mine-2' is also the id of row 2"):
        imported(tmp_path / "again", tmp_path / "x.jsonl")


def test_a_hub_id_is_loaded_through_datasets(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    files = sorted(map(str, source.glob("*.parquet")))
    data = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    from_hub = pairs_of(imported(tmp_path / "hub", "openbmb/RLAIF-V-Dataset"))
    from_files = pairs_of(imported(tmp_path / "files", source))
    assert [pair.model_dump(exclude={"ds_name"}) for pair in from_hub] == [
        pair.model_dump(exclude={"ds_name"}) for pair in from_files
    ]


def test_sources_that_hold_no_pairs_are_refused(tmp_path: Path) -> None:
    path = write_published(tmp_path / "x.parquet", [published_row(0)])
    with pytest.raises(
        ArtifactError, match=r"1 pairs can be trained on, train\.min_pairs asks for 8"
    ):
        imported(tmp_path / "few", path)
    pq.write_table(pq.read_table(path).drop_columns(["rejected"]), path)
    with pytest.raises(ArtifactError, match="no column rejected"):
        imported(tmp_path / "column", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no Parquet files in it"):
        imported(tmp_path / "none", tmp_path / "empty")


def test_defaults_are_the_papers_and_names_are_of_the_source() -> None:
    config = config_of("openbmb/RLAIF-V-Dataset")
    train = config.train
    assert config.policy.path == "llava-hf/llava-1.5-7b-hf"
    assert (train.learning_rate, train.beta, train.epochs) == (5e-7, 0.1, 4)
    assert (train.global_batch_size, train.checkpoints_per_epoch) == (8, 4)
    assert (train.warmup_ratio, train.weight_decay, train.max_grad_norm) == (0.05, 0.01, 1.0)
    assert train.lora is None
    lora = training("llava15_7b_lora", "x", None).train
    assert lora.learning_rate == 1e-5
    assert lora.lora is not None
    assert lora.lora.model_dump() == {
        "rank": 64, "alpha": 16, "dropout": 0.05, "train_projector": True
    }  # fmt: skip
    assert default_name("openbmb/RLAIF-V-Dataset") == "train-rlaif-v-dataset"
    assert default_name("s3://bucket/some/pairs.parquet") == "train-pairs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("recipe", ["llava15_7b", "llava15_7b_lora"])
def test_the_command_trains_what_from_pretrained_loads(
    source: Path, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_llava(tmp_path / "model")
    sets = {"policy.dtype": "float32", "train.epochs": 1, "train.max_length": 200}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"shards": {"reflogp": 2, "group_size": 4}}))
    words = ["train", "--pairs", str(source), "--model", str(model), "--recipe", recipe]
    words += ["--root", str(tmp_path / "runs"), "--config", str(tmp_path / "c.yaml")]
    words += ["--processes", "2"] if recipe == "llava15_7b_lora" else []
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "tensorboard --logdir" in said.out
    assert "row 5, field rejected: equal to the chosen answer" in said.err
    run = open_store(str(tmp_path / "runs/train-data"))
    keys = [part_key(0, "reflogps", Shard(index, 2)) for index in range(2)]
    reflogps = [row.pair_id for key in keys for row in run.read_part(key, ReferenceLogps)]
    assert sorted(reflogps) == [f"{n:09d}" for n in range(20) if n not in (LONG, 5)]
    (bad,) = run.read_part(quarantine_key(0, "reflogp", Shard(0, 2)), Quarantined)
    assert bad.problem.startswith("pair 000000003: prompt, image and answer take")
    rows = list(run.read_part(part_key(0, "checkpoints", ONE), Checkpoint))
    assert [row.step for row in rows] == [1, 2, 3]  # 18 pairs: 3 steps an epoch
    assert {row.num_pairs for row in rows} == {18}
    base = AutoModelForImageTextToText.from_pretrained(model)
    tree = run.tree_path(rows[-1].tree)
    if rows[-1].kind == "lora":
        PeftModel.from_pretrained(base, str(tree))
    else:
        AutoModelForImageTextToText.from_pretrained(tree)
    assert main(words) == 0  # goes on: nothing is left to do
    assert main([*words, "--set", "train.beta=0.2"]) == ConfigError.exit_code
    assert "train.beta" in capsys.readouterr().err
    assert run.exists(CONFIG)
