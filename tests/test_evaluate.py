"""`python -m controller evaluate`: what its names mean, and whole evaluations of tiny models."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.__main__ import main
from controller.evaluate import (
    EVALUATION,
    Evaluation,
    Wanted,
    benchmark_spec,
    benchmark_specs,
    default_name,
    evaluation_table,
    read_evaluation,
    read_flags,
)
from controller.flags import parser
from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.estimate import estimate
from rlaifv.benchmarks.held_out import held_out_questions, read_excluded
from rlaifv.benchmarks.held_out import main as held_out
from rlaifv.benchmarks.mmhal import TYPES
from rlaifv.config import BenchmarkSpec, JudgeConfig, RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import num_shards
from rlaifv.recipes import Wishes, change_config, evaluation
from tests.jobs_support import DATA, make_benchmark, make_run, random_image, run_job
from tests.test_benchmarks_judge import Answer, Stub, good, misbehave
from tests.tiny import make_tiny_llava

NUM_QUESTIONS = 16


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("RLAIFV_CACHE", str(tmp_path / "cache"))
    made = Stub(good)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("models") / "Tiny_LLaVA-v1.5")


def mmhal_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question_type": TYPES[n % len(TYPES)],
            "image_content": ["dog"],
            "question": f"Q{n}?",
            "gt_answer": "A dog.",
            "image": base64.b64encode(random_image(n)).decode(),
        }
        for n in range(NUM_QUESTIONS)
    ]
    path = folder / "mmhal.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def make_evaluation(model: Path, *benchmarks: BenchmarkSpec) -> RunConfig:
    sets = ("respond.max_new_tokens=6", "respond.num_beams=1", "policy.dtype=float32")
    return change_config(evaluation(str(model), benchmarks), Wishes(sets=sets, name="eval"))


def failing(number: int) -> Answer:
    def answer(request: dict[str, object], before: int) -> tuple[int, str, dict[str, str]]:
        down = f"Q{number}?" in json.dumps(request["messages"])
        return (503, "{}", {}) if down else good(request, before)

    return answer


@pytest.mark.slow
def test_an_evaluation_goes_on_with_what_the_judge_left_unanswered(
    stub: Stub, model: Path, tmp_path: Path
) -> None:
    judge = JudgeConfig(
        url=stub.url, attempts=2, backoff_seconds=0.001, input_price=1, output_price=2
    )
    path = str(mmhal_file(tmp_path))
    spec = BenchmarkSpec(name="mmhal", kind="mmhal", path=path, judge=judge)
    config = make_evaluation(model, spec)
    assert (num_shards(config, "respond"), num_shards(config, "grade")) == (1, 1)
    run = make_run(tmp_path / "run", config)
    assert run_job(run, "respond") == 0  # no pairs, no checkpoints
    stub.answer = failing(3)
    assert run_job(run, "grade") == 75
    before = len(stub.requests)
    assert before == NUM_QUESTIONS + 1
    stub.answer = good
    assert run_job(run, "grade") == 0
    assert len(stub.requests) == before + 1
    (result,) = read_evaluation(run).results
    assert (result.questions, result.repeats) == (NUM_QUESTIONS, 1)
    assert result.metrics["score"] == 4
    assert result.judge_models == ["judge-1"]
    assert (result.input_tokens, result.output_tokens) == (10 * NUM_QUESTIONS, 2 * NUM_QUESTIONS)
    assert result.cost == pytest.approx(14 * NUM_QUESTIONS / 1e6)


@pytest.mark.slow
def test_the_command_evaluates_a_model_and_asks_nothing_twice(
    stub: Stub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answer = misbehave(stub)
    root = tmp_path / "runs"
    mmhal_file(root / "benchmarks")
    scenes = make_benchmark(tmp_path / "scenes")
    argv = ["evaluate", "--model", str(model), "--root", str(root), "--workers", "1"]
    argv += ["--benchmarks", f"mmhal,scenes={scenes.path}", "--synonyms", str(scenes.vocabulary)]
    argv += ["--judge", stub.url, "--judge-model", "judge-1", "--repeats", "2"]
    argv += ["--set", "respond.max_new_tokens=6", "--set", "policy.dtype=float32"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert f"mmhal: the judge is asked at most {2 * NUM_QUESTIONS} times" in table
    assert "mmhal      score" in table
    assert "not measured" in table  # the stub ignores its seed
    file = root / "eval-tiny-llava-v1-5" / EVALUATION
    found = Evaluation.model_validate_json(file.read_text())
    assert [result.benchmark for result in found.results] == ["mmhal", "scenes"]
    assert found.results[0].metrics["score_spread"] is None
    assert found.results[1].metrics["recall"] is not None
    assert {*found.results[0].judge_models} <= {"judge-1", "another-model"}
    before, content = len(stub.requests), file.read_bytes()
    assert before > 2 * NUM_QUESTIONS
    assert main(argv) == 0
    assert len(stub.requests) == before
    assert file.read_bytes() == content
    assert evaluation_table(found) in capsys.readouterr().out


def test_a_bare_name_is_looked_for_in_the_data_folder(tmp_path: Path) -> None:
    wanted = Wanted("m", (), str(tmp_path))
    (tmp_path / "object_halbench").mkdir()
    (tmp_path / "object_halbench" / "questions_300.jsonl").write_text("")
    (tmp_path / "synonyms.txt").write_text("")
    (tmp_path / "coco").mkdir()
    spec = benchmark_spec("object_halbench", wanted)
    assert spec.path == str(tmp_path / "object_halbench" / "questions_300.jsonl")
    assert spec.vocabulary == str(tmp_path / "synonyms.txt")
    assert (spec.coco, spec.nltk_data) == (str(tmp_path / "coco"), None)
    (tmp_path / "amber").mkdir()
    assert benchmark_spec("amber", wanted).path == str(tmp_path / "amber")
    named = benchmark_spec(f"mine={tmp_path / 'synonyms.txt'}", wanted)
    assert (named.name, named.kind) == ("mine", "objects")
    assert benchmark_spec("mmhal=s3://bucket/mmhal.jsonl", wanted).path.startswith("s3://")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mmhall", "did you mean 'mmhal'"),
        ("mmhal", "neither a folder nor a file mmhal"),
        ("mine=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("=x", "expected NAME or NAME=PATH"),
        ("", "expected NAME or NAME=PATH"),
    ],
)
def test_a_benchmark_that_is_not_there_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_spec(text, Wanted("m", (), str(tmp_path)))


def test_what_needs_a_judge_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", "--model", str(tmp_path), "--root", str(tmp_path), "--name", "e"]
    argv += ["--benchmarks", f"mmhal={mmhal_file(tmp_path)}"]
    assert main(argv) == 78
    assert "benchmark mmhal: a judge is needed: --judge URL" in capsys.readouterr().err
    for flags in (["--repeats", "2"], ["--swap"], ["--judge-temperature", "1"]):
        assert main([*argv, *flags]) == 78
        assert "there is no --judge URL" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_everything_that_is_missing_is_said_at_once_and_the_model_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", "--root", str(tmp_path), "--benchmarks"]
    argv += ["object_halbench,mmhal,refomb,amber", "--model"]
    assert main([*argv, str(tmp_path / "nowhere")]) == 78
    said = capsys.readouterr().err
    assert "nowhere: no such folder" in said
    assert "benchmarks" not in said
    assert main([*argv, "owner/name"]) == 78
    said = capsys.readouterr().err
    for name in ("object_halbench", "mmhal", "refomb", "amber"):
        assert f"--benchmarks {name}: neither a folder nor a file {name}" in said
    for source in ("CC BY-NC 4.0", "junyangwang0410/AMBER", "Apache-2.0", "cocodataset.org"):
        assert source in said


def test_a_mode_is_named_by_benchmark(tmp_path: Path) -> None:
    for name in ("object_halbench.jsonl", "synonyms.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "coco").mkdir()
    argv = ["evaluate", "--model", "owner/name", "--benchmarks", "object_halbench"]
    argv += ["--data", str(tmp_path), "--mode"]
    _, wanted = read_flags(parser().parse_args([*argv, "object_halbench=chair"]), ())
    (spec,) = benchmark_specs(wanted)
    assert spec.mode == "chair"
    for wrong in ("object_halbench=exact", "mmhal=judge", "chair"):
        with pytest.raises(ConfigError, match="object_halbench: judge, rules, chair; amber"):
            read_flags(parser().parse_args([*argv, wrong]), ())


@pytest.mark.parametrize(
    ("kind", "changes", "requests", "tokens"),
    [
        ("mmhal", {}, 2, 2 * 512),
        ("mmhal", {"repeats": 3, "max_tokens": 100}, 6, 600),
        ("refomb", {}, 2 * 2 * 3, 12 * 2048),
        ("refomb", {"swap": True, "repeats": 1}, 2 * 3, 6 * 2048),
        ("object_halbench", {}, 2, 2 * 512),
    ],
)
def test_what_a_judge_is_asked_at_most_is_said_before(
    kind: str, changes: dict[str, object], requests: int, tokens: int, tmp_path: Path
) -> None:
    row = {
        "question": "Q?" * 50,
        "image_content": ["dog"],
        "gt_answer": "A",
        "image_url": "u",
        "description": "d" * 400,
        "answer": "a",
        "type": "OCR",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2)
    given = {"url": "http://x", "input_price": 1, "output_price": 10, **changes}
    judge = JudgeConfig.model_validate(given)
    spec = BenchmarkSpec.model_validate(
        {"name": "b", "kind": kind, "path": str(path), "judge": judge}
    )
    low, high = (estimate(spec, answer_tokens=answer) for answer in (100, 200))
    assert low is not None
    assert high is not None
    assert (low.requests, low.max_output_tokens) == (requests, tokens)
    answers = requests - (2 * (judge.repeats or 3) if kind == "refomb" else 0)
    assert high.input_tokens - low.input_tokens == 100 * answers  # the second step reads reviews
    assert low.max_cost == pytest.approx((low.input_tokens + 10 * tokens) / 1e6)
    assert estimate(spec.model_copy(update={"judge": None}), answer_tokens=1) is None


def test_object_halbench_without_its_tables_names_them_with_their_source(tmp_path: Path) -> None:
    (tmp_path / "object_halbench.jsonl").write_text("")
    with pytest.raises(ConfigError) as caught:
        benchmark_specs(Wanted("m", ("object_halbench",), str(tmp_path)))
    said = str(caught.value)
    assert "no --coco: {instances,captions}_{train,val}2014.json: https://cocodataset.org" in said
    assert "no --synonyms: synonym table of 80 classes: data/synonyms.txt of LisaAnne" in said


def test_judge_flags_reach_every_judged_benchmark(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{} {} {} {}")
    path = mmhal_file(tmp_path)
    argv = ["evaluate", "--model", "owner/name", "--benchmarks", f"mmhal={path},refomb={path}"]
    argv += ["--judge", "http://localhost:1/v1", "--swap", "--judge-temperature", "0.3"]
    argv += ["--judge-prompt", f"mmhal={prompt}", "--repeats", "2"]
    _, wanted = read_flags(parser().parse_args(argv), ())
    mmhal, refomb = (spec.judge for spec in benchmark_specs(wanted))
    assert mmhal is not None
    assert refomb is not None
    assert (mmhal.prompt, refomb.prompt) == (str(prompt), None)
    assert (refomb.swap, refomb.temperature, refomb.repeats) == (True, 0.3, 2)
    argv[argv.index(f"mmhal={prompt}")] = str(prompt)
    with pytest.raises(ConfigError, match="expected NAME=FILE with one of object_halbench"):
        read_flags(parser().parse_args(argv), ())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("llava-hf/llava-1.5-7b-hf", "eval-llava-1-5-7b-hf"),
        ("/models/My_Model/", "eval-my-model"),
        ("s3://b/" + "x" * 90, "eval-" + "x" * 35),
        ("...", "eval"),
    ],
)
def test_a_run_is_named_after_its_model(path: str, name: str) -> None:
    assert default_name(path) == name
    change_config(evaluation(path, ()), Wishes(name=name))


COCO = DATA / "coco_mini" / "ccby_29"


@pytest.mark.skipif(not COCO.exists(), reason="no COCO samples here")
def test_held_out_questions_are_seeded_exclude_and_are_a_benchmark(tmp_path: Path) -> None:
    images = COCO / "images"
    first = held_out_questions(COCO, images, excluded=(), count=10)
    assert first == held_out_questions(COCO, images, excluded=(), count=10)
    assert first != held_out_questions(COCO, images, excluded=(), count=10, seed=1)
    gone = first[4].image_id
    without = held_out_questions(COCO, images, excluded={gone}, count=10)
    assert len({*without} - {*first}) == 1
    assert {*first} - {*without} == {first[4]}
    (tmp_path / "used.txt").write_text(f"COCO_val2014_{gone:012d}.jpg\n{first[0].image_id}\n")
    assert read_excluded(tmp_path / "used.txt") == {gone, first[0].image_id}
    with pytest.raises(ArtifactError, match="expected at least 500 images"):
        held_out_questions(COCO, images, excluded=())
    out = tmp_path / "chair.jsonl"
    argv = ["--coco", str(COCO), "--images", str(images), "--out", str(out), "--count", "20"]
    assert held_out([*argv, "--exclude", str(tmp_path / "used.txt")]) == 0
    spec = BenchmarkSpec(
        name="chair", kind="object_halbench", mode="chair", path=str(out), images=str(images)
    )
    questions = list(load_benchmark(spec).questions())
    assert len(questions) == 20
    assert all(question.image.startswith(b"\xff\xd8") for question in questions)
    assert not {str(gone), str(first[0].image_id)} & {one.question_id for one in questions}
