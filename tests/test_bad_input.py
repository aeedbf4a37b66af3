"""The table of docs/bad-input.md: every bad input, what happens, and the message."""

import errno
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlaifv.claims import split_answer
from rlaifv.config import ModelSpec, PrepareConfig, RunConfig, ShardsConfig
from rlaifv.config_values import parse_config
from rlaifv.errors import ConfigError
from rlaifv.images import decode
from rlaifv.pipeline import CONFIG, Shard, part_key, quarantine_key
from rlaifv.records import Answer, Claim, Instruction, Quarantined, Verdict
from rlaifv.store import LocalBackend, Store
from tests.jobs_support import ROOT, jsonl, make_config, make_run, random_image, run_job
from tests.tiny import make_tiny_llava

PNG = random_image(1)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A header that promises 10,000 x 10,000 pixels, and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


class Case(NamedTuple):
    """A bad row between two good ones; `content` is the bytes of its image, `x.img`."""

    row: dict[str, Any] | bytes
    content: bytes | None
    field: str
    problem: str


ROW = {"question": "What?", "image": "x.img"}
BAD_ROWS = {
    "missing file": Case(ROW, None, "image", "no such file"),
    "image is a folder": Case({**ROW, "image": "."}, None, "image", "no such file"),
    "truncated image": Case(ROW, PNG[: len(PNG) // 2], "image", "truncated or corrupt image"),
    "0-byte image": Case(ROW, b"", "image", "the image has 0 bytes"),
    "not an image": Case(ROW, b"hello", "image", "not an image in a known format"),
    "100-megapixel image": Case(ROW, huge_png(), "image", "10000 x 10000 pixels are more than"),
    "broken base64": Case({**ROW, "image": "!" * 200}, None, "image", "neither a file nor base64"),
    "no image": Case({"question": "What?"}, None, "image", "missing"),
    "empty question": Case({**ROW, "question": " \n"}, PNG, "question", "the question is empty"),
    "no question": Case({"image": "x.img"}, PNG, "question", "missing"),
    "question of a wrong type": Case(
        {**ROW, "question": 3}, PNG, "question", "string was expected"
    ),
    "image of a wrong type": Case({**ROW, "image": 3}, PNG, "image", "string was expected"),
    "NUL in the question": Case({**ROW, "question": "a\0b"}, PNG, "question", "contains a NUL"),
    "NUL in the path": Case({**ROW, "image": "a\0b"}, PNG, "image", "contains a NUL"),
    "lone surrogate": Case({**ROW, "question": "\ud800"}, PNG, "question", "not valid Unicode"),
    "invalid UTF-8": Case(
        b'{"question": "\xff\xfe", "image": "x.img"}', PNG, "(line)", "not UTF-8"
    ),
    "broken JSON": Case(b'{"question": "What?", ', PNG, "(line)", "not valid JSON"),
    "not an object": Case(b"[1, 2]", PNG, "(line)", "a JSON object was expected, got list"),
}


def config_for(source: Path) -> RunConfig:
    return RunConfig(
        name="bad",
        policy=ModelSpec(path="nowhere"),
        prepare=PrepareConfig(source=str(source), instructions_per_iteration=10),
        shards=ShardsConfig(instructions=1, reflogp=1),
    )


def prepare(folder: Path, source: Path) -> tuple[int, Store]:
    run = make_run(folder / "run", config_for(source))
    return run_job(run, "prepare"), run


PART = part_key(0, "instructions", Shard(0, 1))


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_set_aside_and_the_others_go_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = BAD_ROWS[name]
    (tmp_path / "good.png").write_bytes(PNG)
    if case.content is not None:
        (tmp_path / "x.img").write_bytes(case.content)
    good = {"question": "Fine?", "image": "good.png"}
    source = jsonl(tmp_path / "x.jsonl", good, case.row, good)
    code, run = prepare(tmp_path, source)
    assert code == 0
    assert [row.idx for row in run.read_part(PART, Instruction)] == [0, 2]
    assert run.provenance(PART).quarantined == 1
    (row,) = run.read_part(quarantine_key(0, "prepare", Shard(0, 1)), Quarantined)
    assert (row.file, row.row, row.field) == (str(source), 1, case.field)
    assert case.problem in row.problem
    assert f"quarantined {source} row 1: {case.field}: " in capsys.readouterr().err


def test_the_excerpt_is_at_most_200_characters(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", b"x" * 5000)
    _, run = prepare(tmp_path, source)
    (row,) = run.read_part(quarantine_key(0, "prepare", Shard(0, 1)), Quarantined)
    assert row.excerpt == "x" * 200


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("CMYK", (8, 6), (10, 200, 30, 0)), "JPEG"),
        (Image.fromarray(np.full((6, 8), 40_000, np.uint16)), "PNG"),
        (Image.new("P", (8, 6), 3), "GIF"),
        (Image.new("LA", (8, 6), (3, 9)), "PNG"),
        (Image.new("1", (8, 6), 1), "PNG"),
    ],
    ids=["CMYK", "16-bit", "palette", "grey with alpha", "1-bit"],
)
def test_an_image_of_an_unusual_mode_is_taken_as_it_is(
    tmp_path: Path, image: Image.Image, kind: str
) -> None:
    (tmp_path / "x.img").write_bytes(encoded(image, kind))
    code, run = prepare(tmp_path, jsonl(tmp_path / "x.jsonl", ROW))
    (row,) = run.read_part(PART, Instruction)
    assert (code, row.image.bytes) == (0, (tmp_path / "x.img").read_bytes())
    assert run.provenance(PART).quarantined == 0


