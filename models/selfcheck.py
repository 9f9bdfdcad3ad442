"""The self-check: before a cut is used on a model, it is measured on real input that cuts do what they say (docs/definitions.md)."""

from __future__ import annotations

import torch

from models.attention import SITES, Cut, CutError, FlowTap, Instruments, Kind
from models.avllm import AVLLM, Media


@torch.no_grad()
def self_check(model: AVLLM, media: Media, question: str) -> None:
    """Raise CutError unless, on this clip and question:

    1. with nothing blocked, the result is exactly that of the same path without instruments;
    2. blocked pairs get exactly zero weight, in every layer cut;
    3. rows before the first cut query row are untouched, exactly;
    4. each cut changes the output (a cut that does nothing is the fault this exists for).
    """
    batch = model.batch([model.sequence(media, question, "I see and hear this.")])
    kinds = batch.kinds
    for kind in (Kind.VIDEO, Kind.AUDIO):
        if not bool((kinds == kind).any()):
            raise CutError(f"The self-check needs a clip with sound and picture; this one has no {kind.name.lower()} rows.")
    plain = _states(model, batch, None)
    if not torch.equal(plain, _states(model, batch, Instruments(kinds, [()]))):
        raise CutError("With nothing blocked the instrumented attention changes the output.")
    for site in SITES:
        cut = Cut.at(site, 0, model.n_layers)
        tap = FlowTap()
        states = _states(model, batch, Instruments(kinds, [(cut,)], tap))
        if sorted(tap.mass) != list(range(model.n_layers)):
            raise CutError(f"{site}: the instrumented attention ran in layers {sorted(tap.mass)} only; something replaced it in the others.")
        if tap.blocked_weight != 0.0:
            raise CutError(f"{site}: blocked pairs still get weight {tap.blocked_weight:.2e}.")
        targets = torch.isin(kinds[0], torch.tensor([int(k) for k in cut.target], device=kinds.device))
        sources = torch.isin(kinds[0], torch.tensor([int(k) for k in cut.source], device=kinds.device))
        first = int(targets.nonzero()[0])
        if not torch.equal(states[:, :first], plain[:, :first]):
            raise CutError(f"{site}: rows before the first cut row changed.")
        reachable = bool((sources.nonzero()[0] < targets.nonzero()[-1]).item())
        if reachable and torch.equal(states, plain):
            raise CutError(f"{site}: the cut does nothing.")


def _states(model: AVLLM, batch, instruments: Instruments | None) -> torch.Tensor:
    inputs = batch.inputs
    embeds = model.text_model.embed_tokens(inputs["input_ids"]).masked_scatter(inputs["media_mask"][..., None], inputs["features"].to(model.dtype))
    return model.text_model(
        inputs_embeds=embeds, position_ids=inputs["position_ids"], attention_mask=inputs["attention_mask"], use_cache=False, instruments=instruments
    ).last_hidden_state
