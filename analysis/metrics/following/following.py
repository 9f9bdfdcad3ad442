"""What answers about conflicts follow, as a metric of Hugging Face `evaluate`. Computed by analysis.events, as in the diagnostics."""

import datasets
import evaluate

from analysis.events import VERDICTS, Reader, follows, is_correct

DESCRIPTION = """\
Shares of answers that name only the heard event (`audio`), only the seen one (`vision`), `both`, another known event (`neither`), none because there
is nothing to hear or see (`nothing`) or none at all (`unparsed`); and `correct`: only what the question asks for, nothing where that stream is
missing. Where picture and sound are of one class a right answer counts as `audio`."""

INPUTS = """\
predictions: the answers, as text.
video_labels, audio_labels: class of the picture and of the sound of each clip; "" where there is none.
labels: every known class as [name, seen phrase, heard phrase].
modality: "hear" or "see", what the question asks about.
Returns the seven shares and n.

>>> metric = evaluate.load("analysis/metrics/following")
>>> labels = [["dog", "a dog", "a dog barking"], ["cat", "a cat", "a cat meowing"]]
>>> metric.compute(predictions=["I hear a dog barking."], video_labels=["dog"], audio_labels=["cat"], labels=labels, modality="hear")["vision"]
1.0
"""

CITATION = """\
Following rates on audio-visual conflicts, as defined in docs/definitions.md of avbalance."""


class FollowingMetric(evaluate.Metric):
    """See DESCRIPTION and INPUTS."""

    def _info(self):
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "video_labels", "audio_labels")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions, video_labels, audio_labels, labels, modality):
        if modality not in ("hear", "see"):
            raise ValueError(f'modality has to be "hear" or "see", not {modality!r}.')
        known = {name: (seen, heard) for name, seen, heard in labels}
        if strange := sorted({*video_labels, *audio_labels} - {*known, ""}):
            raise ValueError(f"{strange[0]!r} is a class of a clip, but not among the labels.")
        reader = Reader(known)
        said = [follows(*row, modality, reader) for row in zip(predictions, video_labels, audio_labels, strict=True)]
        right = [is_correct(v, modality, *given) for v, *given in zip(said, video_labels, audio_labels, strict=True)]
        return {**{v: said.count(v) / len(said) for v in VERDICTS}, "correct": sum(right) / len(said), "n": len(said)}
