"""What one step trains on: which clips and questions, what the frozen teacher says to them, and everything as tensors.

A step is a pure function of (seed, step), so a resumed run needs no iterator's state. Its unit is a group: 4 clips (the four cells of a grid, or four
factual clips) with a see- and a hear-question each, some with a both-question, and questions about a clip from which one stream was taken away.
All groups are alike, so processes and accumulation take equally large shares with the same mix of questions and streams.

    groups = sample_step(clips, config, plan, step)
    micro = make_micro(model, share(groups, rank, world, part, parts), clips.root, plan, config.loss, answers)
    terms = loss_terms(model, decoder(**micro.inputs), micro, plan)

A sequence that several terms ask for (the teacher's own answer is often the true one) goes through the student once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.clips import Clip, Clips, DataError, Grid
from data.questions import MODALITIES, NOTHING, QUESTIONS, Modality, answer
from models import AVLLM, Cut, Kind, Media
from models.avllm import Batch, Decoded, Example, Suffix, answer_logprobs
from train import objective
from train.config import Config, LossPart
from train.objective import IGNORED
from train.plan import Plan, parse_cut

STREAMS: tuple[Literal["hear", "see"], ...] = ("hear", "see")
Taken = Literal["muted", "blanked", "no sound", "no picture"]
TAKEN: tuple[Taken, ...] = ("muted", "blanked", "no sound", "no picture")


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


@dataclass
class Part:
    """What one term looks at. rows: answers of the batch; asked: how many there could be (answers that are not taught count as 0 in the mean);
    against: a second answer for each; reference: what the frozen model makes of them: logits (answers, tokens, vocabulary), states (layers, answers,
    tokens, hidden) or scores (answers, …)."""

    rows: list[int] = field(default_factory=list)
    asked: int = 0
    against: list[int] = field(default_factory=list)
    reference: Tensor | None = None


@dataclass
class Micro:
    """One forward and backward pass: `decoder(**inputs)`, then the parts of each term (a term may have several, of which the mean counts)."""

    batch: Batch
    inputs: dict[str, Any]
    parts: dict[str, list[Part]]


Average = Callable[[], AbstractContextManager[None]]
Answers = dict[tuple[str, str, str], list[int]]  # (what the model is given, question, cut or UNCUT) -> its greedy answer, token ids
UNCUT = ""


# ---------------------------------------------------------------- which clips and questions


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
    """The groups of one step, the same for every process. Grids are drawn by the mean weight of their two sounds' classes (plan.class_weights)."""
    rng = np.random.default_rng([config.run.seed, step])
    size, conditions = config.schedule.grids, plan.conditions.value
    texts = _texts(config, rng, size)
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
    share_of = np.array([weight.get(by_id[g.oo].heard, 1.0) + weight.get(by_id[g.xx].heard, 1.0) for g in grids])
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
    """A passage of plain text for each group, where that term is on."""
    if not config.loss.text_retention or config.data.text is None:
        return [()] * size
    try:
        passages = [line.strip() for line in Path(config.data.text).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.data.text} cannot be read as text ({error}). Name a text file, a passage a line, with data.text.") from None
    if not passages:
        raise DataError(f"{config.data.text} has no text. Put a passage on each line.")
    return [(passages[rng.integers(len(passages))],) for _ in range(size)]


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


# ---------------------------------------------------------------- everything as tensors


@dataclass(frozen=True)
class _Taught:
    """A question to learn from the teacher's own answer. `view`: what the teacher is asked, with the streams that it is given; `cut`: its cut."""

    term: str
    ask: Ask
    view: Ask
    cut: str

    @property
    def job(self) -> tuple[str, str, str]:
        """The key of `Answers`."""
        return given(self.view), self.view.question, self.cut


def given(ask: Ask) -> str:
    """The clip's id, and which of its streams the model is not given."""
    return ask.clip.id + ("" if ask.video else " without picture") + ("" if ask.audio else " without sound")


