"""A model behind a server: a real one on 127.0.0.1, that fails when told to."""

import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs._entry import Job
from jobs._groups import ahead
from jobs._models import describe_model
from rlaifv.config import ModelSpec, VerifyConfig
from rlaifv.errors import ArtifactError, ConfigError, TransientError
from rlaifv.models import load_model, load_text_model, load_trainable
from rlaifv.models.base import Branches, Decoding, Generation, ImageQuestions, Prompt
from rlaifv.models.endpoint import EndpointModel
from rlaifv.pipeline import Shard, part_key
from rlaifv.recipes import RECIPES
from rlaifv.records import Claim, PreferencePair, Verdict
from rlaifv.serve import Engine, Handler, Server, completion, parse_question
from tests.jobs_support import ROOT, environment, make_config, make_run, make_source, run_job
from tests.models_kit import IMAGES, QUESTIONS, Plain, make_prompts, spec
from tests.tiny import make_tiny_chat, make_tiny_llava

ROWS = [ImageQuestions(image, QUESTIONS) for image in IMAGES]


class Faulty(Handler):
    """Does what the server's plan says before it behaves."""

    server: "Planned"

    def do_POST(self) -> None:  # noqa: N802
        fault = self.server.next_fault()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.note(parse_question(body).text)
        if fault in ("cut", "slow"):
            self.close_connection = True
            time.sleep(6 * (fault == "slow"))  # longer than the client waits
        elif fault == "no json":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{x}")
        elif fault == "no choices":
            self.respond(200, {"id": "x", "model": "m", "choices": []})
        elif fault == "no logprobs":
            values = completion(self.server.engine, parse_question(body))
            values["choices"][0]["logprobs"] = None
            self.respond(200, values)
        elif fault:
            self.respond(int(fault), {"error": {"message": f"logprobs fault {fault}"}})
        else:
            stream, self.rfile = self.rfile, io.BytesIO(body)
            super().do_POST()
            self.rfile = stream


class Planned(Server):
    """Faults in the order of the requests, then none."""

    faults: list[str]
    holds: Collection[str] = ()
    """Questions that are not answered until another one is asked, or `lets_go` is set."""
    _lock = threading.Lock()

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seen: list[str] = []
        self.lets_go = threading.Event()
        super().__init__(*args, **options)

    def note(self, question: str) -> None:
        self.seen.append(question)
        if question in self.holds:
            assert self.lets_go.wait(20)
        self.lets_go.set()

    def wait_for(self, requests: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.seen) < requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def next_fault(self) -> str:
        with self._lock:
            return self.faults.pop(0) if self.faults else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(spec(folder))


@pytest.fixture
def server(engine: Engine) -> Iterator[Planned]:
    with Planned(engine, host="127.0.0.1", port=0, handler=Faulty) as listening:
        listening.faults = []
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


def _spec(server: Server, **values: Any) -> ModelSpec:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    endpoint = {"url": url, "concurrency": 2, "top_logprobs": 1000, "attempts": 3} | values
    return ModelSpec.model_validate({"path": server.engine.name, "endpoint": endpoint})


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def model(server: Planned, waits: list[float]) -> Iterator[EndpointModel]:
    made = EndpointModel(_spec(server), pause=waits.append)
    yield made
    made.close()


def test_verdicts_are_those_of_the_engine(model: EndpointModel, folder: Path) -> None:
    here, there = load_model(spec(folder)).yes_no(ROWS), model.yes_no(ROWS)
    for row, other in zip(here, there, strict=True):
        for verdict, told in zip(row, other, strict=True):
            assert tuple(told) == pytest.approx(tuple(verdict), abs=1e-5)
            assert (told.p_yes > told.p_no) == (verdict.p_yes > verdict.p_no)


def test_the_next_group_is_asked_before_the_last_answer_about_the_former(
    model: EndpointModel, server: Planned, tmp_path: Path
) -> None:
    groups = [[ImageQuestions(IMAGES[n], QUESTIONS[n : n + 1])] for n in range(2)]
    expected = [model.yes_no(group) for group in groups]
    server.lets_go.clear()
    server.holds = QUESTIONS[:1]  # a question of the second group sets it free
    config = make_config(tmp_path / "source.jsonl", model=tmp_path)
    job = Job(make_run(tmp_path / "run", config), stage="verify", iteration=0, shard=Shard(0, 1))
    assert [said for _, said in ahead(job, groups, model.queue_yes_no)] == expected


def test_what_nobody_waits_for_is_not_asked(model: EndpointModel, server: Planned) -> None:
    server.holds = QUESTIONS
    waiting = model.queue_yes_no([ImageQuestions(image, QUESTIONS[:1]) for image in IMAGES])
    server.wait_for(requests=2)
    del waiting
    server.lets_go.set()
    model.yes_no([ImageQuestions(IMAGES[0], ("Anything else?",))])
    assert server.seen[2:] == ["Anything else?"]


