"""Weights that DeepSpeed ZeRO-3 splits among processes: whole only inside `gathered`. Everywhere else this does nothing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from torch import nn


def load_whole(accelerator: Accelerator) -> None:
    """Have transformers load models whole under ZeRO-3 too: the first diagnosis and the towers read weights before there is an engine to gather them."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.zero3_init_flag, plugin.dschf = False, None
        plugin.set_deepspeed_weakref()


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
