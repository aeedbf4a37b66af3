"""Records: what a row accepts, and the Parquet schema that follows from the type."""

from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rlaifv.errors import ArtifactError
from rlaifv.pipeline import ARTIFACTS
from rlaifv.records import (
    Answer,
    Image,
    Instruction,
    PreferencePair,
    Record,
    ReferenceLogps,
    Verdict,
    arrow_schema,
    parse_rows,
    rows_digest,
    to_table,
)

VERDICT = {
    "instruction_id": "i",
    "answer_id": "i/0",
    "claim_id": "i/0/0",
    "p_yes": 0.5,
    "p_no": 0.5,
}
INSTRUCTION = Instruction(
    instruction_id="i",
    image_id="a.png",
    question="What?",
    image=Image(bytes=b"\x00\xff\x80", path=None),
    origin_dataset="d",
    origin_split="{}",
    idx=3,
)


@pytest.mark.parametrize(
    "change",
    [
        {"p_yes": 1.5},
        {"p_no": -0.1},
        {"p_yes": float("nan")},
        {"p_yes": "0.5"},
        {"claim_id": ""},
        {"claim_id": None},
        {"surprise": 1},
    ],
)
def test_a_bad_value_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Verdict.model_validate(VERDICT | change)


def test_a_bad_row_is_named_with_file_row_and_field() -> None:
    rows = [VERDICT, VERDICT | {"p_yes": 2.0}]
    with pytest.raises(ArtifactError, match=r"x\.parquet: row 11, field p_yes: .*Verdict"):
        list(parse_rows(Verdict, rows, file="x.parquet", start=10))


def test_a_row_is_frozen() -> None:
    with pytest.raises(ValidationError):
        setattr(INSTRUCTION, "question", "Other?")  # noqa: B010 - the point


@pytest.mark.parametrize("record", ARTIFACTS.values(), ids=ARTIFACTS)
def test_every_record_has_a_parquet_schema_in_the_order_of_its_fields(
    record: type[Record],
) -> None:
    assert arrow_schema(record).names == list(record.model_fields)


def test_images_are_declared_so_that_datasets_shows_them() -> None:
    schema = arrow_schema(PreferencePair)
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert b'"image": {"_type": "Image"}' in schema.metadata[b"huggingface"]


def test_log_probabilities_are_float32_and_probabilities_float64() -> None:
    assert arrow_schema(ReferenceLogps).field(1).type == pa.list_(pa.float32())
    assert arrow_schema(Verdict).field("p_yes").type == pa.float64()


def test_rows_survive_a_table_bytes_and_none_included() -> None:
    values = to_table(Instruction, [INSTRUCTION]).to_pylist()
    assert list(parse_rows(Instruction, values, file="x")) == [INSTRUCTION]


def test_json_keeps_bytes_that_are_no_text() -> None:
    assert Instruction.model_validate_json(INSTRUCTION.model_dump_json()) == INSTRUCTION


def test_the_digest_depends_on_values_and_order_only() -> None:
    other = INSTRUCTION.model_copy(update={"idx": 4})
    assert rows_digest([INSTRUCTION, other]) == rows_digest(iter([INSTRUCTION, other]))
    assert rows_digest([INSTRUCTION, other]) != rows_digest([other, INSTRUCTION])


def test_a_finish_reason_is_one_of_two_words() -> None:
    with pytest.raises(ValidationError, match="finish_reason"):
        Answer.model_validate(
            {
                "instruction_id": "i",
                "answer_id": "i/0",
                "text": "",
                "seed": 1,
                "num_tokens": 1,
                "finish_reason": "eos",
            }
        )