def _to_teach(asks: Sequence[Ask], plan: Plan, loss: LossPart) -> list[_Taught]:
    """Which questions the frozen model answers, and for which term."""
    weights, taught = plan.weights(), list[_Taught]()
    for ask in asks:
        if ask.bare and ask.modality != "both" and not ask.about_nothing and "retention" in weights:
            # What shows or sounds nothing is taken out altogether: a black picture confuses the frozen model.
            taught.append(_Taught("retention", ask, replace(ask, video=ask.modality == "see", audio=ask.modality == "hear"), UNCUT))
        if ask.bare or not (ask.video and ask.audio) or ask.modality == "both":
            continue
        hear = ask.modality == "hear"
        cut = (plan.teacher_cut if hear else plan.mirror_cut).value or UNCUT
        view = ask
        if loss.teacher == "removed":
            view, cut = replace(ask, video=not hear, audio=hear), UNCUT
        terms = ("distillation", "attention_balance") if hear else ("mirror",)
        taught += [_Taught(term, ask, view, cut) for term in terms if term in weights]
        if ask.same is not None and ("invariance" in weights or "sensitivity" in weights):
            taught.append(_Taught("compared", ask, view, cut))
        if not hear and ask.clip.condition == "factual" and "retention" in weights:
            taught.append(_Taught("retention", ask, ask, UNCUT))
    return taught


