"""The clips and questions of a step as tensors: what the frozen teacher says to them, the student's sequences, and the terms of the loss.

    groups = share(sample_step(clips, config, plan, step), rank, world, part, parts)        # train/sampling.py
    micro = make_micro(model, groups, clips.root, plan, config.loss, answers)
    terms = loss_terms(model, decoder(**micro.inputs), micro, plan)

A sequence that several terms ask for (the teacher's own answer is often the true one) goes through the student once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.events import abstains, content_stems
from analysis.wording import NEGATION_STEMS
from data.questions import Modality, answer
from models import AVLLM, Cut, Kind, Media
from models.sequences import Batch, Decoded, Example, Suffix, answer_logprobs
from train import objective
from train.config import COMPARED, LossPart
from train.objective import IGNORED
from train.plan import Plan
from train.sampling import Ask, Group


@dataclass
class Part:
    """What one term looks at. rows: answers of the batch; asked: how many there could be (answers that are not taught count as 0 in the mean);
    gated: how many of these are not taught because of `loss.gate`; cut_off: how many, taught or not, the teacher had not ended at the token limit;
    against: a second answer for each; reference: what the frozen model makes of them: logits (answers, tokens, vocabulary), states (layers, answers,
    tokens, hidden) or scores (answers, …)."""

    rows: list[int] = field(default_factory=list)
    asked: int = 0
    gated: int = 0
    against: list[int] = field(default_factory=list)
    reference: Tensor | None = None
    cut_off: int = 0


@dataclass
class Micro:
    """One forward and backward pass: `decoder(**inputs)`, then the parts of each term (a term may have several, of which the mean counts)."""

    batch: Batch
    inputs: dict[str, Any]
    parts: dict[str, list[Part]]

    def counts(self) -> dict[str, tuple[int, int, int, int]]:
        """Of each term: answers taught, answers left out by `loss.gate`, answers asked for, those of them that end at `loss.max_answer_tokens`."""
        found = {}
        for term, parts in self.parts.items():
            taught, gated = sum(len(part.rows) for part in parts), sum(part.gated for part in parts)
            found[term] = (taught, gated, sum(part.asked for part in parts), sum(part.cut_off for part in parts))
        return found


Average = Callable[[], AbstractContextManager[None]]
Answers = dict[tuple[str, str, str], list[int]]  # (what the model is given, question, cut or UNCUT) -> its greedy answer, token ids
UNCUT = ""
Names = Callable[[str, Modality], Collection]  # (answer, what its question is about) -> the known events that it names (analysis/events.py)
SHORT = 24  # tokens that most answers end in; only for the others room is made for more, since fewer of these fit into memory at a time
SIMILAR = 0.6  # answers that name no known event say the same where they share this part of their words
GATED = ("distillation", "mirror", "states", *COMPARED, "attention_balance")  # terms that learn the teacher's answers, where they are taught
ANCHORED = ("retention", "abstention")  # terms that keep what the model said before training, whoever else teaches


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
        return self.view.given, self.view.question, self.cut


def _to_teach(asks: Sequence[Ask], plan: Plan, loss: LossPart) -> list[_Taught]:
    """Which questions the frozen model answers, and for which term."""
    weights, taught = plan.weights(), list[_Taught]()
    for ask in asks:
        if ask.bare and ask.modality != "both" and not ask.about_nothing and "abstention" in weights:
            # What shows or sounds nothing is taken out altogether: a black picture confuses the frozen model.
            taught.append(_Taught("abstention", ask, replace(ask, video=ask.modality == "see", audio=ask.modality == "hear"), UNCUT))
        if ask.bare or not (ask.video and ask.audio) or ask.modality == "both":
            continue
        hear = ask.modality == "hear"
        cut = (plan.teacher_cut if hear else plan.mirror_cut).value or UNCUT
        view = ask
        if loss.teacher == "removed":
            view, cut = replace(ask, video=not hear, audio=hear), UNCUT
        terms = ("distillation", "attention_balance") if hear else ("mirror",)
        taught += [_Taught(term, ask, view, cut) for term in terms if term in weights]
        if ask.same is not None and any(term in weights for term in COMPARED):
            taught.append(_Taught("compared", ask, view, cut))
        if ask.modality != plan.leads.value and ask.clip.condition == "factual" and "retention" in weights:
            taught.append(_Taught("retention", ask, ask, UNCUT))
    return taught


def make_micro(
    model: AVLLM,
    groups: Sequence[Group],
    root: Path,
    plan: Plan,
    loss: LossPart,
    answers: Answers,
    average: Average | None = None,
    names: Names | None = None,
) -> Micro:
    """Sequences, and what the frozen model makes of them, for these groups. `answers` is what it was heard to say so far; new answers are added.
    `names`: reads answers for the classes of the clips, all of them, whichever a clip has; None knows none.

    counterfactual_ce: every question whose stream is there. abstention: clips from which one stream was taken away: "nothing" about it, and what the
    frozen model says about the other. distillation, mirror: hear- and see-questions, towards the teacher. states: what the layers put out, for both.
    retention: questions about factual clips that do not lead the plan (see-questions, as a rule), uncut. Others: train/objective.py.

    The teacher is the model with its adapter off (`average`: a context in which the adapter is its moving average), in evaluation mode, without
    gradients, under the plan's cut, or where loss.teacher says so without the other stream. On factual clips both streams say the same, so where a
    cut changes what the teacher's answer says (`agree`), it has cost it something: such answers are not taught (that a clip is factual is no
    label, nor is which classes there are). What would have come after `loss.max_answer_tokens` is not known, so an answer that ends there has
    changed unless it is the same token by token. Nor are answers taught whose tokens the teacher itself gives less than `loss.gate`.
    """
    weights = plan.weights()
    asks = [ask for group in groups for ask in group.asks]
    pool = _Pool(model, root)
    parts: dict[str, list[Part]] = {term: [] for term in weights}

    def part(term: str, asks: Sequence[Ask], against: bool = False) -> None:
        """The true answers, and the wrong ones."""
        if term in weights:
            wrong = [pool.add(ask, model.suffix(ask.question, *answer(ask.modality, ask.wrong, ask.wrong))) for ask in asks] if against else []
            parts[term] = [Part([pool.add(ask, model.suffix(ask.question, *ask.truth)) for ask in asks], len(asks), against=wrong)]

    in_grid = [ask for ask in asks if ask.same is not None and ask.video and ask.audio]
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
    shut: list[_Taught] = []
    ended: list[_Taught] = []
    with evaluating(model):
        if average is not None and loss.teacher_weights == "ema":
            with average():  # it says other things at every step; what is to stay as it was is the adapter-off model's
                kept, shut, ended = _teach(model, [t for t in taught if t.term not in ANCHORED], root, {}, loss, names)
            taught_off = [t for t in taught if t.term in ANCHORED]
        else:
            taught_off = taught
        with model.adapter_off():
            found, gated, cut = _teach(model, taught_off, root, answers, loss, names)
            kept, shut, ended = kept + found, shut + gated, ended + cut
    for term in dict.fromkeys(t.term for t in taught):
        mine = [k for k in kept if k[0].term == term]
        asked, gone, cut_off = (sum(t.term == term for t in which) for which in (taught, shut, ended))
        rows = [pool.add(t.ask, suffix) for t, suffix, *_ in mine]
        if term == "compared":
            for name, cell in zip(COMPARED, ("same", "same", "swapped"), strict=True):
                if name in weights:
                    other = [pool.add(replace(t.ask, clip=getattr(t.ask, cell)), suffix) for t, suffix, *_ in mine]
                    parts[name] = [Part(rows, asked, gone, other, cut_off=cut_off)]
            continue
        logits = torch.stack([logits for *_, logits, _ in mine]) if mine else None
        parts[term].append(Part(rows, asked, gone, reference=None if term == "attention_balance" else logits, cut_off=cut_off))
        if term in ("distillation", "mirror") and "states" in weights:
            start = Cut.parse(mine[0][0].cut).start if mine and loss.teacher == "cut" else 0
            states_of = torch.stack([states[start:] for *_, states in mine], 1) if mine else None
            parts["states"].append(Part(rows, asked, gone, reference=states_of, cut_off=cut_off))

    with torch.no_grad(), evaluating(model), model.adapter_off():
        for dpo in parts.get("dpo", []):
            dpo.reference = _scores(model, [pool.examples[row] for row in (*dpo.rows, *dpo.against)]).sum(1)
        for divergence in parts.get("base_divergence", []):
            with_sound = [pool.examples[row] for row in divergence.rows]
            silent = [Example(Media(example.media.video, None), example.suffix) for example in with_sound]
            divergence.reference = span_mean(_scores(model, silent), [example.suffix for example in silent])
        texts = [model.passage(text) for group in groups for text in group.texts]
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
    """The student's sequences; one that several terms ask for is there once, as the first of them gave it: true answers, which know where their label
    is, come before the teacher's own, which do not."""

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
    rows, batch, reference = part.rows, micro.batch, part.reference
    targets = batch.targets
    if term == "counterfactual_ce" or (term == "abstention" and reference is None):
        return objective.counterfactual_ce(*batch.answers(logits, rows))
    if term == "hinge":
        return objective.grid_hinge(span_scores(logits, batch, rows), span_scores(logits, batch, part.against))
    if term == "dpo":
        right, wrong = (answer_logprobs(*batch.answers(logits, which)).sum(1) for which in (rows, part.against))
        assert reference is not None
        return objective.swap_preference(right, wrong, reference[: len(rows)], reference[len(rows) :])
    if term == "base_divergence":
        assert reference is not None
        return objective.base_divergence(span_scores(logits, batch, rows), reference)
    if term in COMPARED:
        between = {"invariance": objective.invariance, "logprob_invariance": objective.logprob_invariance, "sensitivity": objective.sensitivity}[term]
        (here, said), (there, _) = batch.answers(logits, rows), batch.answers(logits, part.against)  # the same answers
        return between(here, there, said != IGNORED)
    if term == "latent_readout":
        assert out.states is not None
        asked, layers = batch.asked[rows], plan.causal_layers.value
        label = targets[rows].masked_fill(~batch.span[rows], IGNORED)
        return objective.latent_readout(model.lens(out.states[layers][:, rows, targets.shape[1] :]).float(), asked >= 0, label)
    if term == "attention_balance":
        assert out.mass is not None
        return objective.attention_balance(out.mass[:, rows][..., [int(Kind.AUDIO), int(Kind.VIDEO)]])
    assert reference is not None
    if term == "states":
        assert out.states is not None
        # The reference is padded to the longest answer of the teacher, whose term may be another one, or which may not be taught at all.
        length = int((targets[rows] != IGNORED).sum(1).max())
        return objective.state_distillation(reference[:, :, :length], out.states[-len(reference) :, rows, :length], targets[rows, :length] != IGNORED)
    student, said = batch.answers(logits, rows)
    compare = objective.knockout_distillation if term in ("distillation", "mirror") else objective.retention
    return compare(reference[:, : said.shape[1]], student, said != IGNORED)


