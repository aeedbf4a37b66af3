"""Recipes, and how a file and `--set` change them."""

from pathlib import Path

import pytest

from rlaifv.config import RunConfig
from rlaifv.errors import ConfigError
from rlaifv.places import local_path
from rlaifv.recipes import RECIPES, Wishes, build_config


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_valid_and_named_after_itself(name: str) -> None:
    config = build_config(Wishes(recipe=name))
    assert config.recipe == name
    assert config == RunConfig.model_validate_json(config.model_dump_json())
    assert config.iterations == 4


def test_the_paper_s_numbers_are_in_the_recipe_of_its_policy() -> None:
    config = build_config(Wishes(recipe="llava15_7b"))
    train = config.train
    assert (train.learning_rate, train.beta, train.epochs) == (5e-7, 0.1, 4)
    assert (train.global_batch_size, train.checkpoints_per_epoch) == (8, 4)
    assert (config.sample.num_answers, config.sample.temperature) == (10, 0.7)
    assert config.prepare.instructions_per_iteration == 4000
    lora = build_config(Wishes(recipe="llava15_7b_lora")).train
    assert lora.lora is not None
    assert (lora.learning_rate, lora.lora.rank, lora.lora.alpha) == (1e-5, 64, 16)


def test_the_paper_s_preset_chooses_on_what_it_reports() -> None:
    config = build_config(Wishes(recipe="paper"))
    assert config.choose.rule == "paper"
    assert [one.kind for one in config.respond.benchmarks] == ["object_halbench", "mmhal"]
    assert {one.use for one in config.respond.benchmarks} == {"select"}


def test_the_12b_labels_its_own_answers() -> None:
    config = build_config(Wishes(recipe="omnilmm_12b"))
    assert config.verify.labeller.path == config.policy.path


def test_the_demo_names_files_of_the_package_only() -> None:
    config = build_config(Wishes())
    benchmarks = config.respond.benchmarks
    paths = [config.policy.path, config.verify.labeller.path, config.prepare.source]
    paths += [path for one in benchmarks for path in (one.path, one.vocabulary or "")]
    folder = local_path("package:rlaifv.demo/x").parent
    assert all(local_path(path).is_relative_to(folder) for path in paths)
    assert [one.use for one in benchmarks] == ["select", "report"]


def test_a_file_changes_the_recipe_and_set_changes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\ntrain:\n  epochs: 1\n  learning_rate: 1e-4\n  lora: {rank: 8}\n")
    config = build_config(Wishes(config_file=file, sets=("train.lora.alpha=2", "train.epochs=5")))
    assert (config.seed, config.train.epochs, config.train.learning_rate) == (3, 5, 1e-4)
    assert config.train.lora is not None
    assert (config.train.lora.rank, config.train.lora.alpha) == (8, 2)


def test_flags_of_their_own_win() -> None:
    wishes = Wishes(sets=("seed=1",), name="other", iterations=2, seed=5)
    config = build_config(wishes)
    assert (config.name, config.iterations, config.seed) == ("other", 2, 5)


def test_set_takes_yaml_values() -> None:
    sets = ("respond.benchmarks=[{name: mine, path: here.parquet}]", "train.lora={}")
    config = build_config(Wishes(sets=sets))
    assert [one.name for one in config.respond.benchmarks] == ["mine"]
    assert config.train.lora is not None
    assert build_config(Wishes(sets=("train.lora.rank=8", "train.lora=null"))).train.lora is None


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(recipe="dem"), "did you mean 'demo'"),
        (Wishes(sets=("pair.max_per_imag=2",)), "did you mean 'pair.max_per_image'"),
        (Wishes(sets=("learning_rate=1",)), "did you mean 'train.learning_rate'"),
        (Wishes(sets=("train={epoch: 1}",)), "did you mean 'train.epochs'"),
        (Wishes(sets=("seed",)), "expected section.key=value"),
        (Wishes(sets=("seed=[",)), "not YAML"),
        (Wishes(sets=("seed=-1",)), "seed: Input should be greater than or equal to 0"),
        (Wishes(sets=("train=3",)), "train: "),
        (Wishes(sets=("respond.benchmarks=[{name: x, pat: y}]",)), "respond.benchmarks.0.pat"),
        (Wishes(name="Not A Name"), "name: "),
        (Wishes(config_file=Path("nowhere.yaml")), "nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_named(wishes: Wishes, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as error:
        build_config(wishes)
    assert error.value.exit_code == 78


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"\xff\xfe", b"a: [\n", b""])
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        build_config(Wishes(config_file=file))
