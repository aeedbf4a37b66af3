"""Atomic claims of each answer, and the yes/no questions that check them."""

import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._models import describe_model
from rlaifv.claiming import Asked, ModelSplitter, RuleSplitter, Splitter
from rlaifv.records import Answer, Claim


def claim(job: Job) -> Iterator[Claim]:
    """Splits by rule or with a chat model.

    reads: instructions, answers
    writes: claims
    """
    splitter = _splitter(job)
    for group, answers in job.follow("answers", Answer):
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


def _splitter(job: Job) -> Splitter:
    config = job.config.claim
    if config.model.family == "rules":
        return RuleSplitter()
    from rlaifv.models import load_text_model  # torch: not for the rules
    from rlaifv.models.base import Decoding

    job.notes["model"] = describe_model(config.model)
    decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p)
    return ModelSplitter(load_text_model(config.model), config, decoding, seed_of=job.seed)


if __name__ == "__main__":
    sys.exit(main(claim))
