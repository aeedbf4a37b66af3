"""Real photographs through the stages: sizes, modes and names as they come."""

from pathlib import Path

import pytest

from rlaifv.config import PrepareConfig
from rlaifv.records import Answer, Instruction, PreferencePair, Verdict
from tests.jobs_support import DATA, TO_VERIFY, all_rows, make_config, make_run, run_stages
from tests.tiny import make_tiny_llava

PHOTOGRAPHS = DATA / "coco_mini/ccby_29/images"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not here")
def test_photographs_go_from_folder_to_pairs(tmp_path: Path) -> None:
    model = make_tiny_llava(tmp_path / "model")
    config = make_config(PHOTOGRAPHS, model=model, num_shards=2, group_size=8)
    prepare = PrepareConfig(source=str(PHOTOGRAPHS), instructions_per_iteration=29)
    config = config.model_copy(update={"prepare": prepare})
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, (*TO_VERIFY, "pair"))
    instructions = all_rows(run, config, "prepare", Instruction)
    names = {path.name for path in PHOTOGRAPHS.iterdir()}
    assert {row.image_id for row in instructions} == names
    assert len(all_rows(run, config, "sample", Answer)) == 3 * len(names)
    assert all_rows(run, config, "verify", Verdict)
    pairs = all_rows(run, config, "pair", PreferencePair)
    assert pairs
    for row in pairs:
        assert row.image.bytes == (PHOTOGRAPHS / row.image_path).read_bytes()
        assert row.chosen_score > row.rejected_score
