"""`python -m analysis` as called: results, and one line with exit code 2 for input that cannot be used."""

import json
import os
import shutil

import pytest

from analysis.__main__ import main
from analysis.findings import Findings

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
