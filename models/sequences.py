"""What goes through an audio-visual LLM and what comes out: streams, prompts, batches, prefixes, answers, and the decoder that all of it passes.

models/avllm.py makes these of clips and questions. Everything is padded on the right; padding has kind PAD and is never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from models.attention import Cuts, Instruments, MassTap, real_rows


@dataclass(frozen=True)
class StreamFeatures:
    """What the frozen tower made of one stream. features: (tokens, hidden). size: (t, h, w) patches of a video, (mel frames,) of audio.

    deep: (layers, tokens, hidden) what a family adds to the same rows after each of its first decoder layers, or None.
    """

    features: torch.Tensor
    size: tuple[int, ...]
    deep: torch.Tensor | None = None


@dataclass(frozen=True)
class Media:
    """The streams of one clip that go into the prompt."""

    video: StreamFeatures | None
    audio: StreamFeatures | None


@dataclass(frozen=True)
class Layout:
    """The system + media rows of a prompt. ids, kinds: (P,); positions: (3, P). next_position: where the stock model puts the text after them.

    That is not always the largest position plus one: in the stock model text goes on after the last *row*, and a sound that ends early in the last
    chunk of a video leaves that row behind the video's.
    """

    ids: torch.Tensor
    kinds: torch.Tensor
    positions: torch.Tensor
    next_position: int


@dataclass(frozen=True)
class Suffix:
    """Question and answer rows. ids, kinds: (S,). Row `first + a` emits answer token a; `span` marks the label among `targets`: (A,)."""

    ids: torch.Tensor
    kinds: torch.Tensor
    first: int
    targets: torch.Tensor
    span: torch.Tensor


@dataclass(frozen=True)
class Example:
    """A whole prompt with its answer, for training."""

    media: Media
    suffix: Suffix


@dataclass
class Batch:
    """Padded sequences of N examples. `inputs` goes to `decoder(**inputs)`; targets: (N, A), -100 padded; span: (N, A); kinds: (B, T).

    asked: (N, Q) indices into the flattened (B, T) of each example's own question rows before its first emitter, -1 padded.
    Examples about the same clip share one of the B <= N sequences: [media][question 1, answer 1][question 2, answer 2]…
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    span: torch.Tensor
    kinds: torch.Tensor
    asked: torch.Tensor
    media: tuple[Media, ...] = ()

    def answers(self, logits: torch.Tensor, examples: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, A', V) and targets (n, A') of these examples, or of all, out of the decoder's (rows, V); A' is the longest answer among them.

        Padding repeats an answer's first row. Only what is asked for is padded: one long passage beside short answers costs no room at theirs.
        """
        real = real_rows(self.inputs["rows"])
        place = (real.flatten().cumsum(0) - 1).view_as(real)
        place, targets = torch.where(real, place, place[:, :1]), self.targets
        if examples is not None:
            place, targets = place[examples], targets[examples]
        longest = int((targets != -100).sum(1).max()) if len(targets) else 0
        return logits[place[:, :longest]], targets[:, :longest]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch elsewhere."""
        return replace(
            self,
            inputs={k: v.to(device) for k, v in self.inputs.items()},
            targets=self.targets.to(device),
            span=self.span.to(device),
            kinds=self.kinds.to(device),
            asked=self.asked.to(device),
        )


@dataclass
class Prefix:
    """Computed media prefixes: keys and values of every layer, (N, heads, P, head size). `hidden`: L + 1 tensors (N, P, H) if asked for."""

    kinds: torch.Tensor  # (N, P)
    next_position: torch.Tensor  # (N,)
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cuts: Cuts
    media: tuple[Media, ...]
    hidden: tuple[torch.Tensor, ...] | None = None

    @property
    def n(self) -> int:
        """How many clips."""
        return self.kinds.shape[0]


@dataclass
class Output:
    """What `extend` returns; see there. logits: (N, A, V) at the emitters; targets, span: (N, A)."""

    logits: torch.Tensor
    targets: torch.Tensor
    span: torch.Tensor
    kinds: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    flow: torch.Tensor | None = None

    def logprobs(self) -> torch.Tensor:
        """(N, A) log-probability of each answer token, in nats; 0 where padded."""
        return answer_logprobs(self.logits, self.targets)

    def span_score(self) -> torch.Tensor:
        """(N,) mean log-likelihood of the label span's tokens: s of docs/definitions.md (no template, no end token)."""
        return (self.logprobs() * self.span).sum(1) / self.span.sum(1)


def answer_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of targets (N, A) under logits (N, A, V), in nats; 0 where the target is -100."""
    picked = torch.gather(logits.float().log_softmax(-1), 2, targets.clamp_min(0)[..., None])[..., 0]
    return picked.masked_fill(targets == -100, 0.0)


class Decoded(NamedTuple):
    """What `Decoder.forward` returns; see there."""

    logits: torch.Tensor
    states: torch.Tensor | None
    mass: torch.Tensor | None


class Decoder(nn.Module):
    """Language model and head as one module: what accelerate wraps, so that DDP and DeepSpeed see every trained parameter go through its forward."""

    text_model: Any
    head: Any

    def __init__(self, text_model: nn.Module, head: nn.Module):
        super().__init__()
        self.text_model = text_model
        self.head = head

    def forward(
        self,
        input_ids,
        features,
        media_mask,
        position_ids,
        attention_mask,
        kinds,
        segments,
        rows,
        cuts: Cuts = (),
        states: torch.Tensor | None = None,
        mass: Sequence[int] = (),
    ) -> Decoded:
        """Logits at `rows` (N, A), indices into the flattened (B, T), without their padding: (rows, V), one answer after the other; `Batch.answers`
        pads them. features: (media rows in batch order, H), at media_mask.

        position_ids: (3, B, T); segments: see Instruments. `cuts`: one tuple a sequence. None where nothing was asked for:
        states: indices (N, S) at which the output of every layer is wanted, (L, N, S, H), the last one before the final norm. An index of -1 gives
        some row, so that `Batch.asked` can be given as it is.
        mass: layers in which the attention of an example's emitters is wanted, (len(mass), N, kinds), with gradients; see MassTap.
        """
        embeds = self.text_model.embed_tokens(input_ids)
        embeds = embeds.masked_scatter(media_mask[..., None], features.to(embeds.dtype))
        tap = MassTap(frozenset(mass), rows) if len(mass) else None
        out = self.text_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=states is not None,
            instruments=Instruments(kinds, cuts, mass=tap, segments=segments),
        )
        return Decoded(
            self.head(out.last_hidden_state.flatten(0, 1)[rows[real_rows(rows)]]),
            torch.stack([h.flatten(0, 1)[states] for h in out.hidden_states[1:]]) if states is not None else None,
            torch.stack([tap.mass[layer] for layer in mass]) if tap else None,
        )
