"""Exact prefix reuse: many suffixes under many cuts on top of computed prefixes, at the cost of what the cuts can change (docs/definitions.md).

Attention is causal and a cut acts in some layers only. So a row's input to layer l depends on the tokens up to it and on what was cut for these
rows below layer l, on nothing else. Rows are taken in runs: the question rows of a suffix, and its answer rows (from the first emitter to the
last one wanted). Two jobs whose run has the same tokens, the same history of cuts and, for answer rows, a question run of the same history have
one *state* between them. Layer by layer, every distinct state is computed once:

    layer 0   clean ──────┬──────────── one state: no cut has acted yet
    layer 1   clean ──┬── cut in [1, 2)
    layer 2   clean  cut in [2, 3)  …   a cut joins at its first layer, with the clean state's rows as its input

The prefix's keys and values are shared by all rows of a clip (`attention.Packed`); nothing of one layer is kept for the next but the states.
Rows are packed without padding and pass through the layers in blocks, so memory does not grow with the number of cuts but by their rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.attention import Cut, CutError, Cuts, Kind, Packed, Shared
from models.sequences import Prefix, Suffix

MEDIA = (1 << Kind.SYSTEM) | (1 << Kind.VIDEO) | (1 << Kind.AUDIO)
Ints = NDArray[np.int64]


@dataclass
class Runs:
    """The distinct runs of one stage. Flat tables hold the rows of all runs one after the other; run i has rows [start[i], start[i] + length[i]).

    ids, kinds, positions, run: (rows,). clip, length, start: (runs,). of: (jobs,) the run of each job. signature: (jobs, layers) what is cut there,
    index into `blocked`: (signatures, kinds) for a row of each kind the bits of the kinds that it must not see.
    """

    ids: Ints
    kinds: Ints
    positions: Ints
    clip: Ints
    length: Ints
    start: Ints
    of: Ints
    signature: Ints
    blocked: Ints

    @classmethod
    def make(cls, jobs: Sequence[tuple[int, bytes, bytes, int]], cuts: Cuts, first_position: Ints, layers: int) -> Runs:
        """From (clip, ids, kinds, offset after the prefix) of every job's run, as bytes of int64."""
        index = {job: i for i, job in enumerate(sorted(set(jobs)))}
        ids = [np.frombuffer(job[1], dtype=np.int64) for job in index]
        kinds = [np.frombuffer(job[2], dtype=np.int64) for job in index]
        length = np.array([len(i) for i in ids])
        clip = np.array([job[0] for job in index])
        signatures: dict[tuple[int, ...], int] = {(0,) * len(Kind): 0}
        known: dict[tuple[tuple[Cut, ...], bytes], list[int]] = {}
        rows = []
        for job, cut in zip(jobs, cuts, strict=True):
            if (cut, job[2]) not in known:
                present = set(np.frombuffer(job[2], dtype=np.int64).tolist())
                said = []
                for layer in range(layers):
                    bits = [0] * len(Kind)
                    for c in cut:
                        if c.start <= layer < c.stop:
                            for target in present.intersection(c.target):
                                bits[target] |= sum(1 << source for source in c.source)
                    said.append(signatures.setdefault(tuple(bits), len(signatures)))
                known[cut, job[2]] = said
            rows.append(known[cut, job[2]])
        offsets = [first_position[job[0]] + job[3] + np.arange(n) for job, n in zip(index, length, strict=True)]
        return cls(
            np.concatenate(ids),
            np.concatenate(kinds),
            np.concatenate(offsets),
            clip,
            length,
            np.cumsum(length) - length,
            np.array([index[job] for job in jobs]),
            np.array(rows),
            np.array(list(signatures)),
        )


class States:
    """The distinct states of a stage at the input of a layer: which run each belongs to, and which state each job is in."""

    def __init__(self, runs: Runs, run: Ints, of: Ints):
        self.runs, self.run, self.of = runs, run, of
        self.length = runs.length[run]
        self.start = np.cumsum(self.length) - self.length

    @property
    def rows(self) -> int:
        return int(self.length.sum())

    def step(self, layer: int | None, above: States | None) -> tuple[States, Ints, Ints, Ints | None]:
        """The states after `layer` (None: not split by cuts), and for each the state before, its signature and its question state before."""
        signature = self.runs.signature[:, layer] if layer is not None else np.zeros_like(self.of)
        key = self.of * len(self.runs.blocked) + signature
        if above is not None:
            key = key * len(above.run) + above.of
        _, first, of = np.unique(key, return_index=True, return_inverse=True)
        before = self.of[first]
        return States(self.runs, self.run[before], of), before, signature[first], above.of[first] if above is not None else None


