"""Our inputs against the stock processor, model and generate; loading; adapters."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from data.media import read_audio, read_video
from models import Kind, Media, ModelError, load_model
from models.load import attach_adapter
from models.sequences import StreamFeatures
from models.tiny import build_tiny

ANSWER = "I hear a dog barking."


def stock_inputs(tiny, path, question, answer="", video=True, audio=True):
    parts = [{"type": "video"}] if video else [{"type": "audio"}]
    text = tiny.processor.apply_chat_template(
        [{"role": "system", "content": tiny.system_prompt}, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    media = {}
    if video:
        media |= {
            "videos": [torch.as_tensor(read_video(path, tiny.fps))],
            "videos_kwargs": {"size": tiny.video_size, "fps": tiny.fps, "do_sample_frames": False},
        }
    if audio:
        media |= {"audio": [read_audio(path)]}
    if video and audio:
        media |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    return tiny.processor(text=[text + answer], return_tensors="pt", **media)


@pytest.mark.parametrize(("video", "audio"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("clip", [0, 1])
def test_same_tokens_and_logits_as_the_stock_model(tiny, mp4s, media, video, audio, clip):
    question = "What do you hear?"
    stock = stock_inputs(tiny, mp4s[clip], question, f"{ANSWER}<|im_end|>", video, audio)
    ours = Media(media[clip].video if video else None, media[clip].audio if audio else None)
    batch = tiny.batch([tiny.sequence(ours, question, ANSWER)])
    assert torch.equal(stock["input_ids"], batch.inputs["input_ids"])
    with torch.no_grad():
        # transformers does not know "avbalance" as a name on disk: the stock attention is what a user would run
        tiny.thinker.set_attn_implementation({"text_config": "sdpa"})
        expected = tiny.thinker(**stock, use_audio_in_video=video and audio).logits
        tiny.thinker.set_attn_implementation({"text_config": "avbalance"})
        got = tiny.forward(batch)
    torch.testing.assert_close(got[0], expected[0, batch.inputs["rows"][0]], atol=1e-5, rtol=0)


def test_same_text_as_stock_generate(tiny, mp4s, media):
    stock = stock_inputs(tiny, mp4s[0], "What do you hear?")
    tiny.thinker.set_attn_implementation({"text_config": "sdpa"})
    ids = tiny.thinker.generate(**stock, use_audio_in_video=True, max_new_tokens=6, do_sample=False)[0, stock["input_ids"].shape[1] :]
    tiny.thinker.set_attn_implementation({"text_config": "avbalance"})
    prefix = tiny.prefill(media)
    ours = tiny.generate_ids(prefix, [2, 0], ["Which sound can be heard?", "What do you hear?"], max_new_tokens=6)[1]
    assert ours == [int(i) for i in ids if int(i) != tiny.end_id]


def test_kinds_are_a_total_partition(tiny, media):
    batch = tiny.batch([tiny.sequence(media[0], "What do you hear?", ANSWER, "a dog barking")])
    tokens = [tiny.tokenizer.decode([i]) for i in batch.inputs["input_ids"][0].tolist()]
    kinds = batch.kinds[0].tolist()
    start = tokens.index("<|vision_bos|>")
    assert set(kinds[:start]) == {Kind.SYSTEM}
    for token, kind in zip(tokens, kinds, strict=True):
        if token in ("<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"):
            assert kind == Kind.VIDEO
        if token in ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"):
            assert kind == Kind.AUDIO
    # after the media: question rows, the emitters of "I hear a dog barking.<|im_end|>", and the end mark
    tail = kinds[len(tokens) - 1 - tokens[::-1].index("<|vision_eos|>") + 1 :]
    answer = tiny.tokenizer(ANSWER)["input_ids"]
    assert tail[-1] == Kind.QUESTION and tail[-len(answer) - 2 : -1] == [Kind.EMITTER] * (len(answer) + 1)
    assert set(tail[: -len(answer) - 2]) == {Kind.QUESTION}


def test_span_is_the_label_and_scores_by_hand(tiny, media):
    prefix = tiny.prefill(media[:1])
    out = tiny.extend(prefix, [0], [tiny.suffix("What do you hear?", ANSWER, "a dog barking")])
    words = [tiny.tokenizer.decode([t]) for t, s in zip(out.targets[0].tolist(), out.span[0].tolist(), strict=True) if s]
    assert "".join(words) == " a dog barking"
    logp = torch.log_softmax(out.logits[0], -1)
    by_hand = np.mean([float(logp[a, t]) for a, t in enumerate(out.targets[0].tolist()) if out.span[0, a]])
    assert float(out.span_score()[0]) == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(ModelError, match="not in the answer"):
        tiny.suffix("q", ANSWER, "a cat")


def test_padding_does_not_change_a_row(tiny, media):
    alone = tiny.forward(tiny.batch([tiny.sequence(media[0], "What do you hear?", ANSWER)]))
    padded = tiny.forward(
        tiny.batch(
            [
                tiny.sequence(media[1], "Describe the video and its sound.", "I see a cat and I hear a cat meowing."),
                tiny.sequence(media[0], "What do you hear?", ANSWER),
            ]
        )
    )
    torch.testing.assert_close(padded[1, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def sized(model, video, frames):
    """Media of these sizes with random features: picture (t, h, w) in patches, sound in mel frames."""
    generator = torch.Generator().manual_seed(frames)
    sizes = Media(StreamFeatures(torch.empty(0), video), StreamFeatures(torch.empty(0), (frames,)))
    ids = model.layout(sizes).ids
    rows = [int((ids == token).sum()) for token in (model.video_id, model.audio_id)]
    features = [torch.randn(n, model.hidden_size, generator=generator) for n in rows]
    return Media(StreamFeatures(features[0], video), StreamFeatures(features[1], (frames,)))


def stock_index(model, ids, video, frames):
    """The stock model's positions of a whole prompt (3, T), asked for without anything of ours."""
    grid = model.processor.video_processor.temporal_patch_size / model.fps
    return model.thinker.get_rope_index(
        ids[None],
        video_grid_thw=torch.tensor([video]),
        attention_mask=torch.ones_like(ids[None]),
        use_audio_in_video=True,
        audio_seqlens=torch.tensor([frames]),
        second_per_grids=torch.tensor([grid]),
    )[0][:, 0]


