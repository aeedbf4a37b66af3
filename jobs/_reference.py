"""Between `reflogp` and `train`: which pairs have a reference, and whether it is the right one."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jobs._entry import Job
from jobs._models import reference_notes
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import Shard, quarantine_key
from rlaifv.records import PreferencePair, Quarantined, ReferenceLogps

if TYPE_CHECKING:
    from rlaifv.models.base import Branches
    from rlaifv.models.branches import TrainableModel

Numbered = tuple[int, PreferencePair]
"""A pair and its row number in its part."""


def queue_pairs(
    job: Job, model: "TrainableModel", group: Sequence[Numbered]
) -> Callable[[], list[ReferenceLogps]]:
    """Both answers of each pair; pairs that the model cannot take are set aside, never cut.

    Those are pairs of more tokens than `train.max_length` or the model's context, and questions
    with an image placeholder.
    """
    limit = job.config.train.max_length
    try:
        queued = model.queue_sequence_logps([_row(pair) for _, pair in group], max_length=limit)
    except ArtifactError:
        fit = [one for one in group if _fits(job, model, *one)]
        if len(fit) == len(group):  # something else: broken weights, say
            raise
        group = fit
        queued = model.queue_sequence_logps([_row(pair) for _, pair in group], max_length=limit)
    return lambda: [
        ReferenceLogps(
            pair_id=pair.pair_id,
            chosen_token_nats=chosen.tolist(),
            rejected_token_nats=rejected.tolist(),
        )
        for (_, pair), (chosen, rejected) in zip(group, queued(), strict=True)
    ]


def _fits(job: Job, model: "TrainableModel", number: int, pair: PreferencePair) -> bool:
    try:
        model.encode_branches([_row(pair)], max_length=job.config.train.max_length)
    except ArtifactError as error:
        problem = f"pair {pair.pair_id}: {str(error).removeprefix('row 0: ')}"
        job.quarantine(
            Quarantined(
                artifact="pairs",
                file=job.parts("pairs")[0],
                row=number,
                field="(row)",
                problem=problem,
                excerpt=pair.pair_id[:200],
            )
        )
        return False
    return True


def _row(pair: PreferencePair) -> "Branches":
    from rlaifv.models.base import Branches  # torch, by its package

    return Branches(pair.image.bytes, pair.question, (pair.chosen, pair.rejected))


def num_scored(job: Job) -> int:
    """Pairs that training sees: all but those that `reflogp` has set aside."""
    parts = range(len(job.parts("reflogps")))
    aside = sum(job.origin("reflogps", part=part).quarantined for part in parts)
    return job.origin("pairs", part=0).rows - aside


def scored_pairs(job: Job) -> list[PreferencePair]:
    """The same pairs."""
    aside: set[int] = set()
    count = len(job.parts("reflogps"))
    for part in range(count):
        if job.origin("reflogps", part=part).quarantined:
            key = quarantine_key(job.iteration, "reflogp", Shard(part, count))
            aside |= {row.row for row in job.run.read_part(key, Quarantined)}
    job.notes["pairs set aside"] = str(len(aside))
    pairs = enumerate(job.read("pairs", PreferencePair, part=0))
    return [pair for number, pair in pairs if number not in aside]


def check_reference(job: Job) -> None:
    """Raises ArtifactError for reference log-probabilities of another model, processor or pairs."""
    (pairs,) = job.parts("pairs")
    wanted = reference_notes(job.policy()) | {"pairs": job.origin("pairs").rows_sha256}
    for part, key in enumerate(job.parts("reflogps")):
        origin = job.origin("reflogps", part=part)
        found = {**origin.notes, "pairs": origin.inputs.get(pairs)}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ArtifactError(
                    f"{job.run}/{key}: made with another {name}: {found.get(name)}, "
                    f"{value} was expected; delete the reflogps of this iteration"
                )
