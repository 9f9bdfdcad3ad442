"""A tiny random model (3 layers) and real media of two classes."""

import numpy as np
import pytest
import torch

from data.media import read_audio, read_video, write_mp4
from data.render import render_frames, render_wave
from data.sources import load_sources
from models import Media, load_model
from models.tiny import build_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=0, layers=3, hidden=64)


@pytest.fixture(scope="session")
def mp4s(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for i, source in enumerate(load_sources()[:3]):
        path = folder / f"{i}.mp4"
        wave = render_wave(source.train_sounds[0].path, i)
        write_mp4(path, render_frames(source.train_pictures[0].path, i), 4, np.concatenate([wave] * (1 + i % 2)))
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    model = load_model(tiny_folder)
    # Random weights this small give nearly uniform attention; larger ones make every comparison below mean something.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.text_model.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def media(tiny, mp4s):
    with torch.no_grad():
        videos = tiny.encode_video([read_video(p, tiny.fps) for p in mp4s])
        audios = tiny.encode_audio([read_audio(p) for p in mp4s])
    return [Media(v, a) for v, a in zip(videos, audios, strict=True)]
