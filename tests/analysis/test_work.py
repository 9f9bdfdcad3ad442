"""A diagnosis shared between processes, and one that is killed and goes on: the same findings to the last byte."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from analysis.diagnose import DiagnoseSettings, batches, choose, diagnose
from analysis.knockout import KnockoutSweep
from analysis.visits import Visit
from analysis.work import Work
from data.check import leave_out
from data.clips import load_clips

ROOT = Path(__file__).parents[2]
SMALL = [
    "--counterfactual", "12", "--factual", "6", "--alone", "2", "--unseen", "2", "--grids", "4", "--shift", "6", "--knockout", "6",
    "--knockout-factual", "2", "--knockout-media", "2", "--knockout-width", "2", "--probe-folds", "3", "--max-new-tokens", "8", "--batch", "3",
    "--language",
]  # fmt: skip


def start(launcher, model, clips, out):
    command = [*launcher, "-m", "analysis", "diagnose", "--model", str(model), "--clips", str(clips.root), "--out", str(out), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def torchrun(n):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", str(20000 + os.getpid() % 20000)]


@pytest.fixture(scope="module")
def whole(model_folder, clips, tmp_path_factory):
    """The findings of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "findings.json"
    finished(start([sys.executable], model_folder, clips, out))
    assert not out.with_name("findings.json.work").exists()
    return out.read_bytes()


def test_two_processes_find_what_one_finds(whole, model_folder, clips, tmp_path):
    out = tmp_path / "findings.json"
    said = finished(start(torchrun(2), model_folder, clips, out))
    assert out.read_bytes() == whole
    assert said.count("Findings are in") == 1  # one process writes and shows


def test_a_killed_diagnosis_goes_on_where_it_was(whole, model_folder, clips, tmp_path):
    """Killed twice, in the first visits and in the answers under cuts; what was measured before is not measured again."""
    out, work = tmp_path / "findings.json", tmp_path / "findings.json.work"
    kept: dict[str, int] = {}
    for stage, count in (("visits", 3), ("answers", 1)):
        process = start([sys.executable], model_folder, clips, out)
        while process.poll() is None and len(list(work.glob(f"{stage}_*"))) < count:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not out.exists()
        now = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
        assert kept.items() <= now.items() and len(now) > len(kept)
        kept = now
    process = start([sys.executable], model_folder, clips, out)
    finished(process)
    assert out.read_bytes() == whole and not work.exists()


def test_leaving_a_clip_out_keeps_what_was_measured_on_the_others(model, clips, tmp_path, monkeypatch):
    """Killed after its visits and with a clip less: the findings are those of a fresh diagnosis of what is left, and most visits are on disk."""
    settings = DiagnoseSettings(
        counterfactual=16, factual=8, alone=2, unseen=2, bare=2, grids=6, shift=4, captions=0, knockout=6, knockout_factual=2, knockout_media=2,
        knockout_width=2, probes=False, max_new_tokens=4, flips=10, batch=3,
    )  # fmt: skip
    root = shutil.copytree(clips.root, tmp_path / "clips")
    work = tmp_path / "findings.json.work"

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KnockoutSweep, "best", stopped)
        diagnose(model, load_clips(root), settings, "test", progress=False, work=work)
    kept = {file.name for file in work.iterdir()}
    lost = choose(load_clips(root), "test", settings).counterfactual[7]
    less = leave_out(load_clips(root), [lost.id])
    visited: list[list[str]] = []
    real = Visit.__init__

    def counted(self, subject, some, condition, *rest):
        visited.append([clip.id for clip in some])
        real(self, subject, some, condition, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Visit, "__init__", counted)
        resumed = diagnose(model, less, settings, "test", progress=False, work=work)
        anew = len(visited)
        fresh = diagnose(model, less, settings, "test", progress=False)
    resumed.save(tmp_path / "resumed.json"), fresh.save(tmp_path / "fresh.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "fresh.json").read_bytes()
    assert anew <= 0.6 * (len(visited) - anew), visited  # answers under cuts had not been measured
    assert kept <= {file.name for file in work.iterdir()} and not any(lost.id in ids for ids in visited)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 48])
def test_batches_soon_end_where_they_did_before(most):
    ids = [f"clip{i}" for i in range(500)]

    def ends(names):
        cut = list(batches(names, most))
        assert [a for a, _ in cut] == [0, *(b for _, b in cut[:-1])] and cut[-1][1] == len(names)
        assert all((most + 1) // 2 <= b - a <= most for a, b in cut[:-1]) and 0 < cut[-1][1] - cut[-1][0] <= most
        return {tuple(names[a:b]) for a, b in cut}

    whole = ends(ids)
    for out in (0, 123, 250, 499):
        left = ends(ids[:out] + ids[out + 1 :])
        assert len(left - whole) * most <= 60 + 4 * most  # few batches, however many there are
    assert list(batches([], most)) == [] and list(batches(["a"], most)) == [(0, 1)]


def job(calls):
    def measure(i):
        calls.append(i)
        return {
            "a": {"hits": np.array([[True, False], [i == 1, True]]), "words": ["ein", "zwei"], "n": i},
            "b": {"x": np.arange(6.0).reshape(3, 2).T},
        }

    return measure


def test_records_survive_the_disk_and_are_measured_once(tmp_path):
    calls: list[int] = []
    first = Work(tmp_path / "w", {"seed": 0}).records("visits", ["a", "b", "c"], job(calls))
    again = Work(tmp_path / "w", {"seed": 0}).records("visits", ["a", "b", "c"], job(calls))
    assert calls == [0, 1, 2]
    for a, b in zip(first, again, strict=True):
        assert a["a"]["words"] == b["a"]["words"] and a["a"]["n"] == b["a"]["n"]
        assert np.array_equal(a["a"]["hits"], b["a"]["hits"]) and b["a"]["hits"].dtype == bool
        assert np.array_equal(a["b"]["x"], b["b"]["x"]) and b["b"]["x"].shape == (2, 3)
        assert a["b"]["x"].strides == b["b"]["x"].strides  # or sums over it would differ in their last digits


def test_records_of_another_diagnosis_and_damaged_ones_are_measured_again(tmp_path):
    calls: list[int] = []
    Work(tmp_path / "w", {"seed": 0}).records("visits", ["a", "b", "c"], job(calls))
    Work(tmp_path / "w", {"seed": 1}).records("visits", ["a", "b", "c"], job(calls))
    assert calls == [0, 1, 2, 0, 1, 2]
    Work(tmp_path / "w", {"seed": 1})._file("visits", "b").write_bytes(b"half a file")
    Work(tmp_path / "w", {"seed": 1}).records("visits", ["a", "b", "c"], job(calls))
    assert calls == [0, 1, 2, 0, 1, 2, 1]


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path):
    calls: list[int] = []
    work = Work(tmp_path / "w", {"seed": 0})
    work.records("visits", ["a"], job(calls))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match=r"visits_\w+\.safetensors cannot be written .* Free some space"):
            work.records("visits", ["a", "b"], job(calls))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "w").iterdir()) == [work._file("visits", "a")]
    work.records("visits", ["a", "b"], job(calls))
    assert calls == [0, 1, 1]
