"""The grade of one text against the objects in its image, shared by the object benchmarks."""

from collections.abc import Sequence

from rlaifv.benchmarks.base import Metrics
from rlaifv.chair import CaptionScore, CorpusMetrics, Mention, corpus_metrics
from rlaifv.records import Count, Grade, Record


class CaptionGrade(Record):
    """Everything that the object metrics need of one text."""

    image_id: str = ""
    found: list[tuple[str, str, int]]
    """Mentions in order: word, class, position."""
    truth: list[str]
    """Classes in the image, sorted."""
    num_words: Count
    """As the benchmark counts them."""
    words: tuple[str, ...] = ()
    """Tokens after double words were merged, punctuation included; with a judge the objects it
    named. Empty where only counts are kept."""
    judge_model: str = ""
    """The name that the judge's endpoint gave itself; empty without a judge."""
    input_tokens: Count = 0
    output_tokens: Count = 0

    def score(self) -> CaptionScore:
        """The mentions against the image's classes."""
        found = tuple(Mention(*entry) for entry in self.found)
        classes = {mention.object_class for mention in found}
        truth = frozenset(self.truth)
        return CaptionScore(
            found,
            tuple(mention for mention in found if mention.object_class not in truth),
            tuple(sorted(classes & truth)),
            len(truth),
            self.num_words,
        )


def caption_sums(grades: Sequence[Grade]) -> CorpusMetrics:
    """The corpus sums over grades whose values are `CaptionGrade`s."""
    return corpus_metrics(CaptionGrade.model_validate_json(grade.value).score() for grade in grades)


def caption_metrics(grades: Sequence[Grade]) -> Metrics:
    """response_hallucination (H/C), mention_hallucination (W/M), chair_s, recall, mean_words."""
    return caption_sums(grades).metrics()
