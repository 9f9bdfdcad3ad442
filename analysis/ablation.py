"""What an ablation found: arms against a reference, paired clip by clip, as one typed JSON file.

    runs = {"plan": [read_run(folder, seed) for …], "label_free": […]}
    result = compare_arms("Which teacher", "", "plan", {"plan": ("the whole plan", {}), …}, runs)
    Ablation([result]).save("runs/ablations/ablation.json")

Numbers are of the test split. Each arm has a run a seed; an arm's number is the mean over its seeds, `spread` the standard deviation over seeds.
Differences are paired: per clip the mean over the arm's seeds less the mean over the reference's seeds. Their intervals count on clips of one
picture or recording being alike (analysis/statistics.py). So an interval says how far other *clips* could move a number, with the models of these
seeds as they are; how far another *seed* could move it is what the spread says. The Shortcut Index and the lowest-of (worst-of, factual,
abstains) are no plain means: their intervals are by the delta method, a lowest-of with the rate that is the lowest in each run; where that is 0 or 1
throughout, the interval is that rate's own. Perplexities are averaged and compared as logarithms, so their changes are relative.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from analysis.compare import differences
from analysis.fidelity import caption_key
from analysis.findings import FORMAT, Effect, Estimate, Findings, Items, load_json, save_json
from analysis.items import Key, unpacked
from analysis.statistics import Dyads, Intervals, by_source, mapped, shortcut


class Shown(NamedTuple):
    """How a measure is shown."""

    title: str
    note: str
    rate: bool = True


MEASURES = {
    "hear_conflicts": Shown("audio-following", "names the sound alone, asked what it hears on conflicts"),
    "see_conflicts": Shown("see-accuracy", "names the picture alone, asked what it sees on conflicts"),
    "hear_factual": Shown("factual, hear", "right about the sound of factual clips"),
    "see_factual": Shown("factual, see", "right about the picture of factual clips"),
    "shortcut": Shown("Shortcut Index", "on hear-questions, 0 is ideal", rate=False),
    "abstains": Shown(
        "abstains", "says “nothing”, the lowest of muted and near-silent (asked what it hears), blanked and near-black clips (what it sees)"
    ),
    "false_abstention": Shown("false abstention", "says “nothing” though there is a sound, asked what it hears on conflicts"),
    "unparsed_hear": Shown("unparsed, hear", "names nothing known and does not say that there is nothing, asked what it hears on conflicts"),
    "unparsed_see": Shown("unparsed, see", "the same, asked what it sees"),
    "cut_off_hear": Shown("cut off, hear", "the answer ended at the token limit, asked what it hears on conflicts"),
    "cut_off_see": Shown("cut off, see", "the same, asked what it sees"),
    "caption_sound": Shown("captions, sound", "sound side of captions of conflicts, asked about both"),
    "caption_picture": Shown("captions, picture", "picture side of the same captions"),
    "perplexity": Shown("perplexity", "of plain text without picture and sound; its change is a share of what it was", rate=False),
    "plain_questions": Shown("plain questions", "simple questions in plain text answered right, without picture and sound"),
    "hear_new": Shown("unseen, hear", "names the sound alone, asked what it hears on conflicts whose recording the train split lacks"),
    "see_new": Shown("unseen, see", "names the picture alone, asked what it sees on conflicts whose picture the train split lacks"),
    "factual": Shown("factual", "the lower of the two factual rates"),
    "worst": Shown("worst-of", "the lowest of audio-following, see-accuracy and the two factual rates"),
}


@dataclass
class Measure:
    """One number of one arm. Intervals are over clips, not seeds."""

    estimate: Estimate  # mean over seeds, of perplexity the geometric one
    seeds: list[float]  # the number of each seed, in the order of the row's seeds
    spread: float | None  # standard deviation over seeds; None with fewer than two
    gain: Effect | None = None  # against the same arm before training, paired; of perplexity after / before - 1
    difference: Effect | None = None  # against the reference arm, paired; of perplexity likewise


@dataclass
class Row:
    """One arm, or the model before training (`arm` "before", no seeds)."""

    arm: str
    description: str
    settings: dict[str, Any]  # what the arm sets, dotted keys
    seeds: list[int]
    measures: dict[str, Measure]  # MEASURES that were measured
    minutes: list[float] = field(default_factory=list)  # of training steps, without diagnoses, a seed
    parameters: int | None = None  # trained
    checkpoints: list[str] = field(default_factory=list)  # the chosen one, a seed
    folders: list[str] = field(default_factory=list)


@dataclass
class SetResult:
    """One set of arms. `left_out`: sentences on what is missing and why."""

    title: str
    notes: str
    reference: str
    before: Row | None
    arms: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Ablation:
    """What `python -m analysis ablate` wrote: a result a set, in the order of the command line."""

    sets: list[SetResult] = field(default_factory=list)
    format: int = FORMAT

    def save(self, path: str | os.PathLike) -> None:
        """Write atomically."""
        save_json(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Ablation:
        """Read and check. Raises FindingsError naming the file and the key that does not fit."""
        return load_json(cls, path, "ablation", "ablate")


@dataclass
class Run:
    """What is read of one run folder."""

    seed: int
    folder: str
    before: Findings
    after: Findings
    minutes: float | None
    parameters: int | None
    checkpoint: str
    code: tuple[str, ...] = ()  # versions of the code that worked on it
    weights: str = ""  # hash of the model before training; empty where the run did not write it down


def read_run(folder: str | os.PathLike, seed: int) -> Run:
    """Read a finished run. Raises FindingsError for findings that cannot be read."""
    folder = Path(folder)
    before, after = (Findings.load(folder / "findings" / f"{name}.json") for name in ("before", "after"))
    seconds = [json.loads(line)["seconds"] for line in _lines(folder / "metrics.jsonl")]
    best = folder / "best.json"
    checkpoint = json.loads(best.read_text())["checkpoint"] if best.is_file() else ""
    weights = folder / "checkpoints" / checkpoint / "adapter" / "adapter_model.safetensors"
    parameters = None
    if checkpoint and weights.is_file():
        with safe_open(weights, "np") as file:
            parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    code = tuple(line.strip() for line in _lines(folder / "code.txt"))
    begun_with = "".join(_lines(folder / "weights.txt")).strip()
    return Run(seed, str(folder), before, after, sum(seconds) / 60 if seconds else None, parameters, checkpoint, code, begun_with)


def _lines(path: Path) -> list[str]:
    """Whole lines; one that is being written is left out."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.is_file() else []


