"""One instrumented attention for every family: cuts (attention knockout) and taps (attention flow).

The function below is registered with transformers under the name `avbalance` together with a mask function of the same name, so that
padding is never ignored and a dense boolean mask always exists to cut in. What to cut or record travels *with the forward call* as the
keyword argument `instruments`, so it works in prefill and in decoding, padded and batched, under autograd, and survives gradient checkpointing.

    text_model(..., instruments=Instruments(kinds=kinds, cuts=[(Cut.at("video->emitters", 4, 8),)] * batch))

Attention knockout: Geva et al. 2023 (arXiv 2304.14767). A cut closes the direct path only; rows in between may already carry the other stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "avbalance"
CUT_TEXT = re.compile(r"^(?P<site>(?:video|audio)->[a-z+]+) (?P<start>\d+):(?P<stop>\d+)$")


class CutError(RuntimeError):
    """A cut that would not do what it says."""


class Kind(IntEnum):
    """What a position is; the kinds partition every sequence (docs/definitions.md)."""

    SYSTEM = 0  # everything before the media
    VIDEO = 1  # video tokens with their delimiters
    AUDIO = 2  # audio tokens with their delimiters
    QUESTION = 3  # every row after the media that emits no answer token
    EMITTER = 4  # rows whose output is an answer token: the last prompt row, every answer row but the last
    PAD = 5


SITES: dict[str, tuple[tuple[Kind, ...], tuple[Kind, ...]]] = {
    f"{source.name.lower()}->{name}": ((source,), target)
    for source, other in ((Kind.VIDEO, Kind.AUDIO), (Kind.AUDIO, Kind.VIDEO))
    for name, target in (
        ("emitters", (Kind.EMITTER,)),
        ("question", (Kind.QUESTION,)),
        ("question+emitters", (Kind.QUESTION, Kind.EMITTER)),
        (other.name.lower(), (other,)),
    )
}


@dataclass(frozen=True)
class Cut:
    """No information from `source` keys to `target` queries in layers [start, stop)."""

    source: tuple[Kind, ...]
    target: tuple[Kind, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if set(self.source) & set(self.target):
            raise CutError(f"A cut from {self.source} to {self.target} would cut rows from themselves.")
        if not 0 <= self.start < self.stop:
            raise CutError(f"A cut needs layers [start, stop) with 0 <= start < stop, not [{self.start}, {self.stop}).")

    @classmethod
    def at(cls, site: str, start: int, stop: int) -> Cut:
        """The cut at a named site of `SITES`."""
        if site not in SITES:
            raise CutError(f"Unknown site {site!r}; the sites are {', '.join(SITES)}.")
        return cls(*SITES[site], start, stop)

    @classmethod
    def parse(cls, text: str) -> Cut:
        """`video->emitters 4:8`, as configurations, plans and findings write the cut of layers [4, 8). Raises CutError for a text that is none."""
        match = CUT_TEXT.match(text)
        if match is None:
            raise CutError(f"{text!r} is no cut: write `site start:stop`, for instance `video->emitters 4:8`.")
        return cls.at(match["site"], int(match["start"]), int(match["stop"]))

    @property
    def text(self) -> str:
        """What `parse` reads."""
        return f"{self.site} {self.start}:{self.stop}"

    @property
    def site(self) -> str:
        """Its name in `SITES`."""
        return next(name for name, kinds in SITES.items() if kinds == (self.source, self.target))

    @property
    def cuts_media(self) -> bool:
        """Whether some query row lies in the media prefix (then the prefix must be computed under the cut)."""
        return any(kind in (Kind.SYSTEM, Kind.VIDEO, Kind.AUDIO) for kind in self.target)


Cuts = Sequence[tuple[Cut, ...]]  # one tuple a batch row


@dataclass
class FlowTap:
    """Attention mass by kind, filled during a forward pass.

    `mass[layer]`: (3, batch, 2, kinds): variant (plain, without the first-token sink, value-norm weighted), item, target (question, emitters),
    source kind. Heads are averaged (those with any such mass), then the rows of a target. Value-norm weighting multiplies a weight by ‖v‖ of its
    key (Kobayashi et al. 2020, arXiv 2004.10102; taken before the output projection).
    """

    mass: dict[int, torch.Tensor] = field(default_factory=dict)
    blocked_weight: float = 0.0  # largest weight seen on a blocked pair; the self-check asserts an exact zero

    def record(self, layer: int, kinds: torch.Tensor, query, key, value, mask, scaling: float, blocked: torch.Tensor | None) -> None:
        """Weights of the rows in this pass only: (batch, heads, rows, keys), never the square of the sequence."""
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        scores = (query @ key.transpose(2, 3) * scaling).float().masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        if blocked is not None:
            self.blocked_weight = max(self.blocked_weight, float((weights * blocked).max()))
        variants = [weights, weights.clone(), weights * value.float().norm(dim=-1)[:, :, None, :]]
        variants[1][..., 0] = 0.0
        source = torch.nn.functional.one_hot(kinds, len(Kind)).float()  # (batch, keys, kinds)
        row_kinds = kinds[:, -query.shape[2] :]
        out = torch.zeros(3, query.shape[0], 2, len(Kind))
        for v, w in enumerate(variants):
            total = w.sum(-1, keepdim=True)  # 0 in a head that looks at nothing that counts: it has no say in the mean
            w = (w / total.where(total > 0, torch.ones_like(total))).sum(1) / (total > 0).sum(1).clamp_min(1)  # (batch, rows, keys)
            by_kind = w @ source
            for t, target in enumerate((Kind.QUESTION, Kind.EMITTER)):
                rows = (row_kinds == target).float()[..., None]
                out[v, :, t] = ((by_kind * rows).sum(1) / rows.sum(1).clamp_min(1)).cpu()
        self.mass[layer] = out


def real_rows(rows: torch.Tensor) -> torch.Tensor:
    """True where rows (N, A) of answers are not padding, which repeats the first."""
    real = rows != rows[:, :1]
    real[:, :1] = True
    return real


@dataclass
class MassTap:
    """Attention mass of each example's emitters by kind of key, with gradients, filled during a forward pass without a cache.

    `mass[layer]`: (N, kinds), the mean over heads and emitters of the softmax weights, summed over the keys of a kind; sums to 1.
    layers: where. rows: (N, A) emitters as indices into the flattened (batch, rows); padding repeats the first one of the example.
    """

    layers: frozenset[int]
    rows: torch.Tensor
    mass: dict[int, torch.Tensor] = field(default_factory=dict)

    def record(self, layer: int, kinds: torch.Tensor, query, key, mask, scaling: float) -> None:
        """Weights of these rows only: (N, heads, A, keys). query: (batch, heads, rows, size); mask: (batch, 1, rows, keys), True where seen."""
        (_, heads, length, size), key_heads = query.shape, key.shape[1]
        sequence, row = self.rows // length, self.rows % length
        n, a = row.shape
        asked = query[sequence, :, row].transpose(1, 2).reshape(n, key_heads, heads // key_heads * a, size)
        own = sequence[:, 0]
        scores = (asked @ key[own].transpose(2, 3) * scaling).float().view(n, heads, a, length)
        weights = torch.softmax(scores.masked_fill(~mask[sequence, 0, row][:, None], float("-inf")), dim=-1).mean(1)
        by_kind = weights @ torch.nn.functional.one_hot(kinds[own], len(Kind)).float()  # (N, A, kinds)
        real = real_rows(self.rows).float()
        self.mass[layer] = (by_kind * real[..., None]).sum(1) / real.sum(1, keepdim=True)


@dataclass
class Instruments:
    """What one forward pass cuts and records.

    kinds: (batch, keys) kind of every key position, cached ones included; the last `rows` of it are the rows of this pass.
    cuts: one tuple of cuts a batch row, or empty. flow, mass: taps to fill, or None.
    segments: (batch, keys) 0 for the shared media prefix, 1, 2, … for the questions asked on top of it, which do not see each other; or None.
    """

    kinds: torch.Tensor
    cuts: Cuts = ()
    flow: FlowTap | None = None
    mass: MassTap | None = None
    segments: torch.Tensor | None = None
    _blocked: dict[bytes, torch.Tensor] = field(default_factory=dict, repr=False)

    def blocked(self, layer: int, rows: int, keys: int) -> torch.Tensor | None:
        """(batch, 1, rows, keys) True where this layer must not look, or None where nothing is cut."""
        if not any(self.cuts):
            return self._other_segments(rows)
        if self.kinds.shape[1] != keys or len(self.cuts) != self.kinds.shape[0]:
            raise CutError(f"A cut needs the kinds of all {keys} keys and one cut tuple a row; got {tuple(self.kinds.shape)} and {len(self.cuts)}.")
        table = torch.zeros(len(self.cuts), len(Kind), len(Kind), dtype=torch.bool)  # (batch, target kind, source kind)
        for row, cuts in enumerate(self.cuts):
            for cut in cuts:
                if cut.start <= layer < cut.stop:
                    table[row][torch.tensor(cut.target)[:, None], torch.tensor(cut.source)] = True
        if not table.any():
            return self._other_segments(rows)
        name = table.numpy().tobytes()
        if name not in self._blocked:
            pair = self.kinds[:, -rows:, None] * len(Kind) + self.kinds[:, None, :]
            flat = table.view(len(self.cuts), -1).to(pair.device)
            blocked = torch.gather(flat, 1, pair.flatten(1)).view_as(pair)[:, None]
            others = self._other_segments(rows)
            self._blocked[name] = blocked if others is None else blocked | others
        return self._blocked[name]

    def _other_segments(self, rows: int) -> torch.Tensor | None:
        if self.segments is None:
            return None
        if b"" not in self._blocked:
            query, key = self.segments[:, -rows:, None], self.segments[:, None, :]
            self._blocked[b""] = ((query != key) & (key > 0))[:, None]
        return self._blocked[b""]


@dataclass
class Packed:
    """Rows of many sequences in one pass, (1, rows, H), on top of prefixes that they share: the attention of models/reuse.py.

    A row attends to its clip's prefix, to the rows `past` of its own sequence and, causally, to the rows of its own run in this pass, under one
    softmax. Prefix keys that are blocked for a row are left out of its products, so that their weight is exactly zero; blocked rows of the
    sequence itself are masked.

    keys, values: (clips, kv heads, P, head size) of this layer. shared: rows grouped by what they see of the prefix.
    own: (runs, r) row numbers of each run, padded. allowed: (runs, 1, r, p + r) of past and own rows.
    place: (rows,) where a row is in `own`, flattened.
    past: keys and values (runs, kv heads, p, head size), or None.
    keys_only: the pass is wanted for its keys and values alone; the result is zeros.
    seen: after the pass, its keys and values, each (kv heads, rows, head size); None where the attention did not run.
    """

    keys: torch.Tensor
    values: torch.Tensor
    shared: Sequence[Shared]
    own: torch.Tensor
    allowed: torch.Tensor
    place: torch.Tensor
    past: tuple[torch.Tensor, torch.Tensor] | None = None
    keys_only: bool = False
    seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query: (1, heads, rows, head size), key and value: (1, kv heads, rows, head size). Returns (1, rows, heads, head size)."""
        key, value = key[0], value[0]
        self.seen = key, value
        (kv_heads, rows, size), groups = key.shape, query.shape[1] // key.shape[0]
        if self.keys_only:
            return query.new_zeros(1, rows, kv_heads * groups, size)
        q = (query[0] * scaling).view(kv_heads, groups, rows, size)
        # The rows of its own sequence: (runs, kv heads, groups * r, p + r).
        n, r = self.own.shape
        k, v = key[:, self.own].transpose(0, 1), value[:, self.own].transpose(0, 1)
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], 2), torch.cat([self.past[1], v], 2)
        mine = q[:, :, self.own].permute(2, 0, 1, 3, 4).reshape(n, kv_heads, groups * r, size)
        scores = (mine @ k.transpose(2, 3)).float().view(n, kv_heads, groups, r, -1)
        scores.masked_fill_(~self.allowed[:, :, None], float("-inf"))
        top, total, out = _unnormalised(scores.flatten(2, 3), v)
        top, total = (x.view(n, kv_heads, groups, r, 1).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, self.place] for x in (top, total))
        out = out.view(n, kv_heads, groups, r, size).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, self.place]
        for part in self.shared:  # merged by their logarithms' maxima, as if all keys had been in one row
            c, m = part.rows.shape
            k, v = part.of(self.keys), part.of(self.values)
            asked = q[:, :, part.rows].permute(2, 0, 1, 3, 4).reshape(c, kv_heads, groups * m, size)
            scores = (asked @ k.transpose(2, 3)).float()
            if part.hidden is not None:
                scores.masked_fill_(part.hidden[:, None, None], float("-inf"))
            a, b, o = (x.view(c, kv_heads, groups, m, -1).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, part.real] for x in _unnormalised(scores, v))
            into = part.into
            new = torch.maximum(top[:, :, into], a)
            old, add = (top[:, :, into] - new).exp(), (a - new).exp()
            out[:, :, into] = out[:, :, into] * old + o * add
            total[:, :, into] = total[:, :, into] * old + b * add
            top[:, :, into] = new
        return (out / total).to(query.dtype).flatten(0, 1).transpose(0, 1)[None]


