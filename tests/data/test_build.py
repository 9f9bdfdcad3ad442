"""The build: deterministic, whole or not there, and split as promised."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.__main__ import main
from data.build import SPLITS, DataConfig, PerSplit, _classes, _factual, build
from data.clips import Clip, Clips, DataError, load_clips
from data.counterfactual import choose_swaps
from data.media import MediaError, read_audio, read_video, stream_hashes
from data.render import NEAR_SILENT_DB
from data.sources import load_sources
from data.splits import pair, split_pairs
from tests.data.conftest import SMALL

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(out: Path) -> list[str]:
    """The command line, with four classes and 6 + 1 + 1 + 2 + 1 renderings of each, 1 s long."""
    numbers = (("train", "6"), ("plan", "1"), ("selection", "1"), ("test", "2"), ("unseen", "1"))
    renderings = [word for split, n in numbers for word in (f"--renderings.{split}", n)]
    classes = ["--classes", "dog", "cow", "car", "bell"]
    return [sys.executable, "-m", "data", "--out", str(out), *classes, *renderings, "--render.size", "64", "--render.seconds", "1"]


def test_counts_and_pairs(small: Clips) -> None:
    count = Counter((c.split, c.condition) for c in small.clips)
    assert SMALL.classes is not None
    for split in SPLITS:
        assert count[split, "factual"] == len(SMALL.classes) * SMALL.renderings.of(split)
        grids = [g for g in small.grids if g.split == split]
        assert count[split, "counterfactual"] == 2 * len(grids) > 0
        allowed = split_pairs(SMALL.classes, 0).of(split)
        assert {pair(c.video_label, c.audio_label) for c in small.select(split, "counterfactual")} <= allowed
        assert count[split, "muted"] == count[split, "blanked"] == len(SMALL.classes) * SMALL.bare.of(split)
    assert set(small.manifest["pairs"]) == {"train", "selection", "test"}


def test_recorded_hashes_are_those_of_the_files(small: Clips) -> None:
    for clip in small.clips:
        assert stream_hashes(small.path(clip)) == (clip.video_sha256, clip.audio_sha256), clip.id
    factual = {c.id: c for c in small.select(condition="factual")}
    for clip in small.select(condition="counterfactual"):
        assert clip.video_sha256 == factual[clip.video_rendering].video_sha256
        assert clip.audio_sha256 == factual[clip.audio_rendering].audio_sha256
    assert len({c.video_sha256 for c in factual.values()}) == len({c.audio_sha256 for c in factual.values()}) == len(factual)


def test_sources_of_unseen_are_seen_nowhere_else(small: Clips) -> None:
    held = {s.id for c in load_sources() for s in (*c.held_pictures, *c.held_sounds)}
    recording_held = {c.name for c in load_sources() if c.held_sounds}
    for clip in small.clips:
        if clip.split == "unseen":
            assert clip.video_source in held and (clip.audio_source in held) == (clip.audio_label in recording_held)
        else:
            assert clip.video_source not in held and clip.audio_source not in held
    assert {c.audio_label in recording_held for c in small.select("unseen")} == {True, False}


def test_muted_and_blanked(small: Clips) -> None:
    for clip in small.select(condition="muted"):
        assert (clip.audio_label, clip.heard, clip.audio_source) == ("", "", "") and clip.video_label
        assert clip.video_sha256 == small.by_id()[clip.video_rendering].video_sha256
        silence = read_audio(small.path(clip), muted=True)
        level = 20 * np.log10(np.sqrt(np.mean(silence**2)) + 1e-9)
        assert silence.shape == (16_000,)
        if clip.audio_rendering == "silence":
            assert np.abs(silence).max() < 1e-4
            with pytest.raises(MediaError, match="silent sound track"):
                read_audio(small.path(clip))
        else:
            assert clip.audio_rendering == "near_silence" and -76 < level < -54
    for clip in small.select(condition="blanked"):
        assert (clip.video_label, clip.seen, clip.video_source) == ("", "", "") and clip.audio_label
        assert clip.audio_sha256 == small.by_id()[clip.audio_rendering].audio_sha256
        brightest = read_video(small.path(clip), 4).max()
        assert brightest <= 2 if clip.video_rendering == "black" else 2 < brightest <= 16  # 12, and what the coding adds
        assert clip.video_rendering in ("black", "near_black")


def test_half_of_what_is_missing_is_noise(small: Clips) -> None:
    """Noise and none take turns over classes and a class's clips; no noise of one split is in another."""
    noises: dict[str, set[str]] = {}
    for split in SPLITS:
        muted, blanked = small.select(split, "muted"), small.select(split, "blanked")
        near = [c.audio_rendering == "near_silence" for c in muted]
        assert [c.video_rendering == "near_black" for c in blanked] == [not n for n in near]
        assert 2 * sum(near) == len(near)
        assert len({c.audio_sha256 for c in muted if c.audio_rendering == "silence"}) <= 1
        noises[split] = {c.audio_sha256 for c in muted if c.audio_rendering == "near_silence"}
        noises[split] |= {c.video_sha256 for c in blanked if c.video_rendering == "near_black"}
        assert len(noises[split]) == len(near)  # fewer than `noises`: every clip has its own
    assert len(set().union(*noises.values())) == sum(len(found) for found in noises.values())
    of_dog = {c.id: c.audio_rendering for c in small.select("test", "muted") if c.video_label == "dog"}
    assert of_dog == {"test_dog_00__muted": "silence", "test_dog_01__muted": "near_silence"}


