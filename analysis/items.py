"""What findings keep of every clip or grid, so that two findings can be compared pair by pair (analysis/compare.py).

    items = ItemStore()
    group = items.clips(clips)                            # these clips, clustered by picture and recording
    group.rates([key], hits)                              # the Estimate, and the hits are kept under the key
    items.of(ids, Dyads(first, second)).effects(...)      # grids
    findings.items = items.saved()

A key says which number of the findings the values belong to; `compare` names numbers alike. Values are text: one digit an item where all
are 0 or 1, else six significant digits with spaces between (docs/findings.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.findings import Effect, Estimate, Items
from analysis.statistics import Clusters, Dyads, Intervals, by_source
from data.clips import Clip


class Key(NamedTuple):
    """Which number of the findings: e.g. Key("knockout", "counterfactual", "hear", cut_item("video->emitters", 3, 8, "from"), "delta_logprob")."""

    section: str  # following | reliance | knockout | flow | probe | lens | latent | tuned | captions | shift | language
    condition: str | None
    question: str | None  # hear | see
    item: str  # which row of the section
    measure: str  # the field of the row

    @property
    def text(self) -> str:
        """As `Items` write it."""
        return "|".join(part or "" for part in self)


def cut_item(site: str, start: int, stop: int, family: str) -> str:
    """A cut as an item."""
    return f"{site} [{start}, {stop}) {family}"


def flow_item(target: str, kind: str, variant: str, layer: int) -> str:
    """Attention mass as an item."""
    return f"{target} <- {kind}, {variant}, layer {layer}"


def probe_item(label: str, position: str, layer: int) -> str:
    """A linear probe as an item."""
    return f"{label} label at {position}, layer {layer}"


def lens_item(label: str, k: int, position: str, layer: int, lens: str = "logit") -> str:
    """A lens as an item."""
    return f"{label} words in the top {k} at {position}{'' if lens == 'logit' else f', {lens} lens'}, layer {layer}"


def latent_item(tuned: bool = False, end: bool = False, swapped: bool = False) -> str:
    """Latent audio understanding as an item: by which lens, at the sound's own rows or its closing delimiter, and with which half to choose on."""
    return ", ".join(part for part in ("tuned lens" * tuned, "end-of-audio token" * end, "halves exchanged" * swapped) if part)


def tuned_item(layer: int) -> str:
    """How far a lens is from the final output as an item."""
    return f"KL to the final output, layer {layer}"


def packed(values: ArrayLike) -> str:
    """Numbers as text: "0110" where all are 0 or 1, else "0.25 -1.5 3"."""
    array = np.asarray(values, dtype=float)
    if np.isin(array, (0, 1)).all():
        return "".join("1" if v else "0" for v in array)
    return " ".join(f"{v:.6g}" for v in array)


def unpacked(text: str, n: int) -> NDArray:
    """The n numbers that `packed` wrote, up to rounding. Raises ValueError for another number of them."""
    parts = list(text) if " " not in text and len(text) == n else text.split()
    if len(parts) != n:
        raise ValueError(f"{len(parts)} values are kept for {n} items: {text[:40]!r}.")
    return np.array([float(part) for part in parts])


class Group:
    """Some items, their intervals, and what is kept of them. Values are (n, keys), as in `Intervals`."""

    def __init__(self, ids: Sequence[str], clusters: Clusters):
        if len(set(ids)) != len(ids):
            raise ValueError("items are told apart by their ids, and some of these are the same.")
        two = isinstance(clusters, tuple)
        self.intervals = Intervals(by_source(*clusters) if two and not isinstance(clusters, Dyads) else clusters, len(ids))
        self.items = Items(list(ids), [[str(name) for name in side] for side in (clusters if two else (clusters,))], isinstance(clusters, Dyads))

    def keep(self, key: Key, values: ArrayLike, weights: ArrayLike | None = None) -> None:
        """Keep values (n,), and weights where the number is Σ values / Σ weights."""
        self.items.values[key.text] = packed(values)
        if weights is not None:
            self.items.weights[key.text] = packed(weights)

    def rates(self, keys: Sequence[Key], values: ArrayLike, weights: ArrayLike | None = None) -> list[Estimate]:
        """`Intervals.rates`, kept."""
        self._all(keys, values, weights)
        return self.intervals.rates(values, weights)

    def means(self, keys: Sequence[Key], values: ArrayLike, weights: ArrayLike | None = None) -> list[Estimate]:
        """`Intervals.means`, kept."""
        self._all(keys, values, weights)
        return self.intervals.means(values, weights)

    def effects(self, keys: Sequence[Key], values: ArrayLike) -> list[Effect]:
        """`Intervals.effects`, kept."""
        self._all(keys, values, None)
        return self.intervals.effects(values)

    def _all(self, keys: Sequence[Key], values: ArrayLike, weights: ArrayLike | None) -> None:
        for key, column in zip(keys, np.asarray(values).T, strict=True):
            self.keep(key, column, weights)


def clip_clusters(clips: Sequence[Clip], video: bool = True, audio: bool = True) -> Clusters:
    """What intervals over these clips are clustered by: picture and recording, two-way; one of them where the model is given only one stream."""
    if not video:
        return [c.audio_source for c in clips]
    if not audio:
        return [c.video_source for c in clips]
    return by_source([c.video_source for c in clips], [c.audio_source for c in clips])


class ItemStore:
    """The groups of one diagnosis."""

    def __init__(self) -> None:
        self._groups: dict[tuple, Group] = {}

    def of(self, ids: Sequence[str], clusters: Clusters) -> Group:
        """The group of these items in this order; made at the first asking."""
        names = tuple(tuple(map(str, side)) for side in (clusters if isinstance(clusters, tuple) else (clusters,)))
        key = (tuple(ids), isinstance(clusters, Dyads), names)
        if key not in self._groups:
            self._groups[key] = Group(ids, clusters)
        return self._groups[key]

    def clips(self, clips: Sequence[Clip], video: bool = True, audio: bool = True) -> Group:
        """The group of these clips, clustered by what the model is given of them."""
        return self.of([clip.id for clip in clips], clip_clusters(clips, video, audio))

    def saved(self) -> list[Items]:
        """What findings keep."""
        return [group.items for group in self._groups.values() if group.items.values]
