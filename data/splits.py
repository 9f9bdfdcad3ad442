"""Who may meet whom: class pairs for training and for testing.

What is split by what:

- by **rendering**: train, plan, selection and test share pictures and recordings, but no rendering (factual clip) is in two splits;
- by **class pair**: a conflict of classes {i, j} is unordered (i seen with j heard, or the other way round). A third of all pairs
  is held out: never in train or plan. A quarter of the held-out pairs belongs to `selection`, the rest to `test`;
- by **source**: only `unseen`, and only as far as a class has held-out sources (see `data.sources`): in the embedded set every class has a picture
  of the held-out style, 9 of 43 have a held-out recording, and the clips of the others carry new renderings of recordings that are trained on.
  Rates of that split are of streams whose source the train split lacks (`data.clips.Clips.sources`). Its pairs are those of `test`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.clips import DataError, Split

Pair = tuple[str, str]


def pair(a: str, b: str) -> Pair:
    """The unordered pair of two classes: sorted."""
    return (a, b) if a <= b else (b, a)


@dataclass(frozen=True)
class Pairs:
    """All unordered pairs of classes in three disjoint parts."""

    train: frozenset[Pair]
    selection: frozenset[Pair]
    test: frozenset[Pair]

    def of(self, split: Split) -> frozenset[Pair]:
        """The pairs that conflicts of this split may be made of."""
        if split in ("train", "plan"):
            return self.train
        return self.selection if split == "selection" else self.test


def split_pairs(classes: Sequence[str], seed: int = 0) -> Pairs:
    """A third of the pairs held out (rounded), of these a quarter for selection (at least one); deterministic by seed.

    The pairs are taken round by round of a round-robin tournament among the shuffled classes, in each of which everybody plays
    once: so each class has as many held-out pairs as any other, give or take one or two, and a conflict test covers all classes alike.
    Raises DataError for fewer than four classes: there would be no pair for one of the parts.
    """
    if len(classes) < 4 or len(set(classes)) < len(classes):
        raise DataError(f"Conflicts need at least four different classes to hold pairs out, not {list(classes)}. Name more classes.")
    rng = random.Random(seed)
    ring: list[str | None] = [*sorted(classes)]
    rng.shuffle(ring)
    if len(ring) % 2:
        ring.append(None)  # a bye
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        rounds.append([pair(a, b) for a, b in zip(ring[:half], reversed(ring[half:]), strict=True) if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]  # the circle method: the first stays, the others move on by one
    rng.shuffle(rounds)
    ordered = [p for games in rounds for p in games]
    held = round(len(ordered) / 3)
    selection = max(1, round(held / 4))
    return Pairs(frozenset(ordered[held:]), frozenset(ordered[:selection]), frozenset(ordered[selection:held]))