def spread(start: Ints, length: Ints) -> Ints:
    """start[i], start[i] + 1, …, start[i] + length[i] - 1 for every i, one after the other."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(int(length.sum()))


def padded(start: Ints, length: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The same as rows of one array (n, longest), with where they are real; padding repeats a row's first number."""
    steps = np.arange(int(length.max(initial=0)))
    real = steps < length[:, None]
    return np.where(real, start[:, None] + steps, start[:, None]), real


class Rows:
    """Rows (rows, H) in parts, given away in order: a part is let go when all that is asked for lies beyond it."""

    def __init__(self, *parts: torch.Tensor):
        self.parts: deque[tuple[int, torch.Tensor]] = deque()
        self.length = 0
        for part in parts:
            self.add(part)

    def add(self, part: torch.Tensor) -> None:
        """Rows after those that are there."""
        self.parts.append((self.length, part))
        self.length += len(part)

    def take(self, numbers: Ints) -> torch.Tensor:
        """These rows; the smallest number must not fall from one call to the next."""
        low, high = int(numbers.min()), int(numbers.max())
        while self.parts[0][0] + len(self.parts[0][1]) <= low:
            self.parts.popleft()
        some = [part for start, part in self.parts if start <= high]
        return torch.cat(some)[torch.as_tensor(numbers - self.parts[0][0], device=some[0].device)]


