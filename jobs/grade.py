"""A grade of each benchmark answer, by rule, by a judge, or (held-out instructions) the labeller."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from jobs._labelling import JobLabeller
from rlaifv.benchmarks.of_run import run_benchmarks
from rlaifv.errors import ArtifactError
from rlaifv.pipeline import labels_grades
from rlaifv.records import Grade, Response


def grade(job: Job) -> Iterator[Grade]:
    """Metrics are not computed here: they are pure functions of the grades.

    reads: responses
    writes: grades
    """
    responses = list(job.read("responses", Response))
    labeller = JobLabeller(job) if labels_grades(job.config) else None
    benchmarks = run_benchmarks(job.run, job.config, job.iteration, labeller=labeller)
    for row in responses:
        if row.benchmark not in benchmarks:
            raise ArtifactError(f"responses: {row.benchmark!r} is no benchmark of config.json")
    for name, benchmark in benchmarks.items():
        if rows := [row for row in responses if row.benchmark == name]:
            yield from benchmark.grade(rows)


if __name__ == "__main__":
    sys.exit(main(grade))
