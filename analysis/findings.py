"""What diagnosis found, as one typed JSON file.

`Findings` is the only thing that passes between diagnosis, plan, comparison and report. `save` / `load` round-trip it; unknown or
missing fields are errors, so an old file is refused by name instead of being half read. docs/findings.md explains each key.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import write_json

FORMAT = 5
# Settings that say where and how fast a diagnosis ran, not what it measured.
NEUTRAL = frozenset({"device", "threads", "batch_size", "clips_folder"})


# Conditions and questions about a stream that is not there: not given to the model, or given with nothing in it.
MISSING = (
    ("muted", "hear"),
    ("near_silent", "hear"),
    ("video_only", "hear"),
    ("blanked", "see"),
    ("near_black", "see"),
    ("audio_only", "see"),
)


class FindingsError(ValueError):
    """A findings file that cannot be read. The message names the file and what to do."""


@dataclass
class Estimate:
    """A mean with its 95 % interval, `n` items in `clusters` clusters (sources). None where nothing could be measured."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int


def uncounted() -> Estimate:
    """Of what nobody counted."""
    return Estimate(None, None, None, 0, 0)


@dataclass
class Effect(Estimate):
    """A signed quantity with the two-sided p value of "it is zero" (None where one cluster allows none).

    `p_corrected`: after Holm over its family (docs/definitions.md), None for a quantity that is no part of a sweep. `size`: value divided by the
    standard deviation over items; None where all items agree.
    """

    p: float | None = None
    p_corrected: float | None = None
    size: float | None = None


@dataclass
class Following:
    """What greedy answers name, as shares of the clips asked (audio + vision + both + neither + nothing + unparsed = 1).

    `audio`: only the heard label; `vision`: only the seen one; `both`; `neither`: some other known event; `nothing`: no known event, and that there
    is nothing to hear (see); `unparsed`: neither a known event nor that. On factual clips the two labels agree, then `audio` counts a right answer
    and `vision`, `both` are 0.
    """

    condition: str  # factual | counterfactual | audio_only | video_only | unseen_... | muted | near_silent | blanked | near_black
    question: str  # hear | see
    audio: Estimate
    vision: Estimate
    both: Estimate
    neither: Estimate
    nothing: Estimate  # abstention
    unparsed: Estimate
    correct: Estimate  # names the label that the question designates (alone); `nothing` where that stream is missing
    cut_off: Estimate = field(default_factory=uncounted)  # ended at the token limit: what would have come after it is in none of the others
    trained: int = 0  # clips of the unseen split that are in none of these, because the train split has the source of the stream asked about

    @property
    def invented(self) -> float | None:
        """Share of answers that name a known event; about a stream that is missing, an invented one. None where nothing was measured."""
        shares = [e.value for e in (self.audio, self.vision, self.both, self.neither)]
        return None if None in shares else sum(v for v in shares if v is not None)


@dataclass
class Sources:
    """How many pictures and recordings of a split, whether asked about or not, clips of the train split carry too, of how many.

    `train_clips`: clips of the train split; where the folder has none, what was trained on is not known.
    """

    split: str
    trained_pictures: int
    pictures: int
    trained_recordings: int
    recordings: int
    train_clips: int


@dataclass
class Reliance:
    """The 2x2 grid. `shortcut` = |mean E_V| / (|mean E_A| + |mean E_V|) on hear-questions, its mirror on see-questions; 0 is ideal.

    From the permutation null (docs/definitions.md), None where one cluster allows none: `p_audio`, `p_video` of each effect, and `shortcut_null`,
    what the index stays below in 95 % of cases if the stream not asked about does not matter.
    """

    question: str
    effect_audio: Effect
    effect_video: Effect
    shortcut: Estimate
    p_audio: float | None = None
    p_video: float | None = None
    shortcut_null: float | None = None


