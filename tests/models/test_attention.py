"""Cuts and taps against a written-out reference."""

import itertools

import pytest
import torch

from models import SITES, Cut, CutError, Kind, Media
from tests.models import reference

HEAR = "What do you hear?"
SITES_AND_WINDOWS = [(site, start, stop) for site in SITES for start, stop in ((0, 1), (1, 3), (0, 3))]


def batch_of(tiny, media):
    """Ragged on purpose: one clip has twice the sound, one has no picture."""
    return tiny.batch(
        [
            tiny.sequence(media[0], HEAR, "I hear a dog barking.", "a dog barking"),
            tiny.sequence(media[1], "What sound is this?", "I hear a cat meowing.", "a cat meowing"),
            tiny.sequence(Media(None, media[2].audio), HEAR, "I hear a cow mooing.", "a cow mooing"),
        ]
    )


@pytest.mark.parametrize(("site", "start", "stop"), SITES_AND_WINDOWS)
def test_cut_equals_reference(tiny, media, site, start, stop):
    batch = batch_of(tiny, media)
    cuts = [(Cut.at(site, start, stop),)] * 3
    states, _, _ = reference.forward(tiny, batch, cuts)
    rows = batch.inputs["rows"]
    expected = tiny.head(states.flatten(0, 1)[rows])
    with torch.no_grad():
        torch.testing.assert_close(tiny.forward(batch, cuts), expected, atol=1e-5, rtol=0)


def test_questions_that_share_a_prefix_equal_separate_sequences(tiny, media):
    """Logits and gradients; ragged, three questions on one clip, one on another, in mixed order."""
    asked = [
        (media[0], HEAR, "I hear a dog barking."),
        (media[1], "What do you see and hear?", "I see a cat and I hear a cat meowing."),
        (media[0], "What do you see?", "I see a dog."),
        (media[0], "Which object can be seen?", "I see a rider on a galloping horse."),
    ]
    examples = [tiny.sequence(*a) for a in asked]
    shared, separate = tiny.batch(examples), tiny.batch(examples, share=False)
    assert shared.kinds.shape[0] == 2 and separate.kinds.shape[0] == 4
    weights = [p for p in tiny.text_model.layers.parameters() if p.ndim == 2]
    results = []
    for batch in (shared, separate):
        loss = torch.nn.functional.cross_entropy(tiny.forward(batch).flatten(0, 1), batch.targets.flatten())
        results.append((tiny.forward(batch).detach(), torch.autograd.grad(loss, weights)))
    real = shared.targets != -100
    torch.testing.assert_close(results[0][0][real], results[1][0][real], atol=1e-5, rtol=0)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_each_row_has_its_own_cuts(tiny, media):
    batch = batch_of(tiny, media)
    cuts = [(Cut.at("video->emitters", 0, 3),), (), (Cut.at("audio->question", 1, 2), Cut.at("audio->emitters", 0, 1))]
    states, _, _ = reference.forward(tiny, batch, cuts)
    rows = batch.inputs["rows"]
    expected = tiny.head(states.flatten(0, 1)[rows])
    with torch.no_grad():
        torch.testing.assert_close(tiny.forward(batch, cuts), expected, atol=1e-5, rtol=0)


def test_empty_cut_is_exactly_no_cut(tiny, media):
    batch = batch_of(tiny, media)
    with torch.no_grad():
        assert torch.equal(tiny.forward(batch), tiny.forward(batch, [()] * 3))


@pytest.mark.parametrize(("site", "start", "stop"), SITES_AND_WINDOWS)
def test_prefill_and_extend_equal_one_pass(tiny, media, site, start, stop):
    cut = (Cut.at(site, start, stop),)
    questions = [HEAR, "What sound is this?", "What do you see?"]
    batch = tiny.batch([tiny.sequence(m, q, "I hear a dog barking.", "a dog barking") for m, q in zip(media, questions, strict=True)])
    prefix = tiny.prefill(media, [cut] * 3 if cut[0].cuts_media else None)
    which = [2, 0, 1, 0]
    out = tiny.extend(prefix, which, [tiny.suffix(questions[w], "I hear a dog barking.", "a dog barking") for w in which], [cut] * 4)
    with torch.no_grad():
        expected = tiny.forward(batch, [cut] * 3)[which]
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)


def test_a_media_cut_without_its_prefix_is_refused(tiny, media):
    prefix = tiny.prefill(media[:1])
    with pytest.raises(CutError, match="prefill"):
        tiny.extend(prefix, [0], [tiny.suffix(HEAR)], [(Cut.at("video->audio", 0, 3),)])
    with pytest.raises(CutError, match="layers"):
        tiny.extend(prefix, [0], [tiny.suffix(HEAR)], [(Cut.at("video->emitters", 0, 4),)])