def test_a_photograph_that_was_taken_upright_is_shown_upright(tmp_path: Path) -> None:
    image, buffer = Image.new("RGB", (8, 6)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(buffer, "JPEG", exif=exif)
    (tmp_path / "x.img").write_bytes(buffer.getvalue())
    _, run = prepare(tmp_path, jsonl(tmp_path / "x.jsonl", ROW))
    (row,) = run.read_part(PART, Instruction)
    assert row.image.bytes == buffer.getvalue()
    assert decode(row.image.bytes).size == (6, 8)


@pytest.mark.parametrize(
    "text", ["one\u2028two\u2029th\u0085ree", "caf\u00e9 \U0001f600", "q" * 20_000]
)
def test_an_unusual_question_is_kept_letter_by_letter(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.img").write_bytes(PNG)
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({**ROW, "question": text}, ensure_ascii=False) + "\n")
    code, run = prepare(tmp_path, source)
    (row,) = run.read_part(PART, Instruction)
    assert (code, row.question) == (0, text)


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        (
            "x.jsonl",
            b'{"question_id": 1}\n{"question_id": 1}\n',
            65,
            "field question_id: 1 is also",
        ),
        ("x.jsonl", b"", 65, "no rows"),
        ("x.json", b"[{]", 65, "not a valid JSON list"),
        ("x.parquet", b"PAR1", 65, "not a readable Parquet file"),
        ("x.csv", b"a,b", 78, "unknown kind of file"),
        ("x.jsonl", None, 78, "no such file or folder"),
    ],
)
def test_an_unusable_source_stops_the_stage_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    code: int,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    got, run = prepare(tmp_path, tmp_path / name)
    assert got == code
    assert message in capsys.readouterr().err
    assert [item.key for item in run.objects("")] == [CONFIG]


def test_a_wrong_column_type_stops_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"question": [1], "image": [PNG]}), tmp_path / "x.parquet")
    code, _ = prepare(tmp_path, tmp_path / "x.parquet")
    assert code == 65
    assert "column 'question' has type int64, expected string" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"sample": {"num_answers": -1}}, "sample.num_answers: Input should be greater than"),
        ({"policy": None}, "policy: Input should be"),
    ],
)
def test_a_bad_configuration_is_refused_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    values = config_for(tmp_path).model_dump(mode="json") | change
    with pytest.raises(ConfigError, match=message):
        parse_config(values, source="x.yaml")
    run = Store(LocalBackend(tmp_path / "run"))
    run.write_bytes(CONFIG, json.dumps(values).encode())
    assert run_job(run, "prepare") == 78
    assert message in capsys.readouterr().err


def answers_run(folder: Path, *texts: str) -> Store:
    """A run whose instructions and answers are there, with these texts."""
    (folder / "x.img").write_bytes(PNG)
    _, run = prepare(folder, jsonl(folder / "x.jsonl", ROW))
    (instruction,) = run.read_part(PART, Instruction)
    rows = [
        Answer(
            instruction_id=instruction.instruction_id,
            answer_id=f"{instruction.instruction_id}/{number}",
            text=text,
            seed=1,
            num_tokens=1,
            finish_reason="stop",
        )
        for number, text in enumerate(texts)
    ]
    key = part_key(0, "answers", Shard(0, 1))
    run.write_part(key, rows, record=Answer, origin=lambda: run.provenance(PART))
    return run


