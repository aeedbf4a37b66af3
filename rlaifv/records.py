"""One frozen record type per kind of row, and the Parquet schema that follows from it.

This module is the glossary: instruction, answer, claim, verdict, pair, reference log-probs,
checkpoint, response, grade, choice, merge. Rows of an artifact are instances of exactly one of them.
"""

import hashlib
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaifv.errors import ArtifactError


class Float32(NamedTuple):
    """Annotation marker: store this float as a Parquet float32."""


Nat = Annotated[float, Float32()]
"""A log-probability in nats, stored as float32."""
Probability = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A row: frozen, unknown fields and wrong types rejected."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64"
    )


class Image(Record):
    """The Hugging Face `Image` struct: encoded bytes as they came, and the path they came from."""

    bytes: bytes
    path: str | None = None


class Instruction(Record):
    """One image and one question to be answered."""

    instruction_id: NonEmpty
    image_id: NonEmpty
    """The image's identity: the user's own if given, else its path. At most
    `pair.max_per_image` pairs are taken per image."""
    question: NonEmpty
    image: Image
    origin_dataset: str
    origin_split: str
    """A JSON string, as in the published RLAIF-V-Dataset."""
    idx: int
    """Row number in the source."""


class Answer(Record):
    """One sampled answer of the policy."""

    instruction_id: NonEmpty
    answer_id: NonEmpty
    """`{instruction_id}/{sample number}`."""
    text: str
    seed: int
    num_tokens: Count
    """Generated tokens, the end-of-sequence token included when there is one."""
    finish_reason: Literal["stop", "length"]


class Claim(Record):
    """One atomic statement of an answer, and the yes/no question that checks it."""

    instruction_id: NonEmpty
    answer_id: NonEmpty
    claim_id: NonEmpty
    """`{answer_id}/{claim number}`."""
    text: NonEmpty
    question: NonEmpty


class Verdict(Record):
    """What the labeller says of one claim."""

    instruction_id: NonEmpty
    answer_id: NonEmpty
    claim_id: NonEmpty
    p_yes: Probability
    """Probability mass of yes/Yes as the first generated token, over the whole vocabulary."""
    p_no: Probability
    """The same for no/No. The claim holds iff p_yes > p_no, strictly: a tie is a rejection."""


class PreferencePair(Record):
    """A chosen and a rejected answer; the published RLAIF-V-Dataset's columns, then ours."""

    ds_name: str
    image: Image
    question: NonEmpty
    chosen: NonEmpty
    rejected: NonEmpty
    origin_dataset: str
    origin_split: str
    idx: int
    image_path: str
    pair_id: NonEmpty
    instruction_id: str = ""
    image_id: str = ""
    chosen_id: str = ""
    """`answer_id` of the chosen answer; empty for an imported pair."""
    rejected_id: str = ""
    chosen_score: int = 0
    """Minus the number of rejected claims."""
    rejected_score: int = 0


class ReferenceLogps(Record):
    """Log-probabilities of a pair's two answers under the DPO reference, per answer token."""

    pair_id: NonEmpty
    chosen_token_nats: list[Nat]
    """float32, end-of-sequence token included; the answer's log-probability is their sum."""
    rejected_token_nats: list[Nat]


class Checkpoint(Record):
    """A trained checkpoint whose tree is complete in the store."""

    step: Count
    epoch: float
    tree: NonEmpty
    """Store key of the tree, relative to the run."""
    kind: Literal["full", "lora"]
    train_loss: float
    """Mean loss of the steps since the previous checkpoint."""
    num_pairs: Count


class Merge(Record):
    """A chosen adapter merged into its base: a full tree, checked against the adapter."""

    step: Count
    tree: NonEmpty
    max_logit_difference: float
    """Largest absolute difference of the logits of a sample row, merged against adapter."""


class Response(Record):
    """A checkpoint's answer to a benchmark question; step 0 is the policy before training."""

    benchmark: NonEmpty
    question_id: NonEmpty
    step: Count
    text: str
    num_tokens: Count
    finish_reason: Literal["stop", "length"]


