"""Questions behind one prefix against one forward pass each; what models refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models import load_model, load_trainable
from rlaifv.models.base import Branches, Decoding, ImageQuestions, Prompt, YesNo
from rlaifv.models.branches import TrainableModel
from rlaifv.models.generic import GenericModel
from tests.models_kit import (
    EOS_IDS,
    IMAGES,
    QUESTIONS,
    Count,
    Plain,
    make_prompts,
    make_rows,
    spec,
    with_eos,
)
from tests.tiny import make_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_eos(make_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def model(folder: Path) -> TrainableModel:
    return load_trainable(spec(folder))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


@pytest.fixture
def lm_tokens(model: TrainableModel) -> Iterator[Count]:
    count = Count(model.module.get_decoder())
    yield count
    count.stop()


@pytest.fixture
def tower_images(model: TrainableModel) -> Iterator[Count]:
    count = Count(model.module.model.vision_tower)
    yield count
    count.stop()


def _image_questions() -> list[ImageQuestions]:
    return [
        ImageQuestions(IMAGES[0], QUESTIONS),
        ImageQuestions(IMAGES[1], QUESTIONS[::-1]),
        ImageQuestions(IMAGES[2], ()),
        ImageQuestions(IMAGES[0], (QUESTIONS[1],)),
    ]


def _close(left: list[list[YesNo]], right: list[list[YesNo]]) -> bool:
    pairs = [
        (a, b)
        for row, other in zip(left, right, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    assert all((a.p_yes > a.p_no) == (b.p_yes > b.p_no) for a, b in pairs)
    return bool(np.abs(np.subtract(*map(np.array, zip(*pairs, strict=True)))).max() < 1e-5)


def test_verdicts_behind_one_prefix_equal_one_by_one(model: TrainableModel, plain: Plain) -> None:
    rows = _image_questions()
    expected = [[plain.one_by_one(row.image, q) for q in row.questions] for row in rows]
    assert _close(model.yes_no(rows), expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_verdicts_do_not_depend_on_batch_and_order(
    model: TrainableModel, folder: Path, batch_size: int
) -> None:
    rows = _image_questions()
    other = load_model(spec(folder, batch_size=batch_size)).yes_no(rows[::-1])[::-1]
    assert _close(model.yes_no(rows), other)


def test_no_image_answers_for_another(model: TrainableModel) -> None:
    first, second = model.yes_no([ImageQuestions(image, QUESTIONS) for image in IMAGES[:2]])
    assert all(abs(a.p_yes - b.p_yes) > 1e-5 for a, b in zip(first, second, strict=True))


def test_a_group_of_questions_costs_one_prefix_and_one_image(
    model: TrainableModel, plain: Plain, lm_tokens: Count, tower_images: Count
) -> None:
    model.yes_no([ImageQuestions(IMAGES[0], QUESTIONS), ImageQuestions(IMAGES[0], QUESTIONS)])
    alone = [plain.inputs(IMAGES[0], q)["input_ids"].shape[1] for q in QUESTIONS]
    assert lm_tokens.tokens < sum(alone) - 2 * 10
    assert tower_images.rows == 1


def test_the_order_of_many_questions_survives_several_rows(
    model: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = tuple(f"Is there a dog number {i}?" for i in range(12))
    whole = model.yes_no([ImageQuestions(IMAGES[0], questions)])
    monkeypatch.setattr("rlaifv.models.shared_prefix.MAX_BRANCH_TOKENS", 40)
    assert _close(model.yes_no([ImageQuestions(IMAGES[0], questions)]), whole)


def test_a_template_that_puts_the_question_first_is_scored_right(tmp_path: Path) -> None:
    template = (
        "<s>{% for message in messages %}{{ message['content'][1]['text'] }} <image> A:{% endfor %}"
    )
    folder = make_tiny_llava(tmp_path / "m", chat_template=template)
    expected = [Plain(folder).one_by_one(IMAGES[0], question) for question in QUESTIONS]
    verdicts = load_model(spec(folder)).yes_no([ImageQuestions(IMAGES[0], QUESTIONS)])
    assert _close(verdicts, [expected])


def test_a_tokenizer_that_splits_a_label_word_cannot_label(folder: Path, tmp_path: Path) -> None:
    broken = copytree(folder, tmp_path / "broken")
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if pair != ["Y", "es"]]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="'Yes' as 2 tokens"):
        load_model(spec(broken)).yes_no([ImageQuestions(IMAGES[0], QUESTIONS)])


@pytest.mark.parametrize("generic", [False, True])
def test_groups_that_are_queued_together_give_what_they_give_alone(
    model: TrainableModel, plain: Plain, generic: bool
) -> None:
    if generic:
        model = GenericModel(
            plain.module, plain.processor, batch_size=2, eos_ids=EOS_IDS, source="tiny"
        )
    asked, rows = _image_questions(), make_rows()
    prompts, decoding = make_prompts((5, 6))[:3], Decoding(5, temperature=1.0)
    queued: list[Any] = [
        *(model.queue_yes_no(asked), model.queue_yes_no(asked[::-1])),
        *(
            model.queue_answer(prompts, decoding=decoding),
            model.queue_answer([], decoding=decoding),
        ),
        *(model.queue_sequence_logps(rows), model.queue_sequence_logps(rows[:1])),
    ]
    *verdicts, answers, none, logps, first = [wait() for wait in queued]
    assert verdicts == [model.yes_no(asked), model.yes_no(asked[::-1])]
    assert (answers, none) == (model.answer(prompts, decoding=decoding), [])
    for found, expected in ((logps, rows), (first, rows[:1])):
        for row, other in zip(found, model.sequence_logps(expected), strict=True):
            assert all(map(np.array_equal, row, other))


def test_a_row_that_does_not_fit_is_refused_with_its_number(model: TrainableModel) -> None:
    rows = [*make_rows()[:1], Branches(IMAGES[0], "What?", ("dog " * 60, "cat"))]
    with pytest.raises(ArtifactError, match=r"row 1: .* more than 40"):
        model.encode_branches(rows, max_length=40)
    prompts = [*make_prompts()[:5], Prompt(IMAGES[0], "dog " * 3000)]
    with pytest.raises(ArtifactError, match=r"row 5: .* more than 2048"):
        model.answer(prompts, decoding=Decoding(2))
    with pytest.raises(ArtifactError, match="row 1"):
        model.yes_no([ImageQuestions(IMAGES[0], (q,)) for q in ("a", "dog " * 3000)])


def test_scores_that_are_not_finite_are_refused(folder: Path) -> None:
    model = load_trainable(spec(folder))
    torch.nn.init.constant_(model.module.lm_head.weight, torch.nan)
    verdicts = model.queue_yes_no(_image_questions())
    with pytest.raises(ArtifactError, match="not finite"):
        verdicts()
    with pytest.raises(ArtifactError, match="not finite"):
        model.answer(make_prompts(), decoding=Decoding(2))


def test_a_question_with_an_image_placeholder_is_refused(model: TrainableModel) -> None:
    with pytest.raises(ArtifactError, match="row 0: the prompt has 2 image placeholders"):
        model.answer([Prompt(IMAGES[0], "<image> again?")], decoding=Decoding(2))


def test_a_broken_image_is_refused_with_its_row(model: TrainableModel) -> None:
    rows = [ImageQuestions(IMAGES[0], QUESTIONS), ImageQuestions(IMAGES[1][:100], QUESTIONS)]
    with pytest.raises(ArtifactError, match="row 1: image: truncated"):
        model.yes_no(rows)
