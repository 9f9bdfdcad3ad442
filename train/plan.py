"""From findings to what training does: every choice with the numbers it came from.

    plan = make_plan(Findings.load("runs/x/findings/plan.json"), config)
    plan.save("runs/x/plan.json")
    show(plan)

A setting in the configuration overrides the choice of the same name (`overridden` is then true, and `because` says what would have been chosen from
the findings where that could be told). Nothing here looks at the test split.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from analysis.findings import CutEffect, Estimate, Findings, Sample
from analysis.items import Key, cut_item, unpacked
from analysis.settings import DiagnoseSettings
from data.files import write_json
from models import spread_ranks
from models.attention import Cut
from train.config import EXTRA_TERMS, PLANNED_TERMS, Config

MOST_COST = 0.10  # a teacher cut may cost this share of right answers on factual clips, or half of what it gains on conflicts
MOST_COST_NATS = 0.2  # or this many nats a label token, where only scores were measured
TIE = 0.01  # cuts that differ by less count as equally good
NO_BIAS = 0.05  # a rate of right answers on conflicts this close to the one with that stream alone is no bias
UNREADABLE = 0.20  # a larger share of answers that name nothing known, or end at the token limit, and no plan is made of the rate
LOST = 0.10  # right about a stream alone less often than this above a guess: deaf (blind), no direction to train in
FEW = 0.80  # right about a stream alone less often than this: the plan warns that it cannot promise more
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION_SUFFICES = 0.9  # recovery under the cut from which on adapters in the attention are enough
STATES_WEIGHT = 10.0
CARRIED = 0.95  # causal layers are those that together carry this share of what cutting the picture from all layers does
NOTHING_ENOUGH = 0.97  # abstention that is as good as whole
ABSTENTION_WEIGHT = 0.4
LOGPROB_INVARIANCE_WEIGHT = 0.5
KNOWS_TEXT = 0.10  # share of simple questions answered right from which on there is language to keep
TEXT_WEIGHT = 2.0  # the one weight that was tried (configs/smolomni.yaml)
NO_SHORTCUT = 0.05  # a Shortcut Index that leaves nothing to mend
PATIENCE = 2
GRIDS_PER_GAP = 1400  # grids for a gap of 100 points
LEAST_GRIDS = 200


class PlanError(ValueError):
    """Findings that no plan follows from. The message says why and what can be done."""


@dataclass
class Choice:
    """One decision. `value` is plain JSON; `because` is a sentence with the numbers; `overridden`: taken from the configuration instead."""

    value: Any
    because: str
    overridden: bool = False


@dataclass
class Plan:
    """What training will do. Cuts are written `site start:stop` (layers [start, stop)); windows are [start, stop)."""

    leads: Choice
    fusion_window: Choice
    causal_layers: Choice
    teacher_cut: Choice
    mirror_cut: Choice
    lora_layers: Choice
    lora_ranks: Choice
    lora_projections: Choice
    counterfactual_ce: Choice
    distillation: Choice
    mirror: Choice
    states: Choice
    retention: Choice
    abstention: Choice
    logprob_invariance: Choice
    text_retention: Choice
    extras: Choice
    class_weights: Choice
    conditions: Choice
    steps: Choice
    stop: Choice
    lora_targets: dict[str, int] = dataclasses.field(default_factory=dict)  # modules that the layers and projections come to in this model -> rank

    def weights(self) -> dict[str, float]:
        """Weight of each loss term that is on."""
        terms = {name: getattr(self, name).value for name in PLANNED_TERMS} | self.extras.value
        if not terms["distillation"] and not terms["mirror"]:
            terms["states"] = 0.0  # nobody to learn them from
        return {name: weight for name, weight in terms.items() if weight > 0}

    def save(self, path: str | Path) -> None:
        """Write plan.json atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read plan.json. Raises PlanError naming the file if it is not one."""
        try:
            raw = json.loads(Path(path).read_text())
            targets = raw.pop("lora_targets")
            return cls(**{name: Choice(**choice) for name, choice in raw.items()}, lora_targets=targets)
        except (OSError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"{path} is not a plan of this version ({error}). Delete it and it is made again from the findings.") from None


@dataclass(frozen=True)
class _Side:
    """What was measured about one question: shares of right answers on conflicts, on factual clips, and with its own stream alone."""

    question: str  # hear | see
    conflicts: float
    factual: float
    alone: float  # the mark: more than the model makes of the stream alone, no looking away from the other one brings
    classes: int  # that were asked about, not phrases, which a clip may have of its own; 0 where no answers were kept

    @property
    def stream(self) -> str:
        """What the question is about."""
        return "sound" if self.question == "hear" else "picture"

    @property
    def source(self) -> str:
        """The other stream, which a teacher has cut off."""
        return "video" if self.question == "hear" else "audio"

    @property
    def wanted(self) -> str:
        """The measure of a cut that counts right answers on conflicts."""
        return "audio" if self.question == "hear" else "vision"

    @property
    def lost(self) -> bool:
        """Whether the model is deaf (blind) to these clips. Of one class that cannot be told: whoever always names it is right."""
        return self.classes != 1 and self.alone < LOST + self.guess

    @property
    def guess(self) -> float:
        """The share that naming a class at random gets right."""
        return 1 / self.classes if self.classes else 0.0

    @property
    def gap(self) -> float:
        """What the other stream takes away: the share that is right with the stream alone and wrong on conflicts."""
        return 0.0 if self.lost else max(0.0, self.alone - self.conflicts)

    @property
    def warning(self) -> str:
        """A sentence where too little is heard (seen) for a plan to mend; else nothing."""
        if self.alone >= FEW:
            return ""
        sense = ("deaf", "heard") if self.question == "hear" else ("blind", "seen")
        told = f"With the {self.stream} alone only {_percent(self.alone)} of {self.question}-questions are right"
        if self.lost:
            guess = f" (a guess among {self.classes} classes: {_percent(self.guess)})" if self.classes else ""
            return f"{told}{guess}: to these clips the model is {sense[0]}, and no plan can mend what is not {sense[1]}."
        return f"{told}: no plan can mend what is not {sense[1]}, so conflicts will not come to more than that."


def make_plan(findings: Findings, config: Config) -> Plan:
    """Turn findings on the plan split into a plan, in either direction: the picture may cover the sound, or the sound the picture.

    Raises PlanError where answers cannot be read, where they show no bias, or no cut that a teacher could be made of.
    """
    if findings.split in ("test", "unseen"):
        raise PlanError(
            f"These findings are of the {findings.split} split. A plan made from it would be graded on what it was chosen on: "
            "diagnose the plan split."
        )
    n_layers, loss = findings.n_layers, config.loss
    hear, see = _side(findings, "hear"), _side(findings, "see")
    if loss.require_bias:
        _require_readable(findings)
        _require_bias(findings, hear, see)
    first, second = (see, hear) if see.gap > hear.gap else (hear, see)

    teacher = _cut_choice(findings, hear, loss.teacher_cut, n_layers, guard=first is see)
    mirror = _cut_choice(findings, see, loss.mirror_cut, n_layers, guard=first is hear)
    for side, cut, term, weight, flag in (
        (hear, teacher, "distillation", loss.distillation, '--loss.teacher-cut "video->emitters 4:8"'),
        (see, mirror, "mirror", loss.mirror, '--loss.mirror-cut "audio->emitters 4:8"'),
    ):
        if cut.value is None and weight != 0 and (side is first or weight):
            raise PlanError(
                f"{'No cut' if weight is None else f'loss.{term} is {weight}, but no cut'} makes a teacher for {side.question}-questions: "
                f"{_joined(cut.because, side.warning)} Look at the knockout curves in the findings, name a cut yourself ({flag}), "
                f"or train on labels alone (--loss.{term} 0)."
            )

    lead = teacher if first is hear else mirror
    fusion = _fusion_window(findings, first, lead)
    causal = _causal_layers(findings, first, fusion, lead, n_layers)
    layers, ranks = _lora_layers(causal, n_layers, config)
    projections = _lora_projections(findings, first, lead, config.lora.projections)
    total_gap = hear.gap + see.gap
    gaps = (
        f"hear-questions on conflicts are {_points(hear.gap)} short of the {_percent(hear.alone)} that are right with the sound alone, "
        f"see-questions {_points(see.gap)} of the {_percent(see.alone)} with the picture alone"
    )
    gaps = _joined(_sentence(gaps), hear.warning, see.warning)
    shared = f"{gaps} Both distillation terms weigh 1, the one with the wider gap up to 1.5: looking away spills over to the other."
    weight_hear, weight_see = (min(1.5, max(1.0, 2 * side.gap / total_gap)) if total_gap else 1.0 for side in (hear, see))
    distillation = Choice(round(weight_hear, 2), shared) if teacher.value else Choice(0.0, f"There is no teacher cut: {teacher.because}")
    mirrored = Choice(round(weight_see, 2), shared) if mirror.value else Choice(0.0, f"There is no mirror cut: {mirror.because}")
    leads = Choice(
        first.question,
        f"{gaps} The wider gap decides which cut has to be found, which layers get an adapter, which classes are drawn more often and which "
        f"checkpoint is the best; {second.question}-questions about factual clips are kept as they are.",
    )
    states = Choice(
        STATES_WEIGHT,
        "Large, because it is a distance relative to a state's length, small in numbers. Where streams agree, a teacher's answers hardly differ "
        "from the student's, its states do.",
    )
    ce = Choice(1.0, "The unit that the other weights are relative to.")
    if config.data.train_on == "factual":
        ce = Choice(0.0, f"On factual clips the {second.stream} alone gives the right answer, so cross-entropy would teach nothing about it.")
    held = mirrored.value and loss.mirror != 0 if first is hear else distillation.value and loss.distillation != 0
    kept = Choice(
        0.5 if held else 1.0,
        f"On factual clips {_percent(second.factual)} of {second.question}-questions are right, which is to stay. Half where the "
        f"{'mirror' if first is hear else 'distillation'} already holds them.",
    )
    count = 10 * math.ceil(max(LEAST_GRIDS, GRIDS_PER_GAP * total_gap) / config.schedule.grids / 10)
    steps = Choice(count, f"{gaps} {GRIDS_PER_GAP} grids for each 100 points (at least {LEAST_GRIDS}), {config.schedule.grids} a step.")
    plan = Plan(
        leads=leads,
        fusion_window=fusion,
        causal_layers=causal,
        teacher_cut=teacher,
        mirror_cut=mirror,
        lora_layers=layers,
        lora_ranks=ranks,
        lora_projections=projections,
        counterfactual_ce=_overridable(ce, loss.counterfactual_ce),
        distillation=_overridable(distillation, loss.distillation),
        mirror=_overridable(mirrored, loss.mirror),
        states=_overridable(states, loss.states),
        retention=_overridable(kept, loss.retention),
        abstention=_overridable(_abstention(findings), loss.abstention),
        logprob_invariance=_overridable(_logprob_invariance(findings, config), loss.logprob_invariance),
        text_retention=_overridable(_text_retention(findings), loss.text_retention),
        extras=_extras(config),
        class_weights=_class_weights(findings, config, first),
        conditions=_conditions(config, ce),
        steps=_overridable(steps, config.schedule.steps),
        stop=_overridable(_stop(config), config.schedule.patience),
    )
    if not plan.weights():
        raise PlanError("No term is left to train with: every weight is 0, in the configuration or because the findings give it nothing to do.")
    return plan


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan as a table."""
    table = Table(title="Plan", title_justify="left", show_lines=False)
    for heading in ("choice", "value", "because"):
        table.add_column(heading, overflow="fold")
    for item in dataclasses.fields(plan):
        choice = getattr(plan, item.name)
        if not isinstance(choice, Choice):
            continue
        value = choice.value
        if item.name == "class_weights" and value:
            value = f"{min(value.values())} to {max(value.values())} over {len(value)} classes"
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
        text = " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
        table.add_row(item.name.replace("_", " "), text, choice.because)
    (console or Console()).print(table)


