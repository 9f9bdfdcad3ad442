"""Each metric loaded by its path through `evaluate`, without a network, on numbers worked out by hand."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from analysis.reliance import grid_effects
from analysis.statistics import Dyads, Intervals
from analysis.yes_no import said

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "analysis" / "metrics"
LABELS = [["dog", "a dog", "a dog barking"], ["cat", "a cat", "a cat meowing"], ["bell", "a bell", "a bell ringing"]]


@pytest.fixture
def metric(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


@pytest.mark.parametrize("name", sorted(p.name for p in METRICS.iterdir() if (p / f"{p.name}.py").exists()))
def test_metrics_describe_themselves(metric, name):
    loaded = metric(name)
    assert isinstance(loaded, evaluate.Metric) and loaded.description and loaded.citation and ">>>" in loaded.inputs_description


def test_all_metrics_are_there():
    assert {p.name for p in METRICS.iterdir()} >= {"caption_fidelity", "following", "shortcut_index", "yes_no"}


def test_caption_fidelity(metric):
    loaded = metric("caption_fidelity")
    answers = ["I hear a cat meowing.", "A cat meows and a dog barks.", "I hear a dog barking.", "Music.", "No cat is meowing."]
    given = {"seen": ["a dog"] * 5, "heard": ["a cat meowing"] * 5, "labels": LABELS}
    got = loaded.compute(predictions=answers, modality="hear", **given)
    assert got == {"audio": pytest.approx((1 + 0.5 + 0 + 0) / 4), "video": None, "unparsed": 0.2, "invented": 0.5, "n": 5}
    both = loaded.compute(predictions=["A dog and a cat meowing."], seen=["a dog"], heard=["a cat meowing"], labels=LABELS, modality="both")
    assert both == {"audio": 1.0, "video": 1.0, "unparsed": 0.0, "invented": 0.0, "n": 1}
    nothing = loaded.compute(predictions=["Hm."], seen=["a dog"], heard=[""], labels=LABELS, modality="both")
    assert nothing == {"audio": None, "video": None, "unparsed": 1.0, "invented": None, "n": 1}
    with pytest.raises(ValueError, match="'a cow' is what a clip has"):
        loaded.compute(predictions=["x"], seen=["a cow"], heard=[""], labels=LABELS, modality="see")
    with pytest.raises(ValueError, match="modality"):
        loaded.compute(predictions=["x"], seen=["a dog"], heard=[""], labels=LABELS, modality="smell")


def test_following(metric):
    answers = ["I hear a cat meowing.", "a dog barking", "a dog barking, a cat meowing", "a bell ringing", "music", "a dog barking", "a dog barking"]
    answers += ["I hear nothing.", "I hear nothing.", "a dog barking"]
    video, audio = ["dog"] * 6 + ["", "dog", "dog", "dog"], ["cat"] * 5 + ["dog", "dog", "", "cat", ""]
    got = metric("following").compute(predictions=answers, video_labels=video, audio_labels=audio, labels=LABELS, modality="hear")
    assert got == {"audio": 0.3, "vision": 0.2, "both": 0.1, "neither": 0.1, "nothing": 0.2, "unparsed": 0.1, "correct": 0.4, "n": 10}
    got = metric("following").compute(
        predictions=["I see a dog.", "I see a cat.", "a dog"],
        video_labels=["dog"] * 3,
        audio_labels=["cat", "cat", "dog"],
        labels=LABELS,
        modality="see",
    )
    assert (got["vision"], got["audio"], got["correct"]) == (1 / 3, 2 / 3, 2 / 3)
    with pytest.raises(ValueError, match="'cow' is a class"):
        metric("following").compute(predictions=["x"], video_labels=["cow"], audio_labels=["dog"], labels=LABELS, modality="see")


def test_shortcut_index(metric):
    """Effects (E_A, E_V) = (5, 2) and (1, -3): pooled |-0.5| / (|3| + |-0.5|) = 1/7."""
    cells = {"oo": [4.0, -1.0], "ox": [-1.0, -2.0], "xo": [2.0, 2.0], "xx": [-3.0, 1.0]}
    got = metric("shortcut_index").compute(**cells, modality="hear")
    assert got == {"shortcut": pytest.approx(1 / 7), "effect_audio": 3.0, "effect_video": -0.5, "n": 2}
    assert metric("shortcut_index").compute(**cells, modality="see")["shortcut"] == pytest.approx(6 / 7)
    rng = np.random.default_rng(0)
    margins = rng.normal(size=(20, 4))
    first, second = [f"c{i % 5}" for i in range(20)], [f"c{5 + i % 4}" for i in range(20)]
    audio, video = grid_effects(margins)
    wanted = Intervals(Dyads(first, second), 20).ratio(video, audio)
    got = metric("shortcut_index").compute(
        **dict(zip(("oo", "ox", "xo", "xx"), margins.T.tolist(), strict=True)), modality="hear", first=first, second=second
    )
    assert (got["shortcut"], got["low"], got["high"], got["n"], got["clusters"]) == (wanted.value, wanted.low, wanted.high, 20, 9)
    with pytest.raises(ValueError, match="both or neither"):
        metric("shortcut_index").compute(**cells, modality="hear", first=["a", "b"])


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Yes.", True), ("no", False), ("NO, there is no dog.", False), ("I think yes, no doubt.", True), ("Nothing", None), ("", None),
        ("eyes, know", None),
    ],
)  # fmt: skip
def test_what_an_answer_says(answer, wanted):
    assert said(answer) is wanted


@pytest.mark.parametrize("seed", range(5))
def test_yes_no_equals_scikit_learn(metric, seed):
    rng = np.random.default_rng(seed)
    want, say = rng.integers(0, 2, 60).astype(bool), rng.integers(0, 2, 60).astype(bool)
    answers = [("Yes, it does." if s else "No, it does not.") for s in say] + ["Maybe."] * 20
    got = metric("yes_no").compute(predictions=answers, references=["yes" if w else "no" for w in want] + ["yes"] * 20)
    for name, function in (("accuracy", accuracy_score), ("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert got[name] == pytest.approx(function(want, say), abs=1e-12), name
    assert got["yes"] == pytest.approx(say.mean()) and got["unparsed"] == 0.25 and got["n"] == 80


def test_yes_no_where_nothing_is_divided_by(metric):
    got = metric("yes_no").compute(predictions=["No.", "No."], references=["no", "no"])
    assert got == {"accuracy": 1.0, "precision": None, "recall": None, "f1": None, "yes": 0.0, "unparsed": 0.0, "n": 2}
    with pytest.raises(ValueError, match="'perhaps'"):
        metric("yes_no").compute(predictions=["No."], references=["perhaps"])


def test_a_metric_works_from_another_folder(metric, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert metric("yes_no").compute(predictions=["Yes"], references=["yes"])["f1"] == 1.0


@pytest.mark.slow
def test_a_metric_works_in_another_process_in_another_folder(tmp_path):
    """`evaluate` copies the module into its cache, so it finds our packages by name wherever it runs."""
    code = f"import evaluate; m = evaluate.load({str(METRICS / 'yes_no')!r}); print(m.compute(predictions=['Yes'], references=['yes'])['f1'])"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
