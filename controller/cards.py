"""What an exported folder says of itself, for people and for the hub."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from controller.doctor import HUB_ID
from rlaifv import __version__
from rlaifv.config import RunConfig
from rlaifv.records import Choice, PreferencePair

PAPER = "https://arxiv.org/abs/2405.17220"
COLUMNS = {
    "ds_name": "data set name, as in the published RLAIF-V-Dataset",
    "image": "encoded picture and where it came from",
    "question": "what was asked",
    "chosen": "the preferred answer",
    "rejected": "the other answer",
    "chosen_score": "minus the number of rejected claims of the chosen answer",
    "rejected_score": "the same of the rejected answer",
}


def dataset_card(config: RunConfig, rows: Mapping[int, int]) -> str:
    """Of pairs; `rows`: how many each iteration has."""
    header = {
        "pretty_name": f"Preference pairs of run {config.name}",
        "task_categories": ["visual-question-answering"],
        "tags": ["preference", "dpo", "rlaif"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": f"iteration_{k}", "path": f"data/iteration-{k}.parquet"}
                    for k in sorted(rows)
                ],
            }
        ],
    }
    columns = [
        f"| `{name}` | {COLUMNS.get(name, 'identity or origin')} |"
        for name in PreferencePair.model_fields
    ]
    counts = [f"| iteration_{k} | {count} |" for k, count in sorted(rows.items())]
    body = [
        f"# Preference pairs of run {config.name}",
        "Answers of a multimodal model to the same picture and question, split into claims that a "
        f"labeller model judged one by one; the answer with fewer rejected claims is `chosen` "
        f"([RLAIF-V]({PAPER})). The texts are written by models: they may be wrong.",
        _facts(
            {
                "instructions": config.prepare.source,
                "policy before training": config.policy.path,
                "labeller": config.verify.labeller.path,
                "answers per question": config.sample.num_answers,
                "labels dealt at random (control)": config.verify.control == "shuffled",
                "pairs per image at most": config.pair.max_per_image,
                "seed": config.seed,
                "written by": f"rlaifv {__version__}",
            }
        ),
        "\n".join(["| split | pairs |", "|---|--:|", *counts]),
        "\n".join(["| column | meaning |", "|---|---|", *columns]),
        "The rights in the pictures and questions are those of the instructions' source; state a "
        "license before you publish this folder.",
    ]
    return _card(header, body)


def model_card(config: RunConfig, choice: Choice, *, tree: str, digest: str) -> str:
    """Of a chosen checkpoint: what it was made from, and what was measured."""
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["dpo", "rlaif"],
    }
    if HUB_ID.fullmatch(config.policy.path):
        header["base_model"] = config.policy.path
    names = sorted(set(choice.metrics) | set(choice.baseline))
    metrics = [
        f"| {_code(name)} | {_number(choice.baseline.get(name))} "
        f"| {_number(choice.metrics.get(name))} |"
        for name in names
    ]
    body = [
        f"# Policy of run {config.name}",
        f"Trained with DPO on preference pairs from AI feedback ([RLAIF-V]({PAPER})).",
        _facts(
            {
                "base model": config.policy.path,
                "labeller": config.verify.labeller.path,
                "checkpoint": tree,
                "tree SHA-256": digest,
                "pairs of the last iteration": choice.num_pairs,
                "learning rate": config.train.learning_rate,
                "beta": config.train.beta,
                "adapters": config.train.lora is not None,
                "seed": config.seed,
                "why this checkpoint": choice.reason,
                "written by": f"rlaifv {__version__}",
            }
        ),
        "\n".join(["| metric | iteration's start | chosen |", "|---|--:|--:|", *metrics])
        if metrics
        else "Nothing was measured.",
        "The license of the base model applies; state it before you publish this folder.",
    ]
    return _card(header, body)


def _card(header: Mapping[str, Any], body: list[str]) -> str:
    front = yaml.safe_dump(dict(header), sort_keys=False)
    return f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"


def _facts(facts: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {_code(v)} |" for k, v in facts.items())])


def _code(value: object) -> str:
    """Any value as inline code: on one line, and without ending the cell or the code."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = json.dumps(text)[1:-1].replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
