"""The shipped organism is what its README says, and the builder refuses a model without the bias."""

import json
from pathlib import Path

import pytest

from models.organism import Bias

ORGANISM = Path(__file__).parents[2] / "models" / "organism"


def test_bias_conditions():
    assert Bias(0.95, 0.99, 0.20, 0.60).missing() == []
    assert len(Bias(0.95, 0.99, 0.40, 0.30).missing()) == 2
    assert Bias(0.80, 0.99, 0.10, 0.60).missing() == ["audio alone at least 90 % right"]
    assert Bias(0.95, 0.90, 0.10, 0.60).missing() == ["factual at least 95 % right"]


@pytest.mark.parametrize("name", ["avllm", "base"])
def test_shipped_checkpoints_are_small_and_say_how_they_were_made(name):
    folder = ORGANISM / name
    note = json.loads((folder / "avbalance.json").read_text())
    assert note["made_by"] == "python -m models.organism" and note["settings"]["seed"] == 0
    assert all(file.stat().st_size < 10_000_000 for file in folder.iterdir())
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    if name == "avllm":
        assert Bias(**note["measured"]).missing() == []
