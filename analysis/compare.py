"""Before against after: what changed between two diagnoses of the same clips.

    from analysis.compare import compare
    comparison = compare(Findings.load("before.json"), Findings.load("after.json"))
    comparison.save("comparison.json")

Only like is compared with like: findings of other clips, another split or other settings that move scores are refused, and the message names
what differs. Every number is compared clip by clip (grids: grid by grid) from the values that findings keep, so what the clips have in common
cancels: an interval of the difference, a p value, and over the layers or windows of a sweep a corrected one. The Shortcut Index is compared by
the delta method on the same grids, token shift by clip as a ratio of sums; perplexity by what it changed by as a share of what it was. What could not
be paired is said.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.events import VERDICTS
from analysis.fidelity import caption_key
from analysis.findings import FORMAT, NEUTRAL, Effect, Estimate, Findings, Items, load_json, save_json
from analysis.items import Key, cut_item, flow_item, latent_item, lens_item, probe_item, tuned_item, unpacked
from analysis.statistics import Dyads, Intervals, by_source, corrected, mapped, shortcut


@dataclass
class Change:
    """One number of the findings, before and after. `difference`: after − before, item by item (of perplexity after / before − 1); None without
    pairs (`left_out` says why).
    """

    section: str  # following | reliance | knockout | flow | probe | lens | latent | tuned | captions | shift | language
    condition: str | None
    question: str | None  # hear | see
    item: str  # which row of the section, e.g. "video->emitters [3, 8)"
    measure: str  # the field of the row, e.g. "audio"
    before: Estimate
    after: Estimate
    difference: Effect | None = None


@dataclass
class Comparison:
    """What `compare` found. `left_out`: sentences on what could not be compared."""

    before: str
    after: str
    split: str
    data_hash: str
    n_layers: int
    changes: list[Change] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    trained_on: list[str] = field(default_factory=list)  # sentences: what of the splits was trained on, of the findings after
    format: int = FORMAT

    def find(self, section: str, measure: str, condition: str | None = None, question: str | None = None, item: str = "") -> Change | None:
        """The change with exactly these keys, or None."""
        wanted = (section, measure, condition, question, item)
        return next((c for c in self.changes if (c.section, c.measure, c.condition, c.question, c.item) == wanted), None)

    def save(self, path: str | os.PathLike) -> None:
        """Write atomically."""
        save_json(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Comparison:
        """Read and check a comparison file. Raises FindingsError naming the file and the key that does not fit."""
        return load_json(cls, path, "comparison", "compare")


def compare(before: Findings, after: Findings) -> Comparison:
    """Match two findings row by row. Raises ValueError, naming what differs, when they were not measured alike."""
    if reasons := differences(before, after):
        shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
        raise ValueError(
            f"these findings were not measured alike, so a difference would mean nothing: {shown}. Diagnose both with the same clips and settings."
        )
    result = Comparison(_name(before), _name(after), before.split, before.data_hash, before.n_layers, trained_on=after.trained_on())
    old, new = dict(_rows(before)), dict(_rows(after))
    if before.base != after.base:
        result.left_out.append(f"Token shift is not compared: the bases differ ({before.base} and {after.base}).")
    shared = [key for key in old if key in new and (key.section != "shift" or before.base == after.base)]
    measured = [key for key in shared if old[key].value is not None and new[key].value is not None]
    nothing = [key.section for key in shared if old[key].value is None or new[key].value is None]
    paired = _paired(before, after, measured, nothing, result.left_out)
    result.changes = [Change(*key, _plain(old[key]), _plain(new[key]), paired.get(key)) for key in shared]
    for label, only in (("before", old.keys() - new.keys()), ("after", new.keys() - old.keys())):
        if only:
            result.left_out.append(f"{len(only)} numbers were measured {label} only ({', '.join(sorted({key.section for key in only}))}).")
    return result


def differences(before: Findings, after: Findings) -> list[str]:
    """What makes two findings incomparable, one phrase each; empty when a difference between them means something."""
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(before, name), getattr(after, name)) for name in ("split", "data_hash", "n_layers")]
    old, new = dict(_flat(before.settings)), dict(_flat(after.settings))
    pairs += [(f"setting {key}", old.get(key, "not stated"), new.get(key, "not stated")) for key in sorted(old.keys() | new.keys())]
    return [f"{name} is {_short(a)} before and {_short(b)} after" for name, a, b in pairs if a != b]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if prefix or key not in NEUTRAL:  # every other difference is refused
            if isinstance(value, dict):
                yield from _flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:66]}…"


def _plain(estimate: Estimate) -> Estimate:
    """Without p value and size, which belong to the one side."""
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.n, estimate.clusters)


def _name(findings: Findings) -> str:
    return findings.model + (f" + {findings.adapter}" if findings.adapter else "")


def _rows(findings: Findings) -> Iterator[tuple[Key, Estimate]]:
    """Every estimate of the findings under the key that both sides share."""
    for f in findings.following:
        measures = (*VERDICTS, "correct") if f.correct.n else ()  # of the unseen split there may be no clip of a new source
        for measure in (*measures, *(("cut_off",) if f.cut_off.n else ())):
            yield Key("following", f.condition, f.question, "", measure), getattr(f, measure)
    for r in findings.reliance:
        for measure in ("shortcut", "effect_audio", "effect_video"):
            yield Key("reliance", None, r.question, "", measure), getattr(r, measure)
    for c in findings.knockout:
        for measure in ("delta_logprob", "delta_margin", "audio", "vision", "unparsed", "cut_off"):
            if (value := getattr(c, measure)) is not None:
                yield Key("knockout", c.condition, c.question, cut_item(c.site, c.start, c.stop, c.family), measure), value
    for w in findings.flow:
        for kind, layers in w.mass.items():
            for layer, value in enumerate(layers):
                yield Key("flow", w.condition, None, flow_item(w.target, kind, w.variant, layer), "mass"), value
    for p in findings.probes:
        for measure, values in (("accuracy", p.accuracy), ("selectivity", p.selectivity)):
            for layer, value in enumerate(values):
                yield Key("probe", None, None, probe_item(p.label, p.position, layer), measure), value
    for n in [*findings.lens, *(findings.tuned.lens if findings.tuned else ())]:
        for measure, values in (("hit", n.hit), ("corrected", n.corrected)):
            for layer, value in enumerate(values):
                yield Key("lens", None, None, lens_item(n.label, n.k, n.position, layer, n.lens), measure), value
    if findings.latent:
        yield Key("latent", None, None, "", "latent"), findings.latent.latent
        yield Key("latent", None, None, "", "said"), findings.latent.said
        for end, swapped, read in (
            (False, True, findings.latent.swapped),
            (True, False, findings.latent.end),
            (True, True, findings.latent.end_swapped),
        ):
            if read:
                yield Key("latent", None, None, latent_item(end=end, swapped=swapped), "latent"), read.rate
    if findings.tuned:
        yield Key("latent", None, None, latent_item(tuned=True), "latent"), findings.tuned.latent.latent
        if findings.tuned.latent.end:
            yield Key("latent", None, None, latent_item(tuned=True, end=True), "latent"), findings.tuned.latent.end.rate
        for measure in ("kl_before", "kl_after"):
            for layer, value in enumerate(getattr(findings.tuned, measure)):
                yield Key("tuned", None, None, tuned_item(layer), measure), value
    for row in findings.fidelity:
        for measure in ("audio", "video", "unparsed", "invented", "audio_change", "video_change", "cut_off"):
            if (value := getattr(row, measure)) is not None and (measure != "cut_off" or value.n):
                yield caption_key(row.judge, row.condition, row.question, row.cut, measure), value
    for s in findings.shift:
        for measure in ("unshifted", "marginal", "shifted", "kl"):
            yield Key("shift", s.condition, None, s.tokens, measure), getattr(s, measure)
    if findings.language:
        for measure in ("nll", "perplexity", "right", *(("cut_off",) if findings.language.cut_off.n else ())):
            yield Key("language", None, None, "", measure), getattr(findings.language, measure)


# ---------------------------------------------------------------- paired differences


class _Pair:
    """Items of both sides in the same order."""

    def __init__(self, before: Items, after: Items):
        old, new = ({name: i for i, name in enumerate(side.ids)} for side in (before, after))
        ids = [name for name in before.ids if name in new]
        self.before, self.after = before, after
        self.rows = np.array([old[name] for name in ids], dtype=int), np.array([new[name] for name in ids], dtype=int)
        self.single = len(before.ids) + len(after.ids) - 2 * len(ids)
        sources = [[[side[i] for i in rows] for side in items.clusters] for items, rows in zip((before, after), self.rows, strict=True)]
        if sources[0] != sources[1] or before.dyads != after.dyads:
            raise ValueError("the same items have other sources before and after. Diagnose both with the same clips.")
        sides = sources[0]
        self.intervals = Intervals(Dyads(*sides) if before.dyads else by_source(*sides) if len(sides) == 2 else sides[0], len(ids))

    def kept(self, key: Key) -> tuple[list[NDArray], list[NDArray]]:
        """Values and weights of the shared items, before and after."""
        values, weights = [], []
        for items, rows in zip((self.before, self.after), self.rows, strict=True):
            values.append(unpacked(items.values[key.text], len(items.ids))[rows])
            weight = items.weights.get(key.text)
            weights.append(np.ones(len(rows)) if weight is None else unpacked(weight, len(items.ids))[rows])
        return values, weights

    def difference(self, key: Key) -> Effect | None:
        """After − before. None where one side has nothing to divide by."""
        if key.section == "reliance" and key.measure == "shortcut":
            names = ("effect_video", "effect_audio") if key.question == "hear" else ("effect_audio", "effect_video")
            part, other = (self.kept(key._replace(measure=name))[0] for name in names)
            (a, psi_a), (b, psi_b) = (shortcut(part[side], other[side]) for side in (0, 1))
            return None if a is None or b is None else self.intervals.effects_of(b - a, (psi_b - psi_a)[:, None])[0]
        if key.measure == "perplexity":
            changed = self.difference(key._replace(measure="nll"))
            return None if changed is None else mapped(changed, math.expm1)
        (old, new), (w_old, w_new) = self.kept(key)
        if not w_old.sum() or not w_new.sum():
            return None
        a, b = old.sum() / w_old.sum(), new.sum() / w_new.sum()
        psi = (new - b * w_new) / w_new.mean() - (old - a * w_old) / w_old.mean()
        rates = not self.before.weights.get(key.text) and bool(np.isin(old, (0, 1)).all() and np.isin(new, (0, 1)).all())
        return self.intervals.effects_of(b - a, psi[:, None], of_rates=rates)[0]


# Numbers that follow from values kept under another measure.
_KEPT_AS = {("reliance", "shortcut"): "effect_audio", ("language", "perplexity"): "nll"}


def _paired(before: Findings, after: Findings, keys: Sequence[Key], nothing: Sequence[str], left_out: list[str]) -> dict[Key, Effect]:
    """The paired difference of every number that both sides kept values of; what could not be paired is added to `left_out`.

    nothing: the sections of numbers of which there was nothing to measure.
    """
    old, new = ({key: items for items in findings.items for key in items.values} for findings in (before, after))
    pairs: dict[tuple[int, int], _Pair] = {}
    result: dict[Key, Effect] = {}
    single: dict[str, int] = {}
    unkept, unmatched, empty = list[str](), list[str](), list(nothing)
    for key in keys:
        at = key._replace(measure=_KEPT_AS.get((key.section, key.measure), key.measure)).text
        if at not in old or at not in new:
            unkept.append(key.section)
            continue
        a, b = old[at], new[at]
        if (id(a), id(b)) not in pairs:
            pairs[id(a), id(b)] = _Pair(a, b)
        pair = pairs[id(a), id(b)]
        if not pair.intervals.n:
            unmatched.append(key.section)
            continue
        if pair.single:
            single[key.section] = max(pair.single, single.get(key.section, 0))
        difference = pair.difference(key)
        if difference is None:
            empty.append(key.section)
        else:
            result[key] = difference
    for sections, why in (
        (unkept, "one of the findings keeps no value per item for them"),
        (unmatched, "the findings share none of their items"),
        (empty, "before or after there was nothing to measure"),
    ):
        if sections:
            left_out.append(f"{len(sections)} numbers have no paired difference ({', '.join(sorted(set(sections)))}): {why}.")
    for section, count in sorted(single.items()):
        left_out.append(f"Paired differences ({section}): up to {count} items have no partner on the other side and are left out.")
    return _over_layers(result)


_LAYERS = re.compile(r"(?: \[(\d+, \d+)\) \w+|, layer (\d+))$")  # "video->audio [2, 5) window", "audio label at question, layer 3"


def _over_layers(differences: dict[Key, Effect]) -> dict[Key, Effect]:
    """p values corrected over the layers or windows of one condition, question, row and measure; a window of two families counts once."""
    families: dict[Key, dict[str, list[Key]]] = {}
    for key in differences:
        if layers := _LAYERS.search(key.item):
            family = key._replace(item=key.item[: layers.start()])
            families.setdefault(family, {}).setdefault(layers[1] or layers[2], []).append(key)
    out = dict(differences)
    for members in families.values():
        for keys, effect in zip(members.values(), corrected([differences[keys[0]] for keys in members.values()]), strict=True):
            out |= dict.fromkeys(keys, effect)
    return out
