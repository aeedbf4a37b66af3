"""What a model does for a stage: plain values in, plain values out.

A *prefix* is everything up to the point where texts differ: system prompt, image and (for answers)
the question. It is computed once and shared: by the samples of a prompt, by the claims of an
image, by the two answers of a pair.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
YES, NO = ("yes", "Yes"), ("no", "No")
"""The words that count; the reference release's."""
NOT_FINITE = "the model's scores are not finite: broken weights, or dtype float16 overflows"


class Decoding(NamedTuple):
    """How text is generated. Beams and sampling exclude each other."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy, or beam search when `num_beams` > 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    num_beams: int = 1
    repetition_penalty: float = 1.0
    """Scores of tokens that the answer has already: divided by it if positive, else multiplied."""


class Prompt(NamedTuple):
    """One image and question; one answer per seed, all sharing the prefix."""

    image: bytes
    question: str
    seeds: tuple[int, ...] = (0,)
    """Greedy and beam decoding ignore the value; one answer per entry all the same."""


class Generation(NamedTuple):
    """One generated text."""

    text: str
    num_tokens: int
    """End-of-sequence token included when there is one."""
    finish_reason: Literal["stop", "length"]


class ImageQuestions(NamedTuple):
    """One image and the yes/no questions about it, all sharing the image's prefix."""

    image: bytes
    questions: tuple[str, ...]


class YesNo(NamedTuple):
    """Probability mass at the first answer position, over the whole vocabulary."""

    p_yes: float
    """p(yes) + p(Yes)."""
    p_no: float
    """p(no) + p(No)."""


class Branches(NamedTuple):
    """One image and question, and answers whose log-probabilities are wanted."""

    image: bytes
    question: str
    answers: tuple[str, ...]


class VisionLanguageModel(Protocol):
    """A policy or labeller. Every method keeps the order of its rows.

    Rows are processed in batches of `batch_size` in the order given (callers hand over one group
    at a time); results do not depend on which other rows are in the call beyond float noise, and
    are bit-identical for the same call. A row that does not fit the context raises ArtifactError
    with the row's number; images are decoded with `rlaifv.images.decode`.

    A `queue_` method starts the work, as far as the engine can; the call that it returns waits for
    the results, and for nothing that was queued later. It may be made once. Whoever queues the next
    group before that keeps the device busy.
    """

    batch_size: int

    def queue_answer(
        self, prompts: Sequence[Prompt], *, decoding: Decoding
    ) -> Callable[[], list[list[Generation]]]:
        """Reads images ahead, or asks a server; decoding on this machine is left to the call."""
        ...

    def queue_yes_no(self, rows: Sequence[ImageQuestions]) -> Callable[[], list[list[YesNo]]]:
        """Queues all of `yes_no`."""
        ...

    def queue_sequence_logps(self, rows: Sequence[Branches]) -> Callable[[], list[list[Floats]]]:
        """Queues all of `sequence_logps`; what is wrong with a row is raised here."""
        ...

    def answer(self, prompts: Sequence[Prompt], *, decoding: Decoding) -> list[list[Generation]]:
        """One list per prompt, one generation per seed."""
        return self.queue_answer(prompts, decoding=decoding)()

    def yes_no(self, rows: Sequence[ImageQuestions]) -> list[list[YesNo]]:
        """One list per image, one verdict per question."""
        return self.queue_yes_no(rows)()

    def sequence_logps(self, rows: Sequence[Branches]) -> list[list[Floats]]:
        """Per row and answer: log-probability in nats of each answer token, float32 [tokens].

        The answer's tokens are those of its text followed by end-of-sequence; prompt and image
        are never scored. Computed from float32 log-softmax.
        """
        return self.queue_sequence_logps(rows)()


class TokenLogp(NamedTuple):
    """A token's text and its log-probability in nats."""

    text: str
    logp: float


@runtime_checkable
class ServedModel(VisionLanguageModel, Protocol):
    """What a server asks for besides."""

    def first_tokens(
        self, image: bytes, question: str, *, count: int, ids: Sequence[int] = ()
    ) -> list[TokenLogp]:
        """The likeliest first tokens of an answer, best first; or these, behind the likeliest."""
        ...

    def count_prompt(self, image: bytes, question: str) -> int:
        """Tokens of a prompt, those of the image included."""
        ...


class TextModel(Protocol):
    """A chat language model without images, for splitting answers into claims."""

    def reply(
        self, prompts: Sequence[str], *, seeds: Sequence[int], decoding: Decoding
    ) -> list[Generation]:
        """One reply per prompt (a single user turn), in order."""
        ...


@runtime_checkable
class ServedTextModel(TextModel, Protocol):
    """The same with what a server asks for besides."""

    def count_prompt(self, prompt: str) -> int:
        """Tokens of a prompt."""
        ...
