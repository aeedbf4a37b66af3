"""Benchmarks: what a model is asked, how its answers are graded, what is measured.

`load_benchmark` is the way in; `python -m rlaifv.benchmarks` scores files made elsewhere.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported with the kind: `--help` of programs in this package is instant
    from rlaifv.benchmarks.base import Benchmark
    from rlaifv.config import BenchmarkSpec


def load_benchmark(spec: "BenchmarkSpec") -> "Benchmark":
    """The benchmark that `spec` describes; its files are read when first needed.

    The only place with an `if` on the kind. Raises ConfigError for a setting that the kind needs
    and `spec` lacks.
    """
    if spec.kind == "objects":
        from rlaifv.benchmarks.objects import ObjectBenchmark

        return ObjectBenchmark(spec)
    if spec.kind == "object_halbench":
        from rlaifv.benchmarks.object_halbench import ObjectHalBench

        return ObjectHalBench(spec)
    if spec.kind == "mmhal":
        from rlaifv.benchmarks.mmhal import MMHal

        return MMHal(spec)
    if spec.kind == "refomb":
        from rlaifv.benchmarks.refomb import RefoMB

        return RefoMB(spec)
    from rlaifv.benchmarks.amber import Amber

    return Amber(spec)