@dataclass(frozen=True)
class Shared:
    """Rows of one pass that see the same keys of the same prefixes.

    rows: (c, m) row numbers, c clips, padded. clips: which prefixes, (c,). kept: (c, K) which of their keys, padded, or None for the first `length`.
    hidden: (c, K) True where a key is padding, or None. real: where the rows that are no padding lie in `rows`, flattened; into: their numbers.
    """

    rows: torch.Tensor
    clips: tuple[int, ...]
    kept: torch.Tensor | None
    length: int
    hidden: torch.Tensor | None
    real: torch.Tensor
    into: torch.Tensor

    def of(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys (or values) these rows see, (c, kv heads, K, head size): a view where that is possible."""
        first, last = self.clips[0], self.clips[-1]
        in_order = self.clips == tuple(range(first, last + 1))
        some = keys[first : last + 1] if in_order else keys[torch.tensor(self.clips, device=keys.device)]
        if self.kept is None:
            return some[:, :, : self.length]
        if len(self.clips) == 1:
            return some.index_select(2, self.kept[0])
        return some.gather(2, self.kept[:, None, :, None].expand(-1, some.shape[1], -1, some.shape[3]))


def _unnormalised(scores: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest score (..., rows, 1), sum of exp(score - largest), and the values (..., keys, size) weighted by these exponentials, in float32."""
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), (weights.to(value.dtype) @ value).float()


