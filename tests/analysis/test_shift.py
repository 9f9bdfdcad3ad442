"""Token-distribution shift by hand, and against whole forward passes of the base."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from analysis.diagnose import DiagnoseSettings, diagnose
from analysis.items import ItemStore
from analysis.shift import ShiftTally, ranks_and_kl
from analysis.visits import Subject, Visit, forced
from data.media import read_video
from data.questions import question
from models import ModelError, load_model
from tests.analysis import brute
from tests.models.test_qwen_vl import stock
from tests.models.vl import build_vl


def test_ranks_and_kl_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.25, 0.5, 0.2, 0.05], [0.25, 0.25, 0.25, 0.25]])
    rank, kl = ranks_and_kl(p.log()[None], q.log()[None], torch.tensor([[0, 3]]))
    assert rank.tolist() == [[2, 1]]  # ties count for the token
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.125 * math.log(0.125 / 0.2) + 0.125 * math.log(2.5)
    assert kl[0].tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)


def test_ranks_with_a_longer_vocabulary():
    rank, kl = ranks_and_kl(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0, 2.0, 1.0, 99.0]]), torch.tensor([1]))
    assert rank.tolist() == [2] and torch.isfinite(kl).all()


@pytest.fixture(scope="module")
def base(model):
    return load_model(model.base_path)


def test_token_classes(subject, base, model):
    tally = ShiftTally(subject, base)

    def classes(text, modality):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [model.tokenizer.decode([i]).strip() for i in ids], tally.token_classes(ids, modality)

    tokens, found = classes("I hear a dog barking.", "hear")
    assert found[-1] == "rest" and len(found) == len(tokens) + 1
    assert [t for t, c in zip(tokens, found[:-1], strict=True) if c == "rest"] == ["I", "hear", "a", "."]
    assert {c for c in found} == {"rest", "audio_event"}
    tokens, found = classes("I see a rain cloud.", "see")
    assert "".join(t for t, c in zip(tokens, found[:-1], strict=True) if c == "visual") == "raincloud"
    assert set(classes("I hear music.", "hear")[1]) == {"rest"}  # no known event
    assert tally.token_classes([], "hear") == ["rest"]


def test_shares_equal_whole_forward_passes_of_the_base(subject, clips, model, base):
    tally = ShiftTally(subject, base)
    found = clips.select("test", "counterfactual")[:6]
    visit = Visit(subject, found, "counterfactual")
    tally.add(visit)
    rows = {r.tokens: r for r in tally.rows(ItemStore())}
    expected = {name: [] for name in rows}
    for row, clip in enumerate(found):
        for modality in ("hear", "see"):
            ids = visit.answer_ids(modality)[row]
            with torch.no_grad():
                logits = base.forward(base.batch([brute.sequence(base, clips, clip, forced(base, modality, ids), audio=False)]))[0]
                own = model.forward(model.batch([brute.sequence(model, clips, clip, forced(model, modality, ids))]))[0]
            first = True
            for at, (token, name) in enumerate(zip([*ids, model.end_id], tally.token_classes(ids, modality), strict=True)):
                rank = int((logits[at] > logits[at, token]).sum()) + 1
                kl = float((own[at].softmax(-1) * (own[at].log_softmax(-1) - logits[at].log_softmax(-1))).sum())
                expected["all"].append((rank, kl))
                expected[name].append((rank, kl))
                if name == "audio_event" and first:
                    expected["first_event"].append((rank, kl))
                    first = False
    assert len(expected["all"]) == sum(len(expected[name]) for name in ("audio_event", "visual", "rest"))
    for name, tokens in expected.items():
        ranks = np.array([r for r, _ in tokens])
        assert rows[name].unshifted.n == len(tokens) > 0
        assert rows[name].unshifted.value == pytest.approx((ranks == 1).mean())
        assert rows[name].marginal.value == pytest.approx(np.isin(ranks, (2, 3)).mean())
        assert rows[name].shifted.value == pytest.approx((ranks > 3).mean())
        assert rows[name].kl.value == pytest.approx(np.mean([k for _, k in tokens]), abs=1e-4)


def test_a_class_without_tokens_has_no_numbers(subject, clips, base):
    tally = ShiftTally(subject, base)
    visit = Visit(subject, clips.select("test", "factual")[:2], "factual")
    for modality in ("hear", "see"):
        visit._ids[modality] = [[], []]  # the model says nothing
    tally.add(visit)
    rows = {r.tokens: r for r in tally.rows(ItemStore())}
    assert rows["audio_event"].unshifted.value is None and rows["audio_event"].kl.n == 0
    assert rows["all"].kl.n == rows["rest"].kl.n == 4


def test_without_a_base_the_model_without_its_sound_stands_in(subject, clips, model):
    tally = ShiftTally(subject, None)
    tally.add(Visit(subject, clips.select("test", "counterfactual")[:3], "counterfactual"))
    assert tally.rows(ItemStore())[0].kl.value > 0


def test_the_proxy_is_taken_without_the_adapter(subject, clips, model_folder):
    """With it, answers that training left as they were were judged by a proxy that training had changed."""
    model = load_model(model_folder)
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "v_proj", "down_proj"]), r=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    found = clips.select("test", "counterfactual")[:4]
    adapted = Subject(model, clips)
    visit = Visit(adapted, found, "counterfactual")
    tally = ShiftTally(adapted, None)
    record = tally.measure(visit)
    expected, with_adapter = [], []
    for modality in ("hear", "see"):
        answers, spoken = visit.answer_ids(modality), visit.spoken(modality)
        again = [forced(model, modality, ids) for ids in answers]
        whole = model.extend(model.prefill(visit.media), range(len(found)), again).logits  # of the model that answered
        torch.testing.assert_close(spoken.logits, whole)
        for into, off in ((expected, True), (with_adapter, False)):
            with model.adapter_off() if off else nullcontext():
                silent = model.prefill([model.media(clip, clips.root, audio=False) for clip in found])
                proxy = model.extend(silent, range(len(found)), again).logits
            rank, kl = ranks_and_kl(whole, proxy, spoken.targets.clamp_min(0))
            for row, ids in enumerate(answers):
                n = len(ids) + (len(ids) < adapted.max_new_tokens)
                into += zip(rank[row, :n].tolist(), kl[row, :n].tolist(), strict=True)
    assert record["ranks"] == [rank for rank, _ in expected]
    assert record["kl"] == pytest.approx([kl for _, kl in expected], abs=1e-4)
    assert record["ranks"] != [rank for rank, _ in with_adapter]


def test_unchanged_answers_are_as_shifted_after_training_as_before(subject, clips, model, model_folder):
    """An adapter that changes nothing said leaves ranks as they were: the same proxy judges the same tokens."""
    found = clips.select("test", "counterfactual")[:4]
    before = Visit(subject, found, "counterfactual")
    other = load_model(model_folder)
    other.add_lora(other.lora_targets([0, 1, 2], ["q_proj", "v_proj", "down_proj"]), r=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in other.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted = Subject(other, clips)
    after = Visit(adapted, found, "counterfactual")
    after._ids = {modality: before.answer_ids(modality) for modality in ("hear", "see")}  # it says the same
    assert ShiftTally(adapted, None).measure(after)["ranks"] == ShiftTally(subject, None).measure(before)["ranks"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_vision_language_models_are_bases(subject, clips, model, tmp_path, family):
    base = load_model(build_vl(tmp_path / family, family))
    base.fps = 1.0
    tally = ShiftTally(subject, base)
    assert base.fps == model.fps  # it is shown the same frames
    found = clips.select("test", "counterfactual")[:2]
    visit = Visit(subject, found, "counterfactual")
    record = tally.measure(visit)
    at = 0
    for modality in ("hear", "see"):
        for row, clip in enumerate(found):
            ids = visit.answer_ids(modality)[row]
            _, logits = stock(base, read_video(clips.root / clip.file, model.fps), question(modality), model.tokenizer.decode(ids))
            assert model.tokenizer(model.tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
            said = [*ids, model.end_id][: len(ids) + (len(ids) < subject.max_new_tokens)]
            for token, own in zip(logits[-len(ids) - 2 : -1], said, strict=False):
                rank = int((token[: len(visit.spoken(modality).logits[0, 0])] > token[own]).sum()) + 1
                assert abs(record["ranks"][at] - rank) <= 1  # 1e-5 may exchange two
                at += 1
    assert at == len(record["ranks"])


def test_a_base_of_other_tokens_is_refused(subject, clips, model, tmp_path):
    base = load_model(build_vl(tmp_path / "other", "qwen2_5_vl", lines=["some other words than the model's"] * 9))
    with pytest.raises(ModelError, match=r"other: \d+ tokens are not those of .*--base"):
        ShiftTally(subject, base)
    named = load_model(model.path, base=base.path)
    with pytest.raises(ModelError, match="tokens are not those of"):
        diagnose(named, clips, DiagnoseSettings.quick(2, shift=2, max_new_tokens=4, flips=20), "test", progress=False)


def test_an_answer_of_a_token_that_the_base_has_not_is_refused(subject, clips, model, tmp_path):
    """Special tokens may be named otherwise, as between Qwen2.5-Omni and Qwen2.5-VL, as long as no answer is made of them."""
    tally = ShiftTally(subject, load_model(build_vl(tmp_path / "base", "qwen2_5_vl")))
    visit = Visit(subject, clips.select("test", "factual")[:1], "factual")
    visit._ids = {"hear": [[model.audio_id]], "see": [[]]}
    with pytest.raises(ModelError, match=r"<\|AUDIO\|>"):
        tally.measure(visit)