# ---------------------------------------------------------------- the choices


def _side(findings: Findings, question: str) -> _Side:
    """The rates of one question. Raises PlanError where one was not measured."""
    alone = "audio_only" if question == "hear" else "video_only"
    conflicts, factual, mark = (_rate(findings, condition, question) for condition in ("counterfactual", "factual", alone))
    asked = {_class(s) for s in findings.samples if (s.condition, s.modality) == ("counterfactual", question)}
    return _Side(question, conflicts, factual, mark, len(asked))


def _class(sample: Sample) -> str:
    """The class of what its question is about; where findings do not say, its phrase stands in."""
    return (sample.audio_label or sample.heard) if sample.modality == "hear" else (sample.video_label or sample.seen)


def _require_readable(findings: Findings) -> None:
    """Refuse where more than UNREADABLE of the answers behind a rate that the plan uses name nothing known, or were cut off."""
    unread, ended, told = False, False, []
    looked: list[tuple[str, str]] = []
    for condition in ("counterfactual", "factual", "audio_only", "video_only"):
        for question in ("hear", "see"):
            row = findings.following_rate(condition, question)
            if row is None or (condition, question) in (("audio_only", "see"), ("video_only", "hear")):
                continue
            unparsed, cut_off = row.unparsed.value or 0.0, row.cut_off.value or 0.0
            if max(unparsed, cut_off) <= UNREADABLE:
                continue
            unread, ended = unread or unparsed > UNREADABLE, ended or cut_off > UNREADABLE
            looked.append((condition, question))
            where = f"{question}-questions on {condition.replace('_', '-')} clips"
            told.append(f"{where}: {_percent(unparsed)} name nothing known, {_percent(cut_off)} end at the token limit")
    if not told:
        return
    found = [s for s in findings.samples if (s.condition, s.modality) in looked]
    shown = [s for s in found if (s.verdict == "unparsed" if unread else s.cut_off)]
    quoted = " and ".join(repr(answer) for answer in list(dict.fromkeys(s.answer for s in shown))[:2])
    mend = []
    if ended:
        limit = findings.settings.get("max_new_tokens", DiagnoseSettings.max_new_tokens)
        mend.append(f"let answers be longer (--diagnosis.plan.max-new-tokens, now {limit})")
    if unread:
        mend.append(
            "give the labels' other wordings as synonyms in the clip folder's manifest.json, or use clips whose classes the model has words for"
        )
    raise PlanError(
        f"No plan can be made from answers that are not read ({_percent(UNREADABLE)} may be): {'; '.join(told)}."
        + (f" For instance {quoted}." if quoted else "")
        + f" Look at the samples in the findings, then {', and '.join(mend)}; to plan all the same, --loss.no-require-bias."
    )