@pytest.mark.slow
def test_a_question_that_the_model_cannot_hold_stops_with_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.img").write_bytes(PNG)
    source = jsonl(tmp_path / "x.jsonl", ROW, {**ROW, "question": "q " * 10_000})
    model = make_tiny_llava(tmp_path / "model")
    config = make_config(source, model=model)
    run = make_run(tmp_path / "run", config)
    assert run_job(run, "prepare") == 0
    assert run_job(run, "sample") == 65
    (first, last) = [row.instruction_id for row in run.read_part(PART, Instruction)]
    said = capsys.readouterr().err.splitlines()[-1]
    assert "row 1: prompt, image and answer take 20023 tokens, more than 2048" in said
    assert f"in the group {first} to {last}, counted from 0" in said


@pytest.mark.slow
def test_an_empty_answer_is_counted_with_the_pairs(tmp_path: Path) -> None:
    run = answers_run(tmp_path, "", "There is a dog.")
    assert run_job(run, "claim") == 0
    claims = part_key(0, "claims", Shard(0, 1))
    verdicts = [
        Verdict(
            **row.model_dump(include={"instruction_id", "answer_id", "claim_id"}), p_yes=1, p_no=0
        )
        for row in run.read_part(claims, Claim)
    ]
    key = part_key(0, "verdicts", Shard(0, 1))
    run.write_part(key, verdicts, record=Verdict, origin=lambda: run.provenance(claims))
    assert run_job(run, "pair") == 0
    notes = run.provenance(part_key(0, "pairs", Shard(0, 1))).notes
    assert notes["empty"] == "1"


def claim_texts(run: Store) -> list[str]:
    return [row.text for row in run.read_part(part_key(0, "claims", Shard(0, 1)), Claim)]


def test_an_empty_answer_has_no_claims(tmp_path: Path) -> None:
    run = answers_run(tmp_path, "", " \n", "There is a dog.")
    assert run_job(run, "claim") == 0
    assert claim_texts(run) == ["There is a dog."]


def test_an_answer_of_20k_characters_is_split_to_its_end(tmp_path: Path) -> None:
    sentences = [f"There is a dog on street number {n}." for n in range(600)]
    text = " ".join(sentences)
    assert len(text) > 20_000
    run = answers_run(tmp_path, text, "x" * 20_000)
    assert run_job(run, "claim") == 0
    texts = claim_texts(run)
    assert len(texts) == len(split_answer(text)) + 1
    assert texts[599] == sentences[-1]


def test_control_characters_of_an_answer_do_no_harm(tmp_path: Path) -> None:
    run = answers_run(tmp_path, "There is a dog.\u2028There is\0 a cat.")
    assert run_job(run, "claim") == 0
    assert claim_texts(run) == ["There is a dog.", "There is a cat."]


def cut(data: bytes) -> bytes:
    return data[:-30]


def flipped(data: bytes) -> bytes:
    middle = data.index(b"What?") + 1
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def test_a_half_written_part_is_no_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = answers_run(tmp_path, "There is a dog.")
    key = part_key(0, "answers", Shard(0, 1))
    run.write_bytes(key, run.read_bytes(key)[:-30])
    assert run_job(run, "claim") == 65
    assert f"{key}: not a complete Parquet file" in capsys.readouterr().err
    assert not run.exists(part_key(0, "claims", Shard(0, 1)))


def test_a_missing_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = answers_run(tmp_path)
    run.delete(PART)
    assert run_job(run, "claim") == 65
    assert f"{PART}: no such artifact" in capsys.readouterr().err


class FullDisk(LocalBackend):
    """A disk on which files can be made but not filled: parts are written to /dev/full."""

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        with super().staging(key) as folder:
            for name in ("part.parquet", "value.json"):
                (folder / name).symlink_to("/dev/full")
            yield folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_a_passing_failure_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.img").write_bytes(PNG)
    run = make_run(tmp_path / "run", config_for(jsonl(tmp_path / "x.jsonl", ROW)))
    opened: Callable[[str], Store] = lambda uri: Store(FullDisk(tmp_path / "run"))  # noqa: E731
    monkeypatch.setattr("jobs._entry.open_store", opened)
    assert run_job(run, "prepare") == 75
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == [CONFIG]
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_a_full_disk_is_told_apart_from_missing_rights() -> None:
    from rlaifv.errors import TransientError
    from rlaifv.store import explain_os_error

    assert isinstance(explain_os_error(OSError(errno.ENOSPC, "x"), "y"), TransientError)
    assert isinstance(explain_os_error(OSError(errno.EACCES, "x"), "y"), ConfigError)


