"""Command line: score files that were made elsewhere, and check a benchmark's files.

python -m rlaifv.benchmarks score NAME --answers FILE.jsonl ... --out RESULT.json
python -m rlaifv.benchmarks check NAME ...
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from rlaifv.benchmarks.check import CHECKS, check
from rlaifv.benchmarks.score import score, write_result
from rlaifv.benchmarks.scoring import Options
from rlaifv.config import JudgeConfig
from rlaifv.errors import ConfigError, RlaifvError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlaifv.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("score", help="score answers of any model")
    _add_data_flags(one)
    one.add_argument("--answers", type=Path, required=True, help="JSONL or JSON list")
    one.add_argument("--reviews", type=Path, action="append", default=[], metavar="FILE")
    one.add_argument("--hallucination-reviews", type=Path, action="append", default=[])
    one.add_argument("--mode", help="judge, rules or chair; for amber vectors or exact")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--cache", type=Path, help="folder of judge replies")
    judge = one.add_argument_group("judge (key: OPENAI_API_KEY)")
    judge.add_argument("--judge", metavar="URL", help="any OpenAI-compatible endpoint")
    judge.add_argument("--judge-model", help="default: the published scores' judge")
    judge.add_argument("--judge-prompt", metavar="FILE", help="replaces our wording")
    judge.add_argument("--judge-temperature", type=float)
    judge.add_argument("--judge-concurrency", type=int)
    judge.add_argument("--judge-attempts", type=int)
    judge.add_argument("--judge-timeout", type=float, metavar="SECONDS")
    judge.add_argument("--judge-backoff", type=float, metavar="SECONDS")
    judge.add_argument("--repeats", type=int, help="judgings per answer")
    judge.add_argument("--seed", type=int)
    judge.add_argument("--swap", action="store_true", help="refomb: both orders of the answers")
    judge.add_argument("--input-price", type=float, help="per million tokens")
    judge.add_argument("--output-price", type=float)
    two = commands.add_parser("check", help="which files are needed, and whether they are there")
    _add_data_flags(two)
    two.add_argument("--questions", type=Path, help="the benchmark's question file")
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=sorted(CHECKS))
    parser.add_argument("--coco", type=Path, metavar="DIR", help="COCO 2014 annotation files")
    parser.add_argument("--ground-truth", type=Path, help="file (amber: folder)")
    parser.add_argument("--synonyms", type=Path, metavar="FILE")
    parser.add_argument("--nltk-data", type=Path, metavar="DIR")


def _judge_config(flags: argparse.Namespace) -> JudgeConfig | None:
    if flags.judge is None:
        return None
    given = {
        "url": flags.judge,
        "model": flags.judge_model,
        "prompt": flags.judge_prompt,
        "temperature": flags.judge_temperature,
        "concurrency": flags.judge_concurrency,
        "attempts": flags.judge_attempts,
        "timeout_seconds": flags.judge_timeout,
        "backoff_seconds": flags.judge_backoff,
        "repeats": flags.repeats,
        "seed": flags.seed,
        "swap": flags.swap,
        "input_price": flags.input_price,
        "output_price": flags.output_price,
    }
    try:
        return JudgeConfig(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(f"judge flags: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is the error's (78 configuration, 65 data, 75 try again)."""
    flags = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if flags.command == "check":
            return _check(flags)
        options = Options(
            answers=flags.answers,
            reviews=tuple(flags.reviews),
            hallucination_reviews=tuple(flags.hallucination_reviews),
            judge=_judge_config(flags),
            coco=flags.coco,
            ground_truth=flags.ground_truth,
            mode=flags.mode,
            synonyms=flags.synonyms,
            nltk_data=flags.nltk_data,
            cache=flags.cache,
        )
        result = score(flags.name, options)
        write_result(flags.out, result)
    except RlaifvError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{flags.name}, mode {result['mode']} ({result['judge']['identity']})")
    for key, value in result["overall"].items():
        print(f"  {key}: {'undefined' if value is None else value}")
    return 0


def _check(flags: argparse.Namespace) -> int:
    places = {
        "coco": flags.coco,
        "ground_truth": flags.ground_truth,
        "questions": flags.questions,
        "synonyms": flags.synonyms,
        "nltk_data": flags.nltk_data,
    }
    findings = check(flags.name, places)
    for finding in findings:
        print(f"[{finding.state}] {finding.what}: {finding.detail}")
    return 65 if any(finding.state == "bad" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
