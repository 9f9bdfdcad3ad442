"""Modality reliance: what greedy answers follow, and the 2x2 grid of swaps (docs/definitions.md).

For two clips i, j there are four cells v a: picture and sound of i (o) or of j (x). In every cell m = s(y_i) - s(y_j), where s is the
log-likelihood of a label's tokens divided by their number (no template, no end token), y the sound label on hear-questions and the object
label on see-questions. Then

    E_A = ½[(m_oo - m_ox) + (m_xo - m_xx)]        what exchanging the sound does to the answer, in nats a token
    E_V = ½[(m_oo - m_xo) + (m_ox - m_xx)]        what exchanging the picture does
    Shortcut Index = |mean E_V| / (|mean E_A| + |mean E_V|) on hear-questions, |mean E_A| / (…) on see-questions; pooled over grids, 0 is ideal

after DMC-Repair's shortcut index; intervals are dyadic, because a clip is part of several grids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.events import VERDICTS, Verdict, is_correct, verdict
from analysis.findings import Following, Reliance, Sample, uncounted
from analysis.items import ItemStore, Key
from analysis.statistics import Dyads
from analysis.tally import Record, Tally
from analysis.visits import MODALITIES, Visit
from data.clips import Clip, Grid, Stream
from data.questions import Modality, question


class FollowingTally(Tally):
    """What the greedy answers of all visits name. `add` each visit, then `rows()` and `samples`.

    `trained`: per stream the sources that are trained on (none by default). Of clips of the unseen split only answers about a stream of another
    source are taken up; how many others there were is counted.
    """

    def __init__(self, modalities: Sequence[Modality] = MODALITIES, trained: Mapping[Stream, frozenset[str]] | None = None):
        self.modalities, self.trained = modalities, trained or {"video": frozenset(), "audio": frozenset()}
        self.samples: list[Sample] = []
        self._clips: dict[tuple[str, Modality], list[Clip]] = {}
        self._left_out = Counter[tuple[str, Modality]]()
        self._streams: dict[str, tuple[bool, bool]] = {}
        self._verdicts: dict[tuple[str, Modality], list[Verdict]] = {}
        self._cut_off: dict[tuple[str, Modality], list[bool]] = {}

    def measure(self, visit: Visit) -> Record:
        """Ask every clip of the visit every question."""
        record: Record = {"streams": [visit.video, visit.audio], "answers": {m: visit.answers(m) for m in self.modalities}, "verdicts": {}}
        record["cut_off"] = {m: [visit.subject.cut_off(ids) for ids in visit.answer_ids(m)] for m in self.modalities}
        for modality in self.modalities:
            record["verdicts"][modality] = [
                verdict(answer, clip, modality, visit.subject.reader, visit.video, visit.audio)
                for answer, clip in zip(visit.answers(modality), visit.clips, strict=True)
            ]
        return record

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        self._streams[condition] = tuple(record["streams"])
        for modality in self.modalities:
            there = self._clips.setdefault((condition, modality), [])
            verdicts = self._verdicts.setdefault((condition, modality), [])
            cut_off = self._cut_off.setdefault((condition, modality), [])
            rows = (record["answers"][modality], record["verdicts"][modality], record["cut_off"][modality])
            for clip, answer, what, ended in zip(clips, *rows, strict=True):
                if clip.split == "unseen" and not self._is_new(clip, modality):
                    self._left_out[condition, modality] += 1
                    continue
                there.append(clip)
                verdicts.append(what)
                cut_off.append(ended)
                self.samples.append(
                    Sample(
                        clip=clip.id,
                        file=clip.file,
                        condition=condition,
                        seen=clip.seen,
                        heard=clip.heard,
                        question=question(modality),
                        modality=modality,
                        answer=answer,
                        verdict=what,
                        video_source=clip.video_source,
                        audio_source=clip.audio_source,
                        cut_off=ended,
                        video_label=clip.video_label,
                        audio_label=clip.audio_label,
                    )
                )

    def _is_new(self, clip: Clip, modality: Modality) -> bool:
        """Whether the stream that a question is about has a source that is not trained on."""
        return clip.audio_source not in self.trained["audio"] if modality == "hear" else clip.video_source not in self.trained["video"]

    def rows(self, items: ItemStore) -> list[Following]:
        """One row a condition and question."""
        out = []
        for (condition, modality), said in self._verdicts.items():
            clips, streams = self._clips[condition, modality], self._streams[condition]
            video, audio = streams
            given = [(clip.video_label if video else "", clip.audio_label if audio else "") for clip in clips]
            columns = [[what == v for what in said] for v in VERDICTS]
            columns += [[is_correct(what, modality, *labels) for what, labels in zip(said, given, strict=True)], self._cut_off[condition, modality]]
            measures = (*VERDICTS, "correct", "cut_off")
            keys = [Key("following", condition, modality, "", measure) for measure in measures]
            nothing = [uncounted() for _ in keys]  # every clip was left out
            shares = items.clips(clips, *streams).rates(keys, np.array(columns).T) if clips else nothing
            out.append(Following(condition, modality, **dict(zip(measures, shares, strict=True)), trained=self._left_out[condition, modality]))
        return out


class ScoreTable(Tally):
    """s (docs/definitions.md) for the (clip, modality, class) triples that somebody wants; filled visit by visit."""

    def __init__(self) -> None:
        self.wanted: dict[str, dict[tuple[Modality, str], None]] = {}
        self._scores: dict[tuple[str, Modality, str], float] = {}

    def want(self, clip: str, modality: Modality, name: str) -> None:
        """Ask for the score of class `name`'s phrase as the answer to this modality's question about a clip (its id)."""
        self.wanted.setdefault(clip, {})[modality, name] = None

    def depends(self, clips: Sequence[Clip], start: int) -> list[tuple[int, Modality, str]]:
        """What is wanted."""
        return self._jobs(clips)

    def _jobs(self, clips: Sequence[Clip]) -> list[tuple[int, Modality, str]]:
        return [(row, *key) for row, clip in enumerate(clips) for key in self.wanted.get(clip.id, {})]

    def measure(self, visit: Visit) -> Record:
        """Score what is wanted of the visit's clips."""
        jobs, subject = self._jobs(visit.clips), visit.subject
        suffixes = [subject.label_suffix(modality, name) for _, modality, name in jobs]
        return {"scores": subject.scores(visit.prefix, [row for row, *_ in jobs], suffixes)}

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        for (row, modality, name), score in zip(self._jobs(clips), record["scores"], strict=True):
            self._scores[clips[row].id, modality, name] = float(score)

    def __getitem__(self, key: tuple[str, Modality, str]) -> float:
        return self._scores[key]


