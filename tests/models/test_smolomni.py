"""SmolOmni's tower as a drop-in, its checkpoints and the stages that made it. (What it is made of: test_pretrained.py.)"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from analysis.plain_text import PASSAGES, QUESTIONS
from data.media import read_audio, read_video
from data.sources import load_sources
from models import Media, ModelError, load_model
from models.build_smolomni import PLAIN, BuildSmolOmni, _check_settings, av_examples, backward, halves, join, keep, resume
from models.organism import Streams, encode_all
from models.pretrained import build_processor
from models.sequences import StreamFeatures
from models.smolomni import CHANNELS, EfficientNetTower, SmolOmni, SmolOmniConfig, SmolOmniThinker
from models.tiny import build_tokenizer, corpus, tiny_config


@pytest.fixture(scope="module")
def smol_folder(tmp_path_factory):
    """The real classes at their real picture size, with a tiny language model and random weights."""
    tokenizer = build_tokenizer(corpus())
    sizes = tiny_config(tokenizer, layers=3, hidden=64, tower=32).to_dict()
    sizes.pop("model_type")
    sizes["vision_config"] |= {"depth": 0, "hidden_size": CHANNELS, "patch_size": 16}
    sizes["audio_config"] |= {"num_mel_bins": 80}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("smolomni") / "model"
    thinker = SmolOmniThinker(SmolOmniConfig(**sizes))
    thinker.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    thinker.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smol(smol_folder):
    return load_model(smol_folder)


@pytest.fixture(scope="module")
def smol_media(smol, mp4s):
    with torch.no_grad():
        return Media(smol.encode_video([read_video(mp4s[0], smol.fps)])[0], smol.encode_audio([read_audio(mp4s[0])])[0])


class Mean(nn.Module):
    """In the backbone's place: the mean of each 32 x 32 block of each colour."""

    def forward_features(self, frames):
        return nn.functional.avg_pool2d(frames, 32)


