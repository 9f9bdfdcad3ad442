"""How much of what is heard and seen the towers give the decoder at all: the ceiling that answers on new sources are to be held against.

    rows = ceilings(load_model("runs/smolomni/avllm"), load_clips("runs/smolomni/clips"))
    ceiling_table(rows, [("before", Findings.load("before.json"))])

A linear probe (that of analysis/probing.py) on the mean of a stream's rows as they enter the decoder is fitted on the factual clips of the train
split and tried on those of the test split, whose sources it knows and whose renderings it does not, and of the unseen split, whose sources are new.
A model whose answers reach it has lost nothing on the way. It is a linear ceiling: the decoder may read the rows better than a probe of their mean
does, so a ratio can be above 1.

Towers and projectors do not change in fine-tuning here, so one ceiling serves for before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from analysis.findings import Estimate, Findings
from analysis.items import clip_clusters
from analysis.probing import probe_predictions
from analysis.statistics import Intervals
from analysis.tables import percent, titled
from data.clips import Clip, Clips, DataError, Split
from data.files import write_json
from models import AVLLM

SPLITS: tuple[Split, ...] = ("test", "unseen")
QUESTION_OF = {"audio": "hear", "video": "see"}


@dataclass(frozen=True)
class Ceiling:
    """Share of a split's factual clips whose class a linear probe reads from one stream's rows. learned: clips that the probe was fitted on."""

    stream: str
    split: str
    accuracy: Estimate
    learned: int


def ceilings(model: AVLLM, clips: Clips, progress: bool = True) -> list[Ceiling]:
    """One row a stream and split; splits without factual clips are left out. Raises DataError where there is nothing to fit or to try a probe on.

    Intervals are clustered by the stream's source.
    """
    learned = clips.select("train", "factual")
    tried = {split: found for split in SPLITS if (found := clips.select(split, "factual"))}
    if not learned or not tried:
        raise DataError(f"{clips.root}: a ceiling needs factual clips of the train split, and of the test or the unseen one.")
    everything = [*learned, *(clip for found in tried.values() for clip in found)]
    model.precompute(everything, clips.root, progress=progress)
    names = sorted({name for clip in everything for name in (clip.video_label, clip.audio_label)})
    out = []
    for stream in QUESTION_OF:
        states = np.stack([_mean(model, clip, clips.root, stream) for clip in everything])
        target = np.array([names.index(clip.audio_label if stream == "audio" else clip.video_label) for clip in everything])
        fold = np.arange(len(learned)), np.arange(len(learned), len(everything))
        right = probe_predictions(states, [target], [fold], len(names))[0] == target
        start = len(learned)
        for split, found in tried.items():
            here = right[start : start + len(found)]
            clusters = clip_clusters(found, video=stream == "video", audio=stream == "audio")
            out.append(Ceiling(stream, split, Intervals(clusters, len(found)).rates(here[:, None])[0], len(learned)))
            start += len(found)
    return out


def _mean(model: AVLLM, clip: Clip, root: Path, stream: str) -> NDArray:
    """Mean of the stream's rows, (H,)."""
    media = model.media(clip, root, video=stream == "video", audio=stream == "audio")
    features: Any = getattr(media, stream)
    return features.features.float().mean(0).cpu().numpy()


def answered(findings: Findings, row: Ceiling) -> dict[str, Estimate | None]:
    """Right answers of a model to the question about that stream in that split, by condition: factual and counterfactual."""
    prefix = "" if row.split == findings.split else f"{row.split}_"
    rows = {name: findings.following_rate(f"{prefix}{name}", QUESTION_OF[row.stream]) for name in ("factual", "counterfactual")}
    return {name: None if found is None else found.correct for name, found in rows.items()}


def ratio(right: Estimate | None, row: Ceiling) -> float | None:
    """Right answers over the ceiling."""
    return right.value / row.accuracy.value if right is not None and right.value is not None and row.accuracy.value else None


def ceiling_table(rows: Sequence[Ceiling], named: Sequence[tuple[str, Findings]]) -> Table:
    """Ceilings, and beside each what every one of the findings reaches and which share of the ceiling that is."""
    out = titled("What the towers give the decoder, and what answers make of it", "stream, split", "linear probe", *(name for name, _ in named))
    out.caption = "Right answers on factual clips; on conflicts; each with its share of the ceiling"
    for row in rows:
        cells = []
        for _, findings in named:
            told = [f"{percent(right)}, {share:.2f}" for right in answered(findings, row).values() if (share := ratio(right, row)) is not None]
            cells.append("\n".join(told) or "–")
        out.add_row(f"{row.stream}, {row.split}", percent(row.accuracy), *cells)
    return out


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
        written.append(dataclasses.asdict(row) | {"answers": answers})
    write_json(path, written)
