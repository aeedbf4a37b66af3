"""Answers of one checkpoint to benchmark questions."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import functools
import itertools
import sys
from collections.abc import Iterator

from jobs._checkpoints import load_ordinal
from jobs._entry import Job, main
from jobs._groups import ahead, in_groups
from jobs._models import usage_notes
from rlaifv.benchmarks.of_run import run_benchmarks
from rlaifv.pipeline import respond_shard
from rlaifv.records import Response


def respond(job: Job) -> Iterator[Response]:
    """Decodes with beams, or greedily; ordinal 0 is the policy before training.

    reads: checkpoints, policy
    writes: responses
    """
    config = job.config.respond
    ordinal, slice_ = respond_shard(job.config, job.shard)
    if (loaded := load_ordinal(job, ordinal)) is None:
        return
    from rlaifv.models.base import Decoding, Prompt  # torch: not for --help

    decoding = Decoding(config.max_new_tokens, num_beams=config.num_beams)
    benchmarks = run_benchmarks(job.run, job.config, job.iteration)
    asked = ((name, q) for name, each in benchmarks.items() for q in each.questions())
    groups = in_groups(asked, job.config.shards.group_size)
    mine = itertools.islice(groups, slice_.index, None, slice_.count)
    queue = functools.partial(loaded.model.queue_answer, decoding=decoding)
    for group, answers in ahead(
        job, mine, lambda rows: queue([Prompt(one.image, one.question) for _, one in rows])
    ):
        for (name, one), (made,) in zip(group, answers, strict=True):
            said = made._asdict()  # text, num_tokens, finish_reason
            yield Response(benchmark=name, question_id=one.question_id, step=loaded.step, **said)
    job.notes |= usage_notes(loaded.model)


if __name__ == "__main__":
    sys.exit(main(respond))
