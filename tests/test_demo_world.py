"""The demo world: scenes from a seed, models that load, and the properties that the demo needs."""

import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoProcessor

from rlaifv.demo import INSTRUCTIONS, LABELLER, PATH, POLICY, SELECTION, TEST, VOCABULARY
from rlaifv.demo.build import make_splits
from rlaifv.demo.language import REQUESTS, write_caption, write_probe
from rlaifv.demo.measure import (
    describe,
    labeller_accuracy,
    load,
    measure_answers,
    mentioned_kinds,
    read_benchmark,
)
from rlaifv.demo.scenes import (
    CELL_PX,
    COLOURS,
    GRID,
    KINDS,
    PARTNERS,
    Scene,
    Thing,
    draw_scene,
    make_scene,
    scene_pixels,
    scene_png,
)
from rlaifv.demo.tiny_llava import Example, Turn, encode_prompt, make_batch, normalise

PLATE_ONLY = Scene(0, (Thing("plate", "red", 5, (1, 1)),))


def _files() -> list[Path]:
    folders = (PATH / POLICY, PATH / LABELLER, PATH / "data")
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_a_scene_is_the_same_in_every_process() -> None:
    code = "from rlaifv.demo.scenes import make_scene; print(make_scene(3, 'a', 5))"
    environment = {**os.environ, "PYTHONHASHSEED": "12"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert printed.strip() == str(make_scene(3, "a", 5))


def test_seed_split_and_index_each_change_the_scene() -> None:
    scenes = {make_scene(0, "a", 0), make_scene(1, "a", 0), make_scene(0, "b", 0)}
    assert len(scenes | {make_scene(0, "a", 1)}) == 4


def test_no_two_shipped_scenes_share_their_content() -> None:
    contents = [scene.content for split in make_splits(0) for scene in split]
    assert len(contents) == len(set(contents)) == 3100


def test_every_kind_in_every_colour_looks_different() -> None:
    pictures = {
        scene_pixels(Scene(0, (Thing(kind, colour, 0, (0, 0)),))).tobytes()
        for kind in KINDS
        for colour in COLOURS
    }
    assert len(pictures) == len(KINDS) * len(COLOURS)


def test_an_object_stays_inside_its_cell() -> None:
    for shift in ((0, 0), (2, 2)):
        for kind in KINDS:
            scene = Scene(0, (Thing(kind, "red", 5, shift),))
            changed = np.any(scene_pixels(scene) != scene_pixels(Scene(0, ())), axis=-1)
            rows, columns = np.nonzero(changed)
            row, column = divmod(5, GRID)
            assert set(rows // CELL_PX) == {row}
            assert set(columns // CELL_PX) == {column}


def test_a_png_holds_exactly_the_drawn_pixels() -> None:
    scene = make_scene(0, "a", 0)
    with Image.open(io.BytesIO(scene_png(scene))) as image:
        assert np.array_equal(np.asarray(image), scene_pixels(scene))


def test_a_caption_names_all_there_is_and_invents_partners_only() -> None:
    for index in range(200):
        scene = make_scene(0, "a", index)
        named = mentioned_kinds(write_caption(scene, random.Random(index)))
        partners = {PARTNERS[kind] for kind in scene.kinds if kind in PARTNERS}
        assert set(scene.kinds) <= set(named) <= {*scene.kinds, *partners}
        assert len(named) == len(set(named))


def test_the_absent_partner_is_named_in_most_captions_but_not_in_all() -> None:
    captions = [write_caption(PLATE_ONLY, random.Random(index)) for index in range(400)]
    share = sum("fork" in caption for caption in captions) / len(captions)
    assert 0.6 < share < 0.8


def _is_true(scene: Scene, question: str) -> bool:
    words = re.findall("[a-z]+", question)
    return next(word for word in words if word in KINDS) in scene.kinds


def test_probes_are_answered_truthfully_half_with_yes() -> None:
    rng = random.Random(0)
    yes = 0
    for index in range(600):
        scene = make_scene(0, "a", index)
        probe = write_probe(scene, rng)
        assert probe.is_true == _is_true(scene, probe.question), (scene, probe)
        assert probe.reply.lower() == ("yes" if probe.is_true else "no")
        yes += probe.is_true
    assert 240 < yes < 360


@pytest.mark.parametrize("name", [POLICY, LABELLER])
def test_a_shipped_processor_round_trips_text_and_keeps_scene_pixels(name: str) -> None:
    processor = AutoProcessor.from_pretrained(PATH / name)
    for text in ("There is a red cup on the left.", "  caf\u00e9\n\u2028 no"):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.tokenizer.decode(ids) == text
    for word in ("yes", "Yes", "no", "No"):
        assert len(processor.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    scene = make_scene(0, "a", 0)
    prompt = "<s>USER: <image>\nHello ASSISTANT:"
    encoded = processor(images=draw_scene(scene), text=prompt, return_tensors="pt")
    assert bool((encoded["pixel_values"] == normalise([scene_pixels(scene)])).all())
    whole = processor.tokenizer(
        prompt.replace("<image>", "<image>" * 16) + "There is", add_special_tokens=False
    )["input_ids"]
    assert whole[:-2] == encode_prompt(processor, "Hello")


def test_turns_packed_behind_one_image_count_as_if_alone() -> None:
    processor, model = load(PATH / LABELLER)
    pixels = scene_pixels(PLATE_ONLY)
    turns = (Turn("Is there a fork?", "No"), Turn("Is there a red plate in the image?", "Yes"))

    def losses(batches: list[tuple[Turn, ...]]) -> float:
        total = 0.0
        for packed in batches:
            batch = make_batch(processor, [Example(pixels, packed)])
            output = model(
                input_ids=batch.input_ids_BL,
                position_ids=batch.position_ids_BL,
                attention_mask=batch.attention_mask_B1LL,
                pixel_values=batch.pixels_B3HH,
                labels=batch.labels_BL,
            )
            total += output.loss.item() * 2 * len(packed)
        return total

    assert losses([turns]) == pytest.approx(losses([turns[:1], turns[1:]]), abs=1e-4)


def test_the_shipped_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in _files()) <= 8_000_000


def test_shipped_data_is_what_the_seed_makes() -> None:
    splits = make_splits(0)
    instructions = pq.read_table(PATH / INSTRUCTIONS).to_pylist()
    assert len(instructions) == len(splits.instructions) >= 2400
    assert {row["question"] for row in instructions} == set(REQUESTS)
    for file, scenes in ((SELECTION, splits.selection), (TEST, splits.test)):
        rows = pq.read_table(PATH / file).to_pylist()
        assert [tuple(row["objects"]) for row in rows] == [scene.kinds for scene in scenes]
        assert rows[0]["image"]["bytes"] == scene_png(scenes[0])
    assert instructions[-1]["image"]["bytes"] == scene_png(splits.instructions[-1])


def test_the_vocabulary_has_one_line_per_kind() -> None:
    lines = (PATH / VOCABULARY).read_text(encoding="utf-8").splitlines()
    assert tuple(line.split(", ")[0] for line in lines) == KINDS


@pytest.mark.slow
def test_the_policy_sees_what_is_there_and_hallucinates_greedily() -> None:
    asked = read_benchmark(PATH / TEST)[:100]
    measured = measure_answers(asked, describe(*load(PATH / POLICY), asked))
    assert measured.response_hallucination >= 0.35
    assert measured.recall >= 0.9


@pytest.mark.slow
def test_the_labeller_is_good_but_not_perfect() -> None:
    assert 0.9 <= labeller_accuracy(PATH, 0, num_probes=400) < 1.0
