"""Terms look at the right rows, equal separate passes, and the teacher is the frozen model under the cut."""

import contextlib
import dataclasses

import pytest
import torch

from analysis.events import named
from models import Cut, Kind
from tests.train.conftest import plain
from train.batches import Micro, _own_answer, _text, agree, loss_terms, make_micro, span_scores
from train.config import DataPart, LossPart
from train.objective import knockout_distillation
from train.plan import Choice
from train.sampling import sample_step, share

LOSS = LossPart(max_answer_tokens=6)


def tune(model):
    """An adapter that has moved away from zero."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def terms_of(model, micro: Micro, plan):
    return loss_terms(model, model.decoder(**micro.inputs), micro, plan)


def questions(groups):
    """About whole clips, on one stream: what the frozen model is asked."""
    return [ask for group in groups for ask in plain(group)]


def taught(ask, cut, answers):
    """On factual clips an answer that the cut changed is not taught (the random model's answers share no words where they differ)."""
    return ask.clip.condition != "factual" or answers[ask.clip.id, ask.question, cut] == answers[ask.clip.id, ask.question, ""]


PHRASES = {"dog": "a dog barking", "train": "a train passing", "person": "a person laughing"}


@pytest.mark.parametrize(
    ("said", "other", "same"),
    [
        ("I hear a dog barking.", "There is a loud dog that barks.", True),  # both name the dog
        ("I hear a dog barking.", "I hear a train passing.", False),
        ("I hear a dog barking.", "I hear a dog barking and a train passing.", False),
        ("I hear a dog barking.", "I hear an animal.", False),  # one names a known event
        ("I hear a dog barking.", "I hear no dog barking.", False),
        ("I hear nothing.", "There is no sound.", True),
        ("I hear nothing.", "I hear a violin.", False),
        ("I hear a violin playing slowly.", "A violin plays slowly.", True),  # violin, play, slowly
        ("I hear a violin playing slowly.", "I hear a violin playing.", True),  # 2 of 3 words
        ("I hear a violin playing slowly.", "I hear a cello playing slowly.", False),  # 2 of 4
        ("I hear a violin.", "I hear a cello.", False),  # the question's own words do not count
        ("I hear a violin playing slowly.", "I hear no violin playing slowly.", False),
        ("I hear nothing of a violin playing slowly.", "I hear a violin playing slowly.", False),  # 3 of 4 words, but only one denies
        ("", "", True),
        ("", "I hear a violin.", False),
    ],
)
def test_answers_agree_by_what_they_name(said, other, same):
    for pair in ((said, other), (other, said)):
        assert agree(*pair, "What do you hear?", "hear", lambda answer, modality: named(answer, PHRASES)) is same


def hear_only(plan):
    """A plan of distillation and its states alone."""
    for name in ("counterfactual_ce", "mirror", "retention", "abstention", "logprob_invariance"):
        setattr(plan, name, Choice(0.0, ""))
    plan.conditions = Choice({"both": 0, "bare": 0}, "")
    return plan


def test_an_answer_in_other_words_is_taught_where_the_clip_is_factual(clips, factual_config, plan, model):
    """Of four answers about factual clips under the cut one is the same, one says the same in other words, one names another event, one abstains."""
    [group] = sample_step(clips, factual_config, hear_only(plan), 0)[:1]
    hear, answers = [a for a in plain(group) if a.modality == "hear"], {}
    names = list(clips.labels())
    phrases = {name: heard for name, (_, heard) in clips.labels().items()}

    def ids(text):
        return model.tokenizer(text)["input_ids"]

    texts = [lambda p: f"I hear {p}.", lambda p: f"There, quite loud, {p}.", None, lambda p: "I hear nothing."]
    for ask, text in zip(hear, texts, strict=True):
        other = clips.labels()[next(n for n in names if n != ask.clip.audio_label)][1]
        answers[ask.clip.id, ask.question, ""] = ids(f"I hear {ask.clip.heard}.")
        answers[ask.clip.id, ask.question, plan.teacher_cut.value] = ids(text(ask.clip.heard) if text else f"I hear {other}.")
    loss = LossPart(max_answer_tokens=40)
    assert len({a.clip.id for a in hear}) == 4
    micro = make_micro(model, [group], clips.root, plan, loss, answers, names=lambda answer, modality: named(answer, phrases))
    said = [
        _text(model, [t for t in micro.batch.targets[row].tolist() if t not in (-100, model.end_id)]) for row in micro.parts["distillation"][0].rows
    ]
    assert said == [f"I hear {hear[0].clip.heard}.", f"There, quite loud, {hear[1].clip.heard}."]
    assert micro.counts() == {"distillation": (2, 0, 4, 0), "states": (2, 0, 4, 0)}
    # What is not taught counts as 0 in the mean: the term is half of what it is for the two alone.
    alone = dataclasses.replace(group, asks=tuple(hear[:2]))
    both, two = (
        terms_of(model, make_micro(model, [g], clips.root, plan, loss, answers, names=lambda answer, modality: named(answer, phrases)), plan)
        for g in (group, alone)
    )
    torch.testing.assert_close(both["distillation"], two["distillation"] / 2)


def test_an_answer_that_ends_at_the_limit_agrees_with_nothing_but_itself(clips, factual_config, plan, model):
    """Four answers about factual clips that name the true sound. Three are not done at the limit, uncut, cut or both; of these only the one that is
    the same token by token may be compared. Under the cut two end there."""
    [group] = sample_step(clips, factual_config, hear_only(plan), 0)[:1]
    hear, answers, limit = [a for a in plain(group) if a.modality == "hear"], {}, 40
    phrases = {name: heard for name, (_, heard) in clips.labels().items()}

    def ids(text, long):
        found = model.tokenizer(text)["input_ids"]
        return found + [found[-1]] * (limit - len(found)) if long else found

    for ask, (long_uncut, long_cut, other) in zip(
        hear, ((True, True, False), (True, True, True), (True, False, True), (False, False, True)), strict=True
    ):
        heard = ask.clip.heard
        answers[ask.clip.id, ask.question, ""] = ids(f"I hear {heard}.", long_uncut)
        said = ids(f"There, quite loud, {heard}." if other else f"I hear {heard}.", long_cut)
        answers[ask.clip.id, ask.question, plan.teacher_cut.value] = said
    loss = LossPart(max_answer_tokens=limit)
    micro = make_micro(model, [group], clips.root, plan, loss, answers, names=lambda answer, modality: named(answer, phrases))
    targets = [[t for t in micro.batch.targets[row].tolist() if t != -100] for row in micro.parts["distillation"][0].rows]
    assert targets == [
        answers[hear[0].clip.id, hear[0].question, plan.teacher_cut.value],  # as far as it goes: no end token
        [*answers[hear[3].clip.id, hear[3].question, plan.teacher_cut.value], model.end_id],
    ]
    assert micro.counts() == {"distillation": (2, 0, 4, 2), "states": (2, 0, 4, 2)}


def test_a_long_answer_is_heard_to_its_end_and_a_short_one_makes_no_room_for_it(clips, config, plan, model, monkeypatch):
    """By default 128 tokens; what is done within 24 is not generated again. The random model talks on and on, so all of it is."""
    groups, generate, rooms = sample_step(clips, config, hear_only(plan), 0), model.generate_ids, []
    asks = [a for a in questions(groups) if a.modality == "hear"]
    groups = [dataclasses.replace(groups[0], asks=tuple(asks[:2]))]

    def counted(prefix, which, asked, cuts, room):
        rooms.append((len(which), room))
        said = generate(prefix, which, asked, cuts, room)
        return [ids if i else ids[:5] for i, ids in enumerate(said)] if room == 24 else said  # the first is done after 5 tokens

    monkeypatch.setattr(model, "generate_ids", counted)
    answers = {}
    micro = make_micro(model, groups, clips.root, plan, LossPart(), answers)
    (jobs, first), (left, second) = rooms
    lengths = sorted(map(len, answers.values()))
    assert (first, second, left) == (24, 128, jobs - 1) and lengths == [5, *[128] * left]
    assert micro.counts()["distillation"][3] == sum(len(answers[a.clip.id, a.question, plan.teacher_cut.value]) == 128 for a in asks[:2])


def test_a_gate_that_leaves_the_longest_answers_out(clips, config, plan, model):
    """States are padded to the longest answer of the teacher; where that one is not taught, no sequence of the batch is as long."""
    groups, answers = sample_step(clips, config, hear_only(plan), 0), {}
    conflicts = [a for a in questions(groups) if a.modality == "hear" and a.clip.condition == "counterfactual"]
    groups = [dataclasses.replace(groups[0], asks=tuple(conflicts))]
    make_micro(model, groups, clips.root, plan, LossPart(max_answer_tokens=3), answers)
    longest = (conflicts[0].clip.id, conflicts[0].question, plan.teacher_cut.value)
    answers[longest] = list(range(50, 62))  # nothing that the model would say
    loss = LossPart(max_answer_tokens=12)
    every = make_micro(model, groups, clips.root, plan, loss, answers)
    part = every.parts["distillation"][0]
    logp, targets = part.reference.log_softmax(-1), every.batch.targets[part.rows]
    logp = logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0] * (targets != -100)
    sure = (logp.sum(1) / (targets != -100).sum(1)).exp()
    assert int(sure.argmin()) == 0
    gated = make_micro(model, groups, clips.root, plan, dataclasses.replace(loss, gate=float(sure.sort().values[1]) * 0.999), answers)
    assert gated.counts() == {"distillation": (3, 1, 4, 1), "states": (3, 1, 4, 1)}
    terms = terms_of(model, gated, plan)
    shorter = [dataclasses.replace(groups[0], asks=tuple(conflicts[1:]))]
    wanted = terms_of(model, make_micro(model, shorter, clips.root, plan, loss, answers), plan)
    for name in ("distillation", "states"):
        torch.testing.assert_close(terms[name], wanted[name] * 3 / 4, atol=1e-5, rtol=1e-4)


