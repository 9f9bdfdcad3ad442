"""Probing: what the hidden states know, whatever the model says (docs/definitions.md). All of it on conflicts, where the sound's and the picture's
class are independent.

**Logit lens** (nostalgebraist 2020): hidden states at audio, question and emitter positions read through the final norm and the head. A
clip is a hit in a layer if at any of its positions of that kind the first token of a word of the true phrase ("barking" of "a dog barking")
is among the top k. The control is the same with shuffled references: the mean over all cyclic derangements of the classes, which is the
mean over all wrong classes. Emitter rows are those of the model's own greedy answer to the hear-question, so nothing true is fed in.
*Latent audio understanding* is the corrected rate of the audio label at audio positions in the layer that is best on one half of the clips,
measured on the other half.

**Linear probes** (Alain & Bengio 2016; selectivity: Hewitt & Liang 2019): linear discriminant analysis on standardised states, pooled
covariance shrunk by `SHRINKAGE`, classes a priori equally likely. It is solved in closed form, because thousands of small probes have to be
fitted, and gives the scores of scikit-learn's LinearDiscriminantAnalysis(solver="lsqr") (tests). With a dozen clips a class, and folds that
take more of some classes than of others, it reads the organism far better than logistic or ridge regression, which then favour the classes
that are left. Positions: mean of the audio rows, mean of the question rows, last prompt row, all under the hear-question. Controls:
shuffled labels; the same model without its sound (audio label only: there are no audio rows then, and the picture is supposed to be
readable without sound); optionally the same shapes with random weights in the decoder's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.events import event_words, named
from analysis.findings import Latent, Lens, Probe
from analysis.items import ItemStore, Key, lens_item, probe_item
from analysis.statistics import corrected
from analysis.tally import Record, Tally
from analysis.visits import Subject, Visit
from data.clips import Clip
from data.questions import question
from models import AVLLM, Kind

POSITIONS = ("audio", "question", "last_prompt")
LENS_POSITIONS = ("audio", "question", "emitters")
LABELS = ("audio", "visual")
SHRINKAGE = 0.1
SHUFFLES = 3
LENS_CELLS = 2**26  # logits held at a time


# ---------------------------------------------------------------- folds


def sharing(clips: Sequence[Clip]) -> list[set[int]]:
    """For each clip the other clips that it shares a video rendering, an audio rendering or its unordered class pair with."""
    holders: dict[tuple, list[int]] = {}
    keys = [(("video", c.video_rendering), ("audio", c.audio_rendering), ("pair", *sorted((c.video_label, c.audio_label)))) for c in clips]
    for i, names in enumerate(keys):
        for name in names:
            holders.setdefault(name, []).append(i)
    return [{j for name in names for j in holders[name]} - {i} for i, names in enumerate(keys)]


def make_folds(clips: Sequence[Clip], k: int) -> list[tuple[NDArray, NDArray]]:
    """(train, test) indices of k folds in which no test clip shares a rendering or an unordered class pair with a training clip.

    Renderings are shared through grids so that usually all clips hang together, and whole groups cannot be kept in one fold. So test
    folds are *grown*: from the clip with the fewest ties, always adding the neighbour with the fewest ties to clips outside; then training
    clips that share anything with the test fold are left out of that fold. Every clip is tested exactly once. Deterministic; of 600 clips
    in 10 folds about 500 training clips remain of 540.
    """
    ties = sharing(clips)
    left = set(range(len(clips)))
    size = -(-len(clips) // k)
    folds = []
    while left:
        test: list[int] = []
        border: dict[int, int] = {}
        while left and len(test) < size:
            pick = max(border, key=lambda i: (border[i] - len(ties[i] & left), -i)) if border else min(left, key=lambda i: (len(ties[i] & left), i))
            test.append(pick)
            left.discard(pick)
            border.pop(pick, None)
            for neighbour in ties[pick] & left:
                border[neighbour] = border.get(neighbour, 0) + 1
        out = set(test).union(*(ties[i] for i in test))
        folds.append((np.array([i for i in range(len(clips)) if i not in out], dtype=int), np.array(sorted(test), dtype=int)))
    return folds


def halves(clips: Sequence[Clip]) -> tuple[NDArray, NDArray]:
    """(choose on, report on): indices of two parts that share no rendering and no class pair. What ties them together is in neither."""
    if len(clips) < 2:
        return np.arange(len(clips)), np.arange(0)
    report, choose = make_folds(clips, 2)[0]
    return choose, report


# ---------------------------------------------------------------- logit lens


Read = Callable[[torch.Tensor, int], torch.Tensor]  # states (rows, H) at a layer's index -> logits (rows, V)


class LensTally(Tally):
    """Which classes the lens sees in each clip of all visits (conflicts, made with `taps=True`); then `rows()` and `latent()`.

    `read`: how states of a layer become logits, and what findings call that; the logit lens unless another is given.
    """

    def __init__(self, subject: Subject, k: int = 5, read: Read | None = None, name: str = "logit"):
        self.k, self.name, self.clips = k, name, list[Clip]()
        self.read: Read = read or (lambda states, _: subject.model.lens(states))
        self.classes = list(subject.labels)
        self.said: list[bool] = []
        self._hits: dict[tuple[str, str], list[NDArray]] = {}
        self.table = word_table(subject)

    def measure(self, visit: Visit) -> Record:
        """Hits of every clip, layer and class, (n, L + 1, classes), for each position and label; whether the answer names the sound, (n,)."""
        record: Record = {}
        for position, states, mask in lens_states(visit):
            hits = [lens_hits(self.read, layer, x, mask, self.table, self.k) for layer, x in enumerate(states)]
            for label in LABELS:
                record[f"{position} {label}"] = np.stack([h[label] for h in hits], axis=1)
        phrases = visit.subject.phrases["hear"]
        record["said"] = [clip.audio_label in named(answer, phrases) for clip, answer in zip(visit.clips, visit.answers("hear"), strict=True)]
        return record

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        for position in LENS_POSITIONS:
            for label in LABELS:
                self._hits.setdefault((position, label), []).append(record[f"{position} {label}"])
        self.clips += clips
        self.said += record["said"]

    def _rates(self, position: str, label: str) -> tuple[NDArray, NDArray]:
        """Hit and control of every clip and layer, (n, L + 1) each; controls are means over the wrong classes."""
        seen = np.concatenate(self._hits[position, label]).astype(float)
        true = np.array([self.classes.index(c.audio_label if label == "audio" else c.video_label) for c in self.clips])
        hit = np.take_along_axis(seen, true[:, None, None], axis=2)[:, :, 0]
        return hit, (seen.sum(2) - hit) / max(1, len(self.classes) - 1)

    def rows(self, items: ItemStore) -> list[Lens]:
        """One row a position and label; index 0 = embeddings, l = output of layer l."""
        out = []
        group = items.clips(self.clips)
        for position in LENS_POSITIONS:
            for label in LABELS:
                hit, control = self._rates(position, label)
                keys = [Key("lens", None, None, lens_item(label, self.k, position, layer, self.name), "hit") for layer in range(hit.shape[1])]
                above = group.effects([key._replace(measure="corrected") for key in keys], hit - control)
                out.append(Lens(position, label, self.k, group.rates(keys, hit), control.mean(0).tolist(), corrected(above), self.name))
        return out

    def latent(self, items: ItemStore) -> Latent | None:
        """Latent audio understanding, or None where there are too few clips for two halves."""
        choose, report = halves(self.clips)
        if not len(choose) or not len(report):
            return None
        hit, control = self._rates("audio", "audio")
        layer = int(np.argmax((hit - control)[choose].mean(0)))
        group = items.clips([self.clips[i] for i in report])
        latent = group.means([Key("latent", None, None, "", "latent")], (hit - control)[report, layer, None])[0]
        said = group.rates([Key("latent", None, None, "", "said")], np.array(self.said)[report, None])[0]
        return Latent(layer, latent, said)


def word_table(subject: Subject) -> dict[str, torch.Tensor]:
    """Label -> (V, classes) bool: the first tokens of the words of each class's phrase."""
    phrases = {"audio": subject.phrases["hear"], "visual": subject.phrases["see"]}
    head: Any = subject.model.head
    table = {label: torch.zeros(head.weight.shape[0], len(subject.labels), dtype=torch.bool) for label in LABELS}
    for label in LABELS:
        for c, name in enumerate(subject.labels):
            table[label][[first_token(subject.model, word) for word in event_words(phrases[label][name])], c] = True
    return table


