"""What a model is asked when it is not the policy's own instruction, and how its replies are read.

The wording is ours. The published claim models were trained on the release's text
(`utils/llama3_8b_inference.py`): a prompt file can bring that in.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlaifv.errors import ConfigError

DESCRIPTION_REQUESTS = (
    "Describe everything you can see in this picture.",
    "Write a careful description of this photo.",
    "Tell me in detail what this image shows.",
    "Go through the picture and describe each thing in it.",
    "What does this image contain? Give a full account.",
    "Which objects are in the picture, and what do they look like?",
    "Describe the scene for someone who cannot see it.",
    "What is going on in this picture? Be as specific as you can.",
    "Describe the people, animals and objects in this image and where they are.",
    "Explain how the things in this picture are arranged.",
    "Describe the foreground first and then the background of this image.",
    "Give a long and precise caption for this photo.",
    "What would you point out to a friend who looks at this picture with you?",
    "Describe the colours, shapes and materials in this image.",
    "Where might this have been taken, and what in the picture tells you so?",
    "Walk me through this image from left to right.",
)
"""Asked of a folder of images that comes without questions."""

Field = Literal["question", "answer", "claims"]
_PLACEHOLDER = re.compile(r"\{(question|answer|claims)\}")


class Template(NamedTuple):
    """A prompt whose `{question}`, `{answer}`, `{claims}` are filled in; other braces are text."""

    text: str
    source: str
    """Where the text is from, for the provenance: `built-in` or the file."""


SPLIT_PROMPT = Template(
    """\
Somebody was shown an image and answered a question about it. Break the answer into its facts, so \
that each of them can be checked against the image alone.

Rules:
- One fact per line, each line starting with "- ".
- Each fact is a complete sentence with a single statement that makes sense on its own: put the \
thing that is meant in place of words such as "it" or "they".
- Keep the answer's own words, numbers, colours and negations. Add nothing and leave nothing out.
- Leave out opinions, guesses, feelings and remarks about the answer itself.
- If the answer is only a word or two, use the question to make a sentence of it.
- If there is no fact at all, write "- NONE".

Question: {question}
Answer: {answer}

Facts:
""",
    "built-in",
)
"""Answer to claims."""

QUESTION_PROMPT = Template(
    """\
Turn every statement below into a question that can be answered with yes or no, in such a way that \
"yes" means that the statement is true.

Rules:
- Exactly one question per statement, in the same order, one per line, each starting with "- ".
- Keep tense, numbers and details, and keep words such as "no" or "not". Add nothing.

Statements:
{claims}

