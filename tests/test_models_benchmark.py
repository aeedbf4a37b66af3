"""The kernel benchmark on a model so small that only its counts mean something."""

import json
from pathlib import Path

import pytest

from rlaifv import benchmark_gpu
from rlaifv.benchmark_kernels import run, table
from rlaifv.models.random_weights import Shape


def test_every_way_agrees_and_ours_computes_a_fraction_of_the_tokens() -> None:
    lines = run(Shape(image_size=336))
    assert all(line.same_decisions for line in lines), table(lines)
    assert all(line.largest_difference < 1e-4 for line in lines)
    works = {line.work: [other for other in lines if other.work == line.work] for line in lines}
    claims, answers, pair = works.values()
    assert claims[1].lm_tokens / claims[0].lm_tokens > 9
    assert answers[1].lm_tokens / answers[0].lm_tokens > 7
    assert pair[1].lm_tokens / pair[0].lm_tokens > 1.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # generate, PEFT
def test_the_gpu_benchmark_runs_every_way_and_they_agree(tmp_path: Path) -> None:
    benchmark_gpu.main(["--tiny", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 22
    assert all(row["difference"] < 1e-4 for row in rows), rows
    assert all(row["same"] == 1 for row in rows), rows
