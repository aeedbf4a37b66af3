"""Complete configurations by name, and how a file and `--set` change them.

The only place that builds a whole `RunConfig`. Numbers that a recipe does not mention are the
defaults of `rlaifv/config.py`, which carry their own sources.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from rlaifv import demo as demo_world
from rlaifv.config import (
    BenchmarkSpec,
    ChooseConfig,
    ClaimConfig,
    EndpointConfig,
    HeldOutConfig,
    JudgeConfig,
    LoraConfig,
    ModelSpec,
    PairConfig,
    PrepareConfig,
    RespondConfig,
    RunConfig,
    SampleConfig,
    Section,
    ShardsConfig,
    TrainConfig,
    VerifyConfig,
)
from rlaifv.config_values import parse_config
from rlaifv.errors import ConfigError

FULL_TUNING = TrainConfig(gradient_checkpointing=True)
"""Release's `llava15_train.sh`: learning rate 5e-7, beta 0.1, 4 epochs, 8 pairs a step, a
checkpoint every quarter of an epoch (all defaults), and gradient checkpointing."""
LORA_TUNING = FULL_TUNING.model_copy(update={"learning_rate": 1e-5, "lora": LoraConfig()})
"""Release's `llava15_train_lora.sh`: 1e-5; rank 64, alpha 16, dropout 0.05, projector trained."""
OPENAI = "https://api.openai.com/v1"
"""Where the judges of the published scores are asked."""
CLAIM_MODEL = ModelSpec(path="meta-llama/Meta-Llama-3-8B-Instruct", family="text", batch_size=8)
"""The release splits with two fine-tunes of Llama-3-8B (batch 8, bf16) that are not on the hub; the
base they were made from, with our own prompts, stands in."""

HELD_OUT = ChooseConfig(held_out=HeldOutConfig())
"""Not the authors' way: they chose on the benchmarks that they report (recipe `paper`)."""


def demo() -> RunConfig:
    """Drawn scenes, a tiny policy and labeller that ship with the package: minutes on two cores.

    Every hyper-parameter that differs from the paper's differs because the models are tiny:
    learning rates of 7B models do not move them, and few scenes are enough.
    """
    return RunConfig(
        name="demo",
        recipe="demo",
        iterations=4,
        policy=_shipped(demo_world.POLICY),
        prepare=PrepareConfig(
            source=_package(demo_world.INSTRUCTIONS), instructions_per_iteration=300
        ),
        sample=SampleConfig(num_answers=8, temperature=1.0, top_k=0, max_new_tokens=64),
        verify=VerifyConfig(labeller=_shipped(demo_world.LABELLER)),
        pair=PairConfig(pick="closest_length", balance_length=False),
        train=TrainConfig(learning_rate=8e-6, epochs=2, checkpoints_per_epoch=1),
        respond=RespondConfig(
            benchmarks=(
                _scenes("selection", demo_world.SELECTION, use="select"),
                _scenes("test", demo_world.TEST, use="report"),
            ),
            num_beams=1,
            max_new_tokens=64,
        ),
        shards=ShardsConfig(instructions=2, reflogp=2),
    )


def llava15_7b() -> RunConfig:
    """RLAIF-V 7B as in the paper: LLaVA-1.5 7B, labelled by LLaVA-NeXT 34B, full fine-tuning.

    Policy: release, `llava15_train.sh` (in transformers' layout). Labeller: paper, section 3; the
    release's code has OmniLMM-12B in its place. Checkpoints are compared on what `prepare` holds out:
    COCO images where `choose.held_out` names COCO's annotations, else instructions, which the
    labeller judges (docs/benchmarks.md, "Choosing a checkpoint"). Benchmark files cannot be
    shipped: name yours in `respond.benchmarks`.
    """
    return RunConfig(
        name="llava15-7b",
        recipe="llava15_7b",
        policy=ModelSpec(path="llava-hf/llava-1.5-7b-hf"),
        claim=ClaimConfig(model=CLAIM_MODEL),
        train=FULL_TUNING,
        choose=HELD_OUT,
    )


