"""Preference pairs: the answer with fewer rejected claims is chosen."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import heapq
import itertools
import logging
import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._models import refuse_mixture
from rlaifv.errors import ArtifactError
from rlaifv.pairs import Evidence, build_pairs, to_pair
from rlaifv.records import Answer, Claim, Instruction, PreferencePair, Verdict


def pair(job: Job) -> Iterator[PreferencePair]:
    """Joins all shards; images are read again for the chosen pairs only, in their order.

    reads: instructions, answers, claims, verdicts
    writes: pairs
    """
    refuse_mixture(job, answers="policy", verdicts="labeller")
    rows = job.read_all("instructions", Instruction)
    image_ids = {row.instruction_id: row.image_id for row in rows}
    evidence = Evidence(
        job.read_all("answers", Answer),
        job.read_all("claims", Claim),
        job.read_all("verdicts", Verdict),
    )
    result = build_pairs(image_ids, evidence, config=job.config.pair, seed=job.config.seed)
    counts = result.counts._asdict() | {"length_ratio": result.length_ratio}
    job.notes |= {name: str(value) for name, value in counts.items()}
    logging.getLogger(__name__).info("pairs %s", " ".join(map("=".join, job.notes.items())))
    parts = job.read_parts("instructions", Instruction)
    instructions = heapq.merge(*parts, key=lambda row: row.instruction_id)
    for instruction_id, plans in itertools.groupby(result.plans, lambda plan: plan.instruction_id):
        row = next((row for row in instructions if row.instruction_id == instruction_id), None)
        if row is None:
            raise ArtifactError(f"instructions: {instruction_id!r} is out of order in its part")
        for plan in plans:
            yield to_pair(plan, row, ds_name=job.config.name)


if __name__ == "__main__":
    sys.exit(main(pair))