@pytest.mark.slow
def test_sigterm_ends_a_stage_that_has_groups_queued(
    folder: Path, server: Planned, tmp_path: Path
) -> None:
    config = make_config(make_source(tmp_path / "source", num_rows=8), model=folder)
    config = config.model_copy(update={"verify": VerifyConfig(labeller=_spec(server))})
    run = make_run(tmp_path / "run", config)
    for stage in ("prepare", "sample", "claim"):
        assert run_job(run, stage) == 0
    claims = list(run.read_part(part_key(0, "claims", Shard(0, 1)), Claim))
    assert len(claims) > 10
    server.holds = [f"{row.question}{config.verify.suffix}" for row in claims]
    argv = ["--run", str(run), "--iteration", "0", "--shard", "0/1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.verify", *argv], env=environment(), cwd=ROOT
    )
    server.wait_for(requests=2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # it waits for what is being answered
    server.lets_go.set()
    assert process.wait(timeout=10) == 143
    assert len(server.seen) == 2
    assert not run.exists(part_key(0, "verdicts", Shard(0, 1)))


@pytest.mark.parametrize("decoding", [Decoding(5), Decoding(5, temperature=0.7, top_k=20)])
def test_answers_are_those_of_the_engine(
    model: EndpointModel, folder: Path, decoding: Decoding
) -> None:
    prompts = make_prompts((1, 2))[:3]
    here = load_model(spec(folder)).answer(prompts, decoding=decoding)
    assert model.answer(prompts, decoding=decoding) == here
    assert model.counts["output_tokens"] == sum(a.num_tokens for row in here for a in row)
    assert model.counts[f"served_by/{folder}"] == 6


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "no json", "no choices"])
def test_a_failing_request_is_repeated(
    model: EndpointModel, server: Planned, waits: list[float], fault: str
) -> None:
    expected = model.yes_no(ROWS[:1])
    server.faults = [fault, fault]
    assert model.yes_no(ROWS[:1]) == expected
    assert model.counts["failures"] == 2
    assert len(waits) == 2
    assert all(0 < wait <= 2 for wait in waits)


def test_a_server_that_keeps_failing_ends_the_attempts(
    model: EndpointModel, server: Planned
) -> None:
    server.faults = ["500"] * 20
    with pytest.raises(TransientError, match="no answer in 3 requests, the last: status 500"):
        model.yes_no(ROWS[:1])


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("401", ConfigError, "OPENAI_API_KEY"),
        ("404", ConfigError, "check url, model"),
        ("400", ConfigError, "cannot return probabilities"),
        ("no logprobs", ConfigError, "returned no top_logprobs"),
    ],
)
def test_a_server_that_cannot_label_is_refused(
    model: EndpointModel, server: Planned, fault: str, kind: type[Exception], message: str
) -> None:
    server.faults = [fault] * 20
    with pytest.raises(kind, match=message):
        model.yes_no(ROWS[:1])


def test_a_row_that_the_server_refuses_is_named(model: EndpointModel) -> None:
    prompts = [Prompt(IMAGES[0], "What?"), Prompt(IMAGES[0], "dog " * 3000)]
    with pytest.raises(ArtifactError, match="row 1: status 400"):
        model.answer(prompts, decoding=Decoding(2))
    with pytest.raises(ArtifactError, match="row 0: image"):
        model.answer([Prompt(b"x", "What?")], decoding=Decoding(2))


def test_what_an_endpoint_cannot_do_is_said(model: EndpointModel, server: Planned) -> None:
    with pytest.raises(ConfigError, match="no beam search"):
        model.answer(make_prompts()[:1], decoding=Decoding(2, num_beams=3))
    with pytest.raises(ConfigError, match="cannot score"):
        model.sequence_logps([Branches(IMAGES[0], "What?", ("a",))])
    with pytest.raises(ConfigError, match="cannot be trained"):
        load_trainable(_spec(server))


def test_words_beyond_the_likeliest_tokens_are_told(
    server: Planned, caplog: pytest.LogCaptureFixture
) -> None:
    model = EndpointModel(_spec(server, top_logprobs=1))
    verdicts = model.yes_no(ROWS)
    model.close()
    missing = sum(verdict == (0, 0) for row in verdicts for verdict in row)
    assert missing > 0
    assert f"{missing} of 9 questions have neither yes nor no among 1 tokens" in caplog.text


def test_label_tokens_are_exact_however_unlikely(server: Planned, folder: Path) -> None:
    tokenizer = Plain(folder).processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(["yes", "Yes", "no", "No"])
    model = EndpointModel(_spec(server, top_logprobs=1, label_token_ids=ids))
    there, here = model.yes_no(ROWS), load_model(spec(folder)).yes_no(ROWS)
    model.close()
    for row, other in zip(here, there, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(other), atol=1e-6, rtol=0)


