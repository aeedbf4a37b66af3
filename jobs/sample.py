"""Several answers of the policy to each instruction."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import functools
import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._groups import ahead
from jobs._models import load_noted, usage_notes
from rlaifv.records import Answer, Instruction


def sample(job: Job) -> Iterator[Answer]:
    """Samples `num_answers` answers under one decoding setting.

    reads: instructions, policy
    writes: answers
    """
    from rlaifv.models.base import Decoding, Prompt  # torch, by its package

    config, model = job.config.sample, load_noted(job, "policy", job.policy())
    decoding = Decoding(
        *(config.max_new_tokens, config.temperature, config.top_p, config.top_k),
        repetition_penalty=config.repetition_penalty,
    )

    def ids(row: Instruction) -> list[str]:
        return [f"{row.instruction_id}/{n}" for n in range(config.num_answers)]

    def prompt(row: Instruction) -> Prompt:
        return Prompt(row.image.bytes, row.question, tuple(map(job.seed, ids(row))))

    queue = functools.partial(model.queue_answer, decoding=decoding)
    groups = job.instruction_groups()
    for group, answers in ahead(job, groups, lambda rows: queue(list(map(prompt, rows)))):
        for row, mine in zip(group, answers, strict=True):
            for name, made in zip(ids(row), mine, strict=True):
                said = made._asdict()  # text, num_tokens, finish_reason
                asked, seed = row.instruction_id, job.seed(name)
                yield Answer(instruction_id=asked, answer_id=name, seed=seed, **said)
    job.notes |= usage_notes(model)


if __name__ == "__main__":
    sys.exit(main(sample))
