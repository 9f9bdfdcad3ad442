"""Intervals: by hand, against loops over all pairs of items that share a source, and how often they miss on null data of the real designs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.findings import Effect, Estimate
from analysis.statistics import Dyads, Intervals, by_source, holm, shortcut

# ---------------------------------------------------------------- reference: plain loops


def shares(clusters, a, b):
    """Whether items a and b have a source in common."""
    if isinstance(clusters, Dyads):
        return bool({clusters.first[a], clusters.second[a]} & {clusters.first[b], clusters.second[b]})
    if isinstance(clusters, tuple):
        return any(side[a] == side[b] for side in clusters)
    return clusters[a] == clusters[b]


def reference(values, clusters):
    """(standard error, degrees of freedom) of the mean from the definition: dense matrices, every pair of items looked at."""
    n = len(values)
    k = np.array([[float(shares(clusters, a, b)) for b in range(n)] for a in range(n)])
    center = np.eye(n) - 1 / n
    e = np.array(values) - np.mean(values)
    robust = sum(e[a] * e[b] for a in range(n) for b in range(n) if shares(clusters, a, b)) / n**2
    a, q1, q2 = center @ k @ center, e @ e, e @ k @ e
    # two equations: E[e'e] = s² tr(M Ω), E[e'Ke] = s² tr(MKM Ω) with Ω = (1 - ρ) I + ρ K
    rho_of = lambda r: q2 * np.trace(center @ ((1 - r) * np.eye(n) + r * k)) - q1 * np.trace(a @ ((1 - r) * np.eye(n) + r * k))  # noqa: E731
    slope = rho_of(1.0) - rho_of(0.0)
    rho = min(1.0, max(0.0, -rho_of(0.0) / slope)) if abs(slope) > 1e-9 else 0.0
    omega = (1 - rho) * np.eye(n) + rho * k
    variance = robust * omega.sum() / np.trace(a @ omega)
    freedom = np.trace(a @ omega) ** 2 / np.trace(a @ omega @ a @ omega)
    return math.sqrt(max(variance, q1 / n / (n - 1) / 4)), max(freedom, 2)


def designs(rng, n=24):
    row, column = rng.integers(0, 7, n).astype(str), rng.integers(0, 5, n).astype(str)
    first = rng.integers(0, 6, n)
    second = (first + rng.integers(1, 6, n)) % 6
    return {"one": list(row), "two": (list(row), list(column)), "dyads": Dyads([f"n{i}" for i in first], [f"n{i}" for i in second])}


@pytest.mark.parametrize("kind", ["one", "two", "dyads"])
def test_effects_equal_loops_over_all_pairs(kind):
    rng = np.random.default_rng(1)
    for _ in range(5):
        clusters = designs(rng)[kind]
        values = rng.normal(size=(24, 3)) + rng.normal(size=24)[:, None]
        values[:, 2] += 2 * np.array([hash_free(c) for c in (clusters if kind == "one" else clusters[0])])  # one column that sources explain
        for column, effect in zip(values.T, Intervals(clusters, 24).effects(values), strict=True):
            error, freedom = reference(column, clusters)
            half = stats.t.ppf(0.975, freedom) * error
            assert (effect.low, effect.high) == pytest.approx((column.mean() - half, column.mean() + half), rel=1e-9)
            assert effect.p == pytest.approx(2 * stats.t.sf(abs(column.mean()) / error, freedom), rel=1e-9)
            assert effect.size == pytest.approx(column.mean() / column.std(ddof=1)) and effect.n == 24 and effect.p_corrected is None


def hash_free(name):
    """A number for a source's name that is the same in every process."""
    return (sum(map(ord, name)) * 7919) % 13 / 13


# ---------------------------------------------------------------- by hand


def test_independent_items_give_students_t_test():
    values = [1.0, 2.0, 4.0, 5.0]
    effect = Intervals("abcd", 4).effects(np.array(values)[:, None])[0]
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert (effect.value, effect.low, effect.high, effect.p) == pytest.approx((3.0, interval.low, interval.high, expected.pvalue))
    assert effect.size == pytest.approx(3 / math.sqrt(10 / 3))  # deviations -2, -1, 1, 2


