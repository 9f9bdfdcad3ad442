"""Caption fidelity: what free answers to see-, hear- and both-questions say of a clip, as read by judges (docs/definitions.md).

    tally = CaptionTally(subject.labels)
    tally.take(visit.clips, visit.condition, tally.measure(visit))                       # uncut
    tally.take(visit.clips, visit.condition, tally.measure(visit, [Cut.at(…), …]))       # under cuts
    tally.captions, tally.rows(draws, seed)

The tally reads its captions with the labels judge. Answers are kept in the findings, so that other judges can read them later without the model:

    add_scores(findings, LLMJudge(…))        # what `python -m analysis judge` does
    agreement(findings.captions)             # rank correlation between judges that read the same captions
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import stats

from analysis.findings import Caption, CaptionFidelity, CaptionScore, Estimate, Findings
from analysis.judges import SIDES, Judge, JudgeError, Labels, LabelsJudge, Side, asked
from analysis.statistics import by_source
from analysis.tally import Record, Tally
from analysis.visits import Resampler, Visit
from data.clips import Clip
from data.questions import MODALITIES, Modality, question
from models import Cut


def cut_name(cut: Cut | None) -> str | None:
    """What findings call a cut: site and layers [start, stop), "video->emitters 4:8"; None for no cut."""
    return None if cut is None else f"{cut.site} {cut.start}:{cut.stop}"


class CaptionTally(Tally):
    """Greedy captions of all visits, with and without cuts, and what the labels judge reads in them.

    `labels`: class -> (seen, heard), the events that the judge knows.
    """

    def __init__(self, labels: Labels, modalities: Sequence[Modality] = MODALITIES):
        self.modalities = modalities
        self.captions: list[Caption] = []
        self._judge = LabelsJudge(labels)

    def measure(self, visit: Visit, cuts: Sequence[Cut | None] = (None,)) -> Record:
        """{"video", "audio": which streams were given; "answers": [[modality, cut, [one answer a clip]], …]}.

        Uncut see- and hear-answers are those of the visit. Cuts into media rows need a prefix each, which all questions share.
        """
        answers: dict[tuple[Modality, Cut | None], list[str]] = {}
        count = range(len(visit.clips))
        plain = [cut for cut in cuts if cut is not None and not cut.cuts_media]
        for modality in self.modalities:
            if None in cuts:
                asked_already = modality != "both"
                answers[modality, None] = visit.answers(modality) if asked_already else _greedy(visit, visit.prefix, count, modality, None)
            rows = [row for _ in plain for row in count]
            said = _greedy(visit, visit.prefix, rows, modality, [(cut,) for cut in plain for _ in count])
            for c, cut in enumerate(plain):
                answers[modality, cut] = said[c * len(count) : (c + 1) * len(count)]
        for media_cut in cuts:
            if media_cut is not None and media_cut.cuts_media:
                given = [(media_cut,)] * len(count)
                prefix = visit.subject.model.prefill(visit.media, given)
                for modality in self.modalities:
                    answers[modality, media_cut] = _greedy(visit, prefix, count, modality, given)
        ordered = [[modality, cut_name(cut), answers[modality, cut]] for cut in cuts for modality in self.modalities]
        return {"video": visit.video, "audio": visit.audio, "answers": ordered}

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
            )
            for modality, cut, answers in record["answers"]
            for clip, answer in zip(clips, answers, strict=True)
        ]
        for caption, read in zip(new, self._judge.judge(new), strict=True):
            caption.scores.append(read)
        self.captions += new

    def rows(self, draws: int, seed: int) -> list[CaptionFidelity]:
        """One row a condition, question and cut."""
        return fidelity_rows(self.captions, draws, seed)


def _greedy(visit: Visit, prefix, rows: Sequence[int], modality: Modality, cuts) -> list[str]:
    """Greedy answers as text; answers that have to say two things may be twice as long."""
    subject = visit.subject
    if modality == "both":
        subject = replace(subject, max_new_tokens=2 * subject.max_new_tokens)
    return [subject.text(ids) for ids in subject.greedy(prefix, rows, modality, cuts)]


def fidelity_rows(captions: Iterable[Caption], draws: int, seed: int) -> list[CaptionFidelity]:
    """One row a judge, condition, question and cut, in the order of the captions.

    Means of the sides' scores and the share with an invented event are over captions that the judge could read; `unparsed` is over all.
    """
    groups: dict[tuple[str, str, str, str | None], list[tuple[Caption, CaptionScore]]] = {}
    for caption in captions:
        for read in caption.scores:
            groups.setdefault((read.judge, caption.condition, caption.modality, caption.cut), []).append((caption, read))
    rows = []
    for (judge, condition, modality, cut), pairs in groups.items():
        parsed = [(caption, read) for caption, read in pairs if read.parsed]
        sides: dict[Side, Estimate | None] = dict.fromkeys(SIDES)
        for side in asked(modality):
            scored = [(caption, value) for caption, read in parsed if (value := side_score(read, side)) is not None]
            sides[side] = _mean([value for _, value in scored], [caption for caption, _ in scored], draws, seed)
        unparsed = _mean([not read.parsed for _, read in pairs], [caption for caption, _ in pairs], draws, seed)
        invented = _mean([read.invented > 0 for _, read in parsed], [caption for caption, _ in parsed], draws, seed)
        rows.append(CaptionFidelity(judge, condition, modality, cut, sides["audio"], sides["video"], unparsed, invented))
    return sorted(rows, key=lambda row: row.judge != "labels")


def side_score(read: CaptionScore, side: Side) -> float | None:
    """The score of one side."""
    return read.audio if side == "audio" else read.video


def _mean(values: Sequence[float], captions: Sequence[Caption], draws: int, seed: int) -> Estimate:
    """Mean with its interval, clustered by the captions' sources."""
    if not captions:
        return Estimate(None, None, None, 0, 0)
    clusters = by_source([c.video_source for c in captions], [c.audio_source for c in captions])
    return Resampler(clusters, len(captions), draws, seed).estimate(values)


