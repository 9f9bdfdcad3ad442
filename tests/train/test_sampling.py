"""What a step trains on is a function of (seed, step) and holds nothing that is held out."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from analysis.plain_text import PASSAGES
from analysis.plain_text import QUESTIONS as TEXT_QUESTIONS
from data.clips import Clips, DataError
from data.questions import MODALITIES, QUESTIONS
from tests.train.conftest import plain
from train.config import Config, DataPart, LossPart, SchedulePart
from train.plan import Choice
from train.sampling import dosed, passages, sample_step, share, training_clips

EMPTY = {"silence", "near_silence", "black", "near_black"}


def test_a_step_depends_on_seed_and_step_only(clips, config, plan):
    first = sample_step(clips, config, plan, 5)
    sample_step(clips, config, plan, 6)
    assert sample_step(clips, config, plan, 5) == first
    assert sample_step(clips, config, plan, 6) != first
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    assert sample_step(clips, other, plan, 5) != first


def test_a_group_is_a_grid_with_its_questions_and_a_bare_clip(clips, config, plan):
    for group in sample_step(clips, config, plan, 0):
        cells = [ask.clip for ask in plain(group)[::2]]
        # Four cells, one of them with a both-question, and a bare clip.
        assert sorted(a.modality for a in group.asks) == ["both"] * 2 + ["hear"] * 5 + ["see"] * 5
        assert [a.bare for a in group.asks] == [False] * 9 + [True] * 3
        assert [c.condition for c in cells] == ["factual", "counterfactual", "counterfactual", "factual"]
        oo, ox, xo, xx = cells
        assert (ox.video_sha256, ox.audio_sha256) == (oo.video_sha256, xx.audio_sha256)
        assert (xo.video_sha256, xo.audio_sha256) == (xx.video_sha256, oo.audio_sha256)


def test_neighbours_of_a_cell_and_wrong_answers(clips, config, plan):
    """What the other stream, or the grid's other clip, would have as the answer; and the cells that differ in one stream."""
    for ask in (a for group in sample_step(clips, config, plan, 0) for a in plain(group)):
        same, swapped = ("audio_sha256", "video_sha256") if ask.modality == "hear" else ("video_sha256", "audio_sha256")
        assert getattr(ask.same, same) == getattr(ask.clip, same) and getattr(ask.same, swapped) != getattr(ask.clip, swapped)
        assert getattr(ask.swapped, swapped) == getattr(ask.clip, swapped) and getattr(ask.swapped, same) != getattr(ask.clip, same)
        assert ask.wrong == (ask.swapped.heard if ask.modality == "hear" else ask.swapped.seen) != ask.truth[1]
        if ask.clip.condition == "counterfactual":  # the wrong answer is what the other stream suggests
            by_class = clips.labels()
            other = by_class[ask.clip.video_label if ask.modality == "hear" else ask.clip.audio_label]
            assert ask.wrong == other[1 if ask.modality == "hear" else 0]


def test_every_way_of_taking_a_stream_away_is_drawn_alike(clips, config, plan):
    bare = [[a for a in group.asks if a.bare] for step in range(4) for group in sample_step(clips, config, plan, step)]
    ways = Counter("no sound" if not b[0].audio else "no picture" if not b[0].video else b[0].clip.condition for b in bare)
    assert ways == {"muted": 2, "blanked": 2, "no sound": 2, "no picture": 2}
    for hear, see, both in bare:
        silent = not hear.audio or hear.clip.condition == "muted"
        assert hear.about_nothing == silent and see.about_nothing != silent and not both.about_nothing
        assert (hear if silent else see).truth == (("I hear nothing." if silent else "I see nothing."), "nothing")
        assert "nothing" in both.truth[0]


def test_other_ways_to_draw(clips, config, plan):
    def conditions(train_on, **loss):
        settings = Config(data=DataPart(train_on=train_on), schedule=config.schedule, loss=LossPart(**loss))
        return [a for step in range(20) for group in sample_step(clips, settings, plan, step) for a in plain(group)[::2]]

    one = conditions("one_swap")
    assert [a.clip.condition for a in one[:4]] == ["factual", "counterfactual"] * 2
    assert all(a.clip.video_sha256 == b.clip.video_sha256 for a, b in zip(one[::2], one[1::2], strict=True))
    shuffled = Counter(a.clip.condition for a in conditions("shuffled"))
    assert min(shuffled.values()) > 0.3 * shuffled.total() and all(a.same is None for a in one)
    dropped = Counter((a.video, a.audio) for a in conditions("factual", modality_dropout=0.5))
    assert set(dropped) == {(True, True), (False, True), (True, False)} and 0.3 < dropped[True, True] / dropped.total() < 0.7


def test_a_dose_is_part_of_a_larger_one(clips):
    grids = [g for g in clips.grids if g.split == "train"]
    half, quarter = dosed(grids, 0.5, 0), dosed(grids, 0.25, 0)
    assert len(half) == round(len(grids) / 2) and {g.id for g in quarter} < {g.id for g in half} and dosed(grids, 1, 0) == grids


def test_wordings_vary(clips, config, plan):
    asked = Counter(a.question for step in range(20) for group in sample_step(clips, config, plan, step) for a in group.asks)
    assert set(asked) == {wording for modality in MODALITIES for wording in QUESTIONS[modality]}


