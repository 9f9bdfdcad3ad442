"""Caption fidelity by the labels judge, as a metric of `evaluate`. Computed by analysis.judges and analysis.fidelity, as in the diagnostics."""

import datasets
import evaluate

from analysis.fidelity import fidelity_rows
from analysis.findings import Caption
from analysis.items import ItemStore
from analysis.judges import LabelsJudge

DESCRIPTION = """\
How far free captions name what their clips show and what they sound like, and how often they make things up. Each side scores
named / (1 + invented events of that side), from 0 to 1; see-questions have a video side, hear-questions an audio side, both-questions both.
Captions in which no known event can be read are unparsed: they are in no score but their own share."""

INPUTS = """\
predictions: the captions.
seen, heard: phrase of the picture and of the sound of each clip; "" where there is none.
labels: every known class as [name, seen phrase, heard phrase].
modality: "see", "hear" or "both", what the question asks about.
Returns audio, video (means, None where not asked for or nothing was read), unparsed, invented (shares) and n.

>>> metric = evaluate.load("analysis/metrics/caption_fidelity")
>>> labels = [["dog", "a dog", "a dog barking"], ["cat", "a cat", "a cat meowing"]]
>>> metric.compute(predictions=["A dog barks, a cat meows."], seen=["a dog"], heard=["a cat meowing"], labels=labels, modality="hear")["audio"]
0.5
"""

CITATION = """\
Caption fidelity by event matching: named / (1 + invented) per side, as defined in docs/definitions.md of avbalance."""


class CaptionFidelityMetric(evaluate.Metric):
    """See DESCRIPTION and INPUTS."""

    def _info(self):
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "seen", "heard")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions, seen, heard, labels, modality):
        if modality not in ("see", "hear", "both"):
            raise ValueError(f'modality has to be "see", "hear" or "both", not {modality!r}.')
        known = {name: (sight, sound) for name, sight, sound in labels}
        for phrases, side in ((seen, 0), (heard, 1)):
            if strange := sorted(set(phrases) - {row[side] for row in known.values()} - {""}):
                raise ValueError(f"{strange[0]!r} is what a clip has, but not among the labels.")
        rows = zip(predictions, seen, heard, strict=True)
        captions = [Caption(str(i), "", "", modality, "", None, answer, s, h, str(i), str(i), []) for i, (answer, s, h) in enumerate(rows)]
        for caption, read in zip(captions, LabelsJudge(known).judge(captions), strict=True):
            caption.scores.append(read)
        (row,) = fidelity_rows(captions, ItemStore())
        audio, video = (None if side is None else side.value for side in (row.audio, row.video))
        return {"audio": audio, "video": video, "unparsed": row.unparsed.value, "invented": row.invented.value, "n": len(captions)}
