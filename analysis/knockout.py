"""Attention knockout: what happens to an answer when rows of one kind may not look at rows of another, in some layers (docs/definitions.md).

Every site of `models.attention.SITES`: cuts of video on hear-questions, cuts of audio on see-questions. Families: sliding windows of
`width` layers at every start, "from layer k on" for every k, and all layers. Measured by scoring, on factual and on counterfactual clips:
change of s of the designated label (length-normalised log-likelihood, nats a token) and, on conflicts, of its margin over the other
stream's label. For the best cuts of each site also by greedy answers: what they follow under the cut.

The best cuts are chosen on one half of the conflicts and their answers are measured on the other half (no shared rendering or class pair)
and on the factual clips. Every "from layer k on" cut of some sites can be answered as well, for a curve: nothing is chosen there, so on all
clips. A cut closes the direct path only; rows in between may already carry the other stream.

Cost: cuts into question and answer rows all share the clip's one clean media prefix and are scored many to a batch. Cuts into media rows
(video->audio, audio->video) need the prefix anew each from their first layer on, so they are measured on fewer clips; n says on how many. The
model checks itself before anything is cut (`models.self_check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.events import Verdict, verdict
from analysis.findings import CutEffect
from analysis.items import ItemStore, Key, cut_item
from analysis.probing import halves
from analysis.statistics import corrected
from analysis.tally import Record, Tally
from analysis.visits import MODALITIES, Subject, Visit
from data.clips import Clip
from data.questions import Modality
from models import SITES, Cut

ANSWERED = ("audio", "vision", "unparsed", "cut_off")  # what is counted of answers under a cut


class Window(NamedTuple):
    """Layers [start, stop) and the families of the sweep that it belongs to."""

    start: int
    stop: int
    families: tuple[str, ...]


def windows(n_layers: int, width: int) -> list[Window]:
    """Every window of the sweep once: sliding windows of `width` (fewer where the model has fewer layers), "from k on", and all layers."""
    width = min(width, n_layers)
    families: dict[tuple[int, int], list[str]] = {}
    for start in range(n_layers - width + 1):
        families.setdefault((start, start + width), []).append("window")
    for start in range(n_layers):
        families.setdefault((start, n_layers), []).append("from")
    families[0, n_layers].append("all")
    return [Window(start, stop, tuple(names)) for (start, stop), names in families.items()]


def asked(site: str) -> Modality:
    """The question a site is measured under: the one that the cut stream is not asked about."""
    return "hear" if site.startswith("video->") else "see"


def designated(clip: Clip, modality: Modality) -> tuple[str, str]:
    """(class asked for, class of the other stream)."""
    return (clip.audio_label, clip.video_label) if modality == "hear" else (clip.video_label, clip.audio_label)


@dataclass
class _Cell:
    """Scores of one cut (or none) under one condition and question, clip by clip."""

    clips: list[Clip] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)


class KnockoutSweep(Tally):
    """Scores of every cut on all visits. `add` each visit, then `best()` and `rows()`.

    `media_clips`: on how many clips of each condition cuts into media rows are measured, the first ones (Visit.start says where a visit begins).
    """

    def __init__(self, subject: Subject, sites: Sequence[str] = tuple(SITES), width: int = 3, media_clips: int = 32):
        if unknown := sorted(set(sites) - set(SITES)):
            raise ValueError(f"Unknown sites {unknown}; there are {', '.join(SITES)}.")
        self.subject, self.sites, self.media_clips = subject, list(sites), media_clips
        self.windows = windows(subject.model.n_layers, width)
        self._cells: dict[tuple[str, Modality, Cut | None], _Cell] = {}  # (condition, question, cut)
        self.answers: dict[tuple[str, Modality, Cut], list[tuple[Clip, Verdict]]] = {}  # what CutAnswers found
        self.cut_off: dict[tuple[str, Modality, Cut], list[bool]] = {}  # whether each of these answers ended at the limit

    def depends(self, clips: Sequence[Clip], start: int) -> int:
        """On how many of the clips cuts into media rows are measured."""
        return max(0, min(len(clips), self.media_clips - start))

    def measure(self, visit: Visit) -> Record:
        """Score every cut on the visit's clips."""
        record: Record = {}
        for modality in MODALITIES:
            sites = [site for site in self.sites if asked(site) == modality]
            if not sites:
                continue
            cuts = [Cut.at(site, w.start, w.stop) for site in sites for w in self.windows]
            media = [cut for cut in cuts if cut.cuts_media]
            record |= self._score(visit, modality, [None, *(c for c in cuts if not c.cuts_media)])
            n = self.depends(visit.clips, visit.start)
            for cut in media if n > 0 else ():
                record |= self._score(visit, modality, [cut], visit.under(cut, range(n)), n)
        return record

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        for name, (score, margin) in record.items():
            modality, _, cut = name.partition(" ")
            cell = self._cells.setdefault((condition, modality, Cut.parse(cut) if cut else None), _Cell())  # type: ignore[arg-type]
            cell.clips += clips[: len(score)]
            cell.score += score.tolist()
            cell.margin += margin.tolist()

    def _score(self, visit: Visit, modality: Modality, cuts: Sequence[Cut | None], prefix=None, n: int | None = None) -> Record:
        """Score both labels (one, where they agree) of the first `n` clips under each cut, all in one stream of batches. "question cut" ->
        (2, n): score and margin.
        """
        clips = visit.clips[:n]
        jobs = []
        for c in range(len(cuts)):
            for row, clip in enumerate(clips):
                own, other = designated(clip, modality)
                jobs += [(c, row, name) for name in dict.fromkeys((own, other))]
        scores = self.subject.scores(
            prefix or visit.prefix,
            [row for _, row, _ in jobs],
            [self.subject.label_suffix(modality, name) for *_, name in jobs],
            [() if cuts[c] is None else (cuts[c],) for c, *_ in jobs],  # type: ignore[misc]
        )
        table = {job: float(s) for job, s in zip(jobs, scores, strict=True)}
        out: Record = {}
        for c, cut in enumerate(cuts):
            pairs = [designated(clip, modality) for clip in clips]
            wanted, rival = (np.array([table[c, row, pair[side]] for row, pair in enumerate(pairs)]) for side in (0, 1))
            out[f"{modality} {cut.text}" if cut else modality] = np.stack([wanted, wanted - rival])
        return out

    def deltas(self, condition: str, modality: Modality, cut: Cut) -> tuple[list[Clip], NDArray, NDArray]:
        """Clips, change of s of the designated label and of its margin, against the uncut model on the same clips."""
        cell, plain = self._cells[condition, modality, cut], self._cells[condition, modality, None]
        at = {clip.id: i for i, clip in enumerate(plain.clips)}
        base = [at[clip.id] for clip in cell.clips]
        return cell.clips, np.array(cell.score) - np.array(plain.score)[base], np.array(cell.margin) - np.array(plain.margin)[base]

    def halves(self) -> tuple[set[str], set[str]]:
        """Ids of the conflicts that best cuts are chosen on, and of those their answers are measured on."""
        clips = {
            clip.id: clip for (condition, _, cut), cell in self._cells.items() if condition == "counterfactual" and cut is None for clip in cell.clips
        }
        unique = list(clips.values())
        choose, report = halves(unique)
        return {unique[i].id for i in choose}, {unique[i].id for i in report}

    def best(self, per_site: int) -> list[Cut]:
        """For each site the cuts that raise the designated label's margin on conflicts most, on the choosing half."""
        return [cut for site in self.sites for cut in list(self._ranked(site))[:per_site]]

    def strongest(self, count: int) -> list[Cut]:
        """The best cut of each site, and of these the first `count`. Not cuts into media rows: they are measured on too few clips to rank."""
        best = {cut: gain for site in self.sites for cut, gain in list(self._ranked(site).items())[:1] if not cut.cuts_media}
        return sorted(best, key=lambda cut: -best[cut])[:count]

    def _ranked(self, site: str) -> dict[Cut, float]:
        """The cuts of a site with what they add to the margin on the choosing half, best first."""
        choose, _ = self.halves()
        gain = {}
        for w in self.windows:
            cut = Cut.at(site, w.start, w.stop)
            if ("counterfactual", asked(site), cut) in self._cells:
                clips, _, margin = self.deltas("counterfactual", asked(site), cut)
                chosen = [m for clip, m in zip(clips, margin, strict=True) if clip.id in choose]
                gain[cut] = float(np.mean(chosen)) if chosen else -np.inf
        return dict(sorted(gain.items(), key=lambda pair: (-pair[1], pair[0].start, pair[0].stop)))

    def curve(self, sites: Sequence[str]) -> list[Cut]:
        """Every "from layer k on" cut of these sites."""
        return [Cut.at(site, w.start, w.stop) for site in sites for w in self.windows if "from" in w.families]

    def rows(self, items: ItemStore) -> list[CutEffect]:
        """One row a site, window, family, condition and question; p values corrected over the windows of a site, condition and measure."""
        out = []
        for condition in dict.fromkeys(condition for condition, _, _ in self._cells):
            for site in self.sites:
                modality = asked(site)
                cuts = [(w, Cut.at(site, w.start, w.stop)) for w in self.windows]
                cuts = [(w, cut) for w, cut in cuts if (condition, modality, cut) in self._cells]
                if not cuts:
                    continue
                found = [self.deltas(condition, modality, cut) for _, cut in cuts]
                group = items.clips(found[0][0])
                score, margin = np.stack([s for _, s, _ in found], axis=1), np.stack([m for *_, m in found], axis=1)
                changes = corrected(group.intervals.effects(score))
                margins = corrected(group.intervals.effects(margin)) if condition == "counterfactual" else [None] * len(cuts)
                for c, (w, cut) in enumerate(cuts):
                    said = self.answers.get((condition, modality, cut), [])
                    ended = self.cut_off.get((condition, modality, cut), [])
                    answered = items.clips([clip for clip, _ in said])
                    shares = np.array([[v == "audio", v == "vision", v == "unparsed", end] for (_, v), end in zip(said, ended, strict=True)])
                    rates = answered.intervals.rates(shares) if said else [None] * len(ANSWERED)
                    for family in w.families:
                        item = cut_item(site, w.start, w.stop, family)
                        key = {m: Key("knockout", condition, modality, item, m) for m in ("delta_logprob", "delta_margin", *ANSWERED)}
                        group.keep(key["delta_logprob"], score[:, c])
                        if margins[c]:
                            group.keep(key["delta_margin"], margin[:, c])
                        for r, measure in enumerate(ANSWERED if said else ()):
                            answered.keep(key[measure], shares[:, r])
                        out.append(CutEffect(site, w.start, w.stop, family, condition, modality, changes[c], margins[c], *rates))
        return sorted(out, key=lambda e: (e.condition, self.sites.index(e.site), ("window", "from", "all").index(e.family), e.start))