@pytest.mark.parametrize("fps", [2.0, 1.0])  # Qwen2.5-Omni's and SmolOmni's
def test_text_stands_where_the_stock_model_has_it_for_streams_of_any_length(tiny, monkeypatch, fps):
    monkeypatch.setattr(tiny, "fps", fps)
    monkeypatch.setattr(tiny, "_layouts", {})
    rng, moved = np.random.default_rng(0), 0
    for _ in range(100):
        video, frames = (int(rng.integers(1, 12)), 6, 6), int(rng.integers(8, 1200))
        media = sized(tiny, video, frames)
        examples = [tiny.sequence(media, q, ANSWER) for q in ("What do you hear?", "Which sound can be heard?")]
        batch = tiny.batch(examples[:1])
        expected = stock_index(tiny, batch.inputs["input_ids"][0], video, frames)
        assert torch.equal(batch.inputs["position_ids"][:, 0], expected), (video, frames)
        layout = tiny.layout(media)
        text = expected[:, len(layout.ids) :]
        shared = tiny.batch(examples).inputs["position_ids"][:, 0, len(layout.ids) :]
        assert torch.equal(shared[:, : text.shape[1]], text) and torch.equal(shared[:, text.shape[1]], text[:, 0])
        moved += int(layout.next_position != int(layout.positions.max()) + 1)
    assert moved >= 5 or fps == 1.0  # such lengths are among them; with one pair of frames a chunk there are none