def compare_arms(
    title: str, notes: str, reference: str, arms: dict[str, tuple[str, dict[str, Any]]], runs: dict[str, list[Run]], left_out: Sequence[str] = ()
) -> SetResult:
    """One row an arm that has a run. `arms`: name -> (description, settings); `runs`: the finished ones, name -> one a seed."""
    result = SetResult(title, notes, reference, None, left_out=list(left_out))
    there = {name: done for name in arms if (done := runs.get(name))}
    if not there:
        return result
    first = next(iter(there.values()))[0]
    untrained = [first.before]
    measures = {name: m for name in MEASURES if (m := _measure(name, untrained, None, None)) is not None}
    result.before = Row("before", "the model before training", {}, [], measures)
    result.left_out += first.before.trained_on()
    by_code = Counter(code for done in there.values() for run in done for code in set(run.code))
    if len(by_code) > 1:
        usual = by_code.most_common(1)[0][0]
        odd = [f"{name} seed {run.seed}" for name, done in there.items() for run in done if set(run.code) != {usual}]
        result.left_out.append(f"Not all runs were made by the same code; other than most: {', '.join(odd)}. Delete them and they are run again.")

    def unlike(done: Sequence[Run]) -> list[str]:
        """Why these runs cannot be compared with the first one."""
        reasons = [r for run in done for r in (*differences(first.before, run.before), *differences(first.before, run.after))]
        return reasons + [f"seed {run.seed} began with other weights" for run in done if run.weights and first.weights not in ("", run.weights)]

    standard = [] if unlike(there.get(reference, ())) else [run.after for run in there.get(reference, ())]
    seeds = [run.seed for run in there.get(reference, ())]
    if not seeds:
        result.left_out.append(f"No run of the reference arm {reference} is there, so arms are not compared with it.")
    for name, done in there.items():
        after = [run.after for run in done]
        if reasons := unlike(done):
            result.left_out.append(f"{name} was not measured like the first arm ({reasons[0]}), so it is not compared with others.")
        if standard and (mine := [run.seed for run in done]) != seeds:
            result.left_out.append(f"{name} has seeds {_listed(mine)}, {reference} {_listed(seeds)}: they are compared all the same.")
        against = standard if standard and name != reference and not reasons else None
        begun = [done[0].before] if not differences(done[0].before, done[0].after) else None
        row = Row(name, arms[name][0], arms[name][1], [run.seed for run in done], {})
        row.measures = {m: found for m in MEASURES if (found := _measure(m, after, begun, against)) is not None}
        row.minutes = [run.minutes for run in done if run.minutes is not None]
        row.parameters = done[0].parameters
        row.checkpoints, row.folders = [run.checkpoint for run in done], [run.folder for run in done]
        if len({run.parameters for run in done}) > 1:
            result.left_out.append(f"{name}: seeds train different numbers of parameters; shown is that of seed {done[0].seed}.")
        result.arms.append(row)
    return result


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


