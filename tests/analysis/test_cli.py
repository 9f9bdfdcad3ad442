"""`python -m analysis` as called: results, and one line with exit code 2 for input that cannot be used."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.findings import Findings
from data.__main__ import main as data_main
from data.clips import Clip, save_clips
from data.media import stream_hashes, write_mp4
from tests.models.test_finite import changed, overflowing

FEW = ["--counterfactual", "4", "--factual", "2", "--grids", "2", "--max-new-tokens", "8", "--flips", "20", "--quick"]


@pytest.fixture(scope="module")
def found(model_folder, clips, tmp_path_factory):
    """Findings of the model and of its base, as two steps of one story."""
    out = tmp_path_factory.mktemp("found")
    for name in ("avllm", "base"):
        arguments = ["diagnose", "--model", str(model_folder.parent / name), "--clips", str(clips.root), "--out", str(out / f"{name}.json"), *FEW]
        assert main(arguments) == 0
    return out


def refused(arguments, capsys) -> str:
    """The one line that a refused command prints."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def test_diagnose_writes_findings(found, capsys):
    findings = Findings.load(found / "avllm.json")
    assert findings.split == "test" and findings.following_rate("counterfactual", "hear").audio.n == 4 and len(findings.reliance) == 2
    assert sorted(p.name for p in found.iterdir()) == ["avllm.json", "base.json"]


def test_compare(found, tmp_path, capsys):
    out = tmp_path / "comparison.json"
    assert main(["compare", str(found / "base.json"), str(found / "avllm.json"), "--out", str(out)]) == 0
    assert "answers" in capsys.readouterr().out.lower()
    assert json.loads(out.read_text())["changes"]


