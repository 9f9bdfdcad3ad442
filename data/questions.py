"""What is asked about a clip and how it is answered.

A question *designates* a modality: see, hear or both. The first wording of each is the canonical one: diagnosis asks only that,
training may use all (`question("hear", seed=3)`). Answers say the label phrase in a template (ANSWERS); "" is a stream with nothing in it:

    answer("hear", "a dog", "a cat meowing")    # ("I hear a cat meowing.", "a cat meowing")
    answer("hear", "a dog", "")                 # ("I hear nothing.", "nothing")
"""

from __future__ import annotations

import random
from typing import Literal, get_args

Modality = Literal["see", "hear", "both"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
NOTHING = "nothing"  # what is seen where the picture is blank, what is heard where the sound is muted

QUESTIONS: dict[Modality, tuple[str, ...]] = {
    "see": (
        "What do you see?",
        "What can be seen?",
        "What is in the picture?",
        "Which thing does the video show?",
        "What is visible here?",
    ),
    "hear": (
        "What do you hear?",
        "What sound is this?",
        "Which sound can be heard?",
        "What is on the sound track?",
        "What does it sound like?",
    ),
    "both": (
        "What do you see and hear?",
        "What can be seen and heard?",
        "What is shown, and what does it sound like?",
        "What do the picture and the sound contain?",
    ),
}

ANSWERS: dict[Modality, tuple[str, ...]] = {
    "see": ("I see {seen}.", "The video shows {seen}.", "There is {seen} in the picture."),
    "hear": ("I hear {heard}.", "The sound is that of {heard}.", "It sounds like {heard}."),
    "both": (
        "I see {seen} and I hear {heard}.",
        "The video shows {seen}, and it sounds like {heard}.",
        "There is {seen}, and the sound is that of {heard}.",
    ),
}


def question(modality: Modality, seed: int | None = None) -> str:
    """The canonical wording, or, with a seed, any wording of that modality."""
    if seed is None:
        return QUESTIONS[modality][0]
    return random.Random(seed).choice(QUESTIONS[modality])


def answer(modality: Modality, seen: str, heard: str, style: int = 0) -> tuple[str, str]:
    """(the whole answer, the part of it that is the label). For `both` that part runs from the seen phrase to the heard one.

    `seen`, `heard` are the clip's phrases; "" (the picture of a blanked clip, the sound of a muted one) is answered with "nothing".
    style: which of ANSWERS; diagnosis and fine-tuning use the first.
    """
    seen, heard = seen or NOTHING, heard or NOTHING
    template = ANSWERS[modality][style]
    start, stop = template.index("{"), template.rindex("}") + 1
    return template.format(seen=seen, heard=heard), template[start:stop].format(seen=seen, heard=heard)