Questions:
""",
    "built-in",
)
"""Claims to yes/no questions."""


def parse_template(text: str, *, fields: Sequence[Field], source: str) -> Template:
    """A prompt from a file; raises ConfigError unless it has exactly the placeholders `fields`."""
    found = set(_PLACEHOLDER.findall(text))
    for field in sorted(set(fields) - found):
        raise ConfigError(f"{source}: the prompt lacks the placeholder {{{field}}}")
    for field in sorted(found - set(fields)):
        raise ConfigError(f"{source}: the placeholder {{{field}}} has no value in this prompt")
    return Template(text, source)


def split_prompt(template: Template, *, question: str, answer: str) -> str:
    """The request to break an answer (or a chunk of it) into claims."""
    return _fill(template, {"question": question.strip(), "answer": answer.strip()})


def question_prompt(template: Template, *, claims: Sequence[str]) -> str:
    """The request to turn claims into yes/no questions, one bullet line per claim."""
    lines = [f"- {' '.join(claim.split())}" for claim in claims]
    return _fill(template, {"claims": "\n".join(lines)})


def _fill(template: Template, values: dict[str, str]) -> str:
    # One pass, so that a placeholder inside an answer stays what it is.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template.text)


_BULLET = re.compile(
    r"(?:[-\u2010-\u2015+\u2022\u2023\u25aa\u25cf\u25e6\u00b7](?![-\d])\s*|[-*]\s+"
    r"|\*(?!.*\*)|\(?\d{1,3}[.)](?:\s+|(?=[^\s\d]))|\(?\d{1,3}:\s+|\(?[a-z]\)\s+)"
)
_DECORATION = re.compile(r"^(?:#{1,6}(?:\s.*)?|`{3,}\w*|~{3,}\w*|[-*_=\s]{3,})$")
_NOTHING = re.compile(r"^\W*(?:none|n/a|no facts?)\W*$", re.IGNORECASE)
_SENTENCE_END = re.compile("[.!?\u2026\u3002\uff01\uff1f][\"')\\]\u201d\u2019]*$")
_LINE = re.compile(r"\r\n|[\n\r\u2028\u2029\x85]")
_WRAP_COLUMN = 60
"""A line at least this long that ends in mid-sentence was wrapped, whatever follows."""


def parse_bullets(reply: str) -> list[str]:
    """The items of a list that a model wrote, whole and in order, bold marks removed.

    Bullets may be dashes, stars, dots, numbers or missing. A line without one continues the item
    above if it is indented more, starts in lower case, or follows a long line that has not ended
    its sentence; otherwise it is an item of its own. Headings, lines that only announce the list
    (`...:` without a bullet), code fences, rules and empty bullets are no items; nor is `NONE`.
    """
    items: list[str] = []
    above = ""  # the line that the item above came from, or ended with; empty: nothing to continue
    for line in _LINE.split(reply):
        text = line.strip().replace("**", "")
        if not text or _DECORATION.match(line.strip()):
            above = ""
            continue
        bullet = _BULLET.match(text)
        if bullet:
            items.append(text[bullet.end() :])
        elif above and _continues(above, line):
            items[-1] = f"{items[-1]} {text}"
        elif text.endswith(":"):
            above = ""
            continue
        else:
            items.append(text)
        above = line
    return [item.strip() for item in items if re.search(r"\w", item) and not _NOTHING.match(item)]


def _continues(above: str, line: str) -> bool:
    """Whether `line`, which has no bullet, belongs to the item on the line above."""
    if _indent(line) > _indent(above) or line.lstrip()[0].islower():
        return True
    return len(above.rstrip()) >= _WRAP_COLUMN and not _SENTENCE_END.search(above.rstrip(" *"))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def parse_questions(reply: str, *, num_claims: int) -> list[str] | None:
    """One question per claim; None when the reply has another number of them (ask again)."""
    questions = parse_bullets(reply)
    return questions if len(questions) == num_claims else None


_SENTENCE_GAP = re.compile("(?<=[.!?])\\s+|(?<=[\u3002\uff01\uff1f])")
_MAX_WORD = 200
"""Characters of a piece without white space before it is cut like a long sentence."""


def chunk_answer(answer: str, *, max_words: int) -> list[str]:
    """The answer in chunks of at most `max_words` words, all characters but white space kept.

    Cut between paragraphs where possible, else between sentences, else between words, so that a
    model with a limit sees all of it (the release drops everything after about 244 words). An
    answer without white space is cut every 200 characters of an overlong word. Empty: no chunk.
    """
    if max_words < 1:
        raise ValueError(f"max_words must be positive, got {max_words}")
    if not answer.strip():
        return []
    paragraphs = [part for part in re.split(r"\n\s*\n", answer) if part.strip()]
    pieces: list[tuple[str, str]] = []  # text, and what joins it to the piece before
    for paragraph in paragraphs:
        parts = [paragraph.strip()]
        if _num_words(paragraph) > max_words:
            parts = [part for part in _SENTENCE_GAP.split(paragraph.strip()) if part]
        pieces += [(part, " " if number else "\n\n") for number, part in enumerate(parts)]
    chunks: list[str] = []
    for text, joiner in pieces:
        if chunks and _num_words(chunks[-1]) + _num_words(text) <= max_words:
            chunks[-1] = f"{chunks[-1]}{joiner}{text}"
        else:
            chunks += [text] if _num_words(text) <= max_words else _cut(text, max_words)
    return chunks


def _words(text: str) -> list[str]:
    return [
        word[start : start + _MAX_WORD]
        for word in text.split()
        for start in range(0, len(word), _MAX_WORD)
    ]


def _num_words(text: str) -> int:
    return len(_words(text))


def _cut(text: str, max_words: int) -> list[str]:
    words = _words(text)
    return [" ".join(words[start : start + max_words]) for start in range(0, len(words), max_words)]
