"""Stand-ins for the stages: instant, deterministic, and written through the real store."""

import io
import random
from collections.abc import Callable, Iterator, Mapping

from PIL import Image as Pictures

from controller.plan import JobSpec, ShardId, ShardState, Unit
from rlaifv.benchmarks.captions import CaptionGrade
from rlaifv.config import BenchmarkSpec, LoraConfig, ModelSpec, RunConfig, ShardsConfig, TrainConfig
from rlaifv.pipeline import (
    ARTIFACTS,
    STAGES,
    Shard,
    checkpoint_key,
    checkpoint_steps,
    done_key,
    merged_key,
    num_shards,
    part_key,
    respond_shard,
    train_state_key,
)
from rlaifv.records import (
    Answer,
    Checkpoint,
    Choice,
    Claim,
    Grade,
    Image,
    Instruction,
    Merge,
    PreferencePair,
    Record,
    ReferenceLogps,
    Response,
    Verdict,
)
from rlaifv.store import Provenance, Store

NUM_INSTRUCTIONS = 8
NUM_PAIRS = 16
HOSTILE = "<script>alert('x')</script> & \"quotes\" </svg>\u2028"


def tiny_config(*, lora: bool = False, iterations: int = 2, shards: int = 2) -> RunConfig:
    """A configuration whose stages have a few shards."""
    config = RunConfig(
        name="tiny",
        iterations=iterations,
        policy=ModelSpec(path="nowhere"),
        train=TrainConfig(epochs=2, checkpoints_per_epoch=1, lora=LoraConfig() if lora else None),
        shards=ShardsConfig(instructions=shards, reflogp=2, respond=shards),
    )
    benchmarks = (
        BenchmarkSpec(name="selection", path="nowhere", vocabulary="nowhere", use="select"),
        BenchmarkSpec(name="test", path="nowhere", vocabulary="nowhere", use="report"),
    )
    respond = config.respond.model_copy(update={"benchmarks": benchmarks})
    return config.model_copy(update={"respond": respond})


def picture(number: int) -> bytes:
    """A small PNG of one colour."""
    stream = io.BytesIO()
    colour = (37 * number % 256, 91 * number % 256, 180)
    Pictures.new("RGB", (40, 30), colour).save(stream, "PNG")
    return stream.getvalue()


def _mine(count: int, shard: Shard) -> Iterator[int]:
    return iter(range(shard.index, count, shard.count))


def _instructions(shard: Shard, iteration: int) -> Iterator[Record]:
    for n in _mine(NUM_INSTRUCTIONS, shard):
        yield Instruction(
            instruction_id=f"i{iteration}-{n}",
            image_id=f"image-{n}",
            question=f"What is in picture {n}? {HOSTILE}",
            image=Image(bytes=picture(n), path=f"{n}.png"),
            origin_dataset="fake",
            origin_split="{}",
            idx=n,
        )


def _answers(shard: Shard, iteration: int) -> Iterator[Record]:
    for n in _mine(NUM_INSTRUCTIONS, shard):
        for k in range(3):
            yield Answer(
                instruction_id=f"i{iteration}-{n}",
                answer_id=f"i{iteration}-{n}/{k}",
                text=f"There is a cat and {k} dogs. {HOSTILE}",
                seed=k,
                num_tokens=9,
                finish_reason="stop",
            )


def _claims(shard: Shard, iteration: int) -> Iterator[Record]:
    for n in _mine(NUM_INSTRUCTIONS, shard):
        for k in range(3):
            for c, word in enumerate(("cat", "dog")):
                yield Claim(
                    instruction_id=f"i{iteration}-{n}",
                    answer_id=f"i{iteration}-{n}/{k}",
                    claim_id=f"i{iteration}-{n}/{k}/{c}",
                    text=f"There is a {word}. {HOSTILE}",
                    question=f"Is there a {word}?",
                )


def _verdicts(shard: Shard, iteration: int) -> Iterator[Record]:
    for n in _mine(NUM_INSTRUCTIONS, shard):
        for k in range(3):
            for c in range(2):
                yield Verdict(
                    instruction_id=f"i{iteration}-{n}",
                    answer_id=f"i{iteration}-{n}/{k}",
                    claim_id=f"i{iteration}-{n}/{k}/{c}",
                    p_yes=0.9 if c == 0 or k == 0 else 0.1,
                    p_no=0.1 if c == 0 or k == 0 else 0.8,
                )


