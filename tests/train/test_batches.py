"""What a step trains on is a function of (seed, step), holds nothing that is held out, and its teacher is the frozen model under the cut."""

import dataclasses
from collections import Counter

import pytest
import torch

from data.clips import Clips, DataError
from data.questions import QUESTIONS
from models import Kind
from train.batches import Micro, _own_answer, loss_terms, make_micro, sample_step, share, training_clips
from train.config import Config, DataPart, SchedulePart
from train.objective import knockout_distillation
from train.plan import Choice, parse_cut


@pytest.fixture
def factual_config(config):
    return Config(data=DataPart(train_on="factual"), schedule=config.schedule)


def test_a_step_depends_on_seed_and_step_only(clips, config, plan):
    first = sample_step(clips, config, plan, 5)
    sample_step(clips, config, plan, 6)
    assert sample_step(clips, config, plan, 5) == first
    assert sample_step(clips, config, plan, 6) != first
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    assert sample_step(clips, other, plan, 5) != first


def test_a_group_is_a_grid_with_both_questions(clips, config, plan):
    for group in sample_step(clips, config, plan, 0):
        cells = [ask.clip for ask in group[::2]]
        assert [a.modality for a in group] == ["hear", "see"] * 4
        assert [c.condition for c in cells] == ["factual", "counterfactual", "counterfactual", "factual"]
        oo, ox, xo, xx = cells
        assert (ox.video_sha256, ox.audio_sha256) == (oo.video_sha256, xx.audio_sha256)
        assert (xo.video_sha256, xo.audio_sha256) == (xx.video_sha256, oo.audio_sha256)


def test_wordings_vary(clips, config, plan):
    asked = Counter(a.question for step in range(20) for group in sample_step(clips, config, plan, step) for a in group)
    assert set(asked) == {*QUESTIONS["hear"], *QUESTIONS["see"]}


def test_nothing_held_out_is_ever_drawn(clips, config, factual_config, plan):
    held = {tuple(p) for part in ("selection", "test") for p in clips.manifest["pairs"][part]}
    elsewhere = {r for c in clips.clips if c.split != "train" for r in (c.video_rendering, c.audio_rendering)}
    for settings in (config, factual_config):
        for step in range(50):
            for ask in (a for group in sample_step(clips, settings, plan, step) for a in group):
                assert ask.clip.split == "train"
                assert tuple(sorted((ask.clip.video_label, ask.clip.audio_label))) not in held
                assert not {ask.clip.video_rendering, ask.clip.audio_rendering} & elsewhere


def test_factual_training_sees_factual_clips_only(clips, factual_config, plan):
    drawn = [a.clip for step in range(20) for group in sample_step(clips, factual_config, plan, step) for a in group]
    assert {c.condition for c in drawn} == {"factual"}
    assert {c.condition for c in training_clips(clips, "factual")} == {"factual"}


def test_class_weights_steer_the_draw(clips, config, plan):
    grids = [g for g in clips.grids if g.split == "train"]
    favourite = clips.by_id()[grids[0].oo].heard
    plan.class_weights = Choice({c[1]: 0.01 for c in clips.labels().values()} | {favourite: 2.0}, "")
    drawn = Counter(a.clip.heard for step in range(50) for group in sample_step(clips, config, plan, step) for a in group)
    assert drawn.most_common(1)[0][0] == favourite


def test_shares_are_the_whole_in_order(clips, plan):
    config = Config(schedule=SchedulePart(grids=4))
    groups = sample_step(clips, config, plan, 0)
    whole = [ask for group in groups for ask in group]
    assert [a for rank in range(2) for part in range(2) for a in share(groups, rank, 2, part, 2)] == whole
    with pytest.raises(DataError, match="use a multiple of 3"):
        share(groups, 0, 3, 0, 1)


def terms_of(model, micro: Micro):
    logits, states, _ = model.decoder(**micro.batch.inputs, states=micro.batch.inputs["rows"])
    return loss_terms(logits, micro, states)


def taught(ask, cut, answers):
    """On factual clips an answer that the cut changed is not taught."""
    return ask.clip.condition != "factual" or answers[ask.clip.id, ask.question, cut] == answers[ask.clip.id, ask.question, ""]


