"""Shared prefixes against the usual ways, side by side in one process: time and agreement.

`python -m rlaifv.benchmark_kernels [--json]`. A small LLaVA with random weights and the 576 image
tokens of the real one; seconds are CPU seconds of one thread. About half a minute.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmark_kernels")

import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from rlaifv.config import ModelSpec
from rlaifv.images import decode
from rlaifv.models import load_trainable
from rlaifv.models.base import Branches, Decoding, ImageQuestions, Prompt, YesNo
from rlaifv.models.branches import TrainableModel
from rlaifv.models.random_weights import Shape, save_random_llava

SMALL = Shape(
    hidden=384,
    intermediate=1024,
    layers=6,
    heads=8,
    kv_heads=8,
    vision_hidden=192,
    vision_layers=4,
    image_size=336,
    initializer_range=0.1,
)
NUM_CLAIMS = 12
NUM_ANSWERS = 10
NEW_TOKENS = 24
THINGS = ("cup", "dog", "chair", "lamp", "cat", "bottle", "table", "window", "person", "plate")
COLOURS = ("red", "blue", "green")
REQUEST = "Describe the image in detail."

T = TypeVar("T")


class Line(NamedTuple):
    """One way of doing one piece of work."""

    work: str
    way: str
    cpu_s: float
    lm_tokens: int
    """Token positions that the language model computed."""
    times_ours: float
    """Its CPU seconds divided by ours."""
    largest_difference: float
    """Against ours: of a probability, of generated texts (share), or of the loss."""
    same_decisions: bool


class _Measured(NamedTuple):
    way: str
    cpu_s: float
    lm_tokens: int
    value: Any


class _Peer:
    """transformers as its documentation shows it."""

    def __init__(self, folder: Path, image: bytes) -> None:
        self.module: Any = LlavaForConditionalGeneration.from_pretrained(str(folder)).eval()
        self.processor: Any = AutoProcessor.from_pretrained(str(folder), backend="pil")
        self._image = image

    def inputs(self, questions: Sequence[str]) -> Any:
        texts = []
        for question in questions:
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            turn = [{"role": "user", "content": parts}]
            texts.append(self.processor.apply_chat_template(turn, add_generation_prompt=True))
        return self.processor(
            images=[decode(self._image) for _ in texts],
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )

    @torch.inference_mode()
    def verdicts(self, questions: Sequence[str]) -> list[YesNo]:
        logits = self.module(**self.inputs(questions), logits_to_keep=1, use_cache=False).logits
        ids = self.processor.tokenizer.convert_tokens_to_ids(["yes", "Yes", "no", "No"])
        p = logits[:, -1].float().softmax(-1)[:, ids]
        return [YesNo(*row) for row in torch.stack([p[:, :2].sum(1), p[:, 2:].sum(1)], 1).tolist()]

    @torch.inference_mode()
    def answers(self, count: int, *, sample: bool = True) -> list[str]:
        inputs = self.inputs([REQUEST])
        ids = self.module.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=sample,
            num_return_sequences=count,
            **({"temperature": 0.7} if sample else {}),
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return texts


def _measure(way: str, module: Any, work: Callable[[], T]) -> _Measured:
    """Runs some work once, counting what the language model sees."""
    tokens = 0

    def seen(_module: Any, _args: Any, options: dict[str, Any], _output: Any) -> None:
        nonlocal tokens
        tokens += options["inputs_embeds"].shape[0] * options["inputs_embeds"].shape[1]

    handle = module.get_decoder().register_forward_hook(seen, with_kwargs=True)
    start = time.process_time()
    value = work()
    cpu_s = time.process_time() - start
    handle.remove()
    return _Measured(way, cpu_s, tokens, value)


def _lines(
    work: str,
    measured: Sequence[_Measured],
    compare: Callable[[Any, Any], tuple[float, bool]],
) -> list[Line]:
    ours = measured[0]
    return [
        Line(work, m.way, m.cpu_s, m.lm_tokens, m.cpu_s / ours.cpu_s, *compare(ours.value, m.value))
        for m in measured
    ]


def _verdicts_differ(ours: list[YesNo], other: list[YesNo]) -> tuple[float, bool]:
    largest = float(np.abs(np.array(ours) - np.array(other)).max())
    same = all((a.p_yes > a.p_no) == (b.p_yes > b.p_no) for a, b in zip(ours, other, strict=True))
    return largest, same


def measure_claims(model: TrainableModel, peer: _Peer, image: bytes) -> list[Line]:
    """Yes/no questions about one image."""
    claims = [(colour, thing) for thing in THINGS for colour in COLOURS][:NUM_CLAIMS]
    questions = [f"Is there a {c} {t} in the image? Please answer yes or no." for c, t in claims]
    measured = [
        _measure(
            "one prefix",
            model.module,
            lambda: model.yes_no([ImageQuestions(image, tuple(questions))])[0],
        ),
        _measure("one by one", peer.module, lambda: [peer.verdicts([q])[0] for q in questions]),
        _measure("padded rows", peer.module, lambda: peer.verdicts(questions)),
    ]
    return _lines(f"{NUM_CLAIMS} claims of an image", measured, _verdicts_differ)


def measure_answers(model: TrainableModel, peer: _Peer, image: bytes) -> list[Line]:
    """Samples of one prompt. Sampled texts have no counterpart; the greedy one is compared."""
    prompt = Prompt(image, REQUEST, tuple(range(NUM_ANSWERS)))
    decoding = Decoding(NEW_TOKENS, temperature=0.7, top_k=50)
    ((greedy,),) = model.answer([Prompt(image, REQUEST)], decoding=Decoding(NEW_TOKENS))
    same = [greedy.text] == peer.answers(1, sample=False)

    def compare(_ours: object, _other: object) -> tuple[float, bool]:
        return float(not same), same

    measured = [
        _measure("one prefix", model.module, lambda: model.answer([prompt], decoding=decoding)),
        _measure("one by one", peer.module, lambda: [peer.answers(1) for _ in range(NUM_ANSWERS)]),
        _measure("generate x 10", peer.module, lambda: peer.answers(NUM_ANSWERS)),
    ]
    return _lines(f"{NUM_ANSWERS} answers of {NEW_TOKENS} tokens", measured, compare)


def measure_pair(model: TrainableModel, image: bytes) -> list[Line]:
    """Forward and backward pass of one preference pair."""
    model.module.model.vision_tower.requires_grad_(False)
    sentences = [f"There is a {c} {t} near the window." for t in THINGS for c in COLOURS]
    pair = [Branches(image, REQUEST, (" ".join(sentences[:8]), " ".join(sentences[8:15])))]

    def step(logps: Callable[[], list[list[Tensor]]]) -> float:
        model.module.zero_grad(set_to_none=True)
        ((chosen, rejected),) = logps()
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen.sum() - rejected.sum()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def compare(ours: float, other: float) -> tuple[float, bool]:
        return abs(ours - other), abs(ours - other) < 1e-4

    measured = [
        _measure(
            "one row",
            model.module,
            lambda: step(lambda: model.branch_logps(model.encode_branches(pair))),
        ),
        _measure("two rows", model.module, lambda: step(lambda: model.two_row_logps(pair))),
    ]
    return _lines("a pair, forward and backward", measured, compare)


def run(shape: Shape = SMALL) -> list[Line]:
    """Every piece of work in every way, each after a warm-up."""
    transformers_logging.disable_progress_bar()
    size = shape.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        path = save_random_llava(Path(folder), shape)
        model = load_trainable(ModelSpec(path=str(path), dtype="float32"))
        peer = _Peer(path, image)
        model.yes_no([ImageQuestions(image, (REQUEST,))])
        peer.verdicts([REQUEST])
        return [
            *measure_claims(model, peer, image),
            *measure_answers(model, peer, image),
            *measure_pair(model, image),
        ]


def table(lines: Sequence[Line]) -> str:
    """The lines for people."""
    header = (
        f"{'work':30} {'way':14} {'CPU s':>8} {'LM tokens':>10} {'x ours':>7} {'largest diff':>13}"
    )
    rows = [
        f"{line.work:30} {line.way:14} {line.cpu_s:8.2f} {line.lm_tokens:10d} "
        f"{line.times_ours:7.1f} {line.largest_difference:13.1e} "
        f"{'same' if line.same_decisions else 'DIFFERENT'}"
        for line in lines
    ]
    return "\n".join([header, *rows])


def main() -> None:
    options = flags.benchmark_kernels().parse_args()
    torch.set_num_threads(1)
    lines = run()
    print(
        json.dumps([line._asdict() for line in lines], indent=1) if options.json else table(lines)
    )


if __name__ == "__main__":
    main()
