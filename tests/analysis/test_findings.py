"""The findings file: what is written is what is read, and anything else is refused by name."""

import json

import pytest

from analysis.findings import (
    CutEffect,
    Effect,
    Estimate,
    Findings,
    FindingsError,
    Flow,
    Following,
    Items,
    Language,
    Latent,
    Lens,
    PlainAnswer,
    Probe,
    Readout,
    Reliance,
    Sample,
    Shift,
    Tuned,
)

E = Estimate(0.25, 0.1, 0.4, 40, 8)
ABOVE = [Effect(0.15, 0.1, 0.2, 4, 2, 0.01, 0.02, 1.5) for _ in range(3)]
D = Effect(0.25, 0.1, 0.4, 40, 8, 0.01, 0.04, 0.5)
NOTHING = Estimate(None, None, None, 0, 0)


def sample(verdict="vision", condition="counterfactual", modality="hear"):
    return Sample("c1", "media/c1.mp4", condition, "a dog", "a bell", "What?", modality, "a dog", verdict, "dog.webp", "bell.ogg")


def full():
    return Findings(
        "models/organism", None, "models/base", "test", "hash", 2, {"dtype": "float32", "versions": {"torch": "2"}, "layers": [1, 2], "note": None},
        following=[Following("counterfactual", "hear", E, E, E, E, E, NOTHING, E)],
        reliance=[Reliance("hear", D, D, E, 0.01, None, 0.1)],
        knockout=[CutEffect("video->emitters", 0, 2, "from", "counterfactual", "hear", D, None, E, None)],
        flow=[Flow("emitters", "plain", "factual", {"audio": [E, E], "video": [E, E]})],
        probes=[Probe("audio", "audio", [E, E, E], [0.1, 0.1, 0.1], None, [0.0, 0.0, 0.0], ABOVE, "5 folds")],
        lens=[Lens("audio", "audio", 5, [E, E, E], [0.0, 0.0, 0.0], ABOVE)],
        latent=Latent(1, E, E, 5, "any row", Readout(0, E), Readout(2, E)),
        language=Language(E, E, E, [PlainAnswer("What is the capital of France?", ["Paris"], "Paris.", True)]),
        tuned=Tuned(20, 480, [E, E, E], [E, E, E], [Lens("audio", "audio", 5, [E, E, E], [0.0] * 3, ABOVE, "tuned")], Latent(1, E, E)),
        shift=[Shift("all", "factual", E, E, E, E)],
        samples=[sample()],
        items=[Items(["c1", "c2"], [["a", "a"], ["b", "c"]], False, {"following|factual|hear||audio": "01"}, {})],
        left_out=["No judge."],
    )  # fmt: skip


def test_round_trip(tmp_path):
    findings = full()
    findings.save(tmp_path / "deep" / "f.json")
    assert Findings.load(tmp_path / "deep" / "f.json") == findings
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f.json"]  # no partial file is left


def test_following_rate():
    assert full().following_rate("counterfactual", "hear") is not None
    assert full().following_rate("factual", "hear") is None


@pytest.mark.parametrize(
    "condition, modality, verdict, correct",
    [
        ("counterfactual", "hear", "audio", True),
        ("counterfactual", "hear", "vision", False),
        ("counterfactual", "see", "vision", True),
        ("counterfactual", "see", "audio", False),
        ("unseen_counterfactual", "see", "audio", False),
        ("factual", "see", "audio", True),
        ("unseen_factual", "hear", "audio", True),
        ("factual", "hear", "both", False),
        ("video_only", "see", "vision", True),
        ("video_only", "hear", "nothing", True),
        ("video_only", "hear", "vision", False),
        ("audio_only", "see", "nothing", True),
        ("audio_only", "see", "unparsed", False),
        ("audio_only", "hear", "audio", True),
        ("muted", "hear", "nothing", True),
        ("near_silent", "hear", "vision", False),
        ("muted", "see", "vision", True),
        ("blanked", "see", "nothing", True),
        ("near_black", "see", "neither", False),
        ("near_black", "hear", "audio", True),
        ("factual", "hear", "nothing", False),
    ],
)
def test_a_right_answer_names_what_the_question_designates(condition, modality, verdict, correct):
    assert sample(verdict, condition, modality).correct is correct


def test_what_is_invented():
    """Of a hundred answers 20 name the sound, 10 the picture, 5 both, 15 something else, 40 nothing, 10 cannot be read: 50 name an event."""
    shares = [Estimate(v, None, None, 100, 1) for v in (0.2, 0.1, 0.05, 0.15, 0.4, 0.1)]
    assert Following("muted", "hear", *shares, NOTHING).invented == pytest.approx(0.5)
    assert Following("muted", "hear", *[NOTHING] * 7).invented is None


def write(tmp_path, change):
    full().save(tmp_path / "f.json")
    raw = json.loads((tmp_path / "f.json").read_text())
    change(raw)
    (tmp_path / "f.json").write_text(json.dumps(raw))
    return tmp_path / "f.json"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.update(format=0), "not a findings file of format"),
        (lambda raw: raw.update(extra=1), "unknown keys .'extra'"),
        (lambda raw: raw.pop("split"), "lacks .'split'"),
        (lambda raw: raw["following"][0]["audio"].update(n="forty"), r"following\[0\].audio.n should be int, not str"),
        (lambda raw: raw["samples"][0].pop("video_source"), r"samples\[0\] lacks .'video_source'"),
        (lambda raw: raw.update(knockout={}), "knockout should be a list"),
        (lambda raw: raw.update(n_layers=True), "n_layers should be int, not bool"),
    ],
)
def test_other_files_are_refused_by_key(tmp_path, change, message):
    path = write(tmp_path, change)
    with pytest.raises(FindingsError, match=message) as caught:
        Findings.load(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_findings(tmp_path):
    with pytest.raises(FindingsError, match="no such file"):
        Findings.load(tmp_path / "absent.json")
    with pytest.raises(FindingsError, match="is a folder"):
        Findings.load(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(FindingsError, match="not JSON"):
        Findings.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(FindingsError, match="not a findings file"):
        Findings.load(tmp_path / "x.json")


def test_numbers_that_json_cannot_hold_are_not_written(tmp_path):
    findings = full()
    findings.probes[0].selectivity[0].value = float("nan")
    with pytest.raises(ValueError):
        findings.save(tmp_path / "f.json")
    assert list(tmp_path.iterdir()) == []