def test_terms_look_at_the_right_rows(clips, config, plan, model):
    asks = share(sample_step(clips, config, plan, 0), 0, 1, 0, 1)
    answers = {}
    micro = make_micro(model, asks, clips.root, plan, answers, 6)
    assert micro.asked == {"counterfactual_ce": 16, "distillation": 8, "mirror": 8, "states": 16, "retention": 4}
    assert (len(micro.rows["counterfactual_ce"]), len(micro.rows["retention"])) == (16, 4)
    for term, modality, cut in (("distillation", "hear", plan.teacher_cut.value), ("mirror", "see", plan.mirror_cut.value)):
        assert len(micro.rows[term]) == len([a for a in asks if a.modality == modality and taught(a, cut, answers)])
    text = [model.tokenizer.decode([t for t in row.tolist() if t not in (-100, model.end_id)]) for row in micro.batch.targets]
    heard = [text[row] for row in micro.rows["counterfactual_ce"][::2]]
    assert heard == [f"I hear {a.clip.heard}." for a in asks[::2]]
    assert [text[row] for row in micro.rows["counterfactual_ce"][1::2]] == [f"I see {a.clip.seen}." for a in asks[1::2]]


def test_the_teacher_is_the_frozen_model_under_the_cut(clips, config, plan, model):
    """Teacher logits equal a plain forward pass under the cut with the adapter off, whatever the adapter is; the student's do not."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    asks = share(sample_step(clips, config, plan, 0), 0, 1, 0, 2)
    answers = {}
    micro = make_micro(model, asks, clips.root, plan, answers, 6)
    hear = [a for a in asks if a.modality == "hear" and taught(a, plan.teacher_cut.value, answers)]
    assert len(hear) < 4  # the random model answers otherwise under the cut in one factual cell at least, so that there is something to leave out
    cut = (parse_cut(plan.teacher_cut.value),)
    own = [model.sequence(model.media(a.clip, clips.root), a.question, "") for a in hear]
    own = [
        dataclasses.replace(s, suffix=_own_answer(model, a.question, answers[a.clip.id, a.question, plan.teacher_cut.value], 6))
        for s, a in zip(own, hear, strict=True)
    ]
    batch = model.batch(own)
    batch.inputs["media_mask"] &= (batch.kinds == Kind.VIDEO) | (batch.kinds == Kind.AUDIO)
    with torch.no_grad(), model.adapter_off():
        expected = model.forward(batch, [cut] * len(own))
        uncut = model.forward(batch)
    mask = batch.targets != -100
    said = micro.teacher["distillation"][:, : mask.shape[1]]
    torch.testing.assert_close(said[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert (said[mask] - uncut[mask]).abs().max() > 0.01  # the cut does something
    assert torch.equal(batch.targets, micro.batch.targets[micro.rows["distillation"]][:, : mask.shape[1]])
    # greedy: the teacher's most likely token is the token of its answer
    assert torch.equal(said.argmax(-1)[mask], batch.targets[mask])
    student = model.forward(micro.batch)
    terms = loss_terms(student, micro)
    by_hand = knockout_distillation(expected, student[micro.rows["distillation"]][:, : mask.shape[1]], mask) * len(hear) / 4
    torch.testing.assert_close(terms["distillation"], by_hand, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for _, p in model.trainable_parameters())


def test_state_targets_are_those_of_the_frozen_model_under_the_cut(clips, config, plan, model):
    """Against a pass of its own for every answer, all layers, the cut written out; and the term by hand."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    plan.teacher_cut, plan.mirror_cut = Choice("video->question+emitters 1:3", ""), Choice("audio->emitters 0:2", "")
    asks, answers = share(sample_step(clips, config, plan, 0), 0, 1, 0, 2), {}
    micro = make_micro(model, asks, clips.root, plan, answers, 6)
    logits, states, _ = model.decoder(**micro.batch.inputs, states=micro.batch.inputs["rows"])
    torch.testing.assert_close(logits, model.forward(micro.batch))
    wanted = torch.zeros(())
    for term, modality, choice in (("distillation", "hear", plan.teacher_cut), ("mirror", "see", plan.mirror_cut)):
        cut = parse_cut(choice.value)
        kept = [a for a in asks if a.modality == modality and taught(a, choice.value, answers)]
        assert micro.states[term].shape[:2] == (3 - cut.start, len(kept))
        for n, ask in enumerate(kept):
            suffix = _own_answer(model, ask.question, answers[ask.clip.id, ask.question, choice.value], 6)
            batch = model.batch([dataclasses.replace(model.sequence(model.media(ask.clip, clips.root), ask.question, ""), suffix=suffix)])
            batch.inputs["media_mask"] &= (batch.kinds == Kind.VIDEO) | (batch.kinds == Kind.AUDIO)
            with torch.no_grad(), model.adapter_off():
                said = model.decoder(**batch.inputs, cuts=[(cut,)], states=batch.inputs["rows"]).states[cut.start :, 0]
            length = said.shape[1]
            torch.testing.assert_close(micro.states[term][:, n, :length], said, atol=1e-5, rtol=1e-5)
            mine = states[cut.start :, micro.rows[term][n], :length]
            wanted = wanted + ((mine - said).square().sum(-1) / said.square().sum(-1)).mean() / 8
    torch.testing.assert_close(loss_terms(logits, micro, states)["states"], wanted, atol=1e-5, rtol=1e-4)


