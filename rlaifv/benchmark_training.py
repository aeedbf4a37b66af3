"""`python -m rlaifv.benchmark_training`: what a DPO step costs, ours against the usual layouts.

On a small random LLaVA with the real 576 image tokens, in float32 on whatever device there is. Every
path runs in a process of its own, so that its peak memory is its own.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmark_training")

import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PATHS = {
    "ours": "one row per pair, image features kept, no reference pass",
    "two-row": "one row per answer, no reference pass",
    "trl-step": "TRL's DPOTrainer without its reference pass",
    "trl-whole": "TRL's DPOTrainer as it trains on images: with reference pass",
    "reference": "our reference pass, once per iteration",
}
TARGETS = {"two-row": 1.5, "trl-whole": 2.0}
"""How many times faster than these ours has to be."""
GROWTH = {"words": (25, 50, 100, 200, 400), "pairs": (1, 2, 4, 8)}
"""Words per answer for one pair, and pairs of 50 words in one forward pass."""
VOCABULARY = 32000
WORDS = ("the", "picture", "shows", "a", "small", "red", "cup", "near", "an", "open", "window")


class Work(NamedTuple):
    """How much is measured."""

    folder: Path
    """Of the model; made by `prepare`."""
    pairs: int
    """Per step."""
    words: int
    """Per answer; about two tokens each."""
    steps: int


class Cost(NamedTuple):
    """Of one path."""

    pairs_per_second: float
    peak_megabytes: float


def prepare(folder: Path, *, vocabulary: int) -> None:
    """The model: 7 M parameters in the decoder's layers, 256 in the head per token it knows.

    With LLaVA's vocabulary the head costs as much per token as all layers; with 1,000 it has the
    share that it has in a model of 7B, and what the usual ways waste on it no longer counts.
    """
    from rlaifv.models.random_weights import CHAT_TEMPLATE, Shape, save_random_llava

    shape = Shape(
        hidden=256,
        intermediate=688,
        layers=8,
        heads=8,
        kv_heads=8,
        vocabulary=vocabulary,
        vision_hidden=128,
        vision_layers=6,
        image_size=336,
        initializer_range=0.02,
    )
    answer = "{% if message['role'] == 'assistant' %}{{ message['content'][0]['text'] }}</s>"
    template = CHAT_TEMPLATE.replace("USER: ", answer + "{% else %}USER: ", 1).replace(
        "{% endfor %}{% endfor %} ASSISTANT:", "{% endfor %} ASSISTANT:{% endif %}{% endfor %}"
    )
    save_random_llava(folder, shape, chat_template=template)


def measure(path: str, work: Work) -> Cost:
    """Best step of `work.steps`, after one that warms up."""
    step = {"ours": _ours, "two-row": _two_rows, "reference": _reference}.get(path)
    run = step(work) if step else _trl(work, whole=path == "trl-whole")
    seconds = []
    for _ in range(1 + work.steps):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Cost(work.pairs / min(seconds[1:]), peak)


def _pairs(work: Work) -> list[Any]:
    import io

    from PIL import Image as Picture

    from rlaifv.records import Image, PreferencePair

    pairs = []
    for number in range(work.pairs):
        rng = random.Random(number)
        encoded = io.BytesIO()
        Picture.new("RGB", (640, 480), (rng.randrange(256), 90, 30)).save(encoded, "PNG")
        chosen, rejected = (" ".join(rng.choices(WORDS, k=work.words)) for _ in range(2))
        pair = PreferencePair(
            ds_name="",
            image=Image(bytes=encoded.getvalue()),
            question="What is there?",
            chosen=chosen,
            rejected=rejected,
            origin_dataset="",
            origin_split="{}",
            idx=number,
            image_path="",
            pair_id=str(number),
        )
        pairs.append(pair)
    return pairs


def _spec(work: Work) -> Any:
    from rlaifv.config import ModelSpec

    return ModelSpec(path=str(work.folder), dtype="float32", batch_size=work.pairs)


def _ours(work: Work) -> Callable[[], None]:
    import torch

    from rlaifv.config import TrainConfig
    from rlaifv.training.optimizer import MasterAdamW
    from rlaifv.training.policy import Policy
    from rlaifv.training.processes import Processes

    config, pairs = TrainConfig(), _pairs(work)
    policy = Policy(_spec(work), config, base="")
    updates = MasterAdamW(policy, config, processes=Processes())

    def step() -> None:
        scores = updates.score(pairs)
        logps = scores.split(scores.logps_M)
        deltas = torch.stack([chosen.sum() - rejected.sum() for chosen, rejected in logps])
        updates.backward(-torch.nn.functional.logsigmoid(0.1 * deltas).mean())
        updates.update(1e-6)

    return step


def _two_rows(work: Work) -> Callable[[], None]:
    import torch

    from rlaifv.models import load_trainable
    from rlaifv.training.parts import freeze_all_but_language_and_projector

    engine, rows = load_trainable(_spec(work)), _branches(work)
    freeze_all_but_language_and_projector(engine.module)
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step() -> None:
        for row in rows:
            ((chosen, rejected),) = engine.two_row_logps([row])
            delta = chosen.sum() - rejected.sum()
            torch.autograd.backward(-torch.nn.functional.logsigmoid(0.1 * delta) / len(rows))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def _branches(work: Work) -> list[Any]:
    from rlaifv.models.base import Branches

    pairs = _pairs(work)
    return [Branches(p.image.bytes, p.question, (p.chosen, p.rejected)) for p in pairs]


def _reference(work: Work) -> Callable[[], None]:
    from rlaifv.models import load_model

    model, rows = load_model(_spec(work)), _branches(work)
    return lambda: (model.sequence_logps(rows), None)[1]


def _trl(work: Work, *, whole: bool) -> Callable[[], None]:
    """TRL's own collator, loss and reference model; trains what we train."""
    import io

    import torch
    from datasets import Dataset
    from PIL import Image as Picture
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import DPOConfig, DPOTrainer

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "images": [Picture.open(io.BytesIO(pair.image.bytes))],
            "prompt": message("user", pair.question),
            "chosen": message("assistant", pair.chosen),
            "rejected": message("assistant", pair.rejected),
        }
        for pair in _pairs(work)
    ]
    model = LlavaForConditionalGeneration.from_pretrained(work.folder)
    model.model.vision_tower.requires_grad_(False)
    settings = DPOConfig(
        output_dir=str(work.folder / "trl"), max_length=None, bf16=False, report_to=[],
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        ref_model=LlavaForConditionalGeneration.from_pretrained(work.folder) if whole else None,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(work.folder, backend="pil"),
    )
    if not whole:
        trainer.ref_model, trainer.precompute_ref_logps = None, True
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step() -> None:
        inputs = dict(trainer._prepare_inputs(trainer.data_collator(copy.deepcopy(rows))))
        if not whole:
            zeros = torch.zeros(len(rows), device=trainer.args.device)
            inputs |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        torch.autograd.backward(trainer.compute_loss(trainer.model, inputs))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def _in_a_process(path: str, work: Work) -> Cost | None:
    """None when it cannot be measured here."""
    numbers = (work.pairs, work.words, work.steps)
    words = ["--measure", path, str(work.folder), *map(str, numbers)]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "rlaifv.benchmark_training", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(f"{path}: not measured: {done.stderr.strip().splitlines()[-1:]}\n")
        return None
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def report(work: Work) -> bool:
    """Prints every path's cost; whether ours reaches its targets."""
    costs = {path: _in_a_process(path, work) for path in PATHS}
    ours, reached = costs["ours"], True
    for path, cost in costs.items():
        if cost is None or ours is None:
            continue
        ratio = ours.pairs_per_second / cost.pairs_per_second
        target = TARGETS.get(path)
        reached = reached and (target is None or ratio >= target)
        wanted = f" (at least {target} wanted)" if target else ""
        print(
            f"{path:10} {cost.pairs_per_second:7.3f} pairs/s {cost.peak_megabytes:7.0f} MB peak   "
            f"ours is {ratio:.2f} times as fast{wanted}: {PATHS[path]}"
        )
    return reached and ours is not None


