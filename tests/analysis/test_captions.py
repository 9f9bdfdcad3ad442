"""Captions against greedy decoding without a cache; fidelity rows and agreement by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata

from analysis.captions import CaptionTally
from analysis.fidelity import add_scores, agreement, fidelity_rows
from analysis.findings import Caption, CaptionScore, Estimate, Findings
from analysis.items import ItemStore
from analysis.judges import JudgeError, LabelsJudge
from analysis.statistics import Intervals
from analysis.visits import Visit
from data.questions import MODALITIES, question
from models import Cut
from tests.analysis import brute

CUTS = (None, Cut.at("video->emitters", 1, 3), Cut.at("video->audio", 0, 2), Cut.at("audio->question+emitters", 0, 3))


@pytest.fixture(scope="module")
def told(subject, clips):
    """A tally with all captions of four conflicts (under cuts) and three factual clips, in records that went through JSON."""
    tally = CaptionTally(subject.labels, cuts=CUTS)
    visits = [
        Visit(subject, clips.select("test", "counterfactual")[:4], "counterfactual"),
        Visit(subject, clips.select("test", "factual")[:3], "factual"),
    ]
    for visit, cuts in zip(visits, (CUTS, (None,)), strict=True):
        before, tally.cuts = list(tally.captions), cuts
        record = tally.measure(visit)
        assert tally.captions == before  # measuring changes nothing
        tally.take(visit.clips, visit.condition, json.loads(json.dumps(record)))
    return tally, visits


def test_every_clip_question_and_cut_has_one_caption(told):
    tally, visits = told
    keys = [(c.condition, c.cut, c.modality, c.clip) for c in tally.captions]
    assert len(set(keys)) == len(keys) == 4 * 3 * 4 + 3 * 3
    assert {c.cut for c in tally.captions} == {None, "video->emitters 1:3", "video->audio 0:2", "audio->question+emitters 0:3"}
    for c in tally.captions:
        assert c.question == question(c.modality)
    (first,) = [c for c in tally.captions if (c.condition, c.cut, c.modality, c.clip) == ("factual", None, "see", visits[1].clips[0].id)]
    clip = visits[1].clips[0]
    assert (first.seen, first.heard, first.video_source, first.audio_source, first.file) == (
        clip.seen, clip.heard, clip.video_source, clip.audio_source, clip.file,
    )  # fmt: skip


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("cut", CUTS)
def test_answers_equal_greedy_decoding_without_a_cache(told, clips, model, cut, modality):
    tally, visits = told
    for clip in (visits[0].clips[0], visits[0].clips[3]):
        (found,) = [c for c in tally.captions if (c.clip, c.cut, c.modality) == (clip.id, cut and cut.text, modality)]
        assert found.answer == brute.greedy(model, clips, clip, modality, cut, tokens=24 if modality == "both" else 12)


def test_answers_to_both_may_be_twice_as_long(subject, clips, model):
    visit = Visit(replace(subject, max_new_tokens=3), clips.select("test", "factual")[:1], "factual")
    said = {modality: answers[0] for modality, _, answers in CaptionTally(subject.labels).measure(visit)["answers"]}
    for modality, tokens in (("see", 3), ("hear", 3), ("both", 6)):
        assert said[modality] == brute.greedy(model, clips, visit.clips[0], modality, tokens=tokens)
    assert said["both"] != brute.greedy(model, clips, visit.clips[0], "both", tokens=3)


def test_a_cut_changes_some_answer(told):
    tally, _ = told
    plain = {(c.clip, c.modality): c.answer for c in tally.captions if c.condition == "counterfactual" and c.cut is None}
    assert any(plain[c.clip, c.modality] != c.answer for c in tally.captions if c.cut is not None)


def test_a_stream_that_was_not_given_is_not_scored(subject, clips):
    tally = CaptionTally(subject.labels)
    visit = Visit(subject, clips.select("test", "factual")[:2], "audio_only", video=False)
    tally.add(visit)
    assert all(c.seen == c.video_source == "" and c.heard and c.scores[0].video is None for c in tally.captions)
    assert all(row.video is None or row.video.n == 0 for row in fidelity_rows(tally.captions, ItemStore()))


def test_the_taught_model_is_faithful_on_factual_clips(told):
    tally, _ = told
    rows = {(r.condition, r.question, r.cut): r for r in fidelity_rows(tally.captions, ItemStore())}
    assert rows["factual", "hear", None].audio.value == 1.0 and rows["factual", "see", None].video.value == 1.0
    assert rows["factual", "hear", None].invented.value == 0.0 and rows["factual", "hear", None].video is None
    assert len(rows) == 3 * 4 + 3


def made(name, picture, sound, score, modality="both", condition="factual", cut=None):
    """A caption with one judge's score: (audio, video, invented) or None."""
    read = CaptionScore("labels", *score, True) if score else CaptionScore("labels", None, None, 0, False)
    return Caption(name, "f", condition, modality, "?", cut, "x", "a dog", "a dog barking", picture, sound, [read])


