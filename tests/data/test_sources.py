"""The embedded set: whole, with licences, and honestly split by source."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data.clips import DataError
from data.sources import LICENSES, REAL_AV, attribution, held_out_package, load_sources


def test_whole() -> None:
    classes = load_sources()
    assert len(classes) == 43 and len({c.name for c in classes}) == 43
    names = {c.name: c for c in classes}
    assert names["fire_truck"].title == "fire truck" and names["fire_truck"].heard == "a siren wailing"
    assert len({s.id for c in classes for s in (*c.pictures, *c.sounds)}) == 94 + 65
    assert all(" " not in c.name for c in classes)
    # Two classes that look or sound the same in words could not be told apart in an answer.
    assert max(Counter(c.seen for c in classes).values()) == max(Counter(c.heard for c in classes).values()) == 1


def test_held_out() -> None:
    for c in load_sources():
        assert c.train_pictures and c.train_sounds and c.held_pictures, c.name
        assert all(p.package == "noto" for p in c.held_pictures) and all(p.package != "noto" for p in c.train_pictures)
        assert not {s.package for s in c.train_sounds} & {s.package for s in c.held_sounds}
    held = {c.name for c in load_sources() if c.held_sounds}
    assert held == {"cow", "horse", "sheep", "songbird", "car", "train", "bubbles", "explosion", "applauding_hands"}


def test_held_out_package() -> None:
    assert held_out_package(["fluid", "fluid"]) is None
    assert held_out_package(["opensfx", "fluid"]) == "opensfx"  # one each: the last in the alphabet
    assert held_out_package(["opensfx", "opensfx", "fluid"]) == "fluid"  # the fewest


def test_attribution_is_up_to_date() -> None:
    text = (REAL_AV / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == attribution(), "run python -m data.sources"
    for c in load_sources():
        for s in (*c.pictures, *c.sounds):
            assert s.license in LICENSES and s.attribution in text and s.path.name in text


def test_changed_or_missing_file(tmp_path: Path) -> None:
    entry = json.loads((REAL_AV / "manifest.json").read_text())["classes"][0]
    for media in (*entry["images"], *entry["sounds"]):
        (tmp_path / media["file"]).parent.mkdir(exist_ok=True)
        shutil.copy(REAL_AV / media["file"], tmp_path / media["file"])
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": [entry]}))
    sound = tmp_path / entry["sounds"][0]["file"]
    original = sound.read_bytes()
    sound.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{sound.name} has changed"):
        load_sources(tmp_path)
    sound.unlink()
    with pytest.raises(DataError, match=f"{sound.name} is listed .* cannot be read"):
        load_sources(tmp_path)
    sound.write_bytes(original)
    assert [c.name for c in load_sources(tmp_path)] == ["dog"]
    (tmp_path / "manifest.json").write_text("[]")
    load_sources.cache_clear()
    with pytest.raises(DataError, match="no source manifest"):
        load_sources(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        load_sources(tmp_path / "nowhere")
