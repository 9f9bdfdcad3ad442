"""Vision-language bases against the stock processor and model."""

import numpy as np
import pytest
import torch

from data.media import read_audio, read_video
from models import CutError, Kind, Media, ModelError, load_model
from models.attention import Cut
from tests.models.vl import build_vl

QUESTION, ANSWER = "What do you hear?", "I hear a dog barking."


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def base(request, tmp_path_factory):
    return load_model(build_vl(tmp_path_factory.mktemp(request.param) / "base", request.param))


def stock(base, frames, question, answer, video=True):
    """Ids and logits of the stock processor and the stock model."""
    parts = [*([{"type": "video"}] if video else []), {"type": "text", "text": question}]
    messages = [{"role": "system", "content": base.system_prompt}, {"role": "user", "content": parts}]
    text = base.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + answer + "<|im_end|>"
    taken = {"total_num_frames": len(frames), "fps": base.fps, "frames_indices": list(range(len(frames)))}
    given = {"videos": [torch.as_tensor(frames)], "do_sample_frames": False, "cap_pixels_per_frame": False, "video_metadata": [taken]}
    inputs = base.processor(text=[text], return_tensors="pt", **(given if video else {}))
    inputs.pop("video_metadata", None)
    base.thinker.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            return inputs["input_ids"][0], base.thinker(**inputs).logits[0]
    finally:
        base.thinker.set_attn_implementation({"text_config": "avbalance"})


@pytest.mark.parametrize("n", [8, 7, 2])  # an odd number of frames: the last one counts twice
def test_same_tokens_and_logits_as_the_stock_model(base, mp4s, n, monkeypatch):
    frames = np.concatenate([read_video(mp4s[0], base.fps)] * 4)[:n]
    ids, expected = stock(base, frames, QUESTION, ANSWER)
    media = Media(base.encode_video([frames])[0], None)
    suffix, layout = base.suffix(QUESTION, ANSWER), base.layout(media)
    assert torch.equal(torch.cat([layout.ids, suffix.ids]), ids)
    assert int((layout.kinds == Kind.VIDEO).sum()) >= int((layout.ids == base.video_id).sum()) > 0
    rows = expected[len(layout.ids) + suffix.first :][: len(suffix.targets)]
    # beside a shorter prompt, so that there is padding, and a few rows at a time, so that inner features are parted with their rows
    other = Media(base.encode_video([read_video(mp4s[1], base.fps)[:2]])[0], None)
    for block in (8192, 64 if n == 8 else 20):
        monkeypatch.setattr("models.avllm.block_rows", lambda *_, block=block: block)
        prefix = base.prefill([other, media])
        for hidden in (False, True):
            got = base.extend(prefix, [1, 0], [suffix, suffix], hidden=hidden).logits[0]
            torch.testing.assert_close(got, rows, atol=1e-4, rtol=0)
    assert (rows - stock(base, frames[::-1].copy(), QUESTION, ANSWER)[1][-len(rows) - 1 : -1]).abs().max() > 1e-3  # the picture matters


def test_inner_features_of_qwen3_matter(base, mp4s, monkeypatch):
    """That the comparison above would see it if they were lost."""
    if base.family == "qwen3_vl":
        media, suffix = Media(base.encode_video([read_video(mp4s[0], base.fps)])[0], None), base.suffix(QUESTION, ANSWER)
        whole = base.extend(base.prefill([media]), [0], [suffix]).logits
        monkeypatch.setattr(base, "deeper", lambda *_: {})
        assert (base.extend(base.prefill([media]), [0], [suffix]).logits - whole).abs().max() > 1e-2


def test_without_a_picture_it_is_the_language_model(base, mp4s):
    _, expected = stock(base, [], QUESTION, ANSWER, video=False)
    suffix = base.suffix(QUESTION, ANSWER)
    got = base.extend(base.prefill([Media(None, None)]), [0], [suffix]).logits[0]
    torch.testing.assert_close(got, expected[-len(suffix.targets) - 1 : -1], atol=1e-4, rtol=0)


def test_text_after_a_long_video_stands_where_the_stock_model_has_it(base):
    """For Qwen2.5-VL that is after the frames' sides, not after their times."""
    size = (12, 6, 6, 24)
    layout = base.media_layout(size, None)
    ids = torch.cat([layout.ids, base.suffix(QUESTION, ANSWER).ids])
    grid, types = torch.tensor([size[:3]]), (ids == base.video_id).int()[None] * 2
    given = {"second_per_grid_ts": torch.tensor([1.0])} if base.family == "qwen2_5_vl" else {}
    expected = base.thinker.model.get_rope_index(ids[None], mm_token_type_ids=types, video_grid_thw=grid, **given)[0][:, 0]
    text = torch.arange(len(ids) - len(layout.ids)).expand(3, -1) + layout.next_position
    assert torch.equal(torch.cat([layout.positions, text], 1), expected)
    if base.family == "qwen2_5_vl":
        assert layout.next_position <= int(layout.positions.max())


def test_it_hears_nothing_and_says_so(base, mp4s):
    with pytest.raises(ModelError, match=f"{base.family} model, which hears nothing"):
        base.encode_audio([read_audio(mp4s[0])])
    with pytest.raises(ModelError, match="hears nothing"):
        base.media_layout(None, (100,))
    media = Media(base.encode_video([read_video(mp4s[0], base.fps)])[0], None)
    with pytest.raises(CutError, match="self_check"):
        base.prefill([media], [(Cut.at("video->audio", 0, 1),)])
    if base.family == "qwen3_vl":
        with pytest.raises(ModelError, match="base of token shift"):
            base.batch([base.sequence(media, QUESTION, ANSWER)])
