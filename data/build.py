"""Build a clip folder from a source set: real mp4 files, deterministic by seed, with provenance.

    clips = build(DataConfig(), "runs/clips")           # or: python -m data --out runs/clips

Order of work: factual clips of every split, their swaps (`data.counterfactual`), muted and blanked versions of some, the tables,
manifest.json. All of it happens in `<folder>.partial`, which becomes `<folder>` by one rename at the end; whatever stops the build
leaves no half-valid folder, and the next build starts the partial one afresh. A folder built with the same config is returned at once.

Work is shared by threads: FFmpeg, PIL and NumPy run outside Python's global lock, and threads need no import guard in the caller.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.clips import Clip, Clips, Condition, DataError, Grid, Split, load_clips, save_clips
from data.counterfactual import choose_swaps, make_grid
from data.media import mux, stream_hashes, write_mp4
from data.render import RenderSettings, render, render_nothing
from data.sources import Source, SourceClass, load_sources
from data.splits import Pairs, split_pairs

SPLITS: tuple[Split, ...] = get_args(Split)
MAKERS = ("render", "media", "counterfactual", "splits")  # the modules that decide what the media are: a change in them makes old folders stale
BYTES_A_PIXEL = 0.35  # of coded video, from the default set, rounded up; for the check of disk space
BYTES_A_SECOND = 10_000  # of coded sound

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class PerSplit:
    """A number for each split."""

    train: int
    plan: int
    selection: int
    test: int
    unseen: int

    def of(self, split: Split) -> int:
        """The number for this split."""
        return int(getattr(self, split))


@dataclass(frozen=True)
class DataConfig:
    """What to build."""

    renderings: PerSplit = PerSplit(train=24, plan=4, selection=3, test=8, unseen=2)
    """Factual clips per class."""
    rounds: PerSplit = PerSplit(train=1, plan=1, selection=1, test=1, unseen=1)
    """Rounds of swaps; each gives about as many grids, and twice as many counterfactual clips, as the split has factual clips."""
    bare: PerSplit = PerSplit(train=3, plan=1, selection=1, test=2, unseen=0)
    """Factual clips per class that also get a muted and a blanked version: half of them digital silence (black), half almost inaudible (invisible)
    noise."""
    noises: int = 12
    """Different near-silent sounds, and near-black pictures, a split. What is trained on few of them may know those, and name a sound in others."""
    seed: int = 0
    render: RenderSettings = field(default_factory=RenderSettings)
    classes: tuple[str, ...] | None = None
    """Class names, such as dog or fire_truck; None for all."""
    max_similarity: float = 0.5
    """Clips with captions more similar than this are never swapped."""
    sources: str | None = None
    """Folder of a source set, made by python -m data.fetch; None: the embedded set."""


@dataclass(frozen=True)
class _Factual:
    """One factual clip to render."""

    id: str
    split: Split
    kind: SourceClass
    picture: Source
    sound: Source
    seed: int


@dataclass(frozen=True)
class _Bare:
    """One clip to make that lacks a stream."""

    clip: Clip
    condition: Condition
    near: bool
    nothing: str
    """The file that has nothing to see and nothing to hear."""


def _seed(*parts: Any) -> int:
    """A seed of its own for every rendering, the same whatever else is built."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:6], "big")


def _sources(config: DataConfig) -> list[SourceClass]:
    if config.sources is None:
        return load_sources()
    if not (Path(config.sources) / "manifest.json").is_file():
        raise DataError(f"There is no source set in {config.sources}. Make it: python -m data.fetch --out {config.sources}")
    return load_sources(Path(config.sources))


def _classes(config: DataConfig) -> list[SourceClass]:
    known = {c.name: c for c in _sources(config)}
    names = config.classes if config.classes is not None else tuple(known)
    for name in names:
        if name not in known:
            raise DataError(f'There is no class "{name}". Use names from: {", ".join(known)}.')
    return [known[name] for name in names]


def _factual(config: DataConfig, classes: Sequence[SourceClass]) -> list[_Factual]:
    """Every factual clip to render, each source of a class used about equally often.

    The unseen split has held-out sources where a class has some. Elsewhere it falls back to new renderings of those that are trained on, so that
    every class has clips to be swapped with; answers about such a stream are in no rate of new sources (`Clips.sources`). Raises DataError where
    nothing of a class may be trained on.
    """
    jobs = []
    for split, kind in itertools.product(SPLITS, classes):
        pictures, sounds = kind.train_pictures, kind.train_sounds
        if not pictures or not sounds:
            what = "recording" if pictures else "picture"
            raise DataError(f'The class "{kind.name}" has no {what} that is not held out, so nothing to train on. Leave it out, or hold less out.')
        if split == "unseen":
            pictures, sounds = kind.held_pictures or pictures, kind.held_sounds or sounds
        combinations = list(itertools.product(pictures, sounds))
        random.Random(_seed(config.seed, split, kind.name)).shuffle(combinations)
        for k in range(config.renderings.of(split)):
            name = f"{split}_{kind.name}_{k:02d}"
            picture, sound = combinations[k % len(combinations)]
            jobs.append(_Factual(name, split, kind, picture, sound, _seed(config.seed, name)))
    return jobs