def _require_bias(findings: Findings, hear: _Side, see: _Side) -> None:
    if max(hear.gap, see.gap) > NO_BIAS:
        return
    numbers = "; ".join(
        f"{_percent(side.conflicts)} of {side.question}-questions on conflicts are right ({side.stream} alone: {_percent(side.alone)}, "
        f"factual clips: {_percent(side.factual)})"
        for side in (hear, see)
    )
    if warning := _joined(hear.warning, see.warning):
        raise PlanError(
            f"The findings show no bias that a plan could mend in {findings.model}: {numbers}. {warning} Train its hearing (seeing) first, or give "
            "it clips whose sounds and pictures it knows (--data.clips); to train all the same, --loss.no-require-bias."
        )
    raise PlanError(
        f"The findings show no bias in {findings.model}: {numbers}. There is nothing to mend. "
        "If it fails elsewhere, give it clips of that kind (--data.clips); to train all the same, --loss.no-require-bias."
    )


def _cut_choice(findings: Findings, side: _Side, override: str | None, n_layers: int, guard: bool) -> Choice:
    """The cut that makes the teacher for questions about the other stream; value None if there is none."""
    found = _best_cut(findings, side, guard)
    if override is None:
        return found
    cut = Cut.parse(override)
    if cut.stop > n_layers:
        raise PlanError(f"The cut {override!r} goes up to layer {cut.stop}, but {findings.model} has {n_layers} layers.")
    return Choice(override, f"Set in the configuration. From the findings: {found.value or 'none'}. {found.because}", overridden=True)


