"""A model behind a server: a real one on 127.0.0.1, that fails when told to."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs._models import describe_model
from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError, TransientError
from rlaifv.models import load_model, load_text_model, load_trainable
from rlaifv.models.base import Branches, Decoding, Generation, ImageQuestions, Prompt
from rlaifv.models.endpoint import EndpointModel
from rlaifv.serve import Engine, Handler, Server, completion, parse_question
from tests.models_kit import IMAGES, QUESTIONS, make_prompts, spec
from tests.tiny import make_tiny_chat, make_tiny_llava

ROWS = [ImageQuestions(image, QUESTIONS) for image in IMAGES]


class Faulty(Handler):
    """Does what the server's plan says before it behaves."""

    server: "Planned"

    def do_POST(self) -> None:  # noqa: N802
        fault = self.server.next_fault()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if fault == "cut":
            self.close_connection = True
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
    _lock = threading.Lock()

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
