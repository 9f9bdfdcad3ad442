"""Features are kept by all that decides them, whichever clip was read first; frames are made small as they are read."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clips import Clip, DataError
from data.media import MediaError, mux, read_video, stream_hashes, write_mp4
from models import ModelError, load_model


def clip(root: Path, name: str, condition: str = "factual") -> Clip:
    label = "" if condition == "muted" else "dog"
    hashes = stream_hashes(root / f"{name}.mp4")
    return Clip(name, f"{name}.mp4", "test", condition, "dog", label, "a dog", label, name, name, name, name, *hashes, 2.0)  # type: ignore[arg-type]


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 84, 84, 3), dtype=np.uint8)


def test_muted_clips_have_silence_of_their_own_length(tiny_folder, tmp_path: Path) -> None:
    for name, frames in (("short", 8), ("long", 32)):
        write_mp4(tmp_path / f"{name}.mp4", noise(frames), 4, None)
    clips = [clip(tmp_path, name, "muted") for name in ("short", "long")]
    for order in (clips, clips[::-1]):
        model = load_model(tiny_folder)
        tokens = {c.id: model.media(c, tmp_path).audio.features.shape[0] for c in order}
        assert tokens == {"short": 50, "long": 200}  # 25 a second


def test_a_silent_sound_is_refused_after_a_muted_clip_had_it(tiny_folder, tmp_path: Path) -> None:
    write_mp4(tmp_path / "silent.mp4", noise(8), 4, np.zeros(32_000, np.float32))
    muted, factual = clip(tmp_path, "silent", "muted"), clip(tmp_path, "silent")
    model = load_model(tiny_folder)
    model.media(muted, tmp_path)
    for ask in (lambda: model.media(factual, tmp_path), lambda: model.precompute([muted, factual], tmp_path, progress=False)):
        with pytest.raises(DataError, match=r"silent\.mp4 has a silent sound track"):
            ask()


def test_hashes_of_another_file_are_refused(tiny_folder, tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", noise(8), 4, np.sin(np.arange(32_000) / 5).astype(np.float32))
    right = clip(tmp_path, "x")
    model = load_model(tiny_folder)
    for wrong in (replace(right, video_sha256="0" * 64), replace(right, audio_sha256="0" * 64)):
        with pytest.raises(MediaError, match=r"x\.mp4 is not the file of the hashes in clips\.jsonl: .* build the folder again"):
            model.media(wrong, tmp_path)
    assert model.media(right, tmp_path).audio is not None


def test_sound_without_samples(tiny_folder, tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", noise(8), 4, np.ones(100, np.float32) * 0.5)
    with pytest.raises((ModelError, MediaError), match=r"x\.mp4"):
        load_model(tiny_folder).media(clip(tmp_path, "x"), tmp_path)


@pytest.mark.parametrize("size", [(84, 84), (168, 168), (360, 640), (50, 30)])
def test_frames_made_small_as_they_are_read_are_those_of_the_processor(tiny, tmp_path: Path, size: tuple[int, int]) -> None:
    """Equal, not near: it is the processor's own resizing, frame by frame."""
    frames = np.random.default_rng(0).integers(0, 256, (8, *size, 3), dtype=np.uint8)
    write_mp4(tmp_path / "x.mp4", frames, 4, None)
    full, small = read_video(tmp_path / "x.mp4", tiny.fps), read_video(tmp_path / "x.mp4", tiny.fps, tiny.resize)
    with torch.no_grad():
        (one,), (two,) = tiny.encode_video([full]), tiny.encode_video([small], resized=True)
    assert one.size == two.size and torch.equal(one.features, two.features)
    assert small.shape[2] * small.shape[3] <= 84 * 84 * 1.5


def test_features_do_not_depend_on_what_else_is_read(tiny_folder, tmp_path: Path) -> None:
    for i in range(3):
        write_mp4(tmp_path / f"{i}.mp4", noise(8, i), 4, np.sin(np.arange(32_000) / (5 + i)).astype(np.float32))
    clips = [clip(tmp_path, str(i)) for i in range(3)]
    one, two = load_model(tiny_folder), load_model(tiny_folder)
    one.precompute(clips, tmp_path, progress=False)
    for c in reversed(clips):
        two.media(c, tmp_path)
    for c in clips:
        for a, b in zip(
            (one.media(c, tmp_path).video, one.media(c, tmp_path).audio), (two.media(c, tmp_path).video, two.media(c, tmp_path).audio), strict=True
        ):
            assert torch.equal(a.features, b.features)
    mux(tmp_path / "0.mp4", tmp_path / "1.mp4", tmp_path / "swap.mp4")
    swap = one.media(clip(tmp_path, "swap"), tmp_path)
    assert swap.video is one.media(clips[0], tmp_path).video and swap.audio is one.media(clips[1], tmp_path).audio