def _best_cut(findings: Findings, side: _Side, guard: bool) -> Choice:
    """Largest gain on conflicts less cost on factual clips, among cuts whose gain has its interval above 0 and whose cost is bearable.

    Where answers were generated under cuts, gain and cost are shares of right answers, with and without the cut on the same clips; elsewhere nats a
    token of margin and of log p. What a teacher
    gets wrong on factual clips matters less than the rest: there its changed answers are left out of training (train/batches.py). So of a model
    that hears worse than it sees more than MOST_COST may be lost there, as long as conflicts gain twice that; point estimates decide.

    The question with the smaller gap needs its teacher even where little is wrong with it: learning to look away from one stream spills over. So
    there (`guard`), where no cut helps for certain, the best one that does not harm conflicts is taken.
    """
    source, question, wanted, stream = side.source, side.question, side.wanted, side.stream
    if side.lost:
        return Choice(None, f"{side.warning} So no cut of the other stream makes a teacher.")
    rows = {(_name(e), e.condition): e for e in findings.knockout if e.site.startswith(f"{source}->") and e.question == question}
    conflicts = {name: e for (name, condition), e in rows.items() if condition == "counterfactual"}
    by_rate = any(_value(getattr(e, wanted)) is not None for e in conflicts.values())
    tried, helping = 0, 0
    found: list[tuple[float, float, str, str]] = []
    nearest: tuple[float, float, float] | None = None  # of the cut that gains most: gain, named under it, and uncut on its clips
    guards: list[tuple[float, float, str, str]] = []
    for name, effect in conflicts.items():
        measured: Estimate | None = getattr(effect, wanted) if by_rate else effect.delta_margin
        if measured is None or measured.value is None or measured.low is None:
            continue
        tried += 1
        uncut = _uncut(findings, effect, wanted, side.conflicts)
        if by_rate:
            nearest = max(nearest or (-math.inf, 0.0, 0.0), (measured.value - uncut, measured.value, uncut))
        helps = measured.low > (uncut if by_rate else 0.0)
        helping += helps
        beside = rows.get((name, "factual"))
        left = _value((beside.audio if by_rate else beside.delta_logprob) if beside else None)  # on factual clips `audio` counts right answers
        if left is None:
            continue
        uncut_factual = _uncut(findings, beside, "audio", side.factual) if beside else side.factual
        gain, cost = (measured.value - uncut, uncut_factual - left) if by_rate else (measured.value, -left)
        bearable = max(MOST_COST, gain / 2 if helps else 0.0) if by_rate else MOST_COST_NATS
        if gain >= 0 and cost <= bearable:
            told = f"there the true {stream} is named in {_percent(measured.value)} of {measured.n} conflicts ({_percent(measured.low)} to "
            told += (
                f"{_percent(measured.high)}), uncut {_percent(uncut)}; on factual clips {_percent(left)} are right, uncut {_percent(uncut_factual)}"
            )
            if not by_rate:
                told = f"it raises the margin of the true {stream} by {gain:.2f} nats a token and changes log p on factual clips by {left:+.2f}"
            if by_rate and cost > MOST_COST:
                told += f" (a loss of {_points(cost)}, borne because conflicts gain at least twice that)"
            (found if helps and gain > cost else guards).append((gain - max(cost, 0.0), _value(effect.delta_logprob) or 0.0, name, told))
    if found:
        top = max(found)
        best = max((f for f in found if f[0] >= top[0] - TIE), key=lambda f: f[1])  # as good as equal: the one that is surest of the answer
        return Choice(best[2], f"With {source} cut {best[3]}: the most gained on conflicts less lost on factual clips of {tried} cuts measured.")
    if guards and guard:
        told, guarded = max(guards)[3], "seen while hearing" if question == "see" else "heard while seeing"
        return Choice(max(guards)[2], f"With {source} cut {told}: no certain gain, but it guards what is {guarded} is trained.")
    if not tried:
        return Choice(None, f"No cut of {source} was measured on {question}-questions about counterfactual clips.")
    if helping:
        most = f"{_percent(MOST_COST)} and than half of what it gains" if by_rate else f"{MOST_COST_NATS} nats a token"
        harms = f"harms factual clips too much (by more than {most})"
        return Choice(None, f"Of {tried} cuts of {source} {helping} help, but each {harms} or was not measured on them.")
    if nearest is None:
        return Choice(None, f"None of {tried} cuts of {source} raises the margin of the true {stream} with its interval above 0.")
    most = f"the one that gains most names it in {_percent(nearest[1])} of the conflicts it was answered on, uncut {_percent(nearest[2])}"
    return Choice(None, f"None of {tried} cuts of {source} names the true {stream} with its interval above the uncut model: {most}.")