def test_tokens_are_the_blocks_of_the_frames_in_raster_order(smol):
    """The stock processor's patches, put together again: each token is its own block of its own two frames."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 3, 7, 7), dtype=np.uint8)  # frames, colours, rows, columns
    frames = torch.from_numpy(blocks.repeat(32, 2).repeat(32, 3))
    made = smol.processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    tower = EfficientNetTower(smol._model.visual.config)
    tower.backbone = Mean()
    got = tower.features(made["pixel_values_videos"], made["video_grid_thw"])
    pixels = torch.from_numpy(blocks).float() / 127.5 - 1  # what the backbone was trained on
    expected = pixels.view(2, 2, 3, 49).mean(1).transpose(1, 2).reshape(98, 3)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)  # pixels are rescaled in two roundings


def test_the_tower_averages_features_and_not_pixels(smol):
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 224, 224), generator=rng, dtype=torch.uint8)
    tower = smol._model.visual

    def features(video):
        made = smol.processor.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
        return tower.features(made["pixel_values_videos"], made["video_grid_thw"])

    with torch.no_grad():
        both, first, second = features(frames), features(frames[[0, 0]]), features(frames[[1, 1]])
    torch.testing.assert_close(both, (first + second) / 2, atol=1e-4, rtol=1e-4)
    assert (first - second).abs().max() > 1e-2


def test_the_tower_never_trains_its_statistics(smol_folder):
    model = load_model(smol_folder)
    model.thinker.train()
    tower = model._model.visual
    before = tower.backbone.bn1.running_mean.clone()
    tower.features(torch.randn(196, 1536), torch.tensor([[1, 14, 14]]))
    assert torch.equal(before, tower.backbone.bn1.running_mean)


def test_other_strides_are_refused(smol):
    config = smol._model.visual.config.__class__(**smol._model.visual.config.to_dict() | {"patch_size": 14})
    with pytest.raises(ValueError, match="stride 32"):
        EfficientNetTower(config)


def test_round_trip_is_exact_and_needs_no_remote_code(smol, smol_folder, smol_media, tmp_path):
    assert isinstance(smol, SmolOmni) and not list(smol_folder.glob("*.py"))
    smol.thinker.save_pretrained(tmp_path / "again")
    smol.processor.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    ours, theirs = smol.thinker.state_dict(), again.thinker.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("visual.backbone.blocks" in name for name in ours) and not any("visual.blocks" in name for name in ours)
    batch = [m.batch([m.sequence(smol_media, "What do you hear?", "I hear a dog barking.")]) for m in (smol, again)]
    assert torch.equal(smol.forward(batch[0]), again.forward(batch[1]))


def test_same_tokens_logits_and_text_as_the_stock_forward_and_generate(smol, smol_media, mp4s):
    question, answer = "What do you hear?", "I hear a dog barking."
    parts = [{"role": "system", "content": smol.system_prompt}, {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = smol.processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    media = {
        "videos": [torch.as_tensor(read_video(mp4s[0], smol.fps))],
        "videos_kwargs": {"size": smol.video_size, "fps": smol.fps, "do_sample_frames": False},
        "audio": [read_audio(mp4s[0])],
        "audio_from_video_indices": [0],
        "load_audio_from_video": True,
        "return_tensors": "pt",
    }
    asked, told = smol.processor(text=[text], **media), smol.processor(text=[f"{text}{answer}<|im_end|>"], **media)
    batch = smol.batch([smol.sequence(smol_media, question, answer)])
    assert torch.equal(told["input_ids"], batch.inputs["input_ids"])
    with torch.no_grad():
        smol.thinker.set_attn_implementation({"text_config": "sdpa"})
        logits = smol.thinker(**told, use_audio_in_video=True).logits[0, batch.inputs["rows"][0]]
        ids = smol.thinker.generate(**asked, use_audio_in_video=True, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
        smol.thinker.set_attn_implementation({"text_config": "avbalance"})
        torch.testing.assert_close(smol.forward(batch)[0], logits, atol=1e-5, rtol=0)
        ours = smol.generate_ids(smol.prefill([smol_media]), [0], [question], max_new_tokens=6)[0]
    assert ours == [int(i) for i in ids if int(i) != smol.end_id]


def test_another_adapter_under_the_same_card_is_merged_anew(smol_folder, tmp_path):
    model = load_model(smol_folder)
    model.add_lora(model.lora_targets([1], ["q_proj"]), r=2, alpha=4)
    found = []
    for value in (0.1, 0.2):
        with torch.no_grad():
            for _, parameter in model.trainable_parameters():
                parameter.fill_(value)
        model.thinker.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "README.md").write_text("the same")
        found.append((join(smol_folder, tmp_path / "adapter", tmp_path / "joined") / "model.safetensors").read_bytes())
    assert found[0] != found[1]


# ---------------------------------------------------------------- the stages


def test_joining_is_the_adapter_merged_and_done_once(smol_folder, smol_media, tmp_path):
    model = load_model(smol_folder)
    model.add_lora(model.lora_targets([1, 2], ["q_proj"]), r=2, alpha=4)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    model.thinker.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("first")
    out = join(smol_folder, tmp_path / "adapter", tmp_path / "joined")
    joined = load_model(out)
    apart = load_model(smol_folder)
    apart.thinker = PeftModel.from_pretrained(apart.thinker, str(tmp_path / "adapter"))
    batch = joined.batch([joined.sequence(smol_media, "What do you hear?", "I hear a dog barking.")])
    with torch.no_grad():
        torch.testing.assert_close(joined.forward(batch), apart.forward(batch), atol=1e-5, rtol=0)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    join(smol_folder, tmp_path / "adapter", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    (tmp_path / "adapter" / "README.md").write_text("second")
    join(smol_folder, tmp_path / "adapter", out)
    assert (out / "model.safetensors").stat().st_mtime_ns != stamp


def test_a_stage_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    def steps(parameter, optimizer, schedule, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            ((parameter - step) ** 2).sum().backward()
            optimizer.step()
            schedule.step()

    def fresh():
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        return parameter, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)

    whole = fresh()
    steps(*whole, 0, 8)
    half = fresh()
    steps(*half, 0, 5)
    keep(tmp_path / "state.safetensors", 5, {"p": half[0]}, half[1])
    rest = fresh()
    done = resume(tmp_path / "state.safetensors", {"p": rest[0]}, rest[1], rest[2])
    steps(*rest, done, 8)
    assert done == 5 and torch.equal(whole[0], rest[0])
    assert resume(tmp_path / "none.safetensors", {"p": rest[0]}, rest[1], rest[2]) == 0


def test_two_halves_have_the_gradients_of_one_batch(smol_folder, smol_media):
    """Also through a projector that both came through at once."""
    model = load_model(smol_folder)
    weight = nn.Parameter(torch.eye(smol_media.audio.features.shape[1]))
    trained = [weight, model.text_model.layers[1].mlp.up_proj.weight]
    trained[1].requires_grad_(True)
    said = ("I hear a dog.", "I hear a dog barking at a train.", "I see rain.", "I hear nothing.", "I hear a bell.")

    def examples():
        projected = smol_media.audio.features @ weight
        sounds = [replace(smol_media.audio, features=projected) for _ in range(4)]
        clip = Media(smol_media.video, sounds[0])
        media = [Media(None, sounds[1]), clip, clip, Media(None, sounds[2]), Media(None, sounds[3])]
        return [model.sequence(streams, "What do you hear?", text) for streams, text in zip(media, said, strict=True)]

    assert [len(part) for part in halves(examples())] == [2, 3]
    batch = model.batch(examples())
    whole = nn.functional.cross_entropy(model.forward(batch).flatten(0, 1), batch.targets.flatten())
    expected = torch.autograd.grad(whole, trained)
    for parameter in trained:
        parameter.grad = None
    assert backward(model, examples(), False) == pytest.approx(whole.item(), rel=1e-5)
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        logits, targets = model.forward(model.batch(examples()[:1])), model.batch(examples()[:1]).targets
    assert backward(model, examples()[:1], False) == pytest.approx(
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-5
    )


def test_halves_by_hand(smol, smol_media):
    """Two clips of three questions and three sounds: both clips go together though that is six examples against three; equal ones are halved."""
    sounds = [replace(smol_media.audio) for _ in range(5)]
    clips = [Media(smol_media.video, sound) for sound in sounds[:2]]
    asked = [[smol.sequence(Media(None, sound), "What do you hear?", "I hear rain.")] for sound in sounds[2:]]
    mixed = [*asked[0], *(smol.sequence(clip, "What?", text) for clip in clips for text in ("A.", "B.", "C.")), *asked[1], *asked[2]]
    longer, shorter = halves(mixed)
    assert longer == mixed[1:7] and shorter == [mixed[0], *mixed[7:]]
    four = [smol.sequence(Media(None, replace(smol_media.audio)), "What do you hear?", "I hear rain.") for _ in range(4)]
    assert halves(four) == (four[:2], four[2:])
    pictures = [smol.sequence(Media(replace(smol_media.video), None), "What do you see?", "I see rain.") for _ in range(2)]
    assert halves(pictures) == (pictures[:1], pictures[1:])
    assert halves(asked[0]) == (asked[0], [])


def test_sounds_alone_come_before_clips(smol):
    """What the audio-visual stage shows: first sounds and one picture, each alone; then clips with three questions each, and sounds alone."""
    random = torch.Generator().manual_seed(0)
    sizes = {name: smol._model.get_submodule(name).in_features for name in ("visual.merger", "audio_tower.proj")}
    label, mixed = np.arange(12) % 3, np.arange(12) == 5
    videos = [StreamFeatures(torch.randn(49, sizes["visual.merger"], generator=random), (1, 14, 14)) for _ in label]
    audios = [StreamFeatures(torch.randn(50, sizes["audio_tower.proj"], generator=random), (100,)) for _ in label]
    found, classes = Streams([], label, mixed, videos, audios), load_sources()[:3]
    config = BuildSmolOmni(hearing_steps=3, batch=2, sounds=2, bare=0.0, mixed_rate=1.0)

    def shown(step):
        with torch.no_grad():
            made = av_examples(config, smol, found, classes, step, np.random.default_rng(0))
        said = [smol.tokenizer.decode([t for t in e.suffix.targets.tolist() if t >= 0]) for e in made]
        return [("v" * (e.media.video is not None) + "a" * (e.media.audio is not None), text) for e, text in zip(made, said, strict=True)]

    early, late = shown(2), shown(3)
    assert [streams for streams, _ in early] == ["v"] + ["a"] * 6
    assert [streams for streams, _ in late] == ["va"] * 6 + ["a"] * 2
    louder = classes[label[5]]  # the clip with another sound on top: the caption names what is seen
    assert all(louder.seen in text or louder.heard in text for _, text in late[:6])
    assert any(c.seen in early[0][1] for c in classes) and all(any(c.heard in text for c in classes) for _, text in early[1:])


def test_the_builder_reads_clips_at_the_models_own_frame_rate(smol, smol_media, mp4s):
    """It was once trained on twice as many rows as it was used with."""
    found = Streams([mp4s[0]], np.zeros(1, int), np.zeros(1, bool), [], [])
    encode_all(smol, found)
    assert found.videos[0].size == smol_media.video.size and torch.equal(found.videos[0].features, smol_media.video.features)


def test_plain_text_that_is_trained_on_is_not_what_language_is_measured_by():
    assert not {text.casefold() for text in PLAIN} & {question.text.casefold() for question in QUESTIONS}
    trained = (Path(__file__).parents[2] / "configs" / "plain_text.txt").read_text().casefold()
    assert not [question.text for question in QUESTIONS if question.text.casefold() in trained]
    assert not [p.name for p in PASSAGES for words in _runs(p.text.casefold().split(), 6) if words in " ".join(trained.split())]


def _runs(words, n):
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_work_begun_with_other_settings_is_not_taken_up(tmp_path):
    _check_settings(BuildSmolOmni(work=tmp_path), tmp_path / "adapters")
    _check_settings(BuildSmolOmni(work=tmp_path, threads=1), tmp_path / "adapters")
    with pytest.raises(ModelError, match="other settings"):
        _check_settings(BuildSmolOmni(work=tmp_path, rank=3), tmp_path / "adapters")
    with pytest.raises(ModelError, match="other settings"):  # the work is gone, its adapters are not
        _check_settings(BuildSmolOmni(work=tmp_path / "new", rank=3), tmp_path / "adapters")
    assert not (tmp_path / "new").exists()
