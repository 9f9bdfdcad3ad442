"""Tuned lens (Belrose et al. 2023, arXiv 2303.08112): the logit lens after an affine map of each layer's states (docs/definitions.md).

What a layer knows may be written in other directions than the head reads. So each layer l gets its own map h -> h + A h + b into the space of
the last layer, followed by the final norm and the head, such that KL(final output ‖ lens) is small. The last layer's map is the identity.

    fit = TunedLensFit(subject, conflicts)      # one half of the conflicts: a few rows of each are kept
    for visit in visits: fit.add(visit)
    lens = fit.fit()
    tally = TunedTally(subject, lens)           # the other half: no shared rendering or class pair
    for visit in visits_of(fit.report): tally.add(visit)
    findings.tuned = tally.tuned(items)

The start is a ridge regression of the last layer's states on this layer's, every row weighted by 1 / mean square of the last layer's state (which
is what the final norm makes of its errors), its penalty chosen on every fifth of the fitting clips; then Adam on the KL, kept only as long
as those clips gain. Where neither gains anything the map is the identity. Deterministic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.findings import Latent, Readout, Tuned
from analysis.items import ItemStore, Key, latent_item, tuned_item
from analysis.probing import LENS_CELLS, LENS_POSITIONS, POOLING, LensTally, halves, lens_hits, lens_states, word_table
from analysis.tally import Record, Tally
from analysis.visits import Subject, Visit
from data.clips import Clip
from models import AVLLM

ROWS = 8  # rows a clip and position; the closing delimiter of the sound is one
STATE_CELLS = 2**28  # numbers kept for the fit; with more clips or a larger model fewer rows a clip
PENALTIES = (1e-5, 1e-3, 1e-1, 10.0)  # of the ridge regression, in units of each input's own sum of squares
HELD_OUT = 5  # every fifth fitting clip chooses the penalty and when to stop
STEPS, CHECK, BATCH, RATE = 60, 10, 256, 0.2  # Adam: the rate is RATE / H, in units of the states' standard deviations


@dataclass(frozen=True)
class TunedLens:
    """weight: (L, H, H), bias: (L, H), float32, of states 0 (embeddings) to L - 1; the last layer's, L, are read as they are.

    `fitted_on`: ids of the clips; `rows`: how many states of them in each layer; `layer`: where the sound's words were read best at the sound's own
    rows on the fifth of them that chose when to stop, `end_layer`: at its closing delimiter.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    fitted_on: tuple[str, ...]
    rows: int
    layer: int
    end_layer: int = 0

    def states(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """States (..., H) of a layer in the space of the last layer's, same dtype."""
        if layer == len(self.weight):
            return states
        h = states.float()
        return (h + h @ self.weight[layer].to(h.device).T + self.bias[layer].to(h.device)).to(states.dtype)

    def logits(self, model: AVLLM, states: torch.Tensor, layer: int) -> torch.Tensor:
        """Logits (..., V) of a layer's states (..., H), index 0 the embeddings."""
        return model.lens(self.states(states, layer))

    def record(self) -> Record:
        """As a record (analysis/tally.py), which `of_record` reads."""
        arrays = {"weight": self.weight.cpu().numpy(), "bias": self.bias.cpu().numpy()}
        return {**arrays, "fitted_on": list(self.fitted_on), "rows": self.rows, "layer": self.layer, "end_layer": self.end_layer}

    @classmethod
    def of_record(cls, record: Record) -> TunedLens:
        """What `record` made, on the CPU."""
        weight, bias = torch.from_numpy(record["weight"]), torch.from_numpy(record["bias"])
        return cls(weight, bias, tuple(record["fitted_on"]), record["rows"], record["layer"], record["end_layer"])


def sampled(visit: Visit, rows: int, chosen: Sequence[int]) -> tuple[NDArray, NDArray, torch.Tensor]:
    """Clip (R,) and position (R,) of at most `rows` evenly spaced rows a position of the visit's clips `chosen`, and their states (R, L + 1, H).

    Positions are indices into LENS_POSITIONS: the sound's own rows, its closing delimiter, the question, the emitters.
    """
    clip, position, states = list[int](), list[int](), list[torch.Tensor]()
    for p, (_, layers, mask) in enumerate(lens_states(visit)):
        for c in chosen:
            there = mask[c].nonzero()[:, 0]
            if len(there):
                picked = there[np.unique(np.linspace(0, len(there) - 1, min(rows, len(there))).round().astype(int))]
                states.append(torch.stack([x[c, picked] for x in layers], dim=1))
                clip += [c] * len(picked)
                position += [p] * len(picked)
    if not states:
        first = next(lens_states(visit))[1]
        states = [first[0].new_zeros(0, len(first), first[0].shape[-1])]
    return np.array(clip, dtype=int), np.array(position, dtype=int), torch.cat(states)


def divergence(model: AVLLM, final: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """KL(output of the last layer's states ‖ lens of `states`), both (rows, H), in nats, (rows,)."""
    target, own = model.lens(final.to(model.dtype)).float().log_softmax(-1), model.lens(states.to(model.dtype)).float().log_softmax(-1)
    return (target.exp() * (target - own)).sum(-1)


def chunks(model: AVLLM, rows: int) -> Iterator[slice]:
    """Slices of so many rows that their logits, twice, stay within LENS_CELLS."""
    step = max(1, LENS_CELLS // 2 // model.head.weight.shape[0])
    for start in range(0, rows, step):
        yield slice(start, start + step)


@torch.no_grad()
def divergences(model: AVLLM, final: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`divergence` of many rows, a chunk at a time."""
    return torch.cat([divergence(model, final[part], states[part]) for part in chunks(model, len(final))])


class TunedLensFit(Tally):
    """States to fit a tuned lens on, from visits of conflicts (made with `taps=True`). `clips`: all conflicts that will be visited, in this order.

    Nothing is kept of the half that is reported on (`report`). `rows`: at most so many rows a clip and position.
    """

    def __init__(self, subject: Subject, clips: Sequence[Clip], k: int = 5, rows: int = ROWS):
        choose, report = halves(clips)
        self.subject, self.k = subject, k
        self.fitting, self.report = {clips[i].id for i in choose}, [clips[i] for i in report]
        cells = (subject.model.n_layers + 1) * subject.model.hidden_size * max(1, len(choose))
        self.rows = max(1, min(rows, (STATE_CELLS // cells - 1) // (len(LENS_POSITIONS) - 1)))  # one row is the delimiter
        self.clips: list[Clip] = []
        self._parts: list[tuple[NDArray, NDArray, NDArray]] = []

    def depends(self, clips: Sequence[Clip], start: int) -> Any:
        """How many rows are kept, and of which clips."""
        return self.rows, [clip.id in self.fitting for clip in clips]

    def measure(self, visit: Visit) -> Record:
        """States of the visit's fitting clips: `clip`, an index into the visit, and `position` (R,), `states` (R, L + 1, H)."""
        mine = [c for c, clip in enumerate(visit.clips) if clip.id in self.fitting]
        clip, position, states = sampled(visit, self.rows, mine)
        return {"clip": clip, "position": position, "states": states.float().cpu().numpy()}

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        """See Tally."""
        self._parts.append((record["clip"] + len(self.clips), record["position"], record["states"]))
        self.clips += clips

    def fit(self) -> TunedLens | None:
        """The lens, or None where there are too few clips for a half to fit on, with some of it held out, and a half to report on."""
        if not self._parts or not self.report:
            return None
        model = self.subject.model
        clip, position, array = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.lexsort((position, clip))  # not as the visits happened to be cut
        clip, position, array = clip[order], position[order], array[order]
        used = np.unique(clip)
        if len(used) < 2:
            return None
        held = np.isin(clip, used[::HELD_OUT])
        states, chooses = torch.from_numpy(array).to(model.device), torch.from_numpy(held).to(model.device)
        maps = [fit_layer(model, states[:, layer], states[:, -1], chooses) for layer in range(states.shape[1] - 1)]
        lens = TunedLens(torch.stack([w for w, _ in maps]), torch.stack([b for _, b in maps]), tuple(self.clips[c].id for c in used), len(clip), 0)
        layer, end = (self._best_layer(lens, clip[held], position[held], states[chooses], at) for at in ("audio", "audio_end"))
        return replace(lens, layer=layer, end_layer=end)

    def _best_layer(self, lens: TunedLens, clip: NDArray, position: NDArray, states: torch.Tensor, at: str) -> int:
        """Where the true sound's words are in the top k at the rows `at` a position most often, above the mean over the wrong classes."""
        model, audio = self.subject.model, position == LENS_POSITIONS.index(at)
        table = {"audio": word_table(self.subject)["audio"]}

        def read(x: torch.Tensor, layer: int) -> torch.Tensor:
            return lens.logits(model, x.to(model.dtype), layer)

        names, mine = list(self.subject.labels), np.unique(clip[audio])
        true = np.array([names.index(self.clips[c].audio_label) for c in mine])
        groups = [torch.from_numpy(np.flatnonzero(audio & (clip == c))) for c in mine]
        padded = torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-1).to(states.device)
        corrected = []
        for layer in range(states.shape[1]):
            seen = lens_hits(read, layer, states[padded, layer], padded >= 0, table, self.k)["audio"].astype(float)
            hit = seen[np.arange(len(mine)), true]
            corrected.append((hit - (seen.sum(1) - hit) / max(1, len(names) - 1)).mean())
        return int(np.argmax(corrected))


def fit_layer(model: AVLLM, x: torch.Tensor, y: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (H, H) and b (H,) from states of a layer and of the last one, both (rows, H) float32; the rows `held` choose, the others are fitted."""
    fitted = ~held

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> float:
        return float(divergences(model, y[held], x[held] + x[held] @ weight.T + bias).mean())

    size = x.shape[1]
    starts = [(x.new_zeros(size, size), x.new_zeros(size)), *ridge(x[fitted], y[fitted])]
    losses = [loss(*start) for start in starts]
    best = int(np.argmin(losses))
    return descend(model, x[fitted], y[fitted], *starts[best], loss, losses[best])


def ridge(x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, b) for each of PENALTIES: weighted least squares of y - x on x, so that a large penalty leaves x where it is but for a shift."""
    x, y = x.double(), y.double()
    weight = 1 / y.pow(2).mean(1, keepdim=True)
    weight = weight / weight.sum()
    mean_x, mean_y = (weight * x).sum(0), (weight * y).sum(0)
    centred = x - mean_x
    square = centred.T @ (weight * centred)
    cross = centred.T @ (weight * (y - mean_y - centred))
    variance = square.diagonal()
    scale = torch.diag(variance + 1e-9 * variance.mean() + torch.finfo(x.dtype).tiny)
    out = []
    for penalty in PENALTIES:
        a = torch.linalg.solve(square + penalty * scale, cross).T
        out.append((a.float(), (mean_y - mean_x - a @ mean_x).float()))
    return out


def descend(model: AVLLM, x, y, weight, bias, loss, start: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam on the KL from (weight, bias) on, whose `loss` on the held-out rows is `start`; the best of the checked steps, `start` included.

    It moves a map of standardised states, in units of the last layer's standard deviations, because some dimensions of real models are a
    thousand times as large as others.
    """
    mean, spread, unit = x.mean(0), x.std(0, correction=0).clamp_min(1e-6), y.std(0, correction=0)
    z, base = (x - mean) / spread, x + x @ weight.T + bias
    turn, shift = torch.zeros_like(weight, requires_grad=True), torch.zeros_like(bias, requires_grad=True)
    optimizer = torch.optim.Adam([turn, shift], lr=RATE / len(bias))
    generator = torch.Generator().manual_seed(0)
    best = (weight, bias)
    with torch.enable_grad():
        for step in range(1, STEPS + 1):
            batch = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
            moved = base[batch] + unit * (z[batch] @ turn.T + shift)
            slope = torch.zeros_like(base[batch])
            for part in chunks(model, len(batch)):  # first down to the states, a chunk of logits at a time, then on to the map
                leaf = moved[part].detach().requires_grad_()
                slope[part] = torch.autograd.grad(divergence(model, y[batch[part]], leaf).sum() / len(batch), leaf)[0]
            turn.grad, shift.grad = torch.autograd.grad(moved, (turn, shift), slope)
            optimizer.step()
            if step % CHECK == 0:
                change = (unit[:, None] * turn / spread).detach()
                now = (weight + change, bias + (unit * shift).detach() - change @ mean)
                reached = loss(*now)
                if reached < start:
                    start, best = reached, now
    return best


class TunedTally(LensTally):
    """What a tuned lens reads in conflicts that it was not fitted on (visits made with `taps=True`), and how far it is from the final output."""

    def __init__(self, subject: Subject, lens: TunedLens, k: int = 5, rows: int = ROWS):
        model = subject.model
        super().__init__(subject, k, lambda states, layer: lens.logits(model, states, layer), "tuned")
        self.lens, self.sample = lens, rows
        self._divergence: list[NDArray] = []

    def depends(self, clips: Sequence[Clip], start: int) -> str:
        """The fitted maps."""
        digest = hashlib.sha256()
        for part in (self.lens.weight, self.lens.bias):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def measure(self, visit: Visit) -> Record:
        """Hits as in LensTally; `divergence` (n, 2, L + 1): mean KL of the logit lens and of the tuned one over a clip's evenly spaced rows.

        Raises ValueError for a clip that the lens was fitted on.
        """
        if known := {clip.id for clip in visit.clips} & set(self.lens.fitted_on):
            raise ValueError(f"The tuned lens was fitted on {min(known)}: it can only be reported on other clips.")
        model = visit.subject.model
        clip, _, states = sampled(visit, self.sample, range(len(visit.clips)))
        final = states[:, -1]
        out = np.zeros((len(visit.clips), 2, states.shape[1]))
        for layer in range(states.shape[1]):
            for which, x in enumerate((states[:, layer], self.lens.states(states[:, layer], layer))):
                kl = divergences(model, final, x).double().cpu().numpy()
                out[:, which, layer] = np.bincount(clip, kl, len(visit.clips)) / np.bincount(clip, minlength=len(visit.clips))
        return {**super().measure(visit), "divergence": out}

    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        """See Tally."""
        super().take(clips, condition, record)
        self._divergence.append(record["divergence"])

    def tuned(self, items: ItemStore) -> Tuned:
        """Everything about the tuned lens; *latent audio understanding* is read in the layer that was best on the clips it was fitted on."""
        group = items.clips(self.clips)
        before, after = (
            group.means([Key("tuned", None, None, tuned_item(layer), name) for layer in range(kl.shape[1])], kl)
            for name, kl in zip(("kl_before", "kl_after"), np.concatenate(self._divergence).transpose(1, 0, 2), strict=True)
        )

        def read(layer: int, end: bool) -> Readout:
            hit, control = self._rates("audio_end" if end else "audio", "audio")
            key = Key("latent", None, None, latent_item(tuned=True, end=end), "latent")
            return Readout(layer, group.means([key], (hit - control)[:, layer, None])[0])

        audio, end = read(self.lens.layer, False), read(self.lens.end_layer, True)
        said = group.rates([Key("latent", None, None, latent_item(tuned=True), "said")], np.array(self.said)[:, None])[0]
        latent = Latent(audio.layer, audio.rate, said, self.k, POOLING, end=end)
        return Tuned(len(self.lens.fitted_on), self.lens.rows, before, after, self.rows(items), latent)
