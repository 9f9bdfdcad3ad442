"""What training asks of a model: states, attention mass with gradients, own question rows, adapters of many ranks, plain text."""

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from models import Cut, Kind, Media, ModelError, load_model, spread_ranks
from tests.models import reference

TEXT = Media(None, None)


def ragged(tiny, media):
    """Three questions about one clip in mixed order, one about a clip with twice the sound, one about sound alone, one without a clip."""
    return [
        tiny.sequence(media[0], "What do you hear?", "I hear a dog barking."),
        tiny.sequence(media[1], "What do you see and hear?", "I see a cat and I hear a cat meowing."),
        tiny.sequence(media[0], "What do you see?", "I see a dog."),
        tiny.sequence(Media(None, media[2].audio), "What do you hear?", "I hear a cow mooing."),
        tiny.sequence(media[0], "Which object can be seen?", "I see a rider on a galloping horse."),
        tiny.sequence(TEXT, "What do you see?", "I see a bus."),
    ]


def emitters(batch):
    """By loops: (sequence, row) of every example's emitters."""
    length = batch.kinds.shape[1]
    return [
        [divmod(int(r), length) for r, t in zip(rows, ts, strict=True) if t != -100]
        for rows, ts in zip(batch.inputs["rows"], batch.targets, strict=True)
    ]


# ---------------------------------------------------------------- states


def test_states_are_wanted_anywhere(tiny, media):
    batch = tiny.batch(ragged(tiny, media)[:2])
    _, states, _ = reference.forward(tiny, batch, [()] * 2)
    wanted = torch.tensor([[0, 5, batch.kinds.shape[1] + 3], [7, 7, -1]])
    with torch.no_grad():
        out = tiny.decoder(**batch.inputs, states=wanted)
    assert out.states.shape[:3] == (3, 2, 3) and out.mass is None
    for layer in range(3):
        torch.testing.assert_close(out.states[layer], states[layer + 1].flatten(0, 1)[wanted], atol=1e-5, rtol=0)
    assert torch.equal(batch.answers(out.logits)[0], tiny.forward(batch)) and tiny.decoder(**batch.inputs).states is None


def test_asked_are_the_rows_of_the_own_question(tiny, media):
    examples = ragged(tiny, media)
    for share in (True, False):
        batch = tiny.batch(examples, share)
        for example, rows in zip(examples, batch.asked, strict=True):
            suffix, own = example.suffix, rows[rows >= 0]
            assert torch.equal(batch.inputs["input_ids"].flatten()[own], suffix.ids[: suffix.first])
            assert set(batch.kinds.flatten()[own].tolist()) == {Kind.QUESTION}
            assert len(set(batch.inputs["segments"].flatten()[own].tolist())) == 1
        first = batch.inputs["rows"][:, 0]
        assert torch.equal(batch.asked.max(1).values + 1, first)  # right before the first emitter


def test_logits_are_there_once_a_target_and_padded_only_as_asked(tiny, media):
    batch = tiny.batch(ragged(tiny, media))
    own = (batch.targets != -100).sum(1).tolist()
    with torch.no_grad():
        flat = tiny.decoder(**batch.inputs).logits
        assert len(flat) == sum(own) < batch.targets.numel()
        which = [own.index(min(own)), own.index(sorted(own)[1])]  # not the longest
        got, targets = batch.answers(flat, which)
        assert targets.shape == got.shape[:2] == (2, sorted(own)[1])
        for row, said, example in zip(got, targets, which, strict=True):
            at = sum(own[:example])
            assert torch.equal(said[: own[example]], batch.targets[example, : own[example]]) and bool((said[own[example] :] == -100).all())
            assert torch.equal(row[: own[example]], flat[at : at + own[example]])
        whole, every = batch.answers(flat)
        assert torch.equal(every, batch.targets) and torch.equal(whole, tiny.forward(batch))


# ---------------------------------------------------------------- attention mass


