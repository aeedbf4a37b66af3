"""A grade of each benchmark answer, by rule or by a judge."""

from jobs import _flags

if __name__ == "__main__":
    _flags.look_first(__file__)

import sys
from collections.abc import Iterator

from jobs._entry import Job, main
from rlaifv.benchmarks import load_benchmark
from rlaifv.errors import ArtifactError
from rlaifv.records import Grade, Response


def grade(job: Job) -> Iterator[Grade]:
    """Metrics are not computed here: they are pure functions of the grades.

    reads: responses
    writes: grades
    """
    responses = list(job.read("responses", Response))
    names = [spec.name for spec in job.config.respond.benchmarks]
    for row in responses:
        if row.benchmark not in names:
            raise ArtifactError(f"responses: {row.benchmark!r} is no benchmark of config.json")
    for spec in job.config.respond.benchmarks:
        rows = [row for row in responses if row.benchmark == spec.name]
        if rows:
            yield from load_benchmark(spec).grade(rows)


if __name__ == "__main__":
    sys.exit(main(grade))