def _uncut(findings: Findings, effect: CutEffect, measure: str, otherwise: float) -> float:
    """The uncut model's share of right answers on the clips that this cut was answered on; `otherwise` where findings keep no single answers."""
    under = Key("knockout", effect.condition, effect.question, cut_item(effect.site, effect.start, effect.stop, effect.family), measure).text
    plain = Key("following", effect.condition, effect.question, "", "correct").text
    asked = {name for group in findings.items if under in group.values for name in group.ids}
    right = {
        name: value
        for group in findings.items
        if plain in group.values
        for name, value in zip(group.ids, unpacked(group.values[plain], len(group.ids)), strict=True)
    }
    return sum(right[name] for name in asked) / len(asked) if asked and asked <= right.keys() else otherwise


def _fusion_window(findings: Findings, side: _Side, teacher: Choice) -> Choice:
    """Layers inside windows where cutting video -> question+emitters raises log p of the true sound with the interval above 0. Where the sound
    covers the picture: cutting audio, and log p of the true picture.
    """
    wanted = (f"{side.source}->question+emitters", "window", "counterfactual", side.question)
    windows = [e for e in findings.knockout if (e.site, e.family, e.condition, e.question) == wanted and e.delta_logprob.low is not None]
    raising = [e for e in windows if e.delta_logprob.low is not None and e.delta_logprob.low > 0]
    if raising:
        start, stop = min(e.start for e in raising), max(e.stop for e in raising)
        top = max(raising, key=lambda e: e.delta_logprob.value or 0.0)
        return Choice(
            [start, stop],
            f"Cutting {side.source} from question and emitters raises log p of the true {side.stream} with the interval above 0 in {len(raising)} of "
            f"{len(windows)} windows, most in {top.start}:{top.stop} ({top.delta_logprob.value:+.2f} nats a token).",
        )
    if teacher.value is None:
        return Choice(None, f"No window was measured or none raises log p of the true {side.stream}, and there is no teacher cut to go by.")
    cut = Cut.parse(teacher.value)
    why = "No window was measured" if not windows else f"None of {len(windows)} windows raises log p of the true {side.stream} on its own"
    return Choice([cut.start, cut.stop], f"{why}, so the layers of the teacher cut stand in.")