def paper() -> RunConfig:
    """`llava15_7b`, and the authors' way of choosing: on the benchmarks that they report.

    Needs `benchmarks/{object_halbench,mmhal}.jsonl`, `benchmarks/coco`, `benchmarks/synonyms.txt`,
    and OPENAI_API_KEY for the judges of the published scores, whose endpoint is paid for. One of
    them is retired: name its successor with your own `respond.benchmarks`.
    """
    judge = JudgeConfig(url=OPENAI)
    benchmarks = (
        BenchmarkSpec(
            name="object_halbench",
            kind="object_halbench",
            path="benchmarks/object_halbench.jsonl",
            vocabulary="benchmarks/synonyms.txt",
            coco="benchmarks/coco",
            judge=judge,
            use="select",
        ),
        BenchmarkSpec(
            name="mmhal", kind="mmhal", path="benchmarks/mmhal.jsonl", judge=judge, use="select"
        ),
    )
    return llava15_7b().model_copy(
        update={
            "name": "paper",
            "recipe": "paper",
            "respond": RespondConfig(benchmarks=benchmarks),
            "choose": ChooseConfig(rule="paper"),
        }
    )


def llava15_7b_lora() -> RunConfig:
    """The same with adapters (release, `llava15_train_lora.sh`)."""
    return llava15_7b().model_copy(
        update={"name": "llava15-7b-lora", "recipe": "llava15_7b_lora", "train": LORA_TUNING}
    )


VLLM = "http://127.0.0.1:8000/v1"
"""Where `vllm serve` listens unless told otherwise."""


def llava15_7b_minicpmv() -> RunConfig:
    """LLaVA-1.5 7B labelled by MiniCPM-Llama3-V 2.5 (`run_data_pipline_llava15_minicpmv.sh`).

    The labeller's code comes with its weights. Here it is asked behind a server that knows it (vLLM
    at its default port; set `verify.labeller.endpoint.url`); docs/models.md has the other way. The
    release runs it in fp16, one question at a time.
    """
    labeller = ModelSpec(
        path="openbmb/MiniCPM-Llama3-V-2_5",
        family="minicpmv",
        dtype="float16",
        endpoint=EndpointConfig(url=VLLM),
    )
    return llava15_7b().model_copy(
        update={
            "name": "llava15-7b-minicpmv",
            "recipe": "llava15_7b_minicpmv",
            "verify": VerifyConfig(labeller=labeller),
        }
    )


def omnilmm_12b() -> RunConfig:
    """RLAIF-V 12B: OmniLMM-12B labelled by itself (paper, section 3, "self-alignment").

    Training numbers are the paper's, which gives one set for both policies; the release has no
    training script for this model. The repetition penalty is its sampler's.
    """
    model = ModelSpec(path="openbmb/OmniLMM-12B")
    return RunConfig(
        name="omnilmm-12b",
        recipe="omnilmm_12b",
        policy=model,
        sample=SampleConfig(repetition_penalty=1.1),
        claim=ClaimConfig(model=CLAIM_MODEL),
        verify=VerifyConfig(labeller=model),
        train=FULL_TUNING,
        choose=HELD_OUT,
    )


RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (demo, paper, llava15_7b, llava15_7b_lora, llava15_7b_minicpmv, omnilmm_12b)
}


def _package(name: str) -> str:
    return f"package:{demo_world.__name__}/{name}"


def _shipped(name: str) -> ModelSpec:
    """The demo's models are small enough for float32, which is also what CPUs are good at."""
    return ModelSpec(path=_package(name), dtype="float32", batch_size=32)


def _scenes(name: str, path: str, *, use: str) -> BenchmarkSpec:
    return BenchmarkSpec.model_validate(
        {
            "name": name,
            "path": _package(path),
            "vocabulary": _package(demo_world.VOCABULARY),
            "use": use,
        }
    )


