"""The labeller's questions about a group of images: equal ones are asked once."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlaifv.models.base import VisionLanguageModel, YesNo

Question = tuple[bytes, str]
"""An image and a question about it."""


def queue_questions(
    model: "VisionLanguageModel", asked: Iterable[Question], *, suffix: str
) -> "Callable[[], dict[Question, YesNo]]":
    """What the labeller says to each question with this suffix; see `queue_yes_no`."""
    from rlaifv.models.base import ImageQuestions  # torch, by its package

    texts_of: dict[bytes, dict[str, None]] = {}
    for image, text in asked:
        texts_of.setdefault(image, {})[text] = None
    rows = [
        ImageQuestions(image, tuple(f"{text}{suffix}" for text in texts))
        for image, texts in texts_of.items()
    ]
    queued = model.queue_yes_no(rows)
    return lambda: {
        (image, text): verdict
        for (image, texts), said in zip(texts_of.items(), queued(), strict=True)
        for text, verdict in zip(texts, said, strict=True)
    }
