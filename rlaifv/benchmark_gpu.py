"""This engine against the usual ways on one GPU: rates, memory, agreement, and the card's limits.

`python -m rlaifv.benchmark_gpu [--json PATH] [--tiny] [--only WORK ...]`. LLaVA-1.5-7B's shape with
random bfloat16 weights, made in place; about five minutes, half of it compilation. All ways
compute with the same weights. The usual ways get their inputs ready-made; ours starts from image
bytes and text. `--tiny` is a model of a few hundred kilobytes, also on a CPU: it shows that
everything runs and agrees, and its rates mean nothing.

The share of the limit is the time that the work needs at the card's own rates, measured in the
same run (a large matrix product, a large copy), divided by the time that it took.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmark_gpu")

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rlaifv import benchmark_gpu_usual as usual
from rlaifv.benchmark_gpu_model import (
    FULL,
    REQUEST,
    SEVEN_B,
    SMALL,
    TINY,
    Bench,
    claims,
    photo,
)
from rlaifv.config import LoraConfig, TrainConfig
from rlaifv.models.base import Branches, Decoding, ImageQuestions, Prompt, YesNo
from rlaifv.models.decoder import Decoder
from rlaifv.models.random_weights import Shape
from rlaifv.training.optimizer import MasterAdamW
from rlaifv.training.parts import recompute_activations
from rlaifv.training.processes import Processes


class Row(NamedTuple):
    """One way of doing one piece of work."""

    work: str
    way: str
    per_second: float
    peak_gb: float
    share_of_limit: float
    difference: float
    """Largest, against ours: of a probability, of a log-probability, or of the loss."""
    same: float
    """Share of equal decisions, or of equal greedy texts."""


def measure_claims(bench: Bench) -> Iterator[Row]:
    """Yes/no questions, three group sizes."""
    for count, num_images, batch in bench.size.claims:
        rows = [ImageQuestions(photo(i), claims(i, count)) for i in range(num_images)]
        model = bench.model(batch)
        calls = bench.size.calls
        took = bench.seconds(functools.partial(ahead, model.queue_yes_no, [rows] * calls)) / calls
        peak, ours = bench.peak_gb(), model.yes_no(rows)
        lengths = [bench.prefix(q) for row in rows for q in row.questions]
        shared = bench.prefix("")
        tokens = num_images * shared + sum(lengths) - shared * len(lengths)
        limit = bench.limit_s(tokens=tokens, read=len(lengths), images=num_images)
        work = f"claims, {count} per image"
        yield Row(work, "ours", len(lengths) / took, peak, limit / took, 0.0, 1.0)
        some = rows[0].questions[:8]
        one = [usual.inputs(bench, [rows[0].image], [question]) for question in some]
        padded = usual.inputs(bench, [rows[0].image] * len(some), some)
        ways = {"one by one": one, "padded rows": [padded]}
        for way, inputs in ways.items():
            seconds = bench.seconds(functools.partial(_all_verdicts, bench, inputs))
            said = _all_verdicts(bench, inputs)
            difference, same = _compare(said, ours[0][: len(some)])
            rate = len(some) / seconds
            yield Row(
                work, way, rate, bench.peak_gb(), limit * rate / len(lengths), difference, same
            )
        between = _compare(said, _all_verdicts(bench, one))
        yield Row(work, "between the two", 0.0, 0.0, 0.0, *between)


def ahead(queue: Callable[[Any], Callable[[], Any]], groups: Sequence[Any]) -> None:
    """As stages do it: the next group is queued before the results of this one are fetched."""
    first, *others = groups
    waiting = queue(first)
    for group in others:
        following = queue(group)
        waiting()
        waiting = following
    waiting()


def _all_verdicts(bench: Bench, inputs: Sequence[Any]) -> list[YesNo]:
    return [verdict for each in inputs for verdict in usual.verdicts(bench, each)]


def _compare(some: Sequence[YesNo], others: Sequence[YesNo]) -> tuple[float, float]:
    a, b = np.array(some), np.array(others)
    same = (a[:, 0] > a[:, 1]) == (b[:, 0] > b[:, 1])
    return float(np.abs(a - b).max()), float(same.mean())


def measure_answers(bench: Bench) -> Iterator[Row]:
    """Samples of prompts; greedy texts are compared, as far as rounding lets them agree."""
    size = bench.size
    decoding = Decoding(size.new_tokens, temperature=0.7, top_k=50)
    prefix = bench.prefix(REQUEST)

    def limit(prompts: int) -> float:
        rows, steps = prompts * size.samples, size.new_tokens
        kv = steps * (prompts * prefix + rows * steps / 2)
        tokens = prompts * prefix + rows * steps
        return bench.limit_s(tokens=tokens, read=rows * steps, images=prompts, kv=kv)

    work = f"answers of {size.new_tokens} tokens, {size.samples} per prompt"
    for count in sorted({1, min(8, size.prompts), size.prompts}):
        seeds = tuple(range(size.samples))
        prompts = [Prompt(photo(i), REQUEST, seeds) for i in range(count)]
        model = bench.model(count)
        queue = functools.partial(model.queue_answer, decoding=decoding)
        took = bench.seconds(functools.partial(ahead, queue, [prompts] * 2), repeats=1) / 2
        made, way = count * size.samples, f"ours, {count} prompts"
        yield Row(work, way, made / took, bench.peak_gb(), limit(count) / took, 0.0, 1.0)
        if count > 8:
            continue
        inputs = usual.inputs(bench, [prompt.image for prompt in prompts], [REQUEST] * count)
        took = bench.seconds(
            functools.partial(usual.generate, bench, inputs, size.new_tokens, size.samples),
            repeats=1,
        )
        peak, greedy = bench.peak_gb(), usual.generate(bench, inputs, 12, 0)
        ours = model.answer([p._replace(seeds=(0,)) for p in prompts], decoding=Decoding(12))
        texts = bench.processor.batch_decode(greedy, skip_special_tokens=True)
        same = np.mean(
            [one.text.startswith(text) for (one,), text in zip(ours, texts, strict=True)]
        )
        way = f"generate, {count} prompts"
        yield Row(work, way, made / took, peak, limit(count) / took, 0.0, float(same))


def _pairs(bench: Bench, count: int) -> list[Branches]:
    text = "There is a small dog near the wooden table and a red cup. I can see a white cat. "
    ends = ("on the left near the blue chair", "on the right near the black lamp")
    return [
        Branches(photo(i), REQUEST, tuple(text * bench.size.sentences + end for end in ends))
        for i in range(count)
    ]


def _pair_limit(bench: Bench, pairs: Sequence[Branches], passes: float) -> float:
    lengths = [len(bench.prompter.answer(answer)) for row in pairs for answer in row.answers]
    tokens = bench.prefix(REQUEST) * len(pairs) + sum(lengths)
    once = bench.limit_s(tokens=tokens * passes, read=sum(lengths) * passes, images=len(pairs))
    return once


def measure_references(bench: Bench) -> Iterator[Row]:
    """Log-probabilities of pairs, without gradients."""
    pairs = _pairs(bench, 8 * bench.size.pairs)
    model = bench.model(2 * bench.size.pairs)
    calls = bench.size.calls
    work = functools.partial(ahead, model.queue_sequence_logps, [pairs] * calls)
    took = bench.seconds(work) / calls
    peak, limit = bench.peak_gb(), _pair_limit(bench, pairs, 1)
    yield Row("reference log-probs", "ours", len(pairs) / took, peak, limit / took, 0.0, 1.0)
    some = pairs[: bench.size.pairs]
    ours = np.concatenate([part for row in model.sequence_logps(some) for part in row])
    batch = usual.two_rows(bench, some)
    with torch.inference_mode():
        took = bench.seconds(lambda: usual.two_row_logps(bench, batch))
        theirs = torch.cat([part for row in usual.two_row_logps(bench, batch) for part in row])
    difference = float(np.abs(ours - theirs.cpu().numpy()).max())
    rate, share = len(some) / took, limit / len(pairs) * len(some) / took
    yield Row("reference log-probs", "two rows", rate, bench.peak_gb(), share, difference, 1.0)


def measure_training(bench: Bench) -> Iterator[Row]:
    """Forward and backward pass of pairs; the optimiser is not in it."""
    layers = bench.module.get_decoder().layers
    for recompute in (False, True):
        pairs = _pairs(bench, bench.size.pairs * (2 if recompute else 1))
        model = bench.model(len(pairs))
        if recompute:
            recompute_activations(bench.module)
        layers.train()
        batch = model.encode_branches(pairs)
        padded = usual.two_rows(bench, pairs)
        ways: dict[str, Callable[[], list[list[Tensor]]]] = {
            "ours": functools.partial(model.branch_logps, batch),
            "two rows": functools.partial(usual.two_row_logps, bench, padded),
        }
        limit = _pair_limit(bench, pairs, 4 if recompute else 3)
        losses: dict[str, float] = {}
        for way, logps in ways.items():
            took = bench.seconds(functools.partial(_step, bench, logps))
            losses[way] = _step(bench, logps)
            row = (len(pairs) / took, bench.peak_gb(), limit / took)
            work = f"{len(pairs)} pairs, forward and backward"
            work += ", recomputing" if recompute else ""
            yield Row(work, way, *row, abs(losses[way] - losses["ours"]), 1.0)
        bench.module.zero_grad(set_to_none=True)
        layers.eval()
    for layer in layers:
        layer.gradient_checkpointing = False


def _step(bench: Bench, logps: Callable[[], list[list[Tensor]]]) -> float:
    bench.module.zero_grad(set_to_none=True)
    loss = _loss(logps())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def _loss(logps: list[list[Tensor]]) -> Tensor:
    margins = [chosen.sum() - rejected.sum() for chosen, rejected in logps]
    return -logsigmoid(0.1 * torch.stack(margins)).mean()


class _Adapted(nn.Module):
    """What the optimiser asks of a policy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def trainable(self) -> dict[str, nn.Parameter]:
        named = self.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