def _causal_layers(findings: Findings, side: _Side, fusion: Choice, teacher: Choice, n_layers: int) -> Choice:
    """The fewest layers that carry most of the effect of cutting video -> question+emitters, on hear-questions about conflicts (where the sound
    covers the picture: of cutting audio, on see-questions).

    What layer k carries is the drop of the curve "cut from layer k on" from k to k + 1: that of the paths that are closed in k and stay open above.
    """
    site = (f"{side.source}->question+emitters", "counterfactual", side.question)
    curve = {e.start: e.delta_logprob.value for e in findings.knockout if (e.site, e.condition, e.question) == site and e.stop == n_layers}
    effects = [curve.get(k) for k in range(n_layers)] + [0.0]
    if all(value is not None for value in effects) and (effects[0] or 0.0) > 0:
        carried = {k: (effects[k] or 0.0) - (effects[k + 1] or 0.0) for k in range(n_layers)}
        chosen: list[int] = []
        for k in sorted(carried, key=lambda k: (-carried[k], k)):
            if carried[k] <= 0 or sum(carried[c] for c in chosen) >= CARRIED * (effects[0] or 0.0):
                break
            chosen.append(k)
        share = sum(carried[c] for c in chosen) / (effects[0] or 1.0)
        return Choice(
            sorted(chosen),
            f"Cutting {side.source} from question and emitters in all layers raises log p of the true {side.stream} by {effects[0]:.2f} nats a "
            f'token; by the curve "from layer k on" these {len(chosen)} of {n_layers} layers carry {_percent(share)} of it.',
        )
    window = fusion.value or ([Cut.parse(teacher.value).start, Cut.parse(teacher.value).stop] if teacher.value else [0, n_layers])
    return Choice(list(range(*window)), 'The curve "from layer k on" was not measured or does not rise, so the fusion window stands in.')


def _lora_layers(causal: Choice, n_layers: int, config: Config) -> tuple[Choice, Choice]:
    """Which layers get an adapter, and the rank in each."""
    lora = config.lora
    if lora.layers is not None:
        if wrong := [layer for layer in lora.layers if not 0 <= layer < n_layers]:
            raise PlanError(f"lora.layers names {wrong}, but the model has layers 0 to {n_layers - 1}.")
        layers = sorted(set(lora.layers))
        because = f"Set in the configuration. From the findings: {causal.value}."
        return Choice(layers, because, overridden=True), Choice([lora.r] * len(layers), "lora.r in each.")
    planned = list(range(max(causal.value) + 1))
    if lora.choose == "plan":
        because = (
            f"Up to layer {planned[-1]}, the last that carries the other stream into the answer. Those below are with it, since there the answer "
            "reads the question: without them it does not learn which stream is asked about (configs/ablations/layers.yaml)."
        )
        return Choice(planned, because), Choice([lora.r] * len(planned), "lora.r in each.")
    layers = list(range(n_layers))
    if lora.choose == "causal":
        layers = causal.value
    if lora.choose == "complement":
        layers = [layer for layer in layers if layer not in causal.value]
    if lora.choose == "random":
        layers = sorted(random.Random(config.run.seed).sample(layers, len(causal.value)))
    units = lora.r * len(planned)
    if not layers or units < len(layers):
        raise PlanError(
            f"lora.choose is {lora.choose}, but {units} ranks (lora.r in each of {len(planned)} planned layers of {n_layers}) cannot be shared "
            f"out to {len(layers)} layers. Choose another control, or a larger lora.r."
        )
    ranks = list(spread_ranks(layers, len(planned), lora.r).values())
    told = f"A control (lora.choose {lora.choose}); the plan would take {planned}."
    return Choice(layers, told, overridden=True), Choice(ranks, f"As many trained parameters as with rank {lora.r} in {len(planned)} layers.")


