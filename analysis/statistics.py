"""Bootstrap intervals that know which clips share a source.

    from analysis.statistics import Dyads, bootstrap, by_source, paired_difference, ratio_bootstrap

    bootstrap(hits, sources)                             # one-way: whole sources are resampled
    bootstrap(hits, (video_sources, audio_sources))      # two-way: both dimensions, independently
    bootstrap(effects, Dyads(first, second))             # grids: both members come from one set of nodes
    ratio_bootstrap(e_video, e_audio, Dyads(i, j))       # Shortcut Index on hear-questions

Clips made from one picture or one recording are not independent, so what is resampled is the source, never the clip. A draw gives each source
the number of times it was picked (a multinomial) and each clip the *product* of the counts of its sources: the pigeonhole bootstrap of Owen
(2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)); for dyads both counts come from the same draw
(the vertex bootstrap of Snijders & Borgatti 1999, Connections 22(2), without filling in pairs of a node with itself).
It errs on the wide side: noise of single clips counts up to three times. Intervals are 95 % percentile intervals of the weighted mean.

The same seed and the same clusters give the same draws, so quantities measured on the same clips are resampled together. Two limits to know:
a bootstrap cannot see past the values it has (when all values agree the interval has no width; by the rule of three, a rate of up to about
3 / clusters may hide there), and it needs something to resample: with one source in some dimension (or one pair of nodes) both bounds are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.findings import Estimate


class Dyads(NamedTuple):
    """The two members of each pair, e.g. the clips (or their sources) i and j of each grid. A pair of a node with itself is refused."""

    first: Sequence[Any]
    second: Sequence[Any]


Clusters = Sequence[Any] | NDArray | tuple[Sequence[Any], Sequence[Any]] | Dyads


def by_source(video_sources: Sequence[Any], audio_sources: Sequence[Any]) -> Clusters:
    """Clusters of clips: two-way where both streams vary; one-way where one stream is the same throughout (blanked or muted)."""
    if len(set(video_sources)) == 1:
        return list(audio_sources)
    if len(set(audio_sources)) == 1:
        return list(video_sources)
    return (list(video_sources), list(audio_sources))


def bootstrap(values: ArrayLike, clusters: Clusters, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of `values` (n,) with its 95 % interval, in the unit of the values.

    `Estimate.clusters` counts the sources; of two dimensions the smaller count; for dyads the nodes.
    Raises ValueError for NaN or infinite values and for clusters of another length. No values: Estimate(None, None, None, 0, 0).
    """
    array = _checked(values, "values")
    if not array.size:
        return Estimate(None, None, None, 0, 0)
    design = _design(clusters, array.size)
    totals = design.resample([array], draws, seed)
    return _estimate(float(array.mean()), None if totals is None else totals[1] / totals[0], array.size, design.clusters)


def ratio_bootstrap(part: ArrayLike, other: ArrayLike, clusters: Clusters, draws: int = 1000, seed: int = 0) -> Estimate:
    """|mean part| / (|mean part| + |mean other|) with its interval: pooled means in every draw, never a mean of ratios (Shortcut Index).

    `part`, `other`: (n,), one entry per grid. None where both means are exactly 0. Errors as in `bootstrap`.
    """
    a, b = _checked(part, "part"), _checked(other, "other")
    if a.size != b.size:
        raise ValueError(f"a ratio needs both effects of every grid: got {a.size} and {b.size}.")
    if not a.size:
        return Estimate(None, None, None, 0, 0)
    design = _design(clusters, a.size)
    total = abs(float(a.mean())) + abs(float(b.mean()))
    drawn = None
    if totals := design.resample([a, b], draws, seed):
        numerator, both = np.abs(totals[1]), np.abs(totals[1]) + np.abs(totals[2])
        drawn = numerator[both > 0] / both[both > 0]
    return _estimate(abs(float(a.mean())) / total if total else None, drawn, a.size, design.clusters)


def paired_difference(before: ArrayLike, after: ArrayLike, clusters: Clusters, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of after − before over the same clips in the same order, with its interval. Positive: it grew. Errors as in `bootstrap`."""
    a, b = _checked(before, "before"), _checked(after, "after")
    if a.size != b.size:
        raise ValueError(f"a paired difference needs the same clips before and after: got {a.size} and {b.size}.")
    return bootstrap(b - a, clusters, draws, seed)


class _Design(NamedTuple):
    """Each item's place in a (rows, columns) table of clusters, and how the two sides are drawn."""

    row: NDArray
    column: NDArray
    shape: tuple[int, int]
    clusters: int
    resampled: bool  # False: nothing to resample
    dyadic: bool  # one draw serves both sides

    def resample(self, values: list[NDArray], draws: int, seed: int) -> list[NDArray] | None:
        """[total weight, weighted sum of each of `values`], each (draws,); draws that picked no item at all are left out."""
        if not self.resampled:
            return None
        rng = np.random.default_rng(seed)
        rows = _counts(rng, self.shape[0], draws)
        columns = rows if self.dyadic else _counts(rng, self.shape[1], draws)
        totals = []
        for weight in [np.ones(self.row.size), *values]:
            table = np.zeros(self.shape)
            np.add.at(table, (self.row, self.column), weight)
            totals.append(((rows @ table) * columns).sum(axis=1))
        picked = totals[0] > 0
        return [total[picked] for total in totals] if picked.any() else None


def _counts(rng: np.random.Generator, groups: int, draws: int) -> NDArray:
    """(draws, groups): how often each cluster is picked when as many clusters as there are get drawn with replacement. One group: always once."""
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(float)


def _design(clusters: Clusters, n: int) -> _Design:
    if isinstance(clusters, Dyads):
        node = _index([*clusters.first, *clusters.second], 2 * n)
        row, column, nodes = node[:n], node[n:], int(node.max()) + 1
        if len(clusters.first) != n or (row == column).any():
            raise ValueError("dyads need two different nodes for every value: `first` and `second` as long as the values.")
        return _Design(row, column, (nodes, nodes), nodes, len({(min(a, b), max(a, b)) for a, b in zip(row, column, strict=True)}) > 1, True)
    if isinstance(clusters, tuple) and len(clusters) == 2 and all(isinstance(c, Sequence | np.ndarray) and not isinstance(c, str) for c in clusters):
        row, column = _index(clusters[0], n), _index(clusters[1], n)
        shape = (int(row.max()) + 1, int(column.max()) + 1)
        return _Design(row, column, shape, min(shape), min(shape) > 1, False)
    row = _index(clusters, n)
    groups = int(row.max()) + 1
    return _Design(row, np.zeros(n, dtype=int), (groups, 1), groups, groups > 1, False)


def _index(names: Sequence[Any] | NDArray, n: int) -> NDArray:
    """Cluster names -> 0, 1, … in sorted order of their text, so that the order of the items does not change the draws."""
    if len(names) != n:
        raise ValueError(f"every value needs its cluster: got {len(names)} for {n}.")
    return np.unique(np.array([str(name) for name in names]), return_inverse=True)[1]


def _checked(values: ArrayLike, what: str) -> NDArray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(f"{what} must be one number per item, not an array of shape {array.shape}.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{what} hold {bad} NaN or infinite numbers: find out where they come from, or leave those items out and say so.")
    return array


def _estimate(value: float | None, drawn: NDArray | None, n: int, clusters: int) -> Estimate:
    if value is None or drawn is None or not drawn.size:
        return Estimate(value, None, None, n, clusters)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n, clusters)