def test_nothing_held_out_is_ever_drawn(clips, config, factual_config, plan):
    held = {tuple(p) for part in ("selection", "test") for p in clips.manifest["pairs"][part]}
    elsewhere = {r for c in clips.clips if c.split != "train" for r in (c.video_rendering, c.audio_rendering)}
    for settings in (config, factual_config):
        for step in range(50):
            for ask in (a for group in sample_step(clips, settings, plan, step) for a in group.asks):
                assert ask.clip.split == "train"
                assert tuple(sorted((ask.clip.video_label, ask.clip.audio_label))) not in held
                assert not {ask.clip.video_rendering, ask.clip.audio_rendering} & (elsewhere - EMPTY)


def test_factual_training_sees_factual_clips_only(clips, factual_config, plan):
    drawn = [a for step in range(20) for group in sample_step(clips, factual_config, plan, step) for a in group.asks]
    assert {a.clip.condition for a in drawn if not a.bare} == {"factual"}
    assert {c.condition for c in training_clips(clips, "factual")} == {"factual", "muted", "blanked"}


def test_class_weights_steer_the_draw(clips, config, plan):
    grids = [g for g in clips.grids if g.split == "train"]
    favourite = clips.by_id()[grids[0].oo].audio_label
    plan.class_weights = Choice(dict.fromkeys(clips.labels(), 0.01) | {favourite: 2.0}, "")
    drawn = Counter(a.clip.audio_label for step in range(50) for group in sample_step(clips, config, plan, step) for a in plain(group))
    assert drawn.most_common(1)[0][0] == favourite


def test_where_see_questions_lead_class_weights_are_of_pictures(clips, config, plan):
    grids = [g for g in clips.grids if g.split == "train"]
    favourite = clips.by_id()[grids[0].oo].video_label
    plan.class_weights, plan.leads = Choice(dict.fromkeys(clips.labels(), 0.01) | {favourite: 2.0}, ""), Choice("see", "")
    drawn = Counter(a.clip.video_label for step in range(50) for group in sample_step(clips, config, plan, step) for a in plain(group))
    assert drawn.most_common(1)[0][0] == favourite


def test_shares_are_the_whole_in_order(clips, plan):
    config = Config(schedule=SchedulePart(grids=4))
    groups = sample_step(clips, config, plan, 0)
    assert [group for rank in range(2) for part in range(2) for group in share(groups, rank, 2, part, 2)] == groups
    with pytest.raises(DataError, match="use a multiple of 3"):
        share(groups, 0, 3, 0, 1)


def test_too_few_clips_are_refused(clips):
    empty = Clips(clips.root, tuple(clips.select("test")), (), clips.manifest)
    with pytest.raises(DataError, match="at least 4 are needed"):
        training_clips(empty, "grids")


def test_bare_clips_are_of_the_dose(clips, config, plan):
    """Their renderings are among those of the grids that are used."""
    settings = dataclasses.replace(config, data=DataPart(dose=0.25))
    grids = dosed([g for g in clips.grids if g.split == "train"], 0.25, 0)
    used = {cell for g in grids for cell in (g.oo, g.xx)}
    drawn = [a.clip for step in range(20) for group in sample_step(clips, settings, plan, step) for a in group.asks if a.bare]
    assert len({c.video_rendering for c in drawn} - EMPTY) > 1
    assert {r for c in drawn for r in (c.video_rendering, c.audio_rendering)} - EMPTY <= used < {c.id for c in clips.select("train", "factual")}


def test_the_share_of_faint_noise(clips, config, plan):
    """Of muted and blanked clips; what is left out of the setting draws them as they come, and the other ways of taking a stream away stay."""

    def drawn(faint):
        settings = dataclasses.replace(config, data=DataPart(faint=faint))
        bare = [a for step in range(60) for group in sample_step(clips, settings, plan, step) for a in group.asks if a.bare and a.modality == "hear"]
        assert sum(not a.audio for a in bare) == sum(not a.video for a in bare) == len(bare) // 4
        shown = [({a.clip.video_rendering, a.clip.audio_rendering} & EMPTY).pop() for a in bare if a.audio and a.video]
        return np.mean([name.startswith("near") for name in shown])

    assert drawn(1.0) == 1 and drawn(0.0) == 0
    assert 0.65 < drawn(0.75) < 0.85
    assert 0.3 < drawn(None) < 0.7


def test_text_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="has no text"):
        passages(str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="cannot be read as text"):
        passages(str(tmp_path / "nowhere.txt"))


def test_plain_text_is_the_ready_made_file_unless_another_is_named(clips, config, plan, tmp_path):
    plan.text_retention = Choice(1.0, "")
    ready = (Path(__file__).parents[2] / "configs" / "plain_text.txt").read_text().splitlines()
    assert all(text in ready for group in sample_step(clips, config, plan, 0) for text in group.texts)
    (tmp_path / "own.txt").write_text("One passage of my own.\n")
    config = dataclasses.replace(config, data=DataPart(text=str(tmp_path / "own.txt")))
    assert [group.texts for group in sample_step(clips, config, plan, 0)] == [("One passage of my own.",)] * 2
    plan.text_retention = Choice(0.0, "")
    assert [group.texts for group in sample_step(clips, config, plan, 0)] == [()] * 2


@pytest.mark.parametrize("text", [PASSAGES[3].text[40:160], f"Question: {TEXT_QUESTIONS[0].text} Answer: I do not know."])
def test_text_that_diagnoses_measure_on_is_not_trained_on(tmp_path, text):
    (tmp_path / "text.txt").write_text(f"It rains.\n{' '.join(text.split())}\n")
    with pytest.raises(DataError, match="plain text is measured on"):
        passages(str(tmp_path / "text.txt"))
