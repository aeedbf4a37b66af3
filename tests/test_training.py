import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlaifv.config import LoraConfig, ModelSpec
from rlaifv.dpo import PairLogps, sigmoid_loss
from rlaifv.errors import ArtifactError
from rlaifv.models import load_trainable
from rlaifv.models.base import Branches
from rlaifv.records import ReferenceLogps
from rlaifv.training import TrainRequest, train
from rlaifv.training.curves import TAGS
from rlaifv.training.schedule import make_plan
from tests.tiny import make_original_llava, make_tiny_llava
from tests.training_support import (
    LORA,
    NUM_STEPS,
    Folders,
    Killed,
    assert_same_weights,
    make_pair,
    make_policy,
    make_request,
    reference_logps,
    weights,
    with_config,
)

KINDS = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reflogps(policy: ModelSpec) -> Mapping[str, ReferenceLogps]:
    return reference_logps(policy, [make_pair(index) for index in range(10)])


@pytest.fixture
def request_full(policy: ModelSpec, reflogps: Mapping[str, ReferenceLogps]) -> TrainRequest:
    return make_request(policy, reflogps)


@KINDS
def test_first_loss_is_ln_2_and_the_loss_falls(
    request_full: TrainRequest, lora: LoraConfig | None, tmp_path: Path
) -> None:
    sink = Folders(tmp_path)
    request = with_config(request_full, lora=lora, learning_rate=3e-3)
    made = train(request, sink)
    assert [metrics.step for metrics in sink.metrics] == list(range(1, NUM_STEPS + 1))
    assert sink.metrics[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert sink.metrics[0].kl == pytest.approx(0, abs=1e-6)
    assert sink.metrics[-1].loss < 0.66
    assert sink.metrics[-1].rewards_margins > 0
    assert [checkpoint.step for checkpoint in made] == [2, 4, 6] == sink.offered
    assert [checkpoint.epoch for checkpoint in made] == pytest.approx([2 / 3, 4 / 3, 2])
    losses = [metrics.loss for metrics in sink.metrics]
    assert made[1].train_loss == pytest.approx((losses[2] + losses[3]) / 2)


def test_three_steps_equal_plain_training_on_two_rows_per_pair(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    request = with_config(request_full, weight_decay=0.1)._replace(steps=(3,))
    sink = Folders(tmp_path)
    train(request, sink)
    norms = []
    engine = load_trainable(request.policy)
    pairs = {pair.pair_id: pair for pair in request.pairs}
    parameters = dict(engine.module.named_parameters())
    engine.module.requires_grad_(True)
    engine.module.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
    )
    plan = make_plan(pairs, request.config, seed=0)
    for batch, _ in zip(plan.batches(), range(3), strict=False):
        losses = []
        for pair in (pairs[pair_id] for pair_id in batch):
            row = Branches(pair.image.bytes, pair.question, (pair.chosen, pair.rejected))
            chosen, rejected = engine.two_row_logps([row])[0]
            reference = request.reflogps[pair.pair_id]
            logps = PairLogps(
                chosen.sum(),
                rejected.sum(),
                torch.tensor(reference.chosen_token_nats).sum(),
                torch.tensor(reference.rejected_token_nats).sum(),
            )
            losses.append(sigmoid_loss(logps, beta=0.1))
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        adamw.step()
        adamw.zero_grad()
        schedule.step()
    assert [metrics.grad_norm for metrics in sink.metrics] == pytest.approx(norms, rel=1e-4)
    engine.module.save_pretrained(tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    for name, ours in weights(tmp_path / "checkpoint-3").items():
        torch.testing.assert_close(ours, plain[name], atol=1e-4, rtol=0, msg=name)


def test_full_training_changes_everything_but_the_vision_tower(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    train(request_full._replace(steps=(2,)), Folders(tmp_path))
    before, after = weights(Path(request_full.policy.path)), weights(tmp_path / "checkpoint-2")
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "vision_tower" in name}


def test_lora_holds_the_linear_layers_of_the_language_model_and_the_projector_only(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    train(with_config(request_full, lora=LORA)._replace(steps=(2,)), Folders(tmp_path))
    names = set(weights(tmp_path / "checkpoint-2"))
    prefix = "base_model.model.model."
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    layers = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    expected = {
        f"{prefix}language_model.layers.{number}.{layer}.lora_{side}.weight"
        for number in range(2)
        for layer in layers
        for side in "AB"
    }
    projector = {name for name in names if name.startswith(f"{prefix}multi_modal_projector.")}
    assert len(projector) == 4
    assert names - projector == expected


def test_lora_without_the_projector_saves_none(request_full: TrainRequest, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"train_projector": False})
    train(with_config(request_full, lora=lora)._replace(steps=(1,)), Folders(tmp_path))
    assert not any("projector" in name for name in weights(tmp_path / "checkpoint-1"))


def test_checkpoint_is_a_complete_folder_that_loads(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    train(request_full._replace(steps=(1,)), Folders(tmp_path))
    base, tree = Path(request_full.policy.path), tmp_path / "checkpoint-1"
    assert {path.name for path in tree.iterdir()} == {path.name for path in base.iterdir()}
    _, report = AutoModelForImageTextToText.from_pretrained(tree, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tree)
    assert processor.chat_template == AutoProcessor.from_pretrained(base).chat_template


def test_checkpoint_of_a_policy_in_llavas_own_layout_has_a_processor_that_changes_nothing(
    tmp_path: Path,
) -> None:
    original = make_original_llava(tmp_path / "original", make_tiny_llava(tmp_path / "plain"))
    policy = ModelSpec(path=str(original), dtype="float32")
    reflogps = reference_logps(policy, [make_pair(index) for index in range(10)])
    train(make_request(policy, reflogps)._replace(steps=(1,)), Folders(tmp_path))
    tree = tmp_path / "checkpoint-1"
    spec, pairs = ModelSpec(path=str(tree), dtype="float32"), [make_pair(0), make_pair(3)]
    assert AutoProcessor.from_pretrained(tree, backend="pil").image_processor.do_pad
    scores = reference_logps(spec, pairs)
    (tree / "processor_config.json").unlink()
    assert reference_logps(spec, pairs) == scores


def test_micro_batches_change_no_result_beyond_noise(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    for size in (1, 4):
        request = with_config(request_full, micro_batch_size=size)._replace(steps=(2,))
        train(request, Folders(tmp_path / str(size)))
    ones, fours = (weights(tmp_path / size / "checkpoint-2") for size in "14")
    for name in ones:
        torch.testing.assert_close(ones[name], fours[name], atol=1e-4, rtol=0)


def test_order_of_pairs_and_global_random_state_do_not_matter(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    request = with_config(request_full, lora=LORA)._replace(steps=(2,))
    train(request, Folders(tmp_path / "a"))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(request._replace(pairs=request.pairs[::-1]), Folders(tmp_path / "b"))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-2")


@KINDS
def test_gradient_checkpointing_changes_no_bit(
    request_full: TrainRequest, lora: LoraConfig | None, tmp_path: Path
) -> None:
    request = with_config(request_full, lora=lora)._replace(steps=(2,))
    train(request, Folders(tmp_path / "a"))
    train(with_config(request, gradient_checkpointing=True), Folders(tmp_path / "b"))
    assert_same_weights(tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-2")


def test_curves_hold_every_step_under_the_usual_names(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    sink = Folders(tmp_path)
    train(request_full._replace(steps=(2,), log_dir=tmp_path / "curves"), sink)
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(TAGS.values())
    curve = [(event.step, event.value) for event in events.Scalars("rewards/margins")]
    expected = [(metrics.step, metrics.rewards_margins) for metrics in sink.metrics]
    assert [step for step, _ in curve] == [1, 2]
    assert [value for _, value in curve] == pytest.approx([value for _, value in expected])


# --- resume --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    "dies_at", [("progress", 1), ("progress", 3), ("checkpoint", 4), ("state", 4)]
)
def test_resumed_run_ends_with_the_same_bits(
    request_full: TrainRequest,
    lora: LoraConfig | None,
    dies_at: tuple[str, int],
    tmp_path: Path,
) -> None:
    request = with_config(request_full, lora=lora)
    undisturbed = train(request, Folders(tmp_path / "undisturbed"))
    killed = Folders(tmp_path / "killed", dies_at=dies_at)
    with pytest.raises(Killed):
        train(request, killed)
    resumed = Folders(tmp_path / "killed")
    made = train(request._replace(resume_from=killed.latest_state()), resumed)
    assert made == undisturbed
    assert len(resumed.metrics) == NUM_STEPS - max(
        0, (dies_at[1] - (dies_at[0] != "state")) // 2 * 2
    )
    for step in request.steps:
        name = f"checkpoint-{step}"
        assert_same_weights(tmp_path / "undisturbed" / name, tmp_path / "killed" / name)


def test_bfloat16_is_trained_on_float32_weights_and_resumes_exactly(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    spec = request_full.policy.model_copy(update={"dtype": "bfloat16"})
    request = with_config(request_full, learning_rate=1e-6)._replace(policy=spec)
    train(request, Folders(tmp_path / "undisturbed"))
    killed = Folders(tmp_path / "killed", dies_at=("progress", 5))
    with pytest.raises(Killed):
        train(request, killed)
    train(request._replace(resume_from=killed.latest_state()), Folders(tmp_path / "killed"))
    trees = [tmp_path / name / "checkpoint-6" for name in ("undisturbed", "killed")]
    assert_same_weights(*trees)
    assert {tensor.dtype for tensor in weights(trees[0]).values()} == {torch.bfloat16}
    state = weights(tmp_path / "undisturbed/state-4")
    head = state["weights/lm_head.weight"]
    assert head.dtype == torch.float32
    start = weights(Path(request.policy.path))["language_model.lm_head.weight"].bfloat16().float()
    moved = (head - start).abs()
    assert 0 < moved.max() < 1e-5, "updates far below bfloat16's resolution must add up"


def test_adapters_of_a_bfloat16_policy_have_its_precision_and_float32_weights_behind(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    spec = request_full.policy.model_copy(update={"dtype": "bfloat16"})
    request = with_config(request_full, lora=LORA, learning_rate=1e-6)._replace(policy=spec)
    train(request, Folders(tmp_path / "undisturbed"))
    killed = Folders(tmp_path / "killed", dies_at=("progress", 5))
    with pytest.raises(Killed):
        train(request, killed)
    train(request._replace(resume_from=killed.latest_state()), Folders(tmp_path / "killed"))
    trees = [tmp_path / name / "checkpoint-6" for name in ("undisturbed", "killed")]
    assert_same_weights(*trees)
    assert {tensor.dtype for tensor in weights(trees[0]).values()} == {torch.bfloat16}
    early, late = (weights(tmp_path / f"undisturbed/state-{step}") for step in (2, 4))
    assert {tensor.dtype for tensor in late.values()} == {torch.float32}
    name = next(name for name in late if name.startswith("weights/") and "lora_A" in name)
    moved = (late[name] - early[name]).abs()
    assert 0 < moved.max() < 1e-5, "updates far below bfloat16's resolution must add up"


def test_resume_refuses_the_state_of_another_run(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    killed = Folders(tmp_path, dies_at=("state", 2))
    with pytest.raises(Killed):
        train(request_full, killed)
    state = killed.latest_state()
    with pytest.raises(ArtifactError, match="seed is '0', '1' was expected"):
        train(request_full._replace(seed=1, resume_from=state), killed)
    with pytest.raises(ArtifactError, match="config is"):
        train(with_config(request_full, beta=0.2)._replace(resume_from=state), killed)
    with pytest.raises(ArtifactError, match="pairs is"):
        train(request_full._replace(pairs=request_full.pairs[:9], resume_from=state), killed)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_resume_is_strict_about_tensors(
    request_full: TrainRequest, damage: str, tmp_path: Path
) -> None:
    killed = Folders(tmp_path, dies_at=("state", 2))
    with pytest.raises(Killed):
        train(request_full, killed)
    state = killed.latest_state()
    assert state is not None
    tensors = weights(state)
    if damage == "missing":
        del tensors["weights/lm_head.weight"]
    elif damage == "unexpected":
        tensors["weights/lm_head.bias"] = torch.zeros(1)
    else:
        tensors["weights/lm_head.weight"] = tensors["weights/lm_head.weight"][:1]
    save_file(tensors, next(state.glob("*.safetensors")))
    with pytest.raises(ArtifactError, match=r"weights/lm_head\."):
        train(request_full._replace(resume_from=state), killed)


@pytest.mark.slow
def test_run_killed_with_sigkill_at_random_steps_ends_with_the_same_bits(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    cases: list[dict[str, object]] = [{}, {"lora": LORA.model_dump()}]
    for number, case in enumerate(cases):
        request = with_config(request_full, lora=LORA if case else None)
        train(request, Folders(tmp_path / "undisturbed" / str(number)))
        (killed / str(number)).mkdir(parents=True)
        step = random.randrange(1, NUM_STEPS)
        (killed / str(number) / f"kill-0-after-{step}").touch()
    words = [request_full.policy.path, str(killed), *map(json.dumps, cases)]
    command = [sys.executable, "-m", "tests.training_support", *words]
    root = Path(__file__).parents[1]
    codes = [subprocess.run(command, cwd=root, check=False).returncode for _ in range(3)]
    assert codes == [-9, -9, 0]
    for number in range(len(cases)):
        for step in request_full.steps:
            name = f"{number}/checkpoint-{step}"
            assert_same_weights(tmp_path / "undisturbed" / name, killed / name)


def test_without_steps_nothing_is_trained(request_full: TrainRequest, tmp_path: Path) -> None:
    assert train(request_full._replace(steps=()), Folders(tmp_path)) == []


def test_state_says_what_it_is(request_full: TrainRequest, tmp_path: Path) -> None:
    train(request_full, Folders(tmp_path))
    facts = json.loads((tmp_path / "state-2/training_state.json").read_text())
    assert facts["step"] == 2
    assert set(facts["identity"]) == {"config", "dtype", "pairs", "reflogps", "seed"}
    assert not any("vision_tower" in name for name in weights(tmp_path / "state-2"))
    assert not (tmp_path / f"state-{NUM_STEPS}").exists(), "the last step has nothing to resume"