@pytest.mark.parametrize("site", ["video->emitters", "audio->question+emitters", "video->audio"])
def test_greedy_decoding_under_a_cut_equals_repeated_full_passes(tiny, media, site):
    cut = (Cut.at(site, 0, 2),)
    prefix = tiny.prefill(media, [cut] * 3 if cut[0].cuts_media else None)
    got = tiny.generate_ids(prefix, [0, 1, 2], [HEAR, "What sound is this?", HEAR], [cut] * 3, max_new_tokens=5)
    for i, q in enumerate([HEAR, "What sound is this?", HEAR]):
        layout, suffix = tiny.layout(media[i]), tiny.suffix(q)
        said: list[int] = []
        for _ in range(5):
            batch = tiny.batch([tiny.sequence(media[i], q, "x")])
            ids = torch.cat([layout.ids, suffix.ids, torch.tensor(said, dtype=torch.long)])
            kinds = torch.cat([layout.kinds, suffix.kinds, torch.full((len(said),), int(Kind.EMITTER))])
            extra = torch.arange(len(ids) - len(layout.ids)) + layout.next_position
            batch.kinds = kinds[None]
            batch.inputs.update(
                input_ids=ids[None],
                media_mask=(tiny.is_media(ids) & (torch.arange(len(ids)) < len(layout.ids)))[None],  # a media token that is said has no features
                position_ids=torch.cat([layout.positions, extra.expand(3, -1)], 1)[:, None],
            )
            states, _, _ = reference.forward(tiny, batch, [cut])
            said.append(int(tiny.head(states[0, -1]).argmax()))
        assert got[i] == (said[: said.index(tiny.end_id)] if tiny.end_id in said else said)


def test_flow_equals_reference(tiny, media):
    questions = [HEAR, "What do you see?", HEAR]
    answer = "I hear a dog barking."
    prefix = tiny.prefill(media)
    out = tiny.extend(prefix, [0, 1, 2], [tiny.suffix(q, answer) for q in questions], flow=True)
    batch = tiny.batch([tiny.sequence(m, q, answer) for m, q in zip(media, questions, strict=True)])
    _, states, weights = reference.forward(tiny, batch, [()] * 3)
    for layer, item, (t, target) in itertools.product(range(3), range(3), enumerate((Kind.QUESTION, Kind.EMITTER))):
        kinds = batch.kinds[item]
        attention = tiny.text_model.layers[layer].self_attn
        h = tiny.text_model.layers[layer].input_layernorm(states[layer][item])
        values = attention.v_proj(h).view(len(kinds), -1, attention.head_dim).norm(dim=-1).repeat_interleave(2, 1)  # (T, heads)
        rows = [r for r in range(len(kinds)) if kinds[r] == target]
        for variant in range(3):
            mass = torch.zeros(6)
            for row in rows:
                for head in range(4):
                    w = weights[layer][item, head, row].clone()
                    if variant == 1:
                        w[0] = 0
                    if variant == 2:
                        w = w * values[:, head]
                    w = w / w.sum()
                    for kind in Kind:
                        mass[kind] += w[kinds == kind].sum() / len(rows) / 4
            torch.testing.assert_close(out.flow[variant, layer, item, t], mass, atol=1e-5, rtol=0)


def test_hidden_states_are_those_of_the_reference(tiny, media):
    batch = tiny.batch([tiny.sequence(media[0], HEAR, "I hear a dog barking.")])
    normed, states, _ = reference.forward(tiny, batch, [()])
    prefix = tiny.prefill(media[:1], hidden=True)
    out = tiny.extend(prefix, [0], [tiny.suffix(HEAR, "I hear a dog barking.")], hidden=True)
    for layer, state in enumerate(states):
        whole = torch.cat([prefix.hidden[layer], out.hidden[layer]], 1)
        torch.testing.assert_close(whole, state, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiny.lens(out.hidden[-1]), tiny.head(normed[:, prefix.kinds.shape[1] :]), atol=1e-5, rtol=0)


def test_cuts_survive_gradient_checkpointing(tiny, media):
    batch, cuts = batch_of(tiny, media), [(Cut.at("video->emitters", 0, 3),)] * 3
    weight = tiny.text_model.layers[0].self_attn.q_proj.weight
    tiny.thinker.train()
    plain = torch.autograd.grad(tiny.forward(batch, cuts).square().sum(), weight)[0]
    uncut = torch.autograd.grad(tiny.forward(batch).square().sum(), weight)[0]
    tiny.text_model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(tiny.forward(batch, cuts).square().sum(), weight)[0]
    tiny.text_model.gradient_checkpointing_disable()
    tiny.thinker.eval()
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    assert (uncut - plain).abs().max() > 1e-3


def test_bad_cuts():
    with pytest.raises(CutError, match="themselves"):
        Cut((Kind.VIDEO,), (Kind.VIDEO,), 0, 1)
    with pytest.raises(CutError, match="layers"):
        Cut.at("video->emitters", 2, 2)
    with pytest.raises(CutError, match="sites"):
        Cut.at("video->nowhere", 0, 1)
    for site in SITES:
        assert Cut.at(site, 0, 1).site == site


def test_a_cut_as_text():
    cut = Cut.at("video->question+emitters", 2, 5)
    assert cut.text == "video->question+emitters 2:5" and Cut.parse(cut.text) == cut
    for text in ("video 2", "video->emitters", "video->nowhere 1:2", "video->emitters 3:3"):
        with pytest.raises(CutError):
            Cut.parse(text)
