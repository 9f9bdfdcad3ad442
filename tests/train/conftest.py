"""Six classes of real clips and a tiny random model; an Accelerator on the CPU."""

import dataclasses
import json
import os

import pytest
import torch
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from data.build import DataConfig, PerSplit, build
from data.render import RenderSettings
from data.sources import load_sources
from models import load_model
from models.tiny import build_tiny
from tests.train.findings_by_hand import biased
from train.config import Config, DataPart, SchedulePart
from train.plan import make_plan
from train.sampling import Ask, Group

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


QUICK = {"counterfactual": 4, "factual": 4, "grids": 2, "max_new_tokens": 4, "flips": 10}
TEST = QUICK | {"alone": 0, "unseen": 0, "flow": False, "lens": False, "probes": False, "shift": 0, "knockout": 0, "knockout_factual": 0}


@pytest.fixture
def arguments(clips, tiny_folder, tmp_path):
    """Command-line arguments of a run of 4 steps with 2 checkpoints, in a folder of its own."""
    settings = {
        "model": {"path": str(tiny_folder)},
        "data": {"clips": str(clips.root), "build": json.loads(json.dumps(dataclasses.asdict(BUILD)))},
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "layers": [0, 1, 2], "projections": ["q_proj", "o_proj"]},
        "loss": {"require_bias": False, "teacher_cut": "video->emitters 0:3", "mirror_cut": "audio->emitters 0:3", "max_answer_tokens": 4},
        "schedule": {"steps": 4, "grids": 2, "checkpoint_every": 2},
        "diagnosis": {"plan": QUICK | {"knockout": 0, "knockout_factual": 0}, "selection": QUICK, "test": TEST},
        "run": {"threads": 1, "folder": str(tmp_path / "run")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


def result(folder):
    """Everything a run ends with that must not depend on interruptions: adapters byte for byte, numbers without the clock."""
    adapters = {p.parent.parent.name: p.read_bytes() for p in sorted(folder.glob("checkpoints/*/adapter/adapter_model.safetensors"))}
    states = {p.parent.parent.name: p.read_bytes() for p in sorted(folder.glob("checkpoints/*/state/optimizer.safetensors"))}
    metrics = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = json.loads((folder / "findings" / "after.json").read_text())
    after["adapter"] = None  # its path names the run folder
    best, plan = (json.loads((folder / name).read_text()) for name in ("best.json", "plan.json"))
    card = (folder / "adapter" / "README.md").read_text().replace(f"# {folder.name}\n", "")
    return adapters, states, metrics, best, after, plan, card


@pytest.fixture
def factual_config(config):
    """The same on factual clips only."""
    return Config(data=DataPart(train_on="factual"), schedule=config.schedule)


def plain(group: Group) -> list[Ask]:
    """Its questions about whole clips, on one stream."""
    return [a for a in group.asks if not a.bare and a.modality != "both"]
