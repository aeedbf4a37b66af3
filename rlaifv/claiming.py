"""Answers to claims with questions: the `rules` engine, or a chat model behind the same call.

A model's replies are not trusted: a reply that was cut makes the request smaller, a wrong number
of questions is asked again and then claim by claim, and what still fails is left to the rules.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rlaifv.claims import ClaimDraft, split_answer, to_question
from rlaifv.config import ClaimConfig
from rlaifv.errors import ConfigError
from rlaifv.places import local_path
from rlaifv.prompts import (
    QUESTION_PROMPT,
    SPLIT_PROMPT,
    Field,
    Template,
    chunk_answer,
    parse_bullets,
    parse_questions,
    parse_template,
    question_prompt,
    split_prompt,
)

if TYPE_CHECKING:  # the package imports torch, which the rules do without
    from rlaifv.models.base import Decoding, Generation, TextModel

log = logging.getLogger(__name__)

CHUNK_WORDS = 200
"""Longest piece of an answer in one request; the release drops all after about 244 words."""
SMALLEST_CHUNK_WORDS = 20
CLAIMS_PER_REQUEST = 16


class Asked(NamedTuple):
    """An answer to be split."""

    answer_id: str
    question: str
    answer: str


class Splitter(Protocol):
    """An engine."""

    notes: dict[str, str]
    """For the provenance; complete when all is split."""

    def split(self, items: Sequence[Asked]) -> list[list[ClaimDraft]]:
        """The claims of each answer, in order; an answer may have none."""
        ...


class RuleSplitter:
    """`rlaifv.claims`: no model, no randomness."""

    def __init__(self) -> None:
        self.notes = {"engine": "rules"}

    def split(self, items: Sequence[Asked]) -> list[list[ClaimDraft]]:
        return [split_answer(item.answer, question=item.question) for item in items]


class ModelSplitter:
    """Two prompts to a chat model; never truncates: long answers go in chunks."""

    def __init__(
        self,
        model: "TextModel",
        config: ClaimConfig,
        decoding: "Decoding",
        *,
        seed_of: Callable[[str], int],
    ) -> None:
        self._model, self._decoding, self._seed_of = model, decoding, seed_of
        self._split = _template(config.split_prompt, SPLIT_PROMPT, ("question", "answer"))
        self._question = _template(config.question_prompt, QUESTION_PROMPT, ("claims",))
        self._counts: Counter[str] = Counter()
        self.notes = {
            "engine": "model",
            "split_prompt": _describe(self._split),
            "question_prompt": _describe(self._question),
        }

    def split(self, items: Sequence[Asked]) -> list[list[ClaimDraft]]:
        claims = self._claims(items)
        names = [item.answer_id for item in items]
        questions = self._questions(names, claims)
        self.notes |= {name: str(count) for name, count in sorted(self._counts.items())}
        usage: dict[str, str] = getattr(self._model, "usage", {})  # of an endpoint
        self.notes |= usage
        return [
            [ClaimDraft(text, asked) for text, asked in zip(texts, each, strict=True)]
            for texts, each in zip(claims, questions, strict=True)
        ]

    def _ask(self, prompts: Sequence[str], names: Sequence[str]) -> "list[Generation]":
        """One reply per prompt; its random numbers come from its name."""
        seeds = [self._seed_of(name) for name in names]
        return self._model.reply(prompts, seeds=seeds, decoding=self._decoding)

    def _claims(self, items: Sequence[Asked]) -> list[list[str]]:
        """Claims per answer, repeated ones once."""
        found: list[dict[str, None]] = [{} for _ in items]
        todo = list(_chunks(items, CHUNK_WORDS))
        while todo:
            prompts = [
                split_prompt(self._split, question=items[owner].question, answer=text)
                for owner, _, text in todo
            ]
            replies = self._ask(prompts, [name for _, name, _ in todo])
            again: list[tuple[int, str, str]] = []
            for (owner, name, text), reply in zip(todo, replies, strict=True):
                cut = reply.finish_reason == "length"
                half = len(text.split()) // 2
                if cut and half >= SMALLEST_CHUNK_WORDS:
                    self._counts["replies_cut"] += 1
                    parts = chunk_answer(text, max_words=half)
                    again += [(owner, f"{name}.{n}", part) for n, part in enumerate(parts)]
                    continue
                if cut:
                    self._counts["replies_cut_for_good"] += 1
                    log.warning("%s: a reply was cut; its last claim may be incomplete", name)
                found[owner] |= dict.fromkeys(parse_bullets(reply.text))
            todo = again
        return [list(texts) for texts in found]

    def _questions(self, names: Sequence[str], claims: Sequence[Sequence[str]]) -> list[list[str]]:
        """One question per claim: asked together, once again, one by one, then by rule."""
        questions = [[""] * len(texts) for texts in claims]
        open_rows = [
            (row, range(start, min(start + CLAIMS_PER_REQUEST, len(texts))))
            for row, texts in enumerate(claims)
            for start in range(0, len(texts), CLAIMS_PER_REQUEST)
        ]
        for attempt in ("together", "again", "single"):
            if attempt == "single":
                open_rows = [(row, range(n, n + 1)) for row, span in open_rows for n in span]
            texts_of = [[claims[row][n] for n in span] for row, span in open_rows]
            prompts = [question_prompt(self._question, claims=texts) for texts in texts_of]
            seeds = [f"{names[row]}/{attempt}/{span.start}" for row, span in open_rows]
            replies = self._ask(prompts, seeds) if prompts else []
            failed = []
            for (row, span), reply in zip(open_rows, replies, strict=True):
                parsed = parse_questions(reply.text, num_claims=len(span))
                if parsed is None:
                    failed.append((row, span))
                    continue
                questions[row][span.start : span.stop] = parsed
            open_rows = failed
            self._counts[f"count_mismatch_{attempt}"] += len(failed)
        for row, span in open_rows:
            questions[row][span.start] = to_question(claims[row][span.start])
        return questions


def _chunks(items: Sequence[Asked], max_words: int) -> Iterator[tuple[int, str, str]]:
    """Owner's position, name for the seed, text."""
    for owner, item in enumerate(items):
        for number, text in enumerate(chunk_answer(item.answer, max_words=max_words)):
            yield owner, f"{item.answer_id}/split/{number}", text


def _template(path: str | None, ours: Template, fields: Sequence[Field]) -> Template:
    if path is None:
        return ours
    try:
        text = local_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the prompt cannot be read: {error}") from error
    return parse_template(text, fields=fields, source=path)


def _describe(template: Template) -> str:
    return f"{template.source} {hashlib.sha256(template.text.encode()).hexdigest()[:16]}"
