"""Shortcut Index over 2x2 grids, as a metric of `evaluate`. Computed by analysis.reliance and analysis.statistics, as in the diagnostics."""

import datasets
import evaluate

from analysis.reliance import grid_effects
from analysis.statistics import Dyads, Intervals

DESCRIPTION = """\
How far the stream decides that was not asked about. Of each pair of clips i, j there are four cells: picture and sound of i (o) or of j (x). In each,
m = s(y_i) - s(y_j), with s the log-likelihood of a label's phrase divided by its tokens.
E_A = ((oo - ox) + (xo - xx)) / 2, E_V = ((oo - xo) + (ox - xx)) / 2.
Shortcut Index = |mean E_V| / (|mean E_A| + |mean E_V|) on hear-questions, its mirror on see-questions. 0 is ideal."""

INPUTS = """\
oo, ox, xo, xx: the margin m of each cell, one entry a grid; the first letter is the picture's clip, the second the sound's.
modality: "hear" or "see".
first, second: optional, the name of clip i and of clip j of each grid (or of their sources); then the 95 % interval is given as well.
Returns shortcut (None where both effects are 0), effect_audio, effect_video, n; with names low, high, clusters.

>>> metric = evaluate.load("analysis/metrics/shortcut_index")
>>> metric.compute(oo=[4.0], ox=[-1.0], xo=[2.0], xx=[-3.0], modality="hear")["shortcut"]
0.2857142857142857
"""

CITATION = """\
The Shortcut Index is after DMC-Repair; intervals by Fieller's theorem on the dyadic variance of Fafchamps & Gubert (2007)."""


class ShortcutIndex(evaluate.Metric):
    """See DESCRIPTION and INPUTS."""

    def _info(self):
        features = datasets.Features({cell: datasets.Value("float64") for cell in ("oo", "ox", "xo", "xx")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, oo, ox, xo, xx, modality, first=None, second=None):
        if modality not in ("hear", "see"):
            raise ValueError(f'modality has to be "hear" or "see", not {modality!r}.')
        if (first is None) != (second is None):
            raise ValueError("first and second name the two clips of each grid: give both or neither.")
        audio, video = grid_effects(list(zip(oo, ox, xo, xx, strict=True)))
        shortcut, other = (video, audio) if modality == "hear" else (audio, video)
        clusters = range(len(oo)) if first is None else Dyads(first, second)
        found = Intervals(clusters, len(oo)).ratio(shortcut, other)
        out = {"shortcut": found.value, "effect_audio": float(audio.mean()), "effect_video": float(video.mean()), "n": found.n}
        return out if first is None else {**out, "low": found.low, "high": found.high, "clusters": found.clusters}