def test_replies_of_a_chat_model_are_those_of_the_engine(tmp_path: Path) -> None:
    chat = ModelSpec(path=str(make_tiny_chat(tmp_path)), family="text", dtype="float32")
    prompts, decoding = ["What is it?", "And?"], Decoding(6, temperature=0.2, top_p=0.9)
    expected = load_text_model(chat).reply(prompts, seeds=[3, 4], decoding=decoding)
    with Server(Engine(chat), host="127.0.0.1", port=0) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        model = load_text_model(_spec(listening))
        replies: list[Generation] = model.reply(prompts, seeds=[3, 4], decoding=decoding)
        assert isinstance(model, EndpointModel)
        model.close()
        listening.shutdown()
        thread.join()
    assert replies == expected


def test_the_identity_has_no_credentials(server: Planned) -> None:
    endpoint = {"url": "https://user:secret@host:1/v1"}
    told = ModelSpec.model_validate({"path": "some/model", "endpoint": endpoint})
    assert describe_model(told) == "some/model at https://host:1/v1 top 20"


@pytest.mark.slow
def test_an_iteration_of_the_demo_over_http_has_the_engines_decisions(tmp_path: Path) -> None:
    demo = RECIPES["demo"]()
    prepare = demo.prepare.model_copy(update={"instructions_per_iteration": 6})
    shards = demo.shards.model_copy(update={"instructions": 1})
    demo = demo.model_copy(update={"prepare": prepare, "shards": shards})
    labeller = demo.verify.labeller
    faults = ["429", "500", "", "slow", "cut", "no json", "", "no choices", "503"]
    with Planned(Engine(labeller), host="127.0.0.1", port=0, handler=Faulty) as listening:
        listening.faults = list(faults)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        there = _spec(listening, timeout_seconds=5.0, backoff_seconds=0.01, top_logprobs=20)
        over_http = demo.model_copy(update={"verify": VerifyConfig(labeller=there)})
        runs = []
        for name, config in (("here", demo), ("there", over_http)):
            run = make_run(tmp_path / name, config)
            for stage in ("prepare", "sample", "claim", "verify", "pair"):
                assert run_job(run, stage) == 0, (name, stage)
            runs.append(run)
        listening.shutdown()
        thread.join()
    verdicts, pairs = (
        [list(run.read_part(part_key(0, artifact, Shard(0, 1)), record)) for run in runs]
        for artifact, record in (("verdicts", Verdict), ("pairs", PreferencePair))
    )
    assert len(verdicts[0]) > 20
    decisions = [[(row.claim_id, row.p_yes > row.p_no) for row in rows] for rows in verdicts]  # type: ignore[attr-defined]
    assert decisions[0] == decisions[1]
    assert {says for _, says in decisions[0]} == {True, False}
    assert pairs[0] == pairs[1] != []
    notes = runs[1].provenance(part_key(0, "verdicts", Shard(0, 1))).notes
    assert int(notes["failures"]) == sum(map(bool, faults))
    assert notes["served by"] == labeller.path
    assert int(notes["output tokens"]) == int(notes["requests"]) - len(faults) + faults.count("")


def test_scores_of_two_models_are_never_in_one_comparison(
    model: EndpointModel, server: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.yes_no(ROWS[:1])
    monkeypatch.setattr(server.engine, "name", "another")
    with pytest.raises(ConfigError, match="several models answered"):
        model.yes_no(ROWS[:1])


def test_shards_labelled_by_different_models_do_not_make_pairs(
    folder: Path, server: Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "source", num_rows=8)
    config = make_config(source, model=folder, num_shards=2)
    run = make_run(tmp_path / "run", config)
    for stage in ("prepare", "sample", "claim", "verify"):
        for shard in ("0/2", "1/2"):
            assert run_job(run, stage, shard=shard) == 0
    assert run_job(run, "pair") == 0
    (tmp_path / "run" / part_key(0, "pairs", Shard(0, 1))).unlink()
    (tmp_path / "run" / part_key(0, "verdicts", Shard(1, 2))).unlink()
    make_tiny_llava(folder, seed=7)
    try:
        assert run_job(run, "verify", shard="1/2") == 0
        assert run_job(run, "pair") == 65
    finally:
        make_tiny_llava(folder)
    assert "scores of different models are not compared" in capsys.readouterr().err


def test_tokens_and_cost_are_counted(server: Planned, folder: Path) -> None:
    priced = EndpointModel(_spec(server, input_price=1.0, output_price=2e6))
    priced.answer(make_prompts()[:1], decoding=Decoding(3))
    assert priced.usage["requests"] == "1"
    first = make_prompts()[0]
    tokens = Plain(folder).inputs(first.image, first.question)["input_ids"].shape[1]
    assert priced.usage["input tokens"] == str(tokens)
    cost = 2 * int(priced.usage["output tokens"]) + 1e-6 * tokens
    assert float(priced.usage["cost"]) == pytest.approx(cost, abs=1e-6)
    priced.close()
