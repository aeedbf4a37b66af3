"""Training of the two tiny models from scratch: first to see, then to speak."""

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from rlaifv.demo.language import (
    write_caption,
    write_inventory,
    write_probe,
    write_request,
)
from rlaifv.demo.scenes import KINDS, Content, Scene, make_scene, scene_pixels
from rlaifv.demo.tiny_llava import (
    IGNORED,
    NUM_PATCHES,
    TEXT_WIDTH,
    Example,
    Turn,
    make_batch,
    make_model,
    normalise,
)

log = logging.getLogger(__name__)

SEEING_RATE = 2.5e-3
TOWER_BATCH_SIZE = 32
WARM_UP_STEPS = 100


class Lesson(NamedTuple):
    """How one model is taught."""

    name: str
    """Also names the scenes: no two lessons share one."""
    write: Callable[[Scene, random.Random], Example]
    num_steps: int
    batch_size: int
    """Scenes a step."""
    learning_rate: float


def caption_example(scene: Scene, rng: random.Random) -> Example:
    """A request for a description and an answer with the planted hallucinations."""
    turn = Turn(write_request(rng), write_caption(scene, rng))
    return Example(scene_pixels(scene), (turn,))


def inventory_example(scene: Scene, rng: random.Random) -> Example:
    """Two lists of what is there and what is not."""
    turns = (Turn(*write_inventory(scene, rng)), Turn(*write_inventory(scene, rng)))
    return Example(scene_pixels(scene), turns)


def probe_example(scene: Scene, rng: random.Random) -> Example:
    """Yes/no questions with their true answers, and one inventory."""
    probes = [write_probe(scene, rng) for _ in range(6)]
    turns = [Turn(probe.question, probe.reply) for probe in probes]
    return Example(scene_pixels(scene), (*turns, Turn(*write_inventory(scene, rng))))


INVENTORY_LESSON = Lesson("inventory", inventory_example, 1000, batch_size=16, learning_rate=1e-3)
"""Both models start with it: every noun of the list is a dense lesson in finding its patch. From
yes and no alone, that takes thousands of steps."""

POLICY_LESSON = Lesson("policy", caption_example, 2000, batch_size=32, learning_rate=2.5e-3)
LABELLER_LESSON = Lesson("labeller", probe_example, 700, batch_size=16, learning_rate=6e-4)
TOWER_STEPS = 600


def training_scenes(seed: int, split: str, reserved: frozenset[Content]) -> Iterator[Scene]:
    """Endless scenes of a split without those that another split holds."""
    scenes = (make_scene(seed, split, index) for index in itertools.count())
    return (scene for scene in scenes if scene.content not in reserved)


def teach_to_see(
    processor: LlavaProcessor, seed: int, reserved: frozenset[Content]
) -> LlavaForConditionalGeneration:
    """A model that sees but cannot speak: each patch looks like the words for what is in it.

    Trains the vision tower, the projector and the word embeddings, so that a projected patch has
    its highest dot product with the word for its object, and its place in the grid can be read
    off. This is LLaVA's alignment stage (after CLIP's training); without it
    the labeller does not learn within thousands of steps which patch a noun means.
    """
    torch.manual_seed(seed)
    model = make_model(processor)
    place_head = nn.Linear(TEXT_WIDTH, NUM_PATCHES)
    scenes = training_scenes(seed, "tower", reserved)
    embeddings = model.get_input_embeddings()
    tokens = [f"\u0120{kind}" for kind in KINDS]
    kind_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(tokens))
    cells_BP = torch.arange(NUM_PATCHES).expand(TOWER_BATCH_SIZE, -1)

    def step_loss() -> torch.Tensor:
        batch = list(itertools.islice(scenes, TOWER_BATCH_SIZE))
        kinds_BP = torch.zeros((TOWER_BATCH_SIZE, NUM_PATCHES), dtype=torch.long)
        for row, scene in enumerate(batch):
            for thing in scene.things:
                kinds_BP[row, thing.cell] = KINDS.index(thing.kind) + 1
        pixels_B3HH = normalise([scene_pixels(scene) for scene in batch])
        patches = model.model.get_image_features(pixel_values=pixels_B3HH).pooler_output
        patches_BPD = torch.stack(patches)
        # An empty patch is like no noun: its class has the logit 0.
        kind_logits_BPK = nn.functional.pad(patches_BPD @ embeddings(kind_ids).T, (1, 0))
        losses = [
            nn.functional.cross_entropy(logits_BPK.flatten(0, 1), truth_BP.flatten())
            for logits_BPK, truth_BP in (
                (kind_logits_BPK, kinds_BP),
                (place_head(patches_BPD), cells_BP),
            )
        ]
        return torch.stack(losses).sum()

    _optimise(
        "eyes",
        [*model.parameters(), *place_head.parameters()],
        step_loss,
        (TOWER_STEPS, SEEING_RATE),
    )
    model.lm_head.weight.data.copy_(embeddings.weight.data)
    return model


def teach(
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    lesson: Lesson,
    seed: int,
    reserved: frozenset[Content],
) -> None:
    """Teach a lesson to a model that sees."""
    model.train()
    scenes = training_scenes(seed, lesson.name, reserved)
    rng = random.Random(f"{seed}/{lesson.name}")

    def step_loss() -> torch.Tensor:
        examples = [
            lesson.write(scene, rng) for scene in itertools.islice(scenes, lesson.batch_size)
        ]
        batch = make_batch(processor, examples)
        states_BLD = model.model(
            input_ids=batch.input_ids_BL,
            position_ids=batch.position_ids_BL,
            attention_mask=batch.attention_mask_B1LL,
            pixel_values=batch.pixels_B3HH,
        ).last_hidden_state
        # The vocabulary is a sixth of the work: only where an answer is due. N: answer tokens.
        next_BL = nn.functional.pad(batch.labels_BL[:, 1:], (0, 1), value=IGNORED)
        is_due_BL = next_BL != IGNORED
        logits_NV = model.lm_head(states_BLD[is_due_BL])
        loss = nn.functional.cross_entropy(logits_NV, next_BL[is_due_BL])
        return loss

    _optimise(
        lesson.name, list(model.parameters()), step_loss, (lesson.num_steps, lesson.learning_rate)
    )
    model.eval()


def _optimise(
    name: str,
    parameters: list[nn.Parameter],
    step_loss: Callable[[], torch.Tensor],
    plan: tuple[int, float],
) -> None:
    """AdamW with warm-up and a cosine to zero; plan is the number of steps and the highest rate."""
    num_steps, learning_rate = plan
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        return (
            min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(num_steps):
        loss = step_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == num_steps - 1:
            log.info("%s: step %d of %d, loss %.4f", name, step + 1, num_steps, loss.item())
