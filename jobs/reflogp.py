"""Log-probabilities of the pairs' answers under the policy before training, the DPO reference."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import functools
import itertools
import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._groups import ahead, in_groups
from jobs._models import describe_model, reference_notes, usage_notes
from jobs._reference import queue_pairs
from rlaifv.records import PreferencePair, ReferenceLogps


def reflogp(job: Job) -> Iterator[ReferenceLogps]:
    """Scores both answers of a pair behind one prefix.

    reads: pairs, policy
    writes: reflogps
    """
    from rlaifv.models import load_scorer  # torch: not for --help, nor for a shard that is done

    spec, size = job.policy(), job.config.shards.group_size
    model = load_scorer(spec)
    job.notes |= {"policy": describe_model(spec), **reference_notes(spec)}
    groups = in_groups(enumerate(job.read("pairs", PreferencePair, part=0)), size)
    mine = itertools.islice(groups, job.shard.index, None, job.shard.count)
    job.total = job.origin("pairs", part=0).rows // job.shard.count
    for _, scores in ahead(job, mine, functools.partial(queue_pairs, job, model)):
        yield from scores
    job.notes |= usage_notes(model)


if __name__ == "__main__":
    sys.exit(main(reflogp))
