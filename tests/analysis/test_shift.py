"""Token-distribution shift by hand, and against whole forward passes of the base."""

import math

import numpy as np
import pytest
import torch

from analysis.items import ItemStore
from analysis.shift import ShiftTally, ranks_and_kl
from analysis.visits import Visit, forced
from models import load_model
from tests.analysis import brute


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
