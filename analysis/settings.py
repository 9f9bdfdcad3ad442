"""What `diagnose` measures, and on how many clips: the settings of the command line and of training's diagnoses. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


class SettingsError(ValueError):
    """Settings that cannot be measured by. The message names the setting."""


@dataclass(frozen=True)
class DiagnoseSettings:
    """What is measured, and on how many clips. Counts: None is all there are, 0 is none."""

    counterfactual: int | None = None
    """Counterfactual clips (conflicts)."""
    factual: int | None = None
    """Factual clips."""
    alone: int | None = None
    """Of the factual clips, how many are also asked about with sound only and with picture only."""
    unseen: int | None = None
    """Clips per condition of the split of unseen sources that are asked about beside the test split."""
    bare: int | None = None
    """Clips of each kind that lacks a stream: muted, near-silent, blanked, near-black."""
    grids: int | None = 300
    """2x2 grids for modality reliance."""
    flow: bool = True
    """Attention flow."""
    lens: bool = True
    """Logit lens and tuned lens, and latent audio understanding from them."""
    probes: bool = True
    """Linear probes."""
    shift: int | None = 200
    """Clips per condition for token-distribution shift against the base."""
    captions: int | None = 100
    """Clips per condition for caption fidelity: free answers to see-, hear- and both-questions, scored by the labels judge."""
    caption_cuts: int = 5
    """Under how many of the best cuts captions are given too, on factual clips of the sweep and on conflicts that did not choose these cuts."""
    language: bool = False
    """Plain text without picture and sound: perplexity of a fixed English text, and simple questions. For models that speak English."""
    knockout: int | None = 80
    """Counterfactual clips for the attention knockout sweep."""
    knockout_factual: int | None = 40
    """Factual clips for the attention knockout sweep."""
    knockout_media: int | None = 12
    """Clips per condition for cuts into media rows (video->audio, audio->video): each of these needs its own prefix."""
    knockout_sites: tuple[str, ...] | None = None
    """Sites that are cut; None is all of docs/definitions.md."""
    knockout_width: int = 3
    """Layers in a sliding window."""
    knockout_answers: int = 1
    """For how many of each site's best cuts greedy answers are generated. -1: for every cut."""
    knockout_curves: tuple[str, ...] = ("video->emitters", "video->question+emitters")
    """Sites of which every "from layer k on" cut is answered too."""
    lens_k: int = 5
    """A word counts as seen by the lens when it is among this many top tokens."""
    probe_folds: int = 10
    """Folds of the linear probes."""
    probe_random: bool = False
    """Also probe the model with random weights in its decoder, as a control. Another pass over the conflicts."""
    max_new_tokens: int = 128
    """Longest answer in tokens, twice as long where both streams are asked about, for two things have to be said. A model that describes the picture
    first must reach the sound within it; what ended at the limit is counted. Answers that end by themselves cost the same under any limit."""
    flips: int = 2000
    """Sign flips of the permutation null of modality reliance."""
    seed: int = 0
    """Chooses clips where not all are used, shuffles labels, draws control tasks and sign flips."""
    batch: int = 48
    """Clips to a visit. Does not change what is measured."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < (-1 if name == "knockout_answers" else 0):
                raise SettingsError(f"{name} is {value}: it is a number of things and cannot be negative.")
        for name in ("batch", "flips", "max_new_tokens", "lens_k", "knockout_width"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} has to be at least 1.")
        if self.alone and self.factual == 0:
            raise SettingsError(f"alone is {self.alone}, but of 0 factual clips none can lose a stream. Set factual to {self.alone} or more as well.")
        if self.probe_folds < 2:
            raise SettingsError("probe_folds has to be at least 2.")

    @classmethod
    def quick(cls, clips: int | None = 120, **changes: Any) -> DiagnoseSettings:
        """Following and reliance only, on this many clips per condition, half as many grids, and a quarter as many clips of each kind that lacks a
        stream: what a checkpoint is judged by.
        """
        grids, bare = (None, None) if clips is None else (clips // 2, clips // 4)
        return replace(cls(counterfactual=clips, factual=clips, bare=bare, grids=grids).answers_only(), **changes)

    def answers_only(self) -> DiagnoseSettings:
        """The same clips, but only what answers follow, and reliance; plain text stays where it was asked for."""
        return replace(self, alone=0, unseen=0, flow=False, lens=False, probes=False, shift=0, captions=0, knockout=0, knockout_factual=0)
