"""The `rules` engine: an answer's atomic claims and their yes/no questions, without a model.

Sentences come from spaCy's blank English pipeline with its rule-based sentencizer (no download);
lists and clauses are taken apart only where each part stands on its own. What cannot be turned
into a question by rule is asked as "Is it true that ...?", whole.
"""

import re
import unicodedata
from functools import cache
from typing import NamedTuple

import spacy
from spacy.language import Language


class ClaimDraft(NamedTuple):
    """One claim and the question that checks it."""

    text: str
    question: str


def split_answer(text: str, *, question: str = "") -> list[ClaimDraft]:
    """The claims of an answer in order; repeated ones once.

    Questions, opinions, apologies and headings claim nothing. With the instruction's `question`, an
    answer of a few words ("Red", "Two") to what ends in "?" becomes the claim that it answers the
    question. Control characters count as white space and the marks of Markdown go; nothing else is
    changed or cut.
    """
    drafts: dict[str, ClaimDraft] = {}
    units = _units(text)
    short = units[0] if len(units) == 1 else ""
    if question.rstrip().endswith("?") and short and _is_short_answer(short):
        asked = " ".join(question.split())
        words = short.rstrip(".!")
        drafts[short] = ClaimDraft(short, f'Is "{words}" a correct answer to "{asked}"?')
        return list(drafts.values())
    for unit in units:
        for sentence in _sentences(unit):
            if _claims_nothing(sentence):
                continue
            for claim in _atoms(_without_opening(sentence)):
                draft = ClaimDraft(claim, to_question(claim))
                drafts.setdefault(draft.question, draft)
    return list(drafts.values())


def to_question(claim: str) -> str:
    """The yes/no question that is answered with yes iff the claim holds; never empty."""
    body = _expand(" ".join(claim.split()).rstrip(" .!;,:"))
    that = _SEEN_THAT.match(body)
    if that:
        return _question(that["rest"])
    place = _FRONTED.match(body)
    if place:
        inner, where = _question(place["rest"]), _lower_first(place["place"])
        if inner.endswith(_IN_IMAGE):
            end = "?" if _MENTIONS_IMAGE.search(where) else _IN_IMAGE
            return f"{inner.removesuffix(_IN_IMAGE)} {where}{end}"
        if not inner.startswith(_TRUE_THAT):
            return f"{inner[:-1]} {where}?"
    return _question(body)


def _question(body: str) -> str:
    """The question for a clause that starts with its subject."""
    shown = _SHOWN.match(body)
    if shown:
        return _shown_question(shown["what"], also="also " if shown["also"] or shown["too"] else "")
    existential = _EXISTENTIAL.match(body)
    if existential:
        return f"{existential['verb'].capitalize()} there {existential['what']}?"
    return _inverted(body) or _fallback(body)


# -- sentences ---------------------------------------------------------------------------------

