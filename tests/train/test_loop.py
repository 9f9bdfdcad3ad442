"""The whole job with a tiny random model: stages, resuming to the same bytes, refusals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard

import train.checkpoints
import train.loop
from analysis.findings import Findings
from data.check import leave_out
from data.clips import load_clips, save_clips
from tests.train.conftest import result
from train.best import Best, Rates
from train.config import SchedulePart
from train.loop import default_threads, learning_rate, main, shares, status


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Filled by the first test of this module."""
    return {}


def test_a_whole_run_and_once_more(arguments, tmp_path, uninterrupted, capsys):
    folder = tmp_path / "run"
    assert main(arguments) == 0
    made = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert made >= {f"findings/{name}.json" for name in ("plan", "before", "selection", "after", "step_000002", "step_000004")}
    assert made >= {"config.yaml", "plan.json", "metrics.jsonl", "best.json", "comparison.json", "report.html"}
    assert not [name for name in made if name.endswith((".partial", ".pt", ".bin", ".pkl"))]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"counterfactual_ce", "distillation", "mirror", "states", "retention", "loss", "lr", "grad_norm"} <= set(lines[0])
    assert lines[0]["taught/counterfactual_ce"] == 1 and all(0 <= line["taught/distillation"] <= 1 for line in lines)
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["lora_targets"]) == 6 and all("because" in choice for name, choice in plan.items() if name != "lora_targets")
    out = capsys.readouterr().out
    assert "Best checkpoint" in out and "before and after" in out and "report.html" in out
    check_card(folder)
    uninterrupted["result"] = result(folder)
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("findings/*.json")}
    assert main([*arguments, "--run.threads", "1", "--run.keep", "5"]) == 0  # nothing is measured or trained again
    assert {p: p.stat().st_mtime_ns for p in folder.glob("findings/*.json")} == stamps
    assert result(folder) == uninterrupted["result"]


def check_card(folder):
    """The chosen adapter once more, with a card that the hub can read and that has the figures of the findings."""
    best = folder / "checkpoints" / json.loads((folder / "best.json").read_text())["checkpoint"] / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "adapter" / name).read_bytes() == (best / name).read_bytes()
    assert {p.name for p in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}  # without PEFT's empty card
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)  # a folder is no model of the hub
    (line,) = [line for line in card.text.splitlines() if line.startswith("| Factual clips: right about the sound ")]
    for cell, name in zip(line.split("|")[2:], ("before", "after"), strict=False):
        found = Findings.load(folder / "findings" / f"{name}.json").following_rate("factual", "hear")
        assert found and cell.strip().startswith(f"{100 * found.correct.value:.1f} %")
    assert f"Step {int(best.parent.name[5:])}, seed 0." in card.text


def test_interrupted_anywhere_it_ends_with_the_same_bytes(arguments, tmp_path, uninterrupted, monkeypatch):
    """One run, interrupted while planning, in a step, while a checkpoint is written, while it is diagnosed, and before the end."""
    folder = tmp_path / "run"

    class Stop(BaseException):
        """Like a kill: nothing catches it."""

    def stop_at(module, name, when):
        real = getattr(module, name)

        def stopping(*args, **kwargs):
            if when(*args, **kwargs):
                raise Stop
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopping)
            with pytest.raises(Stop):
                main(arguments)

    stop_at(train.loop, "make_plan", lambda *a: True)
    assert not (folder / "plan.json").exists()
    stop_at(train.loop, "sample_step", lambda clips, config, plan, step: step == 1)
    stop_at(train.checkpoints, "write_json", lambda path, value: path.name == "manifest.json" and value["step"] == 2)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000002.partial"]
    stop_at(train.loop, "diagnose", lambda model, *a, **k: "step_000002" in (model.adapter or ""))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000002"]
    stop_at(train.loop, "sample_step", lambda clips, config, plan, step: step == 3)
    stop_at(train.loop, "diagnose", lambda model, clips, settings, split, **k: split == "test")
    assert main(arguments) == 0
    assert result(folder) == uninterrupted["result"]