def make_micro(
    model: AVLLM, groups: Sequence[Group], root: Path, plan: Plan, loss: LossPart, answers: Answers, average: Average | None = None
) -> Micro:
    """Sequences, and what the frozen model makes of them, for these groups. `answers` is what it was heard to say so far; new answers are added.

    counterfactual_ce: every question whose stream is there. abstention: questions about a stream that was taken away. distillation, mirror: hear- and
    see-questions, towards the teacher. states: what the layers put out, for both. retention: see-questions about factual clips, uncut; what is
    left of a clip from which a stream was taken away. Others: train/objective.py.

    The teacher is the model with its adapter off (`average`: a context in which the adapter is its moving average), in evaluation mode, without
    gradients, under the plan's cut, or where loss.teacher says so without the other stream. On factual clips both streams say the same, so where a
    cut changes the teacher's answer, it has cost it something: such answers are not taught (that a clip is factual is no label). Nor are answers
    whose tokens the teacher itself gives less than `loss.gate`.
    """
    weights = plan.weights()
    asks = [ask for group in groups for ask in group.asks]
    pool = _Pool(model, root)
    parts: dict[str, list[Part]] = {term: [] for term in weights}

    def part(term: str, asks: Sequence[Ask], against: bool = False) -> None:
        """The true answers, and the wrong ones."""
        if term in weights:
            wrong = [pool.add(ask, model.suffix(ask.question, *answer(ask.modality, ask.wrong, ask.wrong))) for ask in asks] if against else []
            parts[term] = [Part([pool.add(ask, model.suffix(ask.question, *ask.truth)) for ask in asks], len(asks), wrong)]

    in_grid = [ask for ask in asks if ask.same is not None]
    hear = [ask for ask in asks if ask.modality == "hear" and ask.audio and not ask.bare]
    # Of clips that lost a stream by modality dropout, only what is left is asked about.
    part("counterfactual_ce", [ask for ask in asks if not ask.about_nothing and (ask.bare or ask.modality != "both" or (ask.video and ask.audio))])
    part("abstention", [ask for ask in asks if ask.bare and ask.about_nothing])
    part("hinge", in_grid, against=True)
    part("dpo", [ask for ask in in_grid if ask.clip.condition == "counterfactual"], against=True)
    part("base_divergence", hear)
    part("latent_readout", hear)

    taught = _to_teach(asks, plan, loss)
    kept: list[tuple[_Taught, Suffix, Tensor, Tensor]] = []
    with evaluating(model):
        if average is not None and loss.teacher_weights == "ema":
            with average():  # it says other things at every step; what is to stay as it was is the adapter-off model's
                kept += _teach(model, [t for t in taught if t.term != "retention"], root, {}, loss)
            taught_off = [t for t in taught if t.term == "retention"]
        else:
            taught_off = taught
        with model.adapter_off():
            kept += _teach(model, taught_off, root, answers, loss)
    for term in dict.fromkeys(t.term for t in taught):
        mine = [k for k in kept if k[0].term == term]
        asked = sum(t.term == term for t in taught)
        rows = [pool.add(t.ask, suffix) for t, suffix, *_ in mine]
        if term == "compared":
            for name, cell in (("invariance", "same"), ("sensitivity", "swapped")):
                if name in weights:
                    other = [pool.add(replace(t.ask, clip=getattr(t.ask, cell)), suffix) for t, suffix, *_ in mine]
                    parts[name] = [Part(rows, asked, other)]
            continue
        logits = torch.stack([logits for *_, logits, _ in mine]) if mine else None
        parts[term] = [Part(rows, asked, reference=None if term == "attention_balance" else logits)]
        if term in ("distillation", "mirror") and "states" in weights:
            start = parse_cut(mine[0][0].cut).start if mine and loss.teacher == "cut" else 0
            parts["states"].append(Part(rows, asked, reference=torch.stack([states[start:] for *_, states in mine], 1) if mine else None))

    with torch.no_grad(), evaluating(model), model.adapter_off():
        for dpo in parts.get("dpo", []):
            dpo.reference = _scores(model, [pool.examples[row] for row in (*dpo.rows, *dpo.against)]).sum(1)
        for divergence in parts.get("base_divergence", []):
            with_sound = [pool.examples[row] for row in divergence.rows]
            silent = [Example(Media(example.media.video, None), example.suffix) for example in with_sound]
            divergence.reference = span_mean(_scores(model, silent), [example.suffix for example in silent])
        texts = [_passage(model, text) for group in groups for text in group.texts]
        if texts:
            prefix = model.prefill([Media(None, None)])
            first = len(pool.examples)
            pool.examples += [Example(Media(None, None), text) for text in texts]
            rows = list(range(first, len(pool.examples)))
            parts["text_retention"] = [Part(rows, len(rows), reference=model.extend(prefix, [0] * len(texts), texts).logits)]

    batch = model.batch(pool.examples)
    inputs: dict[str, Any] = dict(batch.inputs)
    if "states" in weights or "latent_readout" in weights:
        inputs["states"] = batch.inputs["rows"]
    if "latent_readout" in weights:
        inputs["states"] = torch.cat([batch.inputs["rows"], batch.asked], 1)
    if "attention_balance" in weights:
        inputs["mass"] = tuple(plan.causal_layers.value)
    return Micro(batch, inputs, parts)


class _Pool:
    """The student's sequences; one that several terms ask for is there once."""

    def __init__(self, model: AVLLM, root: Path):
        self.model, self.root = model, root
        self.examples: list[Example] = []
        self._rows: dict[tuple, int] = {}

    def add(self, ask: Ask, suffix: Suffix) -> int:
        """The row of this answer to this question."""
        key = (ask.clip.id, ask.video, ask.audio, tuple(suffix.ids.tolist()))
        row = self._rows.setdefault(key, len(self.examples))
        if row == len(self.examples):
            self.examples.append(Example(self.model.media(ask.clip, self.root, ask.video, ask.audio), suffix))
        elif suffix.span.any() and not suffix.span.all():  # the true answer knows where its label is, the teacher's own does not
            self.examples[row] = replace(self.examples[row], suffix=suffix)
        return row


