"""The shipped organism is what its README says, and the builder refuses a model without the bias."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.sources import load_sources
from models.organism import MEASURED_SEED, Bias, Renderings, render_streams

ORGANISM = Path(__file__).parents[2] / "models" / "organism"


def test_bias_conditions():
    assert Bias(0.95, 0.99, 0.20, 0.60).missing() == []
    assert len(Bias(0.95, 0.99, 0.40, 0.30).missing()) == 2
    assert Bias(0.80, 0.99, 0.10, 0.60).missing() == ["audio alone at least 90 % right"]
    assert Bias(0.95, 0.90, 0.10, 0.60).missing() == ["factual at least 95 % right"]


def test_what_is_rendered(tmp_path, monkeypatch):
    """Training clips and clips that are measured on have no seed in common, nothing held out, and only the former a louder sound on top."""
    jobs: list = []
    monkeypatch.setattr("models.organism.ProcessPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr("models.organism._render", jobs.append)
    classes = [c for c in load_sources() if c.held_pictures or c.held_sounds][:4]
    config = Renderings(work=tmp_path, renderings=4, mixed=0.5)
    for measured, folder in ((None, "train"), (3, "measured")):
        found = render_streams(config, classes, measured=measured)
        count = measured or config.renderings
        assert found.label.tolist() == [c for c in range(4) for _ in range(count)] and all(Path(p).parent == tmp_path / folder for p in found.paths)
        assert found.mixed.tolist() == ([True, True, False, False] * 4 if measured is None else [False] * 12)
    assert len({job.seed for job in jobs}) == len(jobs) and {job.seed >= MEASURED_SEED for job in jobs[16:]} == {True}
    held = {str(s.path) for c in classes for s in (*c.held_pictures, *c.held_sounds)}
    used = {path for job in jobs for path in (job.picture, job.sound, job.over)}
    assert held and not used & held
    assert all((job.over is None) == (not mixed) and job.over != job.sound for job, mixed in zip(jobs[:16], np.array([1, 1, 0, 0] * 4), strict=True))


@pytest.mark.parametrize("name", ["avllm", "base"])
def test_shipped_checkpoints_are_small_and_say_how_they_were_made(name):
    folder = ORGANISM / name
    note = json.loads((folder / "avbalance.json").read_text())
    assert note["made_by"] == "python -m models.organism" and note["settings"]["seed"] == 0
    assert all(file.stat().st_size < 10_000_000 for file in folder.iterdir())
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    if name == "avllm":
        assert Bias(**note["measured"]).missing() == []
