"""Scoring of files that were made elsewhere: one function per benchmark, one result format.

A result has `benchmark`, `mode`, `overall`, the graded rows (`sentences` for Object HalBench, else
`items`), `judge` (who graded and what it cost) and `files` (digests of the inputs).
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, cast

from rlaifv.benchmarks import amber, mmhal, refomb
from rlaifv.benchmarks.base import Metrics, over_repeats
from rlaifv.benchmarks.files import read_rows, text_field
from rlaifv.benchmarks.language import NltkTools
from rlaifv.benchmarks.prompts import MMHAL, REFOMB, load_prompt
from rlaifv.benchmarks.replies import ReviewFiles
from rlaifv.benchmarks.score_halbench import score_object_halbench
from rlaifv.benchmarks.scoring import (
    Options,
    Result,
    grade,
    judge_report,
    prompt_file,
    required_replier,
)
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import Grade, Record

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


def score(name: str, options: Options) -> Result:
    """The result of benchmark `name`. Raises ConfigError for flags that do not go together."""
    scorers: dict[str, Callable[[Options], Result]] = {
        "object_halbench": score_object_halbench,
        "mmhal": score_mmhal,
        "refomb": score_refomb,
        "amber": score_amber,
    }
    if name not in scorers:
        raise ConfigError(f"benchmark {name!r} is not known; expected one of {sorted(scorers)}")
    if options.reviews and options.judge:
        raise ConfigError("--reviews and --judge exclude each other")
    return scorers[name](options) | {"files": options.files}


def score_mmhal(options: Options) -> Result:
    """Answers by position; `--ground-truth` (the benchmark's records) with `--judge` only."""
    replier = required_replier(options, "mmhal", mmhal.JUDGE_MODEL, mmhal.MAX_TOKENS)
    items: list[mmhal.Item] | None = None
    if options.judge is not None:
        if options.ground_truth is None:
            raise ConfigError("mmhal: --judge needs --ground-truth with the benchmark's 96 records")
        items = mmhal.read_items(str(options.ground_truth))
    answers = []
    for row in read_rows(options.answers):
        mmhal.check_type(row)
        if items is not None and row.number >= len(items):
            raise ArtifactError(f"{row.where}: more answers than the {len(items)} questions")
        text = mmhal.clean_answer(text_field(row, "answer", "text", "model_answer"))
        item = items[row.number] if items is not None else None
        answers.append(mmhal.RatedAnswer(row.where, row.number, text, item))
    if items is not None and len(answers) != len(items):
        raise ArtifactError(f"{options.answers}: {len(answers)} answers to {len(items)} questions")
    if isinstance(replier, ReviewFiles):
        replier.expect(len(answers))
    rater = mmhal.Rater(replier, load_prompt(MMHAL, prompt_file(options)))
    rated = list(rater.rate(answers))
    grades = [grade(one.number, repeat, value, reply) for one, repeat, value, reply in rated]
    metrics = over_repeats(grades, _of(mmhal.RatingGrade, mmhal.rating_metrics))
    types = {name: metrics.pop(f"score_{name}") for name in mmhal.TYPES}
    overall = {"hallucination_rate": metrics["response_hallucination"], **metrics}
    return {
        "benchmark": "mmhal",
        "mode": "judge",
        "overall": overall | {"items": len(answers)},
        "types": types,
        "judge": judge_report(rater.identity, replier),
        "items": [
            value.model_dump()
            | {"repeat": repeat, "question_type": mmhal.TYPES[one.number % len(mmhal.TYPES)]}
            | {"gpt4_review": reply}
            for one, repeat, value, reply in rated
        ],
    }


def score_refomb(options: Options) -> Result:
    """Answers joined with the dev file in `--ground-truth`; by position with `--reviews` alone."""
    replier = required_replier(options, "refomb", refomb.JUDGE_MODEL, refomb.MAX_TOKENS)
    if options.ground_truth is None and options.judge is not None:
        raise ConfigError("refomb: --judge needs --ground-truth with the dev file")
    swap = options.judge is not None and options.judge.swap
    hallucination = replier if options.judge else None
    if options.hallucination_reviews:
        hallucination = ReviewFiles(options.hallucination_reviews)
    comparer = refomb.Comparer(
        replier,
        hallucination=hallucination,
        prompt=load_prompt(REFOMB, prompt_file(options)),
        swap=swap,
    )
    answers = _refomb_answers(options)
    if isinstance(replier, ReviewFiles):
        replier.expect(len(answers))
    compared = list(comparer.compare(answers))
    grades = [grade(one.position, repeat, value, text) for one, repeat, value, text in compared]
    metrics = over_repeats(grades, _of(refomb.ComparisonGrade, refomb.comparison_metrics))
    kinds = sorted({value.question_type for _, _, value, _ in compared})
    names = ("score", "win", "tie", "loss")
    types = {kind: {name: metrics.pop(f"{name}_{kind}") for name in names} for kind in kinds}
    scores = [value.score for _, _, value, _ in compared]
    return {
        "benchmark": "refomb",
        "mode": "judge",
        "overall": {key: value for key, value in metrics.items() if not _of_type(key, kinds)}
        | {
            "items": len(answers),
            "judgements": len(scores),
            "wins": sum(one > 0 for one in scores),
            "ties": sum(one == 0 for one in scores),
            "losses": sum(one < 0 for one in scores),
        },
        "types": types,
        "judge": judge_report(comparer.identity, replier),
        "items": [
            value.model_dump() | {"image": one.position, "repeat": repeat, "review": review}
            for one, repeat, value, review in compared
        ],
    }


def _of_type(key: str, kinds: Iterable[str]) -> bool:
    return any(key.endswith(f"_{kind}_spread") for kind in kinds)


def _refomb_answers(options: Options) -> list[refomb.Compared]:
    rows = list(read_rows(options.answers))
    if options.ground_truth is None:
        nothing = ("", "", "", "")
        return [
            refomb.Compared(
                row.where,
                row.number,
                refomb.read_answer(row),
                refomb.Item(*nothing, question_type=text_field(row, "type", "type_name")),
            )
            for row in rows
        ]
    items = refomb.read_items(str(options.ground_truth))
    known = {(item.image_url, item.question): place for place, item in enumerate(items)}
    answers: dict[int, refomb.Compared] = {}
    for row in rows:
        place = known.get((text_field(row, "image_url"), text_field(row, "question", "prompt")))
        if place is None or place in answers:
            raise ArtifactError(
                f"{row.where}: image_url and question are not in {options.ground_truth}, or twice"
            )
        answers[place] = refomb.Compared(row.where, place, refomb.read_answer(row), items[place])
    missing = sorted(set(range(len(items))) - set(answers))
    if missing:
        raise ArtifactError(
            f"{options.answers}: {len(missing)} of {len(items)} questions have no answer, the "
            f"first is row {missing[0]} of {options.ground_truth}"
        )
    return [answers[place] for place in sorted(answers)]


def score_amber(options: Options) -> Result:
    """Responses {id, response}; `--ground-truth` is the folder of AMBER's data files."""
    mode = options.mode or ("vectors" if amber.has_vectors() else "exact")
    if mode not in ("vectors", "exact"):
        raise ConfigError(f"amber: --mode must be vectors or exact, got {mode!r}")
    if options.ground_truth is None:
        raise ConfigError("amber: --ground-truth must name AMBER's data folder")
    if options.mode is None and mode == "exact":
        log.warning("amber: %s is not installed: mode exact, not AMBER's metric", amber.VECTORS)
    scorer = amber.AmberScorer(
        amber.read_data(options.ground_truth),
        mode=cast(amber.Mode, mode),
        tools=NltkTools(options.nltk_data),
    )
    graded = []
    for row in read_rows(options.answers):
        item = row.row.get("id")
        if not isinstance(item, int) or isinstance(item, bool):
            raise ArtifactError(f"{row.where}, field id: expected a number, got {item!r}")
        graded.append((item, scorer.grade(item, text_field(row, "response"))))
    metrics = amber.amber_metrics([value for _, value in graded])
    names = ("Accuracy", "Precision", "Recall", "F1")
    dimensions = [*amber.DIMENSIONS, *amber.DIMENSIONS["attribute"]]
    kinds = {one: {name: metrics.pop(f"{one}_{name}") for name in names} for one in dimensions}
    return {
        "benchmark": "amber",
        "mode": mode,
        "overall": metrics | {"items": len(graded)},
        "kinds": kinds,
        "judge": judge_report(scorer.identity, None),
        "items": [{"id": item} | value.model_dump() for item, value in graded],
    }


def _of(
    record: type[R], metrics: Callable[[Sequence[R]], Metrics]
) -> Callable[[Sequence[Grade]], Metrics]:
    """`metrics` over the values of grades."""
    return lambda rows: metrics([record.model_validate_json(row.value) for row in rows])


def write_result(path: Path, result: Result) -> None:
    """Whole or not at all; replaces an earlier result."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror}") from error