def _abstention(findings: Findings) -> Choice:
    """How much it has to learn to say that there is nothing."""
    rates = {}
    for condition, question in (("muted", "hear"), ("near_silent", "hear"), ("blanked", "see"), ("near_black", "see")):
        row = findings.following_rate(condition, question)
        if row is not None and row.correct.value is not None:
            rates[condition] = row.correct.value
    if not rates:
        return Choice(
            ABSTENTION_WEIGHT, "Whether it says so when nothing is heard or seen was not measured (no muted or blanked clips), so it is trained."
        )
    told = ", ".join(f"{_percent(rate)} of {condition.replace('_', '-')} ones" for condition, rate in rates.items())
    weight = ABSTENTION_WEIGHT if min(rates.values()) < NOTHING_ENOUGH else ABSTENTION_WEIGHT / 2
    enough = f" (at least {_percent(NOTHING_ENOUGH)} of each would halve the weight)" if weight == ABSTENTION_WEIGHT else ""
    told = f"That nothing is heard or seen is said about {told}{enough}."
    return Choice(weight, f"{told} A larger weight takes the gradient from what is harder to learn.")


def _logprob_invariance(findings: Findings, config: Config) -> Choice:
    """How much log-probabilities are to stay when the stream that is not asked about is swapped."""
    if config.data.train_on != "grids":
        return Choice(0.0, "It compares the cells of a grid.")
    if config.loss.distillation == 0 or config.loss.mirror == 0:
        return Choice(0.0, "It compares the teacher's answers, and a distillation term is switched off.")
    index = {r.question: _value(r.shortcut) for r in findings.reliance}
    told = ", ".join(f"{value:.2f} on {question}-questions" for question, value in index.items() if value is not None)
    if told and max(value for value in index.values() if value is not None) < NO_SHORTCUT:
        return Choice(0.0, f"The Shortcut Index is {told}: what is not said hardly follows the other stream.")
    return Choice(
        LOGPROB_INVARIANCE_WEIGHT,
        f"The Shortcut Index is {told or 'not measured'}. Where the right answer is said, how unlikely the wrong one is may still follow the other "
        "stream; other terms hardly see that.",
    )


def _text_retention(findings: Findings) -> Choice:
    """Whether there is language to keep: by the simple questions of analysis/plain_text.py, without picture and sound."""
    if findings.language is None or findings.language.right.value is None:
        return Choice(TEXT_WEIGHT, "Whether the model knows plain text was not measured (diagnosis.plan.language), so it is kept.")
    right, perplexity = findings.language.right.value, findings.language.perplexity.value
    told = f"Without picture and sound {_percent(right)} of {findings.language.right.n} simple questions are answered right"
    told += f" (perplexity of English {perplexity:.3g})" if perplexity is not None else ""
    if right < KNOWS_TEXT:
        return Choice(0.0, f"{told}: with less than {_percent(KNOWS_TEXT)} there is no language to keep.")
    return Choice(TEXT_WEIGHT, f"{told}. Trained on one kind of answer only, a model gives it to everything; so it stays close on plain text.")


def _stop(config: Config) -> Choice:
    """After how many checkpoints without a better one the run ends; -1 is never."""
    if config.schedule.shape == "trapezoid":
        return Choice(-1, "Never before the last step: a trapezoid settles while its rate falls, and that is at its end.")
    told = f"The run ends early when {PATIENCE} checkpoints in a row bring nothing better, by their diagnosis on the selection split."
    return Choice(PATIENCE, told)


