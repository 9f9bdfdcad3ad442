"""Diagnoses that runs share: measured once, one process at a time, freed when a process dies."""

import subprocess
import sys
import time

import pytest

import train.loop
from train.diagnoses import shared
from train.loop import main

HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(100)"


@pytest.fixture
def measured(monkeypatch):
    """(split, adapter or None) of every diagnosis that was really made."""
    calls = []
    real = train.loop.diagnose

    def counting(model, clips, settings, split, **how):
        calls.append((split, model.adapter and model.adapter.split("/")[-2]))
        return real(model, clips, settings, split, **how)

    monkeypatch.setattr(train.loop, "diagnose", counting)
    return calls


def test_a_second_run_copies_what_the_first_measured(arguments, tmp_path, measured):
    common = ["--run.diagnoses", str(tmp_path / "common"), "--schedule.steps", "1"]
    assert main([*arguments, *common]) == 0
    untrained = [("plan", None), ("test", None), ("selection", None)]
    trained = [("selection", "step_000001"), ("test", "step_000001")]
    assert measured == untrained + trained
    assert sorted(p.suffix for p in (tmp_path / "common").iterdir()) == [".json"] * 3 + [".lock"] * 3
    measured.clear()
    other = ["--run.folder", str(tmp_path / "other"), "--run.seed", "1", "--run.threads", "2"]  # runs at once share the cores
    assert main([*arguments, *common, *other]) == 0
    assert measured == trained
    for name in ("plan", "before", "selection"):
        assert (tmp_path / "other" / "findings" / f"{name}.json").read_bytes() == (tmp_path / "run" / "findings" / f"{name}.json").read_bytes()
    assert (tmp_path / "other" / "report.html").exists()
    measured.clear()
    assert main([*arguments, *common, "--run.folder", str(tmp_path / "third"), "--diagnosis.selection.factual", "3"]) == 0
    assert measured == [("selection", None), *trained]  # other settings are another diagnosis


def test_one_waits_for_the_other_and_goes_on_when_it_is_killed(tmp_path, accelerator):
    key = {"split": "plan", "weights": "w"}
    with shared(tmp_path, key, accelerator) as (path, work):
        assert path.parent == work.parent == tmp_path and path.stem == work.stem
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path.with_suffix(".lock"))], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    waited = []

    def waiting():
        waited.append(time.monotonic())
        holder.kill()

    with shared(tmp_path, key, accelerator, waiting) as (again, _):
        assert again == path
    assert len(waited) == 1 and holder.wait() != 0
    with shared(tmp_path, {**key, "weights": "v"}, accelerator, waiting) as (another, _):
        assert another != path
    assert len(waited) == 1