@pytest.mark.parametrize("cut", [(), (Cut.at("video->emitters", 1, 2),), (Cut.at("audio->question+emitters", 0, 3),)])
def test_mass_equals_a_written_out_softmax(tiny, media, cut):
    examples = ragged(tiny, media)
    whole, shared = tiny.batch(examples, share=False), tiny.batch(examples)
    _, _, weights = reference.forward(tiny, whole, [cut] * len(examples))
    expected = torch.zeros(2, len(examples), len(Kind))
    for n, rows in enumerate(emitters(whole)):
        for i, layer in enumerate((2, 1)):
            for sequence, row in rows:
                for kind in Kind:
                    expected[i, n, kind] += weights[layer][sequence, :, row, whole.kinds[sequence] == kind].sum(-1).mean() / len(rows)
    with torch.no_grad():
        for batch in (whole, shared):
            out = tiny.decoder(**batch.inputs, cuts=[cut] * len(batch.kinds), mass=(2, 1))
            torch.testing.assert_close(out.mass, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(out.mass.sum(-1), torch.ones(2, len(examples)), atol=1e-5, rtol=0)
            assert torch.equal(batch.answers(out.logits)[0], tiny.forward(batch, [cut] * len(batch.kinds))) and out.states is None
    if cut and Kind.VIDEO in cut[0].source:
        assert float(expected[1, 0, Kind.VIDEO]) == float(out.mass[1, 0, Kind.VIDEO]) == 0.0 < float(out.mass[0, 0, Kind.VIDEO])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_mass_by_finite_differences(tiny_folder, media, checkpointing):
    model = load_model(tiny_folder, dtype=torch.float64)
    batch = model.batch(ragged(model, media)[:3])
    parameters = [model.text_model.layers[0].self_attn.v_proj.weight, model.text_model.layers[1].self_attn.q_proj.weight]
    parameters.append(model.text_model.layers[2].self_attn.k_proj.weight)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, len(Kind), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)

    def value():
        return (model.decoder(**batch.inputs, mass=(1, 2)).mass * weight).sum()

    if checkpointing:
        model.text_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.thinker.train()
    gradients = torch.autograd.grad(value(), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        way = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        way = way / way.norm() + gradient / gradient.norm()  # the norms of a transformers model round to float32, so a direction with some slope
        with torch.no_grad():
            p += 5e-3 * way
            above = value()
            p -= 1e-2 * way
            below = value()
            p += 5e-3 * way
        slope, expected = float((above - below) / 1e-2), float((gradient * way).sum())
        assert slope == pytest.approx(expected, rel=1e-2) and slope > 1e-3


# ---------------------------------------------------------------- adapters


def test_ranks_are_shared_out():
    assert spread_ranks([5, 1, 3], 3, 8) == {1: 8, 3: 8, 5: 8}
    assert spread_ranks(range(8), 3, 8) == dict.fromkeys(range(8), 3)
    assert spread_ranks(range(3), 2, 2) == {0: 1, 1: 1, 2: 2}
    assert spread_ranks(range(6), 1, 2) == {2: 1, 5: 1}
    for layers, like, r in ((36, 7, 16), (5, 36, 3), (28, 9, 8)):
        ranks = spread_ranks(range(layers), like, r)
        assert sum(ranks.values()) == like * r and max(ranks.values()) - min(ranks.values()) <= 1


def trained(model):
    return sum(p.numel() for _, p in model.trainable_parameters())


def test_controls_have_as_many_parameters_and_the_same_scale(tmp_path, tiny_folder, mp4s, media):
    projections = ["q_proj", "v_proj", "down_proj"]
    planned = load_model(tiny_folder)
    planned.add_lora(planned.lora_targets([0, 1], projections), r=2, alpha=6)
    model = load_model(tiny_folder)
    names = {n: rank for layer, rank in spread_ranks(range(3), 2, 2).items() for n in model.lora_targets([layer], projections)}
    model.add_lora(list(names), r=2, alpha=6, ranks=names)
    assert trained(model) == trained(planned) > 0
    modules = {n.removeprefix("base_model.model."): m for n, m in model.thinker.named_modules() if hasattr(m, "lora_A")}
    assert {n: m.r["default"] for n, m in modules.items()} == names and sorted(set(names.values())) == [1, 2]
    assert {m.scaling["default"] for m in modules.values()} == {3.0}
    with torch.no_grad():
        for n, p in model.trainable_parameters():
            p.normal_(std=0.3) if "lora_B" in n else None
        batch = model.batch([model.sequence(media[0], "What do you hear?", "I hear a dog barking.")])
        expected = model.forward(batch)
        model.save_adapter(tmp_path / "adapter")
        assert torch.equal(load_model(tiny_folder, adapter=tmp_path / "adapter").forward(batch), expected)
        stock = PeftModel.from_pretrained(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny_folder), str(tmp_path / "adapter"))
        again = {n: (m.r["default"], m.scaling["default"]) for n, m in stock.named_modules() if hasattr(m, "lora_A")}
        assert again == {f"base_model.model.{n}": (rank, 3.0) for n, rank in names.items()}
        for (n, ours), (m, theirs) in zip(
            sorted((n, p) for n, p in model.thinker.named_parameters() if "lora_" in n),
            sorted((n, p) for n, p in stock.named_parameters() if "lora_" in n),
            strict=True,
        ):
            assert n == m and torch.equal(ours, theirs)


