"""Several answers of the policy to each instruction."""

import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._models import describe_model
from rlaifv.records import Answer


def sample(job: Job) -> Iterator[Answer]:
    """Samples `num_answers` answers under one decoding setting.

    reads: instructions, policy
    writes: answers
    """
    from rlaifv.models import load_model  # torch: not for --help, nor for a shard that is done
    from rlaifv.models.base import Decoding, Prompt

    config, spec = job.config.sample, job.policy()
    model = load_model(spec)
    job.notes["policy"] = describe_model(spec)
    decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    for group in job.instruction_groups():
        ids = [[f"{row.instruction_id}/{n}" for n in range(config.num_answers)] for row in group]
        seeds = [tuple(map(job.seed, each)) for each in ids]
        prompts = [
            Prompt(row.image.bytes, row.question, each)
            for row, each in zip(group, seeds, strict=True)
        ]
        answers = model.answer(prompts, decoding=decoding)
        for row, *columns in zip(group, ids, seeds, answers, strict=True):
            for answer_id, seed, made in zip(*columns, strict=True):
                yield Answer(
                    instruction_id=row.instruction_id,
                    answer_id=answer_id,
                    text=made.text,
                    seed=seed,
                    num_tokens=made.num_tokens,
                    finish_reason=made.finish_reason,
                )


if __name__ == "__main__":
    sys.exit(main(sample))