def report_growth(folder: Path) -> None:
    """Prints what our step takes as answers and the pairs of a forward pass grow."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    works = [Work(folder, 1, words, 2) for words in GROWTH["words"]]
    works += [Work(folder, pairs, 50, 2) for pairs in GROWTH["pairs"][1:]]
    for work in works:
        answers = [text for pair in _pairs(work) for text in (pair.chosen, pair.rejected)]
        tokens = sum(len(ids) for ids in tokenizer(answers)["input_ids"]) / len(answers)
        cost = _in_a_process("ours", work)
        if cost is not None:
            print(
                f"{work.pairs} pairs in a pass, {tokens:4.0f} tokens per answer: "
                f"{1 / cost.pairs_per_second:6.2f} s per pair, {cost.peak_megabytes:6.0f} MB peak"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a target is missed."""
    given = flags.benchmark_training().parse_args(argv)
    if given.measure:
        path, folder, *numbers = given.measure
        print(json.dumps(measure(path, Work(Path(folder), *map(int, numbers)))))
        return 0
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        prepare(Path(name), vocabulary=given.vocabulary or VOCABULARY)
        if given.growth:
            report_growth(Path(name))
            return 0
        return 0 if report(Work(Path(name), given.pairs, given.words, given.steps)) else 1


if __name__ == "__main__":
    sys.exit(main())