def _pairs(shard: Shard, iteration: int) -> Iterator[Record]:
    for number in range(NUM_PAIRS):
        n = number % NUM_INSTRUCTIONS
        name = f"i{iteration}-{n}"
        yield PreferencePair(
            ds_name="fake",
            image=Image(bytes=picture(n), path=f"{n}.png"),
            question=f"What is in picture {n}? {HOSTILE}",
            chosen=f"There is a cat and 0 dogs. {HOSTILE}",
            rejected=f"There is a cat and 1 dogs. {HOSTILE}",
            origin_dataset="fake",
            origin_split="{}",
            idx=n,
            image_path=f"{n}.png",
            pair_id=f"{name}/{number}",
            instruction_id=name,
            image_id=f"image-{n}",
            chosen_id=f"{name}/0",
            rejected_id=f"{name}/1",
            chosen_score=0,
            rejected_score=-1,
        )


def _reflogps(shard: Shard, iteration: int) -> Iterator[Record]:
    for number in _mine(NUM_PAIRS, shard):
        yield ReferenceLogps(
            pair_id=f"i{iteration}-{number % NUM_INSTRUCTIONS}/{number}",
            chosen_token_nats=[-1.0],
            rejected_token_nats=[-2.0],
        )


QUESTIONS = [(bench, f"q{n}") for bench in ("selection", "test") for n in range(4)]


def _responses(config: RunConfig, shard: Shard) -> Iterator[Record]:
    ordinal, questions = respond_shard(config, shard)
    step = [0, *checkpoint_steps(config, NUM_PAIRS)][ordinal]
    for number in _mine(len(QUESTIONS), questions):
        bench, question = QUESTIONS[number]
        yield Response(
            benchmark=bench,
            question_id=question,
            step=step,
            text=f"A cat. Step {step}. {HOSTILE}",
            num_tokens=4,
            finish_reason="stop",
        )


def _grade(config: RunConfig, iteration: int, *, step: int, number: int) -> str:
    """An answer that names a dog: it is there more often the longer training goes on."""
    steps = [0, *checkpoint_steps(config, NUM_PAIRS)]
    truth = ["cat", "dog"] if number % 4 < steps.index(step) + iteration else ["cat"]
    found = [("cat", "cat", 1), ("dog", "dog", 3)]
    return CaptionGrade(found=found, truth=truth, num_words=4).model_dump_json()


def _grades(config: RunConfig, shard: Shard, iteration: int) -> Iterator[Record]:
    ordinal, questions = respond_shard(config, shard)
    step = [0, *checkpoint_steps(config, NUM_PAIRS)][ordinal]
    for number in _mine(len(QUESTIONS), questions):
        bench, question = QUESTIONS[number]
        yield Grade(
            benchmark=bench,
            question_id=question,
            step=step,
            judge="fake",
            judge_reply="",
            value=_grade(config, iteration, step=step, number=number),
        )


def run_fake_stage(run: Store, config: RunConfig, shard: ShardId) -> None:
    """Does what the stage would do; raises AssertionError when an input is missing."""
    iteration, stage = shard.iteration, STAGES[shard.stage]
    place = Shard(shard.number, num_shards(config, stage.name))
    key = done_key(iteration, stage.name, place)
    if run.exists(key):
        return
    _assert_inputs(run, config, shard)
    simple: Mapping[str, Callable[[Shard, int], Iterator[Record]]] = {
        "prepare": _instructions,
        "sample": _answers,
        "claim": _claims,
        "verify": _verdicts,
        "pair": _pairs,
        "reflogp": _reflogps,
    }
    if stage.name in simple:
        rows = simple[stage.name](place, iteration)
    elif stage.name == "train":
        rows = iter(list(_train(run, config, iteration)))
    elif stage.name == "merge":
        rows = iter(list(_merge(run, iteration)))
    else:
        rows = (
            _responses(config, place)
            if stage.name == "respond"
            else _grades(config, place, iteration)
        )
    run.write_part(key, rows, record=ARTIFACTS[stage.writes], origin=lambda: _origin(config, shard))


