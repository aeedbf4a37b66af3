"""The report's figures are those of the rows, and its curves those that training wrote."""

from pathlib import Path

import pytest

from controller.report.events import MOST_POINTS, read_curves, scalars
from controller.report.examples import pick_pairs
from controller.report.facts import NUM_BINS, read_facts
from rlaifv.store import open_store
from rlaifv.training.curves import TAGS, Curves, StepMetrics
from tests.commands_support import finished_run
from tests.fake_world import NUM_INSTRUCTIONS, NUM_PAIRS, tiny_config


def test_facts_are_those_of_the_rows(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path).store, tiny_config()
    facts, rows = read_facts(run, config, 0, {"i0-1"})
    answers, claims = 3 * NUM_INSTRUCTIONS, 6 * NUM_INSTRUCTIONS
    assert facts.margins == {1: NUM_PAIRS}
    assert facts.claims == {2: answers}
    assert facts.answers == answers
    assert sum(facts.p_yes) == claims
    assert facts.p_yes[NUM_BINS * 9 // 10] == 4 * NUM_INSTRUCTIONS  # 0.9
    assert facts.p_yes[NUM_BINS // 10] == 2 * NUM_INSTRUCTIONS  # 0.1
    assert (facts.accepted, facts.ties) == (4 * NUM_INSTRUCTIONS, 0)
    assert facts.mass == pytest.approx((4 * 1.0 + 2 * 0.9) / 6)
    assert facts.after is not None
    assert facts.after.chosen == facts.after.rejected
    assert facts.before is not None
    assert facts.before.pairs == 2 * NUM_INSTRUCTIONS  # answer 0 against 1 and against 2
    assert {row.instruction_id for row in rows.answers} == {"i0-1"}
    assert (len(rows.answers), len(rows.claims), len(rows.verdicts)) == (3, 6, 6)


def test_examples_are_always_the_same_and_of_different_pictures(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path).store, tiny_config()
    picked = [pick_pairs(run, config, 1, limit=5) for _ in range(2)]
    assert picked[0] == picked[1]
    assert len({one.pair.image_id for one in picked[0]}) == 5
    assert all(one.pair.image.bytes == b"" for one in picked[0])
    assert all(one.picture.startswith("<img") for one in picked[0])


def test_curves_are_those_that_training_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "iteration-0/tensorboard"
    names = StepMetrics._fields
    curves = Curves(folder, start=0)
    for step in range(1, 2 * MOST_POINTS + 1):
        values = {name: float(step + place) for place, name in enumerate(names)}
        curves.add(StepMetrics(step, *(values[name] for name in names[1:])))
    curves.close()
    (file,) = folder.iterdir()
    found = list(scalars(file.read_bytes()))
    assert {one.tag for one in found} == set(TAGS.values())
    assert [one.value for one in found if one.tag == "loss"][:3] == [2.0, 3.0, 4.0]
    loss = next(one for one in read_curves(open_store(str(tmp_path)), 0) if one.tag == "loss")
    assert len(loss.steps) == MOST_POINTS
    assert (loss.steps[0], loss.values[0]) == (1.5, 2.5)
    cut = file.read_bytes()[:-7]
    assert len(list(scalars(cut))) == len(found) - 1
    assert list(scalars(b"\xff" * 100)) == []