def test_killed_it_ends_with_the_same_bytes(arguments, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "step_000002" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "findings" / "after.json").exists()
    assert main(arguments) == 0
    assert result(folder) == uninterrupted["result"]


def test_a_run_stops_when_its_best_checkpoint_is_old_and_does_so_again_when_resumed(arguments, tmp_path, monkeypatch, capsys):
    """The tiny model learns nothing, so that its first checkpoint is the best one is made up; all else is real."""
    real, loss = train.loop.choose_best, train.loop.sample_step

    def the_first(*args):
        best = real(*args)
        best.checkpoint = min(best.candidates)
        return best

    def interrupted(clips, config, plan, step):
        if step == 3:
            raise KeyboardInterrupt
        return loss(clips, config, plan, step)

    monkeypatch.setattr(train.loop, "choose_best", the_first)
    patient = [*arguments, "--schedule.steps", "9", "--schedule.checkpoint-every", "1", "--schedule.patience", "4", "--run.keep", "1"]
    patient += ["--run.diagnoses", str(tmp_path / "common")]
    assert main(patient) == 0
    folder = tmp_path / "run"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000001", "step_000005"]  # 2 to 5 came after the best
    best = json.loads((folder / "best.json").read_text())
    assert best["checkpoint"] == "step_000001" and best["stopped"].startswith("Stopped after step 5: none of the last 4 checkpoints")
    assert best["stopped"] in " ".join(capsys.readouterr().out.split())
    ended = result(folder)
    assert [line["step"] for line in ended[2]] == [1, 2, 3, 4, 5]
    again = [*patient, "--run.folder", str(tmp_path / "again")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.loop, "sample_step", interrupted)
        main(again)
    assert main(again) == 0
    assert result(tmp_path / "again") == ended
    assert main(again) == 0  # stays stopped
    assert result(tmp_path / "again") == ended


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_loses_nothing(arguments, tmp_path, monkeypatch, capsys):
    """The kernel refuses to let a file grow as large as the second checkpoint's optimizer state has to be."""
    short = [*arguments, "--schedule.checkpoint-every", "1", "--schedule.steps", "2", "--run.diagnoses", str(tmp_path / "common")]
    assert main(short) == 0
    size = (tmp_path / "run" / "checkpoints" / "step_000002" / "state" / "optimizer.safetensors").stat().st_size
    real, before = train.loop.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(folder, step, *rest):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        return real(folder, step, *rest)

    full = [*short, "--run.folder", str(tmp_path / "full")]
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train.loop, "save_checkpoint", filling)
            assert main(full) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "step_000002 could not be written" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()] == ["step_000001"]
    assert main(full) == 0
    assert result(tmp_path / "full") == result(tmp_path / "run")


def test_the_bar_shows_terms_and_what_the_newest_checkpoint_follows():
    rates = {"hear_conflicts": 0.25, "see_conflicts": 0.5, "hear_factual": 1.0, "see_factual": 1.0, "vision_following": 0.75}
    best = Best("step_000100", "", True, Rates(0, 0, 0, 0, 0), {"step_000100": dict.fromkeys(rates, 0.9), "step_000200": rates})
    assert status({"counterfactual_ce": 1.0, "loss": 2.0}, None) == "ce 1.000 loss 2.000"
    learnt = {"counterfactual_ce": 1.0, "distillation": 0.5, "loss": 2.0, "taught/counterfactual_ce": 1.0, "taught/distillation": 0.875}
    assert status(learnt, None) == "ce 1.000 kd 0.500 (taught 0.88) loss 2.000"
    assert status({"loss": 2.0}, best) == "loss 2.000 | conflicts: hear follows audio 25 % vision 75 %, see 50 %"


