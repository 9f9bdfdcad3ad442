"""What one step trains on: which clips and questions, what the frozen teacher says to them, and everything as tensors.

A step is a pure function of (seed, step), so a resumed run needs no iterator's state. Its unit is a group of 4 clips with a see- and a hear-question
each: the four cells of a grid, or four factual clips. Processes and accumulation take equally large shares of the same groups.

    groups = sample_step(clips, config, plan, step)
    micro = make_micro(model, share(groups, rank, world, part, parts), clips.root, plan, answers, max_new_tokens=24)
    terms = loss_terms(out.logits, micro, out.states)        # of out = decoder(**micro.batch.inputs, states=micro.batch.inputs["rows"])

A sequence that several terms ask for (the teacher's own answer is often the true one) goes through the student once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.clips import Clip, Clips, DataError
from data.questions import QUESTIONS, answer
from models import AVLLM, Cut, Kind
from models.avllm import Batch, Example, Suffix
from train.config import Config
from train.objective import IGNORED, counterfactual_ce, knockout_distillation, retention, state_distillation
from train.plan import Plan, parse_cut

MODALITIES: tuple[Literal["hear", "see"], ...] = ("hear", "see")


@dataclass(frozen=True)
class Ask:
    """One question about one clip."""

    clip: Clip
    modality: Literal["hear", "see"]
    question: str


@dataclass
class Micro:
    """One forward and backward pass. rows[term]: the rows of `batch` that the term looks at, of `asked[term]` that could be; teacher[term]: logits
    (answers, tokens, vocabulary); states[term]: what its layers put out, from the cut's first layer on (layers, answers, tokens, hidden)."""

    batch: Batch
    rows: dict[str, list[int]]
    asked: dict[str, int]
    teacher: dict[str, Tensor]
    states: dict[str, Tensor]


Answers = dict[tuple[str, str, str], list[int]]  # (clip id, question, cut or UNCUT) -> the frozen model's greedy answer, token ids
UNCUT = ""


def training_clips(clips: Clips, train_on: Literal["grids", "factual"]) -> list[Clip]:
    """Every clip that training may see. Raises DataError where there are too few."""
    found = clips.select("train", "factual")
    if train_on == "grids":
        by_id = clips.by_id()
        cells = [cell for g in clips.grids if g.split == "train" for cell in (g.oo, g.ox, g.xo, g.xx)]
        found = [by_id[cell] for cell in dict.fromkeys(cells)]
    if len(found) < 4:
        raise DataError(f"{clips.root}: the train split has {len(found)} clips to train on with data.train_on {train_on}; at least 4 are needed.")
    return found


def sample_step(clips: Clips, config: Config, plan: Plan, step: int) -> list[list[Ask]]:
    """The groups of one step, the same for every process. Grids are drawn by the mean weight of their two sounds' classes (plan.class_weights)."""
    rng = np.random.default_rng([config.run.seed, step])
    groups: list[list[Clip]]
    if config.data.train_on == "factual":
        factual = clips.select("train", "factual")
        chosen = rng.choice(len(factual), size=4 * config.schedule.grids, replace=len(factual) < 4 * config.schedule.grids)
        groups = [[factual[i] for i in chosen[at : at + 4]] for at in range(0, len(chosen), 4)]
    else:
        by_id, grids = clips.by_id(), [g for g in clips.grids if g.split == "train"]
        weight = plan.class_weights.value
        share_of = np.array([weight.get(by_id[g.oo].heard, 1.0) + weight.get(by_id[g.xx].heard, 1.0) for g in grids])
        size = config.schedule.grids
        chosen = rng.choice(len(grids), size=size, replace=len(grids) < size, p=share_of / share_of.sum())
        groups = [[by_id[cell] for cell in (grids[i].oo, grids[i].ox, grids[i].xo, grids[i].xx)] for i in chosen]
    return [
        [Ask(clip, modality, QUESTIONS[modality][rng.integers(len(QUESTIONS[modality]))]) for clip in group for modality in MODALITIES]
        for group in groups
    ]


