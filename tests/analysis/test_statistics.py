"""Bootstrap intervals: against hand-computed cases, against an explicit resampling loop, and their coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.findings import Estimate
from analysis.statistics import Dyads, bootstrap, by_source, paired_difference, ratio_bootstrap


def counts(rng, names, draws):
    """What the library draws: a dict name -> count per draw, names in sorted order."""
    names = sorted({str(n) for n in names})
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    return [dict(zip(names, row, strict=True)) for row in drawn]


def brute_force(values, weights_of_draw, draws, statistic=np.mean):
    """Repeat each item as often as a draw says, then take the statistic of that list."""
    results = []
    for d in range(draws):
        resampled = []
        for k, value in enumerate(values):
            resampled += [value] * weights_of_draw(d, k)
        if resampled:
            results.append(statistic(np.array(resampled)))
    return np.percentile(results, [2.5, 97.5])


def close(estimate, bounds):
    assert [estimate.low, estimate.high] == pytest.approx(list(bounds), abs=1e-12)


def test_one_way_equals_brute_force():
    rng = np.random.default_rng(1)
    values, source = rng.normal(size=37), rng.integers(0, 9, 37).astype(str)
    drawn = counts(np.random.default_rng(5), source, 200)
    estimate = bootstrap(values, source, draws=200, seed=5)
    close(estimate, brute_force(values, lambda d, k: drawn[d][source[k]], 200))
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.n, estimate.clusters) == (37, 9)


def test_two_way_equals_brute_force():
    rng = np.random.default_rng(2)
    values, video, audio = rng.normal(size=30), rng.integers(0, 7, 30).astype(str), rng.integers(0, 4, 30).astype(str)
    draw = np.random.default_rng(3)
    by_video, by_audio = counts(draw, video, 150), counts(draw, audio, 150)
    estimate = bootstrap(values, (video, audio), draws=150, seed=3)
    close(estimate, brute_force(values, lambda d, k: by_video[d][video[k]] * by_audio[d][audio[k]], 150))
    assert estimate.clusters == 4


def test_dyads_and_ratio_equal_brute_force():
    rng = np.random.default_rng(4)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    first, second = [f"n{i}" for i, _ in pairs], [f"n{j}" for _, j in pairs]
    video, audio = rng.normal(2, 1, len(pairs)), rng.normal(1, 1, len(pairs))
    drawn = counts(np.random.default_rng(0), first + second, 150)

    def weight(d, k):
        return drawn[d][first[k]] * drawn[d][second[k]]

    estimate = bootstrap(video, Dyads(first, second), draws=150)
    close(estimate, brute_force(video, weight, 150))
    assert estimate.clusters == 6

    def shortcut(rows):
        v, a = rows.mean(axis=0)
        return abs(v) / (abs(v) + abs(a))

    ratio = ratio_bootstrap(video, audio, Dyads(first, second), draws=150)
    close(ratio, brute_force(list(zip(video, audio, strict=True)), weight, 150, shortcut))
    assert ratio.value == pytest.approx(shortcut(np.stack([video, audio], 1)))


def test_two_clusters_by_hand():
    # Of two clusters of one item each a draw picks (0,0), (0,1) or (1,1) with odds 1:2:1, so 2.5 % and 97.5 % are the items themselves.
    assert bootstrap([1.0, 3.0], ["a", "b"]) == Estimate(2.0, 1.0, 3.0, 2, 2)


def test_the_ratio_is_pooled():
    # A mean of ratios would be (1/2 + 3/4) / 2 = 0.625; pooled it is 2 / (2 + 1).
    assert ratio_bootstrap([1.0, 3.0], [1.0, 1.0], ["a", "b"]).value == pytest.approx(2 / 3)
    # Effects of opposite sign cancel before the absolute value is taken.
    assert ratio_bootstrap([1.0, -1.0], [1.0, 1.0], ["a", "b"]).value == 0.0
    assert ratio_bootstrap([0.0, 0.0], [0.0, 0.0], ["a", "b"]) == Estimate(None, None, None, 2, 2)


def test_paired_difference_is_after_minus_before():
    assert paired_difference([0, 1, 1], [1, 1, 1], ["a", "b", "c"]).value == pytest.approx(1 / 3)
    # Pairing removes what the clips have in common: the same shift everywhere has no uncertainty at all.
    before = np.random.default_rng(0).normal(size=20)
    estimate = paired_difference(before, before + 0.5, range(20))
    assert estimate.low == pytest.approx(0.5) and estimate.high == pytest.approx(0.5)


def test_nothing_to_measure_and_nothing_to_resample():
    assert bootstrap([], []) == Estimate(None, None, None, 0, 0)
    assert ratio_bootstrap([], [], Dyads([], [])) == Estimate(None, None, None, 0, 0)
    assert bootstrap([1, 2, 3], ["a", "a", "a"]) == Estimate(2.0, None, None, 3, 1)
    assert bootstrap([1, 2, 3], (["a", "a", "a"], ["x", "y", "z"])) == Estimate(2.0, None, None, 3, 1)
    assert bootstrap([1, 2], Dyads(["a", "b"], ["b", "a"])) == Estimate(1.5, None, None, 2, 2)


def test_a_stream_that_never_varies_is_not_resampled():
    assert by_source(["blank"] * 3, ["x", "y", "z"]) == ["x", "y", "z"]
    assert by_source(["a", "b"], ["x", "y"]) == (["a", "b"], ["x", "y"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        bootstrap([1.0, bad], ["a", "b"])


def test_lengths_and_self_pairs_are_refused():
    with pytest.raises(ValueError, match="every value needs its cluster"):
        bootstrap([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="two different nodes"):
        bootstrap([1.0, 2.0], Dyads(["a", "b"], ["b", "b"]))
    with pytest.raises(ValueError, match="same clips"):
        paired_difference([1.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="one number per item"):
        bootstrap(np.zeros((2, 2)), ["a", "b"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30), st.randoms())
def test_seeded_order_free_and_inside_the_range(items, shuffler):
    def run(rows):
        values, video, audio = zip(*rows, strict=True)
        return bootstrap(values, (list(video), list(audio)), draws=50, seed=7)

    first = run(items)
    assert first == run(items)
    shuffled = list(items)
    shuffler.shuffle(shuffled)
    other = run(shuffled)
    assert first.value == pytest.approx(other.value) and (first.low is None) == (other.low is None)
    if first.low is not None:
        assert first.low == pytest.approx(other.low, abs=1e-9) and first.high == pytest.approx(other.high, abs=1e-9)
        values = [v for v, _, _ in items]
        assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9


def covered(estimate, truth=0.0):
    return estimate.low <= truth <= estimate.high


def test_coverage():
    """Intervals hold the true mean about 95 % of the time where clips share sources; treating clips as independent does not."""
    rng, trials = np.random.default_rng(0), 200
    one, naive, two, dyadic = [], [], [], []
    source = np.repeat(np.arange(30), 8)
    video, audio = np.repeat(np.arange(25), 20), np.tile(np.arange(20), 25)
    i, j = (side.copy() for side in np.triu_indices(24, 1))
    for _ in range(trials):
        clustered = rng.normal(size=30)[source] + rng.normal(size=source.size)
        one.append(covered(bootstrap(clustered, source, draws=200)))
        naive.append(covered(bootstrap(clustered, range(source.size), draws=200)))
        crossed = rng.normal(size=25)[video] + rng.normal(size=20)[audio] + rng.normal(size=video.size)
        two.append(covered(bootstrap(crossed, (video, audio), draws=200)))
        node = rng.normal(size=24)
        dyadic.append(covered(bootstrap(node[i] + node[j] + rng.normal(size=i.size), Dyads(i, j), draws=200)))
    assert 0.88 <= np.mean(one) <= 0.99
    assert 0.88 <= np.mean(two) <= 0.99
    assert 0.88 <= np.mean(dyadic) <= 0.99
    assert np.mean(naive) < 0.7
