"""Command line: score files that were made elsewhere, and check a benchmark's files.

python -m rlaifv.benchmarks score NAME --answers FILE.jsonl ... --out RESULT.json
python -m rlaifv.benchmarks check NAME ...
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("benchmarks")

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from rlaifv.benchmarks.check import check, exit_code
from rlaifv.benchmarks.score import score, write_result
from rlaifv.benchmarks.scoring import Options
from rlaifv.cli import checked, ending
from rlaifv.config import JudgeConfig


def _judge_config(given: argparse.Namespace) -> JudgeConfig | None:
    if given.judge is None:
        return None
    values = {
        "url": given.judge,
        "model": given.judge_model,
        "prompt": given.judge_prompt,
        "temperature": given.judge_temperature,
        "top_p": given.judge_top_p,
        "max_tokens": given.judge_max_tokens,
        "concurrency": given.judge_concurrency,
        "attempts": given.judge_attempts,
        "timeout_seconds": given.judge_timeout,
        "backoff_seconds": given.judge_backoff,
        "repeats": given.repeats,
        "seed": given.seed,
        "swap": given.swap,
        "input_price": given.input_price,
        "output_price": given.output_price,
    }
    chosen = {key: value for key, value in values.items() if value is not None}
    return checked(lambda: JudgeConfig(**chosen), what="a flag of the judge")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is the error's (78 configuration, 65 data, 75 try again)."""
    given = flags.benchmarks().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return ending(lambda: _check(given) if given.command == "check" else _score(given))


def _score(given: argparse.Namespace) -> int:
    options = Options(
        answers=given.answers,
        reviews=tuple(given.reviews),
        hallucination_reviews=tuple(given.hallucination_reviews),
        judge=_judge_config(given),
        coco=given.coco,
        ground_truth=given.ground_truth,
        mode=given.mode,
        synonyms=given.synonyms,
        nltk_data=given.nltk_data,
        cache=given.cache,
    )
    result = score(given.name, options)
    write_result(given.out, result)
    print(f"{given.name}, mode {result['mode']} ({result['judge']['identity']})")
    for key, value in result["overall"].items():
        print(f"  {key}: {'undefined' if value is None else value}")
    return 0


def _check(given: argparse.Namespace) -> int:
    names = ("coco", "ground_truth", "questions", "synonyms", "nltk_data")
    places = {name: getattr(given, name) for name in names}
    findings = check(given.name, places, mode=given.mode)
    if given.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"[{finding.state}] {finding.what}: {finding.detail}")
    return exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
