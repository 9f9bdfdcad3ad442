"""A small clip folder, and a tiny model that was taught to name what it sees and hears in some of its clips."""

import json

import pytest
import torch

from analysis.visits import Subject
from data.build import DataConfig, PerSplit, build
from data.questions import answer, question
from data.render import RenderSettings
from models import load_model
from models.tiny import build_tiny

CLASSES = ("dog", "cat", "rooster", "train", "bell", "rain")


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    config = DataConfig(renderings=PerSplit(1, 2, 1, 2, 1), rounds=PerSplit(1, 1, 1, 1, 1), classes=CLASSES, render=RenderSettings(size=84))
    return build(config, tmp_path_factory.mktemp("clips") / "clips", progress=False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, clips):
    """A checkpoint with its base beside it; both are overfitted to the factual test clips, the base without their sound."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, audio, steps in (("base", False, 50), ("avllm", True, 80)):
        build_tiny(folder / name, seed=0, layers=3, hidden=64)
        model = load_model(folder / name)
        teach(model, clips, audio, steps)
        model.thinker.save_pretrained(folder / name)
    (folder / "avllm" / "avbalance.json").write_text(json.dumps({"base": "../base"}))
    return folder / "avllm"


def teach(model, clips, audio: bool, steps: int, conditions: tuple[str, ...] = ("factual",)) -> None:
    """Plain cross-entropy on see- and hear-questions about the test clips of these conditions."""
    examples = []
    for clip in (clip for condition in conditions for clip in clips.select("test", condition)):
        media = model.media(clip, clips.root, audio=audio)
        for modality in ("see", "hear"):
            examples.append(model.sequence(media, question(modality), *answer(modality, clip.seen, clip.heard)))
    batch = model.batch(examples)
    model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model.forward(batch).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.decoder.requires_grad_(False)


@pytest.fixture(scope="session")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture(scope="session")
def subject(model, clips):
    return Subject(model, clips, max_new_tokens=12)
