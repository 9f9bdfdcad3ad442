"""What one training run is told: one dataclass a concern, filled by a YAML file, overridden by flags.

    accelerate launch train                                                   # configs/organism.yaml
    accelerate launch train --config configs/organism_label_free.yaml
    accelerate launch train --schedule.lr 1e-3 --lora.layers 3 4 5 --run.folder runs/other

None means "the plan decides" wherever a field says so; the plan (train/plan.py) writes down why. The text under each field is its `--help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from analysis.settings import DiagnoseSettings
from data.build import DataConfig
from data.files import write_text
from models.attention import CUT_TEXT

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "organism.yaml"
PLAIN_TEXT = DEFAULT_CONFIG.with_name("plain_text.txt")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Weights that the plan sets, and those that only a configuration does.
PLANNED_TERMS = ("counterfactual_ce", "distillation", "mirror", "states", "retention", "abstention", "logprob_invariance", "text_retention")
EXTRA_TERMS = (
    "hinge",
    "dpo",
    "invariance",
    "sensitivity",
    "base_divergence",
    "latent_readout",
    "attention_balance",
)
TERMS = PLANNED_TERMS + EXTRA_TERMS
# Cuts that the plan chooses teachers from: either stream may be the one that covers the other.
PLAN_CURVES = ("video->emitters", "video->question+emitters", "audio->emitters", "audio->question+emitters")
COMPARED = ("invariance", "logprob_invariance", "sensitivity")  # terms that compare an answer in two cells of a grid


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the file or flag, the key and what to do."""


@dataclass
class ModelPart:
    """Which model is trained."""

    path: str = "models/organism/avllm"
    """Folder of the audio-visual LLM: config, tokenizer and processor files, safetensors weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers the model computes in. The adapter is kept in float32 (under DeepSpeed in these numbers, with a float32 copy in its optimizer)."""


@dataclass
class DataPart:
    """Which clips it is trained on."""

    clips: str = "runs/clips"
    """Clip folder (clips.jsonl, grids.jsonl, media, manifest.json). Built from the embedded pictures and recordings where it does not exist."""
    build: DataConfig = field(default_factory=DataConfig)
    """How it is built then. A folder that was built otherwise is refused; a folder of your own making is taken as it is."""
    train_on: Literal["grids", "one_swap", "shuffled", "factual"] = "grids"
    """`grids`: all four cells of 2x2 grids (two clips and their two swaps). `one_swap`: a clip and the one swap that keeps its picture, of two grids.
    `shuffled`: as many cells, each drawn on its own (parts of a
    step then differ in how many are factual, so accumulation and processes change the weight of retention a little). `factual`: unswapped clips."""
    dose: float = 1.0
    """Share of the training grids (or of the factual clips) that is used; a smaller dose is part of a larger one."""
    both: int | None = None
    """Of the four clips of a group, how many are also asked about both streams at once. None: the plan decides."""
    bare: int | None = None
    """Clips beside each four from which one stream is taken away. None: the plan decides."""
    faint: float | None = None
    """Of the muted and blanked clips among these, the share whose file has faint noise instead of nothing at all. None: that of the clip folder."""
    text: str | None = None
    """File of plain text, a passage a line, for loss.text_retention. None: configs/plain_text.txt."""

    def __post_init__(self) -> None:
        if not 0 < self.dose <= 1:
            raise ConfigError(f"data.dose is {self.dose}: it is a share of the training clips and has to lie in (0, 1].")
        if self.faint is not None and not 0 <= self.faint <= 1:
            raise ConfigError(f"data.faint is {self.faint}: it is a share and has to lie in [0, 1], or left out and the clip folder decides.")
        for name, most in (("both", 4), ("bare", 16)):
            if (value := getattr(self, name)) is not None and not 0 <= value <= most:
                raise ConfigError(f"data.{name} is {value}: a number of clips from 0 to {most}, or left out and the plan decides.")


