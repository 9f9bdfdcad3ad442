"""Free captions: greedy answers to see-, hear- and both-questions, with and without cuts, as the labels judge reads them (analysis/judges.py).

    CaptionTally(subject.labels, synonyms=subject.synonyms)                       # uncut
    CaptionTally(subject.labels, cuts=[Cut.at(…), …], synonyms=subject.synonyms)  # under cuts
    fidelity_rows(tally.captions)                      # what it comes to (analysis/fidelity.py)

The answers are kept in the findings, so that other judges can read them later without the model (analysis/fidelity.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.findings import Caption
from analysis.judges import Labels, LabelsJudge
from analysis.synonyms import Synonyms
from analysis.tally import Record, Tally
from analysis.visits import Subject, Visit
from data.clips import Clip
from data.questions import MODALITIES, Modality, question
from models import Cut


class CaptionTally(Tally):
    """Greedy captions of all visits, with and without cuts, and what the labels judge reads in them.

    `labels`: class -> (seen, heard), the events that the judge knows, and `synonyms` of them (analysis.events.Reader). `cuts`: what captions are
    given under; None is no cut.
    """

    def __init__(
        self,
        labels: Labels,
        modalities: Sequence[Modality] = MODALITIES,
        cuts: Sequence[Cut | None] = (None,),
        synonyms: Synonyms | None = None,
    ):
        self.modalities, self.cuts = modalities, cuts
        self.captions: list[Caption] = []
        self._judge = LabelsJudge(labels, synonyms)

    def depends(self, clips: Sequence[Clip], start: int) -> list[str | None]:
        """The cuts."""
        return [cut.text if cut else None for cut in self.cuts]

    def measure(self, visit: Visit) -> Record:
        """{"video", "audio": which streams were given; "answers": [[modality, cut, [one answer a clip]], …]; "cut_off": for each of
        these, whether they ended at the limit}.

        Uncut see- and hear-answers are those of the visit. Cuts into media rows need a prefix each, which all questions share.
        """
        answers: dict[tuple[Modality, Cut | None], list[list[int]]] = {}
        subject = visit.subject
        cuts = self.cuts
        count = range(len(visit.clips))
        plain = [cut for cut in cuts if cut is not None and not cut.cuts_media]
        for modality in self.modalities:
            if None in cuts:
                asked_already = modality != "both"
                answers[modality, None] = visit.answer_ids(modality) if asked_already else _greedy(visit, visit.prefix, count, modality, None)
            rows = [row for _ in plain for row in count]
            said = _greedy(visit, visit.prefix, rows, modality, [(cut,) for cut in plain for _ in count])
            for c, cut in enumerate(plain):
                answers[modality, cut] = said[c * len(count) : (c + 1) * len(count)]
        for media_cut in cuts:
            if media_cut is not None and media_cut.cuts_media:
                given = [(media_cut,)] * len(count)
                prefix = visit.under(media_cut, count)
                for modality in self.modalities:
                    answers[modality, media_cut] = _greedy(visit, prefix, count, modality, given)
        ordered, cut_off = [], []
        for under in cuts:
            for modality in self.modalities:
                said, limit = answers[modality, under], asked_about(subject, modality)
                ordered.append([modality, under.text if under else None, [subject.text(i) for i in said]])
                cut_off.append([limit.cut_off(i) for i in said])
        return {"video": visit.video, "audio": visit.audio, "answers": ordered, "cut_off": cut_off}

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        """Take up the captions of a visit, and read them."""
        new = [
            Caption(
                clip=clip.id,
                file=clip.file,
                condition=condition,
                modality=modality,
                question=question(modality),
                cut=cut,
                answer=answer,
                seen=clip.seen if record["video"] else "",
                heard=clip.heard if record["audio"] else "",
                video_source=clip.video_source if record["video"] else "",
                audio_source=clip.audio_source if record["audio"] else "",
                scores=[],
                cut_off=ended,
                video_label=clip.video_label if record["video"] else "",
                audio_label=clip.audio_label if record["audio"] else "",
            )
            for (modality, cut, answers), cut_off in zip(record["answers"], record["cut_off"], strict=True)
            for clip, answer, ended in zip(clips, answers, cut_off, strict=True)
        ]
        for caption, read in zip(new, self._judge.judge(new), strict=True):
            caption.scores.append(read)
        self.captions += new


def asked_about(subject: Subject, modality: Modality) -> Subject:
    """The subject with the limit of this question: an answer that has to say two things may be twice as long."""
    return replace(subject, max_new_tokens=2 * subject.max_new_tokens) if modality == "both" else subject


def _greedy(visit: Visit, prefix, rows: Sequence[int], modality: Modality, cuts) -> list[list[int]]:
    """Greedy answers as tokens."""
    return asked_about(visit.subject, modality).greedy(prefix, rows, modality, cuts)
