"""The kernel benchmark on a model so small that only its counts mean something."""

import json
from pathlib import Path

import pytest

from rlaifv import benchmark_gpu, benchmark_iteration
from rlaifv.benchmark_kernels import run, table
from rlaifv.claims import split_answer
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
    benchmark_gpu.main(["--tiny", "--out", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 22
    assert all(row["difference"] < 1e-4 for row in rows), rows
    assert all(row["same"] == 1 for row in rows), rows


def test_random_answers_make_claims_of_twenty_words() -> None:
    tokenizer = benchmark_iteration.make_tokenizer(2400)
    sentence = benchmark_iteration.sentences(1)[0]
    (spoken,) = tokenizer.convert_tokens_to_ids([sentence])
    assert tokenizer.decode([spoken, 2399, spoken + 1]).count("There is a") == 2
    assert len(tokenizer(sentence)["input_ids"]) == len(sentence.split()) == 20
    claims = split_answer(sentence, question=benchmark_iteration.REQUEST)
    assert claims
    assert all(claim.question.endswith("?") for claim in claims)


@pytest.mark.slow
def test_a_whole_iteration_is_timed(tmp_path: Path) -> None:
    sizes = ["--instructions", "5", "--answers", "4", "--new-tokens", "60", "--batch-size", "4"]
    flags = ["--tiny", "--cold", "--folder", str(tmp_path), "--micro-batch-size", "2", *sizes]
    benchmark_iteration.main([*flags, "--out", str(tmp_path / "out.json")])
    told = json.loads((tmp_path / "out.json").read_text())
    stages = {stage["stage"]: stage for stage in told["stages"]}
    assert tuple(stages) == benchmark_iteration.TIMED
    assert stages["sample"]["rows"] == 20
    assert stages["verify"]["rows"] == stages["claim"]["rows"] > 20
    assert stages["reflogp"]["rows"] == stages["pair"]["rows"] > 0
    assert stages["train"]["rows"] == 1
    assert all(0 < each["inside"] < each["seconds"] for each in stages.values())
    assert told["seconds"] == pytest.approx(sum(each["seconds"] for each in stages.values()))
