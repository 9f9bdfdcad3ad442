"""Held-out class pairs."""

from collections import Counter
from itertools import combinations

import pytest

from data.clips import DataError
from data.sources import load_sources
from data.splits import pair, split_pairs


def test_pair_is_unordered() -> None:
    assert pair("dog", "bell") == pair("bell", "dog") == ("bell", "dog")


def test_parts() -> None:
    names = [c.name for c in load_sources()]
    pairs = split_pairs(names, seed=0)
    everything = {pair(a, b) for a, b in combinations(names, 2)}
    assert pairs.train | pairs.selection | pairs.test == everything
    assert len(pairs.train) + len(pairs.selection) + len(pairs.test) == len(everything) == 903
    assert (len(pairs.train), len(pairs.selection), len(pairs.test)) == (602, 75, 226)  # 2/3, then 1/4 and 3/4 of 301
    assert pairs.of("plan") == pairs.of("train") == pairs.train and pairs.of("unseen") == pairs.of("test") == pairs.test
    assert pairs.of("selection") == pairs.selection


def test_every_class_is_tested_alike() -> None:
    names = [c.name for c in load_sources()]
    for part, spread in (("selection", 2), ("test", 3), ("train", 2)):
        count = Counter(name for p in getattr(split_pairs(names, 3), part) for name in p)
        assert len(count) == 43 and max(count.values()) - min(count.values()) <= spread, (part, count)


def test_seed_and_order() -> None:
    names = list("abcdefgh")
    assert split_pairs(names, 1) == split_pairs(names[::-1], 1)
    assert split_pairs(names, 1) != split_pairs(names, 2)


def test_smallest_set() -> None:
    pairs = split_pairs(list("abcd"))
    assert (len(pairs.train), len(pairs.selection), len(pairs.test)) == (4, 1, 1)
    with pytest.raises(DataError, match="at least four"):
        split_pairs(list("abc"))
    with pytest.raises(DataError, match="at least four different"):
        split_pairs(list("abcc"))