def _extras(config: Config) -> Choice:
    """The terms that only a configuration switches on."""
    on = {name: getattr(config.loss, name) for name in EXTRA_TERMS if getattr(config.loss, name)}
    return Choice(
        on, "Switched on in the configuration." if on else "Off: the default recipe is small; ablations switch them on.", overridden=bool(on)
    )


def _conditions(config: Config, ce: Choice) -> Choice:
    """Of a group's four clips, how many are also asked about both streams at once; how many clips beside them have one stream taken away."""
    labelled = (ce.value if config.loss.counterfactual_ce is None else config.loss.counterfactual_ce) > 0
    both = 1 if labelled else 0
    bare = 0 if config.loss.abstention == 0 else 1
    data = config.data
    found = Choice(
        {"both": both, "bare": bare},
        (
            "Answers about both streams have to be trained too, or streams get swapped in them: about one clip of four. "
            if both
            else "No labels, so no both-questions. "
        )
        + ("One clip beside each four is muted, blanked or lacks a stream." if bare else "No abstention."),
    )
    given = {"both": both if data.both is None else data.both, "bare": bare if data.bare is None else data.bare}
    return found if given == found.value else _overridable(found, given)


def _lora_projections(findings: Findings, side: _Side, teacher: Choice, override: tuple[str, ...] | None) -> Choice:
    """Attention projections; the MLP too where shutting attention paths recovers too little."""
    effects = [e for e in findings.knockout if _name(e) == teacher.value and (e.condition, e.question) == ("counterfactual", side.question)]
    rate = _value(getattr(effects[0], side.wanted)) if effects else None
    brings = f"Shutting attention paths{{}} brings the share that names the true {side.stream} to {_percent(rate)}"
    if rate is not None and rate >= ATTENTION_SUFFICES:
        found = Choice(ATTENTION, f"{brings.format(' alone')}: changing what is attended to is enough.")
    elif rate is not None:
        found = Choice(ATTENTION + MLP, f"{brings.format('')} only: what is made of the {side.stream} has to change too.")
    else:
        found = Choice(ATTENTION, "What is attended to is what has to change; no answer rate under the teacher cut says that it is not enough.")
    return _overridable(found, list(override) if override is not None else None)


def _class_weights(findings: Findings, config: Config, side: _Side) -> Choice:
    """How often a class is drawn, of the stream that the question that leads is about: more where it is not named on conflicts. Failure
    rates are shrunk to the mean by two pseudo-clips.
    """
    weight = config.loss.counterfactual_ce
    labels = weight is None or weight > 0 or any(getattr(config.loss, term) for term in ("hinge", "dpo", "base_divergence", "latent_readout"))
    if config.data.train_on == "factual" or not labels:
        return Choice({}, "All classes alike: drawing by class would use labels.")
    asked = [(_class(s), s.verdict != side.wanted) for s in findings.samples if (s.condition, s.modality) == ("counterfactual", side.question)]
    count, failed = Counter(name for name, _ in asked), Counter(name for name, wrong in asked if wrong)
    mean = failed.total() / len(asked) if asked else 0.0
    if len(asked) < 2 * len(count) or not mean:
        return Choice({}, f"All classes alike: {len(asked)} conflict samples of {len(count)} classes say too little about single classes.")
    rates = {name: (failed[name] + 2 * mean) / (count[name] + 2) for name in sorted(count)}
    weights = {name: round(0.5 + 0.5 * rate / mean, 2) for name, rate in rates.items()}
    worst = max(rates, key=lambda name: rates[name])
    told = f"On {len(asked)} conflicts {_percent(mean)} of {side.stream}s are not named, most often {worst!r}."
    because = f"{told} Weight ½ + ½ failure / mean failure."
    return Choice(weights, because)


# ---------------------------------------------------------------- small helpers


def _overridable(found: Choice, override: Any) -> Choice:
    if override is None:
        return found
    return Choice(override, f"Set in the configuration. From the findings: {found.value}. {found.because}", overridden=True)


def _rate(findings: Findings, condition: str, question: str) -> float:
    row = findings.following_rate(condition, question)
    if row is None or row.correct.value is None:
        setting = "alone" if condition.endswith("_only") else condition
        raise PlanError(
            f"The findings have no rates for {question}-questions on {condition} clips, which every choice is measured against: "
            f"diagnosis.plan.{setting} has to be more than 0, and the plan split has to have such clips."
        )
    return row.correct.value


def _name(effect: CutEffect) -> str:
    return f"{effect.site} {effect.start}:{effect.stop}"


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.0f} points"


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