def loss_terms(model: AVLLM, out: Decoded, micro: Micro, plan: Plan) -> dict[str, Tensor]:
    """Each term of train/objective.py on what the student's decoder returned. Answers that are not taught count as 0 in the mean."""
    logits, zero = out.logits.float(), out.logits.sum() * 0.0
    terms = {}
    for term, parts in micro.parts.items():
        asked = sum(part.asked for part in parts)
        values = [_value(term, part, logits, out, micro, model, plan) * (len(part.rows) / asked) for part in parts if part.rows]
        terms[term] = torch.stack(values).sum() if values else zero
    return terms


def _value(term: str, part: Part, logits: Tensor, out: Decoded, micro: Micro, model: AVLLM, plan: Plan) -> Tensor:
    """The mean of a term over the answers of a part."""
    rows, targets = part.rows, micro.batch.targets
    reference = part.reference
    if term in ("counterfactual_ce", "abstention"):
        return objective.counterfactual_ce(logits[rows], targets[rows])
    if term == "hinge":
        s = span_scores(logits, micro.batch)
        return objective.grid_hinge(s[rows], s[part.against])
    if term == "dpo":
        score = answer_logprobs(logits, targets).sum(1)
        assert reference is not None
        return objective.swap_preference(score[rows], score[part.against], reference[: len(rows)], reference[len(rows) :])
    if term == "base_divergence":
        assert reference is not None
        return objective.base_divergence(span_scores(logits, micro.batch)[rows], reference)
    if term in ("invariance", "sensitivity"):
        mask = targets[rows] != IGNORED
        compare = objective.invariance if term == "invariance" else objective.sensitivity
        return compare(logits[rows], logits[part.against], mask)
    if term == "latent_readout":
        assert out.states is not None
        asked, layers = micro.batch.asked[rows], plan.causal_layers.value
        label = targets[rows].masked_fill(~micro.batch.span[rows], IGNORED)
        return objective.latent_readout(model.lens(out.states[layers][:, rows, targets.shape[1] :]).float(), asked >= 0, label)
    if term == "attention_balance":
        assert out.mass is not None
        return objective.attention_balance(out.mass[:, rows][..., [int(Kind.AUDIO), int(Kind.VIDEO)]])
    assert reference is not None
    if term == "states":
        assert out.states is not None
        layers, _, length, _ = reference.shape
        return objective.state_distillation(reference, out.states[-layers:, rows, :length], targets[rows, :length] != IGNORED)
    length = reference.shape[1]
    student, mask = logits[rows, :length], targets[rows, :length] != IGNORED
    return (objective.knockout_distillation if term in ("distillation", "mirror") else objective.retention)(reference, student, mask)


def span_scores(logits: Tensor, batch: Batch) -> Tensor:
    """(N,) s of docs/definitions.md of every answer that has a label in it."""
    span = batch.span & (batch.targets != IGNORED)
    return (answer_logprobs(logits, batch.targets) * span).sum(1) / span.sum(1).clamp_min(1)


@contextmanager
def evaluating(model: AVLLM) -> Iterator[None]:
    """Without dropout, and as before afterwards."""
    was_training = model.decoder.training
    model.decoder.eval()
    try:
        yield
    finally:
        model.decoder.train(was_training)


# ---------------------------------------------------------------- the frozen model