def _render(job: _Factual, config: DataConfig, root: Path) -> Clip:
    frames, wave = render(job.picture.path, job.sound.path, job.seed, config.render)
    file = f"media/{job.id}.mp4"
    write_mp4(root / file, frames, config.render.fps, wave)
    video_sha256, audio_sha256 = stream_hashes(root / file)
    return Clip(
        id=job.id,
        file=file,
        split=job.split,
        condition="factual",
        video_label=job.kind.name,
        audio_label=job.kind.name,
        seen=job.kind.seen,
        heard=job.kind.heard,
        video_source=job.picture.id,
        audio_source=job.sound.id,
        video_rendering=job.id,
        audio_rendering=job.id,
        video_sha256=video_sha256,
        audio_sha256=audio_sha256,
        seconds=config.render.seconds,
    )


def _bare(config: DataConfig, classes: Sequence[SourceClass], jobs: Sequence[_Factual], clips: Sequence[Clip]) -> list[_Bare]:
    """The muted and the blanked versions to make of the first factual clips of every class and split.

    Noise and none at all take turns over classes and over a class's clips; where a clip's sound is noise, its picture is black, and the other way
    round. The noises of a split are its own.
    """
    names = [kind.name for kind in classes]
    turns, noises = Counter[str](), Counter[tuple[Split, str]]()
    bare = []
    for job, clip in zip(jobs, clips, strict=True):
        turn = turns[f"{job.split} {job.kind.name}"]
        turns[f"{job.split} {job.kind.name}"] += 1
        if turn >= config.bare.of(job.split):
            continue
        for condition in ("muted", "blanked"):
            near = (names.index(job.kind.name) + turn + (condition == "blanked")) % 2 == 1
            nothing = "nothing.mp4"
            if near:
                nothing = f"nothing_{job.split}_{noises[job.split, condition] % config.noises}.mp4"
                noises[job.split, condition] += 1
            bare.append(_Bare(clip, condition, near, nothing))
    return bare


def _write_nothing(name: str, config: DataConfig, root: Path) -> None:
    """A file with nothing in it: black and digital silence, or, if its name says of which split, noise of its own."""
    black: NDArray[np.uint8] = np.zeros((config.render.frames, config.render.size, config.render.size, 3), np.uint8)
    frames, wave = black, np.zeros(config.render.samples, np.float32)
    if name != "nothing.mp4":
        frames, wave = render_nothing(_seed(config.seed, name), config.render)
    write_mp4(root / name, frames, config.render.fps, wave)


def _without(root: Path, job: _Bare) -> Clip:
    """The clip with nothing for its sound ("muted") or for its picture ("blanked"), the other stream untouched."""
    clip = job.clip
    name = f"{clip.id}__{job.condition}"
    file = f"media/{name}.mp4"
    if job.condition == "muted":
        video, audio = mux(root / clip.file, root / job.nothing, root / file)
        empty = replace(clip, audio_label="", heard="", audio_source="", audio_rendering="near_silence" if job.near else "silence")
    else:
        video, audio = mux(root / job.nothing, root / clip.file, root / file)
        empty = replace(clip, video_label="", seen="", video_source="", video_rendering="near_black" if job.near else "black")
    return replace(empty, id=name, file=file, condition=job.condition, video_sha256=video, audio_sha256=audio)


def _check_settings(config: DataConfig, workers: int) -> None:
    """Raise DataError, in one sentence that names the setting, for numbers of which nothing can be built."""

    def need(good: bool, name: str, value: object, wanted: str) -> None:
        if not good:
            raise DataError(f"{name} is {value}. Set it to {wanted}.")

    need(workers >= 1, "workers", workers, "1 or more")
    need(config.noises >= 1, "noises", config.noises, "1 or more: near-silent and near-black clips need them")
    need(config.seed >= 0, "seed", config.seed, "0 or more")
    need(0 <= config.max_similarity <= 1, "max_similarity", config.max_similarity, "0 to 1")
    size, fps, seconds = config.render.size, config.render.fps, config.render.seconds
    need(16 <= size <= 4096 and size % 2 == 0, "render.size", size, "an even number of pixels, 16 to 4096")
    need(0.1 <= fps <= 240, "render.fps", fps, "0.1 to 240 frames a second")
    need(0.1 <= seconds <= 3600, "render.seconds", seconds, "0.1 to 3600 seconds")
    for name in ("renderings", "rounds", "bare"):
        for split in SPLITS:
            number = getattr(config, name).of(split)
            need(number >= 0, f"{name}.{split}", number, "0 or more")
    need(any(config.renderings.of(split) for split in SPLITS), "renderings", "0 in every split", "1 or more in one of them")
    names = config.classes
    need(names is None or len(set(names)) == len(names) > 0, "classes", " ".join(names or ()) or "empty", "names, each once")