def test_shares_of_what_is_taught():
    """Answers taught, left out by the gate, asked for, ended at the token limit. True answers do not end at one."""
    counts = {"counterfactual_ce": (20, 0, 20, 0), "distillation": (5, 1, 8, 2), "retention": (4, 0, 4, 0), "mirror": (0, 0, 0, 0)}
    found = {"taught/counterfactual_ce": 1.0, "taught/distillation": 0.625, "taught/retention": 1.0}
    found |= {"cut_off/distillation": 0.25, "cut_off/retention": 0.0}
    assert shares(counts, 0.0) == found
    assert shares(counts, 0.5) == found | {"gated/distillation": 0.125}


def test_another_configuration_is_refused_and_overwrite_starts_anew(arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "findings").mkdir(parents=True)
    stale = folder / "findings" / "stale.json"
    stale.write_text("{}")
    assert main(arguments) == 2
    assert "is not empty and no run folder" in capsys.readouterr().err and stale.exists()
    train.loop.parse(arguments).save(folder / "config.yaml")
    assert main([*arguments, "--schedule.lr", "1e-5"]) == 2
    assert "schedule.lr was 0.002 and is now 1e-05" in capsys.readouterr().err
    assert main([*arguments, "--schedule.lr", "1e-5", "--run.overwrite", "--model.path", "/no/such/model"]) == 2  # stops later, at the model
    assert not stale.exists() and "no such model folder" in capsys.readouterr().err


def test_other_weights_under_the_same_path_are_refused(arguments, tmp_path, capsys, monkeypatch):
    """A model that was trained anew in place: a run taken up again would mix two models."""
    assert main(arguments) == 0
    real = train.loop.load_model

    def retrained(*args, **kwargs):
        model = real(*args, **kwargs)
        with torch.no_grad():
            next(model.thinker.parameters())[:1] += 1
        return model

    monkeypatch.setattr(train.loop, "load_model", retrained)
    assert main(arguments) == 2
    assert "has other weights than when the run in" in capsys.readouterr().err
    assert main([*arguments, "--run.overwrite"]) == 0


