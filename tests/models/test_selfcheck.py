"""The self-check catches instruments that do nothing or something else, and cannot be gone around."""

from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from models import Cut, CutError, Media, load_model, self_check
from models.attention import IMPLEMENTATION, Instruments, Packed, dense_mask, instrumented_attention
from models.reuse import Decoding, Reuse, States
from models.sequences import StreamFeatures

HEAR = "What do you hear?"
CUT = (Cut.at("video->emitters", 0, 3),)


@pytest.fixture
def fresh(tiny):
    """The shared model, not checked yet."""
    tiny.passed = None
    yield tiny
    tiny.passed = None


def test_passes_and_is_remembered(fresh, media):
    self_check(fresh, media[0], HEAR)
    assert fresh.passed == fresh.instrument()


def test_passes_in_bfloat16_and_with_an_adapter(tiny_folder, media):
    model = load_model(tiny_folder, dtype=torch.bfloat16)
    model.add_lora(model.lora_targets([0, 2], ["q_proj", "v_proj"]), r=2, alpha=4)
    self_check(model, media[0], HEAR)


def random_model(folder, dtype, seed, gain):
    """Random projections that let a row through at `gain` times its size: the larger, the more rounding matters."""
    model, generator = load_model(folder, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.text_model.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * parameter.shape[1] ** -0.5)
    return model


