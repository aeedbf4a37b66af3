"""Answers as branches of one row against one full row each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlaifv.models.base import Branches
from rlaifv.models.shared_prefix import SharedPrefixModel
from tests.models_kit import IMAGES, load_engine, make_rows, spec, with_eos
from tests.tiny import make_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_eos(make_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def model(folder: Path) -> SharedPrefixModel:
    return load_engine(spec(folder))


def test_branch_logps_equal_a_plain_forward(model: SharedPrefixModel) -> None:
    rows = make_rows()
    plain = [part.detach().numpy() for row in model.two_row_logps(rows) for part in row]
    branches = model.branch_logps(model.encode_branches(rows))
    ours = [part.detach().numpy() for row in branches for part in row]
    scored = [part for row in model.sequence_logps(rows) for part in row]
    for one, two, expected in zip(ours, scored, plain, strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(one, two)


def test_the_end_token_is_scored_and_the_prompt_is_not(model: SharedPrefixModel) -> None:
    ((logps,),) = model.sequence_logps([Branches(IMAGES[0], "What?", ("",))])
    assert logps.shape == (1,)
    assert logps.dtype == np.float32


def test_gradients_of_branches_equal_those_of_full_rows(folder: Path) -> None:
    model = load_engine(spec(folder))
    weights = [
        model.module.model.multi_modal_projector.linear_1.weight,
        model.module.get_decoder().layers[0].self_attn.k_proj.weight,
        model.module.get_input_embeddings().weight,
        model.module.lm_head.weight,
    ]

    def gradients(logps: list[list[Tensor]]) -> tuple[Tensor, ...]:
        (first, second, third), *_ = ([part.sum() for part in row] for row in logps)
        loss = -torch.nn.functional.logsigmoid(first - 0.5 * second) + third.square()
        return torch.autograd.grad(loss, weights)

    batch = model.encode_branches(make_rows())
    ours = gradients(model.branch_logps(batch))
    cached = gradients(model.branch_logps(batch, features=model.vision_features(batch.pixels)))
    plain = gradients(model.two_row_logps(make_rows()))
    for one, two, three in zip(ours, cached, plain, strict=True):
        assert torch.allclose(one, three, atol=1e-4, rtol=1e-4)
        assert torch.equal(one, two)
        assert one.abs().max() > 1e-3


def test_a_chunked_head_changes_neither_values_nor_gradients(
    model: SharedPrefixModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = model.module.lm_head.weight

    def scored() -> tuple[Tensor, Tensor]:
        logps = torch.cat(
            [p for r in model.branch_logps(model.encode_branches(make_rows())) for p in r]
        )
        return logps, torch.autograd.grad(logps.sum(), weight)[0]

    whole, whole_gradient = scored()
    monkeypatch.setattr("rlaifv.models.decoder.HEAD_CHUNK", 3)
    chunked, gradient = scored()
    assert torch.allclose(whole, chunked, atol=1e-6)
    assert torch.allclose(whole_gradient, gradient, atol=1e-4)


def test_a_frozen_tower_keeps_no_graph(folder: Path) -> None:
    model = load_engine(spec(folder))
    model.module.model.vision_tower.requires_grad_(False)
    batch = model.encode_branches(make_rows())
    assert not model.vision_features(batch.pixels).requires_grad
    assert model.branch_logps(batch)[0][0].requires_grad


CHECKPOINTING = "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"


@pytest.mark.filterwarnings(CHECKPOINTING)  # raised inside PEFT
def test_adapters_put_into_the_module_take_part(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_engine(spec(folder))
    before = model.sequence_logps(make_rows())
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    config = LoraConfig(
        r=2,
        target_modules=targets,
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(model.module, config)
    logps = [part for row in model.branch_logps(model.encode_branches(make_rows())) for part in row]
    torch.cat(logps).sum().backward()  # type: ignore[no-untyped-call]
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    assert not np.array_equal(model.sequence_logps(make_rows())[0][0], before[0][0])
    with adapted.disable_adapter():
        np.testing.assert_array_equal(model.sequence_logps(make_rows())[0][0], before[0][0])


@pytest.mark.filterwarnings(CHECKPOINTING)  # the new name is too new for transformers 5.17
def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    model = load_engine(spec(folder))
    weight: Tensor = model.module.get_decoder().layers[0].self_attn.k_proj.weight

    def gradient() -> Tensor:
        logps = [
            part for row in model.branch_logps(model.encode_branches(make_rows())) for part in row
        ]
        (gradient,) = torch.autograd.grad(torch.cat(logps).sum(), [weight])
        return gradient

    kept = gradient()
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    model.module.train()
    assert torch.equal(gradient(), kept)


def test_a_saved_module_says_nothing_of_our_attention(
    model: SharedPrefixModel, tmp_path: Path
) -> None:
    model.module.save_pretrained(tmp_path)
    assert "rlaifv" not in (tmp_path / "config.json").read_text()