@pytest.mark.parametrize("frames", [820, 1000])  # 8.2 s of sound under 10 s of picture: it ends in the last chunk before the chunk's last pair
def test_logits_after_a_short_sound_are_the_stock_models(tiny, frames):
    """In one pass, on a prefix, and in decoding."""
    media = sized(tiny, (10, 6, 6), frames)
    question = "What do you hear?"
    batch = tiny.batch([tiny.sequence(media, question, ANSWER)])
    ids, text = batch.inputs["input_ids"], tiny.text_model
    embeds = text.embed_tokens(ids).masked_scatter(batch.inputs["media_mask"][..., None], batch.inputs["features"])
    positions = stock_index(tiny, ids[0], (10, 6, 6), frames)[:, None]
    with torch.no_grad():
        text.set_attn_implementation("sdpa")
        expected = tiny.head(text(inputs_embeds=embeds, position_ids=positions).last_hidden_state)[0, batch.inputs["rows"][0]]
        text.set_attn_implementation("avbalance")
        prefix = tiny.prefill([media])
        assert prefix.next_position.tolist() == [int(positions[0, 0, len(tiny.layout(media).ids)])]
        torch.testing.assert_close(tiny.forward(batch)[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(tiny.extend(prefix, [0], [tiny.suffix(question, ANSWER)]).logits[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(tiny.extend(prefix, [0], [tiny.suffix(question, ANSWER)], hidden=True).logits[0], expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- loading


def test_loading_refuses_what_is_no_model(tmp_path, tiny_folder):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="no such model"):
        load_model(tmp_path / "nowhere" / "at" / "all")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="families"):
        load_model(other)


def test_loading_refuses_incomplete_weights(tmp_path, tiny_folder):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    dropped = next(k for k in weights if "layers.1.self_attn.q_proj.weight" in k)
    save_file({k: v for k, v in weights.items() if k != dropped}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="missing"):
        load_model(folder)
    data = (tiny_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


# ---------------------------------------------------------------- LoRA


def with_lora(folder, seed=0):
    model = load_model(folder)
    model.add_lora(model.lora_targets([1, 2], ["q_proj", "v_proj"]), r=2, alpha=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_lora_targets_are_in_the_decoder_only(tiny_folder):
    model = with_lora(tiny_folder)
    names = [name for name, _ in model.trainable_parameters()]
    assert len(names) == 2 * 2 * 2 and all("language_model.layers.1." in n or "language_model.layers.2." in n for n in names)
    with pytest.raises(ModelError, match="layers 0 to 2"):
        model.lora_targets([3], ["q_proj"])
    with pytest.raises(ModelError, match="projections"):
        model.lora_targets([0], ["qkv"])


def test_adapter_round_trip_and_stock_peft(tmp_path, tiny_folder, mp4s, media):
    model = with_lora(tiny_folder)
    batch = model.batch([model.sequence(media[0], "What do you hear?", ANSWER)])
    with torch.no_grad():
        on = model.forward(batch)
        with model.adapter_off():
            off = model.forward(batch)
        assert (on - off).abs().max() > 1e-3
        model.save_adapter(tmp_path / "adapter")
        again = load_model(tiny_folder, adapter=tmp_path / "adapter")
        assert torch.equal(again.forward(batch), on)
        stock = PeftModel.from_pretrained(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny_folder), str(tmp_path / "adapter"))
        logits = stock(**stock_inputs(model, mp4s[0], "What do you hear?", f"{ANSWER}<|im_end|>"), use_audio_in_video=True).logits
    torch.testing.assert_close(logits[0, batch.inputs["rows"][0]], on[0], atol=1e-5, rtol=0)


def test_adapter_of_another_model_is_refused(tmp_path, tiny_folder):
    model = with_lora(tiny_folder)
    model.save_adapter(tmp_path / "adapter")
    wider = build_tiny(tmp_path / "wider", layers=3, hidden=128)
    with pytest.raises(ModelError, match="another model"):
        load_model(wider, adapter=tmp_path / "adapter")
    shallow = build_tiny(tmp_path / "shallow", layers=2, hidden=64)
    with pytest.raises(ModelError, match="another model"):
        attach_adapter(load_model(shallow), tmp_path / "adapter")
    with pytest.raises(ModelError, match="no adapter"):
        load_model(tiny_folder, adapter=tmp_path)


def test_features_do_not_depend_on_who_else_is_encoded(tiny, mp4s):
    """To the last bit: what a run trains on must not depend on what was measured before, in which company."""
    waves, videos = [read_audio(p) for p in mp4s], [read_video(p, tiny.fps) for p in mp4s]
    with torch.no_grad():
        for encode, streams in ((tiny.encode_audio, waves), (tiny.encode_video, videos)):
            for alone, together in zip((encode([s])[0] for s in streams), encode(streams), strict=True):
                assert torch.equal(alone.features, together.features) and alone.size == together.size