def test_report(found, clips, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    arguments = [
        "report",
        str(found / "base.json"),
        str(found / "avllm.json"),
        "--names",
        "base",
        "taught",
        "--clips",
        str(clips.root),
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    page = out.read_text()
    assert "taught" in page and "<video" in page
    assert os.listdir(out.parent) == ["page.html"]


def test_diagnose_refuses_what_is_no_model(clips, tmp_path, capsys):
    line = refused(["diagnose", "--model", tmp_path, "--clips", clips.root, "--out", tmp_path / "f.json"], capsys)
    assert "no config.json" in line and not (tmp_path / "f.json").exists()


@pytest.mark.parametrize("kind", ["nowhere", "empty folder", "another kind of model"])
def test_diagnose_refuses_a_wrong_base(model_folder, clips, tmp_path, capsys, kind):
    """At once, also where token shift is not asked for."""
    base = tmp_path / "base"
    if kind != "nowhere":
        base.mkdir()
    if kind == "another kind of model":
        (base / "config.json").write_text(json.dumps({"model_type": "bert"}))
    arguments = ["diagnose", "--model", model_folder, "--base", base, "--clips", clips.root, "--out", tmp_path / "f.json", *FEW]
    line = refused(arguments, capsys)
    assert str(base) in line and not (tmp_path / "f.json").exists()


def test_diagnose_refuses_missing_clips(model_folder, tmp_path, capsys):
    assert "does not exist" in refused(["diagnose", "--model", model_folder, "--clips", tmp_path / "none", "--out", tmp_path / "f.json"], capsys)


def test_diagnose_refuses_a_missing_adapter(model_folder, clips, tmp_path, capsys):
    line = refused(["diagnose", "--model", model_folder, "--adapter", tmp_path, "--clips", clips.root, "--out", tmp_path / "f.json"], capsys)
    assert str(tmp_path) in line and "adapter" in line


def test_diagnose_refuses_a_clip_without_sound(model_folder, clips, tmp_path, capsys):
    import av

    root = shutil.copytree(clips.root, tmp_path / "clips")
    clip = clips.select("test", "factual")[0]
    with av.open(str(clips.path(clip))) as source, av.open(str(root / clip.file), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][clip.file] = (root / clip.file).stat().st_size
    (root / "manifest.json").write_text(json.dumps(manifest))
    line = refused(["diagnose", "--model", model_folder, "--clips", root, "--out", tmp_path / "f.json", "--counterfactual", 0, "--quick"], capsys)
    assert clip.file in line and not (tmp_path / "f.json").exists()


def own_clips(folder, sounds, seconds=2.0):
    """A folder of one's own: a factual test clip for each sound (a wave, or None for no track)."""
    (folder / "media").mkdir(parents=True)
    rows = []
    for i, wave in enumerate(sounds):
        label, file = ("dog", "bell")[i % 2], folder / f"media/{i}.mp4"
        write_mp4(file, np.full((round(4 * seconds), 84, 84, 3), 20 * i, np.uint8), 4, wave)
        streams = [f"a {label}", f"a {label} sounding", f"s{i}", f"s{i}", f"r{i}", f"r{i}", *stream_hashes(file)]
        rows.append(Clip(f"c{i}", f"media/{i}.mp4", "test", "factual", label, label, *streams, seconds=seconds))
    save_clips(folder, rows, [], {"labels": [["dog", "a dog", "a dog sounding"], ["bell", "a bell", "a bell sounding"]]})
    return folder


def tone(i, seconds=2.0, loud=0.3):
    return (loud * np.sin(2 * np.pi * (300 + 50 * i) * np.arange(round(16000 * seconds)) / 16000)).astype(np.float32)


def test_every_bad_clip_is_named_before_anything_is_measured(model_folder, tmp_path, capsys, monkeypatch):
    sounds = [tone(i, loud=0.0 if i == 3 else 0.3) if i != 7 else None for i in range(12)]
    root = own_clips(tmp_path / "clips", sounds)
    cut = root / "media" / "9.mp4"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    save_clips(root, load_rows(root), [], {"labels": [["dog", "a dog", "a dog sounding"], ["bell", "a bell", "a bell sounding"]]})
    given = ["diagnose", "--model", model_folder, "--clips", root, "--out", tmp_path / "f.json", "--quick"]
    with monkeypatch.context() as patch:
        patch.setattr("analysis.diagnose.Visit", None)  # a visit would measure
        line = refused(given, capsys)
    assert "3 of 12 clips cannot be used" in line and sorted(p.name for p in tmp_path.iterdir()) == ["clips"]
    for i in range(12):
        assert (f"media/{i}.mp4" in line) == (i in (3, 7, 9))
    assert data_main(line.split("`")[1].split()[3:]) == 0
    assert main([str(a) for a in given]) == 0


def load_rows(root):
    return [Clip(**json.loads(line)) for line in (root / "clips.jsonl").read_text().splitlines()]


def test_a_sound_that_is_too_short_is_named_and_a_short_one_is_used(model_folder, tmp_path, capsys):
    seconds = [2.0, 0.5, 0.2, 2.0]
    root = own_clips(tmp_path / "clips", [tone(i, s) for i, s in enumerate(seconds)])
    found = ["--clips", root, "--out", tmp_path / "f.json", "--max-new-tokens", 4, "--knockout-factual", 4, "--no-probes", "--no-lens"]
    assert main([str(a) for a in ["diagnose", "--model", model_folder, *found]]) == 0
    assert Findings.load(tmp_path / "f.json").following_rate("factual", "hear").audio.n == 4
    capsys.readouterr()
    root = own_clips(tmp_path / "shorter", [tone(0), tone(1, 0.01), tone(2), tone(3, 0.015)])
    line = refused(["diagnose", "--model", model_folder, "--clips", root, "--out", tmp_path / "g.json", "--quick"], capsys)
    assert "2 of 4 clips cannot be used" in line and "media/1.mp4" in line and "media/3.mp4" in line and "too short" in line


def test_an_empty_track_of_a_muted_clip_does_not_excuse_a_factual_one(model_folder, tmp_path, capsys):
    root = own_clips(tmp_path / "clips", [tone(0), None, None, tone(3)])
    rows = load_rows(root)
    rows[1] = dataclasses.replace(rows[1], condition="muted", audio_label="", heard="", audio_source="", audio_rendering="silence")
    rows = [rows[1], rows[0], rows[2], rows[3]]  # the muted one is met first
    save_clips(root, rows, [], {"labels": [["dog", "a dog", "a dog sounding"], ["bell", "a bell", "a bell sounding"]]})
    line = refused(["diagnose", "--model", model_folder, "--clips", root, "--out", tmp_path / "f.json", "--quick"], capsys)
    assert "1 of 4 clips" in line and "media/2.mp4 has no sound track" in line and "media/1.mp4" not in line


def test_what_is_no_clip_folder_is_said_to_be_what_it_is(model_folder, clips, tmp_path, capsys):
    video = clips.path(clips.clips[0])
    for given, said in ((video, "is a media file"), (video.parent, "is a folder of")):
        line = refused(["diagnose", "--model", model_folder, "--clips", given, "--out", tmp_path / "f.json"], capsys)
        assert said in line and "Your own clips" in line


def test_logits_that_are_no_numbers_end_the_run(model_folder, clips, tmp_path, capsys):
    folder = changed(model_folder, tmp_path / "spilling", overflowing)
    for grids in (2, 0):
        given = ["diagnose", "--model", folder, "--clips", clips.root, "--out", tmp_path / "f.json", *FEW, "--grids", grids]
        assert "logits are not numbers" in refused(given, capsys) and not (tmp_path / "f.json").exists()


def test_warnings_of_libraries_are_not_shown_and_ours_are(tmp_path):
    code = """
import warnings
from analysis.__main__ import main
main(["compare", "a", "b"])
warnings.warn_explicit("theirs", FutureWarning, "x.py", 1, module="some.library")
warnings.warn_explicit("of us", FutureWarning, "x.py", 1, module="models.load")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "of us" in done.stderr and "theirs" not in done.stderr


def test_diagnose_refuses_bad_settings_and_devices(model_folder, clips, tmp_path, capsys):
    given = ["diagnose", "--model", model_folder, "--clips", clips.root, "--out", tmp_path / "f.json"]
    assert "probe_folds" in refused([*given, "--probe-folds", 1], capsys)
    assert "--device" in refused([*given, "--device", "abacus"], capsys)


def test_an_output_that_is_a_folder_is_refused_first(tmp_path, capsys):
    assert "is a folder" in refused(["diagnose", "--model", "x", "--clips", "y", "--out", tmp_path], capsys)


def test_a_full_disk_leaves_nothing(found, tmp_path, capsys):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file may grow past this: writes fail as on a full disk
    try:
        refused(["compare", found / "base.json", found / "avllm.json", "--out", tmp_path / "c.json"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_compare_refuses_findings_that_are_not_alike(found, tmp_path, capsys):
    other = json.loads((found / "avllm.json").read_text())
    other["split"] = "plan"
    (tmp_path / "other.json").write_text(json.dumps(other))
    line = refused(["compare", found / "avllm.json", tmp_path / "other.json"], capsys)
    assert "other.json" in line and "split" in line


@pytest.mark.parametrize("content", [None, "{", '{"format": 1}'])
def test_files_that_are_no_findings_are_named(found, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    assert "bad.json" in refused(["compare", found / "avllm.json", tmp_path / "bad.json"], capsys)
    assert "bad.json" in refused(["report", tmp_path / "bad.json", "--clips", tmp_path, "--out", tmp_path / "r.html"], capsys)
    assert not (tmp_path / "r.html").exists()


def test_report_refuses_wrong_names_and_plans(found, clips, tmp_path, capsys):
    given = ["report", found / "avllm.json", "--clips", clips.root, "--out", tmp_path / "r.html"]
    assert "2 names for 1 findings" in refused([*given, "--names", "a", "b"], capsys)
    (tmp_path / "plan.json").write_text("no")
    assert "plan.json is not JSON" in refused([*given, "--plan", tmp_path / "plan.json"], capsys)