def test_equal_clusters_give_the_t_test_of_their_means():
    # Means of a, b, c are 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14 / 2 = 7, error √(7/3), 2 degrees of freedom.
    # ρ = 1 because clips of a source are equal.
    effect = Intervals(["a", "a", "b", "b", "c", "c"], 6).effects(np.array([[1.0, 1, 2, 2, 6, 6]]).T)[0]
    half = stats.t.ppf(0.975, 2) * math.sqrt(7 / 3)
    assert (effect.low, effect.high) == pytest.approx((3 - half, 3 + half))
    assert effect.clusters == 3


def test_two_way_by_hand():
    # A 3 x 3 table with one clip a cell: a[r] + b[c], a = b = (-1, 0, 1). Row sums of e: -3, 0, 3, squares 18; columns the same; cells:
    # 4 + 1 + 0 + 1 + 0 + 1 + 0 + 1 + 4 = 12. Robust sum 18 + 18 - 12 = 24.
    # Each clip shares a source with 5 of 9, so K has 45 ones, K = R + C - I with 3 x 3 blocks: on centred vectors its eigenvalues are
    # 3 - 1 = 2 (rows: 2 of them, columns: 2) and -1 (the other 4): tr(MK) = 8 - 4 = 4, tr((MK)²) = 16 + 4 = 20,
    # third 32 - 4 = 28, fourth 64 + 4 = 68.
    # ρ: e'e = 12, e'Ke = 24, q = 2: (2 * 8 - 4) / ((20 - 4) + 2 (8 - 4)) = 12 / 24 = 1/2.
    # expected ½ 4 + ½ 20 = 12; variance 24 / 81 * (½ 9 + ½ 45) / 12 = 24 * 27 / 972 = 2/3; freedom 144 / (¼ 20 + ½ 28 + ¼ 68) = 144 / 36 = 4.
    rows, columns = [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3
    values = np.array([[r - 1 + c - 1 for r, c in zip(rows, columns, strict=True)]], dtype=float).T
    spread = Intervals((rows, columns), 9).spread(values)
    assert (spread.error[0] ** 2, spread.freedom[0], spread.rho[0]) == pytest.approx((2 / 3, 4, 0.5))
    # which is what is known of it: variances of the mean of rows and of columns, 1 each, over 3: 1/3 + 1/3, with 2 + 2 degrees of freedom


def test_dyads_by_hand():
    # All pairs of 4 nodes, node effects u = (-3, 1, 1, 1), value u_i + u_j: (-2, -2, -2, 2, 2, 2). Node sums of e: -6, 2, 2, 2, squares 48;
    # pairs 6 * 4 = 24; robust 48 - 24 = 24. A pair shares a node with all but its complement: K = 1 - complement,
    # on centred vectors eigenvalue -1 (3 complementary pairs' sums, less the mean: 2) and +1 (their differences: 3): tr(MK) = 3 - 2 = 1,
    # squares 5, third 1, fourth 5.
    # ρ: q = 24 / 24 = 1, (5 - 1) / ((5 - 1) + (5 - 1)) = ½; expected ½ + 5/2 = 3; variance 24 / 36 * (½ 6 + ½ 30) / 3 = 24 * 18 / 108 = 4.
    # Known: mean = 2 ū, so 4 var(u) / 4 = var(u) = 12 / 3 = 4.
    pairs = list(itertools.combinations(range(4), 2))
    u = [-3, 1, 1, 1]
    intervals = Intervals(Dyads([i for i, _ in pairs], [j for _, j in pairs]), 6)
    spread = intervals.spread([[u[i] + u[j]] for i, j in pairs])
    assert (spread.error[0] ** 2, spread.freedom[0], spread.rho[0]) == pytest.approx((4, 9 / (5 / 4 + 1 / 2 + 5 / 4), 0.5))
    assert intervals.clusters == 4


def test_rates_by_hand():
    # 8 of 10 clips of 10 sources: the variance is .16 / 9, so 9 effective clips; Wilson with t² at 9 degrees of freedom.
    estimate = Intervals(range(10), 10).rates(np.array([[1.0] * 8 + [0.0] * 2]).T)[0]
    t2 = stats.t.ppf(0.975, 9) ** 2
    roots = np.roots([1 + t2 / 9, -(1.6 + t2 / 9), 0.64])  # (0.8 - p)² = t² p (1 - p) / 9
    assert (estimate.low, estimate.high) == pytest.approx(sorted(roots))


def test_rates_where_all_agree_have_width():
    # 4 sources of 4 clips: each shares a source with 4 of 16, so 4 effective sources; geometric mean of 16 and 4: 8. No spread: ρ is 0, and
    # freedom (tr MK)² / tr (MK)² with eigenvalue 4 three times: 3.
    intervals, t2 = Intervals([k // 4 for k in range(16)], 16), stats.t.ppf(0.975, 3) ** 2
    ones, zeros = intervals.rates(np.stack([np.ones(16), np.zeros(16)], axis=1))
    assert (ones.value, ones.low, ones.high) == pytest.approx((1, 8 / (8 + t2), 1)) and (zeros.low, zeros.high) == pytest.approx((0, t2 / (8 + t2)))
    same, changed = intervals.effects(np.stack([np.zeros(16), np.ones(16)], axis=1), of_rates=True)
    assert (same.low, same.high, same.p) == pytest.approx((-t2 / (8 + t2), t2 / (8 + t2), 1.0)) and same.size is None
    assert (changed.low, changed.high, changed.p) == pytest.approx((8 / (8 + t2), 1, 2**-3))  # four sources with one sign: 2 (1/2)^4
    assert intervals.effects(np.zeros((16, 1)))[0] == Effect(0, 0, 0, 16, 4, 1.0, None, None)


def test_weights_pool_tokens():
    # 3 clips with 2, 1, 1 tokens, of which 1, 1, 0 are hits: 2 / 4, not the mean of 1/2, 1, 0. Influence: (1 - 1, 1 - ½, 0 - ½) * 3 / 4.
    intervals = Intervals("abc", 3)
    rate, mean = intervals.rates([[1], [1], [0]], [2, 1, 1])[0], intervals.means([[1], [1], [0]], [2, 1, 1])[0]
    assert (rate.value, rate.n, rate.clusters) == (0.5, 4, 3)
    error = math.sqrt(2 * (3 / 8) ** 2 / (3 * 2))
    assert mean.high == pytest.approx(0.5 + stats.t.ppf(0.975, 2) * error)
    # Clips without tokens say nothing; clusters are those of the rest.
    some = intervals.means([[1], [1], [0]], [2, 1, 0])[0]
    assert (some.value, some.n, some.clusters) == (pytest.approx(2 / 3), 3, 2)
    assert intervals.means([[0], [0], [0]], [0, 0, 0])[0] == Estimate(None, None, None, 0, 0)


def test_the_ratio_is_pooled():
    def ratio(part, other):
        return Intervals("abcd"[: len(part)], len(part)).ratio(part, other)

    # A mean of ratios would be (1/2 + 3/4) / 2 = 0.625; pooled it is 2 / (2 + 1).
    assert ratio([1.0, 3.0], [1.0, 1.0]).value == pytest.approx(2 / 3)
    # Effects of opposite sign cancel before the absolute value is taken.
    assert ratio([1.0, -1.0], [1.0, 1.0]).value == 0.0
    assert ratio([0.0, 0.0], [0.0, 0.0]) == Estimate(None, None, None, 2, 2)
    assert ratio([1.0, 2.0], [3.0, 1.0]).value == ratio([-1.0, -2.0], [3.0, 1.0]).value


def test_fieller_by_hand():
    # part 4 ± 1 on two items (3, 5), other 10 without spread: variance of the mean 1. The t of the ratio has 1 degree of freedom.
    # Significant where |4 - 10 r / (1 - r)| > t, so r / (1 - r) between max(0, 4 - t) / 10 and (4 + t) / 10.
    t = stats.t.ppf(0.975, 1)
    found = Intervals("ab", 2).ratio([3.0, 5.0], [10.0, 10.0])
    assert (found.low, found.high) == pytest.approx((0, (4 + t) / (14 + t)))
    # 30 items of spread: now 4 - t e > 0 is the lower bound.
    part = np.repeat([3.0, 5.0], 15)
    found, e = Intervals(range(30), 30).ratio(part, np.full(30, 10.0)), stats.t.ppf(0.975, 29) / math.sqrt(29)
    assert (found.low, found.high) == pytest.approx(((4 - e) / (14 - e), (4 + e) / (14 + e)))
    # A denominator that can be zero: up to 1.
    assert Intervals(range(30), 30).ratio(part, np.tile([-1.0, 1.2], 15)).high == 1.0


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_fieller_holds_what_is_not_rejected(signs):
    """Every r inside is not rejected, every r outside is, with the test written out."""
    rng = np.random.default_rng(3)
    pairs = list(itertools.combinations(range(20), 2))
    clusters, noise = Dyads([i for i, _ in pairs], [j for _, j in pairs]), rng.normal(size=(2, 190))
    part, other = signs[0] * (0.4 + noise[0]), signs[1] * (0.8 + 0.7 * noise[0] + 0.3 * noise[1])
    intervals = Intervals(clusters, 190)
    found = intervals.ratio(part, other)
    t = stats.t.ppf(0.975, intervals.spread(shortcut(part, other)[1][:, None]).freedom[0])
    error = intervals.spread(np.stack([part - part.mean(), other - other.mean(), part + other - part.mean() - other.mean()], 1)).error ** 2
    cov = (error[2] - error[0] - error[1]) / 2
    kept = []
    for r in np.linspace(0, 1, 2001):
        for s in (1, -1):
            z = part.mean() * (1 - r) - s * r * other.mean()
            if z**2 <= t**2 * (error[0] * (1 - r) ** 2 - 2 * s * cov * r * (1 - r) + error[1] * r**2):
                kept.append(r)
    assert (found.low, found.high) == pytest.approx((min(kept), max(kept)), abs=6e-4) and found.low > 0 and found.high < 0.6


def test_influence_of_the_shortcut_is_its_derivative():
    rng = np.random.default_rng(0)
    part, other = rng.normal(1, 1, 9), rng.normal(-2, 1, 9)
    value, influence = shortcut(part, other)
    for k in range(9):
        weight = np.ones(9)
        weight[k] += 1e-6
        a, b = abs((weight * part).sum()), abs((weight * other).sum())
        assert (a / (a + b) - value) / 1e-6 * 9 == pytest.approx(influence[k], abs=1e-5)


def test_holm_by_hand():
    # Sorted .01, .02, .03, .2: times 4, 3, 2, 1: .04, .06, .06 (never below the one before), .2. None counts for nothing.
    assert holm([0.03, 0.01, None, 0.2, 0.02]) == pytest.approx([0.06, 0.04, None, 0.2, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_nothing_to_measure_and_nothing_to_judge_by():
    nothing = Intervals([], 0)
    assert nothing.means(np.zeros((0, 1))) == nothing.rates(np.zeros((0, 1))) == [Estimate(None, None, None, 0, 0)]
    assert nothing.effects(np.zeros((0, 2))) == [Effect(None, None, None, 0, 0)] * 2 and nothing.ratio([], []) == Estimate(None, None, None, 0, 0)
    column = [[1.0], [2], [3]]
    assert Intervals(["a", "a", "a"], 3).means(column) == [Estimate(2.0, None, None, 3, 1)]
    assert Intervals(["a", "a", "a"], 3).rates([[1], [0], [1]])[0].low is None
    effect = Intervals((["a", "a", "a"], ["x", "y", "z"]), 3).effects(column)[0]
    assert (effect.value, effect.low, effect.p, effect.clusters) == (2.0, None, None, 1) and effect.size == 2.0
    assert Intervals(Dyads(["a", "b"], ["b", "a"]), 2).means([[1], [2]]) == [Estimate(1.5, None, None, 2, 2)]
    assert Intervals(Dyads(["a", "b"], ["b", "a"]), 2).ratio([1, 2], [1, 1]).low is None
    assert Intervals(Dyads("aab", "bcc"), 3).means(column)[0].low is None  # of three nodes all pairs share one with all others
    assert Intervals(["a", "a"], 2).flipped([1, 2]).p == 1.0


def test_a_stream_that_never_varies_is_no_dimension():
    assert by_source(["blank"] * 3, ["x", "y", "z"]) == ["x", "y", "z"]
    assert by_source(["a", "b"], ["x", "y"]) == (["a", "b"], ["x", "y"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["means", "rates", "effects"])
def test_bad_numbers_are_refused(bad, method):
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        getattr(Intervals(["a", "b"], 2), method)([[1.0], [bad]])


def test_lengths_self_pairs_and_impossible_rates_are_refused():
    with pytest.raises(ValueError, match="every value needs its cluster"):
        Intervals(["a"], 2)
    with pytest.raises(ValueError, match="two different nodes"):
        Intervals(Dyads(["a", "b"], ["b", "b"]), 2)
    with pytest.raises(ValueError, match="one row an item"):
        Intervals(["a", "b"], 2).means([1.0, 2.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Intervals(["a", "b"], 2).rates([[1.0], [2.0]])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30), st.randoms())
def test_order_changes_nothing(items, shuffler):
    def run(rows):
        values, video, audio = zip(*rows, strict=True)
        column = np.array(values)[:, None]
        intervals = Intervals((list(video), list(audio)), len(rows))
        return intervals.effects(column)[0], intervals.rates(np.abs(column) > 2)[0]

    shuffled = list(items)
    shuffler.shuffle(shuffled)
    for first, other in zip(run(items), run(shuffled), strict=True):
        assert first.value == pytest.approx(other.value, abs=1e-9) and (first.low is None) == (other.low is None)
        if first.low is not None and abs(first.high - first.low) < 1e6:
            assert first.low <= first.value + 1e-12 and first.value <= first.high + 1e-12
            assert (first.low, first.high) == pytest.approx((other.low, other.high), rel=1e-6, abs=1e-6)


# ---------------------------------------------------------------- calibration on null data of the real designs

SIMULATIONS = 4000


def real(kind, rng):
    """Clusters as the embedded set has them: 43 classes; dyads with each class in about 14 grids."""
    if kind == "one-way":
        return np.repeat(np.arange(43), rng.integers(4, 13, 43))
    if kind == "two-way":
        return (rng.integers(0, 43, 300), rng.integers(0, 43, 300))
    if kind == "two-way, 80 clips":
        return (rng.permutation(np.arange(80) % 43), rng.permutation(np.arange(80) % 43))
    rounds = [(np.arange(43), (np.arange(43) + shift) % 43) for shift in rng.choice(np.arange(1, 43), 7, replace=False)]
    return Dyads(np.concatenate([r[0] for r in rounds]), np.concatenate([r[1] for r in rounds]))


def size_of(clusters):
    return len(clusters[0] if isinstance(clusters, tuple) else clusters)


def by_sources(clusters, rng, columns):
    """Sum of independent normal effects of each item's sources."""
    if isinstance(clusters, Dyads):
        u = rng.normal(size=(int(max(*clusters.first, *clusters.second)) + 1, columns))
        return u[clusters.first] + u[clusters.second]
    sides = clusters if isinstance(clusters, tuple) else (clusters,)
    return sum(rng.normal(size=(int(max(side)) + 1, columns))[side] for side in sides)


def null(kind, clusters, rng, columns=SIMULATIONS):
    """(n, columns) values whose true mean is zero."""
    n = size_of(clusters)
    if kind == "shuffled labels":  # margins of very different size whose two labels were swapped at random
        return rng.choice([-1.0, 1.0], size=(n, columns)) * rng.exponential(size=(n, 1))
    noise = rng.normal(size=(n, columns))
    return {"clips": 0.0, "some of both": 0.4, "sources": 3.0}[kind] * by_sources(clusters, rng, columns) + noise


DESIGNS = ["one-way", "two-way", "two-way, 80 clips", "dyads"]
KINDS = ["shuffled labels", "clips", "some of both", "sources"]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_signed_effects_miss_zero_in_one_of_twenty(design, kind):
    rng = np.random.default_rng(12)
    clusters = real(design, rng)
    values = null(kind, clusters, rng)
    effects = Intervals(clusters, len(values)).effects(values)
    missed = np.mean([e.low > 0 or e.high < 0 for e in effects])
    print(f"{design}, {kind}: {missed:.4f}")
    assert 0.035 <= missed <= 0.065
    assert missed == np.mean([e.p < 0.05 for e in effects])


@pytest.mark.parametrize("design", ["one-way", "two-way", "dyads"])
@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_family_wise_error_over_the_windows_of_a_sweep(design, alike):
    """16 windows whose values correlate by `alike`: after correction some window misses zero in at most 6 % of the sweeps."""
    rng = np.random.default_rng(5)
    clusters, sweeps, windows = real(design, rng), 2000, 16
    intervals = Intervals(clusters, size_of(clusters))
    common = null("some of both", clusters, rng, sweeps)
    own = [null("some of both", clusters, rng, sweeps) for _ in range(windows)]
    p = np.array([[e.p for e in intervals.effects(np.sqrt(alike) * common + np.sqrt(1 - alike) * w)] for w in own])
    wrong = np.mean([min(holm(column)) < 0.05 for column in p.T.tolist()])
    print(f"{design}, windows alike by {alike}: {wrong:.4f} (uncorrected {np.mean((p < 0.05).any(0)):.3f})")
    assert wrong <= 0.06 < np.mean((p < 0.05).any(0))


@pytest.mark.parametrize("kind", KINDS)
def test_flips_of_grids_are_calibrated_and_agree_with_the_shortcut_null(kind):
    """p of an irrelevant stream's effect is below .05 in one of twenty, and exactly then the Shortcut Index is above its null's 95 % quantile."""
    rng = np.random.default_rng(4)
    clusters, count = real("dyads", rng), 1000
    values = null(kind, clusters, rng, count)
    intervals, relevant = Intervals(clusters, len(values)), 1.5
    low = above = 0
    for k, column in enumerate(values.T):
        p, widest = intervals.flipped(column, flips=200, seed=k)
        low += p < 0.05
        index = abs(column.mean()) / (abs(column.mean()) + relevant)
        above += index > widest / (widest + relevant)
    print(f"{kind}: p < .05 in {low / count:.4f}, index above its null in {above / count:.4f}")
    assert 0.035 <= low / count <= 0.065 and 0.035 <= above / count <= 0.065


def test_flips_by_hand():
    """Three sources with one clip each, 1, 2, 3: of 8 sign patterns only +++ and --- reach |mean| / error of the data, so p is near 1/4."""
    found = Intervals("abc", 3).flipped([1.0, 2.0, 3.0], flips=20_000)
    assert found.p == pytest.approx(0.25, abs=0.01)
    # 95 % quantile of t: that of the data itself, so the widest is the mean, 2.
    assert found.widest == pytest.approx(2.0)
    assert Intervals("abc", 3).flipped([0.0, 0.0, 0.0]) == (1.0, 0.0)


@pytest.mark.parametrize("true", [(0.0, 1.0), (0.3, 0.5), (1.0, 0.2), (0.4, 0.0)])
def test_coverage_of_the_shortcut_index(true):
    rng = np.random.default_rng(8)
    clusters, count = real("dyads", rng), 1500
    intervals = Intervals(clusters, size_of(clusters))
    part, other = (mean + null("some of both", clusters, rng, count) for mean in true)
    expected = true[0] / sum(true)
    found = [intervals.ratio(a, b) for a, b in zip(part.T, (other + 0.3 * part).T if true[0] == 0 else other.T, strict=True)]
    missed = np.mean([not e.low <= expected <= e.high for e in found])
    print(f"{true}: {missed:.4f}")
    assert 0.025 <= missed <= 0.065  # wider where both signs of the ratio are possible


@pytest.mark.parametrize("design", ["one-way", "two-way"])
@pytest.mark.parametrize("true", [0.5, 0.9, 0.98])
def test_coverage_of_rates(design, true):
    rng = np.random.default_rng(6)
    clusters = real(design, rng)
    latent = null("some of both", clusters, rng)
    scale = np.sqrt(1 + 0.4**2 * (1 if design == "one-way" else 2))
    found = Intervals(clusters, len(latent)).rates(latent / scale < stats.norm.ppf(true))
    missed = np.mean([not e.low <= true <= e.high for e in found])
    print(f"{design}, {true}: {missed:.4f}")
    assert 0.025 <= missed <= 0.07
    assert all(0 <= e.low < e.high <= 1 for e in found)


def test_treating_clips_as_independent_would_not_do():
    rng = np.random.default_rng(2)
    clusters = real("two-way", rng)
    values = null("sources", clusters, rng, 1000)
    effects = Intervals(range(300), 300).effects(values)
    assert np.mean([e.p < 0.05 for e in effects]) > 0.3


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_rate_whose_values_all_agree_has_width(value):
    (estimate,) = Intervals([f"s{i // 4}" for i in range(40)], 40).rates(np.full((40, 1), value))
    assert estimate.high - estimate.low > 0.05 and estimate.low <= value <= estimate.high