def _assert_inputs(run: Store, config: RunConfig, shard: ShardId) -> None:
    stage, iteration = STAGES[shard.stage], shard.iteration
    if iteration:
        assert run.exists(f"iteration-{iteration - 1}/choice.json")
    for artifact in stage.reads:
        if artifact not in ARTIFACTS or stage.name == "respond":
            continue
        writer = next(one for one in STAGES.values() if one.writes == artifact)
        count = num_shards(config, writer.name)
        same = count == num_shards(config, stage.name)
        for index in [shard.number] if same else range(count):
            assert run.exists(part_key(iteration, artifact, Shard(index, count))), (shard, artifact)
    if stage.name == "respond":
        place = Shard(shard.number, num_shards(config, "respond"))
        if ordinal := respond_shard(config, place).ordinal:
            step = checkpoint_steps(config, NUM_PAIRS)[ordinal - 1]
            assert run.tree_exists(checkpoint_key(iteration, step)), shard


def train_one_checkpoint(run: Store, config: RunConfig, iteration: int, step: int) -> str:
    """Commits the tree of one step, as training does on the way."""
    tree = checkpoint_key(iteration, step)
    if not run.tree_exists(tree):
        with run.new_tree(train_state_key(iteration, step)) as folder:
            (folder / "state").write_text("large")
        with run.new_tree(tree) as folder:
            (folder / "weights").write_text(f"{iteration} {step}")
    return tree


def _train(run: Store, config: RunConfig, iteration: int) -> Iterator[Record]:
    for epoch, step in enumerate(checkpoint_steps(config, NUM_PAIRS), 1):
        tree = train_one_checkpoint(run, config, iteration, step)
        kind = "lora" if config.train.lora else "full"
        yield Checkpoint.model_validate(
            {
                "step": step,
                "epoch": float(epoch),
                "tree": tree,
                "kind": kind,
                "train_loss": 0.5,
                "num_pairs": NUM_PAIRS,
            }
        )


def _merge(run: Store, iteration: int) -> Iterator[Record]:
    choice = run.read_json(f"iteration-{iteration}/choice.json", Choice)
    tree = merged_key(iteration, choice.step)
    if not run.tree_exists(tree):
        with run.new_tree(tree) as folder:
            (folder / "weights").write_text(f"merged {iteration}")
    yield Merge(step=choice.step, tree=tree, max_logit_difference=0.0)


def _origin(config: RunConfig, shard: ShardId) -> Provenance:
    return Provenance(
        stage=shard.stage,
        run=config.name,
        iteration=shard.iteration,
        shard=str(shard.number),
        code_version="0",
        config_sha256="",
        inputs={},
        seconds=0.25,
        seed=config.seed,
    )


class Killed(BaseException):
    """The controller dies here."""


class FakeExecutor:
    """Runs a few waiting shards per turn, in random order, some of which fail."""

    def __init__(
        self,
        run: Store,
        config: RunConfig,
        *,
        rng: random.Random,
        exit_code: Callable[[ShardId, int], int] = lambda shard, attempt: 0,
        unit: Unit = "shard",
    ) -> None:
        self.unit: Unit = unit
        self.started: list[ShardId] = []
        self._run = run
        self._config = config
        self._rng = rng
        self._exit_code = exit_code
        self._states: dict[ShardId, ShardState] = {}

    def submit(self, spec: JobSpec) -> None:
        for index in spec.shards:
            shard = ShardId(spec.iteration, spec.stage.name, index)
            before = self._states.get(shard, ShardState("waiting"))
            assert before.phase == "ended" or before.attempts == 0
            self._states[shard] = before._replace(phase="waiting")

    def states(self) -> Mapping[ShardId, ShardState]:
        return dict(self._states)

    def wait(self, timeout_s: float) -> None:
        waiting = [shard for shard, state in self._states.items() if state.phase == "waiting"]
        for shard in self._rng.sample(waiting, min(len(waiting), 3)):
            self.started.append(shard)
            attempt = self._states[shard].attempts + 1
            code = self._exit_code(shard, attempt)
            if code == 0:
                run_fake_stage(self._run, self._config, shard)
            self._states[shard] = ShardState("ended", attempt, code, f"reason {code}")

    def logs(self, shard: ShardId) -> str:
        return ""

    def close(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._states.clear()
