"""The best of N answers by the aligned model's own reward: `python -m rlaifv.best_of_n`.

A model trained with DPO is a reward model (arXiv 2405.17220, section on self-feedback): how much
likelier it finds an answer than the model that it was trained from. The plain sum favours short
answers, so the paper divides by their length:

    r(y) = beta * log(pi(y | x) / pi_ref(y | x)) / T

The reference release has no code for it. The answers may be another model's (`--generator`).
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("best_of_n")

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlaifv.benchmarks.files import image_bytes, read_rows, text_field
from rlaifv.cli import checked, ending
from rlaifv.config import ModelSpec, SampleConfig, TrainConfig
from rlaifv.errors import ArtifactError

if TYPE_CHECKING:
    from rlaifv.models.base import Floats, VisionLanguageModel

log = logging.getLogger(__name__)
DEFAULT_N = 16
"""The paper uses 16 to 32 mostly, and up to 64."""
GROUP = 8
"""Questions at a time."""


class Asked(NamedTuple):
    """A question and its encoded image."""

    question_id: str
    question: str
    image: bytes


class Models(NamedTuple):
    """Who answers and who judges; the same object may play several parts."""

    generator: "VisionLanguageModel"
    policy: "VisionLanguageModel"
    """The aligned model."""
    reference: "VisionLanguageModel"
    """The model that its training started from."""


class Settings(NamedTuple):
    """How answers are drawn and compared."""

    num_samples: int = DEFAULT_N
    sample: SampleConfig = SampleConfig()
    beta: float = TrainConfig().beta
    """Scales every reward alike, so it never changes the winner."""
    seed: int = 0


class Candidate(NamedTuple):
    """One of the N answers."""

    text: str
    reward: float
    num_tokens: int
    """T: the answer's tokens and the end of sequence, which is scored as well."""


class Best(NamedTuple):
    """The winner and everything it was compared with."""

    asked: Asked
    candidates: tuple[Candidate, ...]
    winner: int
    """Its place in `candidates`; the first of several equally good ones."""


def reward(policy_nats: "Floats", reference_nats: "Floats", *, beta: float) -> float:
    """beta * log(pi / pi_ref) / T from the log-probabilities of the T tokens of one answer.

    Raises ArtifactError unless both models have as many tokens for the answer.
    """
    if len(policy_nats) != len(reference_nats) or len(policy_nats) == 0:
        raise ArtifactError(
            f"the policy has {len(policy_nats)} tokens for an answer and the reference "
            f"{len(reference_nats)}: they need the same tokenizer"
        )
    difference = policy_nats.astype("float64") - reference_nats.astype("float64")
    return beta * float(difference.sum()) / len(difference)


def best_of_n(models: Models, asked: Sequence[Asked], settings: Settings) -> Iterator[Best]:
    """The best answer to each question, in order.

    Seeds come from the question's id and the sample's number, so the first n of N samples are
    those of N = n.
    """
    from rlaifv.models.base import Branches, Decoding, Prompt  # torch

    chosen = settings.sample
    decoding = Decoding(chosen.max_new_tokens, chosen.temperature, chosen.top_p, chosen.top_k)
    for start in range(0, len(asked), GROUP):
        group = asked[start : start + GROUP]
        prompts = [Prompt(one.image, one.question, _seeds(one, settings)) for one in group]
        answers = models.generator.answer(prompts, decoding=decoding)
        rows = [
            Branches(one.image, one.question, tuple(made.text for made in mine))
            for one, mine in zip(group, answers, strict=True)
        ]
        ours, theirs = models.policy.sequence_logps(rows), models.reference.sequence_logps(rows)
        for one, row, new, old in zip(group, rows, ours, theirs, strict=True):
            scored = zip(row.answers, new, old, strict=True)
            yield _best(
                one, [Candidate(t, reward(p, q, beta=settings.beta), len(p)) for t, p, q in scored]
            )
        log.info("%d of %d questions", start + len(group), len(asked))


def _best(asked: Asked, candidates: Sequence[Candidate]) -> Best:
    winner = max(range(len(candidates)), key=lambda place: candidates[place].reward)
    return Best(asked, tuple(candidates), winner)


def _seeds(asked: Asked, settings: Settings) -> tuple[int, ...]:
    texts = (f"{settings.seed}/{asked.question_id}/{k}" for k in range(settings.num_samples))
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return tuple(int.from_bytes(digest[:8], "big") >> 1 for digest in digests)


def read_questions(path: Path) -> list[Asked]:
    """Rows with `question` or `prompt`, `image` or `image_path`, and perhaps `question_id`.

    JSONL, JSON or Parquet; image paths are relative to the file. Raises ArtifactError for a bad
    row and for an id that comes twice.
    """
    found: dict[str, Asked] = {}
    for row in read_rows(path):
        key = str(row.row.get("question_id", row.number))
        if key in found:
            raise ArtifactError(f"{row.where}, field question_id: {key!r} again")
        image = image_bytes(row, "image", "image_path", folder=path.parent)
        found[key] = Asked(key, text_field(row, "question", "prompt"), image)
    return list(found.values())


def as_json(best: Best) -> str:
    """One line: the winner's text and reward, and all candidates."""
    winner = best.candidates[best.winner]
    row = {
        "question_id": best.asked.question_id,
        "question": best.asked.question,
        "text": winner.text,
        "reward": winner.reward,
        "winner": best.winner,
        "candidates": [one._asdict() for one in best.candidates],
    }
    return json.dumps(row)


def _run(given: argparse.Namespace) -> int:
    from rlaifv.models import load_model  # torch: not for --help

    def chosen(*names: str) -> dict[str, Any]:
        return {name: getattr(given, name) for name in names if getattr(given, name) is not None}

    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    sample = checked(lambda: SampleConfig(**chosen(*names)), what="a flag of sampling")
    # A negative beta would turn the order.
    beta = checked(lambda: TrainConfig(**chosen("beta")), what="a flag of the reward").beta
    settings = Settings(given.num_samples or DEFAULT_N, sample, beta, given.seed)
    asked = read_questions(given.questions)

    def load(path: str) -> "VisionLanguageModel":
        return load_model(ModelSpec(path=path, **chosen("dtype", "batch_size")))

    policy, reference = load(given.policy), load(given.reference)
    models = Models(load(given.generator) if given.generator else policy, policy, reference)
    draft = given.out.with_name(f"{given.out.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(f"{as_json(best)}\n" for best in best_of_n(models, asked, settings))
    draft.replace(given.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `--out` once all questions are answered; the exit code is the error's."""
    given = flags.best_of_n().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    return ending(lambda: _run(given))


if __name__ == "__main__":
    sys.exit(main())