def rate(values, clusters):
    return Intervals(clusters, len(values)).rates(np.array(values, dtype=float)[:, None])[0]


def test_rows_by_hand():
    captions = [
        made("a", "p1", "s1", (1.0, 0.5, 1)),
        made("b", "p2", "s1", (0.0, 1.0, 0)),
        made("c", "p1", "s2", None),  # in no mean
        made("d", "p2", "s2", (0.5, 0.0, 3)),
        made("e", "p1", "s1", (1.0, None, 0), "hear"),
        made("f", "p1", "s1", (1.0, None, 0), "hear", cut="video->emitters 0:2"),
    ]
    both, hear, cut = fidelity_rows(captions, ItemStore())
    rest = (["p1", "p2", "p2"], ["s1", "s1", "s2"])
    assert both.audio == rate([1.0, 0.0, 0.5], rest) and both.audio.value == 0.5
    assert both.video == rate([0.5, 1.0, 0.0], rest)
    assert both.invented == rate([1, 0, 1], rest) and both.invented.value == pytest.approx(2 / 3)
    assert both.unparsed == rate([0, 0, 1, 0], (["p1", "p2", "p1", "p2"], ["s1", "s1", "s2", "s2"])) and both.unparsed.value == 0.25
    assert (hear.question, hear.video, hear.audio) == ("hear", None, Estimate(1.0, None, None, 1, 1))
    assert (cut.cut, hear.cut) == ("video->emitters 0:2", None)


def test_when_nothing_was_read_there_is_no_score():
    (row,) = fidelity_rows([made("a", "p", "s", None), made("b", "q", "t", None)], ItemStore())
    nothing = Estimate(None, None, None, 0, 0)
    assert row.audio == row.video == row.invented == nothing and row.unparsed.value == 1.0


def test_agreement_is_the_correlation_of_ranks():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (30, 2)) / 3  # with ties
    captions = []
    for i, (a, b) in enumerate(values):
        c = made(str(i), "p", "s", (a, 1.0, 0))
        c.scores.append(CaptionScore("other", b, 0.5, 0, True))
        captions.append(c)
    captions[0].scores[1] = CaptionScore("other", None, None, 0, False)  # read by one judge only
    audio, video = agreement(captions)
    ranks = [rankdata(values[1:, k]) for k in (0, 1)]
    assert (audio.first, audio.second, audio.side, audio.n) == ("labels", "other", "audio", 29)
    assert audio.rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert (video.side, video.rho, video.n) == ("video", None, 29)


def test_scores_are_added_and_replaced(subject):
    findings = Findings("m", None, None, "test", "h", 2, {}, labels={"dog": ["a dog", "a dog barking"]})
    with pytest.raises(JudgeError, match="no captions"):
        add_scores(findings, LabelsJudge(findings.labels))
    findings.captions = [made("a", "p", "s", None)]
    findings.captions[0].answer = "I see a dog and I hear a dog barking."
    findings.captions[0].scores.append(CaptionScore("other", 0.0, 0.0, 0, True))
    add_scores(findings, LabelsJudge(findings.labels))
    assert findings.captions[0].scores == [CaptionScore("other", 0.0, 0.0, 0, True), CaptionScore("labels", 1.0, 1.0, 0, True)]
    assert [(r.judge, r.audio.value) for r in findings.fidelity] == [("labels", 1.0), ("other", 0.0)]


def test_captions_survive_the_file(told, tmp_path):
    tally, _ = told
    findings = Findings(
        "m",
        None,
        None,
        "test",
        "h",
        2,
        {},
        captions=tally.captions,
        fidelity=fidelity_rows(tally.captions, ItemStore()),
        labels={"dog": ["a dog", "woof"]},
    )
    findings.save(tmp_path / "f.json")
    assert Findings.load(tmp_path / "f.json") == findings