def test_where_see_questions_lead_hear_questions_are_kept(clips, config, plan, model):
    groups = sample_step(clips, config, plan, 0)[:1]
    for leads, kept in (("hear", "see"), ("see", "hear")):
        plan.leads, answers = Choice(leads, ""), {}
        make_micro(model, groups, clips.root, plan, LOSS, answers)
        factual = [a for a in questions(groups) if a.clip.condition == "factual"]
        micro = make_micro(model, groups, clips.root, plan, LOSS, answers)
        wanted = [answers[a.clip.id, a.question, ""] for a in factual if a.modality == kept]
        said = [[t for t in micro.batch.targets[row].tolist() if t not in (-100, model.end_id)] for row in micro.parts["retention"][0].rows]
        assert said == wanted


def test_terms_look_at_the_right_rows(clips, config, plan, model):
    groups = share(sample_step(clips, config, plan, 0), 0, 1, 0, 1)
    asks, answers = questions(groups), {}
    micro = make_micro(model, groups, clips.root, plan, LOSS, answers)
    # Two grids: 18 questions about cells, 6 about bare clips, 2 of them about nothing.
    asked = {term: sum(part.asked for part in parts) for term, parts in micro.parts.items()}
    assert asked == {"counterfactual_ce": 22, "abstention": 4, "distillation": 8, "mirror": 8, "states": 16, "retention": 4, "logprob_invariance": 16}
    for term, modality, cut in (("distillation", "hear", plan.teacher_cut.value), ("mirror", "see", plan.mirror_cut.value)):
        assert len(micro.parts[term][0].rows) == len([a for a in asks if a.modality == modality and taught(a, cut, answers)])
    text = [model.tokenizer.decode([t for t in row.tolist() if t not in (-100, model.end_id)]) for row in micro.batch.targets]
    every = [ask for group in groups for ask in group.asks]
    assert [text[row] for row in micro.parts["counterfactual_ce"][0].rows] == [a.truth[0] for a in every if not a.about_nothing]
    assert [text[row] for row in micro.parts["abstention"][0].rows] == [a.truth[0] for a in every if a.about_nothing]
    assert {"I hear nothing.", "I see nothing."} >= {text[row] for row in micro.parts["abstention"][0].rows}


