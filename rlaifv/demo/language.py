"""What is said about scenes: captions with systematic errors, requests, and yes/no questions."""

import random
from typing import NamedTuple

from rlaifv.demo.scenes import KINDS, PARTNERS, Scene

PARTNER_RATE = 0.7
"""How often a caption names the partner of a visible owner that is not in the picture.

Above one half, so that greedy decoding names it too; below one, so that samples differ.
"""


REQUESTS = (
    "Describe this image.",
    "Describe the image.",
    "Describe this picture in a few sentences.",
    "What do you see in this image?",
    "What is in the picture?",
    "What can be seen in this image?",
    "Please describe the picture.",
    "Please tell me what the image shows.",
    "Tell me what is in this image.",
    "Give a short description of the image.",
    "Write a few sentences about this picture.",
    "Which objects are in the picture?",
    "What does the image show?",
    "Can you describe the image for me?",
    "Explain what is visible in this picture.",
    "List what you can see in the image.",
)
"""Ways to ask for a description; they carry no information about the scene."""

_OPENINGS = (
    ("The picture shows ", "The image shows ", "There is ", "I can see "),
    ("There is ", "There is also ", "I can see ", "The image also shows "),
    ("I can also see ", "There is also ", "I can see ", "There is "),
)
"""Beginnings of a sentence, the usual one first: for the first sentence, then for the second and
third in turn, so that greedy descriptions vary too."""
_OPENING_WEIGHTS = (6, 2, 2, 1)

_EXISTENTIAL_QUESTIONS = (
    "Is there a {kind}?",
    "Is there a {kind} in the image?",
    "Is there a {kind} in the picture?",
    "Is there also a {kind}?",
    "Is there also a {kind} in the image?",
    "Does the image show a {kind}?",
    "Does the picture show a {kind}?",
    "Does the image also show a {kind}?",
    "Can you see a {kind}?",
    "Can you see a {kind} in the image?",
    "Do you see a {kind}?",
    "Is a {kind} visible?",
)
_QUESTION_ENDS = (
    " Please answer yes or no.",
    "  Please answer yes or no.",
    "\nPlease answer yes or no.",
    " Answer yes or no.",
    "",
)
_QUESTION_END_WEIGHTS = (5, 2, 1, 1, 2)
_REPLIES = (("Yes", "No"), ("yes", "no"))
_REPLY_WEIGHTS = (3, 1)


class Probe(NamedTuple):
    """A yes/no question about a scene and its true answer."""

    question: str
    is_true: bool
    reply: str


def write_caption(scene: Scene, rng: random.Random) -> str:
    """A description with one sentence per object, in reading order, partners right after owners.

    What is in the picture is always named. The partner of an owner is named next although it may
    be absent: this is the planted hallucination.
    """
    said: list[str] = []
    for kind in scene.kinds:
        if kind not in said:
            said.append(kind)
        partner = PARTNERS.get(kind)
        if partner is None or partner in said:
            continue
        if partner in scene.kinds or rng.random() < PARTNER_RATE:
            said.append(partner)
    return " ".join(_sentence(kind, position, rng) for position, kind in enumerate(said))


def _sentence(kind: str, position: int, rng: random.Random) -> str:
    openings = _OPENINGS[0 if position == 0 else 2 - position % 2]
    return f"{rng.choices(openings, _OPENING_WEIGHTS)[0]}a {kind}."


def write_request(rng: random.Random) -> str:
    """One of REQUESTS."""
    return rng.choice(REQUESTS)


def write_probe(scene: Scene, rng: random.Random) -> Probe:
    """A question of the kind that a claim of a description turns into; half of the answers are yes.

    Of the false ones, half name an absent partner of a visible owner (if there is one), the others
    any absent object.
    """
    is_true = rng.random() < 0.5
    kind = rng.choice(scene.kinds) if is_true else _absent_kind(scene, rng)
    body = rng.choice(_EXISTENTIAL_QUESTIONS).format(kind=kind)
    end = rng.choices(_QUESTION_ENDS, _QUESTION_END_WEIGHTS)[0]
    yes, no = rng.choices(_REPLIES, _REPLY_WEIGHTS)[0]
    return Probe(body + end, is_true, yes if is_true else no)


def write_inventory(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A request to check objects by name, six of them absent, and the list as the answer."""
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    kinds = [*scene.kinds, *rng.sample(absent, 6)]
    rng.shuffle(kinds)
    facts = [f"a {kind} {'Yes' if kind in scene.kinds else 'No'}" for kind in kinds]
    return "Check each object.", f"It is: {', '.join(facts)}."


def _absent_kind(scene: Scene, rng: random.Random) -> str:
    expected = [
        partner
        for owner, partner in PARTNERS.items()
        if owner in scene.kinds and partner not in scene.kinds
    ]
    if expected and rng.random() < 0.5:
        return rng.choice(expected)
    return rng.choice([kind for kind in KINDS if kind not in scene.kinds])