def share(groups: Sequence[list[Ask]], rank: int, world: int, part: int, parts: int) -> list[Ask]:
    """What process `rank` of `world` does in accumulation part `part` of `parts`. Raises DataError unless the shares are equally large."""
    size, rest = divmod(len(groups), world * parts)
    if rest:
        raise DataError(
            f"schedule.grids is {len(groups)}, which {world} processes with schedule.accumulate {parts} cannot share equally: "
            f"use a multiple of {world * parts}."
        )
    at = (rank * parts + part) * size
    return [ask for group in groups[at : at + size] for ask in group]


def make_micro(model: AVLLM, asks: Sequence[Ask], root: Path, plan: Plan, answers: Answers, max_new_tokens: int) -> Micro:
    """Sequences and teacher logits for these questions. `answers` is what the frozen model was heard to say so far; new answers are added to it.

    distillation: hear-questions under the teacher cut. mirror: see-questions under the mirror cut. states: what the layers put out, for both.
    retention: see-questions about factual clips, uncut.
    The teacher is the model with its adapter off, in evaluation mode, without gradients. On factual clips both streams say the same, so where a cut
    changes the teacher's answer, the cut has cost it something: such answers are not taught (that a clip is factual is no label).
    """
    weights = plan.weights()
    taught: list[tuple[str, Ask, str]] = []  # term, question, cut
    for ask in asks:
        if ask.modality == "hear" and "distillation" in weights:
            taught.append(("distillation", ask, plan.teacher_cut.value))
        if ask.modality == "see" and "mirror" in weights:
            taught.append(("mirror", ask, plan.mirror_cut.value))
        if ask.clip.condition == "factual" and ask.modality == "see" and "retention" in weights:
            taught.append(("retention", ask, UNCUT))
    asked = {"counterfactual_ce": len(asks)} | Counter(term for term, _, _ in taught)
    asked["states"] = asked.get("distillation", 0) + asked.get("mirror", 0)

    sequences: dict[tuple[str, str, tuple[int, ...]], int] = {}
    examples: list[Example] = []
    rows: dict[str, list[int]] = {term: [] for term in weights if term != "states"}

    def add(term: str, ask: Ask, suffix: Suffix) -> None:
        """The row of this sequence, a new one only if no term has asked for it yet."""
        row = sequences.setdefault((ask.clip.id, ask.question, tuple(suffix.ids.tolist())), len(examples))
        if row == len(examples):
            examples.append(Example(model.media(ask.clip, root), suffix))
        rows[term].append(row)

    if "counterfactual_ce" in weights:
        for ask in asks:
            add("counterfactual_ce", ask, model.suffix(ask.question, *answer(ask.modality, ask.clip.seen, ask.clip.heard)))
    kept, suffixes, logits, states = _teach(model, [(ask, cut) for _, ask, cut in taught], root, answers, max_new_tokens)
    for i, suffix in zip(kept, suffixes, strict=True):
        add(taught[i][0], taught[i][1], suffix)
    places = {term: [k for k, i in enumerate(kept) if taught[i][0] == term] for term in rows if term != "counterfactual_ce"}
    cuts = {"distillation": plan.teacher_cut.value, "mirror": plan.mirror_cut.value}
    matched = {term: states[parse_cut(cut).start :, places[term]] for term, cut in cuts.items() if "states" in weights and places.get(term)}
    batch = model.batch(examples)
    teacher = {term: logits[place] for term, place in places.items()}
    return Micro(batch, rows, {term: asked[term] for term in weights}, teacher, matched)


def loss_terms(logits: Tensor, micro: Micro, states: Tensor | None = None) -> dict[str, Tensor]:
    """Each term of train/objective.py on the student's logits (rows, tokens, vocabulary) and, where the plan has that term, states (layers, rows,
    tokens, hidden). Answers that are not taught count as 0 in the mean."""
    terms = {}
    for term, rows in micro.rows.items():
        if not rows:
            terms[term] = logits.sum() * 0.0
            continue
        student, targets = logits[rows], micro.batch.targets[rows]
        if term == "counterfactual_ce":
            terms[term] = counterfactual_ce(student, targets)
            continue
        said = micro.teacher[term]
        student, mask = student[:, : said.shape[1]], targets[:, : said.shape[1]] != IGNORED
        loss = retention(said, student, mask) if term == "retention" else knockout_distillation(said, student, mask)
        terms[term] = loss * len(rows) / micro.asked[term]
    if states is not None:
        terms["states"] = logits.sum() * 0.0
        for term, said in micro.states.items():
            rows, (layers, _, length, _) = micro.rows[term], said.shape
            loss = state_distillation(said, states[-layers:, rows, :length], micro.batch.targets[rows, :length] != IGNORED)
            terms["states"] = terms["states"] + loss * len(rows) / micro.asked["states"]
    return terms


