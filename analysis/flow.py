"""Attention flow: how much attention the question rows and the emitters pay to each kind of token, layer by layer (docs/definitions.md).

Read off while the model speaks its own greedy answer to the hear-question. Three variants: plain weights; without the first token (the
attention sink), the rest made to sum to 1 again; and weighted by the norm of the value vectors (Kobayashi et al. 2020). Attention is not
influence: for causes see knockout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.findings import Flow
from analysis.items import ItemStore, Key, flow_item
from analysis.tally import Record, Tally
from analysis.visits import Visit
from data.clips import Clip
from data.questions import Modality
from models import Kind

VARIANTS = ("plain", "no_sink", "value_norm")
TARGETS = ("question", "emitters")
SOURCES = {"system": Kind.SYSTEM, "video": Kind.VIDEO, "audio": Kind.AUDIO, "question": Kind.QUESTION, "emitters": Kind.EMITTER}


class FlowTally(Tally):
    """Attention mass of all visits (made with `taps=True`). `add` each visit, then `rows()`."""

    def __init__(self, modality: Modality = "hear"):
        self.modality = modality
        self._mass: dict[str, list[NDArray]] = {}
        self._clips: dict[str, list[Clip]] = {}

    def measure(self, visit: Visit) -> Record:
        """The mass under the model's spoken answers. Raises ValueError where kinds do not sum to 1: then rows were lost on the way."""
        flow = visit.spoken(self.modality).flow
        assert flow is not None, "the visit was made without taps"
        mass = flow.double().cpu().numpy()  # (variant, layer, item, target, kind)
        if not np.allclose(mass.sum(-1), 1, atol=1e-4):
            raise ValueError(f"Attention mass sums to {mass.sum(-1).min():.4f} … {mass.sum(-1).max():.4f} over the kinds, not to 1.")
        return {"mass": mass.transpose(2, 0, 1, 3, 4)}

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        self._mass.setdefault(condition, []).append(record["mass"])
        self._clips.setdefault(condition, []).extend(clips)

    def rows(self, items: ItemStore) -> list[Flow]:
        """One row a condition, variant and target: mass by kind and layer, summing to 1 over the kinds."""
        out = []
        for condition, parts in self._mass.items():
            mass, clips = np.concatenate(parts), self._clips[condition]
            group, layers = items.clips(clips), range(mass.shape[2])
            for v, variant in enumerate(VARIANTS):
                for t, target in enumerate(TARGETS):
                    by_kind = {}
                    for name, kind in SOURCES.items():
                        keys = [Key("flow", condition, None, flow_item(target, name, variant, layer), "mass") for layer in layers]
                        by_kind[name] = group.means(keys, mass[:, v, :, t, kind])
                    out.append(Flow(target, variant, condition, by_kind))
        return out
