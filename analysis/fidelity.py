"""Caption fidelity from what judges read: means with intervals, further judges, and how far judges agree (docs/definitions.md). Needs no model.

add_scores(findings, LLMJudge(…))        # what `python -m analysis judge` does
fidelity_rows(findings.captions, items)  # items: what is kept for paired comparison (analysis/items.py)
agreement(findings.captions)             # rank correlation between judges that read the same captions
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from analysis.findings import Caption, CaptionFidelity, CaptionScore, Effect, Estimate, Findings
from analysis.items import Group, ItemStore, Key
from analysis.judges import SIDES, Judge, JudgeError, Side, asked


def fidelity_rows(captions: Iterable[Caption], items: ItemStore) -> list[CaptionFidelity]:
    """One row a judge, condition, question and cut, in the order of the captions.

    Means of the sides' scores and the share with an invented event are over captions that the judge could read; `unparsed` and `cut_off` are over
    all. A side that no clip has (muted, blanked) has no score.
    """
    groups: dict[tuple[str, str, str, str | None], list[tuple[Caption, CaptionScore]]] = {}
    for caption in captions:
        for read in caption.scores:
            groups.setdefault((read.judge, caption.condition, caption.modality, caption.cut), []).append((caption, read))
    rows = []
    for (judge, condition, modality, cut), pairs in groups.items():
        parsed = [(caption, read) for caption, read in pairs if read.parsed]
        sides: dict[Side, Estimate | None] = dict.fromkeys(SIDES)
        for side in asked(modality):
            if not any(caption.heard if side == "audio" else caption.seen for caption, _ in pairs):
                continue
            scored = [(caption, value) for caption, read in parsed if (value := side_score(read, side)) is not None]
            sides[side] = _rate(items, caption_key(judge, condition, modality, cut, side), scored)
        unparsed = _rate(items, caption_key(judge, condition, modality, cut, "unparsed"), [(caption, not read.parsed) for caption, read in pairs])
        invented = _rate(items, caption_key(judge, condition, modality, cut, "invented"), [(caption, read.invented > 0) for caption, read in parsed])
        changes: dict[Side, Effect | None] = dict.fromkeys(SIDES)
        for side in asked(modality) if cut else ():
            before = {caption.clip: side_score(read, side) for caption, read in groups.get((judge, condition, modality, None), ())}
            both = [(c, now - then) for c, read in parsed if (now := side_score(read, side)) is not None and (then := before.get(c.clip)) is not None]
            if both:
                group = _group(items, [caption for caption, _ in both])
                key = caption_key(judge, condition, modality, cut, f"{side}_change")
                changes[side] = group.effects([key], np.array([[change] for _, change in both]))[0]
        cut_off = _rate(items, caption_key(judge, condition, modality, cut, "cut_off"), [(caption, caption.cut_off) for caption, _ in pairs])
        scores = (sides["audio"], sides["video"], unparsed, invented, changes["audio"], changes["video"])
        rows.append(CaptionFidelity(judge, condition, modality, cut, *scores, cut_off))
    return sorted(rows, key=lambda row: row.judge != "labels")


def side_score(read: CaptionScore, side: Side) -> float | None:
    """The score of one side."""
    return read.audio if side == "audio" else read.video


def caption_key(judge: str, condition: str, modality: str, cut: str | None, measure: str) -> Key:
    """The key of one number of caption fidelity."""
    return Key("captions", condition, modality, f"{judge} judge, {cut or 'no cut'}", measure)


def _rate(items: ItemStore, key: Key, scored: Sequence[tuple[Caption, float]]) -> Estimate:
    """Mean of scores between 0 and 1, clustered by the captions' sources."""
    if not scored:
        return Estimate(None, None, None, 0, 0)
    group = _group(items, [caption for caption, _ in scored])
    return group.rates([key], np.array([[value] for _, value in scored], dtype=float))[0]


def add_scores(findings: Findings, judge: Judge) -> None:
    """Have a judge read the captions of findings: its scores are added (what it said before is replaced) and `fidelity` is made anew.

    Raises JudgeError where there are no captions, or where the findings do not name the events of a caption in `labels`.
    """
    if not findings.captions:
        raise JudgeError("these findings hold no captions: diagnose again with captions switched on.")
    seen, heard = {s for s, _ in findings.labels.values()}, {h for _, h in findings.labels.values()}
    for caption in findings.captions:
        for phrase, label, known in ((caption.seen, caption.video_label, seen), (caption.heard, caption.audio_label, heard)):
            if phrase and (label not in findings.labels if label else phrase not in known):
                raise JudgeError(f"the caption of clip {caption.clip} is about {phrase!r}, which is not among the labels of these findings.")
    for caption, read in zip(findings.captions, judge.judge(findings.captions), strict=True):
        caption.scores = [*(s for s in caption.scores if s.judge != judge.name), read]
    items = ItemStore()
    findings.fidelity = fidelity_rows(findings.captions, items)
    for group in findings.items:
        group.values = {key: values for key, values in group.values.items() if not key.startswith("captions|")}
    findings.items = [group for group in findings.items if group.values] + items.saved()


def _group(items: ItemStore, captions: Sequence[Caption]) -> Group:
    return items.of([c.clip for c in captions], ([c.video_source for c in captions], [c.audio_source for c in captions]))


class Agreement(NamedTuple):
    """Spearman's rank correlation of two judges on the captions that both scored on a side; None where one of them gave all the same score."""

    first: str
    second: str
    side: Side
    rho: float | None
    n: int


def agreement(captions: Sequence[Caption]) -> list[Agreement]:
    """Every pair of judges, each side."""
    judges = list(dict.fromkeys(read.judge for caption in captions for read in caption.scores))
    out = []
    for first, second in itertools.combinations(judges, 2):
        for side in SIDES:
            pairs = []
            for caption in captions:
                by_judge = {read.judge: side_score(read, side) for read in caption.scores}
                pair = (by_judge.get(first), by_judge.get(second))
                if None not in pair:
                    pairs.append(pair)
            a, b = np.array(pairs, dtype=float).reshape(-1, 2).T
            constant = len(pairs) < 2 or len(set(a)) < 2 or len(set(b)) < 2
            out.append(Agreement(first, second, side, None if constant else float(stats.spearmanr(a, b).statistic), len(pairs)))
    return out
