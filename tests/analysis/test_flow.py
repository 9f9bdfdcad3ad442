"""Attention flow against weights written out by hand (tests/models/reference.py)."""

import numpy as np
import pytest
import torch

from analysis.flow import SOURCES, FlowTally
from analysis.items import ItemStore
from analysis.visits import Visit, forced
from models import Kind
from tests.analysis import brute
from tests.models import reference


def test_flow_equals_explicit_softmax(subject, clips, model):
    found = clips.select("test", "counterfactual")[:3]
    visit = Visit(subject, found, "counterfactual", taps=True)
    tally = FlowTally()
    tally.add(visit)
    rows = {(r.variant, r.target): r for r in tally.rows(ItemStore())}
    assert len(rows) == 6
    expected = {key: np.zeros((model.n_layers, len(Kind))) for key in [(v, t) for v in ("plain", "no_sink") for t in ("question", "emitters")]}
    for clip, ids in zip(found, visit.answer_ids("hear"), strict=True):
        batch = model.batch([brute.sequence(model, clips, clip, forced(model, "hear", ids))])
        weights = reference.forward(model, batch, [()])[2]
        kinds = batch.kinds[0].numpy()
        for layer, w in enumerate(weights):
            for target, kind in (("question", Kind.QUESTION), ("emitters", Kind.EMITTER)):
                plain = w[0].numpy()[:, kinds == kind]  # (heads, rows, keys)
                rest = plain.copy()
                rest[..., 0] = 0
                rest /= rest.sum(-1, keepdims=True)
                for name, values in (("plain", plain), ("no_sink", rest)):
                    mean = values.mean((0, 1))
                    expected[name, target][layer] += [mean[kinds == k].sum() / len(found) for k in Kind]
    for (variant, target), mass in expected.items():
        for name, kind in SOURCES.items():
            assert [e.value for e in rows[variant, target].mass[name]] == pytest.approx(mass[:, kind], abs=1e-5)
    for row in rows.values():
        assert sum(np.array([e.value for e in m]) for m in row.mass.values()) == pytest.approx(np.ones(model.n_layers), abs=1e-5)


def test_conditions_are_kept_apart(subject, clips):
    tally = FlowTally()
    tally.add(Visit(subject, clips.select("test", "factual")[:2], "factual", taps=True))
    tally.add(Visit(subject, clips.select("test", "counterfactual")[:4], "counterfactual", taps=True))
    rows = tally.rows(ItemStore())
    assert {(r.condition, r.mass["audio"][0].n) for r in rows} == {("factual", 2), ("counterfactual", 4)} and len(rows) == 12


def test_lost_mass_is_refused(subject, clips):
    visit = Visit(subject, clips.select("test", "factual")[:2], "factual", taps=True)
    visit.spoken("hear").flow = torch.zeros_like(visit.spoken("hear").flow)
    with pytest.raises(ValueError, match="not to 1"):
        FlowTally().add(visit)