@torch.no_grad()
def _teach(
    model: AVLLM, wanted: Sequence[tuple[Ask, str]], root: Path, answers: Answers, max_new_tokens: int
) -> tuple[list[int], list[Suffix], Tensor, Tensor]:
    """What the frozen model says under each cut: which of `wanted` are taught, the answers' suffixes, and logits (N, tokens, vocabulary) and states
    (layers, N, tokens, hidden) at the emitters of these."""
    nothing = torch.empty(0)
    if not wanted:
        return [], [], nothing, nothing
    plain = [(ask, UNCUT) for ask, cut in wanted if cut != UNCUT and ask.clip.condition == "factual"]  # to see whether the cut changes the answer
    jobs = {(ask.clip.id, ask.question, cut): (ask, cut) for ask, cut in [*wanted, *plain]}
    cuts: dict[str, tuple[Cut, ...]] = {cut: (parse_cut(cut),) if cut != UNCUT else () for _, cut in jobs.values()}
    into_media = {text: tuple(c for c in cut if c.cuts_media) for text, cut in cuts.items()}  # those change the prefix, so they need one of their own
    clips = {(ask.clip.id, into_media[cut]): ask.clip for ask, cut in jobs.values()}
    order = {key: i for i, key in enumerate(clips)}
    was_training = model.decoder.training
    model.decoder.eval()
    try:
        with model.adapter_off():
            prefix = model.prefill([model.media(clip, root) for clip in clips.values()], [cut for _, cut in clips])
            new = [key for key in jobs if key not in answers]
            if new:
                which = [order[clip, into_media[cut]] for clip, _, cut in new]
                said = model.generate_ids(prefix, which, [question for _, question, _ in new], [cuts[cut] for *_, cut in new], max_new_tokens)
                answers.update(zip(new, said, strict=True))
            same = [
                ask.clip.condition != "factual" or answers[ask.clip.id, ask.question, cut] == answers[ask.clip.id, ask.question, UNCUT]
                for ask, cut in wanted
            ]
            kept = [i for i, agrees in enumerate(same) if agrees]
            if not kept:
                return [], [], nothing, nothing
            taught = [wanted[i] for i in kept]
            suffixes = [_own_answer(model, ask.question, answers[ask.clip.id, ask.question, cut], max_new_tokens) for ask, cut in taught]
            which = [order[ask.clip.id, into_media[cut]] for ask, cut in taught]
            out = model.extend(prefix, which, suffixes, [cuts[cut] for _, cut in taught], hidden=True)
            assert out.hidden is not None
            rows = (torch.tensor([s.first for s in suffixes])[:, None] + torch.arange(out.logits.shape[1])).to(out.logits.device)
            states = torch.stack([h.gather(1, rows.clamp_max(h.shape[1] - 1)[..., None].expand(-1, -1, h.shape[-1])) for h in out.hidden[1:]])
            return kept, suffixes, out.logits, states
    finally:
        model.decoder.train(was_training)


def _own_answer(model: AVLLM, question: str, ids: list[int], max_new_tokens: int) -> Suffix:
    """Question rows followed by an answer given as tokens. The end token closes it unless it was cut off at `max_new_tokens`."""
    start = model.suffix(question)
    said = torch.tensor(ids if len(ids) == max_new_tokens else [*ids, model.end_id])
    kinds = torch.full_like(said, int(Kind.EMITTER))
    kinds[-1] = int(Kind.QUESTION)
    return Suffix(torch.cat([start.ids, said]), torch.cat([start.kinds, kinds]), start.first, said, torch.zeros(len(said), dtype=torch.bool))
