"""What a judge will be asked at most, before a model has answered anything."""

from collections.abc import Iterator

from rlaifv.benchmarks import mmhal, object_halbench, refomb
from rlaifv.benchmarks.files import read_rows, text_field
from rlaifv.benchmarks.judge import CHARACTERS_PER_TOKEN, Estimate
from rlaifv.benchmarks.prompts import (
    MMHAL,
    OBJECTS,
    REFOMB,
    REFOMB_HALLUCINATION,
    REFOMB_HALLUCINATION_SYSTEM,
    REFOMB_SYSTEM,
    Prompt,
    load_prompt,
)
from rlaifv.config import BenchmarkSpec, JudgeConfig
from rlaifv.places import local_path

_PUBLISHED = {
    "object_halbench": (OBJECTS, object_halbench.MAX_TOKENS, 1),
    "mmhal": (MMHAL, mmhal.MAX_TOKENS, 1),
    "refomb": (REFOMB, refomb.MAX_TOKENS, refomb.REPEATS),
}
"""Prompt, tokens of a reply at most, and judgings unless the configuration says otherwise."""


def estimate(spec: BenchmarkSpec, *, answer_tokens: int) -> Estimate | None:
    """Of one model's answers of at most so many tokens, at four characters per token and without
    repeated requests; None without a judge."""
    judge = spec.judge
    if judge is None or spec.kind not in _PUBLISHED or spec.mode not in (None, "judge"):
        return None
    own, published, usual = _PUBLISHED[spec.kind]
    prompt = load_prompt(own, local_path(judge.prompt) if judge.prompt else None)
    limit = judge.max_tokens or published
    answer = answer_tokens * CHARACTERS_PER_TOKEN
    sizes = list(_sizes(spec, judge, prompt, answer, limit * CHARACTERS_PER_TOKEN))
    repeats = judge.repeats or usual
    requests = repeats * len(sizes)
    inputs, outputs = repeats * sum(sizes) // CHARACTERS_PER_TOKEN, requests * limit
    cost = None
    if judge.input_price is not None and judge.output_price is not None:
        cost = (inputs * judge.input_price + outputs * judge.output_price) / 1e6
    return Estimate(requests, inputs, outputs, cost)


def _sizes(
    spec: BenchmarkSpec, judge: JudgeConfig, prompt: Prompt, answer: int, review: int
) -> Iterator[int]:
    """Characters of each request of one judging."""
    frame = len(prompt.template)
    if spec.kind == "object_halbench":
        for row in read_rows(local_path(spec.path)):
            yield frame + len(text_field(row, "question", "prompt")) + answer
    elif spec.kind == "mmhal":
        for rated in mmhal.read_items(spec.path):
            yield frame + sum(map(len, rated)) + answer
    else:
        second = len(REFOMB_HALLUCINATION.template) + len(REFOMB_HALLUCINATION_SYSTEM) + review
        for item in refomb.read_items(spec.path):
            told = len(item.description) + len(item.question) + len(item.answer)
            first = frame + len(REFOMB_SYSTEM) + told + answer
            yield from [first] * (2 if judge.swap else 1)
            yield second