@pytest.mark.parametrize("seconds", [3, 10])
def test_pictures_and_sound_run_beside_each_other(tiny_folder, tmp_path: Path, seconds: int) -> None:
    """25 positions a second for both, whatever the rate at which pictures are sampled."""
    write_mp4(tmp_path / "x.mp4", noise(4 * seconds), 4, np.sin(np.arange(16_000 * seconds) / 5).astype(np.float32))
    model = load_model(tiny_folder)
    layout = model.layout(model.media(clip(tmp_path, "x"), tmp_path))
    sound, picture = (layout.positions[0][layout.ids == token] for token in (model.audio_id, model.video_id))
    assert len(sound) == int(sound.max() - sound.min()) + 1 == 25 * seconds
    assert int(picture.max() - picture.min()) + 1 == pytest.approx(25 * seconds, abs=30)  # its last pair begins a second before the end


def sounding(root: Path, *names: str) -> list[Clip]:
    """Clips with pictures and a tone, each with its own."""
    for i, name in enumerate(names):
        write_mp4(root / f"{name}.mp4", noise(8, i), 4, np.sin(np.arange(32_000) / (5 + i)).astype(np.float32))
    return [clip(root, name) for name in names]


def test_a_broken_file_is_named_though_others_have_its_streams(tiny_folder, tmp_path: Path) -> None:
    clips = sounding(tmp_path, "a", "b")
    for name in ("cut", "gone", "other", "whole"):
        mux(tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / f"{name}.mp4")
        clips.append(clip(tmp_path, name))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-500])
    (tmp_path / "gone.mp4").unlink()
    shutil.copy(tmp_path / "b.mp4", tmp_path / "other.mp4")  # its sound is right, its pictures are not
    model, done = load_model(tiny_folder), []
    bad = {c.id: reason for c, reason in model.unusable([(c, True, True) for c in clips], tmp_path, lambda: done.append(1))}
    assert list(bad) == ["cut", "gone", "other"] and len(done) == len(clips)
    assert "truncated" in bad["cut"] and "does not exist" in bad["gone"] and "not the file of the hashes" in bad["other"]
    assert not model.unusable([(clips[4], False, True)], tmp_path)  # its pictures are not wanted


def test_done_is_told_once_a_clip_also_where_streams_are_read_again(tiny_folder, tmp_path: Path) -> None:
    clips = sounding(tmp_path, "a", "b")
    mux(tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "swap.mp4")
    clips.append(clip(tmp_path, "swap"))
    (tmp_path / "a.mp4").write_bytes(b"")  # so that its pictures are read from the swap, in a second round
    model, done = load_model(tiny_folder), []
    assert [c.id for c, _ in model.unusable([(c, True, True) for c in clips], tmp_path, lambda: done.append(1))] == ["a"]
    assert len(done) == 3 and model.media(clips[2], tmp_path).video is not None


FAULTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("hook", ["encode_video", "encode_audio", "resize"])
@pytest.mark.parametrize("fault", FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_what_the_device_reports_is_not_blamed_on_clips(tiny_folder, tmp_path: Path, monkeypatch, hook: str, fault: Exception) -> None:
    """No such device is here, so the fault is raised by hand where the device would raise it."""

    def fail(*_: object, **__: object) -> None:
        raise fault

    clips, model = sounding(tmp_path, "a"), load_model(tiny_folder)
    monkeypatch.setattr(model, hook, fail)
    with pytest.raises(type(fault)) as stopped:
        model.precompute(clips, tmp_path, progress=False)
    assert stopped.value is fault


def test_pictures_that_cannot_be_made_small_are_no_broken_file(tiny_folder, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    clips, model = sounding(tmp_path, "a"), load_model(tiny_folder)
    monkeypatch.setattr(model, "resize", fail)
    [(_, reason)] = model.unusable([(clips[0], True, True)], tmp_path)
    assert reason == (
        "a.mp4: this model cannot take pictures of its size (absolute aspect ratio must be smaller than 200). Scale it, or leave this one out."
    )
