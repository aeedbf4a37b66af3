"""The labeller as a grader of held-out answers: claims first, then one question for each."""

import gc
from collections.abc import Sequence

from jobs._claiming import load_splitter
from jobs._entry import Job, in_groups
from jobs._models import describe_model, load_noted, usage_notes
from rlaifv.benchmarks.labelled import Answered, CheckedClaim
from rlaifv.claiming import Asked
from rlaifv.claims import ClaimDraft


class JobLabeller:
    """What `claim` and `verify` do to sampled answers, done to held-out ones.

    The splitter is gone before the labeller is loaded: together they may not fit.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.identity = ""
        """The labeller, what it is asked, and who split; known once `check` has run."""

    def check(self, answers: Sequence[Answered]) -> list[list[CheckedClaim]]:
        """Equal questions about equal images are asked once per group."""
        drafts, splitter = self._split(answers)
        model = load_noted(self._job, "labeller", self._job.config.verify.labeller)
        from rlaifv.models.base import ImageQuestions  # torch, by its package

        suffix, checked = self._job.config.verify.suffix, []
        self.identity = f"labeller {self._job.notes['labeller']}; suffix {suffix!r}; {splitter}"
        pairs = list(zip(answers, drafts, strict=True))
        for group in in_groups(pairs, self._job.config.shards.group_size):
            asked: dict[bytes, dict[str, None]] = {}
            for answer, mine in group:
                for one in mine:  # none of an answer without claims
                    asked.setdefault(answer.image, {})[one.question] = None
            rows = [
                ImageQuestions(image, tuple(f"{text}{suffix}" for text in texts))
                for image, texts in asked.items()
            ]
            said = {
                (image, question): verdict
                for (image, texts), each in zip(asked.items(), model.yes_no(rows), strict=True)
                for question, verdict in zip(texts, each, strict=True)
            }
            for answer, mine in group:
                verdicts = [(one.text, said[answer.image, one.question]) for one in mine]
                checked.append(
                    [CheckedClaim(text=t, p_yes=v.p_yes, p_no=v.p_no) for t, v in verdicts]
                )
        self._job.notes |= usage_notes(model)
        return checked

    def _split(self, answers: Sequence[Answered]) -> tuple[list[list[ClaimDraft]], str]:
        """The claims, and who made them."""
        splitter = load_splitter(self._job)
        items = [Asked(f"held out {one.question_id}", one.question, one.answer) for one in answers]
        drafts = splitter.split(items)
        self._job.notes |= splitter.notes
        keys = ("engine", "split_prompt", "question_prompt")
        named = [splitter.notes[key] for key in keys if key in splitter.notes]
        if self._job.config.claim.model.family != "rules":
            named.append(describe_model(self._job.config.claim.model))
        del splitter
        gc.collect()
        return drafts, f"claims {', '.join(named)}"
