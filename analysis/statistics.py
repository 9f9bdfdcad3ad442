"""Intervals, p values and a permutation null that know which clips share a source.

    from analysis.statistics import Dyads, Intervals, by_source, holm

    intervals = Intervals(by_source(video_sources, audio_sources), n)     # conflicts: two-way; one-way where one stream never varies
    intervals.rates(hits)         # shares of 0/1 values (n, m): one Estimate a column, Wilson
    intervals.means(values)       # any other mean
    intervals.effects(deltas)     # signed quantities: with p value and effect size
    intervals.ratio(part, other)  # Shortcut Index: |mean part| / (|mean part| + |mean other|), Fieller
    Intervals(Dyads(i, j), n)     # grids: both members come from one set of sources

Clips made from one picture or one recording are not independent. What is assumed is only that two items which share no source are. With
e the residuals, the variance of a mean over n items is then Σ e_a e_b / n² over all pairs (a, b) of items that share a source, a = b
included: the cluster-robust variance, its two-way form (Cameron, Gelbach & Miller 2011, J. Business & Economic Statistics 29(2)), and its
dyadic form (Fafchamps & Gubert 2007, J. Development Economics 83(2); Aronow, Samii & Assenova 2015, Political Analysis 23(4)) in one formula.

Few sources make that sum too small and its square root far from normal. Both are put right under a working model in which items of one source
correlate by ρ: the sum is divided by what it would be expected to be, and t has the degrees of freedom that match its variance (Satterthwaite,
as Bell & McCaffrey 2002, Survey Methodology 28(2), do for ρ = 0). ρ is estimated from the same values, between 0 and 1; the model only
sets the correction, so a wrong one costs little.

Why no bootstrap: measured on null data of the real designs (tests/analysis/test_statistics.py), these intervals miss zero in 4-6 %; the
pigeonhole bootstrap (Owen 2007), which counts noise of single clips three times, in 0.5-3 %. A wild bootstrap needs multipliers that are equal
for any two items that share a source, and there are none for crossed or dyadic data. Nothing is drawn here except for `Intervals.flipped`.

Limits: with fewer than about ten sources intervals are wide and, on the two-way and dyadic designs, too cautious; where sources differ
very much in size or their effects are very skewed they miss up to twice as often as they say (figures: docs/definitions.md). Where all items share
a source with all others nothing can be said, and bounds are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, hstack
from scipy.special import stdtr, stdtrit

from analysis.findings import Effect, Estimate

E = TypeVar("E", bound=Estimate)

LEAST = 0.25  # of the variance that independent items would have: a sum over few sources can come out near zero, or below, by chance


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


class Spread(NamedTuple):
    """Standard errors (m,) and degrees of freedom of their t (m,)."""

    error: NDArray
    freedom: NDArray
    rho: NDArray  # how much items of one source correlate, 0 to 1


class Flipped(NamedTuple):
    """A permutation null: two-sided p value, and the |mean| that 95 % of the flipped data stay below."""

    p: float
    widest: float


class Intervals:
    """95 % intervals of quantities measured on the same `n` items. `clusters` (attribute): how many sources; of two dimensions the smaller
    count; for dyads the nodes.

    Methods take one column a quantity, (n, m), and give m results; `weights` (n,) makes a mean Σ values / Σ weights, e.g. sums and numbers of
    tokens of each clip, and n their total. Without items: Estimate(None, None, None, 0, 0). Raises ValueError for NaN or infinite values and
    for clusters of another length.
    """

    def __init__(self, clusters: Clusters, n: int):
        self.n, self.clusters, self.usable = n, 0, False
        if not n:
            return
        sides, self._dyadic = _sides(clusters, n)
        self._sides = sides
        self.clusters = self._count(np.ones(n, dtype=bool))
        self._pair = np.unique(np.stack(sides, axis=1), axis=0, return_inverse=True)[1].reshape(-1)  # items with the same sources
        self._sources = sum(_onehot(side, max(s.max() for s in sides) + 1) for side in sides)
        parts = [self._sources] if len(sides) == 1 else [self._sources, _onehot(self._pair, int(self._pair.max()) + 1)]
        self._member: Any = hstack(parts, format="csr")  # items that share both sources would count twice: so pairs are taken off again
        self._sign = np.repeat([1.0, -1.0], [self._sources.shape[1], self._member.shape[1] - self._sources.shape[1]])
        # With K[a, b] = 1 where items share a source and M = I - 1/n, the traces of (MK)^k, got from the clusters' own small matrix:
        sizes = np.asarray(self._member.sum(axis=0))
        c = self._sign[:, None] * ((self._member.T @ self._member).toarray() - np.outer(sizes, sizes) / n)
        c2 = c @ c
        self._traces = float(np.trace(c)), float(np.trace(c2)), float((c2 * c.T).sum()), float((c2 * c2.T).sum())
        self._sharing = float(self._sign @ sizes**2)  # ordered pairs of items that share a source, each with itself included
        self.usable = self._traces[0] > 1e-9 * n

    # ---------------------------------------------------------------- what is reported

    def means(self, values: ArrayLike, weights: ArrayLike | None = None) -> list[Estimate]:
        """Mean of each column, with a t interval."""
        mean, influence, n, clusters = self._linear(values, weights)
        low, high = self._bounds(mean, influence, clusters)
        return [Estimate(_f(v), _f(a), _f(b), n, clusters) for v, a, b in zip(mean, low, high, strict=True)]

    def rates(self, values: ArrayLike, weights: ArrayLike | None = None) -> list[Estimate]:
        """Mean of each column of values between 0 and 1 (0/1 hits), with Wilson's interval (1927) at the effective number of items
        p(1 - p) / variance and t for z, after Korn & Graubard (1998, Survey Methodology 24(2)): never outside 0..1, never without width.

        Where all hits agree one cannot see how alike the clips of a source are; then the effective number is the geometric mean of n and the
        effective number of sources.
        """
        mean, influence, n, clusters = self._linear(values, weights)
        if n and ((mean < -1e-9) | (mean > 1 + 1e-9)).any():
            raise ValueError("a rate is between 0 and 1; use `means` or `effects` for other quantities.")
        if not self.usable or clusters < 2:
            return [Estimate(_f(v), None, None, n, clusters) for v in mean]
        mean = np.clip(mean, 0, 1)
        spread, same = self.spread(influence), _flat(mean, influence)
        effective = np.where(same, self._effective(n), mean * (1 - mean) / np.where(same, 1, np.maximum(spread.error, 1e-12) ** 2))
        t2 = _t(spread.freedom) ** 2
        center = (mean + t2 / (2 * effective)) / (1 + t2 / effective)
        half = np.sqrt(t2 * (mean * (1 - mean) / effective + t2 / (4 * effective**2))) / (1 + t2 / effective)
        low, high = np.where(mean == 0, 0, center - half), np.where(mean == 1, 1, center + half)
        return [Estimate(_f(v), _f(a), _f(b), n, clusters) for v, a, b in zip(mean, low, high, strict=True)]

    def effects(self, values: ArrayLike, of_rates: bool = False) -> list[Effect]:
        """Mean of each column of signed values, with a t interval, the two-sided p value of "it is zero" from the same t, and the mean divided by
        the standard deviation over items as its size.

        Where all values agree there is no spread to judge by: p is 1 if they are 0, else that of as many sources having the same sign by
        chance, 2^(1 - clusters). `of_rates`: the values are differences of 0/1 values; then such a column still gets the width that
        `rates` would give it.
        """
        mean, influence, *_ = self._linear(values, None)
        return self.effects_of(mean, influence, of_rates)

    def effects_of(self, value: ArrayLike, influence: ArrayLike, of_rates: bool = False) -> list[Effect]:
        """`effects` of quantities (m,) that are no plain means, from the influence of each item on them (n, m), which sums to 0 (delta method)."""
        mean, psi = np.atleast_1d(np.asarray(value, dtype=float)), _columns(influence, self.n)
        if not self.n:
            return [Effect(None, None, None, 0, 0)] * len(mean)
        low, high = self._bounds(mean, psi, self.clusters)
        flat, deviation = _flat(mean, psi), psi.std(axis=0, ddof=1) if self.n > 1 else np.zeros(len(mean))
        spread = self.spread(psi)
        p = 2 * stdtr(spread.freedom, -np.abs(mean) / np.where(flat, 1, spread.error))
        p = np.where(flat, np.where(mean == 0, 1.0, 2.0 ** (1 - self.clusters)), p)
        if of_rates and self.usable:
            t2 = _t(spread.freedom) ** 2
            hidden = t2 / (self._effective(self.n) + t2)  # Wilson's bound where none of n changed
            low, high = np.where(flat, np.maximum(mean - hidden, -1), low), np.where(flat, np.minimum(mean + hidden, 1), high)
        able = self.usable
        return [
            Effect(_f(v), _f(a), _f(b), self.n, self.clusters, _f(q) if able else None, None, None if f or not d else float(v / d))
            for v, a, b, q, f, d in zip(mean, low, high, p, flat, deviation, strict=True)
        ]

    def ratio(self, part: ArrayLike, other: ArrayLike) -> Estimate:
        """|mean part| / (|mean part| + |mean other|) from values (n,) of the same items: pooled means, never a mean of ratios. None where both
        means are 0.

        Interval after Fieller (1954, J. Royal Statistical Society B 16(2)): all r in 0..1 for which mean part * (1 - r) is not significantly
        different from both r * mean other and -r * mean other. It reaches 1 where the denominator could be anything.
        """
        both = _columns(np.stack([np.asarray(part, dtype=float), np.asarray(other, dtype=float)], axis=-1), self.n)
        if not self.n:
            return Estimate(None, None, None, 0, 0)
        value, influence = shortcut(both[:, 0], both[:, 1])
        if value is None or not self.usable:
            return Estimate(value, None, None, self.n, self.clusters)
        a, b = both.mean(axis=0)
        centred = both - [a, b]
        # Variances of part, other and their sum give the covariance; one t for all, that of the ratio itself.
        error = self.spread(np.stack([centred[:, 0], centred[:, 1], centred.sum(axis=1)], axis=1)).error ** 2
        t2 = _t(self.spread(influence[:, None]).freedom)[0] ** 2
        va, vb = error[0], error[1]
        cov = float(np.clip((error[2] - va - vb) / 2, -np.sqrt(va * vb), np.sqrt(va * vb)))
        inside = [value]
        for sign in (1.0, -1.0):
            # (a (1-r) - s b r)² <= t² [va (1-r)² - 2 s cov r (1-r) + vb r²] as q2 r² + q1 r + q0 <= 0
            u, w, x = a * a - t2 * va, sign * (a * b - t2 * cov), b * b - t2 * vb
            polynomial = np.array([u + 2 * w + x, -2 * (u + w), u])
            roots = np.roots(polynomial)
            inside += [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 <= r.real <= 1]
            inside += [r for r in (0.0, 1.0) if np.polyval(polynomial, r) <= 0]
        return Estimate(value, min(inside), max(inside), self.n, self.clusters)

    def flipped(self, values: ArrayLike, flips: int = 2000, seed: int = 0) -> Flipped:
        """Permutation null of a mean of signed values (n,) under which they are as likely to have the other sign.

        Values of items that share a source cannot flip each on its own. So each is split into a part that belongs to its sources (least squares,
        shrunk to the variance that ρ leaves it) and the rest; each source's part and each pair's rest keep together and get a random sign.
        Compared is |mean| / standard error, so that the split sets only the shape of the null and not its width (studentised
        permutation: Janssen 1997, Statistics & Probability Letters 36(1)).
        """
        y = _columns(np.asarray(values, dtype=float)[..., None], self.n)[:, 0]
        if not self.usable or not y.any():
            return Flipped(1.0, 0.0)
        observed = self.spread((y - y.mean())[:, None])
        rho, sources = float(observed.rho[0]), self._sources.toarray()
        fitted = np.linalg.lstsq(sources, y, rcond=None)[0]
        rest = max(1 - rho * sources[0].sum(), 0) / sources.sum(axis=0)
        fitted *= np.sqrt(rho / np.maximum(rho + rest, 1e-12))
        rng = np.random.default_rng(seed)
        drawn = np.empty(flips)
        for start in range(0, flips, 500):
            k = min(500, flips - start)
            by_source = sources @ (rng.choice([-1.0, 1.0], size=(len(fitted), k)) * fitted[:, None])
            by_pair = rng.choice([-1.0, 1.0], size=(int(self._pair.max()) + 1, k))[self._pair] * (y - sources @ fitted)[:, None]
            mean = (by_source + by_pair).mean(axis=0)
            error = self.spread(by_source + by_pair - mean).error
            drawn[start : start + k] = np.abs(mean) / np.where(error > 0, error, np.inf)
        at = abs(y.mean()) / observed.error[0] if observed.error[0] else np.inf
        p = (1 + int((drawn >= at - 1e-12).sum())) / (1 + flips)
        return Flipped(p, float(np.quantile(drawn, 0.95) * observed.error[0]))

    # ---------------------------------------------------------------- how it is computed

    def spread(self, influence: ArrayLike) -> Spread:
        """Standard error of the mean of each column of residuals (n, m), see the module."""
        psi, n = _columns(influence, self.n), self.n
        m = psi.shape[1]
        if not self.usable:
            return Spread(np.full(m, np.nan), np.full(m, np.nan), np.full(m, np.nan))
        t1, t2, t3, t4 = self._traces
        alone = (psi**2).sum(axis=0)
        robust = self._sign @ (self._member.T @ psi) ** 2  # Σ e_a e_b over pairs that share a source
        q = robust / np.where(alone > 0, alone, 1)
        below = (t2 - t1) + q * (n - 1 - t1)
        rho = np.clip(np.where(np.abs(below) > 1e-9 * n, (q * (n - 1) - t1) / np.where(below == 0, 1, below), 0), 0, 1)
        expected = (1 - rho) * t1 + rho * t2
        variance = robust / n**2 * ((1 - rho) * n + rho * self._sharing) / expected
        floor = LEAST * alone / (n * max(n - 1, 1))
        freedom = expected**2 / ((1 - rho) ** 2 * t2 + 2 * rho * (1 - rho) * t3 + rho**2 * t4)
        # Where few nodes form all pairs, noise alone would give a fraction of a degree, and intervals that say nothing.
        return Spread(np.sqrt(np.maximum(variance, floor)), np.maximum(freedom, min(2, self.clusters - 1)), rho)

    def _linear(self, values: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray, NDArray, int, int]:
        """Mean of each column, influence of each item on it, how many things and sources it is over."""
        array = _columns(values, self.n)
        if weights is None:
            mean = array.mean(axis=0) if self.n else np.full(array.shape[1], np.nan)
            return mean, array - mean, self.n, self.clusters
        weight = _columns(np.asarray(weights, dtype=float)[..., None], self.n)[:, 0]
        total = float(weight.sum())
        if not total:
            return np.full(array.shape[1], np.nan), np.zeros_like(array), 0, 0
        mean = array.sum(axis=0) / total
        return mean, (array - mean * weight[:, None]) * (self.n / total), round(total), self._count(weight > 0)

    def _count(self, there: NDArray) -> int:
        """Sources of some of the items."""
        counts = [len(np.unique(side[there])) for side in ([np.stack(self._sides, axis=1)] if self._dyadic else self._sides)]
        return min(counts)

    def _bounds(self, mean: NDArray, influence: NDArray, clusters: int) -> tuple[NDArray, NDArray]:
        if not self.usable or clusters < 2:
            return np.full(len(mean), np.nan), np.full(len(mean), np.nan)
        spread = self.spread(influence)
        half = np.where(_flat(mean, influence), 0, _t(spread.freedom) * spread.error)
        return mean - half, mean + half

    def _effective(self, n: int) -> float:
        """How many independent items n are worth where nothing shows how alike those of a source are."""
        return float(np.sqrt(n * self.n**2 / self._sharing))


def shortcut(part: NDArray, other: NDArray) -> tuple[float | None, NDArray]:
    """|mean part| / (|mean part| + |mean other|), None where both are 0, and the influence of each item on it, (n,) (delta method)."""
    a, b = float(part.mean()), float(other.mean())
    total = abs(a) + abs(b)
    if not total:
        return None, np.zeros(len(part))
    return abs(a) / total, (np.sign(a) * abs(b) * (part - a) - np.sign(b) * abs(a) * (other - b)) / total**2


def mapped(estimate: E, scale: Callable[[float], float]) -> E:
    """The same estimate on another scale: a rising function of value and bounds, e.g. math.exp for perplexity from its logarithm, math.expm1 for
    the relative change of perplexity from the change of its logarithm.
    """
    value, low, high = (None if number is None else scale(number) for number in (estimate.value, estimate.low, estimate.high))
    return replace(estimate, value=value, low=low, high=high)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p values of one family after Holm (1979, Scandinavian J. Statistics 6(2)), in the same order; None stays None and counts for nothing.

    Holds the family-wise error for any dependence. Sign flips with the largest |t| (Romano & Wolf 2005) would gain power where the
    members agree, but exact flips exist for none of the crossed and dyadic designs.
    """
    there = sorted((value, i) for i, value in enumerate(p) if value is not None)
    out: list[float | None] = [None] * len(p)
    reached = 0.0
    for rank, (value, i) in enumerate(there):
        reached = max(reached, min(1.0, (len(there) - rank) * value))
        out[i] = reached
    return out