_LINE = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BULLET = re.compile(r"^(?:[-*+\u2022\u2023\u25aa\u25cf\u25e6\u2013\u2014]\s+|\(?\d{1,3}[.)]\s+)")
_BOLD = re.compile(r"\*\*|__|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_HEADING = re.compile(r"^#{1,6}\s|^[`~]{3}|^[-*_=\s]{3,}$")
_ENDED = re.compile("[.!?:;\u2026][\"')\\]\u201d\u2019]*$")
_ANNOUNCES = re.compile(
    r"\b(?:here (?:is|are)|following|below|includ\w+|contain\w*|such as)\b", re.IGNORECASE
)


@cache
def _pipeline() -> Language:
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    nlp.max_length = 2**31  # the limit guards parsers' memory; there is none here
    return nlp


def _units(text: str) -> list[str]:
    """Paragraphs and list items; hard-wrapped lines joined, markup and headings removed."""
    units: list[str] = []
    for line in _LINE.split(text):
        raw = _clean(line)
        if not raw or _HEADING.match(raw):
            units.append("")  # nothing after this continues what was before
            continue
        plain = _BULLET.sub("", _BOLD.sub("", raw))
        above = units[-1] if units else ""
        wrapped = above.endswith(",") or plain[:1].islower()
        if above and wrapped and not _BULLET.match(raw) and not _ENDED.search(above):
            units[-1] = f"{above} {plain}"
        else:
            units.append(plain)
    return [unit for unit in units if re.search(r"\w", unit) and not _is_heading(unit)]


def _clean(line: str) -> str:
    if not line.isprintable():
        line = "".join(" " if unicodedata.category(char) == "Cc" else char for char in line)
    return " ".join(line.split())


def _is_heading(unit: str) -> bool:
    return unit.endswith(":") and (len(unit.split()) <= 4 or bool(_ANNOUNCES.search(unit)))


def _sentences(unit: str) -> list[str]:
    return [sentence.text.strip() for sentence in _pipeline()(unit).sents]


# -- what is no claim --------------------------------------------------------------------------

_OPINION = re.compile(
    r"^(?:(?:perhaps|maybe|in my opinion|personally),?\s"
    r"|(?:i|we) (?:really |also |would |do not |don't )*"
    r"(?:think|believe|feel|guess|hope|suppose|assume|like|love)\b"
    r"|(?:i am|i'm) (?:not )?(?:sorry|sure|an? )|(?:i|we) (?:cannot|can't|can not) (?:see|tell|say)"
    r"|(?:it|this) (?:seems|might|may|could) |as an ai\b|let me know|(?:please )?feel free|sorry\b)",
    re.IGNORECASE,
)
_EVOKES = re.compile(
    r"\b(?:creat|add|giv|evok|convey|contribut|suggest|reflect|exud)(?:e|es|s|ed|ing)?\b",
    re.IGNORECASE,
)
_MOOD = re.compile(
    r"\b(?:atmosphere|mood|feelings?|sense|ambiance|ambience|impression|vibe|charm)\b",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"^(?:yes|no|sure|certainly|overall|in summary|of course|okay|ok|additionally|also|furthermore|moreover|"
    r"finally|lastly|first|second|third|firstly|secondly|besides|in addition|specifically|"
    r"however|meanwhile|as well)\s*[,!:]\s+|^(?:and|but|so)\s+",
    re.IGNORECASE,
)


def _claims_nothing(sentence: str) -> bool:
    if not re.search(r"\w", sentence) or sentence.rstrip("\"')").endswith("?"):
        return True
    evokes = _EVOKES.search(sentence)
    moody = evokes is not None and _MOOD.search(sentence, evokes.end()) is not None
    return moody or _OPINION.match(sentence) is not None


def _without_opening(sentence: str) -> str:
    stripped = _OPENING.sub("", sentence)
    return _upper_first(stripped) if re.search(r"\w", stripped) else sentence


def _is_short_answer(unit: str) -> bool:
    is_clause = _AUX.search(unit) or _SHOWN.match(unit)
    return len(unit.split()) <= 4 and not is_clause and not unit.endswith(("?", ":"))


# -- one statement each ------------------------------------------------------------------------

_DETERMINERS = (
    "a|an|the|some|several|many|few|no|another|one|two|three|four|five|six|seven|eight|nine|ten|"
    r"\d+|various|multiple|both|all|each|every|his|her|its|their|this|that|these|those"
)
_LIST_ITEM = rf"(?:(?:{_DETERMINERS})\s+(?!of\b)\S)"
_SEEN = (
    r"(?:i|we|you|one) can (?:also )?(?:clearly )?see|(?:i|we|you) (?:also )?see|"
    r"(?:the|this) (?:image|picture|photo|photograph|scene) (?:also )?"
    r"(?:shows|depicts|features|contains|includes|displays)|"
    r"in (?:the|this) (?:image|picture|photo|photograph|scene),? (?:i|we|you) can (?:also )?see"
)
_LIST_HEAD = re.compile(
    rf"^(?P<head>there(?:'s| is| are| was| were)(?: also)?|{_SEEN})\s+(?P<list>{_LIST_ITEM}.*)$",
    re.IGNORECASE,
)
_LIST_GAP = re.compile(
    rf",\s+and\s+(?={_LIST_ITEM})|,\s+(?={_LIST_ITEM})|\s+and\s+(?={_LIST_ITEM})"
)
_UNSAFE_LIST = re.compile(
    r"\b(?:between|both|either|neither|nor|or|not|n't|whose|which|that|who|while|as well as|"
    r"combination|pair|mix|mixture|made|consisting)\b",
    re.IGNORECASE,
)
_BARE_ADJECTIVE = re.compile(
    rf"^(?:{_DETERMINERS})\s+(?:red|green|blue|yellow|black|white|brown|grey|gray|orange|pink|purple|"
    r"big|small|large|little|tall|short|long|young|old|first|second|third)$",
    re.IGNORECASE,
)
"""`a red and a blue cup` is no list of two things."""
_CLAUSE_GAP = re.compile(
    r"(?:;\s+|,?\s+(?:and|but|while)\s+)(?=(?:there(?:'s| is| are)\b|"
    rf"(?:{_DETERMINERS})\s+(?:[\w'-]+\s+){{1,4}}?(?:is|are|was|were|has|have|can)\b"
    r"|(?:it|they|he|she) (?:is|are|was|were|has|have)\b))",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"\b(?:is|are|was|were|has|have|can|shows|depicts|see)\b|'s\b", re.IGNORECASE)
_SUBORDINATE = re.compile(
    r"\b(?:if|because|since|although|though|whether|so that|that|which|who|where|when)\b",
    re.IGNORECASE,
)


def _atoms(sentence: str) -> list[str]:
    """The sentence's claims: clauses first, then the items of a list of things that are there."""
    return [item for clause in _clauses(sentence) for item in _list_items(clause)]


def _clauses(sentence: str) -> list[str]:
    """Main clauses joined by and/but/while or a semicolon; each has its own subject and verb."""
    parts: list[str] = []
    start = 0
    for gap in _CLAUSE_GAP.finditer(sentence):
        left = sentence[start : gap.start()]
        if _CLAUSE.search(left) and not _SUBORDINATE.search(left):
            parts.append(left)
            start = gap.end()
    parts.append(sentence[start:])
    return [_as_sentence(part) for part in parts]


def _list_items(clause: str) -> list[str]:
    """`There is a cup and a fork.` says two things; a list of anything else is left whole."""
    body = clause.rstrip(".!")
    match = _LIST_HEAD.match(body)
    if match is None or _UNSAFE_LIST.search(match["list"]) or _AUX.search(match["list"]):
        return [clause]
    head, items = match["head"], _LIST_GAP.split(match["list"])
    if any(_BARE_ADJECTIVE.match(item) for item in items):
        return [clause]
    if len(items) > 1 and head.lower().startswith("there") and len(head.split()) > 1:
        first, rest = head.split(" ", 1)[0], head.split(" ", 1)[1].split(" ")[1:]
        tense = "past" if head.lower().split()[1].startswith("w") else "present"
        heads = [" ".join([first, _verb(item, tense), *rest]) for item in items]
        return [f"{own} {item}." for own, item in zip(heads, items, strict=True)]
    return [f"{head} {item}." for item in items] if len(items) > 1 else [clause]


_PLURAL = re.compile(
    r"^(?:some|several|many|few|two|three|four|five|six|seven|eight|nine|ten|"
    r"(?!1\b)\d+|various|multiple|both|all|these|those)\s+(?P<noun>.*)$",
    re.IGNORECASE,
)


def _verb(noun_phrase: str, tense: str) -> str:
    plural = _PLURAL.match(noun_phrase) is not None
    if tense == "past":
        return "were" if plural else "was"
    return "are" if plural else "is"


# -- questions ---------------------------------------------------------------------------------

_IN_IMAGE = " in the image?"
_AUX_WORDS = "is|are|was|were|has|have|had|can|could|will|would|does|do|did|may|might|must|should"
_AUX = re.compile(rf"\b(?:{_AUX_WORDS})\b|n't\b|'s\b", re.IGNORECASE)
_CONTRACTED = (
    (re.compile(r"\b(there|it|he|she|that|this|what)'s\b", re.IGNORECASE), r"\1 is"),
    (re.compile(r"\b(they|we|you|there)'re\b", re.IGNORECASE), r"\1 are"),
    (re.compile(r"\b(is|are|was|were|has|have|does|do|did)n't\b", re.IGNORECASE), r"\1 not"),
    (re.compile(r"\bcan(?:'t|not)\b", re.IGNORECASE), "can not"),
)
_EXISTENTIAL = re.compile(r"^there (?P<verb>is|are|was|were)\s+(?P<what>\S.*)$", re.IGNORECASE)
_TRUE_THAT = "Is it true that "
_IMAGE = r"(?:the|this) (?:image|picture|photo|photograph|scene)"
_MENTIONS_IMAGE = re.compile(rf"\b{_IMAGE}\b", re.IGNORECASE)
_SHOWN = re.compile(
    rf"^(?:in {_IMAGE},? )?(?:(?:i|we|you|one) can (?P<also>also )?(?:clearly )?see"
    rf"|(?:i|we|you) (?:also )?see|{_IMAGE} (?P<too>also )?"
    rf"(?:shows|depicts|features|contains|includes|displays))\s+(?P<what>\S.*?)"
    rf"(?: in {_IMAGE})?$",
    re.IGNORECASE,
)
_SEEN_THAT = re.compile(
    rf"^(?:(?:i|we|you|one) can (?:also )?(?:clearly )?see|{_IMAGE} (?:also )?shows)"
    r" that (?P<rest>\S.*)$",
    re.IGNORECASE,
)
_FRONTED = re.compile(
    r"^(?P<place>(?:in|on|at|to|near|behind|beside|under|above|below|inside|around|next to|"
    r"in front of|across|along|throughout|within|from)\s[^,]{1,80}),\s+(?P<rest>\S.*)$",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"^(?!(?:in|on|at|to|near|next|behind|beside|under|above|below|inside|around|across|along|i|"
    r"there|\w+ing)\b)(?P<subject>\S.*?)\s"
    r"(?P<aux>is|are|was|were|can|could|will|would|must|should|might|may|has|have)\s"
    r"(?P<rest>\S.*)$",
    re.IGNORECASE,
)
_BREAKS = re.compile(
    r"[,;:()\"]|\b(?:that|which|who|whose|where|when|while|if|because|although|and|but|as)\b",
    re.IGNORECASE,
)
_THING = re.compile(rf"^(?:{_DETERMINERS})\b", re.IGNORECASE)
_LOWERED = re.compile(
    rf"^(?:{_DETERMINERS}|there|it|he|she|they|we|you|in|on|at|to|near|behind|beside|under|above|"
    r"below|inside|around|next|across|along|throughout|within|from|my|our|your|other|people|men|"
    r"women|children|everyone|someone|something)\b",
    re.IGNORECASE,
)


def _inverted(body: str) -> str:
    """`The cup is red` -> `Is the cup red?`; empty where the subject is not plain to see."""
    match = _SUBJECT.match(body)
    if match is None:
        return ""
    subject, aux, rest = match["subject"], match["aux"].lower(), match["rest"]
    # "This" and "that" may be the whole subject; a relative clause or a list may not be in it.
    # Two things joined by "and" may, where the verb says that both are meant.
    inside = subject.split(" ", 1)[1] if " " in subject else ""
    joined = _BREAKS.search(inside)
    if joined and not (joined.group().lower() == "and" and aux in ("are", "were")):
        return ""
    asked = _lower_first(subject)
    if aux in ("has", "have") and not re.match(r"(?:not )?been\b", rest):
        if not _THING.match(rest):
            return ""
        return f"{'Does' if aux == 'has' else 'Do'} {asked} have {rest}?"
    return f"{aux.capitalize()} {asked} {rest}?"


_ONE_THING = re.compile(r"^(?:a|an|one|another)\s(?!.*\w[^suia\W]s\b)", re.IGNORECASE)
"""A noun phrase rather than a sentence: nothing in it can be a verb in the third person."""
_PLAIN_VERB = re.compile(
    r"\s(?:sit|stand|walk|hold|wear|look|play|ride|lie|eat|run|hang|surround|fly|appear|rest)\b"
)


def _fallback(body: str) -> str:
    """The question for what has no auxiliary verb, or a subject that no rule understands."""
    if not _AUX.search(body) and ":" not in body:
        if _ONE_THING.match(body):
            return f"Is there {_lower_first(body)}{_IN_IMAGE}"
        if _PLURAL.match(body) and not _PLAIN_VERB.search(body):
            return f"Are there {_lower_first(body)}{_IN_IMAGE}"
    if ":" in body or len(body.split()) < 3:
        return f'Does the image show this: "{body}"?'
    return f"{_TRUE_THAT}{_lower_first(body)}?"


def _shown_question(what: str, *, also: str) -> str:
    """The question for `The image shows {what}`."""
    if _PLURAL.match(what):
        return f"Are there {also}{what}{_IN_IMAGE}"
    if _THING.match(what) and not _AUX.search(what):
        return f"Is there {also}{what}{_IN_IMAGE}"
    return f"Does the image {also}show {what}?"


def _expand(body: str) -> str:
    for pattern, replacement in _CONTRACTED:
        body = pattern.sub(replacement, body)
    return body


def _as_sentence(part: str) -> str:
    text = _upper_first(part.strip().rstrip(" ,;"))
    return text if text.endswith((".", "!")) else f"{text}."


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:] if _LOWERED.match(text) else text