def test_ranks_of_other_modules_are_refused(tiny_folder):
    model = load_model(tiny_folder)
    targets = model.lora_targets([1], ["q_proj"])
    with pytest.raises(ModelError, match="one of the modules"):
        model.add_lora(targets, 2, 4, ranks={model.lora_targets([2], ["q_proj"])[0]: 1})
    with pytest.raises(ModelError, match="at least 1"):
        model.add_lora(targets, 2, 4, ranks={targets[0]: 0})


# ---------------------------------------------------------------- plain text


def test_plain_text_is_the_stock_model_on_text(tiny, media):
    """No clip at all: tokens, logits in a batch, in a shared batch beside clips, and with prefix reuse."""
    question, answer = "Is a dog a cat?", "I hear a dog barking and I see nothing."
    text = tiny.processor.apply_chat_template(
        [{"role": "system", "content": tiny.system_prompt}, {"role": "user", "content": [{"type": "text", "text": question}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    stock = tiny.tokenizer(text + answer + "<|im_end|>", return_tensors="pt")
    tiny.thinker.set_attn_implementation({"text_config": "sdpa"})
    with torch.no_grad():
        logits = tiny.thinker(**stock).logits[0]
    tiny.thinker.set_attn_implementation({"text_config": "avbalance"})
    whole = tiny.sequence(TEXT, question, answer)
    batch = tiny.batch([whole])
    assert torch.equal(batch.inputs["input_ids"], stock["input_ids"])
    expected = logits[batch.inputs["rows"][0]]
    with torch.no_grad():
        torch.testing.assert_close(tiny.forward(batch)[0], expected, atol=1e-5, rtol=0)
        mixed = tiny.batch([tiny.sequence(media[0], "What do you see?", "I see a dog."), tiny.sequence(TEXT, "What do you see?", "A bus."), whole])
        assert mixed.kinds.shape[0] == 2
        torch.testing.assert_close(tiny.forward(mixed)[2], expected, atol=1e-5, rtol=0)
    for medias in ([TEXT], [media[1], TEXT]):
        prefix = tiny.prefill(medias, hidden=True)
        at = len(medias) - 1
        torch.testing.assert_close(tiny.extend(prefix, [at], [whole.suffix]).logits[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(tiny.extend(prefix, [at], [whole.suffix], hidden=True).logits[0], expected, atol=1e-5, rtol=0)
        said = tiny.generate_ids(prefix, [at], [question], max_new_tokens=3)[0]
        assert said[:1] == [t for t in [int(expected[0].argmax())] if t != tiny.end_id]
    assert TEXT.video is None and not bool(tiny.is_media(tiny.layout(TEXT).ids).any())


# ---------------------------------------------------------------- one prefix, many questions


@pytest.mark.parametrize("questions", [2, 4])
def test_gradients_of_a_shared_prefix_are_those_of_separate_sequences(tiny_folder, tiny, media, questions):
    model = load_model(tiny_folder)
    model.text_model.load_state_dict(tiny.text_model.state_dict())
    model.add_lora(model.lora_targets([0, 1, 2], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]), 4, 8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.trainable_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if "lora_B" in name else 0.3))
    asked = [
        ("What do you hear?", "I hear a dog barking."),
        ("What do you see?", "I see a dog."),
        ("Which sound is this?", "A cat."),
        ("Both?", "A bus and a cow."),
    ]
    examples = [model.sequence(m, *a) for a in asked[:questions] for m in media[:2]]
    parameters, results = [p for _, p in model.trainable_parameters()], []
    for share in (True, False):
        batch = model.batch(examples, share)
        assert batch.kinds.shape[0] == (2 if share else 2 * questions)
        loss = torch.nn.functional.cross_entropy(model.forward(batch).flatten(0, 1), batch.targets.flatten())
        results.append(torch.autograd.grad(loss, parameters))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert max(float(g.abs().max()) for g in results[0]) > 1e-2
