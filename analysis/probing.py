"""Probing: what the hidden states know, whatever the model says (docs/definitions.md). All of it on conflicts, where the sound's and the picture's
class are independent.

**Logit lens** (nostalgebraist 2020): hidden states at audio, question and emitter positions read through the final norm and the head. A
clip is a hit in a layer if at any of its positions of that kind the first token of a word of the true phrase ("barking" of "a dog barking")
is among the top k. The control is the same with shuffled references: the mean over all cyclic derangements of the classes, which is the
mean over all wrong classes. Emitter rows are those of the model's own greedy answer to the hear-question, so nothing true is fed in.
Audio positions are the rows that hold the sound itself; its closing delimiter, which follows all sound and picture and collects from both,
is a position of its own (`audio_end`). *Latent audio understanding* is the corrected rate of the audio label at audio positions in the layer
that is best on one half of the clips, measured on the other half; the two halves exchanged, and the same at the delimiter, stand beside it.

**Linear probes** (Alain & Bengio 2016; selectivity: Hewitt & Liang 2019): linear discriminant analysis on standardised states, pooled
covariance shrunk by `SHRINKAGE`, classes a priori equally likely. It is solved in closed form, because thousands of small probes have to be
fitted, and gives the scores of scikit-learn's LinearDiscriminantAnalysis(solver="lsqr") (tests). With a dozen clips a class, and folds that
take more of some classes than of others, it reads the organism far better than logistic or ridge regression, which then favour the classes
that are left. Positions: mean of the audio rows, closing delimiter of the sound, mean of the question rows, last prompt row, all under the
hear-question. Each label has folds of its own, so that no source of a class that has several is in both parts. Controls: the control task of
Hewitt & Liang, a random label for each source, the same in all its clips; labels shuffled clip by clip, which nobody can fit: chance; the
same model without its sound (audio label only: there are no audio rows then, and the picture is supposed to be readable without sound);
optionally the same shapes with random weights in the decoder's layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.events import event_words
from analysis.findings import Latent, Lens, Probe, Readout
from analysis.items import ItemStore, Key, latent_item, lens_item, probe_item
from analysis.statistics import corrected
from analysis.tally import Record, Tally
from analysis.visits import Subject, Visit
from data.clips import Clip
from data.questions import question
from models import AVLLM, Kind

POSITIONS = ("audio", "audio_end", "question", "last_prompt")
LENS_POSITIONS = ("audio", "audio_end", "question", "emitters")
LABELS = ("audio", "visual")
SHRINKAGE = 0.1
SHUFFLES = 3
DRAWS = 5  # of the control task
LENS_CELLS = 2**26  # logits held at a time
POOLING = "any row"  # of the position: a clip is a hit if one of them is


# ---------------------------------------------------------------- folds


def labelled(clips: Sequence[Clip], label: str) -> list[tuple[str, str]]:
    """(class, source) of each clip in the stream of this label: its recording for "audio", its picture for "visual"."""
    return [(c.audio_label, c.audio_source) if label == "audio" else (c.video_label, c.video_source) for c in clips]


def several(clips: Sequence[Clip], label: str) -> list[tuple[str, str] | None]:
    """(class, source) of each clip whose class has several sources among these clips, None for the others."""
    found = labelled(clips, label)
    count = Counter(name for name, _ in set(found))
    return [pair if count[pair[0]] > 1 else None for pair in found]


def sharing(clips: Sequence[Clip]) -> list[set[int]]:
    """For each clip the other clips that it shares a video rendering, an audio rendering or its unordered class pair with."""
    holders: dict[tuple, list[int]] = {}
    keys = [(("video", c.video_rendering), ("audio", c.audio_rendering), ("pair", *sorted((c.video_label, c.audio_label)))) for c in clips]
    for i, names in enumerate(keys):
        for name in names:
            holders.setdefault(name, []).append(i)
    return [{j for name in names for j in holders[name]} - {i} for i, names in enumerate(keys)]


def make_folds(clips: Sequence[Clip], k: int, label: str | None = None) -> list[tuple[NDArray, NDArray]]:
    """(train, test) indices of k folds in which no test clip shares a rendering or an unordered class pair with a training clip.

    Renderings are shared through grids so that usually all clips hang together, and whole groups cannot be kept in one fold. So test
    folds are *grown*: from the clip with the fewest ties, always adding the neighbour with the fewest ties to clips outside; then training
    clips that share anything with the test fold are left out of that fold. Every clip is tested exactly once. Deterministic; of 600 clips
    in 10 folds about 500 training clips remain of 540.

    label: folds for probes of this label ("audio", "visual"). Training clips that share a source with a test clip are left out too where its class
    has several sources among the clips. And no clip joins a test fold if a class there, that could be learned, would be left without a training
    clip, unless there are twice as many folds already.
    """
    ties = sharing(clips)
    classes = [name for name, _ in labelled(clips, label)] if label else []
    members = {name: {i for i, own in enumerate(classes) if own == name} for name in set(classes)}
    groups = several(clips, label) if label else []
    for i, group in enumerate(groups):
        ties[i] |= {j for j, other in enumerate(groups) if group and other == group and j != i}
    left = set(range(len(clips)))
    size = -(-len(clips) // k)
    folds: list[tuple[NDArray, NDArray]] = []
    while left:
        test: list[int] = []
        border: dict[int, int] = {}
        out, tested = set[int](), set[str]()  # what training does without, and the classes that need some of the rest

        def needs(i: int) -> set[str]:
            """The clip's class, if anything of it remains when the clip alone is tested."""
            return {classes[i]} if label and not members[classes[i]] <= ties[i] | {i} else set()

        def joins(i: int, out: set[int] = out, tested: set[str] = tested) -> bool:
            gone = out | ties[i] | {i}
            return len(folds) >= 2 * k or not any(members[name] <= gone for name in tested | needs(i))

        while left and len(test) < size:
            if near := [i for i in border if joins(i)]:
                pick = max(near, key=lambda i: (border[i] - len(ties[i] & left), -i))
            elif far := [i for i in left if joins(i)]:
                pick = min(far, key=lambda i: (len(ties[i] & left), i))
            else:
                break
            test.append(pick)
            left.discard(pick)
            border.pop(pick, None)
            out |= ties[pick] | {pick}
            tested |= needs(pick)
            for neighbour in ties[pick] & left:
                border[neighbour] = border.get(neighbour, 0) + 1
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
        reader, answers = visit.subject.reader, visit.answers("hear")
        said = [reader.names(answer, "hear") for answer in answers]
        record["said"] = [any(clip.audio_label in event for event in events) for clip, events in zip(visit.clips, said, strict=True)]
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

        def read(end: bool = False, swapped: bool = False) -> Readout:
            """The layer that is best on one half, and the corrected rate there on the other."""
            first, second = (report, choose) if swapped else (choose, report)
            hit, control = self._rates("audio_end" if end else "audio", "audio")
            layer = int(np.argmax((hit - control)[first].mean(0)))
            key = Key("latent", None, None, latent_item(end=end, swapped=swapped), "latent")
            return Readout(layer, items.clips([self.clips[i] for i in second]).means([key], (hit - control)[second, layer, None])[0])

        audio = read()
        group = items.clips([self.clips[i] for i in report])
        said = group.rates([Key("latent", None, None, "", "said")], np.array(self.said)[report, None])[0]
        return Latent(audio.layer, audio.rate, said, self.k, POOLING, read(swapped=True), read(end=True), read(end=True, swapped=True))