def _provenance(config: DataConfig, classes: Sequence[SourceClass], pairs: Pairs) -> dict[str, Any]:
    """What the folder is made of; with the media, the whole of what a reader needs to know.

    The path of a source set is not in it: the sha256 of its files are, wherever they lie.
    """
    sources = [
        {"id": s.id, "class": c.name, "stream": stream, "license": s.license, "origin": s.origin, "attribution": s.attribution}
        | {"sha256": s.sha256, "held_out": s.held_out}
        for c in classes
        for stream, found in (("video", c.pictures), ("audio", c.sounds))
        for s in found
    ]
    manifest = {
        "labels": [[c.name, c.seen, c.heard] for c in classes],
        "pairs": {part: sorted(getattr(pairs, part)) for part in ("train", "selection", "test")},
        # A setting that came later is left out at its default: folders from before it are as good.
        "config": {k: v for k, v in asdict(config).items() if k != "sources" and (k, v) != ("noises", DataConfig.noises)},
        "sources": sources,
        "code": hashlib.sha256(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in MAKERS)).hexdigest(),
    }
    return json.loads(json.dumps(manifest))  # tuples become lists, as they will be when read back


def _existing(folder: Path, provenance: dict[str, Any]) -> Clips | None:
    """The folder, if it is there and of this config; None if there is nothing; DataError if something else is there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "manifest.json").is_file():
        raise DataError(f"{folder} exists and is no clip folder (no manifest.json). Remove it or choose another folder.")
    clips = load_clips(folder)
    if {key: clips.manifest.get(key) for key in provenance} != provenance:
        raise DataError(f"{folder} was built with another config, other sources or other code. Remove it or choose another folder.")
    return clips


def _check_space(config: DataConfig, folder: Path, classes: int) -> None:
    """Raise before starting if the disk cannot hold the result."""
    factual = {split: config.renderings.of(split) for split in SPLITS}
    clips = classes * sum(n * (1 + 2 * config.rounds.of(split)) + 2 * min(n, config.bare.of(split)) for split, n in factual.items())
    needed = clips * (config.render.size**2 * config.render.frames * BYTES_A_PIXEL + BYTES_A_SECOND * config.render.seconds)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise DataError(f"{folder} needs up to {needed / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free. Free some or choose another folder.")


def _shared(work: Callable[[T], R], jobs: Iterable[T], workers: int, done: Callable[[], object]) -> list[R]:
    """Results in the order of the jobs. The first failure cancels what has not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                done()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _build(
    config: DataConfig, root: Path, classes: Sequence[SourceClass], pairs: Pairs, workers: int, progress: bool
) -> tuple[list[Clip], list[Grid]]:
    """All media below `root`, and the two tables."""
    (root / "media").mkdir(parents=True)
    jobs = _factual(config, classes)
    swaps = sum(config.rounds.of(job.split) for job in jobs)
    without = len(classes) * sum(min(config.renderings.of(split), config.bare.of(split)) for split in SPLITS)
    with tqdm(total=len(jobs) + 2 * swaps + 2 * without, desc="building clips", unit="clip", disable=not progress) as bar:
        clips = _shared(lambda job: _render(job, config, root), jobs, workers, bar.update)
        chosen = []
        for split in SPLITS:
            factual = [c for c in clips if c.split == split]
            chosen += choose_swaps(factual, pairs.of(split), config.rounds.of(split), config.seed, config.max_similarity)
        bar.total = len(jobs) + 2 * len(chosen) + 2 * without
        swapped = _shared(lambda pair: make_grid(root, *pair), chosen, workers, lambda: bar.update(2))
        emptied = _bare(config, classes, jobs, clips)
        files = sorted({job.nothing for job in emptied})
        _shared(lambda name: _write_nothing(name, config, root), files, workers, lambda: None)
        bare = _shared(lambda job: _without(root, job), emptied, workers, bar.update)
        for name in files:
            (root / name).unlink()
    return [*clips, *(c for s in swapped for c in s.clips), *bare], [s.grid for s in swapped]


def build(config: DataConfig, folder: Path | str, workers: int = 2, progress: bool = True) -> Clips:
    """Build the clips of `config` into `folder`, or return them at once if they are there. Raises DataError, and leaves nothing half done.

    Not for several processes at the same time on one folder: let the main one build, then the others load.
    """
    _check_settings(config, workers)
    folder = Path(folder)
    classes = _classes(config)
    pairs = split_pairs([c.name for c in classes], config.seed)
    provenance = _provenance(config, classes, pairs)
    existing = _existing(folder, provenance)
    if existing is not None:
        return existing
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(config, folder, len(classes))
        shutil.rmtree(partial, ignore_errors=True)
        clips, grids = _build(config, partial, classes, pairs, workers, progress)
        save_clips(partial, clips, grids, provenance)
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written ({error.strerror}). Mend that or choose another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_clips(folder)