def instrumented_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, instruments: Instruments | Packed | None = None, **kwargs
):
    """SDPA with a dense boolean mask; `instruments` may block pairs and record attention mass. Shapes as in transformers."""
    if isinstance(instruments, Packed):
        return instruments.attend(query, key, value, scaling if scaling is not None else query.shape[-1] ** -0.5), None
    if instruments is not None:
        rows, keys = query.shape[2], key.shape[2]
        if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[-2:] != (rows, keys):
            raise CutError("The instrumented attention needs a dense boolean mask; load the model through models.load_model.")
        blocked = instruments.blocked(module.layer_idx, rows, keys)
        if blocked is not None:
            attention_mask = attention_mask & ~blocked
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if instruments.mass is not None and module.layer_idx in instruments.mass.layers:
            instruments.mass.record(module.layer_idx, instruments.kinds, query, key, attention_mask, scale)
        if instruments.flow is not None:
            instruments.flow.record(module.layer_idx, instruments.kinds, query, key, value, attention_mask, scale, blocked)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def dense_mask(*args, **kwargs) -> torch.Tensor:
    """`sdpa_mask` that is never skipped, so there is always a mask to cut in."""
    kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    assert mask is not None
    return mask


AttentionInterface.register(IMPLEMENTATION, instrumented_attention)
AttentionMaskInterface.register(IMPLEMENTATION, dense_mask)
