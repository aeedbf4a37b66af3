"""The usual ways of `benchmark_gpu`: transformers as its documentation shows it, on given weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaifv.benchmark_gpu_model import Bench
from rlaifv.images import decode
from rlaifv.models.base import Branches, YesNo


def inputs(bench: Bench, images: Sequence[bytes], questions: Sequence[str]) -> Any:
    """What transformers' own forward takes, padded on the left."""
    texts = [
        bench.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in questions
    ]
    return bench.processor(
        images=[decode(image) for image in images],
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(bench.device, bench.module.dtype)


@torch.inference_mode()
def verdicts(bench: Bench, inputs: Any) -> list[YesNo]:
    logits = bench.module(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    p = logits.float().softmax(-1)
    sums = [p[:, bench.prompter.word_ids(words)].sum(1) for words in (("yes", "Yes"), ("no", "No"))]
    return [YesNo(*row) for row in torch.stack(sums, 1).tolist()]


@torch.inference_mode()
def generate(bench: Bench, inputs: Any, steps: int, samples: int) -> Tensor:
    """New tokens; `samples` 0: greedy."""
    options: dict[str, Any] = {"do_sample": False}
    if samples:
        options = {"do_sample": True, "temperature": 0.7, "top_k": 50}
        options["num_return_sequences"] = samples
        options["min_new_tokens"] = steps
    ids: Tensor = bench.module.generate(**inputs, max_new_tokens=steps, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


class TwoRows(NamedTuple):
    """All chosen and rejected rows in one padded batch, each with its image."""

    inputs: dict[str, Tensor]
    spans: list[tuple[int, int]]
    """Of each row: where its answer starts and ends."""


def two_rows(bench: Bench, pairs: Sequence[Branches]) -> TwoRows:
    """Inputs as trainers make them."""
    prompter, device = bench.prompter, bench.device
    rows, spans = [], []
    for row in pairs:
        prefix = prompter.with_image(prompter.prompt(row.question, row=0), bench.image_tokens)
        for answer in row.answers:
            rows.append([*prefix, *prompter.answer(answer)])
            spans.append((len(prefix), len(rows[-1])))
    width = max(map(len, rows))
    ids = torch.tensor([row + [prompter.pad_id] * (width - len(row)) for row in rows])
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    images = [row.image for row in pairs for _ in row.answers]
    pixels = prompter.pixels(images, range(len(rows)))
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": seen.to(device),
        "pixel_values": pixels.to(device, bench.module.dtype),
    }
    return TwoRows(inputs, spans)


def two_row_logps(bench: Bench, batch: TwoRows) -> list[list[Tensor]]:
    """Per pair and answer, [tokens]."""
    logits = bench.module(**batch.inputs, use_cache=False).logits
    targets = batch.inputs["input_ids"][:, 1:, None]
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, targets).squeeze(2)
    parts = [
        each[start - 1 : end - 1] for each, (start, end) in zip(logps, batch.spans, strict=True)
    ]
    return [parts[i : i + 2] for i in range(0, len(parts), 2)]