OTHER_ROWS = {
    "CMYK, 16-bit, palette, 1-bit image, image with transparency or EXIF rotation": (
        "test_an_image_of_an_unusual_mode_is_taken_as_it_is",
        "test_a_photograph_that_was_taken_upright_is_shown_upright",
    ),
    "U+2028, U+2029, U+0085 in a text": ("test_an_unusual_question_is_kept_letter_by_letter",),
    "question of 20,000 characters": (
        "test_an_unusual_question_is_kept_letter_by_letter",
        "test_a_question_that_the_model_cannot_hold_stops_with_its_row",
    ),
    "repeated `question_id`": (
        "test_a_repeated_question_id_stops_the_stage_and_both_rows_are_named",
    ),
    "wrong type of a Parquet column": ("test_a_wrong_column_type_stops_the_stage",),
    "Parquet without a question or an image column": ("test_a_wrong_column_stops_the_stage",),
    "cut Parquet file": ("test_a_cut_parquet_file_stops_the_stage",),
    "broken JSON list": ("test_an_unusable_source_stops_the_stage_and_writes_nothing",),
    "no rows": ("test_an_unusable_source_stops_the_stage_and_writes_nothing",),
    "no such file, unknown kind of file, hub not reachable": (
        "test_an_unknown_source_is_a_configuration_error",
        "test_a_hub_id_without_a_network_is_a_clear_error",
    ),
    "file of questions missing, empty or not UTF-8": (
        "test_a_bad_file_of_questions_stops_the_stage",
    ),
    "source exhausted": (
        "test_an_exhausted_source_stops_with_the_numbers",
        "test_an_exhausted_source_may_be_used_again_without_repeats_in_an_iteration",
    ),
    "empty answer": (
        "test_an_empty_answer_has_no_claims",
        "test_an_empty_answer_is_counted_with_the_pairs",
    ),
    "answer of 20,000 characters": (
        "test_an_answer_of_20k_characters_is_split_to_its_end",
        "test_a_long_answer_is_cut_between_paragraphs_then_sentences_then_words",
    ),
    "control characters, U+2028, NUL in an answer": (
        "test_control_characters_of_an_answer_do_no_harm",
    ),
    "unknown key": ("test_a_bad_configuration_is_refused_with_its_key",),
    "negative value": ("test_a_bad_configuration_is_refused_with_its_key",),
    "`--shard` that does not fit, unknown flag": (
        "test_an_unknown_flag_exits_with_the_code_that_stops_the_run",
        "test_a_wrong_flag_is_a_configuration_error",
    ),
    "missing part": ("test_a_missing_part_is_named",),
    "half-written or cut part": (
        "test_a_half_written_part_is_no_input",
        "test_a_flipped_bit_is_found",
    ),
    "killed writer": ("test_a_killed_writer_leaves_nothing_visible_and_a_sweep_removes_the_rest",),
    "SIGTERM": ("test_sigterm_ends_a_stage_at_once_and_leaves_nothing",),
    "disk full": ("test_a_full_disk_is_a_passing_failure_and_leaves_nothing",),
    "no right to write": ("test_a_full_disk_is_told_apart_from_missing_rights",),
}
"""Rows of the other tables, and the tests that prove them."""


def test_every_row_of_the_tables_is_tested_and_every_tested_row_is_in_a_table() -> None:
    lines = (ROOT / "docs/bad-input.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    heads = {lines[number - 1] for number, line in enumerate(lines) if line.startswith("|--")}
    set_aside = {row.split("|")[1].strip() for row in rows if "| set aside |" in row}
    assert set_aside == set(BAD_ROWS)
    others = {row.split("|")[1].strip() for row in rows if row not in heads} - set_aside
    assert others == set(OTHER_ROWS)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for names in OTHER_ROWS.values():
        assert all(f"def {name}(" in tests for name in names), names