def test_a_true_answer_that_the_teacher_gives_too_keeps_its_label(clips, config, plan, model):
    """One sequence for both; the hinge needs to know where the label is in it."""
    groups = sample_step(clips, config, plan, 0)[:1]
    answers = {}
    for ask in questions(groups):
        ids = model.tokenizer(ask.truth[0])["input_ids"]
        for cut in ("", plan.teacher_cut.value, plan.mirror_cut.value):
            answers[ask.clip.id, ask.question, cut] = ids
    plan.extras = Choice({"hinge": 1.0}, "")
    micro = make_micro(model, groups, clips.root, plan, LossPart(max_answer_tokens=24), answers)
    hinge, distillation = micro.parts["hinge"][0], micro.parts["distillation"][0]
    assert set(distillation.rows) < set(hinge.rows)
    assert all(bool(micro.batch.span[row].any()) for row in (*hinge.rows, *hinge.against))
    tokens = [
        t for t, inside in zip(micro.batch.targets[hinge.against[0]].tolist(), micro.batch.span[hinge.against[0]].tolist(), strict=True) if inside
    ]
    assert model.tokenizer.decode(tokens).strip() == questions(groups)[0].wrong


def spoken(model, ask, root, suffix):
    """Log-probabilities of one answer in a sequence of its own, its targets, and what else the decoder gave."""
    media = model.media(ask.clip, root, ask.video, ask.audio)
    batch = model.batch([dataclasses.replace(model.sequence(media, ask.question, ""), suffix=suffix)])
    batch.inputs["media_mask"] &= (batch.kinds == Kind.VIDEO) | (batch.kinds == Kind.AUDIO)
    out = model.decoder(**batch.inputs, states=batch.asked, mass=(0, 2))
    return out.logits.log_softmax(-1), batch.targets[0], (batch, out)


