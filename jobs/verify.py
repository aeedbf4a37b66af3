"""The labeller's verdict on each claim."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import functools
import random
import sys
from collections.abc import Iterator, Sequence

from jobs._entry import Job, main
from jobs._groups import ahead
from jobs._models import load_noted, usage_notes
from jobs._questions import Question, queue_questions
from rlaifv.records import Claim, Instruction, Verdict


def verify(job: Job) -> Iterator[Verdict]:
    """Asks for every claim; equal questions about equal images once per group.

    reads: instructions, claims
    writes: verdicts
    """
    config, model = job.config.verify, load_noted(job, "labeller", job.config.verify.labeller)
    job.notes["control"] = config.control

    def about(group: Sequence[Instruction], claims: Sequence[Claim]) -> list[Question]:
        image_of = {row.instruction_id: row.image.bytes for row in group}
        return [(image_of[row.instruction_id], row.question) for row in claims]

    queue = functools.partial(queue_questions, model, suffix=config.suffix)
    groups = job.follow("claims", Claim)
    for (group, claims), said in ahead(job, groups, lambda rows: queue(about(*rows))):
        verdicts = [said[asked] for asked in about(group, claims)]
        if config.control == "shuffled":
            random.Random(job.seed(f"shuffled/{group[0].instruction_id}")).shuffle(verdicts)
        for row, (p_yes, p_no) in zip(claims, verdicts, strict=True):
            ids = row.model_dump(include={"instruction_id", "answer_id", "claim_id"})
            yield Verdict(**ids, p_yes=p_yes, p_no=p_no)
    job.notes |= usage_notes(model)


if __name__ == "__main__":
    sys.exit(main(verify))