def grid_effects(margins: ArrayLike) -> tuple[NDArray, NDArray]:
    """(E_A, E_V), each (n,), from margins (n, 4) in the order oo, ox, xo, xx (first letter: video, second: audio)."""
    oo, ox, xo, xx = np.asarray(margins, dtype=float).T
    return ((oo - ox) + (xo - xx)) / 2, ((oo - xo) + (ox - xx)) / 2


def want_grids(table: ScoreTable, grids: Iterable[Grid], by_id: Mapping[str, Clip]) -> None:
    """Ask for everything that `reliance_rows` needs."""
    for grid in grids:
        for cell in (grid.oo, grid.ox, grid.xo, grid.xx):
            for modality in MODALITIES:
                for name in _names(grid, modality, by_id):
                    table.want(cell, modality, name)


def _names(grid: Grid, modality: Modality, by_id: Mapping[str, Clip]) -> tuple[str, str]:
    """The classes (y_i, y_j) whose phrases are scored."""
    i, j = by_id[grid.oo], by_id[grid.xx]
    return (i.audio_label, j.audio_label) if modality == "hear" else (i.video_label, j.video_label)


def grid_margins(table: ScoreTable, grids: Sequence[Grid], modality: Modality, by_id: Mapping[str, Clip]) -> NDArray:
    """m of every cell, (grids, 4), in the order oo, ox, xo, xx."""
    rows = []
    for grid in grids:
        first, second = _names(grid, modality, by_id)
        rows.append([table[cell, modality, first] - table[cell, modality, second] for cell in (grid.oo, grid.ox, grid.xo, grid.xx)])
    return np.array(rows).reshape(-1, 4)


def reliance_rows(
    table: ScoreTable, grids: Sequence[Grid], by_id: Mapping[str, Clip], items: ItemStore, flips: int = 2000, seed: int = 0
) -> list[Reliance]:
    """Effects and Shortcut Index on hear- and see-questions, with their permutation null.

    If a stream does not matter, exchanging its index in a grid (o for x) turns the sign of its effect and leaves the other. `flips` data sets with
    such signs, drawn so that grids with a clip's source in common keep together (`Intervals.flipped`), give the p value of each effect, and
    `shortcut_null` = w / (w + |mean effect of the stream asked about|), w = what |mean| of the other's effect stays below in 95 % of them.
    """
    first = [by_id[grid.oo] for grid in grids]
    second = [by_id[grid.xx] for grid in grids]
    nodes = source_groups([*first, *second])
    group = items.of([grid.id for grid in grids], Dyads([nodes[c.id] for c in first], [nodes[c.id] for c in second]))
    out = []
    for modality in MODALITIES:
        effects = np.stack(grid_effects(grid_margins(table, grids, modality, by_id)), axis=1)
        keys = [Key("reliance", None, modality, "", measure) for measure in ("effect_audio", "effect_video")]
        audio, video = group.effects(keys, effects)
        null = [group.intervals.flipped(column, flips, seed) if group.intervals.usable else None for column in effects.T]
        irrelevant = 1 if modality == "hear" else 0
        index = group.intervals.ratio(effects[:, irrelevant], effects[:, 1 - irrelevant])
        asked_about, drawn = abs(effects[:, 1 - irrelevant].mean()) if len(grids) else 0.0, null[irrelevant]
        shortcut_null = drawn.widest / (drawn.widest + asked_about) if drawn and drawn.widest + asked_about else None
        p_audio, p_video = (flipped.p if flipped else None for flipped in null)
        out.append(Reliance(modality, audio, video, index, p_audio, p_video, shortcut_null))
    return out


def source_groups(clips: Sequence[Clip]) -> dict[str, str]:
    """Clip id -> the source that it counts as in dyads; the clips are the first members of all grids, then the second ones. Clips of different
    groups share neither a picture nor a recording.

    Where that would put both members of some grid into one group (`hang_together`), the clip's own pair of sources is its group.
    """
    groups = _joined(clips)
    if hang_together(clips):
        return {clip.id: f"{clip.video_source} + {clip.audio_source}" for clip in clips}
    return groups


def hang_together(clips: Sequence[Clip]) -> bool:
    """Whether the members of some grid are joined by sources that clips share; then dyads are told apart by pairs of sources, and intervals of
    reliance are too narrow by what clips with only one source in common have in common.
    """
    groups, half = _joined(clips), len(clips) // 2
    return any(groups[a.id] == groups[b.id] for a, b in zip(clips[:half], clips[half:], strict=True))


def _joined(clips: Sequence[Clip]) -> dict[str, str]:
    """Clip id -> its group when clips that share a picture or a recording are joined."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for clip in clips:
        parent[root(f"video {clip.video_source}")] = root(f"audio {clip.audio_source}")
    return {clip.id: root(f"audio {clip.audio_source}") for clip in clips}