def test_no_clip_is_as_quiet_as_noise(small: Clips) -> None:
    """The quietest is a bell, 5 dB above the loudest noise that counts as nothing."""
    for clip in small.select(condition="factual"):
        assert 20 * np.log10(np.sqrt(np.mean(read_audio(small.path(clip)) ** 2))) > NEAR_SILENT_DB[1] + 4, clip.id


def test_bare_clips_are_as_many_as_there_are(tmp_path: Path) -> None:
    """No more than the factual clips; none where none are asked for."""
    config = replace(SMALL, renderings=PerSplit(1, 1, 1, 1, 1), bare=PerSplit(5, 0, 0, 1, 0))
    clips = build(replace(config, noises=1), tmp_path / "clips", progress=False)
    assert [len(clips.select(split, "muted")) for split in SPLITS] == [6, 0, 0, 6, 0]
    near = [c for c in clips.clips if c.audio_rendering == "near_silence"]
    assert len(near) == 6 and len({(c.split, c.audio_sha256) for c in near}) == len({c.audio_sha256 for c in near}) == 2  # one noise a split
    with pytest.raises(DataError, match="built with another config"):
        build(config, tmp_path / "clips", progress=False)
    with pytest.raises(DataError, match="noises is 0"):
        build(replace(config, noises=0), tmp_path / "other", progress=False)


def test_provenance(small: Clips) -> None:
    sources = {s["id"]: s for s in small.manifest["sources"]}
    used = {name for c in small.clips for name in (c.video_source, c.audio_source) if name}
    assert used <= set(sources)
    assert all(s["license"] and s["attribution"] and s["origin"] and len(s["sha256"]) == 64 for s in sources.values())
    assert small.manifest["config"]["render"] == {"size": 64, "fps": 4.0, "seconds": 1.0}
    assert {str(p.relative_to(small.root)) for p in (small.root / "media").iterdir()} == {c.file for c in small.clips} == set(small.manifest["files"])


def test_same_seed_same_bytes(small: Clips, tmp_path: Path) -> None:
    again = build(SMALL, tmp_path / "again", workers=1, progress=False)
    assert content(again.root) == content(small.root)
    fewer = replace(SMALL, seed=1, renderings=PerSplit(1, 1, 1, 1, 1))
    assert build(fewer, tmp_path / "other", progress=False).clips[0].video_sha256 != small.clips[0].video_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