def measure_lora(bench: Bench) -> Iterator[Row]:
    """Steps of the recipe's LoRA with the trainer's own optimiser; the adapters stay in place."""
    from rlaifv.training import adapters  # PEFT takes seconds to import

    config = TrainConfig(lora=LoraConfig(), micro_batch_size=bench.size.pairs)
    policy: Any = _Adapted(adapters.attach(bench.module, LoraConfig(), base="random"))
    updates = MasterAdamW(policy, config, processes=Processes())
    pairs = _pairs(bench, bench.size.pairs)
    model = bench.model(len(pairs))
    batch = model.encode_branches(pairs)
    bench.module.get_decoder().layers.train()

    def step() -> None:
        updates.backward(_loss(model.branch_logps(batch)))
        updates.update(1e-5)

    took = bench.seconds(step)
    limit = _pair_limit(bench, pairs, 2) / took  # no gradients of the frozen matrices
    work = f"{len(pairs)} pairs, LoRA step with AdamW"
    yield Row(work, "ours", len(pairs) / took, bench.peak_gb(), limit, 0.0, 1.0)


def measure_exactness(bench: Bench) -> Iterator[Row]:
    """Loss and gradient of a small float32 model, one line against full rows."""
    shape = SMALL if bench.device.type == "cuda" else Shape()
    small = Bench(shape, TINY, bench.device, torch.float32)
    pairs, model = _pairs(small, 3), small.model(3)
    weights = [
        small.module.model.multi_modal_projector.linear_1.weight,
        small.module.get_decoder().layers[0].self_attn.k_proj.weight,
    ]
    batch = model.encode_branches(pairs)
    ours, plain = _loss(model.branch_logps(batch)), _loss(model.two_row_logps(pairs))
    gradients = [torch.autograd.grad(loss, weights) for loss in (ours, plain)]
    for name, one, other in zip(("projector", "keys"), *gradients, strict=True):
        relative = float((one - other).norm() / other.norm())
        yield Row(f"float32 gradient, {name}", "relative difference", 0, 0, 0, relative, 1.0)
    yield Row("float32 loss", "difference", 0, 0, 0, abs((ours - plain).item()), 1.0)


WORKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "claims": measure_claims,
    "answers": measure_answers,
    "references": measure_references,
    "training": measure_training,
    "exactness": measure_exactness,
    "lora": measure_lora,
}


def describe(bench: Bench) -> dict[str, Any]:
    """The machine and its ceilings."""
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "in_lines": Decoder(bench.module).in_lines,
        "matmul_tflops": bench.ceilings.flop / 1e12,
        "copy_tb_per_s": bench.ceilings.bytes / 1e12,
        "prompt_tokens": bench.prefix(REQUEST),
    }


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row.work:44} {row.way:22} {row.per_second:9.1f} /s {row.peak_gb:6.1f} GB "
        f"{100 * row.share_of_limit:4.0f} % of limit, diff {row.difference:.1e}, same {row.same:.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = flags.benchmark_gpu().parse_args(arguments)
    works = options.only or list(WORKS)
    if unknown := set(works) - set(WORKS):
        there = ", ".join(WORKS)
        flags.benchmark_gpu().error(f"--only {' '.join(sorted(unknown))}: expected some of {there}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, size = (Shape(), TINY) if options.tiny else (SEVEN_B, FULL)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(shape, size, device, dtype)
    facts = describe(bench)
    print(json.dumps(facts), flush=True)
    rows = []
    for work in works:
        for row in WORKS[work](bench):
            rows.append(row)
            print(line(row), flush=True)
            if options.out:
                every = {**facts, "rows": [each._asdict() for each in rows]}
                options.out.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
