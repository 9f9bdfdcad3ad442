"""Ceilings by hand: streams whose rows we choose, and the ratio of answers to what a probe reads from them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from analysis.__main__ import _told_apart, main
from analysis.ceiling import Ceiling, _ratio, answered, ceiling_table, ceilings, save
from analysis.diagnose import DiagnoseSettings, diagnose
from analysis.findings import Estimate, Findings
from analysis.probing import SHRINKAGE
from analysis.statistics import Intervals
from data.build import DataConfig, PerSplit, build
from data.clips import DataError
from data.render import RenderSettings
from models import load_model
from models.sequences import StreamFeatures

CLASSES = ("dog", "cat", "rooster", "train")


@pytest.fixture(scope="module")
def more_clips(tmp_path_factory):
    """Several training clips a class, so that there is a spread within classes."""
    config = DataConfig(renderings=PerSplit(4, 1, 1, 2, 2), rounds=PerSplit(1, 1, 1, 1, 1), classes=CLASSES, render=RenderSettings(size=84))
    return build(config, tmp_path_factory.mktemp("ceiling") / "clips", progress=False)


@pytest.fixture
def told_model(model_folder, more_clips):
    """Its streams are ours: rows that say the class, but one of two trains of a new recording sounds like a cat, and a dog's picture is that of a cat
    anywhere but in training. (Of these classes the train alone has a recording that training does not know.)
    """
    model = load_model(model_folder)
    rng = np.random.default_rng(0)
    names = sorted(CLASSES)
    for clip in more_clips.select(condition="factual"):
        for stream, label, sha in (("video", clip.video_label, clip.video_sha256), ("audio", clip.audio_label, clip.audio_sha256)):
            wrong = clip.id == "unseen_train_00" if stream == "audio" else label == "dog" and clip.split != "train"
            said = "cat" if wrong else label
            rows = np.zeros((6, model.hidden_size))
            rows[:, :4] = rng.normal(0, 0.1, (6, 4)) + 3 * np.eye(4)[names.index(said)]
            model._streams[stream, sha] = StreamFeatures(torch.tensor(rows, dtype=torch.float32), (6,) if stream == "audio" else (1, 4, 6))
    return model


def test_the_share_that_a_probe_reads(told_model, more_clips):
    rows = {(row.stream, row.split): row for row in ceilings(told_model, more_clips, progress=False)}
    assert rows["audio", "test"].accuracy.value == 1
    assert rows["audio", "unseen"].accuracy.value == 0.5
    assert rows["video", "test"].accuracy.value == rows["video", "unseen"].accuracy.value == 0.75
    assert {row.learned for row in rows.values()} == {16}
    assert [rows["audio", split].accuracy.n for split in ("test", "unseen")] == [8, 2]


def test_against_sklearn(model_folder, more_clips):
    """Real towers: the same predictions as sklearn's discriminant analysis of the mean rows."""
    model = load_model(model_folder)
    learned = more_clips.select("train", "factual")
    tried = [c for c in more_clips.select("unseen", "factual") if c.audio_source not in {k.audio_source for k in learned}]
    mean = lambda found: np.stack([model.media(c, more_clips.root).audio.features.double().mean(0).numpy() for c in found])  # noqa: E731
    x, z = mean(learned), mean(tried)
    centre, spread = x.mean(0), x.std(0)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=[0.25] * 4)
    lda.fit((x - centre) / spread, [c.audio_label for c in learned])
    right = np.mean(lda.predict((z - centre) / spread) == np.array([c.audio_label for c in tried]))
    rows = {(row.stream, row.split): row for row in ceilings(model, more_clips, progress=False)}
    assert rows["audio", "unseen"].accuracy.value == pytest.approx(right)


@pytest.fixture(scope="module")
def few_findings(model_folder, more_clips):
    return diagnose(load_model(model_folder), more_clips, dataclasses.replace(DiagnoseSettings().answers_only(), unseen=None, bare=0), progress=False)


def test_answers_are_held_against_it(told_model, more_clips, few_findings, tmp_path):
    rows = ceilings(told_model, more_clips, progress=False)
    unseen = next(row for row in rows if (row.stream, row.split) == ("audio", "unseen"))
    asked = [s for s in few_findings.samples if (s.condition, s.modality) == ("unseen_factual", "hear") and s.audio_source not in unseen.known]
    right = np.mean([s.verdict == "audio" for s in asked])
    save(tmp_path / "ceiling.json", rows, [("before", few_findings)], more_clips)
    [written] = [r for r in json.loads((tmp_path / "ceiling.json").read_text()) if (r["stream"], r["split"]) == ("audio", "unseen")]
    found = written["answers"]["before"]["factual"]
    assert (found["right"]["value"], found["right"]["n"], found["read"]["value"]) == (right, len(asked), 0.5)
    assert found["ratio"]["value"] == right / 0.5
    assert ceiling_table(rows, [("before", few_findings)], more_clips).row_count == 11  # no conflict has the one new recording