BUILDS = """
import os, sys
import numpy as np
from data.build import DataConfig, PerSplit, build
from data.render import RenderSettings
two, one, none = PerSplit(2, 0, 0, 0, 0), PerSplit(1, 0, 0, 0, 0), PerSplit(0, 0, 0, 0, 0)
config = DataConfig(two, one, none, classes=("dog", "cow", "car", "bell"), render=RenderSettings(seconds=1.0))
for i in range(50):  # a process each; what they share is the modules
    child = os.fork()
    if child == 0:
        if i % 2:  # memory that is handed out again with other content than zeros
            kept = [np.full(n, 254, np.uint8) for n in (1 << k for k in range(4, 24)) for _ in range(20)]
            del kept
        print(build(config, f"{sys.argv[1]}/{i}", progress=False).data_hash, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_fifty_builds_are_one(tmp_path: Path) -> None:
    """Fifty processes, the memory of half of them dirtied before, at the default frame size: one hash of all data."""
    done = subprocess.run([sys.executable, "-c", BUILDS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    hashes = done.stdout.split()
    assert len(hashes) == 50 and len(hashes[0]) == 64 and set(hashes) == {hashes[0]}


def test_called_again_returns_what_is_there(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert build(SMALL, folder, progress=False).clips == load_clips(folder).clips
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_config_or_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    before = content(folder)
    with pytest.raises(DataError, match=r"clips was built with another config, .* Remove it or choose another folder"):
        build(replace(SMALL, seed=5), folder, progress=False)
    assert content(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="mine exists and is no clip folder"):
        build(SMALL, tmp_path / "mine", progress=False)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_unknown_or_too_few_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='no class "unicorn"'):
        build(replace(SMALL, classes=("dog", "unicorn")), tmp_path / "x", progress=False)
    with pytest.raises(DataError, match="at least four"):
        build(replace(SMALL, classes=("dog", "cow")), tmp_path / "x", progress=False)
    assert not list(tmp_path.iterdir())


def test_disk_too_small_is_said_before_starting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs up to \d+ MB and its disk has \d+ MB free"):
        build(replace(SMALL, renderings=PerSplit(10**10, 1, 1, 1, 1)), tmp_path / "x", progress=False)
    assert not list(tmp_path.iterdir())


def test_disk_full_on_the_way(tmp_path: Path) -> None:
    """No file may grow beyond 6 kB: some media cannot be written. One sentence, exit code 2, nothing left."""
    limited = ["bash", "-c", 'ulimit -f 6; exec "$@"', "limited", *command(tmp_path / "x")]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error:" in done.stderr and "cannot be written (File too large). Free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle(tmp_path: Path) -> None:
    out, partial = tmp_path / "x", tmp_path / "x.partial"
    process = subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300  # only a build that hangs takes this long
    while not (partial / "media").is_dir() or len(os.listdir(partial / "media")) < 5:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and partial.exists()
    with pytest.raises(DataError, match="does not exist"):
        load_clips(out)
    with pytest.raises(DataError, match="media files, no clip folder"):
        load_clips(partial)
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "factual" in done.stdout and not partial.exists()
    assert done.stdout.startswith(f"{out}: {len(load_clips(out).clips)} clips")
    assert "\nunseen: the train split has 0 of 4 pictures and 2 of 4 recordings too\n" in done.stdout  # dog and bell have one recording each


def test_default_test_split_is_large_enough() -> None:
    """At least 600 conflicts and 300 grids to test on, each unordered pair of clips once; every class is tested."""
    config = DataConfig()
    classes = _classes(config)
    pairs = split_pairs([c.name for c in classes], config.seed)
    test = [
        Clip(j.id, "", "test", "factual", j.kind.name, j.kind.name, j.kind.seen, j.kind.heard, "", "", j.id, j.id, "", "", 2.0)
        for j in _factual(config, classes)
        if j.split == "test"
    ]
    swaps = choose_swaps(test, pairs.test, config.rounds.test, config.seed)
    assert len(swaps) >= 300 and len({frozenset((i.id, j.id)) for i, j in swaps}) == len(swaps)
    assert len({i.video_label for i, _ in swaps} | {j.video_label for _, j in swaps}) == 43


def test_every_source_is_rendered() -> None:
    config = DataConfig()
    jobs = _factual(config, _classes(config))
    assert len({j.id for j in jobs}) == len({j.seed for j in jobs}) == len(jobs) == 43 * (24 + 4 + 3 + 8 + 2)
    for split in ("train", "test"):
        used = {s.id for j in jobs if j.split == split for s in (j.picture, j.sound)}
        assert used == {s.id for c in load_sources() for s in (*c.train_pictures, *c.train_sounds)}


def test_classes_without_held_out_sources() -> None:
    """The unseen split falls back to what is trained on, stream by stream; where nothing may be trained on the class is named."""
    [dog] = _classes(DataConfig(classes=("dog",)))
    trained = replace(dog, pictures=dog.train_pictures)
    jobs = [j for j in _factual(DataConfig(), [trained]) if j.split == "unseen"]
    assert len(jobs) == 2 and {j.picture for j in jobs} <= set(dog.train_pictures) and {j.sound for j in jobs} == set(dog.train_sounds)
    with pytest.raises(DataError, match='The class "dog" has no picture that is not held out'):
        _factual(DataConfig(), [replace(dog, pictures=dog.held_pictures)])
    with pytest.raises(DataError, match='The class "dog" has no recording that is not held out'):
        _factual(DataConfig(), [replace(dog, sounds=tuple(replace(s, held_out=True) for s in dog.sounds))])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--workers 0", "workers is 0. Set it to 1 or more"),
        ("--workers -1", "workers is -1. Set it to 1 or more"),
        ("--render.size 0", "render.size is 0. Set it to an even number of pixels"),
        ("--render.size 65", "render.size is 65. Set it to an even number of pixels"),
        ("--render.fps 0", "render.fps is 0.0. Set it to"),
        ("--render.fps inf", "render.fps is inf. Set it to"),
        ("--render.seconds 0", "render.seconds is 0.0. Set it to"),
        ("--render.seconds nan", "render.seconds is nan. Set it to"),
        ("--seed -1", "seed is -1. Set it to 0 or more"),
        ("--renderings.plan -1", "renderings.plan is -1. Set it to 0 or more"),
        ("--rounds.test -2", "rounds.test is -2. Set it to 0 or more"),
        ("--bare.train -3", "bare.train is -3. Set it to 0 or more"),
        ("--max-similarity -1", "max_similarity is -1.0. Set it to 0 to 1"),
        ("--max-similarity nan", "max_similarity is nan. Set it to 0 to 1"),
        ("--noises 0", "noises is 0. Set it to 1 or more"),
        ("--classes dog dog", "classes is dog dog. Set it to names, each once"),
    ],
)
def test_settings_of_which_nothing_can_be_built(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "clips"), *words.split()]) == 2
    assert f"error: {said}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