@dataclass
class CutEffect:
    """One cut (site, layers [start, stop)) on one condition and question, against the uncut model on the same clips.

    `delta_logprob`: change of the length-normalised log-likelihood of the designated label; `delta_margin`: of its margin over the other
    stream's label (counterfactual clips only). `audio`, `vision`: following rates under the cut (greedy answers), None where only scored; `unparsed`,
    `cut_off`: shares of the same answers that name nothing known, and that ended at the token limit.
    """

    site: str
    start: int
    stop: int
    family: str  # window | from | all
    condition: str
    question: str
    delta_logprob: Effect
    delta_margin: Effect | None
    audio: Estimate | None
    vision: Estimate | None
    unparsed: Estimate | None = None
    cut_off: Estimate | None = None


@dataclass
class Flow:
    """Attention mass from one target kind to each source kind, per layer: mass[kind][layer]; the kinds sum to 1 in each layer."""

    target: str  # question | emitters
    variant: str  # plain | no_sink | value_norm
    condition: str
    mass: dict[str, list[Estimate]]


@dataclass
class Probe:
    """A linear read-out, per layer (index 0 = embeddings, l = output of layer l), at one position for one stream's label on counterfactual clips."""

    position: str  # audio (the sound's own rows) | audio_end (its closing delimiter) | question | last_prompt
    label: str  # audio | visual
    accuracy: list[Estimate]
    shuffled: list[float]  # control: labels shuffled clip by clip, which is chance
    audio_removed: list[float] | None  # control: the same model without its audio
    random_weights: list[float] | None  # control: same shapes, random weights
    selectivity: list[Effect]  # accuracy - best control, clip by clip
    folds: str  # also how the control task was drawn
    control_task: list[float] = field(default_factory=list)  # control: a random label for each source, the same in all its clips


@dataclass
class Lens:
    """Logit lens through the final norm: rate at which a true event word is in the top k, minus the rate for shuffled references, per layer."""

    position: str  # audio (the sound's own rows) | audio_end (its closing delimiter) | question | emitters
    label: str  # audio | visual
    k: int
    hit: list[Estimate]
    control: list[float]
    corrected: list[Effect]  # hit - control, clip by clip
    lens: str = "logit"  # logit | tuned


@dataclass
class Readout:
    """The control-corrected lens hit rate of the sound's words in one layer."""

    layer: int
    rate: Estimate


@dataclass
class Latent:
    """Latent audio understanding: control-corrected lens hit rate at the sound's own rows, layer chosen on one half, reported on the other.

    `said`: the same clips' rate of answers that say it aloud. `end`: the same at the sound's closing delimiter, which follows all sound and picture
    and collects from both. `swapped`, `end_swapped`: the halves exchanged, so how far the number depends on them; None for the tuned lens, which is
    fitted on one of them.
    """

    layer: int
    latent: Estimate
    said: Estimate
    k: int = 5  # a word counts as read when it is among this many top tokens
    pooling: str = "any row"  # of the position: a clip is a hit if one of them is
    swapped: Readout | None = None
    end: Readout | None = None
    end_swapped: Readout | None = None


@dataclass
class Tuned:
    """The tuned lens: how far it is from the final output, and what it reads, on conflicts that share nothing with those it was fitted on.

    Per layer (index 0 = embeddings, l = output of layer l): mean KL(final output ‖ lens) in nats a row, of the logit lens and of the tuned one.
    """

    clips: int  # fitted on
    rows: int  # hidden states of these clips, in each layer
    kl_before: list[Estimate]  # the logit lens
    kl_after: list[Estimate]
    lens: list[Lens]
    latent: Latent  # its layer was chosen on the clips it was fitted on


@dataclass
class Shift:
    """Token-distribution shift of the model's own greedy answers against its base without audio: shares at base rank 1, 2-3, >3, and KL in nats."""

    tokens: str  # all | audio_event | visual | rest | first_event
    condition: str
    unshifted: Estimate
    marginal: Estimate
    shifted: Estimate
    kl: Estimate