def sound_rows(visit: Visit) -> tuple[torch.Tensor, torch.Tensor]:
    """Which prompt rows, (n, P) each, hold the sound itself, and which is its closing delimiter. Neither where the model is given no sound.

    Kind AUDIO is both and the opening delimiter. Where picture and sound alternate, the delimiters stand around all of it, once: the closing one
    follows every frame, so what it knows of the sound is not what the sound's own rows know.
    """
    model, kinds = visit.subject.model, visit.prefix.kinds
    own = torch.zeros_like(kinds, dtype=torch.bool)
    for row, media in zip(own, visit.media, strict=True):
        ids = model.layout(media).ids
        row[: len(ids)] = (ids == model.audio_id).to(row.device)
    later = own.flip(1).cumsum(1).flip(1) > 0  # there is sound from here on
    return own, (kinds == Kind.AUDIO) & ~own & ~later


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
    """(position, states of every layer (n, rows, H), which rows (n, rows)): of the prompt's sound, and of the spoken answer to the hear-question."""
    spoken = visit.spoken("hear")
    assert visit.prefix.hidden is not None and spoken.hidden is not None, "the visit was made without taps"
    own, end = sound_rows(visit)
    yield "audio", visit.prefix.hidden, own
    yield "audio_end", visit.prefix.hidden, end
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
        (own, end), asked = sound_rows(visit), out.kinds == Kind.QUESTION
        layers = [
            torch.stack([_mean(prefix, own), _mean(prefix, end), _mean(rows, asked), rows[:, suffix.first].float()], dim=1).cpu()
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


def probe_predictions(states: NDArray, targets: Sequence[NDArray], folds: Sequence[tuple[NDArray, NDArray]]) -> list[NDArray]:
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
        a, b = z[train], z[test]
        # Rotated to the training states' principal axes, which changes no score: the scatter is diagonal there, so a labelling costs a system as
        # large as its classes are many, however many labellings there are and however wide the states.
        if a.shape[1] > len(train):
            values, turn = np.linalg.eigh(a @ a.T)
            kept = values > 1e-10 * values[-1]
            values, turn = values[kept], turn[:, kept]
            a, b = turn * np.sqrt(values), b @ (a.T @ (turn / np.sqrt(values)))
        else:
            values, turn = np.linalg.eigh(a.T @ a)
            values, a, b = values.clip(0), a @ turn, b @ turn
        floor = 1e-9 * values.sum() / (len(train) * x.shape[1]) + 1e-12  # states without any spread inside the classes
        for prediction, target in zip(out, targets, strict=True):
            order = np.argsort(target[train], kind="stable")
            found, first, count = np.unique(target[train][order], return_index=True, return_counts=True)
            means = np.add.reduceat(a[order], first) / count[:, None]
            within = (values.sum() - count @ (means**2).sum(1)) / len(train)  # trace of the pooled covariance
            diagonal = (1 - SHRINKAGE) * values / len(train) + SHRINKAGE * within / x.shape[1] + floor
            # The shrunk covariance is this diagonal less the part between the classes, u.T @ u: solved by Woodbury's formula.
            size = np.sqrt((1 - SHRINKAGE) * count / len(train))[:, None]
            scaled = size * means / diagonal
            weights = np.linalg.solve(np.eye(len(found)) - scaled @ (size * means).T, scaled) / size
            prediction[test] = found[(b @ weights.T - (means * weights).sum(1) / 2).argmax(1)]
    return out


def control_task(clips: Sequence[Clip], label: str, rng: np.random.Generator) -> list[str]:
    """A random label for each source of this label's stream, the same in all clips of the source (Hewitt & Liang 2019), one a clip.

    Each source draws on its own, with replacement, from the labels of all sources, so a label is as likely as it is among them: some labels get
    several sources, some none, and a source may by chance draw the label it has. A permutation of labels over sources would not do: where every
    class has one source it only renames the classes, and a probe reads renamed classes exactly as well.
    """
    true: dict[str, str] = {}
    for name, source in labelled(clips, label):
        true.setdefault(source, name)
    sources = sorted(true)
    drawn = rng.choice([true[source] for source in sources], size=len(sources))
    random = dict(zip(sources, map(str, drawn), strict=True))
    return [random[source] for _, source in labelled(clips, label)]


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

    def numbers(labels: Sequence[str]) -> NDArray:
        return np.array([names.index(name) for name in labels])

    true = {label: numbers([name for name, _ in labelled(clips, label)]) for label in LABELS}
    rng = np.random.default_rng(seed)
    shuffled = {label: [rng.permutation(t) for _ in range(SHUFFLES)] for label, t in true.items()}
    tasks = {label: [numbers(control_task(clips, label, rng)) for _ in range(DRAWS)] for label in LABELS}
    folds = {label: make_folds(clips, k, label) for label in LABELS}
    group = items.clips(clips)

    def right(states: NDArray, label: str, labellings: Sequence[NDArray]) -> NDArray:
        """(n, L + 1, labellings) whether each clip is predicted right."""
        layers = [probe_predictions(states[:, layer], labellings, folds[label]) for layer in range(states.shape[1])]
        return np.array([[p == t for p, t in zip(layer, labellings, strict=True)] for layer in layers]).transpose(2, 0, 1)

    out = []
    for p, position in enumerate(POSITIONS):
        states = features.states()[:, :, p]
        without, blank = (source.states()[:, :, p] if source is not None else None for source in (silent, random))
        if np.isnan(states).all():  # a prompt without a closing delimiter
            continue
        for label in LABELS:
            main = right(states, label, [true[label], *shuffled[label], *tasks[label]])
            keys = [Key("probe", None, None, probe_item(label, position, layer), "accuracy") for layer in range(main.shape[1])]
            accuracy = group.rates(keys, main[:, :, 0])
            controls = {"shuffled": main[:, :, 1 : 1 + SHUFFLES].mean(2), "control_task": main[:, :, 1 + SHUFFLES :].mean(2)}  # each (n, L + 1)
            if label == "audio" and without is not None and not np.isnan(without).all():  # without sound there are no rows of it
                controls["audio_removed"] = right(without, label, [true[label]])[:, :, 0]
            if blank is not None:
                controls["random_weights"] = right(blank, label, [true[label]])[:, :, 0]
            means = {name: control.mean(0) for name, control in controls.items()}
            best = np.array(list(means.values())).argmax(0)
            above = main[:, :, 0] - np.array(list(controls.values()))[best, :, np.arange(main.shape[1])].T
            selectivity = group.effects([key._replace(measure="selectivity") for key in keys], above)
            shown = {name: mean.tolist() for name, mean in means.items()}
            out.append(
                Probe(
                    position,
                    label,
                    accuracy,
                    shown["shuffled"],
                    shown.get("audio_removed"),
                    shown.get("random_weights"),
                    corrected(selectivity),
                    _folds_text(clips, label, folds[label], true[label], seed),
                    shown["control_task"],
                )
            )
    return out


def _folds_text(clips: Sequence[Clip], label: str, folds: Sequence[tuple[NDArray, NDArray]], true: NDArray, seed: int) -> str:
    """How clips were parted, and how the control task was drawn."""
    pairs, groups = set(labelled(clips, label)), several(clips, label)
    classes, many = len({name for name, _ in pairs}), len({group[0] for group in groups if group})
    source = "recording" if label == "audio" else "picture"
    untaught = sum(int((~np.isin(true[test], true[train])).sum()) for train, test in folds) / len(clips)
    return (
        f"{len(folds)} folds; no rendering and no unordered class pair is in both training and test part, nor, for the {many} of {classes} classes "
        f"that have several {source}s, any {source}; {np.mean([len(train) for train, _ in folds]):.0f} training clips a fold on average; "
        f"{untaught:.1%} of clips are of a class without training clips in their fold and count as wrong; control task: a random label for each of "
        f"{len({name for _, name in pairs})} {source}s, mean of {DRAWS} draws (seed {seed})"
    )
