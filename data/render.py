"""Short clips from one picture and one recording, different for every seed and the same for the same seed.

    frames, wave = render(picture, recording, seed=7)                      # uint8 (8, 168, 168, 3), float32 (32000,)
    frames = render_frames(picture, seed=7)
    wave = render_wave(recording, seed=7, snr_db=(0.0, 10.0))              # with noise levels of your own
    frames, wave = render_nothing(seed=7)                                  # near black, near silence: nothing to see or hear

The picture moves over a varied background, scaled, slightly turned, perhaps mirrored, with jittered colours; the recording is cut or
repeated, sped up or down, gained, and lies in noise. Picture and sound draw from separate streams of random numbers, so either can be
rendered alone. Decoded pictures and recordings are kept in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.media import RATE, read_audio

SCALE = (0.8, 0.98)  # of the frame, longer side
TURN = 8.0  # degrees either way
SPEED = 0.06  # resampling factor, either way: speed and pitch together
GAIN_DB = (-12.0, 0.0)
SNR_DB = (8.0, 30.0)
NEAR_SILENT_DB = (-75.0, -55.0)  # RMS to full scale; the quietest clip of the default build has -50
NEAR_BLACK = 12  # the brightest pixel, of 255


@dataclass(frozen=True)
class RenderSettings:
    """Frame size in pixels (square, even), frames a second, length in seconds."""

    size: int = 168
    fps: float = 4.0
    seconds: float = 2.0

    @property
    def frames(self) -> int:
        """Number of frames."""
        return max(2, round(self.fps * self.seconds))

    @property
    def samples(self) -> int:
        """Number of 16 kHz samples."""
        return round(self.seconds * RATE)


DEFAULTS = RenderSettings()


@lru_cache(maxsize=512)
def _picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())  # drawings come with empty margins of different widths


@lru_cache(maxsize=512)
def _sound(path: Path) -> np.ndarray:
    wave = read_audio(path)
    wave.setflags(write=False)
    return wave


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """One of: plain colour, gradient, stripes, checks, soft noise, fine noise, blobs. float32 (size, size, 3), 0..255."""
    # Muted colours, so that the picture stands out as the subject of a photograph does.
    one, two = (rng.uniform(50, 205, (2, 1)) + rng.uniform(-35, 35, (2, 3))).astype(np.float32)
    two = one + 0.6 * (two - one)
    kind = rng.integers(7)
    if kind == 0:
        return np.broadcast_to(one, (size, size, 3)).copy()
    if kind in (4, 5):  # noise between two colours, soft (few large cells) or fine
        cells = int(rng.integers(4, 12)) if kind == 4 else size // 2
        grain = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        mix = np.asarray(grain, dtype=np.float32) / 255
    elif kind == 6:
        canvas = Image.new("L", (size, size), 0)
        draw = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(4, 12))):
            x, y, r = rng.uniform(0, size, 3)
            r = r / 5 + 4
            draw.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.integers(80, 256)))
        mix = np.asarray(canvas, dtype=np.float32) / 255
    else:
        angle, across = rng.uniform(0, 2 * math.pi), np.arange(size, dtype=np.float32) / size - 0.5
        u = math.cos(angle) * across[None, :] + math.sin(angle) * across[:, None]
        if kind == 1:
            mix = np.clip(u + 0.5, 0, 1)
        else:
            waves = rng.uniform(2, 9)
            mix = (np.sin(2 * math.pi * waves * u) > 0).astype(np.float32)
            if kind == 3:
                v = math.cos(angle) * across[:, None] - math.sin(angle) * across[None, :]
                mix = np.abs(mix - (np.sin(2 * math.pi * waves * v) > 0))
            mix *= np.float32(rng.uniform(0.3, 1.0))
    return one + mix[..., None] * (two - one)


def _recoloured(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and hue jittered; float32 (h, w, 3) in and out, 0..255."""
    turn = math.radians(rng.uniform(-15, 15))
    # Hue as a turn of the chroma plane of YIQ.
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    spin = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    matrix = (np.linalg.inv(to_yiq) @ spin @ to_yiq).astype(np.float32)
    contrast, brightness = np.float32(rng.uniform(0.75, 1.25)), np.float32(rng.uniform(-25, 25))
    return np.clip((rgb @ matrix.T - 128) * contrast + 128 + brightness, 0, 255)