def block_rows(text_model: Any, keys: int) -> int:
    """How many rows go through a layer at once, so that what is made on the way (inside the feed-forward; scores over `keys` keys) stays small."""
    config = text_model.config
    elements = 3 << (18 if text_model.embed_tokens.weight.device.type == "cpu" else 22)
    return min(max(elements // max(config.intermediate_size, config.num_attention_heads * keys), 64), 8192)


class Reuse:
    """Jobs on a prefix: job i runs `suffixes[i]` on prefix row `which[i]` under `cuts[i]`. Rows after the last wanted emitter are left out.

    further: how many rows a job may be decoded after these.
    """

    def __init__(self, text_model: Any, prefix: Prefix, which: Sequence[int], suffixes: Sequence[Suffix], cuts: Cuts, further: int = 0):
        self.text_model, self.prefix, self.layers = text_model, prefix, len(text_model.layers)
        self.device = prefix.kinds.device
        self.clip = np.array(list(which))
        self.kinds = prefix.kinds.cpu().numpy()
        self.prefix_length = (self.kinds != Kind.PAD).sum(1)
        self.position = prefix.next_position.cpu().numpy()
        self._kept: dict[tuple[int, int], Ints] = {}
        parts: dict[int, tuple[bytes, bytes, bytes, bytes, int]] = {}
        for suffix in suffixes:
            if id(suffix) not in parts:
                ids, kinds, first = suffix.ids.numpy(), suffix.kinds.numpy().astype(np.int64), suffix.first
                stop = first + max(1, len(suffix.targets))
                parts[id(suffix)] = (
                    ids[:first].tobytes(), kinds[:first].tobytes(), ids[first:stop].tobytes(), kinds[first:stop].tobytes(), first
                )  # fmt: skip
        mine = [parts[id(suffix)] for suffix in suffixes]
        self.question = Runs.make([(c, p[0], p[1], 0) for c, p in zip(which, mine, strict=True)], cuts, self.position, self.layers)
        self.answer = Runs.make([(c, p[2], p[3], p[4]) for c, p in zip(which, mine, strict=True)], cuts, self.position, self.layers)
        last = int(max(self.question.positions.max(initial=0), self.answer.positions.max())) + 1
        self._rotate(last + further)
        self.block = block_rows(text_model, self.kinds.shape[1])

    def _rotate(self, length: int) -> None:
        place = torch.arange(length, device=self.device)
        like = self.text_model.embed_tokens.weight[:1]
        cos, sin = self.text_model.rotary_emb(like, place.expand(3, 1, -1))
        self.cos, self.sin = cos[0], sin[0]

    def tensor(self, array) -> torch.Tensor:
        """On the model's device."""
        return torch.as_tensor(array, device=self.device)

    # ---------------------------------------------------------------- what rows see of a prefix

    def kept(self, clip: int, bits: int) -> Ints:
        """Prefix keys of `clip` left when the kinds in `bits` are blocked."""
        if (clip, bits) not in self._kept:
            kinds = self.kinds[clip, : self.prefix_length[clip]]
            self._kept[clip, bits] = np.flatnonzero(((bits >> kinds) & 1) == 0)
        return self._kept[clip, bits]

    def shared(self, clip: Ints, bits: Ints) -> list[Shared]:
        """Rows, given their clips and blocked kinds, grouped so that each group is one product and little of it is padding."""
        key, of = np.unique(clip * (MEDIA + 1) + (bits & MEDIA), return_inverse=True)
        order = np.argsort(of, kind="stable")
        counts = np.bincount(of, minlength=len(key))
        rows = np.split(order, np.cumsum(counts)[:-1])
        groups = []
        for k, mine in zip(key.tolist(), rows, strict=True):
            c, b = divmod(k, MEDIA + 1)
            keys = int(self.prefix_length[c]) if b == 0 else len(self.kept(c, b))
            if keys:
                groups.append((b != 0, len(mine), keys, c, b, mine))
        groups.sort(key=lambda g: (g[0], g[1], g[2], g[3]))
        out: list[Shared] = []
        batch: list[tuple[bool, int, int, int, int, Ints]] = []
        real = 0
        for group in groups:
            n, m, cost = len(batch) + 1, group[1], group[1] * group[2]
            most = max([group[2], *(g[2] for g in batch)])
            wasteful = n * m * most > 1.5 * (real + cost) or n * (m + 8) * most > 1 << 18
            if batch and (batch[0][0] != group[0] or wasteful):
                out.append(self._group(batch))
                batch, real = [], 0
            batch.append(group)
            real += cost
        if batch:
            out.append(self._group(batch))
        return out

    def _group(self, batch) -> Shared:
        batch = sorted(batch, key=lambda g: g[3])
        m, most = max(g[1] for g in batch), max(g[2] for g in batch)
        rows = np.stack([np.pad(g[5], (0, m - g[1]), mode="edge") for g in batch])
        real = np.concatenate([i * m + np.arange(g[1]) for i, g in enumerate(batch)])
        lengths = np.array([g[2] for g in batch])
        hidden = np.arange(most) >= lengths[:, None]
        kept = np.stack([np.pad(self.kept(g[3], g[4]), (0, most - g[2])) for g in batch]) if batch[0][0] else None
        return Shared(
            self.tensor(rows),
            tuple(g[3] for g in batch),
            self.tensor(kept) if kept is not None else None,
            most,
            self.tensor(hidden) if hidden.any() else None,
            self.tensor(real),
            self.tensor(rows.ravel()[real]),
        )

    # ---------------------------------------------------------------- layers

    def layer(self, index: int, hidden: torch.Tensor, positions: Ints, packed: Packed) -> torch.Tensor:
        """One decoder layer on packed rows (rows, H). Raises CutError where its attention is not the instrumented one."""
        place = self.tensor(positions)
        layer = self.text_model.layers[index]
        inputs = {"position_embeddings": (self.cos[place][None], self.sin[place][None]), "attention_mask": None, "instruments": packed}
        if packed.keys_only:
            layer.self_attn(hidden_states=layer.input_layernorm(hidden[None]), **inputs)
        else:
            hidden = layer(hidden[None], **inputs)[0]
        if packed.seen is None:
            raise CutError(f"The instrumented attention did not run in layer {index}: something replaced it. Use models.load_model.")
        return hidden

    def pass_stage(
        self, index: int, hidden: Rows, states: States, above: States | None, above_seen, keys_only: bool, keep: bool
    ) -> tuple[States, Rows, tuple[torch.Tensor, torch.Tensor] | None, Ints]:
        """All states of a stage through one layer. Returns the states after it, their rows, their keys and values if `keep`, and for each state
        before one state after it (they have the same keys)."""
        runs = states.runs
        after, before, signature, question = states.step(None if keys_only else index, above)
        rows_in, rows_run = spread(states.start[before], after.length), spread(runs.start[after.run], after.length)
        kinds = runs.kinds[rows_run]
        bits = runs.blocked[np.repeat(signature, after.length), kinds]
        clips = np.repeat(runs.clip[after.run], after.length)
        out = Rows()
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        edges = [0]
        ends = np.cumsum(after.length)
        while edges[-1] < len(after.run):
            done = int(after.start[edges[-1]])
            edges.append(max(edges[-1] + 1, int(np.searchsorted(ends, done + self.block, side="right"))))
        for a, b in pairwise(edges):
            lo, hi = int(after.start[a]), int(ends[b - 1])
            own, real = padded(after.start[a:b] - lo, after.length[a:b])
            steps = np.arange(own.shape[1])
            seeing = (steps[:, None] >= steps) & real[:, None, :]  # (runs, r, r)
            row_bits = bits[lo:hi][own]
            seeing = seeing & ~((row_bits[:, :, None] >> kinds[lo:hi][own][:, None, :]) & 1).astype(bool)
            past = None
            if question is not None and above_seen is not None:
                assert above is not None
                asked = question[a:b]
                at, there = padded(above.start[asked], above.length[asked])
                run = padded(above.runs.start[above.run[asked]], above.length[asked])[0]
                earlier = there[:, None, :] & ~((row_bits[:, :, None] >> above.runs.kinds[run][:, None, :]) & 1).astype(bool)
                seeing = np.concatenate([earlier, seeing], 2)
                which = self.tensor(at)
                past = above_seen[0][:, which].transpose(0, 1), above_seen[1][:, which].transpose(0, 1)
            steps_of = spread(np.zeros(b - a, dtype=np.int64), after.length[a:b])
            place = np.repeat(np.arange(b - a), after.length[a:b]) * own.shape[1] + steps_of
            packed = Packed(
                self.prefix.keys[index],
                self.prefix.values[index],
                () if keys_only else self.shared(clips[lo:hi], bits[lo:hi]),
                self.tensor(own),
                self.tensor(seeing)[:, None],
                self.tensor(place),
                past,
                keys_only,
            )
            out.add(self.layer(index, hidden.take(rows_in[lo:hi]), runs.positions[rows_run[lo:hi]], packed))
            if keep and packed.seen is not None:
                seen.append(packed.seen)
        child = np.zeros(len(states.run), dtype=np.int64)
        child[before[::-1]] = np.arange(len(before))[::-1]
        kept = (torch.cat([k for k, _ in seen], 1), torch.cat([v for _, v in seen], 1)) if keep else None
        return after, out, kept, child

    def run(self, keep: bool = False) -> tuple[States, torch.Tensor, list[_Layer]]:
        """Every job through every layer. Returns the final answer states, their rows before the final norm (rows, H) and, if `keep`, what decoding
        needs of each layer."""
        question, answer = (States(r, np.arange(len(r.length)), r.of) for r in (self.question, self.answer))
        embed = self.text_model.embed_tokens
        asked, said = Rows(embed(self.tensor(self.question.ids))), Rows(embed(self.tensor(self.answer.ids)))
        kept: list[_Layer] = []
        for index in range(self.layers):
            seen, above = None, question
            if question.rows:
                above_after, asked, seen, child = self.pass_stage(index, asked, question, None, None, index == self.layers - 1, True)
                assert seen is not None
                # The keys of a state before the layer are those of any state it became.
                above = _renumbered(question, above_after.start[child])
                question = above_after
            answer_after, said, mine, _ = self.pass_stage(index, said, answer, above, seen, False, keep)
            if keep:
                kept.append(_Layer(above, seen, answer_after, mine))
            answer = answer_after
        return answer, torch.cat([rows for _, rows in said.parts]), kept


@dataclass
class _Layer:
    """Question states before a layer with keys and values; answer states after it with theirs."""

    question: States
    question_seen: tuple[torch.Tensor, torch.Tensor] | None
    answer: States
    answer_seen: tuple[torch.Tensor, torch.Tensor] | None


def _renumbered(states: States, start: Ints) -> States:
    """The same states with their rows elsewhere."""
    out = States(states.runs, states.run, states.of)
    out.start = start
    return out


class Decoding:
    """Decoding of all jobs at once, one row a job and step. `states`: (jobs, H) rows before the final norm whose output is the next token.

    Jobs that must say the same (same clip, question and cuts that matter) are decoded once; `of` maps the given jobs to these.
    """

    def __init__(self, reuse: Reuse, steps: int):
        self.reuse = reuse
        question, answer = reuse.question, reuse.answer
        told = np.concatenate([question.of[:, None], answer.of[:, None], question.signature[:, :-1], answer.signature], axis=1)
        _, self.jobs, self.of = np.unique(told, axis=0, return_index=True, return_inverse=True)
        self.of = self.of.reshape(-1)
        final, rows, self.layers = reuse.run(keep=True)
        self.states = rows[reuse.tensor(final.start[final.of[self.jobs]])]
        self.said = 0
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in self.layers:
            assert layer.answer_seen is not None
            at = reuse.tensor(layer.answer.start[layer.answer.of[self.jobs]])
            pair = []
            for seen in layer.answer_seen:
                room = seen.new_empty(len(self.jobs), seen.shape[0], max(steps, 1), seen.shape[2])
                room[:, :, 0] = seen[:, at].transpose(0, 1)
                pair.append(room)
            self.own.append((pair[0], pair[1]))
            layer.answer_seen = None
        self._plan()

    def _plan(self) -> None:
        reuse, jobs = self.reuse, self.jobs
        self.position = reuse.answer.positions[reuse.answer.start[reuse.answer.of[jobs]]]
        self.shared: list[list[Shared]] = []
        self.asked: list[torch.Tensor] = []
        self.allowed: list[torch.Tensor] = []
        known: dict[bytes, tuple[list[Shared], NDArray[np.int64]]] = {}
        for index, layer in enumerate(self.layers):
            bits = reuse.answer.blocked[reuse.answer.signature[jobs, index], int(Kind.EMITTER)]
            if bits.tobytes() not in known:
                known[bits.tobytes()] = (reuse.shared(reuse.clip[jobs], bits), bits)
            self.shared.append(known[bits.tobytes()][0])
            states = layer.question.of[jobs]
            at, there = padded(layer.question.start[states], layer.question.length[states])
            run = padded(reuse.question.start[layer.question.run[states]], layer.question.length[states])[0]
            open_ = there & (((bits[:, None] >> reuse.question.kinds[run]) & 1) == 0) if at.shape[1] else there
            self.asked.append(reuse.tensor(at))
            self.allowed.append(reuse.tensor(open_)[:, None, None])

    def keep(self, index: Sequence[int]) -> None:
        """Go on with these jobs only, numbers into the present ones."""
        chosen = self.reuse.tensor(list(index))
        self.jobs = self.jobs[list(index)]
        self.states = self.states[chosen]
        self.own = [(k[chosen], v[chosen]) for k, v in self.own]
        self._plan()

    def feed(self, tokens: torch.Tensor) -> None:
        """Every job says its token, (jobs,); `states` move on."""
        reuse, n = self.reuse, len(self.jobs)
        self.said += 1
        hidden = reuse.text_model.embed_tokens(tokens)
        every = torch.arange(n, device=reuse.device)
        for index, layer in enumerate(self.layers):
            past = [room[:, :, : self.said] for room in self.own[index]]
            if layer.question_seen is not None:
                past = [torch.cat([seen[:, self.asked[index]].transpose(0, 1), p], 2) for seen, p in zip(layer.question_seen, past, strict=True)]
            allowed = torch.cat([self.allowed[index], self.allowed[index].new_ones(n, 1, 1, self.said + 1)], 3)
            packed = Packed(
                reuse.prefix.keys[index], reuse.prefix.values[index], self.shared[index], every[:, None], allowed, every, (past[0], past[1])
            )
            hidden = reuse.layer(index, hidden, self.position + self.said, packed)
            assert packed.seen is not None
            for room, new in zip(self.own[index], packed.seen, strict=True):
                if self.said < room.shape[2]:
                    room[:, :, self.said] = new.transpose(0, 1)
        self.states = hidden