@dataclass
class LoRAPart:
    """What is trained: low-rank adapters in the decoder. Towers and projectors stay frozen."""

    r: int = 8
    """Rank."""
    alpha: int = 16
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    ema: float = 0.0
    """Decay of an exponential moving average of the adapter over steps; 0 is none. Where there is one, it is what checkpoints hold."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that get an adapter. None: `choose` decides."""
    choose: Literal["plan", "all", "causal", "random", "complement"] = "plan"
    """`plan`: the layers up to the last that carries the other stream (the picture, where hear-questions lead) into the answer.
    The others are controls with as many trained parameters (ranks are
    shared out so): all layers, the causal ones alone, as many as these drawn at random, all but these."""
    projections: tuple[str, ...] | None = None
    """Linear layers in them, from q_proj k_proj v_proj o_proj gate_proj up_proj down_proj. None: the plan decides."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora.r is {self.r}: the rank has to be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}: it has to lie in [0, 1).")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"lora.ema is {self.ema}: it has to lie in [0, 1).")
        if unknown := sorted(set(self.projections or ()) - set(PROJECTIONS)):
            raise ConfigError(f"lora.projections has {unknown}: choose from {' '.join(PROJECTIONS)}.")
        if self.layers is not None and not self.layers:
            raise ConfigError("lora.layers is empty, so nothing would be trained: name layers, or leave it out and the plan decides.")


@dataclass
class LossPart:
    """Weights of the terms (train/objective.py). 0 switches a term off, None lets the plan set the weight, with its reason."""

    counterfactual_ce: float | None = None
    """Cross-entropy of the answer that the question designates, in every cell. Needs labels."""
    distillation: float | None = None
    """Knockout self-distillation on hear-questions: towards what the frozen model itself says when the picture is cut off. No labels."""
    mirror: float | None = None
    """The same on see-questions: towards what the frozen model says when the sound is cut off. No labels."""
    states: float | None = None
    """Knockout self-distillation of hidden states, for each of the two distillation terms that is on. No labels."""
    retention: float | None = None
    """Staying close to the frozen model on factual clips, on the questions that do not lead the plan: see-questions, or hear-questions where those
    about the picture lead. No labels."""
    abstention: float | None = None
    """Where the sound is muted, the picture blanked or a stream not given: cross-entropy of "nothing" about it, and staying close to the frozen model
    on the stream that is left. That a stream was taken away is no label."""
    logprob_invariance: float | None = None
    """Log-probabilities of all words stay what they are when the stream not asked about is swapped. Needs grids, no labels."""
    hinge: float = 0.0
    """Margin of the designated answer over the other stream's, in every cell, at least 1 nat a token. Needs labels."""
    dpo: float = 0.0
    """Swap preference on conflicts: the designated answer is preferred to the other stream's. Needs labels."""
    invariance: float = 0.0
    """The answer's distribution (by KL) stays what it is when the stream not asked about is swapped. Needs grids, no labels."""
    sensitivity: float = 0.0
    """An answer changes, by a bounded amount, when the stream asked about is swapped. Needs grids, no labels."""
    base_divergence: float = 0.0
    """On audio words the answer with sound is likelier than without. Needs labels."""
    latent_readout: float = 0.0
    """The label is readable by the logit lens at question rows in the plan's causal layers. Needs labels."""
    text_retention: float | None = None
    """Staying close to the frozen model on plain text (data.text), where it knows any. No labels."""
    attention_balance: float = 0.0
    """Audio's share of the emitters' attention to media on hear-questions is at least a half in the plan's causal layers. No labels."""
    teacher_cut: str | None = None
    """Cut that makes the teacher for hear-questions, as `site start:stop`, e.g. "video->emitters 4:8". None: the plan decides."""
    mirror_cut: str | None = None
    """Cut that makes the teacher for see-questions, e.g. "audio->emitters 2:8". None: the plan decides."""
    teacher: Literal["cut", "removed"] = "cut"
    """What the self-distillation's teacher does not have: the paths that the plan cuts, or the other stream as a whole."""
    teacher_weights: Literal["adapter_off", "ema"] = "adapter_off"
    """Whose weights the teacher has: the model's before training, or the moving average (lora.ema)."""
    gate: float = 0.0
    """Teacher answers are learnt only where the teacher gave their tokens at least this probability (geometric mean). 0: all."""
    modality_dropout: float = 0.0
    """Chance that a training clip loses one of its streams, sound or picture alike. A baseline."""
    require_bias: bool = True
    """Refuse to train where the findings show nothing to mend."""
    max_answer_tokens: int = 128
    """Longest answer a teacher may give. One that is not done then is taught as far as it goes; the share of these
    is cut_off/<term> in metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in TERMS:
            weight = getattr(self, name)
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"loss.{name} is {weight}: a weight is a finite number of at least 0, or left out and the plan decides.")
        if self.counterfactual_ce == 0 and self.distillation == 0 and self.mirror == 0 and not any(getattr(self, name) for name in EXTRA_TERMS):
            raise ConfigError("loss: every term that teaches is 0, so nothing would be learnt. Switch at least one on.")
        for name in ("gate", "modality_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}: it is a probability below 1.")
        for name in ("teacher_cut", "mirror_cut"):
            text = getattr(self, name)
            if text is not None and not CUT_TEXT.match(text):
                raise ConfigError(f'loss.{name} is {text!r}: write a cut as `site start:stop`, for instance "video->emitters 4:8".')
        if self.teacher_cut and not self.teacher_cut.startswith("video"):
            raise ConfigError(f"loss.teacher_cut is {self.teacher_cut!r}: on hear-questions it is the video that has to be cut off.")
        if self.mirror_cut and not self.mirror_cut.startswith("audio"):
            raise ConfigError(f"loss.mirror_cut is {self.mirror_cut!r}: on see-questions it is the audio that has to be cut off.")
        if self.max_answer_tokens < 1:
            raise ConfigError(f"loss.max_answer_tokens is {self.max_answer_tokens}: an answer has at least 1 token.")


@dataclass
class SchedulePart:
    """How long and how fast."""

    steps: int | None = None
    """Optimiser steps. None: the plan decides."""
    patience: int | None = None
    """Stop after this many checkpoints in a row none of which is the best one. None: the plan decides. -1: never."""
    grids: int = 4
    """Grids in one optimiser step, over all processes and accumulation together. A grid is 4 clips with a see- and a hear-question each."""
    accumulate: int = 1
    """Parts that each process splits its share of a step into, to save memory."""
    lr: float = 2e-3
    """Peak learning rate (AdamW)."""
    shape: Literal["cosine", "one_cycle", "constant", "trapezoid"] = "cosine"
    """After the warm-up: `cosine` falls to 0; `one_cycle` rises and falls along half cosines; `constant` stays; `trapezoid` stays, then falls
    to 0 in the last 30 % of the steps."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    """AdamW weight decay on the adapter."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: int = 50
    """Steps between two checkpoints, each followed by a diagnosis. -1: only at the end."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("grids", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}: it has to be at least 1.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"schedule.steps is {self.steps}: at least 1, or left out and the plan decides.")
        if self.patience is not None and (self.patience == 0 or self.patience < -1):
            raise ConfigError(f"schedule.patience is {self.patience}: a number of checkpoints, or -1 to never stop early.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"schedule.lr is {self.lr}: it has to be a finite number above 0. (In YAML write 1.0e-3 or 0.001.)")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup is {self.warmup}: it is a share of the steps and has to lie in [0, 1).")
        if not self.clip > 0:
            raise ConfigError(f"schedule.clip is {self.clip}: the largest gradient norm has to be above 0.")
        if self.checkpoint_every == 0 or self.checkpoint_every < -1:
            raise ConfigError(f"schedule.checkpoint_every is {self.checkpoint_every}: a number of steps, or -1 for one checkpoint at the end.")
        if self.grids % self.accumulate:
            raise ConfigError(f"schedule.grids is {self.grids} and schedule.accumulate is {self.accumulate}: the parts have to be equally large.")


@dataclass
class DiagnosisPart:
    """What is measured on which split. The settings of each are those of `python -m analysis diagnose`."""

    plan: DiagnoseSettings = field(
        default_factory=lambda: DiagnoseSettings.quick(120, alone=None, language=True, knockout=80, knockout_factual=60, knockout_curves=PLAN_CURVES)
    )
    """On the plan split: what the plan is made from. Each stream alone is the mark that gaps are taken to, plain text says whether there is
    language to keep."""
    selection: DiagnoseSettings = field(default_factory=lambda: DiagnoseSettings.quick(120))
    """On the selection split: what each checkpoint is judged by."""
    test: DiagnoseSettings = field(default_factory=DiagnoseSettings)
    """On the test split, before and after training: what is reported."""
    retention_bound: float = 0.01
    """How much a checkpoint may lose on factual clips (hear and see), give or take a standard error, and still be chosen: 0.01 is one point."""
    tie: float = 0.01
    """Checkpoints whose right answers on conflicts lie within this of the best, on the questions that lead the plan, count as equal; then the other
    questions decide, then the later one."""

    def __post_init__(self) -> None:
        for name in ("retention_bound", "tie"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"diagnosis.{name} is {getattr(self, name)}: it is a share and has to lie in [0, 1].")
        if self.plan.alone == 0:
            raise ConfigError(
                "diagnosis.plan.alone is 0, but each stream alone is the mark that the plan takes gaps to. Give a number of clips, or leave it out."
            )


@dataclass
class RunPart:
    """Where the run lies and how it is run. `overwrite`, `threads`, `tracker` and `keep` may differ when a run is taken up again."""

    folder: str = "runs/organism"
    """Everything the run writes. A run that was stopped goes on where it was when started again with the same settings."""
    seed: int = 0
    """Seed of everything random in training."""
    diagnoses: str | None = None
    """Folder of diagnoses of the untrained model that several runs share (ablations do), so that each is measured once. None: the run's own."""
    overwrite: bool = False
    """Delete what is in the folder and start anew."""
    threads: int | None = None
    """Threads for torch. None: the physical cores, shared out among the processes of this machine. (`accelerate launch` alone would leave 1.)"""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where the curves also go, through accelerate. metrics.jsonl is always written."""
    keep: int = 3
    """Newest checkpoints to keep; the best one so far is kept besides. -1: all. The final choice is among those that are there."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"run.seed is {self.seed}: it has to be at least 0.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"run.threads is {self.threads}: at least 1, or left out for the physical cores.")
        if self.keep == 0 or self.keep < -1:
            raise ConfigError(f"run.keep is {self.keep}: the newest checkpoint is what a stopped run goes on from, so at least 1; or -1 for all.")


