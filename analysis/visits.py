"""What the diagnostics share: the model under test with its clips, and visits.

A visit is a batch of clips whose media prefix is computed once, and on top of which every diagnostic asks what it needs; greedy answers are
computed at the first asking and kept, so following, flow, lens, probes and token shift all look at the same answers.

    subject = Subject(model, load_clips("runs/clips"))
    visit = Visit(subject, clips[:48], "counterfactual", taps=True)
    visit.answers("hear")        # greedy answers, one a clip
    visit.spoken("hear").hidden  # the same answers run through the model again, with hidden states and attention flow
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.events import Reader, phrases_of, synonyms_of
from data.clips import Clip, Clips, DataError
from data.questions import Modality, answer, question
from models import AVLLM, Cut, Kind
from models.attention import Cuts
from models.sequences import Output, Prefix, Suffix

MODALITIES: tuple[Modality, ...] = ("hear", "see")


@dataclass(frozen=True)
class Subject:
    """The model under test and the clips it is asked about. Questions are in their canonical wording (`data.questions.question`)."""

    model: AVLLM
    clips: Clips
    max_new_tokens: int = 24
    _suffixes: dict[tuple[Modality, str], Suffix] = field(default_factory=dict, repr=False)

    @cached_property
    def labels(self) -> dict[str, tuple[str, str]]:
        """Class -> (seen, heard) phrases."""
        return self.clips.labels()

    @cached_property
    def synonyms(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Class -> (words for what is seen, words for what is heard) beside the label's phrases (`analysis.events.synonyms_of`)."""
        return synonyms_of(self.clips)

    @cached_property
    def reader(self) -> Reader:
        """What answers are read by."""
        return Reader(self.labels, self.synonyms)

    @cached_property
    def phrases(self) -> dict[Modality, dict[str, str]]:
        """Modality -> class -> the phrase that answers its question."""
        return {modality: phrases_of(self.labels, modality) for modality in MODALITIES}

    def label_suffix(self, modality: Modality, name: str) -> Suffix:
        """The question and the template answer with this class's phrase, up to the phrase's last token: what s (definitions.md) needs, and no row
        more.
        """
        key = (modality, name)
        if key not in self._suffixes:
            whole = self.model.suffix(question(modality), *answer(modality, *self.labels[name]))
            self._suffixes[key] = trimmed(whole)
        return self._suffixes[key]

    def scores(self, prefix: Prefix, which: Sequence[int], suffixes: Sequence[Suffix], cuts: Cuts | None = None) -> NDArray:
        """Length-normalised log-likelihood of the span of each suffix on top of prefix row `which`, (n,), in nats a token."""
        return self.model.span_scores(prefix, which, suffixes, cuts).double().cpu().numpy() if len(which) else np.empty(0)

    def greedy(self, prefix: Prefix, which: Sequence[int], modality: Modality, cuts: Cuts | None = None) -> list[list[int]]:
        """Greedy answer tokens to the canonical question, without the end token."""
        return self.model.generate_ids(prefix, which, [question(modality)] * len(which), cuts, self.max_new_tokens) if len(which) else []

    def text(self, ids: Sequence[int]) -> str:
        """Answer tokens as text."""
        return self.model.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def cut_off(self, ids: Sequence[int]) -> bool:
        """Whether an answer of `greedy` ended at the limit: the model had not said its end token."""
        return len(ids) >= self.max_new_tokens


def trimmed(suffix: Suffix) -> Suffix:
    """The suffix up to the last token of its span. Scores of the span stay what they were, since attention is causal."""
    tokens = int(suffix.span.nonzero()[-1]) + 1
    rows = suffix.first + tokens
    return Suffix(suffix.ids[:rows], suffix.kinds[:rows], suffix.first, suffix.targets[:tokens], suffix.span[:tokens])


def forced(model: AVLLM, modality: Modality, ids: Sequence[int]) -> Suffix:
    """The canonical question and an answer given as tokens, with the end token as its last target. No row emits nothing, so the span is all of it."""
    prompt = model.suffix(question(modality))
    given = torch.tensor(list(ids), dtype=torch.long)
    return Suffix(
        torch.cat([prompt.ids, given]),
        torch.cat([prompt.kinds, torch.full_like(given, int(Kind.EMITTER))]),
        prompt.first,
        torch.cat([given, torch.tensor([model.end_id])]),
        torch.ones(len(given) + 1, dtype=torch.bool),
    )


class Visit:
    """Some clips with their prefix. `condition` is what findings call it; `video`, `audio`: which streams are given to the model; `start`: how many
    clips of the condition come before these. Streams go through the towers one by one, so features do not depend on who else is in a visit.

    Raises DataError where a sample that should carry sound (or a picture) has no such tokens in the prompt.
    """

    def __init__(
        self, subject: Subject, clips: Sequence[Clip], condition: str, video: bool = True, audio: bool = True, taps: bool = False, start: int = 0
    ):
        self.subject, self.clips, self.condition, self.video, self.audio, self.taps = subject, list(clips), condition, video, audio, taps
        self.start = start
        model, root = subject.model, subject.clips.root
        self.media = [model.media(clip, root, video=video, audio=audio) for clip in self.clips]
        self.prefix = model.prefill(self.media, hidden=taps)
        for kind, wanted in ((Kind.VIDEO, video), (Kind.AUDIO, audio)):
            for clip, there in zip(self.clips, (self.prefix.kinds == kind).any(1).tolist(), strict=True):
                if there != wanted:
                    said = "has no" if wanted else "still has"
                    raise DataError(
                        f"{root / clip.file}: the prompt {said} {kind.name.lower()} tokens. Check the file's streams and the model's processor."
                    )
        self._ids: dict[Modality, list[list[int]]] = {}
        self._spoken: dict[Modality, Output] = {}

    def under(self, cut: Cut, rows: Sequence[int]) -> Prefix:
        """The prefix of some of the clips under a cut into media rows; layers below the cut are those of the clean one, where it has kept them."""
        clean = self.prefix if self.taps and list(rows) == list(range(len(rows))) else None
        return self.subject.model.prefill([self.media[row] for row in rows], [(cut,)] * len(rows), clean=clean)

    def answer_ids(self, modality: Modality) -> list[list[int]]:
        """Greedy answers as tokens."""
        if modality not in self._ids:
            self._ids[modality] = self.subject.greedy(self.prefix, range(len(self.clips)), modality)
        return self._ids[modality]

    def answers(self, modality: Modality) -> list[str]:
        """Greedy answers, one a clip."""
        return [self.subject.text(ids) for ids in self.answer_ids(modality)]

    def spoken(self, modality: Modality) -> Output:
        """The model's own greedy answers run through it again: logits at the emitters, and with `taps` hidden states and attention flow."""
        if modality not in self._spoken:
            suffixes = [forced(self.subject.model, modality, ids) for ids in self.answer_ids(modality)]
            self._spoken[modality] = self.subject.model.extend(self.prefix, range(len(self.clips)), suffixes, hidden=self.taps, flow=self.taps)
        return self._spoken[modality]