def span_scores(logits: Tensor, batch: Batch, rows: Sequence[int]) -> Tensor:
    """(n,) s of docs/definitions.md of these answers of the batch, from the decoder's logits; 0 without a label in it."""
    logits, targets = batch.answers(logits, rows)
    span = batch.span[rows][:, : targets.shape[1]] & (targets != IGNORED)
    return (answer_logprobs(logits, targets) * span).sum(1) / span.sum(1).clamp_min(1)


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
def _teach(
    model: AVLLM, wanted: Sequence[_Taught], root: Path, answers: Answers, loss: LossPart, names: Names | None
) -> tuple[list[tuple[_Taught, Suffix, Tensor, Tensor]], list[_Taught], list[_Taught]]:
    """What the frozen model says: those of `wanted` that are taught, each with its answer's suffix, and at its emitters logits (tokens, vocabulary)
    and states (layers, tokens, hidden), padded alike; those that only `loss.gate` leaves out; and all, taught or not, that end at the token limit."""
    if not wanted:
        return [], [], []
    # Uncut, with both streams: to see whether the cut changes the answer.
    plain = [_Taught("", t.ask, t.ask, UNCUT) for t in wanted if t.ask.clip.condition == "factual"]
    jobs = {t.job: t for t in [*wanted, *plain]}
    cuts: dict[str, tuple[Cut, ...]] = {t.cut: (Cut.parse(t.cut),) if t.cut != UNCUT else () for t in jobs.values()}
    into_media = {text: tuple(c for c in cut if c.cuts_media) for text, cut in cuts.items()}  # those change the prefix, so they need one of their own
    views = {(job[0], into_media[job[2]]): t.view for job, t in jobs.items()}
    order = {key: i for i, key in enumerate(views)}
    media = [model.media(view.clip, root, view.video, view.audio) for view in views.values()]
    prefix = model.prefill(media, [cut for _, cut in views])
    new, told = [job for job in jobs if job not in answers], 0
    for room in (min(SHORT, loss.max_answer_tokens), loss.max_answer_tokens):
        new = [job for job in new if job not in answers or _cut_off(answers[job], told)]
        if new and room > told:
            which = [order[view, into_media[cut]] for view, _, cut in new]
            said = model.generate_ids(prefix, which, [question for _, question, _ in new], [cuts[cut] for *_, cut in new], room)
            answers.update(zip(new, said, strict=True))
        told = room
    uncut = {(t.ask.given, t.ask.question): answers[t.job] for t in plain}
    ended = [t for t in wanted if _cut_off(answers[t.job], loss.max_answer_tokens)]

    def unchanged(t: _Taught) -> bool:
        """Whether the cut leaves what is said of a factual clip as it is."""
        said, before = answers[t.job], uncut[t.ask.given, t.ask.question]
        if said == before:
            return True
        if any(_cut_off(ids, loss.max_answer_tokens) for ids in (said, before)):
            return False  # two beginnings that agree say nothing about the ends
        return agree(_text(model, said), _text(model, before), t.ask.question, t.ask.modality, names)

    kept = [i for i, t in enumerate(wanted) if t.ask.clip.condition != "factual" or unchanged(t)]
    if not kept:
        return [], [], ended
    passes = {job: k for k, job in enumerate(dict.fromkeys(wanted[i].job for i in kept))}  # terms that want the same answer share its pass
    suffixes = [_own_answer(model, question, answers[given, question, cut], loss.max_answer_tokens) for given, question, cut in passes]
    which = [order[given, into_media[cut]] for given, _, cut in passes]
    out = model.extend(prefix, which, suffixes, [cuts[cut] for *_, cut in passes], hidden=True)
    assert out.hidden is not None
    rows = (torch.tensor([s.first for s in suffixes])[:, None] + torch.arange(out.logits.shape[1])).to(out.logits.device)
    states = torch.stack([h.gather(1, rows.clamp_max(h.shape[1] - 1)[..., None].expand(-1, -1, h.shape[-1])) for h in out.hidden[1:]])
    sure = (out.logprobs().sum(1) / (out.targets != IGNORED).sum(1)).exp() >= loss.gate
    found, shut = [], []
    for t in (wanted[i] for i in kept):
        k = passes[t.job]
        if bool(sure[k]) or t.term in ANCHORED:
            found.append((t, suffixes[k], out.logits[k], states[:, k]))
        else:
            shut.append(t)
    return found, shut, ended