@torch.no_grad()
def _teach(model: AVLLM, wanted: Sequence[_Taught], root: Path, answers: Answers, loss: LossPart) -> list[tuple[_Taught, Suffix, Tensor, Tensor]]:
    """What the frozen model says: those of `wanted` that are taught, each with its answer's suffix, and at its emitters logits (tokens, vocabulary)
    and states (layers, tokens, hidden), padded alike."""
    if not wanted:
        return []
    # Uncut, with both streams: to see whether the cut changes the answer.
    plain = [_Taught("", t.ask, t.ask, UNCUT) for t in wanted if t.ask.clip.condition == "factual"]
    jobs = {t.job: t for t in [*wanted, *plain]}
    cuts: dict[str, tuple[Cut, ...]] = {t.cut: (parse_cut(t.cut),) if t.cut != UNCUT else () for t in jobs.values()}
    into_media = {text: tuple(c for c in cut if c.cuts_media) for text, cut in cuts.items()}  # those change the prefix, so they need one of their own
    views = {(job[0], into_media[job[2]]): t.view for job, t in jobs.items()}
    order = {key: i for i, key in enumerate(views)}
    media = [model.media(view.clip, root, view.video, view.audio) for view in views.values()]
    prefix = model.prefill(media, [cut for _, cut in views])
    new = [job for job in jobs if job not in answers]
    if new:
        which = [order[view, into_media[cut]] for view, _, cut in new]
        said = model.generate_ids(prefix, which, [question for _, question, _ in new], [cuts[cut] for *_, cut in new], loss.max_answer_tokens)
        answers.update(zip(new, said, strict=True))
    uncut = {(given(t.ask), t.ask.question): answers[t.job] for t in plain}
    kept = [i for i, t in enumerate(wanted) if t.ask.clip.condition != "factual" or answers[t.job] == uncut[given(t.ask), t.ask.question]]
    if not kept:
        return []
    suffixes = [_own_answer(model, wanted[i].ask.question, answers[wanted[i].job], loss.max_answer_tokens) for i in kept]
    which = [order[wanted[i].job[0], into_media[wanted[i].cut]] for i in kept]
    out = model.extend(prefix, which, suffixes, [cuts[wanted[i].cut] for i in kept], hidden=True)
    assert out.hidden is not None
    rows = (torch.tensor([s.first for s in suffixes])[:, None] + torch.arange(out.logits.shape[1])).to(out.logits.device)
    states = torch.stack([h.gather(1, rows.clamp_max(h.shape[1] - 1)[..., None].expand(-1, -1, h.shape[-1])) for h in out.hidden[1:]])
    sure = (out.logprobs().sum(1) / (out.targets != IGNORED).sum(1)).exp() >= loss.gate
    return [(wanted[i], suffixes[k], out.logits[k], states[:, k]) for k, i in enumerate(kept) if bool(sure[k]) or wanted[i].term == "retention"]


def _own_answer(model: AVLLM, question: str, ids: list[int], max_new_tokens: int) -> Suffix:
    """Question rows followed by an answer given as tokens. The end token closes it unless it was cut off at `max_new_tokens`."""
    start = model.suffix(question)
    said = torch.tensor(ids if len(ids) == max_new_tokens else [*ids, model.end_id])
    kinds = torch.full_like(said, int(Kind.EMITTER))
    kinds[-1] = int(Kind.QUESTION)
    return Suffix(torch.cat([start.ids, said]), torch.cat([start.kinds, kinds]), start.first, said, torch.zeros(len(said), dtype=torch.bool))


def _scores(model: AVLLM, examples: Sequence[Example]) -> Tensor:
    """Log-probability of every answer token, (N, A), without what was learnt."""
    streams = {(id(e.media.video), id(e.media.audio)): e.media for e in examples}
    order = {key: i for i, key in enumerate(streams)}
    prefix = model.prefill(list(streams.values()))
    return model.logprobs(prefix, [order[id(e.media.video), id(e.media.audio)] for e in examples], [e.suffix for e in examples])


def span_mean(logprobs: Tensor, suffixes: Sequence[Suffix]) -> Tensor:
    """Mean over the label's tokens, (N,)."""
    return torch.stack([row[: len(s.span)][s.span.to(row.device)].mean() for row, s in zip(logprobs, suffixes, strict=True)])


def _passage(model: AVLLM, text: str) -> Suffix:
    """Plain text, of which every token but the first is predicted; it begins as a question does, since text has no other place in the prompt."""
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < 2:
        raise DataError(f"the plain text {text!r} has fewer than two tokens. Give longer passages in data.text.")
    kinds = torch.full_like(ids, int(Kind.EMITTER))
    kinds[-1] = int(Kind.QUESTION)
    return Suffix(ids, kinds, 0, ids[1:], torch.zeros(len(ids) - 1, dtype=torch.bool))
