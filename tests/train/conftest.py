"""Six classes of real clips and a tiny random model; an Accelerator on the CPU."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from data.build import DataConfig, PerSplit, build
from data.render import RenderSettings
from data.sources import load_sources
from models import load_model
from models.tiny import build_tiny
from tests.train.findings_by_hand import biased
from train.config import Config, SchedulePart
from train.plan import make_plan

CLASSES = tuple(c.name for c in load_sources()[:6])
BUILD = DataConfig(
    renderings=PerSplit(train=2, plan=1, selection=2, test=1, unseen=1),
    rounds=PerSplit(train=1, plan=1, selection=1, test=1, unseen=1),
    classes=CLASSES,
    render=RenderSettings(size=84),
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return build(BUILD, tmp_path_factory.mktemp("clips") / "clips", progress=False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=0, layers=3, hidden=64)


@pytest.fixture
def model(tiny_folder):
    """A fresh model with attention that is not nearly uniform, so that cuts and adapters matter."""
    model = load_model(tiny_folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.text_model.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def accelerator():
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True)


@pytest.fixture
def config():
    return Config(schedule=SchedulePart(grids=2, steps=3, checkpoint_every=1))


@pytest.fixture
def plan(config):
    """The plan of hand-made findings of a 3-layer model."""
    findings = biased(n_layers=3, knockout=[])
    for effect in biased().knockout:
        effect.start, effect.stop = min(effect.start, 1), min(effect.stop, 3)
        findings.knockout.append(effect)
    return make_plan(findings, config)
