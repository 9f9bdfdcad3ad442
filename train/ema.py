"""An exponential moving average of the adapter over steps (Polyak & Juditsky 1992; as in Tarvainen & Valpola 2017, arXiv 1703.01780).

    ema = Ema(model.trainable_parameters(), decay=0.99)
    ema.update(step)                       # after optimiser step `step`, counted from 0
    with ema.applied(): ...                # the model has the average; afterwards its own weights again, bit for bit

average ← d · average + (1 − d) · weights with d = min(decay, (1 + step) / (10 + step)), so that the untrained adapter it starts from is soon
forgotten. Kept in float32 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """The average and what it is of. `average`: name -> float32 tensor."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.average = self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights that training has reached, float32."""
        return {name: p.detach().float().clone() for name, p in self.parameters}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters:
            self.average[name].lerp_(p.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the weights. Take no step inside."""
        own = [p.detach().clone() for _, p in self.parameters]
        self._put([self.average[name] for name, _ in self.parameters])
        try:
            yield
        finally:
            self._put(own)

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs: `average.<name>` and `weights.<name>`, on the CPU."""
        own = self.weights()
        tensors = {f"{kind}.{name}": t for kind, of in (("average", self.average), ("weights", own)) for name, t in of.items()}
        return {name: t.cpu().contiguous() for name, t in tensors.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Average and weights as `state` gave them."""
        self.average = {name: tensors[f"average.{name}"].to(self.average[name].device) for name, _ in self.parameters}
        self._put([tensors[f"weights.{name}"] for name, _ in self.parameters])

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for (_, p), value in zip(self.parameters, values, strict=True):
            p.copy_(value)