def render_frames(image_path: Path | str, seed: int, settings: RenderSettings = DEFAULTS) -> np.ndarray:
    """A picture moving over a background: uint8 (n, size, size, 3)."""
    rng = np.random.default_rng([seed, 0])
    size, n = settings.size, settings.frames
    background = _background(rng, size)
    picture = _picture(Path(image_path))
    scale = rng.uniform(*SCALE) * size / max(picture.size)
    width, height = (max(2, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(picture, dtype=np.float32)
    # Colours weighted by alpha, so that the invisible pixels around a drawing do not bleed into its edge when it is turned.
    alpha = pixels[..., 3:] / 255
    sprite = Image.fromarray(np.concatenate([_recoloured(pixels[..., :3], rng) * alpha, pixels[..., 3:]], axis=-1).round().astype(np.uint8), "RGBa")
    # The centre drifts on a gentle curve, from one place to another, at most a fifth outside the frame.
    room = np.maximum(0.0, 1 - np.array([width, height]) / size) / 2 + 0.05
    start, stop, bend = rng.uniform(-1, 1, (3, 2)) * room
    turn_start, turn_stop = np.radians(rng.uniform(-TURN, TURN, 2))
    frames = np.empty((n, size, size, 3), dtype=np.uint8)
    for i in range(n):
        t = i / (n - 1)
        centre = (0.5 + start + (stop - start) * t + bend * 0.3 * math.sin(math.pi * t)) * size
        turn = turn_start + (turn_stop - turn_start) * t
        cos, sin = math.cos(turn), math.sin(turn)
        x = width / 2 - cos * centre[0] - sin * centre[1]
        y = height / 2 + sin * centre[0] - cos * centre[1]
        moved = np.asarray(sprite.transform((size, size), Image.Transform.AFFINE, (cos, sin, x, -sin, cos, y), Image.Resampling.BILINEAR))
        frames[i] = np.clip(background * (1 - moved[..., 3:] / np.float32(255)) + moved[..., :3] + 0.5, 0, 255)
    return frames


def _filled(sound: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `samples` samples: a long sound is cut where it can be heard, a short one repeated with gaps."""
    if len(sound) >= samples:
        loud = float(np.sqrt(np.mean(sound**2)))
        best = sound[:samples]
        best_level = -1.0
        for offset in rng.integers(0, len(sound) - samples + 1, 8):
            part = sound[offset : offset + samples]
            level = float(np.sqrt(np.mean(part**2)))
            if level > best_level:
                best, best_level = part, level
            if level > 0.5 * loud:  # not a pause between two barks
                break
        return best.copy()
    wave = np.zeros(samples, dtype=np.float32)
    # The first repetition may begin inside or a little late; at least half of it is always there.
    at = int(rng.integers(-len(sound) // 2, max(1, min(samples - len(sound), RATE // 4) + 1)))
    while at < samples:
        begin, end = max(at, 0), min(at + len(sound), samples)
        wave[begin:end] = sound[begin - at : end - at]
        at += len(sound) + int(rng.integers(RATE // 20, RATE // 2))
    return wave


def _noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """White or pink noise of unit power."""
    white = rng.standard_normal(samples, dtype=np.float32)
    if rng.random() < 0.5:
        spectrum = np.fft.rfft(white)
        white = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), samples).astype(np.float32)
    return white / np.float32(np.sqrt(np.mean(white**2)))


def render_wave(
    sound: Path | str | np.ndarray, seed: int, settings: RenderSettings = DEFAULTS, snr_db: tuple[float, float] | None = SNR_DB
) -> np.ndarray:
    """A recording (a file, or 16 kHz samples) varied: float32 (samples,) within [-1, 1]. `snr_db`: range of signal to noise; None for no noise."""
    rng = np.random.default_rng([seed, 1])
    recording = sound if isinstance(sound, np.ndarray) else _sound(Path(sound))
    speed = 1 + rng.uniform(-SPEED, SPEED)
    wave = np.interp(np.arange(0, len(recording) - 1, speed), np.arange(len(recording)), recording).astype(np.float32)
    wave = _filled(wave, settings.samples, rng)
    wave *= np.float32(10 ** (rng.uniform(*GAIN_DB) / 20))
    if snr_db is not None:
        level = float(np.sqrt(np.mean(wave**2)))
        wave += _noise(rng, len(wave)) * np.float32(level * 10 ** (-rng.uniform(*snr_db) / 20))
    peak = float(np.abs(wave).max())
    return wave / np.float32(max(1.0, peak / 0.99))


def render(
    image_path: Path | str, sound_path: Path | str | np.ndarray, seed: int, settings: RenderSettings = DEFAULTS
) -> tuple[np.ndarray, np.ndarray]:
    """Frames, uint8 (n, size, size, 3), and wave, float32 (samples,) at 16 kHz: the same for the same seed."""
    return render_frames(image_path, seed, settings), render_wave(sound_path, seed, settings)


def render_nothing(seed: int, settings: RenderSettings = DEFAULTS) -> tuple[np.ndarray, np.ndarray]:
    """What a covered lens and an unplugged microphone give: frames of noise from 0 to at most NEAR_BLACK, a wave of noise within NEAR_SILENT_DB."""
    rng = np.random.default_rng([seed, 2])
    brightest = int(rng.integers(NEAR_BLACK // 3, NEAR_BLACK + 1))
    frames = rng.integers(0, brightest + 1, (settings.frames, settings.size, settings.size, 3), dtype=np.uint8)
    return frames, _noise(rng, settings.samples) * np.float32(10 ** (rng.uniform(*NEAR_SILENT_DB) / 20))