def test_the_probe_is_asked_about_the_same_streams(more_clips, few_findings):
    """Conflicts take a sound from some factual clip: a probe that reads those of three, where the answers say two."""
    template = next(s for s in few_findings.samples if (s.condition, s.modality) == ("unseen_factual", "hear"))
    conflicts = more_clips.select("unseen", "counterfactual")
    samples = [
        dataclasses.replace(
            template,
            clip=c.id,
            condition="unseen_counterfactual",
            verdict="vision" if i % 2 else "audio",
            video_source=c.video_source,
            audio_source=c.audio_source,
        )
        for i, c in enumerate(conflicts)
    ]
    findings = dataclasses.replace(few_findings, samples=samples)
    said = {c.audio_rendering for c in conflicts[:3]}
    everywhere = {c.id: c.id in said for c in more_clips.select("unseen", "factual")}
    row = Ceiling("audio", "unseen", Estimate(0.1, None, None, 8, 4), everywhere, 16, frozenset())
    found = answered(findings, row, more_clips)
    assert list(found) == ["counterfactual"]
    read = np.array([c.audio_rendering in said for c in conflicts], dtype=float)
    right = np.array([s.verdict == "audio" for s in samples], dtype=float)
    assert 0 < right.mean() < read.mean()
    assert found["counterfactual"].read.value == read.mean() and found["counterfactual"].ratio.value == right.mean() / read.mean()
    never = dataclasses.replace(row, read=dict.fromkeys(everywhere, False))
    assert answered(findings, never, more_clips)["counterfactual"].ratio.value is None


def test_the_interval_of_a_ratio():
    """One clip a source: the linearised variance by hand, Σ (right - r read)² / (n (n - 1) mean read²)."""
    values = np.array([[1, 1], [0, 1], [1, 1], [0, 0], [1, 0], [1, 1], [0, 1], [1, 1]], dtype=float)
    found = _ratio(values, Intervals(list(range(8)), 8))
    r = 5 / 6
    error = np.sqrt(((values[:, 0] - r * values[:, 1]) ** 2).sum() / (8 * 7) / (6 / 8) ** 2)
    half = scipy.stats.t.ppf(0.975, 7) * error
    assert (found.value, found.low, found.high) == pytest.approx((r, r - half, r + half), rel=1e-6)


def test_on_the_unseen_split_only_new_sources_count(few_findings, more_clips):
    """Of the answers about unseen clips those whose picture the probe was fitted on are left out; the test split keeps all."""
    asked = [s for s in few_findings.samples if (s.condition, s.modality) == ("unseen_factual", "see")]
    known = asked[0].video_source
    read = {clip.id: True for clip in more_clips.clips if clip.condition == "factual"}
    row = Ceiling("video", "unseen", Estimate(0.5, None, None, 8, 4), read, 16, frozenset({known}))
    left = [s for s in asked if s.video_source != known]
    found = answered(few_findings, row, more_clips)["factual"].right
    assert 0 < len(left) < len(asked) and found.n == len(left) and found.value == np.mean([s.verdict == "audio" for s in left])
    everywhere = answered(few_findings, dataclasses.replace(row, split="test", stream="audio"), more_clips)["factual"].right
    assert everywhere.value == few_findings.following_rate("factual", "hear").correct.value
    see = answered(few_findings, dataclasses.replace(row, split="test", stream="video"), more_clips)["counterfactual"].right
    assert see.value == few_findings.following_rate("counterfactual", "see").correct.value


def test_sources_of_swapped_training_clips_are_known_too(told_model, more_clips):
    """The one new recording, that of a train, sounds in a swapped clip of the train split: then no unseen clip is of a new recording."""
    [new] = {c.audio_source for c in more_clips.select("unseen", "factual") if c.audio_label == "train"}
    swap = next(c for c in more_clips.select("train", "counterfactual") if c.audio_label == "train")
    changed = tuple(dataclasses.replace(c, audio_source=new) if c.id == swap.id else c for c in more_clips.clips)
    rows = {(row.stream, row.split) for row in ceilings(told_model, dataclasses.replace(more_clips, clips=changed), progress=False)}
    assert rows == {("audio", "test"), ("video", "test"), ("video", "unseen")}


def test_the_command(model_folder, more_clips, few_findings, tmp_path, capsys):
    few_findings.save(tmp_path / "before.json")
    arguments = ["--model", str(model_folder), "--clips", str(more_clips.root), "--out", str(tmp_path / "out.json")]
    assert main(["ceiling", str(tmp_path / "before.json"), *arguments]) == 0
    assert "probe" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())) == 4
    assert main(["ceiling", *arguments]) == 0  # without findings


def test_files_of_one_name_are_told_apart_by_their_folders():
    runs = [Path("out/plan/seed_0/findings/before.json"), Path("out/plan/seed_0/findings/after.json"), Path("out/plan/seed_1/findings/after.json")]
    assert _told_apart(runs) == ("seed_0/before", "seed_0/after", "seed_1/after")
    assert _told_apart(runs[1:]) == ("seed_0/after", "seed_1/after")  # what they have in common is said too where it is the file's own name
    assert _told_apart(runs[:2]) == ("before", "after")
    assert _told_apart([Path("after.json"), Path("b/after.json")]) == ("after.json", "b/after.json")
    assert _told_apart([]) == ()


def test_findings_of_other_clips_are_refused(model_folder, more_clips, few_findings, tmp_path, capsys):
    other = Findings.load(_saved(few_findings, tmp_path / "other.json"))
    other.data_hash = "another"
    assert main(["ceiling", str(_saved(other, tmp_path / "other.json")), "--model", str(model_folder), "--clips", str(more_clips.root)]) == 2
    assert "other.json" in capsys.readouterr().err
    own = _saved(few_findings, tmp_path / "own.json")
    assert main(["ceiling", str(own), "--model", str(model_folder.parent / "base"), "--clips", str(more_clips.root)]) == 2
    assert "not of" in capsys.readouterr().err


def test_without_training_clips_there_is_no_ceiling(told_model, more_clips):
    with pytest.raises(DataError, match="train split"):
        ceilings(told_model, dataclasses.replace(more_clips, clips=[c for c in more_clips.clips if c.split != "train"]), progress=False)


def _saved(findings, path):
    findings.save(path)
    return path
