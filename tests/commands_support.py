"""A finished run of the stand-in stages, and the command line as a user meets it."""

import contextlib
import functools
import io
import random
import shutil
import tempfile
from pathlib import Path

from controller.__main__ import main
from controller.places import RunPlace, run_place
from controller.run import Order, drive_run, settle_config
from rlaifv.config import RunConfig
from rlaifv.recipes import Wishes
from tests.fake_world import FakeExecutor, tiny_config

ORDER = Order(
    Wishes(),
    root="runs",
    executor="local",
    workers=0,
    threads=1,
    isolated=False,
    command=("python", "-m", "controller", "run"),
)


def keeping_config(*, lora: bool = False, iterations: int = 2) -> RunConfig:
    """The tiny configuration with the trees of all checkpoints kept."""
    config = tiny_config(lora=lora, iterations=iterations)
    train = config.train.model_copy(update={"keep_unselected": True})
    return config.model_copy(update={"train": train})


def finished_run(root: Path, config: RunConfig | None = None) -> RunPlace:
    """A run that went to its end; made once per configuration, then copied."""
    config = config or tiny_config()
    shutil.copytree(_made_once(config.model_dump_json()), root / config.name)
    return run_place(str(root), config.name)


@functools.cache
def _made_once(config_json: str) -> Path:
    config = RunConfig.model_validate_json(config_json)
    place = run_place(_folder().name, config.name)
    settle_config(place.store, config, grow=True)
    with contextlib.redirect_stdout(io.StringIO()):
        assert go_on(place, config) == 0
    made = Path(_folder().name) / str(len(list(Path(_folder().name).iterdir())))
    place.folder.rename(made)
    return made


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def go_on(place: RunPlace, config: RunConfig) -> int:
    """Drives what is there to its end with the stand-ins."""
    executor = FakeExecutor(place.store, config, rng=random.Random(1))
    return drive_run(ORDER, config, place=place, executor=executor)


def command(*words: str, root: Path | str) -> int:
    """The exit code of a command line."""
    return main([*words, "--root", str(root)])