def lens_states(visit: Visit) -> Iterator[tuple[str, tuple[torch.Tensor, ...], torch.Tensor]]:
    """(position, states of every layer (n, rows, H), which rows (n, rows)): of the prompt's audio, and of the spoken answer to the hear-question."""
    spoken = visit.spoken("hear")
    assert visit.prefix.hidden is not None and spoken.hidden is not None, "the visit was made without taps"
    yield "audio", visit.prefix.hidden, visit.prefix.kinds == Kind.AUDIO
    yield "question", spoken.hidden, spoken.kinds == Kind.QUESTION
    yield "emitters", spoken.hidden, spoken.kinds == Kind.EMITTER


def first_token(model: AVLLM, word: str) -> int:
    """The first token of a word inside a sentence that is not only space."""
    ids = model.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if model.tokenizer.decode([i]).strip()), ids[0])


def lens_hits(read: Read, layer: int, states: torch.Tensor, mask: torch.Tensor, table: dict[str, torch.Tensor], k: int) -> dict[str, NDArray]:
    """Label -> (n, classes) bool: at some masked row of the clip, a token of the class is among the top k.

    states: (n, rows, H), the output of `layer` (0: the embeddings); mask: (n, rows); table[label]: (V, classes) bool.
    """
    item = mask.nonzero()[:, 0].cpu()
    rows = states[mask]
    found = {label: torch.zeros(mask.shape[0], t.shape[1]) for label, t in table.items()}
    step = max(1, LENS_CELLS // next(iter(table.values())).shape[0])
    with torch.no_grad():
        for start in range(0, len(rows), step):
            top = read(rows[start : start + step], layer).topk(k, dim=-1).indices.cpu()
            for label, t in table.items():
                found[label].index_add_(0, item[start : start + step], t[top].any(1).float())
    return {label: (f > 0).numpy() for label, f in found.items()}


# ---------------------------------------------------------------- linear probes


class ProbeFeatures(Tally):
    """States at the probed positions of all visits (made with `taps=True`): `states()` is (n, L + 1, positions, H), NaN where a position has no
    rows.
    """

    def __init__(self) -> None:
        self.clips: list[Clip] = []
        self._states: list[NDArray] = []

    def measure(self, visit: Visit) -> Record:
        """The visit's states under the hear-question."""
        model, n = visit.subject.model, len(visit.clips)
        suffix = model.suffix(question("hear"))
        out = model.extend(visit.prefix, range(n), [suffix] * n, hidden=True)
        assert visit.prefix.hidden is not None and out.hidden is not None, "the visit was made without taps"
        audio, asked = visit.prefix.kinds == Kind.AUDIO, out.kinds == Kind.QUESTION
        layers = [
            torch.stack([_mean(prefix, audio), _mean(rows, asked), rows[:, suffix.first].float()], dim=1).cpu()
            for prefix, rows in zip(visit.prefix.hidden, out.hidden, strict=True)
        ]
        return {"states": torch.stack(layers, dim=1).numpy()}

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        self._states.append(record["states"])
        self.clips += clips

    def states(self) -> NDArray:
        """See the class."""
        return np.concatenate(self._states)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over masked rows, (n, H); NaN where there are none."""
    weight = mask.float()[..., None]
    return (states.float() * weight).sum(1) / weight.sum(1)


@contextmanager
def random_weights(model: AVLLM, seed: int = 0) -> Iterator[None]:
    """Context in which the decoder's layers (not towers, embeddings or head) have weights as freshly initialised, adapter off; the trained ones
    come back after.
    """
    text_model: Any = model.text_model
    layers = text_model.layers
    saved = [p.detach().clone() for p in layers.parameters()]
    generator = torch.Generator().manual_seed(seed)
    std = text_model.config.initializer_range
    try:
        with torch.no_grad(), model.adapter_off():
            for name, p in layers.named_parameters():
                if p.ndim > 1:
                    p.copy_((torch.randn(p.shape, generator=generator) * std).to(p))
                else:
                    p.fill_(0.0 if name.endswith("bias") else 1.0)
            yield
    finally:
        with torch.no_grad():
            for p, old in zip(layers.parameters(), saved, strict=True):
                p.copy_(old)


def probe_predictions(states: NDArray, targets: Sequence[NDArray], folds: Sequence[tuple[NDArray, NDArray]], classes: int) -> list[NDArray]:
    """Cross-validated predictions (n,) for several labellings of the same states (n, H). Each clip is predicted from folds that hold nothing of it.

    A class without a training clip is never predicted; without any training clip the prediction is -1.
    """
    out = [np.full(len(states), -1) for _ in targets]
    x = states.astype(np.float64)
    for train, test in folds:
        if not len(train):
            continue
        mean, std = x[train].mean(0), x[train].std(0)
        z = (x - mean) / np.where(std > 1e-8, std, 1.0)
        if z.shape[1] > len(train):  # the training states span fewer dimensions than they have: rotate into their span, which changes no score
            z = z @ np.linalg.qr(z[train].T)[0]
        a, b = z[train], z[test]
        square = a.T @ a
        for prediction, target in zip(out, targets, strict=True):
            onehot = np.eye(classes)[target[train]]
            count = onehot.sum(0)
            means = (onehot.T @ a) / np.maximum(count, 1)[:, None]
            within = (square - (means * count[:, None]).T @ means) / len(train)
            within *= 1 - SHRINKAGE
            within[np.diag_indices_from(within)] += SHRINKAGE / (1 - SHRINKAGE) * np.trace(within) / x.shape[1] + 1e-12
            weights = np.linalg.solve(within, means.T)
            bias = np.where(count > 0, -(means * weights.T).sum(1) / 2, -np.inf)
            prediction[test] = (b @ weights + bias).argmax(1)
    return out


def probe_rows(
    features: ProbeFeatures, silent: ProbeFeatures | None, random: ProbeFeatures | None, k: int, items: ItemStore, seed: int
) -> list[Probe]:
    """One row a position and label. `silent`, `random`: the same clips, in the same order, through the model without its sound / with random
    weights.
    """
    clips = features.clips
    for control in (silent, random):
        if control is not None and [c.id for c in control.clips] != [c.id for c in clips]:
            raise ValueError("A control must be measured on the same clips in the same order.")
    names = sorted({c.audio_label for c in clips} | {c.video_label for c in clips})
    true = {"audio": np.array([names.index(c.audio_label) for c in clips]), "visual": np.array([names.index(c.video_label) for c in clips])}
    rng = np.random.default_rng(seed)
    shuffled = {label: [rng.permutation(t) for _ in range(SHUFFLES)] for label, t in true.items()}
    targets = [*true.values(), *(s for label in LABELS for s in shuffled[label])]
    folds = make_folds(clips, k)
    group = items.clips(clips)
    note = (
        f"{len(folds)} folds; no rendering and no unordered class pair is in both training and test part; "
        f"{np.mean([len(train) for train, _ in folds]):.0f} training clips a fold on average"
    )
    untaught = {label: sum(int((~np.isin(t[test], t[train])).sum()) for train, test in folds) / len(clips) for label, t in true.items()}

    def right(source: ProbeFeatures, position: int, labellings: Sequence[NDArray]) -> NDArray:
        """(n, L + 1, labellings) whether each clip is predicted right."""
        states = source.states()[:, :, position]
        layers = [probe_predictions(states[:, layer], labellings, folds, len(names)) for layer in range(states.shape[1])]
        return np.array([[p == t for p, t in zip(layer, labellings, strict=True)] for layer in layers]).transpose(2, 0, 1)

    out = []
    for p, position in enumerate(POSITIONS):
        main = right(features, p, targets)
        removed = right(silent, p, [true["audio"]])[:, :, 0] if silent is not None and position != "audio" else None
        blank = right(random, p, list(true.values())) if random is not None else None
        for i, label in enumerate(LABELS):
            keys = [Key("probe", None, None, probe_item(label, position, layer), "accuracy") for layer in range(main.shape[1])]
            accuracy = group.rates(keys, main[:, :, i])
            first = len(LABELS) + i * SHUFFLES
            controls = [main[:, :, first : first + SHUFFLES].mean(2)]  # each (n, L + 1)
            audio_removed = removed if label == "audio" else None
            if audio_removed is not None:
                controls.append(audio_removed)
            if blank is not None:
                controls.append(blank[:, :, i])
            means = np.array([control.mean(0) for control in controls])
            best = np.array(controls)[means.argmax(0), :, np.arange(main.shape[1])].T
            selectivity = group.effects([key._replace(measure="selectivity") for key in keys], main[:, :, i] - best)
            out.append(
                Probe(
                    position,
                    label,
                    accuracy,
                    means[0].tolist(),
                    None if audio_removed is None else audio_removed.mean(0).tolist(),
                    None if blank is None else blank[:, :, i].mean(0).tolist(),
                    corrected(selectivity),
                    f"{note}; {untaught[label]:.1%} of clips are of a class without training clips in their fold and count as wrong",
                )
            )
    return out