class CutAnswers(Tally):
    """Greedy answers under cuts, for the following rates of `KnockoutSweep.rows`.

    `cuts` are answered on every clip of a visit, `best` on factual clips and on the conflicts whose id is in `only`.
    """

    def __init__(self, sweep: KnockoutSweep, cuts: Sequence[Cut], best: Sequence[Cut] = (), only: set[str] | None = None):
        self.sweep, self.subject, self.cuts, self.best, self.only = sweep, sweep.subject, list(cuts), list(best), only

    def depends(self, clips: Sequence[Clip], start: int) -> Any:
        """The cuts, and which conflicts had no part in choosing them."""
        only = sorted({clip.id for clip in clips} & self.only) if self.only is not None else None
        return [cut.text for cut in self.cuts], [cut.text for cut in self.best], only

    def measure(self, visit: Visit) -> Record:
        """What the answers follow: "cut" -> [rows of the visit, verdicts, whether each ended at the limit]."""
        everywhere = list(range(len(visit.clips)))
        chosen = [i for i in everywhere if visit.condition == "factual" or self.only is None or visit.clips[i].id in self.only]
        return self._answers(visit, self.cuts, everywhere) | self._answers(visit, self.best, chosen)

    def _answers(self, visit: Visit, cuts: Sequence[Cut], rows: Sequence[int]) -> Record:
        record: Record = {}
        for modality in MODALITIES if rows else ():
            mine = [cut for cut in cuts if asked(cut.site) == modality]
            plain = [cut for cut in mine if not cut.cuts_media]
            ids = self.subject.greedy(visit.prefix, [*rows] * len(plain), modality, [(cut,) for cut in plain for _ in rows])
            answers = {cut: ids[c * len(rows) : (c + 1) * len(rows)] for c, cut in enumerate(plain)}
            for cut in mine:
                if cut.cuts_media:
                    answers[cut] = self.subject.greedy(visit.under(cut, rows), range(len(rows)), modality, [(cut,)] * len(rows))
            for cut, said in answers.items():
                verdicts = [verdict(self.subject.text(i), visit.clips[row], modality, self.subject.reader) for row, i in zip(rows, said, strict=True)]
                record[cut.text] = [list(rows), verdicts, [self.subject.cut_off(i) for i in said]]
        return record

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        for name, (rows, said, cut_off) in record.items():
            cut = Cut.parse(name)
            pairs = [(clips[row], what) for row, what in zip(rows, said, strict=True)]
            self.sweep.answers.setdefault((condition, asked(cut.site), cut), []).extend(pairs)
            self.sweep.cut_off.setdefault((condition, asked(cut.site), cut), []).extend(cut_off)