# ---------------------------------------------------------------- one measure


@dataclass
class _Block:
    """Values of the same items in several runs: (runs, keys, items). After the values of a key come its weights, where it has some."""

    values: NDArray
    ids: list[str]
    clusters: list[list[str]]
    dyads: bool


def _measure(name: str, runs: list[Findings], before: list[Findings] | None, reference: list[Findings] | None) -> Measure | None:
    """None where one of the runs did not measure it."""
    blocks = _blocks(name, runs)
    if blocks is None:
        return None
    alone = [_read(name, [block.values[k] for block in blocks])[0] for k in range(len(runs))]
    if any(value is None for value in alone):
        return None
    seeds = [float(value) for value in alone if value is not None]
    estimate, gain, difference = _estimate(name, blocks, seeds), _difference(name, runs, before), _difference(name, runs, reference)
    if name == "perplexity":
        estimate, seeds = mapped(estimate, math.exp), [math.exp(seed) for seed in seeds]
        gain, difference = (change and mapped(change, math.expm1) for change in (gain, difference))
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return Measure(estimate, seeds, spread, gain, difference)


def _estimate(name: str, blocks: list[_Block], seeds: list[float]) -> Estimate:
    """Mean over seeds with its interval over clips."""
    intervals = _intervals(blocks)
    if intervals is None:
        return Estimate(float(np.mean(seeds)), None, None, sum(len(b.ids) for b in blocks), 0)
    rate = MEASURES[name].rate
    if len(blocks) == 1 and rate:
        return intervals.rates(blocks[0].values[:, 0].mean(axis=0)[:, None])[0]
    if name == "shortcut" and len(seeds) == 1:
        return intervals.ratio(*blocks[0].values[0])
    influence = np.mean([_influence(name, blocks, k) for k in range(len(seeds))], axis=0)
    if rate and not influence.any():  # the lowest rates are all 0 or 1, and no surer than one alone
        block = _lowest(name, blocks)
        return _alone(block).rates(np.full((len(block.ids), 1), float(np.mean(seeds))))[0]
    effect = intervals.effects_of(float(np.mean(seeds)), influence[:, None], of_rates=rate)[0]
    low, high = effect.low, effect.high
    if name != "perplexity":
        low, high = (None if bound is None else min(max(bound, 0.0), 1.0) for bound in (low, high))
    return Estimate(effect.value, low, high, effect.n, effect.clusters)


def _difference(name: str, runs: list[Findings], others: list[Findings] | None) -> Effect | None:
    """Mean over `runs` less mean over `others`, on the items that all of them have."""
    blocks = _blocks(name, [*runs, *others]) if others else None
    if blocks is None:
        return None
    total = len(runs) + len(others or ())
    weights = np.array([1 / len(runs) if k < len(runs) else -1 / len(others or ()) for k in range(total)])
    values = [_read(name, [block.values[k] for block in blocks])[0] for k in range(total)]
    if any(value is None for value in values):
        return None
    value = float(weights @ np.array(values, dtype=float))
    intervals = _intervals(blocks)
    if intervals is None:
        return Effect(value, None, None, sum(len(b.ids) for b in blocks), 0)
    influence = sum(weights[k] * _influence(name, blocks, k) for k in range(total))
    if MEASURES[name].rate and not np.any(influence):
        block = _lowest(name, blocks)
        return _alone(block).effects_of(value, np.zeros((len(block.ids), 1)), of_rates=True)[0]
    return intervals.effects_of(value, np.asarray(influence)[:, None], of_rates=MEASURES[name].rate)[0]


def _read(name: str, values: list[NDArray]) -> tuple[float | None, list[NDArray]]:
    """The number of one run from the values of its blocks, each (keys, items), and the influence of every item on it, a block each."""
    if name == "shortcut":
        value, influence = shortcut(values[0][0], values[0][1])
        return value, [influence]
    if name == "perplexity":  # its logarithm
        nll, tokens = values[0]
        mean = nll.sum() / tokens.sum()
        return float(mean), [(nll - mean * tokens) / tokens.mean()]
    means = [float(block[0].mean()) for block in values]
    at = int(np.argmin(means))
    return means[at], [block[0] - means[k] if k == at else np.zeros(block.shape[1]) for k, block in enumerate(values)]


def _lowest(name: str, blocks: list[_Block]) -> _Block:
    """The block that a number is read from in some run; of several the one with the fewest items."""
    found = []
    for run in range(len(blocks[0].values)):
        value, _ = _read(name, [block.values[run] for block in blocks])
        found += [block for block in blocks if float(block.values[run][0].mean()) == value]
    return min(found, key=lambda block: len(block.ids))


def _alone(block: _Block) -> Intervals:
    """The clusters of one block."""
    intervals = _intervals([block])
    assert intervals is not None
    return intervals


