"""Code that comes with weights is run on purpose, as its public interface has it, or not at all."""

import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models import load_local, load_model, load_trainable
from rlaifv.models.base import Decoding, ImageQuestions, Prompt
from rlaifv.models.check import CHECKS, main
from rlaifv.models.remote import RemoteModel
from rlaifv.serve import Engine, Server
from tests.tiny import make_tiny_llava, random_image
from tests.tiny_remote import make_tiny_remote

IMAGES = (random_image(0), random_image(1, size=(30, 40)))  # two slices, one slice
QUESTIONS = ("Is there a dog ?", "Is it red ?", "Is there a dog in the image ?")
ROWS = [ImageQuestions(image, QUESTIONS) for image in IMAGES]
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_remote(tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module", autouse=True)
def _code_is_copied_into_a_folder_of_these_tests(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    cache = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
            patch.setattr(f"{module}.HF_MODULES_CACHE", str(cache))
        yield


def _spec(path: Path, **values: Any) -> ModelSpec:
    trusted = {"family": "minicpmv", "trust_remote_code": True, "dtype": "float32"}
    return ModelSpec.model_validate({"path": str(path), **trusted, **values})


@pytest.fixture
def model(folder: Path) -> RemoteModel:
    loaded = load_local(_spec(folder))
    assert isinstance(loaded, RemoteModel)
    return loaded


def test_it_conforms(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--family", "minicpmv", "--trust-remote-code"]) == 0
    assert capsys.readouterr().out.count("holds") == len(CHECKS)


def test_verdicts_are_those_of_its_own_forward_and_an_image_is_seen_once(
    model: RemoteModel,
) -> None:
    verdicts = model.yes_no(ROWS)
    assert model.module.calls == len(IMAGES)
    tokenizer = model._processor.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes", "no", "No")]
    for row, found in zip(ROWS, verdicts, strict=True):
        for question, verdict in zip(row.questions, found, strict=True):
            inputs = model._inputs(row.image, question, 0)
            with torch.inference_mode():
                data = model._data(inputs, 0)
                p_V = model.module(data).logits[0, -1].softmax(-1)
            assert verdict.p_yes == pytest.approx(float(p_V[ids[:2]].sum()), abs=1e-6)
            assert verdict.p_no == pytest.approx(float(p_V[ids[2:]].sum()), abs=1e-6)


def test_greedy_answers_and_beams_are_those_of_generate(model: RemoteModel) -> None:
    for decoding in (Decoding(5), Decoding(5, num_beams=3)):
        ((answer,),) = model.answer([Prompt(IMAGES[0], "What is it ?")], decoding=decoding)
        expected = model._beams(model._inputs(IMAGES[0], "What is it ?", 0), decoding)
        assert answer == model._words.generation(expected, model._eos_ids)
    seeds = Prompt(IMAGES[0], "What is it ?", (1, 2))
    once, again = (model.answer([seeds], decoding=Decoding(5, 1.0)) for _ in range(2))
    assert once == again
    assert once[0][0] != once[0][1]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"family": "minicpmv"}, "endpoint: False, None"),
        ({"family": "minicpmv", "trust_remote_code": True}, "endpoint: True, None"),
        (
            {"family": "minicpmv", "trust_remote_code": True, "revision": "main"},
            "endpoint: True, main",
        ),
        ({"trust_remote_code": True, "revision": COMMIT}, "endpoint: True, 0123"),
    ],
)
def test_the_configuration_asks_for_trust_and_a_commit(values: dict[str, Any], got: str) -> None:
    message = f"a/b: code beside weights needs family minicpmv, trust.*{got}"
    with pytest.raises(ValidationError, match=message):
        ModelSpec.model_validate({"path": "a/b", **values})


def test_a_commit_or_an_endpoint_is_enough() -> None:
    assert _spec(Path("a/b"), revision=COMMIT).revision == COMMIT
    served = {"path": "a/b", "family": "minicpmv", "endpoint": {"url": "http://x/v1"}}
    assert ModelSpec.model_validate(served).endpoint


def test_code_is_not_run_unasked(folder: Path, tmp_path: Path) -> None:
    copy = copytree(folder, tmp_path / "watched")
    canary = tmp_path / "ran"
    code = copy / "configuration_tiny.py"
    code.write_text(f"open({str(canary)!r}, 'w').close()\n{code.read_text()}")
    for load in (load_local, load_trainable):
        with pytest.raises(ConfigError, match="say family minicpmv, trust_remote_code"):
            load(ModelSpec(path=str(copy)))
    assert not canary.exists()
    load_local(_spec(copy))
    assert canary.exists()


def test_a_folder_does_not_pass_for_a_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(folder, tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"says nothing about its code; write \./a/b"):
        load_local(_spec(Path("a/b"), revision=COMMIT))


def test_what_is_broken_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="json says model_type 'llava'"):
        load_local(_spec(make_tiny_llava(tmp_path / "llava")))
    copy = copytree(folder, tmp_path / "broken")
    code = copy / "modeling_tiny.py"
    code.write_text("from transformers import NoSuchThing\n" + code.read_text())
    with pytest.raises(ConfigError, match=r"does not run with transformers .*labeller\.Dockerfile"):
        load_local(_spec(copy))
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated or corrupt"):
        load_local(_spec(copy))


def test_a_question_that_cannot_be_put_is_refused_with_its_row(model: RemoteModel) -> None:
    long = ImageQuestions(IMAGES[0], (QUESTIONS[0], "dog " * 300))
    with pytest.raises(ArtifactError, match=r"row 1: prompt, image and answer take \d+ tokens"):
        model.yes_no([ROWS[0], long])
    with pytest.raises(ArtifactError, match=r"row 0: the question contains '\(<image>"):
        model.yes_no([ImageQuestions(IMAGES[0], ("(<image>./</image>)",))])


def test_behind_a_server_its_verdicts_are_the_same(folder: Path) -> None:
    with Server(Engine(_spec(folder)), host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        endpoint = {"url": url, "top_logprobs": 100, "concurrency": 2}
        spec = {"path": str(folder), "family": "minicpmv", "endpoint": endpoint}
        client: Any = load_model(ModelSpec.model_validate(spec))
        try:
            there = client.yes_no(ROWS)
        finally:
            client.close()
            server.shutdown()
            thread.join()
    model = load_local(_spec(folder))
    assert isinstance(model, RemoteModel)
    here = model.yes_no(ROWS)
    for row, other in zip(here, there, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(other), atol=1e-6, rtol=0)
    prompt = len(model._inputs(IMAGES[0], QUESTIONS[0], 0)["input_ids"][0])
    assert int(client.usage["input tokens"]) > 6 * prompt - 20