@dataclass
class Sample:
    """One clip with what the model said, shown in the page."""

    clip: str
    file: str
    condition: str
    seen: str
    heard: str
    question: str
    modality: str  # hear | see
    answer: str
    verdict: str  # audio | vision | both | neither | nothing | unparsed
    video_source: str  # the picture and the recording the clip was made from: what intervals are clustered by
    audio_source: str
    cut_off: bool = False  # the answer ended at the token limit
    video_label: str = ""  # the classes of `seen` and `heard`, which may be phrases of this clip's own; "" also where nobody said
    audio_label: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer names, alone, what the question designates, or nothing where that stream is missing. On factual clips the labels agree
        and `audio` is the right verdict.
        """
        if (self.condition, self.modality) in MISSING:
            return self.verdict == "nothing"
        agree = self.condition.endswith("factual") and not self.condition.endswith("counterfactual")
        return self.verdict == ("audio" if agree or self.modality == "hear" else "vision")


@dataclass
class CaptionScore:
    """One judge's reading of one caption. A side is None where the question did not ask for it, the clip has no such event, or the judge could
    not read the reply (`parsed` is False then, and `invented` 0).
    """

    judge: str  # labels | embedding:<model> | llm:<model>
    audio: float | None  # 0..1
    video: float | None  # 0..1
    invented: int  # events on the sides asked for that the clip does not have
    parsed: bool


@dataclass
class Caption:
    """A free caption of one clip, and what judges read in it."""

    clip: str
    file: str
    condition: str
    modality: str  # see | hear | both
    question: str
    cut: str | None  # e.g. "video->emitters 4:8": the answer was given under this cut, layers [4, 8)
    answer: str
    seen: str  # "" where the model was given no picture
    heard: str  # "" where the model was given no sound
    video_source: str
    audio_source: str
    scores: list[CaptionScore]
    cut_off: bool = False  # the answer ended at the token limit
    video_label: str = ""  # the classes of `seen` and `heard`, which may be phrases of this clip's own; "" also where nobody said
    audio_label: str = ""


@dataclass
class CaptionFidelity:
    """Mean scores of one judge on the captions it could read, the share it could not read, and the share of read ones with an invented event."""

    judge: str
    condition: str
    question: str  # see | hear | both
    cut: str | None
    audio: Estimate | None  # None where the question does not ask for the sound or no clip has one
    video: Estimate | None
    unparsed: Estimate
    invented: Estimate
    audio_change: Effect | None = None  # under a cut: against the same clips' captions without it, where both could be read
    video_change: Effect | None = None
    cut_off: Estimate = field(default_factory=uncounted)  # ended at the token limit


@dataclass
class PlainAnswer:
    """A simple question asked without picture and sound, and the greedy answer."""

    question: str
    accepted: list[str]
    answer: str
    right: bool
    cut_off: bool = False  # the answer ended at the token limit


@dataclass
class Language:
    """Plain text, without picture and sound. `n` of the first two: tokens, their `clusters`: passages."""

    nll: Estimate  # mean negative log-likelihood a token, in nats
    perplexity: Estimate  # exp of it and its bounds
    right: Estimate  # share of simple questions
    answers: list[PlainAnswer]
    cut_off: Estimate = field(default_factory=uncounted)  # share of the answers that ended at the token limit: a right word may have come after it


@dataclass
class Items:
    """Values of the same clips (or grids, passages, questions) under several keys, for paired comparison. Written by analysis/items.py, explained in
    docs/findings.md.
    """

    ids: list[str]
    clusters: list[list[str]]  # the sources of each item: one list, two where both streams vary, two for the members of grids
    dyads: bool  # whether both lists name sources of one kind (grids)
    values: dict[str, str] = field(default_factory=dict)  # key -> one number an item, as text
    weights: dict[str, str] = field(default_factory=dict)  # key -> how many things each value is the sum over, where that is not 1


@dataclass
class Findings:
    """Everything one diagnosis measured, with the settings that move scores."""

    model: str
    adapter: str | None
    base: str | None
    split: str
    data_hash: str
    n_layers: int
    settings: dict[str, Any]  # prompts, system prompt, decoding, processor, dtype, seed, versions, counts, subset
    following: list[Following] = field(default_factory=list)
    reliance: list[Reliance] = field(default_factory=list)
    knockout: list[CutEffect] = field(default_factory=list)
    flow: list[Flow] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    lens: list[Lens] = field(default_factory=list)
    latent: Latent | None = None
    tuned: Tuned | None = None
    shift: list[Shift] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)  # class -> [seen, heard]: every event that a judge knows
    # class -> [other words for what is seen, for what is heard] that answers were read by; empty: those of analysis/synonyms.py
    synonyms: dict[str, list[list[str]]] = field(default_factory=dict)
    captions: list[Caption] = field(default_factory=list)
    fidelity: list[CaptionFidelity] = field(default_factory=list)
    language: Language | None = None
    items: list[Items] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # sentences: what was not measured and why
    sources: list[Sources] = field(default_factory=list)  # of the split and, beside the test split, of the unseen one
    format: int = FORMAT

    def following_rate(self, condition: str, question: str) -> Following | None:
        """The row of one condition and question, or None."""
        return next((f for f in self.following if f.condition == condition and f.question == question), None)

    def trained_on(self) -> list[str]:
        """Sentences: what of the splits the train split has too, and how many answers are in no rate of unseen sources for that."""
        said = []
        for s in self.sources:
            shared = f"{s.trained_pictures} of {s.pictures} pictures and {s.trained_recordings} of {s.recordings} recordings"
            other = ", in other renderings" if s.split != "train" and s.trained_pictures + s.trained_recordings else ""
            said.append(f"{s.split.capitalize()} split: {shared} are in {'it' if s.split == 'train' else 'the train split too'}{other}.")
        if any(not s.train_clips for s in self.sources):
            said.append("The clip folder has no train split, so whether its sources were trained on is not known.")
        for f in self.following:
            if f.trained:
                kind = "conflicts" if f.condition.endswith("counterfactual") else "factual clips"
                stream = "recording" if f.question == "hear" else "picture"
                said.append(
                    f"Unseen sources, {kind}, asked what it {f.question}s: {f.correct.n} clips of a new {stream}; {f.trained} whose {stream} the "
                    "train split has are left out."
                )
        return said

    def save(self, path: str | os.PathLike) -> None:
        """Write atomically: a reader never sees half a file."""
        save_json(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Findings:
        """Read and check a findings file. Raises FindingsError naming the file and the key that does not fit."""
        return load_json(cls, path, "findings", "diagnose")


def save_json(value: Any, path: str | os.PathLike) -> None:
    """Write a dataclass as JSON, atomically. NaN and infinity are refused with a ValueError."""
    write_json(path, dataclasses.asdict(value))


def load_json(kind: type, path: str | os.PathLike, what: str, command: str) -> Any:
    """Read a dataclass that `save_json` wrote; `what` and `command` word the FindingsError, which names the file and the key that does not fit."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FindingsError(f"{path}: no such file. `python -m analysis {command} … --out {path}` writes one.") from None
    except IsADirectoryError:
        raise FindingsError(f"{path} is a folder, not a {what} file. Name the JSON file inside it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FindingsError(f"{path} is not JSON ({error}). Run `python -m analysis {command}` again.") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FindingsError(f"{path} is not a {what} file of format {FORMAT}. Run `python -m analysis {command}` again with this version.")
    try:
        return _parse(kind, raw, what)
    except (TypeError, KeyError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise FindingsError(f"{path}: {reason}. Run `python -m analysis {command}` again with this version.") from None


def _parse(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type, strictly."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{where} should be an object")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise KeyError(f"{where} has unknown keys {unknown}")
        if missing := sorted(set(hints) - set(value)):
            raise KeyError(f"{where} lacks {missing}")
        return kind(**{name: _parse(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})  # type: ignore[operator]
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _parse(next(o for o in options if o is not type(None)), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise TypeError(f"{where} should be a list")
        return [_parse(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{where} should be an object")
        return {k: _parse(typing.get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where} should be {kind.__name__}, not {type(value).__name__}")
    return value
