"""Renderings: the same for the same seed, different for another, and always with the class in them."""

import numpy as np
import pytest

from data.render import DEFAULTS, NEAR_BLACK, NEAR_SILENT_DB, RenderSettings, render, render_frames, render_nothing, render_wave
from data.sources import load_sources

CLASSES = {c.name: c for c in load_sources()}
RATE = 16_000


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))


def test_shapes_and_determinism() -> None:
    dog = CLASSES["dog"]
    frames, wave = render(dog.pictures[0].path, dog.sounds[0].path, 7)
    assert frames.shape == (8, 168, 168, 3) and frames.dtype == np.uint8
    assert wave.shape == (32_000,) and wave.dtype == np.float32 and np.abs(wave).max() <= 1
    again = render(dog.pictures[0].path, dog.sounds[0].path, 7)
    assert np.array_equal(frames, again[0]) and np.array_equal(wave, again[1])
    other = render(dog.pictures[0].path, dog.sounds[0].path, 8)
    assert (frames != other[0]).mean() > 0.5 and (wave != other[1]).mean() > 0.5
    # Either stream alone is the same as with the other.
    assert np.array_equal(frames, render_frames(dog.pictures[0].path, 7)) and np.array_equal(wave, render_wave(dog.sounds[0].path, 7))


def test_settings() -> None:
    settings = RenderSettings(size=64, fps=2.0, seconds=3.0)
    frames, wave = render(CLASSES["bell"].pictures[0].path, CLASSES["bell"].sounds[0].path, 1, settings)
    assert frames.shape == (6, 64, 64, 3) and wave.shape == (48_000,)


def test_nothing_is_dark_and_quiet_noise_of_many_kinds() -> None:
    made = [render_nothing(seed, RenderSettings(size=64, seconds=1.0)) for seed in range(30)]
    levels = [20 * np.log10(rms(wave)) for _, wave in made]
    assert min(levels) >= NEAR_SILENT_DB[0] - 0.01 and max(levels) <= NEAR_SILENT_DB[1] + 0.01 and max(levels) - min(levels) > 10
    brightest = {int(frames.max()) for frames, _ in made}
    assert max(brightest) == NEAR_BLACK and min(brightest) < 6 and all(frames.min() == 0 for frames, _ in made)
    assert made[0][0].shape == (4, 64, 64, 3) and made[0][0].dtype == np.uint8 and made[0][1].shape == (16_000,) and made[0][1].dtype == np.float32
    again = render_nothing(0, RenderSettings(size=64, seconds=1.0))
    assert np.array_equal(again[0], made[0][0]) and np.array_equal(again[1], made[0][1])
    assert not np.array_equal(made[1][0][0], made[1][0][1])  # it flickers


def test_picture_moves_on_a_still_background() -> None:
    moved = 0
    for seed in range(10):
        frames = render_frames(CLASSES["car"].train_pictures[0].path, seed).astype(int)
        change = np.abs(np.diff(frames, axis=0)).max(-1)
        assert (change > 40).any()
        still = (frames == frames[0]).all(axis=(0, 3))
        moved += still.mean() > 0.05
    assert moved >= 8  # some of the background is never covered


def test_drawings_have_no_box_around_them() -> None:
    """Alpha is respected: where a drawing is transparent the frame is as if another drawing, transparent there too, had been pasted."""
    for seed in range(5):
        settings = RenderSettings(size=96)
        a = render_frames(CLASSES["bell"].train_pictures[0].path, seed, settings)
        b = render_frames(CLASSES["footsteps"].train_pictures[0].path, seed, settings)
        assert (a == b).all(-1).mean() > 0.1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_recording_can_be_heard(name: str) -> None:
    for sound in CLASSES[name].sounds:
        for seed in range(4):
            wave = render_wave(sound.path, seed, snr_db=None)
            assert rms(wave) > 0.004, (sound.id, seed)
            # At least a fifth of a second of it is above a tenth of its own peak.
            assert (np.abs(wave) > 0.1 * np.abs(wave).max()).sum() > 0.02 * RATE, (sound.id, seed)


def test_noise_level_is_the_one_asked_for() -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(6 * RATE) / RATE)).astype(np.float32)
    for seed in range(6):
        clean = render_wave(tone, seed, snr_db=None)
        noisy = render_wave(tone, seed, snr_db=(10.0, 10.0))
        assert 20 * np.log10(rms(clean) / rms(noisy - clean)) == pytest.approx(10.0, abs=0.1)


def test_gain_and_speed_stay_in_bounds() -> None:
    tone = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(6 * RATE) / RATE)).astype(np.float32)
    speeds, gains = [], []
    for seed in range(30):
        wave = render_wave(tone, seed, snr_db=None)
        speeds.append(np.abs(np.fft.rfft(wave)).argmax() / DEFAULTS.seconds / 1000)
        gains.append(20 * np.log10(np.abs(wave).max() / 0.5))
    assert 0.939 < min(speeds) < 0.97 and 1.03 < max(speeds) < 1.061
    assert -12.1 < min(gains) < -9 and -3 < max(gains) < 0.1


def test_short_sound_is_repeated_with_gaps_and_long_one_cut() -> None:
    short = np.full(RATE // 2, 0.5, dtype=np.float32)
    wave = render_wave(short, 3, snr_db=None)
    starts = np.flatnonzero(np.diff((wave > 0.01).astype(int)) == 1)
    assert 2 <= len(starts) <= 4
    gaps = np.flatnonzero(np.diff((wave > 0.01).astype(int)) == -1)
    assert (starts[-1] - gaps[gaps < starts[-1]][-1]) >= 0.05 * RATE
    # Half silence, half tone: the cut is taken where it can be heard.
    half = np.concatenate([np.zeros(4 * RATE), np.full(2 * RATE, 0.5)]).astype(np.float32)
    assert min((render_wave(half, seed, snr_db=None) > 0.01).mean() for seed in range(20)) > 0.1
