"""What judges are told. Our own wording, with the answer formats of the published prompts.

The published prompts are not ours to ship (MMHal-Bench's comes from GPL-3 code): a file replaces
ours, and every grade says which one was used.
"""

import re
from pathlib import Path
from typing import NamedTuple

from rlaifv.benchmarks.files import digest, read_text
from rlaifv.errors import ConfigError


class Prompt(NamedTuple):
    """A template and where it came from."""

    source: str
    """`own/<version>:<digest>` or `file:<digest>`: recorded with every grade."""
    template: str
    fields: tuple[str, ...]

    def fill(self, *values: str) -> str:
        """The template with a value for each field, in their order; values are not expanded."""
        known = dict(zip(self.fields, values, strict=True))
        if _named(self.fields).search(self.template):
            return _named(self.fields).sub(lambda match: known[match.group(1)], self.template)
        rest = iter(values)
        return re.sub(r"\{\}", lambda _: next(rest), self.template)


def load_prompt(own: Prompt, file: Path | None) -> Prompt:
    """Our prompt, or the one in `file`, which must have the same fields.

    `{name}` once for each field, or as many `{}` as there are fields, in their order (as in the
    published MMHal-Bench prompt). Raises ConfigError naming what is missing.
    """
    if file is None:
        return own
    text = read_text(file)
    found = set(_named(own.fields).findall(text))
    if found == set(own.fields) or (not found and text.count("{}") == len(own.fields)):
        return Prompt(f"file:{digest(text)}", text, own.fields)
    wanted = ", ".join(f"{{{name}}}" for name in own.fields)
    raise ConfigError(f"{file}: a judge prompt with {wanted} is needed (or as many {{}})")


def _named(fields: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"\{(" + "|".join(fields) + r")\}")


def _own(template: str, *fields: str) -> Prompt:
    return Prompt(f"own/1:{digest(template)}", template, fields)


OBJECTS = _own(
    """\
Below are a question about a picture and the answer that somebody gave. Take the answer as true \
and list the physical things that it says can be seen in the picture.

<question>
{question}
</question>
<answer>
{answer}
</answer>

Rules:
- Only things that the answer itself names; do not guess what else might be there.
- Give the bare name of each thing: leave out colours, materials, sizes, numbers and other \
properties.
- Skip what is said to be absent, and what is no physical thing (moods, scenes, styles).
- Reply with one JSON list of strings and nothing else, for example ["dog", "frisbee"]. \
If nothing qualifies, reply [].
""",
    "question",
    "answer",
)
"""Object HalBench, mode judge."""

MMHAL = _own(
    """\
You grade an answer to a question about a picture. You cannot see the picture; you are given a \
list of what it contains and an answer that a person wrote. Take both as correct and complete.

Consider two things. First, hallucination: does the graded answer state anything that the list or \
the person's answer contradicts, or that neither supports? Harmless general knowledge is no \
hallucination; a question that assumes something false must be corrected, not answered. Second, \
information: how much does the answer help with what was asked?

Grades:
6 = no hallucination, very informative, with sound analysis or reasoning
5 = no hallucination, very informative
4 = no hallucination, somewhat informative
3 = no hallucination, not informative
2 = hallucination, otherwise very informative
1 = hallucination, otherwise somewhat informative
0 = hallucination, not informative

### Picture contents
{image_content}

### Question
{question}

### Person's answer
{gt_answer}

### Answer to grade
{model_answer}

Explain your judgement in a few sentences. Then end with one line that holds nothing but the word \
Rating, a colon, a space and the grade as a digit. Write that line once.
""",
    "image_content",
    "question",
    "gt_answer",
    "model_answer",
)
"""MMHal-Bench."""

REFOMB = _own(
    """\
Two models answered a question about a picture. Compare their answers. You cannot see the \
picture; the description below covers everything in it and is correct.

Weigh two things, in this order. Trustworthiness: count the statements of each answer that the \
description does not support. Errors may concern what is visible, facts about the picture as a \
whole (where, when, what kind of picture), moods and metaphors, or anything else that is claimed \
without support. Helpfulness: does the answer address the question accurately, to the point and \
understandably? When the question asks for invention (a story, an advertisement), invented parts \
that fit the picture are no errors.

[Description of the picture]
{description}
[End of the description]

[Question]
{question}
[End of the question]

[Answer of model A]
{answer_a}
[End of the answer of model A]

[Answer of model B]
{answer_b}
[End of the answer of model B]

First list the unsupported statements of each answer and compare trustworthiness. Then compare \
helpfulness. Finally give the verdict, on a line of its own: [[A]] when model A is better, [[B]] \
when model B is better, [[C]] when they are equally good. Do not write such brackets elsewhere.
""",
    "description",
    "question",
    "answer_a",
    "answer_b",
)
"""RefoMB, overall comparison."""

REFOMB_HALLUCINATION = _own(
    """\
A reviewer compared the answers of model A and model B to a question about a picture. Read the \
review and say, from it alone, which model hallucinates less, that is, makes fewer statements \
that are not true of the picture.

[Review]
{review}
[End of the review]

State how many hallucinations the review finds for each model. Then give the verdict on a line of \
its own: [[A]] when model A has fewer, [[B]] when model B has fewer, [[C]] when they have equally \
many or none.
""",
    "review",
)
"""RefoMB, hallucination score from the review."""

REFOMB_SYSTEM = "You compare answers carefully, precisely and without favour."
"""System message of the comparison."""
REFOMB_HALLUCINATION_SYSTEM = "You read reviews carefully and report what they say."