def add_scores(findings: Findings, judge: Judge) -> None:
    """Have a judge read the captions of findings: its scores are added (what it said before is replaced) and `fidelity` is made anew.

    Raises JudgeError where there are no captions, or where the findings do not name the events of a caption in `labels`.
    """
    if not findings.captions:
        raise JudgeError("these findings hold no captions: diagnose again with captions switched on.")
    seen, heard = {s for s, _ in findings.labels.values()}, {h for _, h in findings.labels.values()}
    for caption in findings.captions:
        for phrase, known in ((caption.seen, seen), (caption.heard, heard)):
            if phrase and phrase not in known:
                raise JudgeError(f"the caption of clip {caption.clip} is about {phrase!r}, which is not among the labels of these findings.")
    for caption, read in zip(findings.captions, judge.judge(findings.captions), strict=True):
        caption.scores = [*(s for s in caption.scores if s.judge != judge.name), read]
    draws, seed = (findings.settings.get(name, default) for name, default in (("draws", 1000), ("seed", 0)))
    findings.fidelity = fidelity_rows(findings.captions, draws, seed)


class Agreement(NamedTuple):
    """Spearman's rank correlation of two judges on the captions that both scored on a side; None where one of them gave all the same score."""

    first: str
    second: str
    side: Side
    rho: float | None
    n: int


def agreement(captions: Sequence[Caption]) -> list[Agreement]:
    """Every pair of judges, each side."""
    judges = list(dict.fromkeys(read.judge for caption in captions for read in caption.scores))
    out = []
    for first, second in itertools.combinations(judges, 2):
        for side in SIDES:
            pairs = []
            for caption in captions:
                by_judge = {read.judge: side_score(read, side) for read in caption.scores}
                pair = (by_judge.get(first), by_judge.get(second))
                if None not in pair:
                    pairs.append(pair)
            a, b = np.array(pairs, dtype=float).reshape(-1, 2).T
            constant = len(pairs) < 2 or len(set(a)) < 2 or len(set(b)) < 2
            out.append(Agreement(first, second, side, None if constant else float(stats.spearmanr(a, b).statistic), len(pairs)))
    return out