def corrected(family: Sequence[Effect]) -> list[Effect]:
    """The same effects with `p_corrected` over all of them (`holm`)."""
    return [replace(effect, p_corrected=p) for effect, p in zip(family, holm([effect.p for effect in family]), strict=True)]


def _sides(clusters: Clusters, n: int) -> tuple[list[NDArray], bool]:
    """For each dimension the number of every item's source, and whether both dimensions number the same sources (dyads)."""
    if isinstance(clusters, Dyads):
        if len(clusters.first) != n or len(clusters.second) != n:
            raise ValueError(f"every value needs its clusters: got {len(clusters.first)} and {len(clusters.second)} for {n}.")
        node = _index([*clusters.first, *clusters.second], 2 * n)
        low, high = np.minimum(node[:n], node[n:]), np.maximum(node[:n], node[n:])
        if (low == high).any():
            raise ValueError("dyads need two different nodes for every value.")
        return [low, high], True
    if isinstance(clusters, tuple) and len(clusters) == 2 and all(isinstance(c, Sequence | np.ndarray) and not isinstance(c, str) for c in clusters):
        row, column = _index(clusters[0], n), _index(clusters[1], n)
        return [row, int(row.max()) + 1 + column], False
    return [_index(clusters, n)], False


def _index(names: Sequence[Any] | NDArray, n: int) -> NDArray:
    """Cluster names -> 0, 1, … in sorted order of their text, so that the order of the items changes nothing."""
    if len(names) != n:
        raise ValueError(f"every value needs its cluster: got {len(names)} for {n}.")
    return np.unique(np.array([str(name) for name in names]), return_inverse=True)[1]


def _onehot(index: NDArray, size: int) -> csr_array:
    return csr_array((np.ones(len(index)), (np.arange(len(index)), index)), shape=(len(index), size))


def _columns(values: ArrayLike, n: int) -> NDArray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or array.shape[0] != n:
        raise ValueError(f"values need one row an item and one column a quantity, ({n}, m), not shape {array.shape}.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"values hold {bad} NaN or infinite numbers: find out where they come from, or leave those items out and say so.")
    return array


def _flat(mean: NDArray, influence: NDArray) -> NDArray:
    """(m,) bool: all values agree, up to rounding."""
    largest = np.abs(influence).max(axis=0) if len(influence) else np.zeros(len(mean))
    return largest <= np.maximum(1e-12 * np.abs(mean), 1e-150)


def _t(freedom: NDArray) -> NDArray:
    """97.5 % point of t."""
    return stdtrit(freedom, 0.975)


def _f(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
