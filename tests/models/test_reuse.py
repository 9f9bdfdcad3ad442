"""Prefix reuse against whole masked forward passes: random models, prompts, batches and cuts."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from models import SITES, Cut, CutError, Kind, Media, load_model, self_check
from models.sequences import Example, StreamFeatures
from models.tiny import build_tiny

QUESTIONS = ("What do you hear?", "Which object can be seen in the video?", "What sound is this?")
SHAPES = {  # layers, width, query heads, key heads
    "one key head": (2, 32, 4, 1),
    "two key heads": (3, 48, 4, 2),
    "no grouping": (4, 32, 2, 2),
}
INTO_SUFFIX = [site for site in SITES if not Cut.at(site, 0, 1).cuts_media]
INTO_MEDIA = [site for site in SITES if Cut.at(site, 0, 1).cuts_media]


def loud(model):
    """Random weights as small as those of a new model give nearly uniform attention; with larger ones every comparison means something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.text_model.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def stream(model, kind, size, seed):
    """Tower features of a stream that never was: random, of the right length."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.tensor([size])
    tokens = 4 * size if kind == "video" else int(model._model.audio_tower._get_feat_extract_output_lengths(frames)[1])
    features = torch.randn(tokens, model.hidden_size, generator=generator) * 0.3
    return StreamFeatures(features, (size, 4, 4) if kind == "video" else (size,))


def whole_clip(model, seed=0):
    return Media(stream(model, "video", 2, seed), stream(model, "audio", 60, seed + 1))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    models = {}
    for name, (layers, hidden, heads, key_heads) in SHAPES.items():
        folder = tmp_path_factory.mktemp("zoo") / name.replace(" ", "_")
        build_tiny(folder, layers=layers, hidden=hidden, heads=heads, key_heads=key_heads, tower=16, tower_layers=1)
        models[name] = loud(load_model(folder))
        self_check(models[name], whole_clip(models[name]), QUESTIONS[0])
    return models


@st.composite
def cases(draw):
    """Model, clips (streams and their sizes, cuts into their media), jobs (clip, question, answer tokens, cuts)."""
    name = draw(st.sampled_from(sorted(SHAPES)))
    layers = SHAPES[name][0]

    def cut(sites):
        start = draw(st.integers(0, layers - 1))
        return Cut.at(draw(st.sampled_from(sites)), start, draw(st.integers(start + 1, layers)))

    clips = []
    for _ in range(draw(st.integers(1, 3))):
        video, audio = draw(st.sampled_from([(1, 30), (2, 60), (1, 90), (3, 20), (2, 0), (0, 50)]))
        clips.append((video, audio, tuple(cut(INTO_MEDIA) for _ in range(draw(st.sampled_from([0, 0, 1, 2]))))))
    jobs = []
    for _ in range(draw(st.sampled_from([1, 2, 5, 8, 12]))):
        answer = draw(st.lists(st.integers(0, 600), min_size=1, max_size=6))
        cuts = tuple(cut(INTO_SUFFIX) for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))))
        jobs.append((draw(st.integers(0, len(clips) - 1)), draw(st.sampled_from(QUESTIONS)), answer, cuts))
    return name, clips, jobs


def prepared(zoo, case):
    """Model, media, their cuts, and for each job its clip, its suffix and all its cuts."""
    name, clips, jobs = case
    model = zoo[name]
    media = [
        Media(stream(model, "video", v, i) if v else None, stream(model, "audio", a, i + 50) if a else None) for i, (v, a, _) in enumerate(clips)
    ]
    which = [clip for clip, *_ in jobs]
    suffixes = []
    for _, asked, answer, _ in jobs:
        prompt = model.suffix(asked)
        said = torch.tensor(answer)
        kinds = torch.full_like(said, int(Kind.EMITTER))
        kinds[-1] = int(Kind.QUESTION)
        suffixes.append(
            replace(
                prompt, ids=torch.cat([prompt.ids, said]), kinds=torch.cat([prompt.kinds, kinds]), targets=said, span=torch.ones_like(said).bool()
            )
        )
    return model, media, [cuts for *_, cuts in clips], which, suffixes, [cuts + clips[clip][2] for clip, *_, cuts in jobs]


def brute(model, media, which, suffixes, cuts):
    """One whole forward pass a job, nothing shared: logits (N, A, V)."""
    batch = model.batch([Example(media[w], s) for w, s in zip(which, suffixes, strict=True)], share=False)
    with torch.no_grad():
        return model.forward(batch, cuts), batch.targets != -100


COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **COMMON)
@given(case=cases(), alone=st.integers(0, 11))
def test_reuse_equals_whole_masked_passes(zoo, case, alone):
    model, media, media_cuts, which, suffixes, cuts = prepared(zoo, case)
    prefix = model.prefill(media, media_cuts)
    out = model.extend(prefix, which, suffixes, cuts)
    expected, real = brute(model, media, which, suffixes, cuts)
    torch.testing.assert_close(out.logits[real], expected[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logprobs(prefix, which, suffixes, cuts), out.logprobs(), atol=1e-6, rtol=0)
    # batches of 1
    j = alone % len(which)
    one = model.extend(model.prefill([media[which[j]]], [media_cuts[which[j]]]), [0], [suffixes[j]], [cuts[j]]).logits[0]
    assert (one - out.logits[j, : len(one)]).abs().max() <= 1e-5 * out.logits[real].abs().max()
    # an empty cut is exactly no cut
    plain = [i for i, c in enumerate(media_cuts) if not c]
    if jobs := [i for i, w in enumerate(which) if w in plain]:
        asked = [which[i] for i in jobs], [suffixes[i] for i in jobs]
        assert torch.equal(model.extend(prefix, *asked).logits, model.extend(prefix, *asked, [()] * len(jobs)).logits)


@settings(max_examples=200, **COMMON)
@given(case=cases())
def test_greedy_equals_whole_masked_passes(zoo, case):
    model, media, media_cuts, which, _, cuts = prepared(zoo, case)
    questions = [asked for _, asked, *_ in case[2]]
    said = model.generate_ids(model.prefill(media, media_cuts), which, questions, cuts, max_new_tokens=4)
    expected = [[] for _ in which]
    for step in range(4):
        suffixes = []
        for asked, ids in zip(questions, expected, strict=True):
            prompt, ids = model.suffix(asked), torch.tensor([*ids, *[0] * (step - len(ids))], dtype=torch.long)
            kinds, targets = torch.full_like(ids, int(Kind.EMITTER)), torch.zeros(step + 1, dtype=torch.long)
            suffixes.append(replace(prompt, ids=torch.cat([prompt.ids, ids]), kinds=torch.cat([prompt.kinds, kinds]), targets=targets))
        tokens = brute(model, media, which, suffixes, cuts)[0][:, step].argmax(-1).tolist()
        for ids, token in zip(expected, tokens, strict=True):
            if len(ids) == step and token != model.end_id:
                ids.append(token)
    assert said == expected


def test_answers_that_end_leave_the_batch(zoo, monkeypatch):
    """Jobs stop at different tokens; the rest must go on as if they had been alone."""
    model = zoo["two key heads"]
    media = [whole_clip(model, seed) for seed in range(3)]
    prefix = model.prefill(media)
    which = [0, 1, 2] * 4
    asked = [QUESTIONS[i % 2] for i in range(12)]
    cuts = [(Cut.at(INTO_SUFFIX[i % 6], i % 3, 3),) for i in range(12)]
    free = model.generate_ids(prefix, which, asked, cuts, max_new_tokens=8)
    stop = max({t for ids in free for t in ids[:6]}, key=lambda t: sum(t in ids for ids in free))
    monkeypatch.setattr(model, "end_id", stop)
    assert model.generate_ids(prefix, which, asked, cuts, max_new_tokens=8) == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]


def test_rows_and_layers_that_a_cut_cannot_change_are_not_computed(zoo):
    """By hand, 3 layers, q question rows, e answer rows: the clean pass has q + e rows a layer, its question rows do not leave the last one."""
    model = zoo["two key heads"]
    prefix, suffix = model.prefill([whole_clip(model)]), model.suffix(QUESTIONS[0], "I hear a dog.")
    q, e = suffix.first, len(suffix.targets)
    rows: list[int] = []

    def computed(cuts):
        rows[:] = [0, 0, 0]
        handles = [
            layer.mlp.register_forward_pre_hook(lambda _, args, i=i: rows.__setitem__(i, rows[i] + args[0].shape[1]))
            for i, layer in enumerate(model.text_model.layers)
        ]
        try:
            model.extend(prefix, [0] * len(cuts), [suffix] * len(cuts), cuts)
        finally:
            for handle in handles:
                handle.remove()
        return list(rows)

    clean = [q + e, q + e, e]
    assert computed([()]) == clean
    assert computed([()] * 5) == clean
    # into emitters in layer l only: e rows more from l on
    assert computed([(), *((Cut.at("video->emitters", a, a + 1),) for a in range(3))]) == [q + 2 * e, q + 3 * e, 4 * e]
    # into the question at layer 1: q rows more in layer 1 (they do not leave layer 2), e rows more in layer 2
    assert computed([(), (Cut.at("video->question", 1, 2),)]) == [q + e, 2 * q + e, 2 * e]
    # in the last layer the question puts nothing out
    assert computed([(), (Cut.at("video->question", 2, 3),)]) == clean
    # the same rows of the question are cut with and without the emitters
    both = [(), (Cut.at("video->question", 0, 1),), (Cut.at("video->question+emitters", 0, 1),)]
    assert computed(both) == [2 * q + 2 * e, 2 * q + 3 * e, 3 * e]
    # "from layer 0 on" is the window [0, 1) in layer 0
    assert computed([(Cut.at("video->emitters", 0, 1),), (Cut.at("video->emitters", 0, 3),)]) == [q + e, q + 2 * e, 2 * e]


@pytest.mark.parametrize("site", INTO_MEDIA)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (1, 3), (2, 3)])
def test_prefixes_under_cuts_resume_the_clean_one(zoo, site, start, stop):
    model = zoo["two key heads"]
    media = [whole_clip(model), Media(stream(model, "video", 1, 5), stream(model, "audio", 90, 6)), Media(stream(model, "video", 3, 7), None)]
    clean, cuts = model.prefill(media, hidden=True), [(Cut.at(site, start, stop),)] * 2
    got, expected = model.prefill(media[:2], cuts, hidden=True, clean=clean), model.prefill(media[:2], cuts, hidden=True)
    real = expected.kinds != Kind.PAD
    for ours, theirs in zip([*got.hidden, *got.keys, *got.values], [*expected.hidden, *expected.keys, *expected.values], strict=True):
        rows = theirs.shape[-2] if theirs.ndim == 3 else theirs.shape[2]
        ours = ours[..., :rows, :]
        for i in range(2):
            torch.testing.assert_close(ours[i][..., real[i], :], theirs[i][..., real[i], :], atol=1e-5, rtol=0)
    if start:
        assert got.keys[0].data_ptr() == clean.keys[0].data_ptr()  # shared, not copied
    suffixes = [model.suffix(QUESTIONS[0], "This.")] * 2
    torch.testing.assert_close(
        model.extend(got, [0, 1], suffixes, cuts).logits, model.extend(expected, [0, 1], suffixes, cuts).logits, atol=1e-5, rtol=0
    )
    if start:
        with pytest.raises(CutError, match="uncut prefix"):
            model.prefill(media[1:], cuts, clean=clean)
        with pytest.raises(CutError, match="uncut prefix"):
            model.prefill(media[:2], cuts, clean=expected)


def test_bfloat16(zoo, tmp_path):
    """As exact as the whole pass in bfloat16 is, against float32."""
    exact = zoo["two key heads"]
    build_tiny(tmp_path / "half", layers=3, hidden=48, heads=4, key_heads=2, tower=16, tower_layers=1)
    half = load_model(tmp_path / "half", dtype=torch.bfloat16)
    half.text_model.load_state_dict(exact.text_model.state_dict())
    exact.text_model.load_state_dict(half.text_model.state_dict())  # the same, rounded, weights
    media = [whole_clip(exact, seed) for seed in range(2)]
    cuts = [(), *((Cut.at(site, 1, 3),) for site in INTO_SUFFIX), (Cut.at("video->emitters", 0, 1), Cut.at("audio->question", 0, 2))]
    which = [i % 2 for i in range(len(cuts))]
    suffixes = [exact.suffix(QUESTIONS[i % 3], "I hear a dog barking.") for i in range(len(cuts))]
    expected, real = brute(exact, media, which, suffixes, cuts)
    whole = brute(half, media, which, suffixes, cuts)[0].float()
    ours = half.extend(half.prefill(media), which, suffixes, cuts).logits.float()
    error, usual = ((x - expected)[real].abs().mean() for x in (ours, whole))
    assert error <= 1.3 * usual and usual < 0.05 * expected.abs().max()
    assert all(half.generate_ids(half.prefill(media), which, [QUESTIONS[0]] * len(cuts), cuts, 4))


def test_misuse_is_refused(zoo):
    model = zoo["two key heads"]
    prefix = model.prefill([whole_clip(model)])
    with pytest.raises(CutError, match="One tuple of cuts a suffix"):
        model.extend(prefix, [0], [model.suffix(QUESTIONS[0])], [(), ()])
    with pytest.raises(CutError, match="does not fit a model of 3 layers"):
        model.generate_ids(prefix, [0], [QUESTIONS[0]], [(Cut.at("video->emitters", 3, 4),)])
