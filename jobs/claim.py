"""Atomic claims of each answer, and the yes/no questions that check them."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._claiming import load_splitter
from jobs._entry import Job, main
from jobs._groups import progress
from rlaifv.claiming import Asked
from rlaifv.records import Answer, Claim


def claim(job: Job) -> Iterator[Claim]:
    """Splits by rule or with a chat model.

    reads: instructions, answers
    writes: claims
    """
    splitter = load_splitter(job)
    for group, answers in progress(job, job.follow("answers", Answer)):
        questions = {row.instruction_id: row.question for row in group}
        items = [Asked(row.answer_id, questions[row.instruction_id], row.text) for row in answers]
        for answer, drafts in zip(answers, splitter.split(items), strict=True):
            for number, draft in enumerate(drafts):
                yield Claim(
                    instruction_id=answer.instruction_id,
                    answer_id=answer.answer_id,
                    claim_id=f"{answer.answer_id}/{number}",
                    text=draft.text,
                    question=draft.question,
                )
    job.notes |= splitter.notes


if __name__ == "__main__":
    sys.exit(main(claim))
