"""Against TRL's DPOTrainer, the peer whose numbers everybody compares with."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from rlaifv.config import LossConfig, ModelSpec, TrainConfig
from rlaifv.models.base import Branches
from rlaifv.models.branches import split_answers
from rlaifv.records import PreferencePair
from rlaifv.training import TrainRequest, train
from rlaifv.training.scoring import Answers, batch_metrics, score_pair
from tests.models_kit import load_engine
from tests.tiny import make_tiny_llava
from tests.training_support import Folders, make_pair, reference_logps

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt or not loop.last %} ASSISTANT:{% endif %}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}"
)
RATE = 1e-3


class World(NamedTuple):
    """A policy, a reference that differs from it, and pairs."""

    policy: Path
    reference: Path
    pairs: list[PreferencePair]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
    policy = make_tiny_llava(folders[0], chat_template=TEMPLATE)
    reference = make_tiny_llava(folders[1], seed=1, chat_template=TEMPLATE)
    return World(policy, reference, [make_pair(index) for index in range(4)])


def open_trainer(world: World, out: Path, *, loss: str = "sigmoid", reference: Path) -> Any:
    from datasets import Dataset

    model = LlavaForConditionalGeneration.from_pretrained(world.policy)
    model.model.vision_tower.requires_grad_(False)
    config = trl.DPOConfig(
        output_dir=str(out),
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=len(world.pairs),
        num_train_epochs=3,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=1,
        beta=0.1,
        loss_type=[loss],
    )
    return trl.DPOTrainer(
        model=model,
        ref_model=LlavaForConditionalGeneration.from_pretrained(reference),
        args=config,
        train_dataset=Dataset.from_list([row(pair) for pair in world.pairs]),
        processing_class=AutoProcessor.from_pretrained(world.policy, backend="pil"),
    )


def row(pair: PreferencePair) -> dict[str, Any]:
    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return {
        "images": [Image.open(io.BytesIO(pair.image.bytes)).convert("RGB")],
        "prompt": message("user", pair.question),
        "chosen": message("assistant", pair.chosen),
        "rejected": message("assistant", pair.rejected),
    }


def their_numbers(trainer: Any, pair: PreferencePair) -> tuple[float, float, float]:
    """Loss and log-probabilities of one pair."""
    inputs = trainer.data_collator([row(pair)])
    for mode in ("train", "eval"):
        trainer._metrics[mode].clear()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    return loss.item(), metrics["logps/chosen"][0], metrics["logps/rejected"][0]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sigmoid", LossConfig()),
        ("sigmoid_norm", LossConfig(average=True)),
        ("hinge", LossConfig(kind="hinge")),
        ("ipo", LossConfig(kind="ipo", average=True)),
    ],
)
def test_losses_and_log_probabilities_are_trls(
    world: World, name: str, config: LossConfig, tmp_path: Path
) -> None:
    trainer = open_trainer(world, tmp_path, loss=name, reference=world.reference)
    engine = load_engine(ModelSpec(path=str(world.policy), dtype="float32"))
    reference = reference_logps(spec(world.reference), world.pairs)
    for pair in world.pairs:
        answers = (pair.chosen, pair.rejected)
        batch = engine.encode_branches([Branches(pair.image.bytes, pair.question, answers)])
        with torch.no_grad():
            logps = Answers(*engine.branch_logps(batch)[0])
        tokens = Answers(*split_answers(batch.targets_M, batch.counts)[0])
        scored = score_pair(logps, tokens, reference[pair.pair_id], config=config)
        metrics = batch_metrics([scored], TrainConfig(loss=config))
        loss, chosen, rejected = their_numbers(trainer, pair)
        for ours, theirs in (
            (metrics.logps_chosen_P, chosen),
            (metrics.logps_rejected_P, rejected),
        ):
            assert ours.item() == pytest.approx(theirs, abs=1e-5, rel=2e-7)  # float32's last bit
        assert metrics.losses_P.item() == pytest.approx(loss, abs=1e-5, rel=1e-6)  # IPO squares


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(folder), dtype="float32")


def test_three_steps_have_trls_losses_and_weights(world: World, tmp_path: Path) -> None:
    trainer = open_trainer(world, tmp_path / "trl", reference=world.policy)
    trainer.train()
    sink = Folders(tmp_path / "ours")
    train(our_request(world), sink)
    theirs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [metrics.loss for metrics in sink.metrics] == pytest.approx(
        column(theirs, "loss"), abs=1e-4
    )
    norms = [metrics.grad_norm for metrics in sink.metrics]
    assert norms == pytest.approx(column(theirs, "grad_norm"), rel=1e-3)
    trained = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours/checkpoint-3")
    expected = dict(trainer.model.named_parameters())
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-4, rtol=0, msg=name)


def our_request(world: World) -> TrainRequest:
    config = TrainConfig(
        learning_rate=RATE, epochs=3, global_batch_size=4, micro_batch_size=4, warmup_ratio=0.0
    )
    return TrainRequest(
        policy=spec(world.policy),
        base="hub/tiny",
        pairs=world.pairs,
        reflogps=reference_logps(spec(world.policy), world.pairs),
        config=config,
        seed=0,
        steps=(3,),
    )


def column(entries: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(json.loads(json.dumps(entry[name]))) for entry in entries]