def test_known_answers_are_not_generated_again(clips, config, plan, model, monkeypatch):
    asks = share(sample_step(clips, config, plan, 0), 0, 1, 0, 1)
    answers = {}
    first = make_micro(model, asks, clips.root, plan, answers, 6)
    monkeypatch.setattr(type(model), "generate_ids", None)
    again = make_micro(model, asks, clips.root, plan, answers, 6)
    assert all(torch.equal(first.teacher[t], again.teacher[t]) for t in first.teacher)
    factual = {(a.clip.id, a.question) for a in asks if a.clip.condition == "factual"}
    assert len(answers) == len({(a.clip.id, a.question) for a in asks}) + len(factual)


def test_a_term_with_nothing_to_teach_is_zero(clips, factual_config, plan, model):
    """On factual clips every answer may be changed by the cut; then the term is 0 and so is its gradient."""
    asks = share(sample_step(clips, factual_config, plan, 0), 0, 1, 0, 2)
    plan.counterfactual_ce = plan.mirror = Choice(0.0, "")
    answers = {(a.clip.id, a.question, cut): [5 + len(cut)] for a in asks for cut in (plan.teacher_cut.value, "")}
    micro = make_micro(model, asks, clips.root, plan, answers, 6)
    logits = model.forward(micro.batch).requires_grad_()
    terms = loss_terms(logits, micro)
    assert micro.rows["distillation"] == [] and terms["distillation"].item() == 0.0
    assert torch.autograd.grad(terms["distillation"], logits)[0].abs().max() == 0.0


def test_a_cut_into_the_media_gets_a_prefix_of_its_own(clips, config, plan, model):
    plan.teacher_cut = Choice("video->audio 0:3", "")
    micro = make_micro(model, share(sample_step(clips, config, plan, 0), 0, 1, 0, 2), clips.root, plan, {}, 6)
    assert set(micro.teacher) == {"distillation", "mirror", "retention"}


def test_an_untrained_adapter_has_no_retention_loss(clips, config, plan, model):
    """LoRA starts as the identity, so student = adapter-off model and the KL is 0; the distillation terms are not, because of their cuts."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    micro = make_micro(model, share(sample_step(clips, config, plan, 0), 0, 1, 0, 1), clips.root, plan, {}, 6)
    terms = terms_of(model, micro)
    assert abs(terms["retention"].item()) < 1e-6 < terms["distillation"].item()


def test_accumulation_and_shares_average_to_the_whole(clips, config, plan, model):
    """Gradients of two halves average to those of the whole batch."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    groups, parameters = sample_step(clips, config, plan, 0), [p for _, p in model.trainable_parameters()]

    def gradients(parts):
        for p in parameters:
            p.grad = None
        for part in range(parts):
            micro = make_micro(model, share(groups, 0, 1, part, parts), clips.root, plan, {}, 6)
            (sum(terms_of(model, micro).values()) / parts).backward()
        return [p.grad.clone() for p in parameters]

    for whole, halves in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(whole, halves, atol=1e-5, rtol=1e-4)


def test_too_few_clips_are_refused(clips):
    empty = Clips(clips.root, tuple(clips.select("test")), (), clips.manifest)
    with pytest.raises(DataError, match="at least 4 are needed"):
        training_clips(empty, "grids")