def agree(said: str, other: str, question: str, modality: Modality, names: Names | None) -> bool:
    """Whether two answers to a question say the same: where either names known events (`names`), both name the same ones; else where
    either says that there is nothing, both do; else they deny alike and share SIMILAR of the word stems that are in either, function words and the
    question's own words aside. Answers without such words have to be the same text. No label is needed: `names` knows all classes.
    """
    these, those = (names(text, modality) if names else () for text in (said, other))
    if these or those:
        return these == those
    nothing, neither = abstains(said, modality), abstains(other, modality)
    if nothing or neither:
        return nothing and neither
    ours, theirs = ({*content_stems(text)} - {*content_stems(question)} for text in (said, other))
    if not ours or not theirs:
        return said == other
    return ours & NEGATION_STEMS == theirs & NEGATION_STEMS and len(ours & theirs) >= SIMILAR * len(ours | theirs)


def _cut_off(ids: Sequence[int], max_new_tokens: int) -> bool:
    """Whether the model had not said its end token at the limit."""
    return len(ids) >= max_new_tokens


def _text(model: AVLLM, ids: Sequence[int]) -> str:
    return model.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _own_answer(model: AVLLM, question: str, ids: list[int], max_new_tokens: int) -> Suffix:
    """Question rows followed by an answer given as tokens. The end token closes it unless it was cut off at `max_new_tokens`."""
    start = model.suffix(question)
    said = torch.tensor(ids if _cut_off(ids, max_new_tokens) else [*ids, model.end_id])
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