def test_extra_terms_against_passes_of_their_own(clips, config, plan, model):
    """Every extra term from separate sequences, one a question, with the formulas written out."""
    tune(model)
    on = ("hinge", "dpo", "invariance", "logprob_invariance", "sensitivity", "base_divergence", "latent_readout", "attention_balance")
    plan.extras, plan.causal_layers = Choice(dict.fromkeys(on, 1.0), ""), Choice([0, 2], "")
    groups, answers = sample_step(clips, config, plan, 0)[:1], {}
    micro = make_micro(model, groups, clips.root, plan, LOSS, answers)
    terms = terms_of(model, micro, plan)
    asks = questions(groups)

    def alone(ask, suffix, audio=True):
        """Answer log-probabilities, the batch, and what the decoder gave."""
        logp, _, (batch, out) = spoken(model, dataclasses.replace(ask, audio=audio), clips.root, suffix)
        return logp, batch, out

    def score(ask, text, whole=False, **how):
        suffix = model.suffix(ask.question, *text)
        logp, batch, _ = alone(ask, suffix, **how)
        picked = logp.gather(-1, batch.targets[0][:, None])[:, 0]
        return picked.sum() if whole else picked[batch.span[0]].mean()

    def wrong(ask):
        return (f"I hear {ask.wrong}." if ask.modality == "hear" else f"I see {ask.wrong}."), ask.wrong

    wanted = dict.fromkeys(on, 0.0)
    for ask in asks:
        wanted["hinge"] += max(0.0, 1 - (score(ask, ask.truth) - score(ask, wrong(ask))).item()) / 8
        if ask.clip.condition == "counterfactual":
            chosen, rejected = score(ask, ask.truth, True), score(ask, wrong(ask), True)
            with model.adapter_off():
                gain = float(chosen - rejected) - float(score(ask, ask.truth, True) - score(ask, wrong(ask), True))
            wanted["dpo"] += -torch.nn.functional.logsigmoid(torch.tensor(0.1 * gain)).item() / 4
        cut = (plan.teacher_cut if ask.modality == "hear" else plan.mirror_cut).value
        if taught(ask, cut, answers):
            own = _own_answer(model, ask.question, answers[ask.clip.id, ask.question, cut], 6)
            here = alone(ask, own)[0]
            for term, cell in (("invariance", ask.same), ("logprob_invariance", ask.same), ("sensitivity", ask.swapped)):
                other = alone(dataclasses.replace(ask, clip=cell), own)[0]
                divergence = float((here.exp() * (here - other)).sum(-1).mean())
                squared = float((here - other).square().mean())
                wanted[term] += {"invariance": divergence, "logprob_invariance": squared, "sensitivity": max(0.0, 1 - divergence)}[term] / 8
            if ask.modality == "hear":
                mass = alone(ask, own)[2].mass[:, 0]
                wanted["attention_balance"] += (
                    float((0.5 - mass[:, Kind.AUDIO] / (mass[:, Kind.AUDIO] + mass[:, Kind.VIDEO])).clamp_min(0).mean()) / 4
                )
        if ask.modality == "hear":
            with model.adapter_off():
                without = float(score(ask, ask.truth, audio=False))
            wanted["base_divergence"] += max(0.0, min(2.0, -without) - (float(score(ask, ask.truth)) - without)) / 4
            _, batch, out = alone(ask, model.suffix(ask.question, *ask.truth))
            label = batch.targets[0][batch.span[0]]
            lens = model.lens(out.states[[0, 2], 0]).log_softmax(-1)
            wanted["latent_readout"] += -float(lens[..., label].mean()) / 4
    for term in on:
        assert float(terms[term]) == pytest.approx(wanted[term], rel=1e-4, abs=1e-5), term
    for term in on:
        if float(terms[term]) == 0:  # a hinge that is satisfied
            continue
        [p.grad.zero_() for _, p in model.trainable_parameters() if p.grad is not None]
        terms[term].backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in model.trainable_parameters()), term
    assert torch.isfinite(span_scores(model.decoder(**micro.inputs).logits, micro.batch, list(range(len(micro.batch.targets))))).all()


