"""Answers over a shared prefix against transformers' `generate`."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlaifv.models import load_model, load_text_model
from rlaifv.models.base import Branches, Decoding, Generation, Prompt
from rlaifv.models.shared_prefix import SharedPrefixModel
from tests.models_kit import (
    EOS_IDS,
    IMAGES,
    REQUESTS,
    Count,
    Plain,
    load_engine,
    make_prompts,
    spec,
    with_eos,
)
from tests.tiny import make_tiny_chat, make_tiny_llava

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_eos(make_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def model(folder: Path) -> SharedPrefixModel:
    return load_engine(spec(folder))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


@pytest.fixture
def lm_tokens(model: SharedPrefixModel) -> Iterator[Count]:
    count = Count(model.module.get_decoder())
    yield count
    count.stop()


@pytest.fixture
def tower_images(model: SharedPrefixModel) -> Iterator[Count]:
    count = Count(model.module.model.vision_tower)
    yield count
    count.stop()


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beam_answers_equal_generate(
    model: SharedPrefixModel, plain: Plain, beams: int
) -> None:
    prompts = make_prompts()
    answers = model.answer(prompts, decoding=Decoding(24, num_beams=beams))
    lengths = set()
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = plain.generate(prompt.image, prompt.question, steps=24, beams=beams)
        assert answer.text == plain.processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.num_tokens == len(ids)
        assert answer.finish_reason == ("stop" if ids[-1] in EOS_IDS else "length")
        lengths.add(len(ids))
    assert len(lengths) > 2, "the answers should end at different steps"


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`:UserWarning")  # as we count, too
@pytest.mark.parametrize("beams", [1, 3])
def test_a_repetition_penalty_counts_what_the_answer_has_said(
    model: SharedPrefixModel, plain: Plain, beams: int
) -> None:
    prompts = make_prompts()
    decoding = Decoding(12, num_beams=beams, repetition_penalty=1.5)
    answers = model.answer(prompts, decoding=decoding)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        batch = model.encode_branches([Branches(prompt.image, prompt.question, ("",))])
        ids = batch.packed.ids_BL[:, :-1]  # without the end
        with torch.no_grad():
            features = model.vision_features(batch.pixels)
            embeds = model._side.merge(ids, features, batch.image_of_row_B)
            expected = plain.module.generate(
                **{"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)},
                **{"num_beams": beams, "repetition_penalty": 1.5, "do_sample": False},
                **{"max_new_tokens": 12, "eos_token_id": EOS_IDS},
            )[0].tolist()
        assert answer.text == plain.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert answers != model.answer(prompts, decoding=Decoding(12, num_beams=beams))


def test_a_sample_depends_on_its_seed_and_nothing_else(
    model: SharedPrefixModel, folder: Path
) -> None:
    decoding = Decoding(24, temperature=0.7, top_k=50)
    prompts = [
        prompt._replace(seeds=tuple(range(10 * i, 10 * i + 1 + i % 4)))
        for i, prompt in enumerate(make_prompts())
    ]
    together = model.answer(prompts, decoding=decoding)
    alone = load_model(spec(folder, batch_size=1))
    for prompt, answers in zip(reversed(prompts), reversed(together), strict=True):
        for seed, answer in zip(prompt.seeds, answers, strict=True):
            ((again,),) = alone.answer([prompt._replace(seeds=(seed,))], decoding=decoding)
            assert again == answer
    assert len({answer for answers in together for answer in answers}) > 15


def test_sampling_follows_the_model_s_distribution(model: SharedPrefixModel, plain: Plain) -> None:
    prompt = Prompt(IMAGES[0], REQUESTS[0], tuple(range(3000)))
    decoding = Decoding(1, temperature=0.7, top_k=5, top_p=0.95)
    (answers,) = model.answer([prompt], decoding=decoding)
    logits = plain.next_probabilities(prompt.image, prompt.question).log() / 0.7
    top = logits.topk(5)
    expected = top.values.softmax(-1)
    kept = expected.cumsum(-1) - expected < 0.95
    expected = expected * kept / (expected * kept).sum()
    texts = [plain.processor.tokenizer.decode([int(i)]) for i in top.indices]
    assert {answer.text for answer in answers} <= set(texts)
    for wanted in texts:
        share = sum(answer.text == wanted for answer in answers) / 3000
        probability = sum(
            p for p, text in zip(expected.tolist(), texts, strict=True) if text == wanted
        )
        assert share == pytest.approx(probability, abs=0.03)


def test_ten_samples_run_the_prompt_and_the_image_once(
    model: SharedPrefixModel, plain: Plain, lm_tokens: Count, tower_images: Count
) -> None:
    prompt = Prompt(IMAGES[0], REQUESTS[0], tuple(range(10)))
    decoding = Decoding(2, temperature=1.0)
    model.answer([prompt], decoding=decoding)
    prompt_tokens = plain.inputs(prompt.image, prompt.question)["input_ids"].shape[1]
    assert lm_tokens.tokens == prompt_tokens + 10
    assert tower_images.rows == 1


def test_finished_rows_leave_the_batch(
    model: SharedPrefixModel, plain: Plain, lm_tokens: Count
) -> None:
    prompt = make_prompts(tuple(range(32)))[0]
    (answers,) = model.answer([prompt], decoding=Decoding(40, temperature=0.7))
    lengths = [answer.num_tokens for answer in answers]
    prompt_tokens = plain.inputs(prompt.image, prompt.question)["input_ids"].shape[1]
    assert sum(lengths) < 0.6 * 32 * max(lengths), "the answers should end at different steps"
    assert lm_tokens.tokens - prompt_tokens < sum(lengths) / 0.75


def test_generated_text_is_tokenised_back_to_what_was_generated(
    model: SharedPrefixModel, plain: Plain
) -> None:
    text = " A red cup\n and two  green bottles. "
    batch = model.encode_branches([Branches(IMAGES[0], "What?", (text,))])
    ids = batch.targets_M.tolist()
    assert plain.processor.tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == plain.processor.tokenizer.eos_token_id


def test_a_prompt_without_seeds_has_no_answers(model: SharedPrefixModel) -> None:
    prompts = [prompt._replace(seeds=()) for prompt in make_prompts()[:2]]
    decoding = Decoding(3, temperature=1.0)
    assert model.answer(prompts, decoding=decoding) == [[], []]
    one, two = model.answer([prompts[0], make_prompts()[0]], decoding=decoding)
    assert (one, len(two)) == ([], 1)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16", "1"])
def test_every_image_mode_and_size_is_answered(model: SharedPrefixModel, mode: str) -> None:
    file_format = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    picture = Image.new("RGB" if mode in ("P", "CMYK", "1", "RGBA") else "L", (61, 23), 77)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, file_format)
    ((answer,),) = model.answer([Prompt(buffer.getvalue(), "What?")], decoding=Decoding(3))
    assert isinstance(answer, Generation)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not here")
def test_photographs_of_real_size_are_answered(model: SharedPrefixModel) -> None:
    prompts = [Prompt(path.read_bytes(), "What?") for path in sorted(PHOTOS.rglob("*.jpg"))[:8]]
    answers = model.answer(prompts, decoding=Decoding(4))
    assert [len(row) for row in answers] == [1] * len(prompts)


def test_replies_equal_generate_and_follow_their_seed(tmp_path: Path) -> None:
    folder = with_eos(make_tiny_chat(tmp_path / "chat"))
    chat = load_text_model(spec(folder, batch_size=3))
    prompts = ["What is a cat?", "A", "Tell me of the dog near the window.", "Two"]
    greedy = chat.reply(prompts, seeds=[0] * 4, decoding=Decoding(16))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    module: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    for prompt, reply in zip(prompts, greedy, strict=True):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        ids = module.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
        new = ids[inputs["input_ids"].shape[1] :]
        assert reply.text == tokenizer.decode(new, skip_special_tokens=True)
        assert reply.num_tokens == len(new)
    decoding = Decoding(16, temperature=0.8, top_p=0.9)
    sampled = chat.reply(prompts, seeds=[1, 2, 3, 4], decoding=decoding)
    assert chat.reply(prompts[::-1], seeds=[4, 3, 2, 1], decoding=decoding) == sampled[::-1]
    assert chat.reply(prompts, seeds=[5, 6, 7, 8], decoding=decoding) != sampled