def clip_of(model, seed):
    """4 s of random features."""
    generator, sizes = torch.Generator().manual_seed(seed), ((4, 6, 6), (400,))
    ids = model.layout(Media(*(StreamFeatures(torch.empty(0), size) for size in sizes))).ids
    rows = [int((ids == token).sum()) for token in (model.video_id, model.audio_id)]
    return Media(*(StreamFeatures(torch.randn(n, model.hidden_size, generator=generator), s) for n, s in zip(rows, sizes, strict=True)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_passes_in_bfloat16_however_much_rounding_moves_a_model(tiny_folder, seed):
    """Of these the second is 7.7 % of its largest logit from the stock attention, as the stock attentions are from each other."""
    model = random_model(tiny_folder, torch.bfloat16, seed + 1, 2.0)
    self_check(model, clip_of(model, seed), HEAR)


def test_passes_in_float64(tiny_folder):
    """The stock softmax is float32's there too, and so are the attention of reuse and the tolerance."""
    model = random_model(tiny_folder, torch.float64, 1, 1.0)
    self_check(model, clip_of(model, 0), HEAR)


@pytest.mark.parametrize("fault", ["no cut in one pass", "wrong states are shared", "no cut in decoding", "reuse is another attention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_catches_in_other_precisions(tiny_folder, monkeypatch, dtype, fault):
    """What rounding hides is larger in bfloat16: there the scale of attention is a quarter off, not a hundredth."""
    model = random_model(tiny_folder, dtype, 1, 1.0)
    where, name, wrong = FAULTS[fault]
    if dtype == torch.bfloat16 and wrong is shifted:
        wrong = partialmethod(shifted, by=1.25)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(CutError, match=r"not the whole pass|does nothing"):
        self_check(model, clip_of(model, 0), HEAR)


def test_a_model_that_rounding_turns_upside_down_is_refused(tiny_folder):
    model = random_model(tiny_folder, torch.bfloat16, 1, 12.0)
    with pytest.raises(CutError, match="Load it in float32"):
        self_check(model, clip_of(model, 0), HEAR)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_catches_a_stock_implementation(fresh, media, implementation):
    fresh.text_model.set_attn_implementation(implementation)
    try:
        with pytest.raises(CutError, match="ignores cuts"):
            self_check(fresh, media[0], HEAR)
        with pytest.raises(CutError, match="ignores cuts"):
            fresh.prefill(media, [CUT] * 3)
    finally:
        fresh.text_model.set_attn_implementation(IMPLEMENTATION)


def test_catches_a_stock_function_under_our_name(fresh, media):
    AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)
    try:
        with pytest.raises(CutError, match=r"does nothing|did not run"):
            self_check(fresh, media[0], HEAR)
    finally:
        AttentionInterface.register(IMPLEMENTATION, instrumented_attention)


@pytest.mark.parametrize("mask", [sdpa_mask, lambda *_, **__: None])
def test_catches_a_mask_that_is_none(fresh, media, mask):
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    try:
        with pytest.raises(CutError, match="dense boolean mask"):
            self_check(fresh, media[0], HEAR)
    finally:
        AttentionMaskInterface.register(IMPLEMENTATION, dense_mask)


def test_catches_a_mask_without_padding(fresh, media):
    """Padding sits between a short prefix and its suffix: that a mask without it is wrong shows with a prefix."""
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *a, **k: dense_mask(*a, **{**k, "attention_mask": None}))
    try:
        with pytest.raises(CutError, match="taps on a prefix is not the whole pass"):
            self_check(fresh, media[0], HEAR)
    finally:
        AttentionMaskInterface.register(IMPLEMENTATION, dense_mask)


def without(bits):
    """`Reuse.shared` that blocks nothing."""
    return lambda self, clip, _, original=Reuse.shared: original(self, clip, bits(clip))


def leaky(self, clip, bits, original=Reuse.kept):
    """Blocks all but one of the keys it should."""
    kept = original(self, clip, bits)
    return sorted({*kept.tolist(), int((((bits >> self.kinds[clip]) & 1) == 1).argmax())})


def early(self, layer, above, original=States.step):
    """Takes states for equal that are not: answer rows do not see that their question was cut."""
    return original(self, layer, States(above.runs, above.run[:1], above.of * 0) if above is not None else None)


def deaf(self, original=Decoding._plan):
    """Cuts are ignored from the second token on."""
    original(self)
    none = self.reuse.answer.signature * 0
    bits = self.reuse.answer.blocked[none[self.jobs, 0], 4]
    self.shared = [self.reuse.shared(self.reuse.clip[self.jobs], bits)] * len(self.layers)


def half_blocked(self, layer, rows, keys, original=Instruments.blocked):
    """One pair less than it should be."""
    blocked = original(self, layer, rows, keys)
    if blocked is not None and any(self.cuts):
        blocked = blocked.clone()
        blocked[:, :, -3] = False
    return blocked


def shifted(self, query, key, value, scaling, original=Packed.attend, by=1.01):
    """Reuse that is slightly off."""
    return original(self, query, key, value, scaling * by)


FAULTS = {
    "no cut in one pass": (Instruments, "blocked", lambda *_: None),
    "a row escapes in one pass": (Instruments, "blocked", half_blocked),
    "no cut with reuse": (Reuse, "shared", without(lambda clip: clip * 0)),
    "one key leaks with reuse": (Reuse, "kept", leaky),
    "wrong states are shared": (States, "step", early),
    "no cut in decoding": (Decoding, "_plan", deaf),
    "reuse is another attention": (Packed, "attend", shifted),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_catches(fresh, media, monkeypatch, fault):
    where, name, wrong = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(CutError):
        self_check(fresh, media[0], HEAR)
    assert fresh.passed is None


def test_catches_text_after_the_largest_position(fresh, media, monkeypatch):
    """Where the stock model has it is another place when the sound is short; no cut is needed to see it."""

    original = type(fresh).media_layout

    def largest(self, *sizes):
        layout = original(self, *sizes)
        return replace(layout, next_position=int(layout.positions.max()) + 1)

    (grids, *side), (frames,) = media[0].video.size, media[0].audio.size
    video = StreamFeatures(media[0].video.features.repeat(2, 1), (2 * grids, *side))  # whole chunks of two pairs of frames
    clip = Media(video, StreamFeatures(media[0].audio.features.repeat(2, 1), (2 * frames,)))
    heard = int((fresh.layout(clip).ids == fresh.audio_id).sum())
    clip = replace(clip, audio=replace(clip.audio, features=clip.audio.features[:heard]))
    self_check(fresh, clip, HEAR)
    monkeypatch.setattr(type(fresh), "media_layout", largest)
    monkeypatch.setattr(fresh, "_layouts", {})
    with pytest.raises(CutError, match="stock model's positions"):
        self_check(fresh, clip, HEAR)


def test_catches_a_layer_whose_attention_was_replaced(fresh, media, monkeypatch):
    """As a fused kernel would do it: everything right, but no cuts in one layer."""
    attention = fresh.text_model.layers[1].self_attn
    original = attention.forward

    def fused(*args, instruments=None, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", fused)
    with pytest.raises(CutError):
        self_check(fresh, media[0], HEAR)


def test_no_way_around(fresh, media, monkeypatch):
    """Every use of a cut on a model that has not passed runs the check; without cuts nothing is run."""
    suffix = fresh.suffix(HEAR, "This.")
    prefix = fresh.prefill(media)
    uses = {
        "prefill": lambda: fresh.prefill(media, [(Cut.at("video->audio", 0, 1),)] * 3),
        "extend": lambda: fresh.extend(prefix, [0], [suffix], [CUT]),
        "taps": lambda: fresh.extend(prefix, [0], [suffix], [CUT], hidden=True, flow=True),
        "logprobs": lambda: fresh.logprobs(prefix, [0], [suffix], [CUT]),
        "span_scores": lambda: fresh.span_scores(prefix, [0], [suffix], [CUT]),
        "generate": lambda: fresh.generate(prefix, [0], [HEAR], [CUT], 2),
        "forward": lambda: fresh.forward(fresh.batch([fresh.sequence(media[0], HEAR, "This.")]), [CUT]),
    }
    for name, use in uses.items():
        fresh.passed = None
        use()
        assert fresh.passed is not None, name
    fresh.passed = None
    fresh.extend(prefix, [0], [suffix], [()])
    fresh.generate(prefix, [0], [HEAR], None, 2)
    assert fresh.passed is None
    monkeypatch.setattr(Reuse, "kept", leaky)
    for name, use in uses.items():
        with pytest.raises(CutError):
            use()
            pytest.fail(name)


def test_new_modules_and_new_functions_are_checked_again(tiny_folder, media):
    model = load_model(tiny_folder)
    self_check(model, media[0], HEAR)
    before = model.passed
    model.add_lora(model.lora_targets([1], ["q_proj"]), r=2, alpha=4)
    assert model.instrument() != before
    model.extend(model.prefill(media[:1]), [0], [model.suffix(HEAR)], [CUT])
    assert model.passed == model.instrument() != before
    AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)
    try:
        with pytest.raises(CutError):
            model.extend(model.prefill(media[:1]), [0], [model.suffix(HEAR)], [CUT])
    finally:
        AttentionInterface.register(IMPLEMENTATION, instrumented_attention)


def test_needs_sound_and_picture(fresh, media):
    silent = Media(media[0].video, None)
    with pytest.raises(CutError, match="audio"):
        self_check(fresh, silent, HEAR)
    with pytest.raises(CutError, match="self_check"):
        fresh.extend(fresh.prefill([silent]), [0], [fresh.suffix(HEAR)], [CUT])
