"""`python -m rlaifv.models.check MODEL`: whether a model may be trusted as policy and labeller.

Every check asks the engine in two ways that must agree; the ways differ in what is shared between
rows. Anyone who adds a family runs this on a small random checkpoint, and once on the real one.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("models.check")

import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rlaifv.cli import checked, ending
from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError
from rlaifv.models import load_local
from rlaifv.models.base import Branches, Decoding, ImageQuestions, Prompt
from rlaifv.models.branches import TrainableModel
from rlaifv.models.one_by_one import OneByOne

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.05}
"""Largest difference in nats of a token, or of a probability: summation order and, in 16 bits,
rounding of the hidden states; what the checks look for is far larger."""
QUESTIONS = ("Is there a dog in the image?", "Is it red?", "Do you see a cup on the table?")
ANSWERS = ("A dog runs.", "There is a red cup on a table.", "")
WORDS = ("yes", "Yes", "no", "No")


Checked = TrainableModel | OneByOne


class Outcome(NamedTuple):
    """`problem` is empty when the check holds."""

    problem: str
    difference: float | None = None
    """Largest that was found, for checks that compare."""


class Finding(NamedTuple):
    """One check's outcome."""

    check: str
    problem: str
    difference: float | None


def _picture(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = (
    _picture(Image.linear_gradient("L").resize((60, 40))),
    _picture(Image.radial_gradient("L").rotate(90).resize((40, 60))),
)


def _rows() -> list[Branches]:
    return [Branches(image, question, ANSWERS) for image in IMAGES for question in QUESTIONS[:2]]


def _difference(left: Iterable[object], right: Iterable[object]) -> float:
    """Largest absolute difference; infinite when the shapes differ."""
    a, b = (np.concatenate([np.ravel(np.asarray(x)) for x in side]) for side in (left, right))
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def _flat(results: Sequence[Sequence[object]]) -> list[object]:
    return [part for row in results for part in row]


def _beyond(what: str, difference: float, tolerance: float) -> Outcome:
    held = difference <= tolerance
    problem = "" if held else f"{what} differ by {difference:.3g} > {tolerance:g}"
    return Outcome(problem, difference)


def check_logps(model: Checked, tolerance: float) -> Outcome:
    """Answers that share a prefix score as in transformers' own forward, one row each."""
    with torch.inference_mode():
        plain = [part.float().cpu().numpy() for row in model.two_row_logps(_rows()) for part in row]
    shared = _flat(model.sequence_logps(_rows()))
    return _beyond("token log-probabilities", _difference(shared, plain), tolerance)


def check_verdicts(model: Checked, tolerance: float) -> Outcome:
    """Questions that share an image get the verdicts that each gets alone."""
    shared = _flat(model.yes_no([ImageQuestions(image, QUESTIONS) for image in IMAGES]))
    alone = [model.yes_no([ImageQuestions(i, (q,))])[0][0] for i in IMAGES for q in QUESTIONS]
    return _beyond("verdicts", _difference(shared, alone), tolerance)


def check_batches(model: Checked, tolerance: float) -> Outcome:
    """Order and batch size change nothing."""
    size, rows = model.batch_size, _rows()
    together = _flat(model.sequence_logps(rows))
    model.batch_size = 1
    try:
        alone = _flat(model.sequence_logps(rows[::-1])[::-1])
    finally:
        model.batch_size = size
    return _beyond("token log-probabilities", _difference(together, alone), tolerance)


def check_images(model: Checked, tolerance: float) -> Outcome:
    """No image answers for another, and an image matters at all."""
    rows = [Branches(image, QUESTIONS[0], ANSWERS) for image in IMAGES]
    together = model.sequence_logps(rows)
    alone = [model.sequence_logps([row])[0] for row in rows]
    found = _beyond(
        "scores with and without", _difference(*map(_flat, (together, alone))), tolerance
    )
    if not found.problem and _difference(together[0], together[1]) == 0:
        return Outcome("two different images give the same scores")
    return found


def check_words(model: Checked, tolerance: float) -> Outcome:
    """p(yes) and p(no) are those of the words as the first token of an answer."""
    row = Branches(IMAGES[0], QUESTIONS[0], WORDS)
    ((verdict,),) = model.yes_no([ImageQuestions(row.image, (row.question,))])
    (scores,) = model.sequence_logps([row])
    if split := [word for word, logps in zip(WORDS, scores, strict=True) if len(logps) != 2]:
        return Outcome(f"the tokenizer splits {split}")
    yes, yes2, no, no2 = (float(np.exp(logps[0])) for logps in scores)
    return _beyond("probabilities", _difference([verdict], [(yes + yes2, no + no2)]), tolerance)


def check_end(model: Checked, tolerance: float) -> Outcome:
    """An answer is scored with one end token, and generation stops at its limit."""
    ((empty,),) = model.sequence_logps([Branches(IMAGES[0], QUESTIONS[0], ("",))])
    if len(empty) != 1:
        return Outcome(f"an empty answer has {len(empty)} tokens, expected the end token alone")
    prompts = [Prompt(image, "What is it?", (0, 1)) for image in IMAGES]
    answers = model.answer(prompts, decoding=Decoding(4))
    alone = [model.answer([prompt], decoding=Decoding(4))[0] for prompt in prompts]
    if tolerance < 1e-3 and answers != alone:
        return Outcome("greedy answers depend on the batch")
    wrong = [a for row in answers for a in row if a.finish_reason == "length" and a.num_tokens != 4]
    return Outcome(f"cut answers do not have 4 tokens: {wrong}" if wrong else "")


def check_length(model: Checked, tolerance: float) -> Outcome:
    """A prompt beyond the context is refused with its row, never cut."""
    del tolerance
    context: int = model.module.config.get_text_config().max_position_embeddings
    rows = [Branches(IMAGES[0], question, ("a",)) for question in ("Short?", "dog 1 " * context)]
    try:
        model.sequence_logps(rows)
    except ArtifactError as error:
        named = "row 1" in str(error)
        return Outcome("" if named else f"the error does not name row 1: {error}")
    return Outcome(f"a prompt of more than {context} tokens was accepted")


CHECKS: dict[str, Callable[[Checked, float], Outcome]] = {
    "shared prefix equals one by one (log-probabilities)": check_logps,
    "shared prefix equals one by one (verdicts)": check_verdicts,
    "order and batch size change nothing": check_batches,
    "images are kept apart and matter": check_images,
    "yes and no are the right tokens": check_words,
    "answers end": check_end,
    "a prompt that is too long is refused": check_length,
}


def check(model: Checked, *, tolerance: float) -> list[Finding]:
    """Every check on a loaded model."""
    return [Finding(name, *run(model, tolerance)) for name, run in CHECKS.items()]


def findings_text(model: str, findings: Sequence[Finding]) -> str:
    """A line per check with what was measured, and the verdict."""
    width = max(map(len, CHECKS))
    lines = []
    for one in findings:
        measured = "" if one.difference is None else f"differs by {one.difference:.1e}"
        word, said = ("FAILS", one.problem) if one.problem else ("holds", measured)
        lines.append(f"{word}  {one.check:<{width}}  {said}".rstrip())
    failed = sum(bool(one.problem) for one in findings)
    lines.append(
        f"{model}: {failed} of {len(findings)} checks fail: not to be trusted"
        if failed
        else f"{model}: all {len(findings)} checks hold"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all hold, 1 when not, or the error's exit code."""
    given = flags.models_check().parse_args(arguments)

    def work() -> int:
        values = {key: getattr(given, key) for key in flags.MODEL}
        spec = checked(lambda: ModelSpec(path=given.model, **values), what="a flag of the model")
        findings = check(load_local(spec), tolerance=TOLERANCES[given.dtype])
        if given.json:
            print(json.dumps([finding._asdict() for finding in findings], indent=1))
        else:
            print(findings_text(given.model, findings))
        return int(any(finding.problem for finding in findings))

    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
