"""Every cut against whole forward passes under the same cut; the choice of cuts; the self-check."""

import numpy as np
import pytest

from analysis.events import verdict
from analysis.items import ItemStore
from analysis.knockout import CutAnswers, KnockoutSweep, asked, designated, windows
from analysis.visits import Visit
from models import SITES, Cut, CutError
from tests.analysis import brute


def test_windows_of_eight_layers():
    found = windows(8, 3)
    assert [(w.start, w.stop) for w in found if "window" in w.families] == [(i, i + 3) for i in range(6)]
    assert sorted((w.start, w.stop) for w in found if "from" in w.families) == [(k, 8) for k in range(8)]
    assert [w.families for w in found if (w.start, w.stop) == (0, 8)] == [("from", "all")]
    assert [w.families for w in found if (w.start, w.stop) == (5, 8)] == [("window", "from")]
    assert len({(w.start, w.stop) for w in found}) == len(found) == 13


def test_windows_wider_than_the_model():
    assert [(w.start, w.stop, w.families) for w in windows(2, 3)] == [(0, 2, ("window", "from", "all")), (1, 2, ("from",))]


@pytest.fixture(scope="module")
def sweep(subject, clips):
    """All cuts on twelve conflicts in two visits and on four factual clips; cuts into media rows on eight and four of them."""
    sweep = KnockoutSweep(subject, width=2, media_clips=8)
    conflicts = clips.select("test", "counterfactual")[:12]
    visits = [
        Visit(subject, conflicts[:5], "counterfactual"),
        Visit(subject, conflicts[5:], "counterfactual", start=5),
        Visit(subject, clips.select("test", "factual")[:4], "factual"),
    ]
    for visit in visits:
        sweep.add(visit)
    best = sweep.best(1)
    for visit in visits:
        CutAnswers(sweep, best).add(visit)
    return sweep, best, conflicts


@pytest.mark.parametrize("site", SITES)
def test_scores_equal_whole_forward_passes_under_the_cut(sweep, clips, model, site):
    sweep, _, conflicts = sweep
    modality = asked(site)
    for window in windows(model.n_layers, 2):
        cut = Cut.at(site, window.start, window.stop)
        found, score, margin = sweep.deltas("counterfactual", modality, cut)
        assert found == (conflicts[:8] if cut.cuts_media else conflicts)
        for row in (0, 6):
            clip = found[row]
            (own, other), expected = designated(clip, modality), []
            for c in (cut, None):
                expected.append([brute.span_score(model, clips, clip, modality, name, c) for name in (own, other)])
            assert score[row] == pytest.approx(expected[0][0] - expected[1][0], abs=2e-5)
            assert margin[row] == pytest.approx(expected[0][0] - expected[0][1] - expected[1][0] + expected[1][1], abs=4e-5)
        if "emitters" in site or window.start < model.n_layers - 1:  # what other rows look at in the last layer reaches no answer
            assert np.abs(score).max() > 0


def test_answers_under_a_cut_equal_greedy_decoding_without_a_cache(sweep, subject, clips, model):
    sweep, best, conflicts = sweep
    assert [cut.site for cut in best] == list(SITES)
    for cut in best:
        modality = asked(cut.site)
        said = sweep.answers["counterfactual", modality, cut]
        assert [clip for clip, _ in said] == conflicts
        for clip, what in (said[0], said[7]):
            answer = brute.greedy(model, clips, clip, modality, cut)
            assert verdict(answer, clip, modality, subject.reader) == what


def test_rows(sweep, model):
    sweep, best, _ = sweep
    rows = sweep.rows(ItemStore())
    sizes = {"window": 2, "from": 3, "all": 1}
    for condition, n, media in (("counterfactual", 12, 8), ("factual", 4, 4)):
        for site in SITES:
            mine = [r for r in rows if (r.condition, r.site) == (condition, site)]
            assert {f: sum(r.family == f for r in mine) for f in sizes} == sizes
            for r in mine:
                assert r.question == asked(site)
                assert r.delta_logprob.n == (media if Cut.at(site, 0, 1).cuts_media else n)
                assert (r.delta_margin is None) == (condition == "factual")
                answered = Cut.at(site, r.start, r.stop) in best
                assert (r.audio is not None) == (r.vision is not None) == answered
    one = next(r for r in rows if r.condition == "counterfactual" and r.site == "video->emitters" and r.family == "all")
    _, score, margin = sweep.deltas("counterfactual", "hear", Cut.at("video->emitters", 0, model.n_layers))
    assert one.delta_logprob.value == pytest.approx(score.mean()) and one.delta_margin.value == pytest.approx(margin.mean())


def test_best_cuts_are_chosen_on_one_half_only(sweep):
    sweep, best, conflicts = sweep
    choose, report = sweep.halves()
    assert choose and report and not choose & report
    by_id = {c.id: c for c in conflicts}
    for a in choose:
        for b in report:
            x, y = by_id[a], by_id[b]
            assert x.video_rendering != y.video_rendering and x.audio_rendering != y.audio_rendering
            assert {x.video_label, x.audio_label} != {y.video_label, y.audio_label}
    for cut in best:
        gains = {}
        for window in sweep.windows:
            other = Cut.at(cut.site, window.start, window.stop)
            clips, _, margin = sweep.deltas("counterfactual", asked(cut.site), other)
            gains[other] = np.mean([m for clip, m in zip(clips, margin, strict=True) if clip.id in choose])
        assert gains[cut] == max(gains.values())


def test_a_model_whose_attention_ignores_cuts_is_refused(subject, clips, model):
    sweep = KnockoutSweep(subject)
    visit = Visit(subject, clips.select("test", "counterfactual")[:2], "counterfactual")
    kept = model.text_model.config._attn_implementation
    try:
        model.text_model.set_attn_implementation("sdpa")
        with pytest.raises(CutError):
            sweep.add(visit)
    finally:
        model.text_model.set_attn_implementation(kept)
    assert not sweep._cells


def test_unknown_site(subject):
    with pytest.raises(ValueError, match=r"Unknown sites \['video->answer'\]"):
        KnockoutSweep(subject, ("video->answer",))
