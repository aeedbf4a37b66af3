"""One question about one image, as the release's README asks it."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from rlaifv.chat import ChatInput, RLAIFVChat, img2base64, main
from rlaifv.config import LoraConfig
from rlaifv.errors import ArtifactError
from rlaifv.training import adapters
from tests.models_kit import Plain
from tests.tiny import make_original_llava, make_tiny_llava, random_image

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> RLAIFVChat:
    return RLAIFVChat(str(folder), max_new_tokens=8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(random_image(3))
    return path


def test_every_form_of_an_image_gets_the_same_answer(chat: RLAIFVChat, picture: Path) -> None:
    data = picture.read_bytes()
    opened = Image.open(io.BytesIO(data))
    encoded = img2base64(picture)
    forms = (str(picture), picture, data, encoded, f"data:image/png;base64,{encoded}", opened)
    inputs: list[ChatInput] = [{"image": form, "question": QUESTION} for form in forms]
    answers = [chat.chat(each) for each in inputs]
    assert answers[0]
    assert len(set(answers)) == 1


def test_the_answer_is_that_of_three_beams(chat: RLAIFVChat, folder: Path) -> None:
    plain, images = Plain(folder), [random_image(seed) for seed in range(6)]

    def expected(beams: int) -> list[str]:
        texts = []
        for image in images:
            inputs = plain.inputs(image, QUESTION)
            ids = plain.module.generate(
                **inputs, max_new_tokens=8, num_beams=beams, do_sample=False
            )
            new = ids[0, inputs["input_ids"].shape[1] :]
            texts.append(plain.processor.tokenizer.decode(new, skip_special_tokens=True).strip())
        return texts

    answers = [chat.chat({"image": image, "question": QUESTION}) for image in images]
    assert answers == expected(3)
    assert answers != expected(1)


def test_what_is_no_image_is_refused(chat: RLAIFVChat, picture: Path) -> None:
    for image in ("nowhere.png", "x" * 5000 + "!"):
        with pytest.raises(ArtifactError, match="neither a file"):
            chat.chat({"image": image, "question": QUESTION})
    with pytest.raises(ArtifactError, match="row 0: image: not an image"):
        chat.chat({"image": b"no image", "question": QUESTION})


def test_an_adapter_answers_as_its_merged_form(folder: Path, picture: Path, tmp_path: Path) -> None:
    module = LlavaForConditionalGeneration.from_pretrained(str(folder))
    model = adapters.attach(module, LoraConfig(rank=4, alpha=64), base=str(folder))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    adapters.save_adapter(model, tmp_path / "adapter")
    inputs: ChatInput = {"image": str(picture), "question": QUESTION}
    adapted = RLAIFVChat(str(tmp_path / "adapter"), max_new_tokens=8).chat(inputs)
    from rlaifv.training.parts import save_full

    save_full(model.merge_and_unload(), tmp_path / "merged", like=folder)
    assert adapted == RLAIFVChat(str(tmp_path / "merged"), max_new_tokens=8).chat(inputs)
    assert adapted != RLAIFVChat(str(folder), max_new_tokens=8).chat(inputs)


def test_the_command_line_prints_the_answer(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_original_llava(tmp_path / "original", folder)
    flags = ["--image", str(picture), "--question", QUESTION, "--max-new-tokens", "4"]
    assert main(["--model", str(original), *flags]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["--model", str(tmp_path / "nowhere"), *flags]) == 78
    assert "nowhere" in capsys.readouterr().err
