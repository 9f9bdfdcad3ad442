"""Which clips and questions one step trains on.

A step is a pure function of (seed, step), so a resumed run needs no iterator's state. Its unit is a group: 4 clips (the four cells of a grid, or four
factual clips) with a see- and a hear-question each, some with a both-question, and questions about a clip from which one stream was taken away.
All groups are alike, so processes and accumulation take equally large shares with the same mix of questions and streams.

    groups = sample_step(clips, config, plan, step)
    mine = share(groups, rank, world, part, parts)           # for train/batches.py
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from analysis.plain_text import PASSAGES
from analysis.plain_text import QUESTIONS as TEXT_QUESTIONS
from data.clips import Clip, Clips, DataError, Grid
from data.questions import MODALITIES, NOTHING, QUESTIONS, Modality, answer
from train.config import PLAIN_TEXT, Config
from train.plan import Plan

STREAMS: tuple[Literal["hear", "see"], ...] = ("hear", "see")
Taken = Literal["muted", "blanked", "no sound", "no picture"]
TAKEN: tuple[Taken, ...] = ("muted", "blanked", "no sound", "no picture")
MEASURED_RUN = 8
NOISE = frozenset({"near_silence", "near_black"})  # renderings that are faint noise


@dataclass(frozen=True)
class Ask:
    """One question about one clip. video, audio: the streams that the model is given."""

    clip: Clip
    modality: Modality
    question: str
    video: bool = True
    audio: bool = True
    wrong: str = ""  # the label phrase of the grid's other clip, on see- and hear-questions
    same: Clip | None = None  # the cell in which the stream asked about is the same and the other one swapped
    swapped: Clip | None = None  # the cell in which the stream asked about is swapped and the other one the same
    bare: bool = False  # one stream is taken away, or shows or sounds nothing

    @property
    def given(self) -> str:
        """The clip's id, and which of its streams the model is not given."""
        return self.clip.id + ("" if self.video else " without picture") + ("" if self.audio else " without sound")

    @property
    def truth(self) -> tuple[str, str]:
        """The designated answer and the label in it."""
        return answer(self.modality, self.clip.seen if self.video else "", self.clip.heard if self.audio else "")

    @property
    def about_nothing(self) -> bool:
        """Whether the question is about a stream that is not there."""
        return self.modality != "both" and self.truth[1] == NOTHING


@dataclass(frozen=True)
class Group:
    """The unit of a step: its questions, and passages of plain text."""

    asks: tuple[Ask, ...]
    texts: tuple[str, ...] = ()


def training_clips(clips: Clips, train_on: str) -> list[Clip]:
    """Every clip that training may see. Raises DataError where there are too few."""
    found = clips.select("train", "factual")
    if train_on != "factual":
        by_id = clips.by_id()
        cells = [cell for g in clips.grids if g.split == "train" for cell in (g.oo, g.ox, g.xo, g.xx)]
        found = [by_id[cell] for cell in dict.fromkeys(cells)]
    if len(found) < 4:
        raise DataError(f"{clips.root}: the train split has {len(found)} clips to train on with data.train_on {train_on}; at least 4 are needed.")
    return found + [c for condition in ("muted", "blanked") for c in clips.select("train", condition)]


def sample_step(clips: Clips, config: Config, plan: Plan, step: int) -> list[Group]:
    """The groups of one step, the same for every process. Grids are drawn by the mean weight (plan.class_weights) of the classes of their two sounds,
    or of their two pictures where see-questions lead.
    """
    rng = np.random.default_rng([config.run.seed, step])
    size, conditions = config.schedule.grids, plan.conditions.value
    texts = _texts(config, rng, size) if "text_retention" in plan.weights() else [()] * size
    return [
        Group(tuple(_asks(clips, cells, grid, config, conditions, rng, step * size + number)), texts[number])
        for number, (cells, grid) in enumerate(_cells(clips, config, plan, rng))
    ]


def _cells(clips: Clips, config: Config, plan: Plan, rng: np.random.Generator) -> list[tuple[list[Clip], bool]]:
    """Four clips a group, and whether they are the cells oo, ox, xo, xx of one grid."""
    by_id, size, seed = clips.by_id(), config.schedule.grids, config.run.seed
    if config.data.train_on == "factual":
        factual = dosed(clips.select("train", "factual"), config.data.dose, seed)
        chosen = rng.choice(len(factual), size=4 * size, replace=len(factual) < 4 * size)
        return [([factual[i] for i in chosen[at : at + 4]], False) for at in range(0, len(chosen), 4)]
    grids: list[Grid] = dosed([g for g in clips.grids if g.split == "train"], config.data.dose, seed)
    weight = plan.class_weights.value
    label = "audio_label" if plan.leads.value == "hear" else "video_label"
    share_of = np.array([sum(weight.get(getattr(by_id[cell], label), 1.0) for cell in (g.oo, g.xx)) for g in grids])
    count = {"grids": 1, "one_swap": 2, "shuffled": 4}[config.data.train_on] * size
    drawn = [grids[i] for i in rng.choice(len(grids), size=count, replace=len(grids) < count, p=share_of / share_of.sum())]
    if config.data.train_on == "grids":
        return [([by_id[cell] for cell in (g.oo, g.ox, g.xo, g.xx)], True) for g in drawn]
    if config.data.train_on == "one_swap":
        return [([by_id[cell] for g in drawn[at : at + 2] for cell in (g.oo, g.ox)], False) for at in range(0, count, 2)]
    cells = [by_id[(g.oo, g.ox, g.xo, g.xx)[rng.integers(4)]] for g in drawn]
    return [(cells[at : at + 4], False) for at in range(0, count, 4)]


