"""One prefix and several branches in one row: each branch as if it alone followed the prefix.

Positions restart at the end of the prefix, a block mask keeps branches apart, and the first token
of each branch is predicted from the last token of the prefix. The result is that of one row per
branch, at the price of one prefix (measured prior art for pairs of text: arXiv 2410.20305).

Shapes:  B rows;  L tokens of a row;  I images;  F features of an image;  E width;
M positions that are read.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlaifv.models.attention import PADDING, PREFIX
from rlaifv.models.base import Branches, Floats, VisionLanguageModel


class TokenRow(NamedTuple):
    """A prefix with its image's placeholders, and what may follow it."""

    prefix: list[int]
    branches: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


class PackedRows(NamedTuple):
    """Rows padded on the right, or all rows in one line (B = 1)."""

    ids_BL: Tensor
    positions_BL: Tensor
    segments_BL: Tensor
    """`attention.PREFIX`, the branch's number from 1, or `attention.PADDING`; in a line
    `lines.Owners.own_L`."""
    prefixes_BL: Tensor
    """Which segment a token sees besides its own."""

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(to_device(tensor, device) for tensor in self))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for what the device is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Queues a copy behind what the device is doing; the call waits for it, not for later work."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = tensor.to("cpu", non_blocking=True)  # to pinned memory
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


class BranchBatch(NamedTuple):
    """Rows of answers, ready to be scored; tensors lie on the model's device."""

    packed: PackedRows
    pixels: Tensor
    """Of the I different images, as the vision tower takes them."""
    image_of_row_B: Tensor
    sources_M: Tensor
    """Where the prediction of each answer token is read: index into the flattened rows."""
    targets_M: Tensor
    """The answer tokens."""
    counts: tuple[tuple[int, ...], ...]
    """Per row and answer: its number of tokens, end of sequence included."""


def split_answers(logps_M: Tensor, counts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Per row and answer, from all values in a line."""
    parts = iter(torch.split(logps_M, [count for row in counts for count in row]))
    return [[next(parts) for _ in row] for row in counts]


class FullRows(NamedTuple):
    """The same for a model whose forward is not ours: one row per answer, nothing shared."""

    inputs: list[dict[str, Tensor]]
    """Per answer: prompt and answer, as the family's forward takes them."""
    targets_M: Tensor
    counts: tuple[tuple[int, ...], ...]


class TrainableModel(VisionLanguageModel, Protocol):
    """A model whose answer log-probabilities can be differentiated."""

    @property
    def module(self) -> PreTrainedModel:
        """The transformers module. Adapters put into it in place take part in every method."""
        ...

    def queue_sequence_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> Callable[[], list[list[Floats]]]:
        """As of every model; `max_length` as of `encode_branches`."""
        ...

    def sequence_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Floats]]:
        """The same at once."""
        return self.queue_sequence_logps(rows, max_length=max_length)()

    def encode_branches(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> BranchBatch | FullRows:
        """Tokens and pixels of some rows; raises ArtifactError with the row's number.

        `max_length`: most tokens of prompt, image and one answer; default: the model's context.
        """
        ...

    def branch_logps(self, batch: Any) -> list[list[Tensor]]:
        """Per row and answer: log-probability in nats of each token, float32 [tokens].

        `batch`: from `encode_branches` of the same model. Gradients flow unless they are off.
        """
        ...

    def two_row_logps(
        self, rows: Sequence[Branches], *, max_length: int | None = None
    ) -> list[list[Tensor]]:
        """The same by the plain way: transformers' own forward on one full row per answer."""
        ...


def pack(rows: Sequence[TokenRow], *, pad_id: int) -> PackedRows:
    """Tensors of some rows, one below the other, on the CPU."""
    length = max(row.length for row in rows)
    shape = (len(rows), length)
    packed = PackedRows(
        torch.full(shape, pad_id),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, PADDING),
        torch.full(shape, PREFIX),
    )
    for index, row in enumerate(rows):
        values = (_ids(row), _positions(row), _segments(row, first=PREFIX))
        for tensor, value in zip(packed, values, strict=False):
            tensor[index, : row.length] = torch.tensor(value)
    return packed


def pack_line(rows: Sequence[TokenRow], *, pad_id: int, multiple: int) -> PackedRows:
    """The same one after the other, padded to a multiple of some length; segments go on rising."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    prefixes: list[int] = []
    number = 0
    for row in rows:
        ids += _ids(row)
        positions += _positions(row)
        segments += _segments(row, first=number)
        prefixes += [number] * row.length
        number += 1 + len(row.branches)
    missing = -len(ids) % multiple
    paddings = (pad_id, 0, number, number)
    lists = zip((ids, positions, segments, prefixes), paddings, strict=True)
    return PackedRows(*(torch.tensor([[*values, *[fill] * missing]]) for values, fill in lists))


def _ids(row: TokenRow) -> list[int]:
    return [*row.prefix, *itertools.chain.from_iterable(row.branches)]


def _positions(row: TokenRow) -> list[int]:
    start = len(row.prefix)
    after = (range(start, start + len(branch)) for branch in row.branches)
    return [*range(start), *itertools.chain.from_iterable(after)]


def _segments(row: TokenRow, *, first: int) -> list[int]:
    numbers = enumerate(row.branches, start=first + 1)
    after = ([number] * len(branch) for number, branch in numbers)
    return [*([first] * len(row.prefix)), *itertools.chain.from_iterable(after)]


def row_starts(rows: Sequence[TokenRow], *, width: int | None) -> list[int]:
    """Flat index of each row's first token: in rows of `width`, or in a line."""
    if width is not None:
        return [index * width for index in range(len(rows))]
    return [0, *itertools.accumulate(row.length for row in rows)][:-1]


def answer_sources(rows: Sequence[TokenRow], starts: Sequence[int]) -> list[int]:
    """Flat index of the position that predicts each branch token, in order."""
    sources: list[int] = []
    for row, start in zip(rows, starts, strict=True):
        end = start + len(row.prefix)
        last_of_prefix = end - 1
        for branch in row.branches:
            sources += [last_of_prefix, *range(end, end + len(branch) - 1)]
            end += len(branch)
    return sources


def end_sources(rows: Sequence[TokenRow], starts: Sequence[int]) -> list[int]:
    """Flat index of the last position of each branch: it predicts what follows the branch."""
    sources: list[int] = []
    for row, start in zip(rows, starts, strict=True):
        end = start + len(row.prefix)
        for branch in row.branches:
            end += len(branch)
            sources.append(end - 1)
    return sources


def question_rows(prompts: Sequence[list[int]], *, image_id: int, budget: int) -> list[TokenRow]:
    """Prompts about one image as branches behind what they have in common, in order.

    The common part is that of the token lists, so every prompt keeps the tokens it has alone.
    Where it does not contain the image (a template that puts the question first) each prompt gets
    a row of its own; more than `budget` branch tokens go into several rows.
    """
    columns = zip(*prompts, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))
    shared = min(common, min(map(len, prompts)) - 1)
    if image_id not in prompts[0][:shared]:
        return [TokenRow(prompt[:-1], [prompt[-1:]]) for prompt in prompts]
    rows: list[TokenRow] = []
    room = 0
    for prompt in prompts:
        branch = prompt[shared:]
        if not rows or len(branch) > room:
            rows.append(TokenRow(prompt[:shared], []))
            room = budget
        rows[-1].branches.append(branch)
        room -= len(branch)
    return rows
