"""A small clip folder, built once and copied by the tests that break it."""

import shutil
from pathlib import Path

import pytest

from data.build import DataConfig, PerSplit, build
from data.clips import Clips
from data.render import RenderSettings

SMALL = DataConfig(
    renderings=PerSplit(train=2, plan=1, selection=2, test=2, unseen=1),
    rounds=PerSplit(train=2, plan=1, selection=1, test=1, unseen=1),
    bare=PerSplit(train=2, plan=1, selection=1, test=2, unseen=0),
    render=RenderSettings(size=64, seconds=1.0),
    classes=("dog", "cow", "car", "fire_truck", "bell", "rain"),
)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Six classes, a few renderings, tiny pictures: for reading only."""
    return build(SMALL, tmp_path_factory.mktemp("small") / "clips", progress=False)


@pytest.fixture
def folder(small: Clips, tmp_path: Path) -> Path:
    """A copy of the small folder, to break."""
    return Path(shutil.copytree(small.root, tmp_path / "clips"))