def _asks(
    clips: Clips, cells: list[Clip], grid: bool, config: Config, conditions: dict[str, int], rng: np.random.Generator, number: int
) -> list[Ask]:
    """The questions of one group; one wording a modality, so that cells can be compared."""
    wording = {modality: QUESTIONS[modality][rng.integers(len(QUESTIONS[modality]))] for modality in MODALITIES}
    first = int(rng.integers(4))
    asks = []
    for place, clip in enumerate(cells):
        video, audio = True, True
        if rng.random() < config.loss.modality_dropout:
            video, audio = (False, True) if rng.random() < 0.5 else (True, False)
        for modality in STREAMS:
            ask = Ask(clip, modality, wording[modality], video, audio)
            if grid:  # place is 2 * (which picture) + (which sound)
                picture, sound = cells[place ^ 2], cells[place ^ 1]  # the cells with the other picture, with the other sound
                same, swapped = (picture, sound) if modality == "hear" else (sound, picture)
                ask = replace(ask, wrong=swapped.heard if modality == "hear" else swapped.seen, same=same, swapped=swapped)
            asks.append(ask)
        if (place - first) % 4 < conditions.get("both", 0):
            asks.append(Ask(clip, "both", wording["both"], video, audio))
    for bare in range(conditions.get("bare", 0)):
        asks += _bare_asks(clips, TAKEN[(number + bare) % len(TAKEN)], wording, config, rng)
    return asks


def _bare_asks(clips: Clips, taken: Taken, wording: dict[Modality, str], config: Config, rng: np.random.Generator) -> list[Ask]:
    """See-, hear- and both-question about a clip without one stream: its file has silence or black, or the stream is not given at all."""
    usable = _factual_used(clips, config)
    made = [c for c in clips.select("train", taken) if {c.video_rendering, c.audio_rendering} & usable] if taken in ("muted", "blanked") else []
    if made and config.data.faint is not None:
        faint = rng.random() < config.data.faint
        made = [c for c in made if bool({c.video_rendering, c.audio_rendering} & NOISE) == faint] or made
    pool = made or [c for c in clips.select("train", "factual") if c.id in usable]
    clip = pool[rng.integers(len(pool))]
    video, audio = bool(made) or taken in ("muted", "no sound"), bool(made) or taken in ("blanked", "no picture")
    return [Ask(clip, modality, wording[modality], video, audio, bare=True) for modality in ("hear", "see", "both")]


def _factual_used(clips: Clips, config: Config) -> set[str]:
    """Ids of the factual clips that the dose leaves, in grids or on their own; a stream's rendering has the id of its factual clip."""
    data, seed = config.data, config.run.seed
    if data.train_on == "factual":
        return {c.id for c in dosed(clips.select("train", "factual"), data.dose, seed)}
    return {cell for g in dosed([g for g in clips.grids if g.split == "train"], data.dose, seed) for cell in (g.oo, g.xx)}


def dosed(items: list, dose: float, seed: int) -> list:
    """A share of the items, at least one, the first by a hash of seed and id; their order stays."""
    if dose == 1:
        return items
    order = sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item.id}".encode()).hexdigest())
    chosen = {item.id for item in order[: max(1, round(dose * len(items)))]}
    return [item for item in items if item.id in chosen]


def _texts(config: Config, rng: np.random.Generator, size: int) -> list[tuple[str, ...]]:
    """A passage of plain text for each group."""
    found = passages(config.data.text or str(PLAIN_TEXT))
    return [(found[rng.integers(len(found))],) for _ in range(size)]


@lru_cache(maxsize=4)
def passages(path: str) -> list[str]:
    """The lines of a text file that are not empty. Raises DataError where it cannot be read, has none, or has text that diagnoses measure plain text
    on: MEASURED_RUN words in a row of a passage, or a whole question.
    """
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}). Name a text file, a passage a line, with data.text.") from None
    if not found:
        raise DataError(f"{path} has no text. Put a passage on each line.")
    measured = {run for passage in PASSAGES for run in _runs(passage.text, MEASURED_RUN)}
    measured |= {run for asked in TEXT_QUESTIONS for run in _runs(asked.text)}
    lengths = {len(run) for run in measured}
    if wrong := [line for line in found if any(measured & _runs(line, n) for n in lengths)]:
        raise DataError(
            f"{path} has text that plain text is measured on (analysis/plain_text.py), so what training costs would not be seen. "
            f"Take it out: {wrong[0][:80]!r}, {len(wrong)} lines in all."
        )
    return found


def _runs(text: str, n: int | None = None) -> set[tuple[str, ...]]:
    """All runs of n words; without n the whole text."""
    words = re.findall(r"\w+", text.casefold())
    n = len(words) if n is None else n
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def share(groups: Sequence[Group], rank: int, world: int, part: int, parts: int) -> list[Group]:
    """What process `rank` of `world` does in accumulation part `part` of `parts`. Raises DataError unless the shares are equally large."""
    size, rest = divmod(len(groups), world * parts)
    if rest:
        raise DataError(
            f"schedule.grids is {len(groups)}, which {world} processes with schedule.accumulate {parts} cannot share equally: "
            f"use a multiple of {world * parts}."
        )
    at = (rank * parts + part) * size
    return list(groups[at : at + size])