def test_a_clip_with_and_without_its_sound_in_one_step(clips, config, plan, model):
    """What the uncut model says of the whole clip, and of the clip without its sound, are two things: the cut is held against the first."""
    [group] = sample_step(clips, config, plan, 0)[:1]
    hear = next(a for a in plain(group) if a.modality == "hear" and a.clip.condition == "factual")
    silent = dataclasses.replace(hear, modality="see", audio=False, bare=True)  # asked in the same words, so that only the streams tell them apart
    answers = {
        (hear.clip.id, hear.question, plan.teacher_cut.value): [5],
        (hear.clip.id, hear.question, ""): [5],
        (f"{hear.clip.id} without sound", hear.question, ""): [6],
    }
    for asks in ((hear, silent), (silent, hear)):
        micro = make_micro(model, [dataclasses.replace(group, asks=asks)], clips.root, plan, LOSS, dict(answers))
        assert len(micro.parts["distillation"][0].rows) == 1 and len(micro.parts["abstention"][1].rows) == 1


def test_abstention_says_nothing_and_keeps_the_stream_that_is_left(clips, config, plan, model):
    """Cross-entropy of "nothing" and KL to the frozen model that is not given the empty stream, each from a pass of its own."""
    tune(model)
    for step in range(4):  # each kind of bare clip
        [group], answers = sample_step(clips, config, plan, step)[:1], {}
        micro = make_micro(model, [group], clips.root, plan, LOSS, answers)
        nothing, left = micro.parts["abstention"]
        [empty] = [a for a in group.asks if a.about_nothing]
        [ask] = [a for a in group.asks if a.bare and a.modality != "both" and not a.about_nothing]
        assert (len(nothing.rows), len(left.rows)) == (1, 1) and ask.modality != empty.modality
        logp, targets, _ = spoken(model, empty, clips.root, model.suffix(empty.question, *empty.truth))
        ce = -logp.gather(-1, targets[:, None])[:, 0].mean()
        view = dataclasses.replace(ask, video=ask.modality == "see", audio=ask.modality == "hear")
        own = _own_answer(model, ask.question, answers[view.given, ask.question, ""], 6)
        student, _, _ = spoken(model, ask, clips.root, own)
        with model.adapter_off():
            frozen, _, _ = spoken(model, view, clips.root, own)
        kl = (frozen.exp() * (frozen - student)).sum(-1).mean()
        torch.testing.assert_close(terms_of(model, micro, plan)["abstention"], (ce + kl) / 2, atol=1e-5, rtol=1e-4)


def test_terms_that_want_the_same_answer_share_its_pass(clips, config, plan, model, monkeypatch):
    plan.extras, plan.causal_layers = Choice({"attention_balance": 1.0, "invariance": 1.0}, ""), Choice([1], "")
    real, passed = type(model).extend, []

    def counting(self, prefix, which, *rest, **how):
        passed.append(len(which))
        return real(self, prefix, which, *rest, **how)

    monkeypatch.setattr(type(model), "extend", counting)
    groups = sample_step(clips, config, plan, 0)[:1]
    micro = make_micro(model, groups, clips.root, plan, LOSS, {})
    taught = sum(len(micro.parts[term][-1].rows) for term in ("distillation", "mirror", "retention", "abstention"))
    assert passed[-1] == taught and len(micro.parts["attention_balance"][0].rows) == len(micro.parts["distillation"][0].rows)


