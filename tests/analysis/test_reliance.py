"""The 2x2 grid by hand and against whole forward passes; following against greedy decoding without a cache."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.events import VERDICTS, verdict
from analysis.items import ItemStore, clip_clusters
from analysis.reliance import FollowingTally, ScoreTable, grid_effects, grid_margins, reliance_rows, source_groups, want_grids
from analysis.visits import MODALITIES, Visit, forced, trimmed
from data.clips import Clip, DataError, Grid
from data.questions import answer, question
from tests.analysis import brute


@pytest.mark.parametrize(
    ("margins", "audio", "video"),
    [
        ((3, -3, 3, -3), 6, 0),  # only the sound counts
        ((3, 3, -3, -3), 0, 6),  # only the picture counts
        ((4, -1, 2, -3), 5, 2),  # both, additively
        ((4, 1, 0, -3), 3, 4),
        ((5, 1, 1, 1), 2, 2),  # an interaction is shared
    ],
)
def test_grid_effects_by_hand(margins, audio, video):
    e_audio, e_video = grid_effects([margins, margins])
    assert e_audio.tolist() == [audio] * 2 and e_video.tolist() == [video] * 2


def made(name, label, picture="p", sound="s"):
    return Clip(
        name, f"{name}.mp4", "test", "factual", label, label, label, label, f"{label} {picture}", f"{label} {sound}", name, name, name, name, 2.0
    )


def test_shortcut_is_pooled_over_grids_and_mirrored_on_see_questions():
    """Two grids with effects (E_A, E_V) = (1, 3) and (3, -2): pooled |0.5| / (|2| + |0.5|) = 0.2, where the mean of ratios would be 0.575."""
    names = {"a": "dog", "b": "cat", "c": "cow", "d": "pig", "ab": "dog", "ba": "dog", "cd": "dog", "dc": "dog"}
    by_id = {name: made(name, label) for name, label in names.items()}
    grids = [Grid("1", "test", "a", "ab", "ba", "b"), Grid("2", "test", "c", "cd", "dc", "d")]
    table = ScoreTable()
    want_grids(table, grids, by_id)
    assert table.wanted["ab"] == dict.fromkeys([("hear", "dog"), ("hear", "cat"), ("see", "dog"), ("see", "cat")]) and len(table.wanted) == 8
    for grid, (e_audio, e_video) in zip(grids, [(1, 3), (3, -2)], strict=True):
        # m = ½(E_V v + E_A a), v = 1 where the picture is of i and -1 where it is of j, a the same for the sound
        margins = ((e_video + e_audio) / 2, (e_video - e_audio) / 2, (e_audio - e_video) / 2, -(e_video + e_audio) / 2)
        for cell, margin in zip((grid.oo, grid.ox, grid.xo, grid.xx), margins, strict=True):
            for modality in MODALITIES:
                table._scores[cell, modality, names[grid.oo]] = margin - 1.5
                table._scores[cell, modality, names[grid.xx]] = -1.5
    hear, see = reliance_rows(table, grids, by_id, ItemStore(), flips=50)
    assert (hear.effect_audio.value, hear.effect_video.value) == (2.0, 0.5)
    assert hear.shortcut.value == pytest.approx(0.2) and see.shortcut.value == pytest.approx(0.8)
    assert hear.shortcut.n == 2 and hear.shortcut.clusters == 4


def test_margins_equal_whole_forward_passes(subject, clips, model):
    grids = [g for g in clips.grids if g.split == "test"][:3]
    by_id, table = clips.by_id(), ScoreTable()
    want_grids(table, grids, by_id)
    cells = [by_id[name] for name in table.wanted]
    table.add(Visit(subject, cells[:5], "x"))
    table.add(Visit(subject, cells[5:], "x"))
    for modality in MODALITIES:
        margins = grid_margins(table, grids, modality, by_id)
        for grid, row in zip(grids, margins, strict=True):
            i, j = by_id[grid.oo], by_id[grid.xx]
            names = (i.audio_label, j.audio_label) if modality == "hear" else (i.video_label, j.video_label)
            expected = [
                np.subtract(*(brute.span_score(model, clips, by_id[cell], modality, name) for name in names))
                for cell in (grid.oo, grid.ox, grid.xo, grid.xx)
            ]
            assert row == pytest.approx(expected, abs=2e-5)


def test_what_is_followed_equals_greedy_decoding_without_a_cache(subject, clips, model):
    tally = FollowingTally()
    conflicts, factual = clips.select("test", "counterfactual")[:10], clips.select("test", "factual")[:6]
    tally.add(Visit(subject, conflicts[:7], "counterfactual"))
    tally.add(Visit(subject, conflicts[7:], "counterfactual"))
    tally.add(Visit(subject, factual, "factual"))
    tally.add(Visit(subject, factual, "audio_only", video=False))
    rows = {(r.condition, r.question): r for r in tally.rows(ItemStore())}
    assert set(rows) == {(c, m) for c in ("counterfactual", "factual", "audio_only") for m in MODALITIES}
    for (condition, modality), row in rows.items():
        asked = conflicts if condition == "counterfactual" else factual
        video = condition != "audio_only"
        said = [brute.greedy(model, clips, clip, modality, video=video) for clip in asked]
        verdicts = [verdict(a, c, modality, subject.reader, video=video) for a, c in zip(said, asked, strict=True)]
        for name in VERDICTS:
            assert getattr(row, name).value == pytest.approx(np.mean([v == name for v in verdicts])), (condition, modality, name)
        samples = [s for s in tally.samples if (s.condition, s.modality) == (condition, modality)]
        assert [(s.answer, s.verdict) for s in samples] == list(zip(said, verdicts, strict=True))
        assert [(s.video_label, s.audio_label) for s in samples] == [(c.video_label, c.audio_label) for c in asked]
        assert row.correct.value == pytest.approx(np.mean([s.correct for s in samples]))
        assert sum(getattr(row, name).value for name in VERDICTS) == pytest.approx(1)
        assert row.audio.n == len(asked)
        assert row.cut_off.value == pytest.approx(np.mean([s.cut_off for s in samples])) and row.cut_off.n == len(asked)
    assert rows["factual", "see"].correct.value > 0.5  # the model was taught these


def test_answers_that_end_at_the_limit_are_counted(subject, clips):
    """ "I see a dog." is some tokens and an end: with a limit of that many tokens it is cut off, with one more it is whole."""
    chosen = clips.select("test", "factual")[:4]
    lengths = [len(ids) for ids in Visit(subject, chosen, "factual").answer_ids("see")]
    assert max(lengths) < subject.max_new_tokens
    for limit in (min(lengths), max(lengths), max(lengths) + 1):
        tally = FollowingTally(("see",))
        tally.add(Visit(replace(subject, max_new_tokens=limit), chosen, "factual"))
        (row,) = tally.rows(ItemStore())
        assert row.cut_off.value == pytest.approx(np.mean([n >= limit for n in lengths]))
        assert [s.cut_off for s in tally.samples] == [n >= limit for n in lengths]


def test_forced_answers_are_what_was_generated(subject, clips, model):
    visit = Visit(subject, clips.select("test", "counterfactual")[:4], "x")
    spoken, ids = visit.spoken("hear"), visit.answer_ids("hear")
    for row, answer_ids in enumerate(ids):
        assert spoken.logits[row, : len(answer_ids)].argmax(-1).tolist() == answer_ids
        assert spoken.targets[row, : len(answer_ids) + 1].tolist() == [*answer_ids, model.end_id]
    empty = forced(model, "hear", [])
    assert empty.targets.tolist() == [model.end_id] and len(empty.ids) == empty.first + 1


def test_trimmed_suffix_ends_with_the_label(model, clips):
    whole = model.suffix(question("hear"), *answer("hear", "a dog", "a dog barking"))
    short = trimmed(whole)
    assert len(short.ids) == short.first + len(short.targets) and bool(short.span[-1]) and short.span.sum() == whole.span.sum()
    assert model.tokenizer.decode(short.targets[short.span]).strip() == "a dog barking"


def test_a_clip_that_lost_its_sound_is_refused(subject, clips, model, monkeypatch):
    media = model.media
    monkeypatch.setattr(model, "media", lambda clip, root, video=True, audio=True: media(clip, root, audio=False))
    clip = clips.select("test", "factual")[0]
    with pytest.raises(DataError, match=rf"{clip.file}: the prompt has no audio tokens"):
        Visit(subject, [clip], "factual")


def test_clusters():
    conflicts = [made("a", "dog"), made("b", "dog", sound="t"), made("c", "cat")]
    assert clip_clusters(conflicts) == (["dog p", "dog p", "cat p"], ["dog s", "dog t", "cat s"])
    assert clip_clusters(conflicts, video=False) == ["dog s", "dog t", "cat s"]
    assert clip_clusters(conflicts, audio=False) == ["dog p", "dog p", "cat p"]


def test_source_groups_join_clips_that_share_a_source():
    first, second = [made("a", "dog"), made("b", "dog", picture="q")], [made("c", "cat"), made("d", "cat", sound="t")]
    groups = source_groups([*first, *second])
    assert groups["a"] == groups["b"] and groups["c"] == groups["d"] and groups["a"] != groups["c"]
    odd = [made("a", "dog"), made("b", "dog", picture="q")]  # both members of a grid share a recording
    assert len(set(source_groups(odd).values())) == 2
