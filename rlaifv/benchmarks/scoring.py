"""What all `score` commands share: their options, who replies, the report of the judge."""

from pathlib import Path
from typing import Any, NamedTuple

from rlaifv.benchmarks.files import digest
from rlaifv.benchmarks.judge import Judge
from rlaifv.benchmarks.replies import Replier, ReviewFiles
from rlaifv.config import JudgeConfig
from rlaifv.errors import ConfigError
from rlaifv.records import Grade, Record

Result = dict[str, Any]
"""The content of RESULT.json."""


class Options(NamedTuple):
    """The command line of `score`."""

    answers: Path
    reviews: tuple[Path, ...] = ()
    hallucination_reviews: tuple[Path, ...] = ()
    judge: JudgeConfig | None = None
    coco: Path | None = None
    ground_truth: Path | None = None
    mode: str | None = None
    synonyms: Path | None = None
    nltk_data: Path | None = None
    cache: Path | None = None

    @property
    def files(self) -> dict[str, str]:
        """Digests of the input files by flag."""
        named = {
            "answers": [self.answers],
            "reviews": self.reviews,
            "hallucination_reviews": self.hallucination_reviews,
            "ground_truth": [self.ground_truth] if self.ground_truth else [],
            "synonyms": [self.synonyms] if self.synonyms else [],
        }
        return {
            flag: ", ".join(digest(path.read_bytes()) for path in paths)
            for flag, paths in named.items()
            if paths and all(path.is_file() for path in paths)
        }


def grade(position: int, repeat: int, value: Record, reply: str) -> Grade:
    """A row as the metrics take it; it is not stored."""
    return Grade(
        benchmark="score",
        question_id=f"{position:09d}",
        step=0,
        repeat=repeat,
        judge="score",
        judge_reply=reply,
        value=value.model_dump_json(),
    )


def prompt_file(options: Options) -> Path | None:
    """The file that replaces our wording."""
    return Path(options.judge.prompt) if options.judge and options.judge.prompt else None


def make_replier(options: Options, default_model: str, max_tokens: int) -> Replier | None:
    """Files of replies, an endpoint, or nothing."""
    if options.reviews:
        return ReviewFiles(options.reviews)
    if options.judge is not None:
        return Judge(
            options.judge, default_model=default_model, max_tokens=max_tokens, cache=options.cache
        )
    return None


def required_replier(options: Options, name: str, default_model: str, max_tokens: int) -> Replier:
    """Raises ConfigError when neither is given."""
    replier = make_replier(options, default_model, max_tokens)
    if replier is None:
        raise ConfigError(f"{name}: --judge URL or --reviews FILE is needed: no rule scores it")
    return replier


def judge_report(identity: str, replier: Replier | None) -> Result:
    """Who graded, and what it cost."""
    return {"identity": identity} | (replier.tally()._asdict() if replier is not None else {})