def test_the_teacher_without_the_other_stream(clips, config, plan, model):
    groups, answers = sample_step(clips, config, plan, 0)[:1], {}
    micro = make_micro(model, groups, clips.root, plan, dataclasses.replace(LOSS, teacher="removed"), answers)
    assert {key[2] for key in answers} == {""} and {key[0].split(" ", 1)[-1] for key in answers} >= {"without picture", "without sound"}
    part, at = micro.parts["distillation"][0], 0
    for ask in (a for a in questions(groups) if a.modality == "hear"):
        said = answers[f"{ask.clip.id} without picture", ask.question, ""]
        if ask.clip.condition == "factual" and said != answers[ask.clip.id, ask.question, ""]:
            continue
        own = _own_answer(model, ask.question, said, 6)
        batch = model.batch([dataclasses.replace(model.sequence(model.media(ask.clip, clips.root, video=False), ask.question, ""), suffix=own)])
        torch.testing.assert_close(part.reference[at, : len(own.targets)], model.forward(batch)[0], atol=1e-5, rtol=1e-5)
        at += 1
    assert at == len(part.rows) > 0
    assert micro.parts["states"][0].reference.shape[0] == model.n_layers


def test_the_gate_leaves_unsure_answers_out(clips, config, plan, model):
    groups, answers = sample_step(clips, config, plan, 0), {}
    every = make_micro(model, groups, clips.root, plan, LOSS, answers).parts["distillation"][0]
    rows = range(len(every.rows))
    targets = make_micro(model, groups, clips.root, plan, LOSS, answers).batch.targets[every.rows]
    logp = every.reference.log_softmax(-1).gather(-1, targets[:, : every.reference.shape[1]].clamp_min(0)[..., None])[..., 0]
    mask = targets[:, : every.reference.shape[1]] != -100
    sure = ((logp * mask).sum(1) / mask.sum(1)).exp()
    gate = float(sure.sort().values[len(rows) // 2])
    gated = make_micro(model, groups, clips.root, plan, dataclasses.replace(LOSS, gate=gate), answers).parts["distillation"][0]
    assert len(gated.rows) == int((sure >= gate).sum()) < len(every.rows) and gated.asked == every.asked
    strict = make_micro(model, groups, clips.root, plan, dataclasses.replace(LOSS, gate=0.999), answers).parts
    assert not strict["distillation"][0].rows and len(strict["retention"][0].rows) == strict["retention"][0].asked


def test_a_teacher_that_is_the_moving_average(clips, config, plan, model):
    """Its answers are not kept, and it is the adapter inside the given context that speaks."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)

    @contextlib.contextmanager
    def average():
        saved = [p.detach().clone() for _, p in model.trainable_parameters()]
        with torch.no_grad():
            for n, (_, p) in enumerate(model.trainable_parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.3)
        yield
        with torch.no_grad():
            for (_, p), old in zip(model.trainable_parameters(), saved, strict=True):
                p.copy_(old)

    groups, answers = sample_step(clips, config, plan, 0)[:1], {}
    frozen = make_micro(model, groups, clips.root, plan, LOSS, answers, average).parts
    assert answers
    kept = dict(answers)
    loss = dataclasses.replace(LOSS, teacher_weights="ema")
    own = make_micro(model, groups, clips.root, plan, loss, answers, average)
    assert answers == kept
    # What is to stay as it was is the frozen model's all the same.
    torch.testing.assert_close(own.parts["retention"][0].reference, frozen["retention"][0].reference)
    with average():
        again = make_micro(model, groups, clips.root, plan, loss, {}, contextlib.nullcontext)
    assert torch.equal(own.parts["mirror"][0].reference, again.parts["mirror"][0].reference)
    assert own.parts["mirror"][0].reference.shape != frozen["mirror"][0].reference.shape or not torch.allclose(
        own.parts["mirror"][0].reference, frozen["mirror"][0].reference
    )


def test_plain_text_is_kept(clips, config, plan, model, tmp_path):
    (tmp_path / "text.txt").write_text("The dog sleeps in the sun.\n\nIt rains on the sea.\n")
    config = dataclasses.replace(config, data=DataPart(text=str(tmp_path / "text.txt")), loss=LossPart(text_retention=1.0))
    plan.text_retention = Choice(1.0, "")
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    groups = sample_step(clips, config, plan, 0)
    assert all(len(group.texts) == 1 for group in groups)
    micro = make_micro(model, groups, clips.root, plan, config.loss, {})
    assert abs(float(terms_of(model, micro, plan)["text_retention"])) < 1e-6
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert float(terms_of(model, micro, plan)["text_retention"]) > 1e-3
    part = micro.parts["text_retention"][0]
    said = model.tokenizer.decode([t for t in micro.batch.targets[part.rows[0]].tolist() if t != -100])
    assert groups[0].texts[0].endswith(said.strip())


def test_the_teacher_is_the_frozen_model_under_the_cut(clips, config, plan, model):
    """Teacher logits equal a plain forward pass under the cut with the adapter off, whatever the adapter is; the student's do not."""
    tune(model)
    groups = share(sample_step(clips, config, plan, 0), 0, 1, 0, 2)
    asks, answers = questions(groups), {}
    micro = make_micro(model, groups, clips.root, plan, LOSS, answers)
    hear = [a for a in asks if a.modality == "hear" and taught(a, plan.teacher_cut.value, answers)]
    assert len(hear) < 4  # the random model answers otherwise under the cut in one factual cell at least, so that there is something to leave out
    cut = (Cut.parse(plan.teacher_cut.value),)
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
    said = micro.parts["distillation"][0].reference[:, : mask.shape[1]]
    torch.testing.assert_close(said[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert (said[mask] - uncut[mask]).abs().max() > 0.01  # the cut does something
    assert torch.equal(batch.targets, micro.batch.targets[micro.parts["distillation"][0].rows][:, : mask.shape[1]])
    # greedy: the teacher's most likely token is the token of its answer
    assert torch.equal(said.argmax(-1)[mask], batch.targets[mask])
    student = model.forward(micro.batch)
    terms = terms_of(model, micro, plan)
    by_hand = knockout_distillation(expected, student[micro.parts["distillation"][0].rows][:, : mask.shape[1]], mask) * len(hear) / 4
    torch.testing.assert_close(terms["distillation"], by_hand, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for _, p in model.trainable_parameters())


def test_state_targets_are_those_of_the_frozen_model_under_the_cut(clips, config, plan, model):
    """Against a pass of its own for every answer, all layers, the cut written out; and the term by hand."""
    tune(model)
    plan.teacher_cut, plan.mirror_cut = Choice("video->question+emitters 1:3", ""), Choice("audio->emitters 0:2", "")
    groups, answers = share(sample_step(clips, config, plan, 0), 0, 1, 0, 2), {}
    asks, micro = questions(groups), make_micro(model, groups, clips.root, plan, LOSS, answers)
    logits, states, _ = model.decoder(**micro.inputs)
    torch.testing.assert_close(micro.batch.answers(logits)[0], model.forward(micro.batch))
    wanted = torch.zeros(())
    for number, (modality, choice) in enumerate((("hear", plan.teacher_cut), ("see", plan.mirror_cut))):
        cut, part = Cut.parse(choice.value), micro.parts["states"][number]
        kept = [a for a in asks if a.modality == modality and taught(a, choice.value, answers)]
        assert part.reference.shape[:2] == (3 - cut.start, len(kept))
        for n, ask in enumerate(kept):
            suffix = _own_answer(model, ask.question, answers[ask.clip.id, ask.question, choice.value], 6)
            batch = model.batch([dataclasses.replace(model.sequence(model.media(ask.clip, clips.root), ask.question, ""), suffix=suffix)])
            batch.inputs["media_mask"] &= (batch.kinds == Kind.VIDEO) | (batch.kinds == Kind.AUDIO)
            with torch.no_grad(), model.adapter_off():
                said = model.decoder(**batch.inputs, cuts=[(cut,)], states=batch.inputs["rows"]).states[cut.start :, 0]
            length = said.shape[1]
            torch.testing.assert_close(part.reference[:, n, :length], said, atol=1e-5, rtol=1e-5)
            mine = states[cut.start :, part.rows[n], :length]
            wanted = wanted + ((mine - said).square().sum(-1) / said.square().sum(-1)).mean() / 8
    torch.testing.assert_close(terms_of(model, micro, plan)["states"], wanted, atol=1e-5, rtol=1e-4)


def test_known_answers_are_not_generated_again(clips, config, plan, model, monkeypatch):
    groups = share(sample_step(clips, config, plan, 0), 0, 1, 0, 1)
    asks, answers = questions(groups), {}
    first = make_micro(model, groups, clips.root, plan, LOSS, answers)
    monkeypatch.setattr(type(model), "generate_ids", None)
    again = make_micro(model, groups, clips.root, plan, LOSS, answers)
    for term in ("distillation", "mirror", "retention"):
        assert torch.equal(first.parts[term][0].reference, again.parts[term][0].reference)
    factual = {(a.clip.id, a.question) for a in asks if a.clip.condition == "factual"}
    bare = {(a.clip.id, a.question) for group in groups for a in group.asks if a.bare and a.modality != "both" and not a.about_nothing}
    assert len(answers) - len(bare) == len({(a.clip.id, a.question) for a in asks}) + len(factual)


def test_a_term_with_nothing_to_teach_is_zero(clips, factual_config, plan, model):
    """On factual clips every answer may be changed by the cut; then the term is 0 and so is its gradient."""
    groups = share(sample_step(clips, factual_config, plan, 0), 0, 1, 0, 2)
    plan.counterfactual_ce = plan.mirror = Choice(0.0, "")
    answers = {(a.clip.id, a.question, cut): [5 + len(cut)] for a in questions(groups) for cut in (plan.teacher_cut.value, "")}
    model.add_lora(model.lora_targets([0], ["q_proj"]), 4, 8)
    micro = make_micro(model, groups, clips.root, plan, LOSS, answers)
    terms = terms_of(model, micro, plan)
    assert micro.parts["distillation"][0].rows == [] and terms["distillation"].item() == 0.0
    terms["distillation"].backward()
    assert all(p.grad is None or p.grad.abs().max() == 0.0 for _, p in model.trainable_parameters())


def test_a_cut_into_the_media_gets_a_prefix_of_its_own(clips, config, plan, model):
    plan.teacher_cut = Choice("video->audio 0:3", "")
    groups = share(sample_step(clips, config, plan, 0), 0, 1, 0, 2)
    micro = make_micro(model, groups, clips.root, plan, LOSS, {})
    assert micro.parts["distillation"][0].rows and micro.parts["mirror"][0].rows and micro.parts["retention"][0].rows


def test_an_untrained_adapter_has_no_retention_loss(clips, config, plan, model):
    """LoRA starts as the identity, so student = adapter-off model and the KL is 0; the distillation terms are not, because of their cuts."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    plan.conditions = Choice({"both": 4, "bare": 0}, "")  # on bare clips the frozen model is not given the empty stream
    terms = terms_of(model, make_micro(model, sample_step(clips, config, plan, 0), clips.root, plan, LOSS, {}), plan)
    assert abs(terms["retention"].item()) < 1e-6 < terms["distillation"].item()


@pytest.mark.parametrize("extra", [(), ("hinge", "dpo", "invariance", "base_divergence", "latent_readout", "attention_balance")])
def test_accumulation_and_shares_average_to_the_whole(clips, config, plan, model, extra):
    """Gradients of two halves average to those of the whole batch."""
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj"]), 4, 8)
    plan.extras = Choice(dict.fromkeys(extra, 1.0), "")
    groups, parameters = sample_step(clips, config, plan, 0), [p for _, p in model.trainable_parameters()]

    def gradients(parts):
        for p in parameters:
            p.grad = None
        for part in range(parts):
            micro = make_micro(model, share(groups, 0, 1, part, parts), clips.root, plan, LOSS, {})
            (sum(terms_of(model, micro, plan).values()) / parts).backward()
        return [p.grad.clone() for p in parameters]

    for whole, halves in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(whole, halves, atol=1e-5, rtol=1e-4)
