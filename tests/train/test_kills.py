"""The run that is killed again and again ends as the one that nobody disturbed, and no kill leaves half a checkpoint.

    python -m pytest --slow -s tests/train/test_kills.py        # prints where each kill fell

A real SIGKILL to a real process: 20 moments, uniform over the course of the run, in order. Each start goes on from what the kill before left, so it
has to live from there to its own moment; how long that takes is read from the timetable of the undisturbed run.
Processes are forked from a server that has imported everything: 20 starts cost 20 model loads, not 20 imports.
"""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import result
from train.checkpoints import check

KILLS = 20
STEPS = 10
# Large adapters, a checkpoint after each step and small visits, so that writing checkpoints and diagnosing them are visible parts of the course.
FLAGS = ["--schedule.steps", str(STEPS), "--schedule.checkpoint-every", "1", "--schedule.grids", "1", "--lora.ema", "0.5", "--run.keep", "2"]
FLAGS += ["--lora.r", "256", "--lora.projections", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLAGS += ["--diagnosis.selection.counterfactual", "8", "--diagnosis.selection.factual", "8", "--diagnosis.selection.batch", "2"]


def run(arguments, log):
    """The target of a forked process: the command line, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from train.loop import main

    raise SystemExit(main(arguments))


def stages(folder):
    """What is done for good: the durable files and whole checkpoints of a run folder."""
    done = {p.name for p in (folder / "findings").glob("*.json")} | {p.name for p in folder.glob("*.json")}
    return done | {p.name for p in (folder / "checkpoints").glob("step_*") if p.suffix == ""}


def where(folder):
    """What a killed run was doing, by what it left."""
    if not (folder / "config.yaml").exists():
        return "starting"
    if list(folder.rglob("*.json.work")):
        return f"diagnosing ({next(folder.rglob('*.json.work')).parent.name}/{next(folder.rglob('*.json.work')).name.split('.')[0]})"
    if list((folder / "checkpoints").glob("*.partial")):
        return "writing a checkpoint"
    if list((folder / "checkpoints").glob("*.deleted")):
        return "clearing a checkpoint away"
    if (folder / "comparison.json").exists():
        return "writing the report"
    whole = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    if whole and whole[-1] == f"step_{STEPS:06d}":
        return "after the last step"
    if "training:" in folder.with_suffix(".log").read_text():
        return f"in a step after {whole[-1] if whole else 'the start'}"
    if whole:
        return f"loading, to go on after {whole[-1]}"
    return "between stages"


@pytest.mark.slow
def test_killed_20_times_it_ends_with_the_same_bytes(arguments, tmp_path):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train.loop", "peft", "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni"])
    began = time.monotonic()

    def start(name):
        flags = [*arguments, *FLAGS, "--run.folder", str(tmp_path / name)]
        process = server.Process(target=run, args=(flags, str(tmp_path / f"{name}.log")))
        process.start()
        return process

    start("warm").join()  # the server imports now, the disk caches fill
    begin = time.monotonic()
    start("warm").join()
    again = time.monotonic() - begin  # a start that finds all done: about what it takes to be where a kill left the run
    folder, at = tmp_path / "undisturbed", dict[str, float]()
    begin = time.monotonic()
    process = start("undisturbed")
    while process.is_alive():
        for name in stages(folder) - at.keys():
            at[name] = time.monotonic() - begin
        time.sleep(0.002)
    course = time.monotonic() - begin
    assert process.exitcode == 0, (tmp_path / "undisturbed.log").read_text()[-3000:]

    chance = random.Random(0)
    moments = sorted(chance.uniform(0, course) for _ in range(KILLS))
    rounds, fell = [tmp_path / "killed_1"], []
    for moment in moments:
        while True:
            folder = rounds[-1]
            reached = max((at[name] for name in stages(folder) if name in at), default=0.0)
            alive = moment if reached == 0 else again + max(0.0, moment - reached)
            process = start(folder.name)
            process.join(alive)
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                break
            assert process.exitcode == 0, (tmp_path / f"{folder.name}.log").read_text()[-3000:]
            rounds.append(tmp_path / f"killed_{len(rounds) + 1}")  # it had ended: the kills that are left go to another run
        fell.append(where(folder))
        print(f"kill {len(fell):2}, at {moment:5.2f} of {course:.2f} s, {alive:5.2f} s after its start: {fell[-1]}", flush=True)
        for checkpoint in (folder / "checkpoints").glob("step_*"):
            if checkpoint.suffix == "":
                check(checkpoint)
    process = start(rounds[-1].name)
    process.join()
    assert process.exitcode == 0, (tmp_path / f"{rounds[-1].name}.log").read_text()[-3000:]
    print(f"{len(fell)} kills of {len(rounds)} runs, {time.monotonic() - began:.0f} s in all")
    assert len(fell) == KILLS

    undisturbed = tmp_path / "undisturbed"
    for folder in rounds:
        assert result(folder) == result(undisturbed)
        assert (folder / "best.json").read_bytes() == (undisturbed / "best.json").read_bytes()
        kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert kept == sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) and f"step_{STEPS:06d}" in kept
        for name in kept:
            ours, theirs = (load_file(root / "checkpoints" / name / "state" / "ema.safetensors") for root in (folder, undisturbed))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
        assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, STEPS + 1))