class Grade(Record):
    """What a judge or a rule says of one response; metrics are pure functions over these rows."""

    benchmark: NonEmpty
    question_id: NonEmpty
    step: Count
    repeat: Count = 0
    """Number of the judging, for judges that are asked more than once."""
    judge: NonEmpty
    """Identity of what graded: rule set and version, or endpoint, model and settings."""
    judge_reply: str
    """The raw reply; empty for rules."""
    value: str
    """JSON of the benchmark's own grade record."""


class Candidate(Record):
    """One checkpoint as the selection rule saw it."""

    step: Count
    metrics: dict[str, float | None]
    """On the selection benchmarks, named `benchmark/metric`. None: undefined (no denominator)."""
    eligible: bool
    remark: str = ""


class Choice(Record):
    """The checkpoint that becomes the next iteration's policy and DPO reference."""

    step: Count
    tree: str | None
    """Store key of the tree; None: the starting policy stays."""
    metrics: dict[str, float | None]
    """Of the chosen checkpoint, on every benchmark."""
    baseline: dict[str, float | None]
    """Of step 0, on every benchmark."""
    candidates: list[Candidate]
    num_pairs: Count
    reason: NonEmpty


class Quarantined(Record):
    """A bad input row that a stage set aside; counted in the part's provenance."""

    artifact: NonEmpty
    file: str
    row: int
    """Row number in the file, from 0."""
    field: str
    problem: NonEmpty
    excerpt: str
    """The first 200 characters of the offending value."""


def _arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of one annotation; raises TypeError for one that rows must not use."""
    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    if annotation in plain:
        return plain[annotation]
    if annotation is bytes:
        return pa.binary()
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return pa.float32() if Float32() in args[1:] else _arrow_type(args[0])
    if origin is Literal:
        return pa.string()
    if origin is list:
        return pa.list_(_arrow_type(args[0]))
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return _arrow_type(inner)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return pa.struct(_arrow_fields(annotation))
    raise TypeError(f"no Parquet type for {annotation!r}")


def _arrow_fields(record: type[Record]) -> list[pa.Field]:
    fields = []
    for name, info in record.model_fields.items():
        annotation = info.annotation
        if any(isinstance(mark, Float32) for mark in info.metadata):
            annotation = Annotated[float, Float32()]
        fields.append(pa.field(name, _arrow_type(annotation)))
    return fields


def arrow_schema(record: type[Record]) -> pa.Schema:
    """The Parquet schema of a record type; `datasets` shows its images as images."""
    fields = _arrow_fields(record)
    schema = pa.schema(fields)
    images = [name for name, info in record.model_fields.items() if info.annotation is Image]
    if not images:
        return schema
    features = {field.name: _hf_feature(field.type) for field in fields}
    features |= {name: {"_type": "Image"} for name in images}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _hf_feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _hf_feature(kind.value_type), "_type": "List"}
    return {"dtype": "float64" if kind == pa.float64() else str(kind), "_type": "Value"}


def to_table(record: type[Record], rows: Sequence[Record]) -> pa.Table:
    """Rows as an Arrow table with the record's schema."""
    return pa.Table.from_pylist([row.model_dump() for row in rows], schema=arrow_schema(record))


def rows_digest(rows: Iterable[Record]) -> str:
    """SHA-256 over the rows' values in order: equal for equal rows, whatever wrote them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.model_dump_json().encode())
        digest.update(b"\n")
    return digest.hexdigest()


def parse_rows(
    record: type[R], values: Iterable[dict[str, Any]], *, file: str, start: int = 0
) -> Iterator[R]:
    """Validated records; raises ArtifactError naming file, row and field of the first bad one."""
    for number, value in enumerate(values, start):
        try:
            yield record.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "(row)"
            raise ArtifactError(
                f"{file}: row {number}, field {field}: {first['msg']} "
                f"(a {record.__name__} was expected)"
            ) from error
