"""Two models, two judged benchmarks, and a judge over HTTP that misbehaves: nothing is lost."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.evaluate import BenchmarkResult, read_evaluation
from rlaifv.benchmarks.mmhal import TYPES
from rlaifv.config import BenchmarkSpec, JudgeConfig, RunConfig
from rlaifv.pipeline import Shard, part_key
from rlaifv.recipes import Wishes, change_config, evaluation
from rlaifv.records import Grade, Response
from rlaifv.store import Store
from tests.jobs_support import make_run, random_image, run_job
from tests.test_benchmarks_judge import Answer, Stub, completion, misbehave
from tests.tiny import make_tiny_llava

RATED, COMPARED, REPEATS = 8, 4, 2
ONE = Shard(0, 1)
Reply = tuple[int, str, dict[str, str]]


def thoughtful(request: dict[str, object], before: int) -> Reply:
    """A rating and a verdict; the words depend on the question and on the seed."""
    asked = json.dumps([request["messages"], request["seed"]])
    mark = hashlib.sha256(asked.encode()).hexdigest()[:12]
    return 200, completion(f"{mark} Rating: 4 [[B]]"), {}


def troubled(stub: Stub) -> Answer:
    """429, 500, garbage, too slow or another model's name the first time; then an answer."""
    trouble = misbehave(stub)

    def answer(request: dict[str, object], before: int) -> Reply:
        return trouble(request, 0) if before == 0 else thoughtful(request, before)

    return answer


def down_for(answer: Answer, question: str) -> Answer:
    def failing(request: dict[str, object], before: int) -> Reply:
        down = question in json.dumps(request["messages"])
        return (503, "{}", {}) if down else answer(request, before)

    return failing


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("RLAIFV_CACHE", str(tmp_path / "cache"))
    made = Stub(thoughtful)
    yield made
    made.close()


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def benchmarks(folder: Path, stub: Stub) -> tuple[BenchmarkSpec, ...]:
    pictures = [base64.b64encode(random_image(n)).decode() for n in range(RATED)]
    rated: list[dict[str, object]] = [
        {
            "question_type": TYPES[n],
            "image_content": ["dog"],
            "question": f"Rated {n}?",
            "gt_answer": "A dog.",
            "image": pictures[n],
        }
        for n in range(RATED)
    ]
    compared: list[dict[str, object]] = [
        {
            "image_url": f"{n}.png",
            "question": f"Compared {n}?",
            "description": "A dog.",
            "type": "OCR",
            "answer": "It is a dog.",
            "image": pictures[n],
        }
        for n in range(COMPARED)
    ]
    judge = JudgeConfig(
        url=stub.url,
        model="judge-1",
        repeats=REPEATS,
        attempts=4,
        timeout_seconds=0.5,
        backoff_seconds=0.001,
    )
    return (
        BenchmarkSpec(
            name="mmhal", kind="mmhal", path=write_rows(folder / "m.jsonl", rated), judge=judge
        ),
        BenchmarkSpec(
            name="refomb", kind="refomb", path=write_rows(folder / "r.jsonl", compared), judge=judge
        ),
    )


def answered(folder: Path, config: RunConfig) -> Store:
    run = make_run(folder, config)
    assert run_job(run, "respond") == 0
    assert len(list(run.read_part(part_key(0, "responses", ONE), Response))) == RATED + COMPARED
    return run


def grades(run: Store) -> list[Grade]:
    return list(run.read_part(part_key(0, "grades", ONE), Grade))


def by_benchmark(run: Store) -> dict[str, BenchmarkResult]:
    return {result.benchmark: result for result in read_evaluation(run).results}


@pytest.mark.slow
def test_two_models_are_evaluated_whatever_the_judge_does(stub: Stub, tmp_path: Path) -> None:
    specs = benchmarks(tmp_path, stub)
    sets = ("respond.max_new_tokens=6", "respond.num_beams=1", "policy.dtype=float32")
    finished: list[tuple[RunConfig, Store]] = []
    for seed in range(2):
        model = make_tiny_llava(tmp_path / f"model-{seed}", seed=seed)
        config = change_config(evaluation(str(model), specs), Wishes(sets=sets, name="eval"))
        run = answered(tmp_path / f"run-{seed}", config)
        # One item gets no answer at all: an error, and everything else is kept.
        stub.answer = down_for(troubled(stub), "Compared 1?")
        assert run_job(run, "grade") == 75
        assert not run.exists(part_key(0, "grades", ONE))
        # Only what is missing: its verdicts, and the second step, which needs all reviews.
        stub.answer, before = thoughtful, len(stub.requests)
        assert run_job(run, "grade") == 0
        missing = REPEATS + COMPARED * REPEATS
        assert len(stub.requests) == before + missing
        finished.append((config, run))
    rows = [grades(run) for _, run in finished]
    for mine in rows:
        keys = [(row.benchmark, row.question_id, row.repeat) for row in mine]
        assert sorted(keys) == sorted(
            [("mmhal", str(n), r) for n in range(RATED) for r in range(REPEATS)]
            + [("refomb", str(n), r) for n in range(COMPARED) for r in range(REPEATS)]
        )
        assert all("[[B]]" in row.judge_reply for row in mine if row.benchmark == "refomb")
        assert all(
            "temperature=0 top_p=1 seed=0 max_tokens=" in row.judge and " attempts=4" in row.judge
            for row in mine
        )
    for _, run in finished:
        found = by_benchmark(run)
        assert (found["mmhal"].questions, found["refomb"].questions) == (RATED, COMPARED)
        assert found["mmhal"].metrics["score"] == 4
        assert found["mmhal"].metrics["score_spread"] == 0  # measured: the replies differ
        assert found["refomb"].metrics["score"] == found["refomb"].metrics["win"] == 1
        assert {*found["mmhal"].judge_models} <= {"judge-1", "another-model"}
    # The same again, from the cache; another setting is another request.
    before = len(stub.requests)
    for number, (config, run) in enumerate(finished):
        again = answered(tmp_path / f"again-{number}", config)
        assert run_job(again, "grade") == 0
        assert grades(again) == rows[number]
        assert read_evaluation(again).results == read_evaluation(run).results
    assert len(stub.requests) == before
    assert stub.keys == {"Bearer none"}