def test_a_loss_that_is_not_finite_stops_the_run(arguments, tmp_path, capsys):
    assert main([*arguments, "--loss.counterfactual-ce", "1e38"]) == 1  # beyond float32 with the loss
    error = capsys.readouterr().err
    assert "The gradient of step 1 is not finite" in error and "--schedule.lr" in error
    saved = json.loads(next((tmp_path / "run").glob("not_finite_*.json")).read_text())
    assert saved["step"] == 1 and len(saved["asks"]) == 24  # two grids of 9, and a bare clip with 3 to each


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--lora.layers", "7"], "lora.layers names [7], but"),
        (["--lora.layers", "-1"], "has layers 0 to 2"),
        (["--loss.teacher-cut", "video->emitters 1:4"], "loss.teacher_cut is 'video->emitters 1:4', but"),
        (["--loss.mirror-cut", "audio->emitters 0:99"], "loss.mirror_cut is"),
        (["--data.text", "no/such/file.txt"], "no/such/file.txt cannot be read as text"),
        (["--diagnosis.plan.knockout-sites", "video->nowhere"], "knockout_sites names video->nowhere"),
        (["--diagnosis.selection.factual", "0"], "diagnosis.selection.factual is 0"),
        (["--diagnosis.test.factual", "0", "--diagnosis.test.counterfactual", "0"], "training needs factual clips of the test split"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2_before_anything_is_measured(arguments, extra, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.loop, "diagnose", None)
    assert main([*arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()  # so that the mended command does not find a run with other settings


def test_a_tracker_that_is_not_installed_is_refused(arguments, capsys, monkeypatch):
    real = train.loop.importlib.util.find_spec
    monkeypatch.setattr(train.loop.importlib.util, "find_spec", lambda name, *rest: None if name == "trackio" else real(name, *rest))
    assert main([*arguments, "--run.tracker", "trackio"]) == 2
    assert "pip install trackio" in capsys.readouterr().err


def test_findings_that_no_plan_follows_from_are_no_bad_input(arguments, capsys):
    """A model with random weights says nothing that can be read: no plan is made from that, and none is called no bias."""
    assert main([*arguments, "--loss.require-bias"]) == 1
    said = capsys.readouterr().err
    assert "No plan can be made from answers that are not read" in said and "show no bias" not in said


def test_every_bad_clip_of_every_split_is_named_before_anything_is_measured(arguments, clips, tmp_path, capsys, monkeypatch):
    """A training clip, one of the plan split and one of the test split; then they are left out, and the run goes on where it was."""
    root = shutil.copytree(clips.root, tmp_path / "clips")
    bad = [clips.select("train", "muted")[0], clips.select("plan", "factual")[0], clips.select("test", "factual")[1]]
    for clip in bad:
        (root / clip.file).write_bytes((root / clip.file).read_bytes()[:1500])
    save_clips(root, clips.clips, clips.grids, {k: v for k, v in clips.manifest.items() if k != "config"})
    mine = [*arguments, "--data.clips", str(root), "--diagnosis.plan.factual", "None", "--diagnosis.test.factual", "None"]
    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "diagnose", None)
        assert main(mine) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "3 of " in line and all(clip.file in line for clip in bad)


def test_a_training_clip_that_is_left_out_keeps_what_was_measured(arguments, clips, tmp_path, capsys, monkeypatch):
    root = shutil.copytree(clips.root, tmp_path / "clips")
    save_clips(root, clips.clips, clips.grids, {k: v for k, v in clips.manifest.items() if k != "config"})
    mine = [*arguments, "--data.clips", str(root)]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.loop, "train", interrupted)
        main(mine)
    found = {path.name: path.read_bytes() for path in (tmp_path / "run" / "findings").iterdir()}
    assert sorted(found) == ["before.json", "plan.json", "selection.json"]
    leave_out(load_clips(root), [clips.select("train", "muted")[0].id])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.loop, "train", interrupted)
        patch.setattr(train.loop, "diagnose", None)
        main(mine)
    leave_out(load_clips(root), [clips.select("selection", "factual")[0].id])
    assert main(mine) == 1
    assert "selection.json was measured on other clips of the selection split" in capsys.readouterr().err


def test_a_folder_of_videos_is_not_built_over(arguments, clips, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(clips.path(clips.clips[0]), folder / "mine.mp4")
    assert main([*arguments, "--data.clips", str(folder)]) == 2
    assert "is a folder of 1 media files, no clip folder" in capsys.readouterr().err and (folder / "mine.mp4").is_file()


def test_flags_that_do_not_go_together_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--schedule.grids", "3", "--schedule.accumulate", "2"])
    assert stopped.value.code not in (0, None) and "equally large" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_learning_rate_by_hand():
    cosine = SchedulePart(lr=1.0, warmup=0.2)
    # 10 steps: two of warm-up (0.5, 1), then (1 + cos(pi * k / 8)) / 2 for k = 0 … 7
    rates = [learning_rate(s, 10, cosine) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and 0 < rates[9] < 0.05
    constant = SchedulePart(lr=1.0, warmup=0.2, shape="constant")
    assert [learning_rate(s, 10, constant) for s in (0, 1, 9)] == [0.5, 1.0, 1.0]
    one = SchedulePart(lr=1.0, warmup=0.2, shape="one_cycle")
    assert learning_rate(0, 10, one) == pytest.approx(0.04 + 0.96 / 2) and learning_rate(1, 10, one) == pytest.approx(1.0)
    assert all(rate > 0 for rate in rates)
    trapezoid = SchedulePart(lr=1.0, warmup=0.2, shape="trapezoid")
    assert [learning_rate(s, 10, trapezoid) for s in (0, 1, 2, 7)] == [0.5, 1.0, 1.0, 1.0]
    assert [learning_rate(s, 10, trapezoid) for s in (8, 9)] == pytest.approx([2 / 3, 1 / 3])


def test_default_threads_are_shared_out():
    assert default_threads(1) >= 1 and default_threads(10_000) == 1