def _influence(name: str, blocks: list[_Block], run: int) -> NDArray:
    """(items of all blocks,): scaled so that the mean of several blocks' items has the influence of the one block."""
    _, parts = _read(name, [block.values[run] for block in blocks])
    total = sum(len(part) for part in parts)
    return np.concatenate([part * (total / len(part)) for part in parts])


def _intervals(blocks: list[_Block]) -> Intervals | None:
    """Clustered by the sources of all items together; None where blocks cannot be clustered alike."""
    if len({(len(block.clusters), block.dyads) for block in blocks}) > 1 or (len(blocks) > 1 and blocks[0].dyads):
        return None
    sides = [[source for block in blocks for source in block.clusters[side]] for side in range(len(blocks[0].clusters))]
    clusters = Dyads(*sides) if blocks[0].dyads else by_source(*sides) if len(sides) == 2 else sides[0]
    return Intervals(clusters, len(sides[0]))


def _blocks(name: str, runs: list[Findings]) -> list[_Block] | None:
    """The values that a measure is made of, on the items that all runs share. None where a run has none."""
    wanted = [_keys(name, findings) for findings in runs]
    if not wanted[0] or len({len(keys) for keys in wanted}) > 1:
        return None
    blocks = []
    for part in range(len(wanted[0])):
        kept = [_kept(findings, keys[part]) for findings, keys in zip(runs, wanted, strict=True)]
        found = [items for items in kept if items is not None]
        if len(found) < len(kept):
            return None
        shared = set.intersection(*(set(items.ids) for items in found))
        ids = [item for item in found[0].ids if item in shared]
        if not ids:
            return None
        values = []
        for items, keys in zip(found, wanted, strict=True):
            at = {item: k for k, item in enumerate(items.ids)}
            rows = [at[item] for item in ids]
            texts = [kept[key.text] for key in keys[part] for kept in (items.values, items.weights) if key.text in kept]
            values.append([unpacked(text, len(items.ids))[rows] for text in texts])
        place = {item: k for k, item in enumerate(found[0].ids)}
        clusters = [[side[place[item]] for item in ids] for side in found[0].clusters]
        blocks.append(_Block(np.array(values), ids, clusters, found[0].dyads))
    return blocks


def _kept(findings: Findings, keys: list[Key]) -> Items | None:
    """The items that keep all of these numbers."""
    return next((items for items in findings.items if all(key.text in items.values for key in keys)), None)


def _keys(name: str, findings: Findings) -> list[list[Key]]:
    """Which kept numbers a measure is made of: a list of keys a block. Empty where these findings cannot have it."""

    def right(condition: str, question: str) -> list[Key]:
        return [Key("following", condition, question, "", "correct")]

    match name:
        case "hear_conflicts":
            return [right("counterfactual", "hear")]
        case "see_conflicts":
            return [right("counterfactual", "see")]
        case "hear_new" | "see_new":
            found = right("unseen_counterfactual", name.removesuffix("_new"))
            return [found] if _kept(findings, found) is not None else []
        case "hear_factual":
            return [right("factual", "hear")]
        case "see_factual":
            return [right("factual", "see")]
        case "factual":
            return [right("factual", "hear"), right("factual", "see")]
        case "worst":
            return [right(condition, question) for condition in ("counterfactual", "factual") for question in ("hear", "see")]
        case "shortcut":
            return [[Key("reliance", None, "hear", "", f"effect_{stream}") for stream in ("video", "audio")]]
        case "abstains":
            empty = (("muted", "hear"), ("near_silent", "hear"), ("blanked", "see"), ("near_black", "see"))
            keys = [Key("following", condition, question, "", "nothing") for condition, question in empty]
            return [[key] for key in keys if _kept(findings, [key]) is not None]
        case "false_abstention":
            return [[Key("following", "counterfactual", "hear", "", "nothing")]]
        case "unparsed_hear" | "unparsed_see" | "cut_off_hear" | "cut_off_see":
            measure, _, question = name.rpartition("_")
            key = Key("following", "counterfactual", question, "", measure)
            return [[key]] if _kept(findings, [key]) else []
        case "perplexity" | "plain_questions":
            key = Key("language", None, None, "", "nll" if name == "perplexity" else "right")
            return [[key]] if _kept(findings, [key]) else []
        case "caption_sound" | "caption_picture":
            judge = next((c.judge for c in findings.fidelity if (c.condition, c.question, c.cut) == ("counterfactual", "both", None)), None)
            side = "audio" if name == "caption_sound" else "video"
            return [[caption_key(judge, "counterfactual", "both", None, side)]] if judge else []
    raise ValueError(f"{name!r} is no measure; known are {', '.join(MEASURES)}.")
