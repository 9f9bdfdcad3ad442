"""However a step is split up, it is the same step: accumulation, processes, DeepSpeed. Counted in grids, in float32, without dropout.

All through the command line. The gradient of the first step is read from the optimizer's first moment, which after one step is (1 − β₁) times it.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.loop import main

ROOT = Path(__file__).parents[2]
ONE_STEP = ["--schedule.grids", "8", "--schedule.steps", "1", "--schedule.clip", "1e9", "--lora.dropout", "0"]
# Both halves of LoRA get a gradient only from the second step on, so that is what three-step runs are for.
THREE_STEPS = ["--schedule.grids", "2", "--schedule.steps", "3", "--schedule.checkpoint-every", "1", "--schedule.lr", "1e-3"]
THREE_STEPS += ["--lora.dropout", "0", "--lora.ema", "0.5"]


@pytest.fixture
def printed():
    """What the runs in processes of their own printed."""
    return []


@pytest.fixture
def started(arguments, tmp_path, printed):
    """started("name", flags, launcher): the folder of a finished run; launcher None: in this process."""

    def start(name, flags, launcher=None, **environment):
        command = [*arguments, "--run.folder", str(tmp_path / name), "--run.diagnoses", str(tmp_path / "common"), *flags]
        if launcher is None:
            assert main(command) == 0
        else:
            launch = [sys.executable, "-m", *launcher, str(ROOT / "train"), *command]
            around = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
            done = subprocess.run(launch, cwd=ROOT, env=around, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
            printed.append(" ".join(done.stdout.split()))
        return tmp_path / name

    return start


def gradient(folder):
    """Name -> gradient of the first step."""
    moments = load_file(folder / "checkpoints" / "step_000001" / "state" / "optimizer.safetensors")
    return {name: 10 * value for name, value in moments.items() if name.startswith("exp_avg.")}


def adapter(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "adapter" / "adapter_model.safetensors")


def metrics(folder):
    """Lines of metrics.jsonl without the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other, within=1e-5):
    assert one.keys() == other.keys() and one
    assert max((one[name].float() - other[name].float()).abs().max().item() for name in one) <= within


def assert_same_metrics(one, other):
    for line, same in zip(metrics(one), metrics(other), strict=True):
        assert line == pytest.approx(same, rel=1e-4, abs=1e-5)


def test_accumulation_and_two_processes_make_the_same_step(started, printed):
    """8 grids at once, one after the other, and 4 in each of two processes that talk through gloo."""
    whole = started("whole", ONE_STEP)
    expected = gradient(whole)
    assert max(value.abs().max().item() for value in expected.values()) > 1e-2  # there is something to compare
    parts = started("parts", [*ONE_STEP, "--schedule.accumulate", "8"])
    assert_same(gradient(parts), expected)
    assert_same_metrics(parts, whole)
    two = started("two", ONE_STEP, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"])
    assert "Training 1 steps in 2 processes" in printed[-1]
    assert_same(gradient(two), expected)
    assert_same_metrics(two, whole)


def test_bfloat16_trains(started):
    folder = started("bf16", ["--schedule.steps", "2", "--model.dtype", "bfloat16"])
    weights = adapter(folder, 2)
    assert {w.dtype for w in weights.values()} == {torch.float32}  # the adapter stays what is trained precisely
    assert all(torch.isfinite(w).all() for w in weights.values()) and any(w.abs().max() > 0 for n, w in weights.items() if "lora_B" in n)
    assert len(metrics(folder)) == 2


def deepspeed(file):
    """`accelerate launch` with one DeepSpeed process."""
    return ["accelerate.commands.launch", "--num_processes", "1", "--use_deepspeed", "--deepspeed_config_file", str(file)]


@pytest.mark.slow  # compiles an op on its first run
def test_zero2_trains_as_plain_resumes_and_keeps_no_frozen_weight(started):
    plain = started("plain", THREE_STEPS)
    flags = [THREE_STEPS, deepspeed(ROOT / "configs" / "deepspeed" / "zero2.json")]
    folder = started("zero2", *flags, DS_ACCELERATOR="cpu")
    expected = adapter(plain, 3)
    averages = [load_file(run / "checkpoints" / "step_000003" / "state" / "ema.safetensors") for run in (plain, folder)]
    assert_same(adapter(folder, 3), expected)
    assert_same(*averages)
    assert_same_metrics(folder, plain)

    saved = list((folder / "checkpoints" / "step_000003" / "state").rglob("*.pt"))
    [weights] = [p for p in saved if p.name.endswith("model_states.pt")]
    numbers = sum(w.numel() for w in expected.values())
    with zipfile.ZipFile(weights) as archive:  # tensors are entries below data/; nothing is unpickled
        kept = sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    assert kept == 4 * numbers  # the adapter in float32, and no frozen weight
    assert sum(p.stat().st_size for p in saved) < 8 * 4 * numbers + 200_000  # weights, their float32 copy, two moments: nothing of the model's size

    for name in ("step_000003", "../findings/step_000003.json", "../findings/after.json", "../best.json"):  # as if killed in the third step
        path = folder / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    started("zero2", *flags, DS_ACCELERATOR="cpu")
    assert_same(adapter(folder, 3), expected)
    assert_same_metrics(folder, plain)


@pytest.mark.slow
def test_zero3_is_refused(arguments, tmp_path):
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}))
    launch = [sys.executable, "-m", *deepspeed(tmp_path / "zero3.json"), str(ROOT / "train"), *arguments]
    around = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(launch, cwd=ROOT, env=around, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "error: DeepSpeed ZeRO-3 cannot train here" in done.stderr and "zero2.json" in done.stderr
    assert not (tmp_path / "run").exists()


def test_mixed_precision_of_accelerate_is_refused(arguments, tmp_path):
    """It would reach the student's decoder and neither its teacher nor the diagnoses."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "bf16", "-m", "train", *arguments]
    done = subprocess.run(launch, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "error: accelerate was told mixed_precision bf16" in done.stderr and "--model.dtype bfloat16" in done.stderr
    assert not (tmp_path / "run").exists()
