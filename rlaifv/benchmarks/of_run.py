"""The benchmarks of a run: those that are configured, and what `prepare` held out."""

from collections.abc import Iterator

from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.base import Benchmark
from rlaifv.benchmarks.labelled import Labelled, Labeller
from rlaifv.benchmarks.object_halbench import HeldOutImages
from rlaifv.config import BenchmarkSpec, HeldOutConfig, RunConfig
from rlaifv.pipeline import HELD_OUT, held_out_key, holds_out
from rlaifv.records import Instruction
from rlaifv.store import Store


def run_benchmarks(
    run: Store, config: RunConfig, iteration: int, *, labeller: Labeller | None = None
) -> dict[str, Benchmark]:
    """By name, in the order in which they are answered. Files are read when first needed."""
    found = {spec.name: load_benchmark(spec) for spec in config.respond.benchmarks}
    held_out = holds_out(config)
    if held_out is None:
        return found

    def rows() -> Iterator[Instruction]:
        return run.read_part(held_out_key(iteration), Instruction)

    if held_out.coco is None:
        return found | {HELD_OUT: Labelled(rows, labeller)}
    return found | {HELD_OUT: HeldOutImages(_images_spec(held_out), rows)}


def selecting(config: RunConfig) -> list[str]:
    """Names of the benchmarks that checkpoints are compared on; empty: on none."""
    if holds_out(config) is not None:
        return [HELD_OUT]
    return [spec.name for spec in config.respond.benchmarks if spec.use == "select"]


def _images_spec(held_out: HeldOutConfig) -> BenchmarkSpec:
    return BenchmarkSpec(
        name=HELD_OUT,
        kind="object_halbench",
        mode="chair",
        use="select",
        path=HELD_OUT,
        coco=held_out.coco,
        vocabulary=held_out.vocabulary,
        nltk_data=held_out.nltk_data,
    )
