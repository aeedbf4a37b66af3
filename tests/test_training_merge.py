from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError
from rlaifv.merge import main
from rlaifv.models import load_model
from rlaifv.models.base import Branches
from rlaifv.training import train
from rlaifv.training.merge import merge_adapter
from tests.tiny import make_tiny_llava, random_image
from tests.training_support import (
    LORA,
    Folders,
    make_pair,
    make_policy,
    make_request,
    reference_logps,
)

ROW = Branches(random_image(0), "What is in the picture?", ("a red ball", "a large cube"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_policy(tmp_path_factory.mktemp("base")).path)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two steps, projector included."""
    root = tmp_path_factory.mktemp("trained")
    policy = ModelSpec(path=str(base), dtype="float32")
    request = make_request(policy, reference_logps(policy, [make_pair(i) for i in range(10)]))
    config = request.config.model_copy(update={"lora": LORA, "learning_rate": 1e-2})
    train(request._replace(config=config, steps=(2,)), Folders(root))
    return root / "checkpoint-2"


def plain_logits(module: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Of transformers' own forward, with an image: the projector takes part."""
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.tensor([[1, 4, 4, 4, 4, 70, 71, 72, 73]])
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    with torch.no_grad():
        logits: torch.Tensor = module.eval()(input_ids=ids_BL, pixel_values=pixels).logits
    return logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapter_loads_by_peft_as_it_is_and_equals_the_merged_tree(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert merge_adapter(base, adapter, tmp_path / "merged") < 1e-4
    start = plain_logits(AutoModelForImageTextToText.from_pretrained(base))
    module = AutoModelForImageTextToText.from_pretrained(base)
    adapted = plain_logits(PeftModel.from_pretrained(module, adapter))
    merged = plain_logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    assert (merged - start).abs().max() > 0.01


def test_merged_tree_is_complete_and_in_the_precision_of_the_base(
    adapter: Path, tmp_path: Path
) -> None:
    base = make_tiny_llava(tmp_path / "base")
    module = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    module.save_pretrained(base)
    merge_adapter(base, adapter, tmp_path / "merged")
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    scores = load_model(ModelSpec(path=str(tmp_path / "merged"))).sequence_logps([ROW])
    assert all(torch.isfinite(torch.from_numpy(logps)).all() for logps in scores[0])


def test_merging_never_touches_the_vision_tower(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(base, adapter, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("projector" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    assert not any("vision_tower" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_adapter_with_other_tensors_is_refused(
    base: Path, adapter: Path, damage: str, tmp_path: Path
) -> None:
    for source in adapter.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "q_proj" in name)
    moved = tensors.pop(name)
    if damage == "unexpected":
        tensors |= {name: moved, name.replace("layers.0", "layers.7"): moved.clone()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"tensors do not match the base model, first .*q_proj"):
        merge_adapter(base, tmp_path, tmp_path / "merged")


def test_folder_without_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an adapter"):
        merge_adapter(base, tmp_path, tmp_path / "merged")


def test_merge_command_makes_a_tree_or_says_why_not(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    words = ["--base", str(base), "--adapter", str(adapter), "--out", str(out)]
    assert main(words) == 0
    assert "largest difference" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    assert main(words) == 78
    assert "exists already" in capsys.readouterr().err
    assert main([*words[:2], "--adapter", str(base), "--out", str(tmp_path / "other")]) == 65
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
