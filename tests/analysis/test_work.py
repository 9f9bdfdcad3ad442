"""A diagnosis shared between processes, and one that is killed and goes on: the same findings to the last byte."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from analysis.work import Work

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
    for stage in ("visits_00002", "answers_00000"):
        process = start([sys.executable], model_folder, clips, out)
        while process.poll() is None and not list(work.glob(f"{stage}.*")):
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
    first = Work(tmp_path / "w", {"seed": 0}).records("visits", 3, job(calls))
    again = Work(tmp_path / "w", {"seed": 0}).records("visits", 3, job(calls))
    assert calls == [0, 1, 2]
    for a, b in zip(first, again, strict=True):
        assert a["a"]["words"] == b["a"]["words"] and a["a"]["n"] == b["a"]["n"]
        assert np.array_equal(a["a"]["hits"], b["a"]["hits"]) and b["a"]["hits"].dtype == bool
        assert np.array_equal(a["b"]["x"], b["b"]["x"]) and b["b"]["x"].shape == (2, 3)
        assert a["b"]["x"].strides == b["b"]["x"].strides  # or sums over it would differ in their last digits


def test_records_of_another_diagnosis_and_damaged_ones_are_measured_again(tmp_path):
    calls: list[int] = []
    Work(tmp_path / "w", {"seed": 0}).records("visits", 3, job(calls))
    Work(tmp_path / "w", {"seed": 1}).records("visits", 3, job(calls))
    assert calls == [0, 1, 2, 0, 1, 2]
    (tmp_path / "w" / "visits_00001.safetensors").write_bytes(b"half a file")
    Work(tmp_path / "w", {"seed": 1}).records("visits", 3, job(calls))
    assert calls == [0, 1, 2, 0, 1, 2, 1]


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path):
    calls: list[int] = []
    work = Work(tmp_path / "w", {"seed": 0})
    work.records("visits", 1, job(calls))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match=r"visits_00001\.safetensors cannot be written .* Free some space"):
            work.records("visits", 2, job(calls))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.name for f in (tmp_path / "w").iterdir()] == ["visits_00000.safetensors"]
    work.records("visits", 2, job(calls))
    assert calls == [0, 1, 1]
