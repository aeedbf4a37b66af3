"""Training of families through transformers' own forward, one row per answer."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from rlaifv.config import LoraConfig, ModelSpec
from rlaifv.errors import ArtifactError
from rlaifv.models import load_scorer, load_trainable
from rlaifv.models.base import Branches
from rlaifv.training import train
from rlaifv.training.merge import merge_adapter
from rlaifv.training.parts import freeze_all_but_language_and_projector, vision_tower
from tests.tiny_families import FAMILIES
from tests.training_support import (
    LORA,
    Folders,
    Killed,
    make_pair,
    make_request,
    reference_logps,
    with_config,
)

PAIRS = [make_pair(index) for index in range(10)]
ROWS = [Branches(pair.image.bytes, pair.question, (pair.chosen, pair.rejected)) for pair in PAIRS]


QUICK = ("qwen2_5_vl", "internvl")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=EVERY)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    name: str = request.param
    folder = FAMILIES[name](tmp_path_factory.mktemp("families") / name)
    return ModelSpec(path=str(folder), dtype="float32")


def test_gradients_reach_the_language_model_and_not_the_tower(policy: ModelSpec) -> None:
    model = load_trainable(policy)
    freeze_all_but_language_and_projector(model.module)
    scored = model.branch_logps(model.encode_branches(ROWS[:2]))
    expected = load_scorer(policy).sequence_logps(ROWS[:2])
    for logps, row in zip(scored, expected, strict=True):
        for ours, stored in zip(logps, row, strict=True):
            assert ours.detach().numpy() == pytest.approx(stored, abs=1e-5)
    total = torch.stack([part.sum() for row in scored for part in row]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    layer = next(iter(model.module.get_decoder().layers))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert all(p.grad is None for p in vision_tower(model.module).parameters())


def test_what_is_too_long_is_refused_with_its_row(policy: ModelSpec) -> None:
    model = load_trainable(policy)
    long = ROWS[1]._replace(answers=("red " * 150, "a"))
    with pytest.raises(ArtifactError, match=r"row 1: .* tokens, more than 150$"):
        model.encode_branches([ROWS[0], long], max_length=150)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_and_its_checkpoint_is_a_policy(
    policy: ModelSpec, lora: LoraConfig | None, tmp_path: Path
) -> None:
    request = make_request(policy, reference_logps(policy, PAIRS))
    request = with_config(request, lora=lora, learning_rate=3e-3, gradient_checkpointing=True)
    sink = Folders(tmp_path)
    train(request, sink)
    assert sink.metrics[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert sink.metrics[-1].loss < 0.68
    made = tmp_path / "checkpoint-6"
    if lora is not None:
        merge_adapter(Path(policy.path), made, tmp_path / "merged")
        made = tmp_path / "merged"
    loaded = AutoModelForImageTextToText.from_pretrained(made)
    assert type(loaded) is type(load_trainable(policy).module)
    before = load_scorer(policy).sequence_logps(ROWS)
    after = load_scorer(policy.model_copy(update={"path": str(made)})).sequence_logps(ROWS)
    margins = [
        (new[0].sum() - old[0].sum()) - (new[1].sum() - old[1].sum())
        for new, old in zip(after, before, strict=True)
    ]
    assert sum(margin > 0 for margin in margins) >= 8


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    folder = FAMILIES["qwen2_5_vl"](tmp_path / "qwen2_5_vl")
    policy = ModelSpec(path=str(folder), dtype="float32")
    request = make_request(policy, reference_logps(policy, PAIRS))
    train(request, Folders(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(request, Folders(tmp_path / "killed", dies_at=("state", 2)))
    again = Folders(tmp_path / "killed")
    train(request._replace(resume_from=again.latest_state()), again)
    (file,) = (tmp_path / "whole/checkpoint-6").glob("*.safetensors")
    whole, resumed = load_file(file), load_file(tmp_path / "killed/checkpoint-6" / file.name)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_zero_has_the_losses_and_weights_of_a_run_without(
    lora: LoraConfig | None, tmp_path: Path
) -> None:
    folder = FAMILIES["qwen3_vl"](tmp_path / "qwen3_vl")
    policy = ModelSpec(path=str(folder), dtype="float32")
    request = make_request(policy, reference_logps(policy, PAIRS))
    losses, trees = [], []
    for stage in (0, 2, 3):
        sink = Folders(tmp_path / f"zero-{stage}")
        changes = {"lora": lora, "zero_stage": stage, "gradient_checkpointing": stage == 3}
        train(with_config(request, **changes), sink)
        (file,) = (sink.root / "checkpoint-6").glob("*.safetensors")
        losses.append([metrics.loss for metrics in sink.metrics])
        trees.append(load_file(file))
    for other, tree in zip(losses[1:], trees[1:], strict=True):
        assert other == pytest.approx(losses[0], abs=1e-5)
        assert tree.keys() == trees[0].keys()
        assert all(torch.allclose(tree[name], trees[0][name], atol=1e-4) for name in tree)