class Wishes(NamedTuple):
    """What a user asks for; applied in the order of the fields."""

    recipe: str = "demo"
    config_file: Path | None = None
    """YAML with some of the configuration's sections."""
    sets: tuple[str, ...] = ()
    """`section.key=value`, values in YAML."""
    name: str | None = None
    iterations: int | None = None
    seed: int | None = None


def evaluation(model: str, benchmarks: tuple[BenchmarkSpec, ...]) -> RunConfig:
    """A run that asks one model and grades what it says; decoding is the release's."""
    return RunConfig(
        name="evaluation",
        recipe="evaluation",
        iterations=1,
        stages=("respond", "grade"),
        policy=ModelSpec(path=model),
        respond=RespondConfig(benchmarks=benchmarks),
    )


def training(recipe: str, pairs: str, model: str | None) -> RunConfig:
    """A run that trains one policy on pairs that are there already, with a recipe's numbers.

    Raises ConfigError for an unknown recipe.
    """
    base = _recipe(recipe)
    policy = base.policy if model is None else base.policy.model_copy(update={"path": model})
    return base.model_copy(
        update={
            "iterations": 1,
            "stages": ("reflogp", "train"),
            "policy": policy,
            "prepare": base.prepare.model_copy(update={"source": pairs}),
            "respond": RespondConfig(),
        }
    )


def _recipe(name: str) -> RunConfig:
    if name not in RECIPES:
        raise ConfigError(
            f"--recipe {name}: no such recipe"
            f"{_did_you_mean(name, RECIPES)}; there are: {', '.join(RECIPES)}"
        )
    return RECIPES[name]()


def build_config(wishes: Wishes) -> RunConfig:
    """The configuration of a run.

    Raises ConfigError for an unknown recipe or key (naming the closest one), a file that is not
    YAML, and a value that is not allowed.
    """
    return change_config(_recipe(wishes.recipe), wishes)


def change_config(base: RunConfig, wishes: Wishes) -> RunConfig:
    """`base` with a user's changes, whatever recipe they name; raises ConfigError as above."""
    values = base.model_dump(mode="json")
    sources = [f"recipe {base.recipe}"]
    if wishes.config_file is not None:
        changes = _read_yaml(wishes.config_file)
        _merge(values, changes, source=str(wishes.config_file))
        sources.append(str(wishes.config_file))
    for assignment in wishes.sets:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment}: the value is not YAML: {error}") from error
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        _merge(values, value, source=f"--set {assignment}")
        sources.append("--set")
    own = {"name": wishes.name, "iterations": wishes.iterations, "seed": wishes.seed}
    values |= {key: value for key, value in own.items() if value is not None}
    return parse_config(values, source=" + ".join(dict.fromkeys(sources)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections such as `train:` with their keys")
    return values


def _merge(values: dict[str, Any], changes: Mapping[Any, Any], *, source: str) -> None:
    """Lays `changes` over `values`; a list replaces the whole list."""
    known = dict(_keys(RunConfig))
    for key, value in _leaves(changes):
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{_did_you_mean(key, known)}")
        *path, last = key.split(".")
        inner = values
        for part in path:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}  # an optional section that was off, such as train.lora
            inner = inner[part]
        inner[last] = value


def _leaves(changes: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = dict(_keys(RunConfig))
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and known.get(key, Section) is not None:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section] | None]]:
    """Every dotted key, with its section's type where it is a section."""
    for name, info in section.model_fields.items():
        candidates = (info.annotation, *get_args(info.annotation))
        inner = next(
            (one for one in candidates if isinstance(one, type) and issubclass(one, Section)), None
        )
        if inner is not None and info.annotation is not inner and type(None) not in candidates:
            inner = None  # a list of sections has no dotted keys
        yield f"{prefix}{name}", inner
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _did_you_mean(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if not close:  # the right key in the wrong section
        last = word.rpartition(".")[2]
        close = [key for key in known if key.rpartition(".")[2] == last][:1]
    return f"; did you mean {close[0]!r}?" if close else ""
