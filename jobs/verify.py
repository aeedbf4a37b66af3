"""The labeller's verdict on each claim."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import random
import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._models import load_noted, usage_notes
from rlaifv.records import Claim, Verdict


def verify(job: Job) -> Iterator[Verdict]:
    """Asks for every claim; equal questions about equal images once per group.

    reads: instructions, claims
    writes: verdicts
    """
    from rlaifv.models.base import ImageQuestions  # torch, by its package

    config, model = job.config.verify, load_noted(job, "labeller", job.config.verify.labeller)
    job.notes["control"] = config.control
    for group, claims in job.follow("claims", Claim):
        image_of = {row.instruction_id: row.image.bytes for row in group}
        asked: dict[bytes, dict[str, None]] = {}
        for row in claims:
            asked.setdefault(image_of[row.instruction_id], {})[row.question] = None
        rows = [
            ImageQuestions(image, tuple(f"{text}{config.suffix}" for text in texts))
            for image, texts in asked.items()
        ]
        replies = zip(asked.items(), model.yes_no(rows), strict=True)
        said = {
            (i, q): reply for (i, qs), each in replies for q, reply in zip(qs, each, strict=True)
        }
        verdicts = [said[image_of[row.instruction_id], row.question] for row in claims]
        if config.control == "shuffled":
            random.Random(job.seed(f"shuffled/{group[0].instruction_id}")).shuffle(verdicts)
        for row, (p_yes, p_no) in zip(claims, verdicts, strict=True):
            ids = row.model_dump(include={"instruction_id", "answer_id", "claim_id"})
            yield Verdict(**ids, p_yes=p_yes, p_no=p_no)
    job.notes |= usage_notes(model)


if __name__ == "__main__":
    sys.exit(main(verify))
