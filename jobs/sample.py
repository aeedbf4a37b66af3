"""Several answers of the policy to each instruction."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._models import load_noted, usage_notes
from rlaifv.records import Answer


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
    for group in job.instruction_groups():
        ids = [[f"{row.instruction_id}/{n}" for n in range(config.num_answers)] for row in group]
        seeds = [tuple(map(job.seed, each)) for each in ids]
        rows = zip(group, seeds, strict=True)
        prompts = [Prompt(row.image.bytes, row.question, each) for row, each in rows]
        answers = model.answer(prompts, decoding=decoding)
        for row, *columns in zip(group, ids, seeds, answers, strict=True):
            for name, seed, made in zip(*columns, strict=True):
                yield Answer(
                    instruction_id=row.instruction_id,
                    answer_id=name,
                    text=made.text,
                    seed=seed,
                    num_tokens=made.num_tokens,
                    finish_reason=made.finish_reason,
                )
    job.notes |= usage_notes(model)


if __name__ == "__main__":
    sys.exit(main(sample))
