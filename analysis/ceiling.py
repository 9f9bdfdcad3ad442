"""What a linear probe reads of sound and picture before the decoder: the mark that answers about new sources are to be held against.

    rows = ceilings(load_model("runs/smolomni/avllm"), load_clips("runs/smolomni/clips"))
    ceiling_table(rows, [("before", Findings.load("before.json"))])

A linear probe (that of analysis/probing.py) on the mean of a stream's rows as they enter the decoder is fitted on the factual clips of the train
split and tried on those of the test split, whose sources it knows and whose renderings it does not, and of the unseen split, there only on clips of
whose source the train split has nothing (some classes have one recording only). Answers are counted on clips chosen alike, as many as the findings
asked about. A linear read-out of a mean is a lower bound of what is there: the decoder may read more, and a ratio can be above 1.

Towers and projectors do not change in fine-tuning here, so one ceiling serves for before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from analysis.findings import Estimate, Findings, Sample
from analysis.items import clip_clusters
from analysis.probing import probe_predictions
from analysis.statistics import Intervals, by_source
from analysis.tables import counted, percent, titled
from data.clips import Clip, Clips, DataError, Split
from data.files import write_json
from models import AVLLM

Stream = Literal["audio", "video"]
SPLITS: tuple[Split, ...] = ("test", "unseen")
CONDITIONS = ("factual", "counterfactual")


@dataclass(frozen=True)
class Ceiling:
    """Share of a split's factual clips whose class a linear probe reads from one stream's rows; classes without a training clip count as wrong.

    learned: clips that the probe was fitted on. known: their sources, of which no clip of the unseen split may be.
    """

    stream: Stream
    split: Split
    accuracy: Estimate
    learned: int
    known: frozenset[str]

    def takes(self, item: Clip | Sample) -> bool:
        """Whether a clip, or an answer about it, counts here."""
        return self.split != "unseen" or _source(item, self.stream) not in self.known


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
    for stream in get_args(Stream):
        known = frozenset(_source(clip, stream) for clip in learned)
        states = np.stack([_mean(model, clip, clips.root, stream) for clip in everything])
        target = np.array([names.index(clip.audio_label if stream == "audio" else clip.video_label) for clip in everything])
        right = dict(zip((clip.id for clip in everything), probe_predictions(states, [target], [fold], len(names))[0] == target, strict=True))
        for split in SPLITS:
            row = Ceiling(stream, split, Estimate(None, None, None, 0, 0), len(learned), known)
            if counts := [clip for clip in tried[split] if row.takes(clip)]:
                intervals = Intervals(clip_clusters(counts, video=stream == "video", audio=stream == "audio"), len(counts))
                out.append(dataclasses.replace(row, accuracy=intervals.rates([[right[clip.id]] for clip in counts])[0]))
    return out


def _mean(model: AVLLM, clip: Clip, root: Path, stream: Stream) -> NDArray:
    """Mean of the stream's rows, (H,)."""
    media: Any = model.media(clip, root, video=stream == "video", audio=stream == "audio")
    return getattr(media, stream).features.float().mean(0).cpu().numpy()


def answered(findings: Findings, row: Ceiling) -> dict[str, Estimate | None]:
    """Right answers of a model to the question about that stream in that split, by condition: factual and counterfactual. None: not asked."""
    question, out = "hear" if row.stream == "audio" else "see", dict[str, Estimate | None]()
    for condition in CONDITIONS:
        named = condition if row.split == "test" else f"{row.split}_{condition}"
        asked = [s for s in findings.samples if (s.condition, s.modality) == (named, question) and row.takes(s)]
        right = "vision" if (condition, question) == ("counterfactual", "see") else "audio"  # where both labels agree, "audio" is the right one
        intervals = Intervals(by_source([s.video_source for s in asked], [s.audio_source for s in asked]), len(asked))
        out[condition] = intervals.rates([[s.verdict == right] for s in asked])[0] if asked else None
    return out


def ratio(right: Estimate | None, row: Ceiling) -> float | None:
    """Right answers over the ceiling."""
    return right.value / row.accuracy.value if right is not None and right.value is not None and row.accuracy.value else None


def ceiling_table(rows: Sequence[Ceiling], named: Sequence[tuple[str, Findings]]) -> Table:
    """Ceilings, and beside each what every one of the findings reaches and which share of the ceiling that is."""
    columns = "stream, split", "probe", "n (sources)", "answers on", *(name for name, _ in named)
    out = titled("What a linear probe reads before the decoder, and what answers say", *columns)
    for row in rows:
        reached = [answered(findings, row) for _, findings in named]
        for number, condition in enumerate(CONDITIONS if named else CONDITIONS[:1]):
            first = (f"{row.stream}, {row.split}", percent(row.accuracy), counted(row.accuracy)) if number == 0 else ("", "", "")
            out.add_row(*first, condition if named else "", *(_cell(each[condition], row) for each in reached))
    out.caption = "Right answers, n (sources), and their share of the ceiling"
    return out


def _cell(right: Estimate | None, row: Ceiling) -> str:
    part = ratio(right, row)
    return "–" if part is None else f"{percent(right)}, {counted(right)}: {part:.2f}"


def save(path: Path, rows: Sequence[Ceiling], named: Sequence[tuple[str, Findings]]) -> None:
    """JSON: a list of rows, each with `answers`: what each of the findings reaches, with its share of the ceiling (`ratio`)."""
    written = []
    for row in rows:
        answers = {
            name: {
                condition: None if right is None else dataclasses.asdict(right) | {"ratio": ratio(right, row)}
                for condition, right in answered(findings, row).items()
            }
            for name, findings in named
        }
        written.append(dataclasses.asdict(row) | {"known": len(row.known), "answers": answers})
    write_json(path, written)
