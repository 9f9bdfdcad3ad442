"""Weights that DeepSpeed ZeRO-3 splits among processes: whole only inside `gathered`. Everywhere else this does nothing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 has split any of them."""
    return any(hasattr(p, "ds_id") for p in parameters)


def gathered(parameters: Iterable[nn.Parameter], change: bool = False) -> AbstractContextManager:
    """The parameters whole in every process, which all have to come here. change: what is written to them inside is kept; all write the same."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(split, modifier_rank=0 if change else None)