@dataclass
class Config:
    """All of it."""

    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    lora: LoRAPart = field(default_factory=LoRAPart)
    loss: LossPart = field(default_factory=LossPart)
    schedule: SchedulePart = field(default_factory=SchedulePart)
    diagnosis: DiagnosisPart = field(default_factory=DiagnosisPart)
    run: RunPart = field(default_factory=RunPart)

    def __post_init__(self) -> None:
        if self.loss.teacher_weights == "ema" and not self.lora.ema:
            raise ConfigError("loss.teacher_weights is ema, but lora.ema is 0: set a decay, for instance 0.99.")
        if self.loss.attention_balance and self.schedule.gradient_checkpointing:
            raise ConfigError("loss.attention_balance reads attention during the forward pass: switch schedule.gradient_checkpointing off.")
        compared = [name for name in ("hinge", "dpo", *COMPARED) if getattr(self.loss, name)]
        if self.data.train_on != "grids" and compared:
            raise ConfigError(f"loss.{compared[0]} compares cells of a grid: data.train_on has to be grids, not {self.data.train_on}.")

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML that `--config` reads again."""
        write_text(path, yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False))


# Besides these the batch sizes of diagnosis, which do not move results.
FREE_TO_DIFFER = ("run.diagnoses", "run.overwrite", "run.threads", "run.tracker", "run.keep")


def load_yaml(path: str | os.PathLike) -> Config:
    """Read a YAML file strictly: every key must exist and fit its type. Raises ConfigError naming file and key."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. The ready-made ones are in configs/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    try:
        return config_of({} if raw is None else raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def config_of(raw: Any) -> Config:
    """Settings as nested mappings, strictly: every key must exist and fit its type. Raises ConfigError naming the key."""
    return _fill(Config, raw, "", Config())


def parse(args: Sequence[str] | None = None) -> Config:
    """Command line to Config: `--config FILE` (default configs/organism.yaml) first, then the flags on top. Raises ConfigError; `--help` exits."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", default=str(DEFAULT_CONFIG))
    known, flags = before.parse_known_args(args)
    default = load_yaml(known.config)
    description = f"Diagnose, plan, fine-tune, diagnose again.\n\n--config FILE fills the settings (here: {known.config}), flags override it."
    return tyro.cli(Config, prog="accelerate launch train", description=description, default=default, args=flags)


def differences(before: Config, now: Config) -> list[str]:
    """Sentences on the settings in which two runs differ, those of FREE_TO_DIFFER left out."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    keys = [key for key in new if key not in FREE_TO_DIFFER and not key.endswith(".batch")]
    return [f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _plain(tree: Any) -> Any:
    """Tuples to lists, so that safe_dump writes ordinary YAML."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _fill(kind: Any, value: Any, where: str, default: Any = None) -> Any:
    """A YAML value as the annotated type, strictly; what a section leaves out stays as in `default`. `where` is the dotted key so far."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'the file'} should hold `key: value` lines, not {value!r}.")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1)
                meant = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(hints)}."
                raise ConfigError(f"unknown key {_dotted(where, key)!r}; {meant}")
        given = {key: _fill(hints[key], entry, _dotted(where, key), getattr(default, key)) for key, entry in value.items()}
        try:
            return dataclasses.replace(default, **given)
        except ConfigError:
            raise
        except ValueError as error:  # a check of data/ or analysis/
            raise ConfigError(f"{where}: {error}") from None
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _fill(next(option for option in options if option is not type(None)), value, where, default)
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{where} is {value!r}; choose one of {', '.join(map(str, options))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} should be a list, not {value!r}.")
        return tuple(_fill(options[0], entry, where) for entry in value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{where} should be a number, not {value!r}.") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} should be {kind.__name__}, not {value!r}.")
    return value


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
