"""Token-distribution shift: the model's own greedy answers, teacher-forced through its vision-language base (docs/definitions.md).

The base sees the same frames and hears nothing. A token is *unshifted* if it is the base's first choice at its position, *marginal* if it
is its second or third, *shifted* otherwise (URIAL, Lin et al. 2024, arXiv 2312.01552); KL(model ‖ base) is over the whole vocabulary, in
nats a token. A model that truly listens must say event words that its base, which hears nothing, would not have said.

Tokens of hear- and see-answers are pooled. Classes: `audio_event`, tokens of a known sound phrase's content words in a hear-answer;
`first_event`, the first of them in each answer that has one; `visual`, tokens of a known object phrase's content words in a see-answer;
`rest`, everything else, the end token included; `all`. Where a model has no base, the proxy is the model itself without its sound and without its
adapter, so that it is the same before and after training, and the findings say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np
import torch

from analysis.events import content_stems, named, stem
from analysis.findings import Shift
from analysis.items import ItemStore, Key
from analysis.tally import Record, Tally
from analysis.visits import MODALITIES, Subject, Visit, forced
from data.clips import Clip
from data.questions import Modality
from models import AVLLM, ModelError

ANOTHER_BASE = "give a base of the same vocabulary with --base, or leave token shift out with --shift 0."
CLASSES = ("all", "audio_event", "visual", "rest", "first_event")


def ranks_and_kl(logits: torch.Tensor, base_logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank (1 = first choice) of each target under the base, and KL(model ‖ base) in nats, at the same positions.

    logits, base_logits: (…, V), V may differ by padding rows of the embedding and is cut to the smaller; targets: (…).
    """
    size = min(logits.shape[-1], base_logits.shape[-1])
    base = base_logits[..., :size].float()
    own = torch.gather(base, -1, targets[..., None])
    rank = (base > own).sum(-1) + 1
    p, q = logits[..., :size].float().log_softmax(-1), base.log_softmax(-1)
    return rank, (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def check_tokens(model: AVLLM, base: AVLLM, ids: Collection[int] | None = None) -> None:
    """Raise ModelError where one of these ids (by default every ordinary token and the end token) is not the same token in both vocabularies.

    Names of special tokens differ between Qwen2.5-Omni and Qwen's vision-language models; no answer is made of them.
    """
    ours, theirs = model.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    if ids is None:
        special = model.tokenizer.get_added_vocab()
        ids = {i for token, i in ours.items() if token not in special} | {model.end_id}
    other = {i: token for token, i in theirs.items()}
    if wrong := [(i, token) for token, i in ours.items() if i in ids and other.get(i) != token]:
        i, token = min(wrong)
        raise ModelError(
            f"{base.path}: {len(wrong)} tokens are not those of {model.path}, e.g. {i} is {other.get(i)!r} and not {token!r}: {ANOTHER_BASE}"
        )
    if base.end_id != model.end_id:
        raise ModelError(f"{base.path} ends its answers with token {base.end_id}, {model.path} with {model.end_id}: {ANOTHER_BASE}")


class ShiftTally(Tally):
    """Shift of the spoken answers of all visits. `base`: the vision-language base, or None for the proxy.

    Raises ModelError for a base whose tokens are not the model's, since answers go through it token by token.
    """

    def __init__(self, subject: Subject, base: AVLLM | None):
        self.subject, self.base = subject, base
        if base is not None:
            check_tokens(subject.model, base)
            base.fps = subject.model.fps  # the same frames
        self._tokens: dict[str, list[tuple[Clip, str, bool, int, float]]] = {}  # condition -> (clip, class, first event, rank, KL)
        self._classes: dict[tuple[tuple[int, ...], str], list[str]] = {}

    def measure(self, visit: Visit) -> Record:
        """Run the visit's answers through the base on the same frames without sound."""
        silent, record = self.base or self.subject.model, Record(rows=[], classes=[], first=[], ranks=[], kl=[])
        said = {modality: (visit.spoken(modality), visit.answer_ids(modality)) for modality in MODALITIES}
        with silent.adapter_off():  # answers are the adapted model's, and done
            media = [silent.media(clip, self.subject.clips.root, audio=False) for clip in visit.clips]
            prefix = silent.prefill(media)
            heard_nothing = {
                modality: silent.extend(prefix, range(len(answers)), [forced(silent, modality, ids) for ids in answers])
                for modality, (_, answers) in said.items()
            }
        for modality, (spoken, answers) in said.items():
            if self.base is not None:
                check_tokens(self.subject.model, self.base, {token for ids in answers for token in ids})
            base = heard_nothing[modality]
            rank, kl = (x.cpu() for x in ranks_and_kl(spoken.logits, base.logits, spoken.targets.clamp_min(0)))
            for row, ids in enumerate(answers):
                key = (tuple(ids), modality)
                classes = self._classes.setdefault(key, self._classes.get(key) or self.token_classes(ids, modality))
                first = next((i for i, c in enumerate(classes) if c == "audio_event"), None)
                if self.subject.cut_off(ids):
                    classes = classes[:-1]  # stopped before it could say the end token
                record["rows"] += [row] * len(classes)
                record["classes"] += classes
                record["first"] += [i == first for i in range(len(classes))]
                record["ranks"] += rank[row, : len(classes)].tolist()
                record["kl"] += kl[row, : len(classes)].tolist()
        return record

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        columns = (record[name] for name in ("rows", "classes", "first", "ranks", "kl"))
        self._tokens.setdefault(condition, []).extend((clips[row], *token) for row, *token in zip(*columns, strict=True))

    def token_classes(self, ids: Sequence[int], modality: Modality) -> list[str]:
        """audio_event | visual | rest for every answer token and the end token. A token belongs to the word that holds its first letter."""
        pieces = self._pieces(tuple(ids))
        text = "".join(pieces)
        phrases = self.subject.phrases[modality]
        stems = {s for name in named(text, phrases) for s in content_stems(phrases[name])}
        inside, event = "audio_event" if modality == "hear" else "visual", []
        letters = np.zeros(len(text) + 1, dtype=bool)
        start = 0
        for end in range(len(text) + 1):
            if end == len(text) or not text[end].isalnum():
                letters[start:end] = stem(text[start:end].lower()) in stems
                start = end + 1
        at = 0
        for piece in pieces:
            first = at + len(piece) - len(piece.lstrip(" "))
            event.append(inside if piece.strip() and letters[min(first, len(text))] else "rest")
            at += len(piece)
        return [*event, "rest"]

    def _pieces(self, ids: tuple[int, ...]) -> list[str]:
        """The text that each token adds."""
        decode = self.subject.model.tokenizer.decode
        texts = [decode(list(ids[:n])) for n in range(len(ids) + 1)]
        return [b[len(a) :] for a, b in itertools.pairwise(texts)]

    def rows(self, items: ItemStore) -> list[Shift]:
        """One row a condition and token class; classes without tokens have n = 0. n counts tokens, and a clip's tokens stay together."""
        out = []
        for condition, tokens in self._tokens.items():
            clips = list({token[0].id: token[0] for token in tokens}.values())
            at = {clip.id: i for i, clip in enumerate(clips)}
            group = items.clips(clips)
            for name in CLASSES:
                chosen = [t for t in tokens if name == "all" or t[1] == name or (name == "first_event" and t[2])]
                sums = np.zeros((len(clips), 5))  # unshifted, marginal, shifted, KL, tokens
                for clip, _, _, rank, kl in chosen:
                    sums[at[clip.id]] += (rank == 1, rank in (2, 3), rank > 3, kl, 1)
                keys = [Key("shift", condition, None, name, measure) for measure in ("unshifted", "marginal", "shifted", "kl")]
                shares = group.rates(keys[:3], sums[:, :3], sums[:, 4])
                out.append(Shift(name, condition, *shares, *group.means(keys[3:], sums[:, 3:4], sums[:, 4])))
        return out
