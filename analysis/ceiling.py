"""What a linear probe reads of sound and picture before the decoder: the mark that answers about new sources are to be held against.

    rows = ceilings(load_model("runs/smolomni/avllm"), load_clips("runs/smolomni/clips"))
    ceiling_table(rows, [("before", Findings.load("before.json"))])

A linear probe (that of analysis/probing.py) on the mean of a stream's rows as they enter the decoder is fitted on the factual clips of the train
split and tried on those of the test split, whose renderings it does not know (how many of the sources it knows, the table says), and of the unseen
split, there only on clips of whose source no clip of the train split, swapped or not, has anything (some classes have one recording only). Answers
are held against what the probe reads of the very streams that they are about: a conflict's sound is that of a factual clip. A linear read-out of a
mean is a lower bound of what is there: the decoder may read more, and a ratio can be above 1.

Towers and projectors do not change in fine-tuning here, so one ceiling serves for before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from analysis.findings import Estimate, Findings, Sample, uncounted
from analysis.items import clip_clusters
from analysis.probing import probe_predictions
from analysis.statistics import Intervals, by_source
from analysis.tables import UNREAD_COLUMN, counted, number, percent, share, titled, unread
from data.clips import Clip, Clips, DataError, Split, Stream
from data.files import write_json
from models import AVLLM

STREAMS: tuple[Stream, ...] = ("audio", "video")
SPLITS: tuple[Split, ...] = ("test", "unseen")
CONDITIONS = ("factual", "counterfactual")


@dataclass(frozen=True)
class Ceiling:
    """Share of a split's factual clips whose class a linear probe reads from one stream's rows; classes without a training clip count as wrong.

    read: by rendering whether the probe reads it. learned: clips that the probe was fitted on. known: the sources of the train split, of which no
    clip of the unseen split may be.
    """

    stream: Stream
    split: Split
    accuracy: Estimate
    read: Mapping[str, bool]
    learned: int
    known: frozenset[str]

    def takes(self, item: Clip | Sample) -> bool:
        """Whether a clip, or an answer about it, counts here."""
        return self.split != "unseen" or _source(item, self.stream) not in self.known


@dataclass(frozen=True)
class Answered:
    """Right answers to the question about a stream, what the probe reads of the same streams, and the first over the second; of the answers those
    that name nothing known, and those that ended at the token limit.

    The ratio's interval is by the delta method; a ratio without a value where the probe reads nothing.
    """

    right: Estimate
    read: Estimate
    ratio: Estimate
    unparsed: Estimate
    cut_off: Estimate


def _source(item: Clip | Sample, stream: Stream) -> str:
    return item.audio_source if stream == "audio" else item.video_source


def ceilings(model: AVLLM, clips: Clips, progress: bool = True) -> list[Ceiling]:
    """One row a stream and split; a split without a clip that counts is left out. Raises DataError where there is nothing to fit or to try.

    Intervals are clustered by the stream's source.
    """
    learned = clips.select("train", "factual")
    tried = {split: clips.select(split, "factual") for split in SPLITS}
    if not learned or not any(tried.values()):
        raise DataError(f"{clips.root}: a ceiling needs factual clips of the train split, and of the test or the unseen one.")
    everything = [*learned, *(clip for found in tried.values() for clip in found)]
    model.precompute(everything, clips.root, progress=progress)
    names = sorted({name for clip in everything for name in (clip.video_label, clip.audio_label)})
    fold = np.arange(len(learned)), np.arange(len(learned), len(everything))
    out = []
    trained = clips.sources("train")
    for stream in STREAMS:
        known = trained[stream]
        states = np.stack([_mean(model, clip, clips.root, stream) for clip in everything])
        target = np.array([names.index(clip.audio_label if stream == "audio" else clip.video_label) for clip in everything])
        right = dict(zip((clip.id for clip in everything), probe_predictions(states, [target], [fold])[0] == target, strict=True))
        for split in SPLITS:
            read = {clip.id: bool(right[clip.id]) for clip in tried[split]}
            row = Ceiling(stream, split, uncounted(), read, len(learned), known)
            if counts := [clip for clip in tried[split] if row.takes(clip)]:
                intervals = Intervals(clip_clusters(counts, video=stream == "video", audio=stream == "audio"), len(counts))
                out.append(dataclasses.replace(row, accuracy=intervals.rates([[right[clip.id]] for clip in counts])[0]))
    return out


def _mean(model: AVLLM, clip: Clip, root: Path, stream: Stream) -> NDArray:
    """Mean of the stream's rows, (H,)."""
    media: Any = model.media(clip, root, video=stream == "video", audio=stream == "audio")
    return getattr(media, stream).features.float().mean(0).cpu().numpy()


