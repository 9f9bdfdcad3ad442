"""Before against after: what changed between two diagnoses of the same clips.

    from analysis.compare import compare
    comparison = compare(Findings.load("before.json"), Findings.load("after.json"))
    comparison.save("comparison.json")

Only like is compared with like: findings of other clips, another split or other settings that move scores are refused, and the message names
what differs. What greedy answers name is compared clip by clip (the same clip under the same question, so what the clips have in common cancels);
for the rest the two estimates stand side by side, because findings keep no value per clip for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from analysis.findings import FORMAT, Estimate, Findings, Sample, load_json, save_json
from analysis.statistics import by_source, paired_difference

# Settings that say where and how fast a diagnosis ran, not what it measured. Every other difference is refused.
NEUTRAL = frozenset({"device", "threads", "batch_size", "workers", "progress", "command", "started", "seconds", "clips_folder", "out"})


@dataclass
class Change:
    """One number of the findings, before and after. `difference`: after − before, clip by clip; None where findings keep no value per clip."""

    section: str  # following | reliance | knockout | flow | probe | lens | latent | tuned | shift
    condition: str | None
    question: str | None  # hear | see
    item: str  # which row of the section, e.g. "video->emitters [3, 8)"
    measure: str  # the field of the row, e.g. "audio"
    before: Estimate
    after: Estimate
    difference: Estimate | None = None


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
    result = Comparison(_name(before), _name(after), before.split, before.data_hash, before.n_layers)
    paired = _paired_following(before.samples, after.samples, result.left_out)
    old, new = dict(_rows(before)), dict(_rows(after))
    if before.base != after.base:
        result.left_out.append(f"Token shift is not compared: the bases differ ({before.base} and {after.base}).")
    for key in old:
        if key in new and (key[0] != "shift" or before.base == after.base):
            section, condition, question, item, measure = key
            difference = paired.get((condition, question, measure)) if section == "following" else None
            result.changes.append(Change(section, condition, question, item, measure, old[key], new[key], difference))
    for label, only in (("before", old.keys() - new.keys()), ("after", new.keys() - old.keys())):
        if only:
            result.left_out.append(f"{len(only)} numbers were measured {label} only ({', '.join(sorted({key[0] for key in only}))}).")
    if not paired:
        result.left_out.append("No paired differences: the findings share no clip with an answer to the same question.")
    return result


def differences(before: Findings, after: Findings) -> list[str]:
    """What makes two findings incomparable, one phrase each; empty when a difference between them means something."""
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(before, name), getattr(after, name)) for name in ("split", "data_hash", "n_layers")]
    old, new = dict(_flat(before.settings)), dict(_flat(after.settings))
    pairs += [(f"setting {key}", old.get(key, "not stated"), new.get(key, "not stated")) for key in sorted(old.keys() | new.keys())]
    return [f"{name} is {_short(a)} before and {_short(b)} after" for name, a, b in pairs if a != b]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if prefix or key not in NEUTRAL:
            if isinstance(value, dict):
                yield from _flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:66]}…"


def _name(findings: Findings) -> str:
    return findings.model + (f" + {findings.adapter}" if findings.adapter else "")


Key = tuple[str, str | None, str | None, str, str]  # section, condition, question, item, measure
Paired = dict[tuple[str | None, str | None, str], Estimate]  # condition, question, measure


def _rows(findings: Findings) -> Iterator[tuple[Key, Estimate]]:
    """Every estimate of the findings under the key that both sides share."""
    for f in findings.following:
        for measure in ("audio", "vision", "both", "neither", "unparsed", "correct"):
            yield ("following", f.condition, f.question, "", measure), getattr(f, measure)
    for r in findings.reliance:
        for measure in ("shortcut", "effect_audio", "effect_video"):
            yield ("reliance", None, r.question, "", measure), getattr(r, measure)
    for c in findings.knockout:
        for measure in ("delta_logprob", "delta_margin", "audio", "vision"):
            if (value := getattr(c, measure)) is not None:
                yield ("knockout", c.condition, c.question, f"{c.site} [{c.start}, {c.stop}) {c.family}", measure), value
    for w in findings.flow:
        for kind, layers in w.mass.items():
            for layer, value in enumerate(layers):
                yield ("flow", w.condition, None, f"{w.target} <- {kind}, {w.variant}, layer {layer}", "mass"), value
    for p in findings.probes:
        for layer, value in enumerate(p.accuracy):
            yield ("probe", None, None, f"{p.label} label at {p.position}, layer {layer}", "accuracy"), value
    for n in [*findings.lens, *(findings.tuned.lens if findings.tuned else ())]:
        name = "" if n.lens == "logit" else f", {n.lens} lens"
        for layer, value in enumerate(n.hit):
            yield ("lens", None, None, f"{n.label} words in the top {n.k} at {n.position}{name}, layer {layer}", "hit"), value
    if findings.latent:
        yield ("latent", None, None, "", "latent"), findings.latent.latent
        yield ("latent", None, None, "", "said"), findings.latent.said
    if findings.tuned:
        yield ("latent", None, None, "tuned lens", "latent"), findings.tuned.latent.latent
        for layer, value in enumerate(findings.tuned.kl_after):
            yield ("tuned", None, None, f"KL to the final output, layer {layer}", "kl"), value
    for s in findings.shift:
        for measure in ("unshifted", "marginal", "shifted", "kl"):
            yield ("shift", s.condition, None, s.tokens, measure), getattr(s, measure)


MEASURES: dict[str, Callable[[Sample], bool]] = {
    "audio": lambda s: s.verdict == "audio",
    "vision": lambda s: s.verdict == "vision",
    "both": lambda s: s.verdict == "both",
    "neither": lambda s: s.verdict == "neither",
    "unparsed": lambda s: s.verdict == "unparsed",
    "correct": lambda s: s.correct,
}


def _paired_following(before: list[Sample], after: list[Sample], left_out: list[str]) -> Paired:
    """(condition, question, measure) -> after − before over the clips that both answered, clustered by video source × audio source."""
    old, new = ({(s.clip, s.condition, s.modality, s.question): s for s in samples} for samples in (before, after))
    shared = [key for key in old if key in new]
    if single := len(old) + len(new) - 2 * len(shared):
        left_out.append(f"{single} answers have no partner on the other side and are left out of the paired differences.")
    groups: dict[tuple[str, str], list[tuple[Sample, Sample]]] = {}
    for key in shared:
        groups.setdefault((key[1], key[2]), []).append((old[key], new[key]))
    result: Paired = {}
    for (condition, question), pairs in groups.items():
        clusters = by_source([b.video_source for b, _ in pairs], [b.audio_source for b, _ in pairs])
        for measure, hit in MEASURES.items():
            result[condition, question, measure] = paired_difference([hit(b) for b, _ in pairs], [hit(a) for _, a in pairs], clusters)
    return result
