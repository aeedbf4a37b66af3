"""Sources of instructions: every format, slices, and what bad rows become."""

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaifv.config import PrepareConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.prompts import DESCRIPTION_REQUESTS
from rlaifv.records import Instruction, Quarantined
from rlaifv.sources import iteration_rows, open_source, read_instructions
from tests.jobs_support import jsonl, random_image

PNG = random_image(0)


def prepare_config(source: Path | str, **changes: object) -> PrepareConfig:
    return PrepareConfig.model_validate({"source": str(source), **changes})


def read_all(config: PrepareConfig) -> list[Instruction | Quarantined]:
    source = open_source(config)
    return list(read_instructions(source, range(len(source)), config))


def instructions(config: PrepareConfig) -> list[Instruction]:
    rows = read_all(config)
    assert all(isinstance(row, Instruction) for row in rows), rows
    return [row for row in rows if isinstance(row, Instruction)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(PNG)
    return tmp_path


@pytest.mark.parametrize("field", ["question", "raw_question", "prompt"])
def test_json_lines_take_the_question_from_any_of_the_releases_fields(
    folder: Path, field: str
) -> None:
    path = jsonl(folder / "x.jsonl", {field: "What?", "image": "a.png"})
    (row,) = instructions(prepare_config(path))
    assert (row.question, row.image.bytes, row.image.path) == ("What?", PNG, "a.png")
    assert (row.instruction_id, row.idx, row.origin_dataset) == ("000000000", 0, "x")


@pytest.mark.parametrize(
    "where",
    [
        {"image": "a.png"},
        {"image_path": "a.png"},
        {"metainfos": {"image_path": "a.png"}},
        {"image": base64.b64encode(PNG).decode()},
        {"image": {"bytes": None, "path": "a.png"}},
    ],
)
def test_json_lines_take_the_image_from_a_path_or_from_base64(
    folder: Path, where: dict[str, object]
) -> None:
    (row,) = instructions(prepare_config(jsonl(folder / "x.jsonl", {"question": "?", **where})))
    assert row.image.bytes == PNG


def test_a_path_longer_than_a_hundred_characters_is_still_a_path(folder: Path) -> None:
    name = "d" * 120 + ".png"
    (folder / name).write_bytes(PNG)
    (row,) = instructions(
        prepare_config(jsonl(folder / "x.jsonl", {"question": "?", "image": name}))
    )
    assert row.image.path == name


def test_the_users_image_id_wins_over_the_path(folder: Path) -> None:
    rows = [
        {"question": "?", "image": "a.png", key: "mine"} for key in ("image_id", "ds_question_id")
    ]
    path = jsonl(folder / "x.jsonl", *rows, {"question": "?", "image": "a.png"})
    assert [row.image_id for row in instructions(prepare_config(path))] == ["mine", "mine", "a.png"]


def test_a_json_list_is_read_like_json_lines(folder: Path) -> None:
    rows = [{"question": f"{n}?", "image": "a.png"} for n in range(3)]
    (folder / "x.json").write_text(json.dumps(rows))
    listed = instructions(prepare_config(folder / "x.json"))
    lines = instructions(prepare_config(jsonl(folder / "x.jsonl", *rows)))
    assert listed == lines


def test_lines_end_at_line_feeds_only_and_blank_ones_are_no_rows(folder: Path) -> None:
    text = "one\u2028two\u2029three\u0085"
    good = json.dumps({"question": text, "image": "a.png"}, ensure_ascii=False).encode()
    path = jsonl(folder / "x.jsonl", good, b"", good + b"\r")
    assert [row.question for row in instructions(prepare_config(path))] == [text, text]


def test_a_folder_of_images_gets_our_requests_by_the_images_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.PNG", "a.png", "in/c.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(PNG)
    rows = instructions(prepare_config(tmp_path))
    assert [row.image_id for row in rows] == ["a.png", "b.PNG", "in/c.jpg"]
    assert all(row.question in DESCRIPTION_REQUESTS for row in rows)
    (tmp_path / "0.png").write_bytes(PNG)
    again = {row.image_id: row.question for row in instructions(prepare_config(tmp_path))}
    assert all(again[row.image_id] == row.question for row in rows)


def test_a_folder_of_images_takes_questions_from_a_file(folder: Path) -> None:
    (folder / "q.txt").write_text("Only this?\n\n")
    (row,) = instructions(prepare_config(folder, questions=str(folder / "q.txt")))
    assert row.question == "Only this?"


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\n"])
def test_a_bad_file_of_questions_stops_the_stage(folder: Path, content: bytes | None) -> None:
    if content is not None:
        (folder / "q.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"prepare\.questions: .*q\.txt"):
        open_source(prepare_config(folder, questions=str(folder / "q.txt")))


def parquet(path: Path, columns: dict[str, list[object]], *, group: int = 100) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_in_the_published_layout(tmp_path: Path) -> None:
    split = json.dumps({"type": "detailed description"})
    path = parquet(
        tmp_path / "x.parquet",
        {
            "ds_name": ["d"],
            "image": [{"bytes": PNG, "path": "p.png"}],
            "question": ["What?"],
            "chosen": ["yes"],
            "origin_dataset": ["COCO"],
            "origin_split": [split],
            "idx": [7],
            "image_path": ["p.png"],
        },
    )
    (row,) = instructions(prepare_config(path))
    assert (row.image.bytes, row.image_id, row.origin_dataset) == (PNG, "p.png", "COCO")
    assert (row.origin_split, row.idx) == (split, 0)


def test_rows_of_several_parquet_files_are_numbered_through(tmp_path: Path) -> None:
    for number in range(2):
        questions: list[object] = [f"{number}/{row}" for row in range(5)]
        images: list[object] = [{"bytes": PNG, "path": None}] * 5
        parquet(tmp_path / f"{number}.parquet", {"question": questions, "image": images}, group=2)
    config = prepare_config(tmp_path)
    source = open_source(config)
    rows = list(read_instructions(source, [1, 4, 5, 8], config))
    assert [row.question for row in rows if isinstance(row, Instruction)] == [
        "0/1",
        "0/4",
        "1/0",
        "1/3",
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": [1], "image": [PNG]}, "column 'question' has type int64, expected string"),
        ({"question": ["?"], "image": [3.5]}, "column 'image' has type double"),
        ({"question": ["?"], "image": [{"path": "a"}]}, "column 'image' has type struct"),
        ({"question": ["?"]}, "no column image or image_path"),
        ({"text": ["?"], "image": [PNG]}, "no column question or raw_question or prompt"),
    ],
)
def test_a_wrong_column_stops_the_stage(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    path = parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(ArtifactError, match=message):
        open_source(prepare_config(path))


def test_a_cut_parquet_file_stops_the_stage(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"question": ["?"], "image": [PNG]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"x\.parquet: not a readable Parquet file"):
        open_source(prepare_config(path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_repeated_question_id_stops_the_stage_and_both_rows_are_named(
    tmp_path: Path, kind: str
) -> None:
    rows = [{"question": "?", "image_path": "a.png", "question_id": key} for key in ("u", "v", "u")]
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        jsonl(path, *rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        parquet(path, {key: [row[key] for row in rows] for key in rows[0]})
    with pytest.raises(
        ArtifactError, match="row 2, field question_id: 'u' is also the id of row 0"
    ):
        open_source(prepare_config(path))


@pytest.mark.parametrize("name", ["x.csv", "nowhere.jsonl", "/nowhere/at/all"])
def test_an_unknown_source_is_a_configuration_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"prepare\.source"):
        open_source(prepare_config(tmp_path / name))


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_source_without_rows_stops_the_stage(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ArtifactError, match="no rows"):
        open_source(prepare_config(tmp_path / "x.jsonl"))


@pytest.mark.slow
def test_a_hub_id_without_a_network_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConfigError, match="nobody/nothing: no such file or folder, and as a data"):
        open_source(prepare_config("nobody/nothing"))


def test_slices_are_disjoint_seeded_and_together_the_source() -> None:
    config = prepare_config("x", instructions_per_iteration=4)
    slices = [iteration_rows(10, config, seed=3, iteration=k).rows for k in range(3)]
    assert [len(rows) for rows in slices] == [4, 4, 2]
    assert sorted(row for rows in slices for row in rows) == list(range(10))
    assert slices[0] == iteration_rows(10, config, seed=3, iteration=0).rows
    assert slices[0] != iteration_rows(10, config, seed=4, iteration=0).rows


def test_an_exhausted_source_stops_with_the_numbers() -> None:
    config = prepare_config("x", instructions_per_iteration=4)
    with pytest.raises(ConfigError, match="has 8 rows, and iterations 0 to 1 take 4 each"):
        iteration_rows(8, config, seed=0, iteration=2)


def test_an_exhausted_source_may_be_used_again_without_repeats_in_an_iteration() -> None:
    config = prepare_config("x", instructions_per_iteration=4, when_exhausted="reuse")
    takes = [iteration_rows(6, config, seed=0, iteration=k) for k in range(3)]
    assert [taken.reused for taken in takes] == [0, 2, 4]
    assert all(len(set(taken.rows)) == 4 for taken in takes)
    few = iteration_rows(3, config, seed=0, iteration=0)
    assert (few.rows, few.reused) == ([0, 1, 2], 0)