def answered(findings: Findings, row: Ceiling, clips: Clips) -> dict[str, Answered]:
    """Answers of a model to the question about that stream in that split, by condition (factual, counterfactual); what was not asked is left out."""
    question, by_id, out = "hear" if row.stream == "audio" else "see", clips.by_id(), dict[str, Answered]()
    for condition in CONDITIONS:
        named = condition if row.split == "test" else f"{row.split}_{condition}"
        asked = [s for s in findings.samples if (s.condition, s.modality) == (named, question) and row.takes(s)]
        if not asked:
            continue
        renderings = [by_id[s.clip].audio_rendering if row.stream == "audio" else by_id[s.clip].video_rendering for s in asked]
        values = np.array([[s.correct, row.read[rendering]] for s, rendering in zip(asked, renderings, strict=True)], dtype=float)
        intervals = Intervals(by_source([s.video_source for s in asked], [s.audio_source for s in asked]), len(asked))
        right, read = intervals.rates(values)
        left = intervals.rates([[s.verdict == "unparsed", s.cut_off] for s in asked])
        out[condition] = Answered(right, read, _ratio(values, intervals), *left)
    return out


def _ratio(values: NDArray, intervals: Intervals) -> Estimate:
    """Mean of the first column of (n, 2) over that of the second."""
    part, whole = values.mean(axis=0)
    if not whole:
        return Estimate(None, None, None, len(values), intervals.clusters)
    [found] = intervals.effects_of([part / whole], (values[:, :1] - part / whole * values[:, 1:]) / whole)
    return Estimate(found.value, found.low, found.high, found.n, found.clusters)


def ceiling_table(rows: Sequence[Ceiling], named: Sequence[tuple[str, Findings]], clips: Clips) -> Table:
    """A row a ceiling, then one a condition of each of the findings: right answers, the probe on the same streams, the first over the second."""
    columns = "stream, split", "right answers", "probe", UNREAD_COLUMN, "n (sources)", "ratio"
    out = titled("What a linear probe reads before the decoder, and what answers say", *columns)
    for row in rows:
        out.add_row(f"{row.stream}, {row.split}", "", percent(row.accuracy), "", counted(row.accuracy), "", style="bold")
        for name, findings in named:
            for condition, found in answered(findings, row, clips).items():
                cells = (percent(found.right), share(found.read.value), unread(found), counted(found.right), number(found.ratio))
                out.add_row(f"{condition}, {name}", *cells)
    shared = ", ".join(f"{n} of {of} {what}" for what, (n, of) in zip(("pictures", "recordings"), clips.shared_sources("test").values(), strict=True))
    out.caption = "Ratio: right answers over what the probe reads of the same streams. The train split has " + shared + " of the test split too; of "
    out.caption += "the unseen split only streams count whose source it lacks."
    return out


def save(path: Path, rows: Sequence[Ceiling], named: Sequence[tuple[str, Findings]], clips: Clips) -> None:
    """JSON: a list of rows, each with `answers`: by findings and condition right answers, what the probe reads of the same streams, and the ratio."""
    written = []
    for row in rows:
        answers = {name: {k: dataclasses.asdict(v) for k, v in answered(findings, row, clips).items()} for name, findings in named}
        written.append(dataclasses.asdict(row) | {"known": len(row.known), "answers": answers})
    write_json(path, written)
