"""Yes/no sets: what a free answer says, and accuracy, precision, recall, F1 and Yes % over a set of them (docs/definitions.md).

said("No, there is no dog barking.")                      # False
yes_no(["Yes.", "No", "Hm"], [True, True, False])         # YesNo(accuracy=0.5, …, unparsed=1/3, n=3)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class YesNo(NamedTuple):
    """Scores over the answers that say yes or no; None where nothing is divided by. `unparsed`: share of the other answers; n: all answers."""

    accuracy: float | None
    precision: float | None  # of the answers that say yes, those that should
    recall: float | None  # of the answers that should say yes, those that do
    f1: float | None
    yes: float | None  # share of answers that say yes: far from the set's own share, the model has a preference
    unparsed: float | None
    n: int


def said(answer: str) -> bool | None:
    """The first "yes" or "no" of an answer; None where there is neither."""
    word = _WORD.search(answer)
    return None if word is None else word[0].lower() == "yes"


def yes_no(answers: Sequence[str], wanted: Sequence[bool]) -> YesNo:
    """Scores of free answers against what they should say, in the same order. An answer that says neither is unparsed and in no other score."""
    pairs = [(given, want) for answer, want in zip(answers, wanted, strict=True) if (given := said(answer)) is not None]
    hits = sum(given and want for given, want in pairs)
    yes, true, n = sum(given for given, _ in pairs), sum(want for _, want in pairs), len(pairs)
    return YesNo(
        accuracy=_share(sum(given == want for given, want in pairs), n),
        precision=_share(hits, yes),
        recall=_share(hits, true),
        f1=_share(2 * hits, yes + true),
        yes=_share(yes, n),
        unparsed=_share(len(answers) - n, len(answers)),
        n=len(answers),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
