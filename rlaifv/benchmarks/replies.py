"""Questions to a judge and its replies, and files of replies that were made elsewhere."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import ValidationError

from rlaifv.benchmarks.files import NumberedRow, read_rows
from rlaifv.errors import ArtifactError
from rlaifv.records import Count, Record


class Message(NamedTuple):
    """One chat message."""

    role: str
    content: str


class Ask(NamedTuple):
    """One question to the judge."""

    item: str
    """Named in errors."""
    position: int
    """Row of the item: what a file of replies is matched by."""
    messages: tuple[Message, ...]
    max_tokens: int
    repeat: int = 0
    subject: str = ""
    """The review that is read, in RefoMB's second step: such files are matched by it."""


class Reply(Record):
    """What the judge said; also the cache entry."""

    text: str
    model: str = ""
    """The name that the endpoint gives itself; it may differ from the one asked for."""
    input_tokens: Count = 0
    output_tokens: Count = 0


class Tally(NamedTuple):
    """What the questions so far cost."""

    asked: int
    """Requests that were answered, refused replies included."""
    cached: int
    failures: int
    """Requests that failed and were tried again."""
    input_tokens: int
    output_tokens: int
    cost: float | None
    models: dict[str, int]
    """Items per model name that the endpoint gave."""


Accept = Callable[[str], bool]
"""Whether a reply can be used; one that cannot is asked for again."""


class Replier(Protocol):
    """An endpoint or a file."""

    @property
    def identity(self) -> str:
        """Which judge with which settings: goes into every grade."""
        ...

    @property
    def repeats(self) -> int | None:
        """Judgings per answer; None: the benchmark's default."""
        ...

    def ask(self, asks: Sequence[Ask], accept: Accept) -> list[Reply]:
        """One reply per question, in order."""
        ...

    def tally(self) -> Tally:
        """What was asked so far."""
        ...


def judged_by(replier: Replier, prompt_source: str) -> str:
    """For a grade: the judge and the prompt, which is unknown for replies made elsewhere."""
    known = "unknown" if isinstance(replier, ReviewFiles) else prompt_source
    return f"{replier.identity}; prompt {known}"


class ReviewFiles:
    """Replies that a judge gave elsewhere: one file per repeat.

    A row is a string, a raw completion, or an object with `review`, `gpt4_review`, `reply` or
    `judge_reply`; it belongs to the item at its own position, or, in RefoMB's files, which are in
    order of completion, at the position in `image`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._replies = [_read_reviews(path) for path in paths]
        self._models: Counter[str] = Counter()

    @property
    def identity(self) -> str:
        return "replies in " + ", ".join(path.name for path in self._paths)

    @property
    def repeats(self) -> int | None:
        return len(self._paths)

    def expect(self, rows: int) -> None:
        """Raises ArtifactError unless every file has a reply for each of so many answers."""
        for path, replies in zip(self._paths, self._replies, strict=True):
            if len(replies) != rows:
                raise ArtifactError(f"{path}: {len(replies)} replies to {rows} answers")

    def ask(self, asks: Sequence[Ask], accept: Accept) -> list[Reply]:
        """Raises ArtifactError for an item without a row, or with a reply that cannot be used."""
        found = []
        for ask in asks:
            path = self._paths[ask.repeat]
            replies = self._replies[ask.repeat]
            reply = replies.get(ask.position, replies.get(ask.subject))
            if reply is None:
                raise ArtifactError(f"{path}: no reply for item {ask.item} (row {ask.position})")
            if not accept(reply.text):
                raise ArtifactError(
                    f"{path}: the reply for item {ask.item} (row {ask.position}) cannot be used: "
                    f"{reply.text!r:.200}"
                )
            found.append(reply)
        self._models.update(reply.model for reply in found)
        return found

    def tally(self) -> Tally:
        return Tally(
            0, sum(self._models.values()), 0, 0, 0, None, dict(sorted(self._models.items()))
        )


def _read_reviews(path: Path) -> dict[int | str, Reply]:
    replies: dict[int | str, Reply] = {}
    for row in read_rows(path, plain=True):
        key = row.row.get("review_text")
        if not isinstance(key, str):
            key = row.row.get("image") if "modelB" in row.row else row.number
            if not isinstance(key, int) or key in replies:
                raise ArtifactError(f"{row.where}, field image: expected a row number, once")
        replies[key] = _review(row)
    return replies


def _review(row: NumberedRow) -> Reply:
    model = str(row.row.get("model") or "")
    if "choices" in row.row:
        usage = row.row.get("usage") or {}
        try:
            return Reply(
                text=row.row["choices"][0]["message"]["content"],
                model=model,
                input_tokens=usage.get("prompt_tokens", 0),
                output_tokens=usage.get("completion_tokens", 0),
            )
        except (AttributeError, KeyError, IndexError, TypeError, ValidationError) as error:
            raise ArtifactError(f"{row.where}, field choices: not a completion") from error
    names = ("review", "gpt4_review", "review_res", "reply", "judge_reply", "text")
    text = next((row.row[name] for name in names if isinstance(row.row.get(name), str)), None)
    if text is None:
        raise ArtifactError(f"{row.where}: no field {' or '.join(names)} with a string")
    return Reply(text=text, model=model)
