"""Trackers get what metrics.jsonl and the findings hold, without a network."""

import json

import pytest

from analysis.findings import Findings
from analysis.trajectory import headline
from train.loop import main


@pytest.fixture
def expected(tmp_path):
    """name -> step -> value, from the run's own files; call it after the run."""

    def read():
        folder, values = tmp_path / "run", {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            for name in record.keys() - {"step", "seconds"}:
                values.setdefault(f"train/{name}", {})[record["step"]] = record[name]
        for step in (1, 2):
            for name, estimate in headline(Findings.load(folder / "findings" / f"step_{step:06d}.json")).items():
                if estimate.value is not None:
                    values.setdefault(f"selection/{name}", {})[step] = estimate.value
        assert len(values) > 20 and all(sorted(steps) == [1, 2] for steps in values.values())
        return values

    return read


SHORT = ["--schedule.steps", "2", "--schedule.checkpoint-every", "1"]


def test_tensorboard(arguments, tmp_path, expected):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([*arguments, *SHORT, "--run.tracker", "tensorboard"]) == 0
    got = events.EventAccumulator(str(tmp_path / "run" / "avbalance")).Reload()
    for name, steps in expected().items():
        assert {e.step: e.value for e in got.Scalars(name)} == pytest.approx(steps, rel=1e-6), name


def test_trackio(arguments, tmp_path, expected, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert main([*arguments, *SHORT, "--run.tracker", "trackio"]) == 0
    rows = SQLiteStorage.get_logs("avbalance", "run")
    for name, steps in expected().items():
        assert {row["step"]: row[name] for row in rows if name in row} == pytest.approx(steps), name
