"""The labeller as a grader of held-out answers: claims first, then one question for each."""

import functools
import gc
from collections.abc import Sequence

from jobs._claiming import load_splitter
from jobs._entry import Job
from jobs._groups import ahead, in_groups
from jobs._models import describe_model, load_noted, usage_notes
from jobs._questions import Question, queue_questions
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
        suffix, checked = self._job.config.verify.suffix, []
        self.identity = f"labeller {self._job.notes['labeller']}; suffix {suffix!r}; {splitter}"
        pairs = list(zip(answers, drafts, strict=True))

        def about(group: Sequence[tuple[Answered, list[ClaimDraft]]]) -> list[Question]:
            return [(answer.image, one.question) for answer, mine in group for one in mine]

        queue = functools.partial(queue_questions, model, suffix=suffix)
        self._job.total = len(pairs)
        groups = in_groups(pairs, self._job.config.shards.group_size)
        for group, said in ahead(self._job, groups, lambda rows: queue(about(rows))):
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
