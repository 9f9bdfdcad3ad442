"""Counterfactual clips: the picture of one clip with the sound of another, chosen to be unlike each other.

Each round assigns to every clip one other clip's sound, one to one, so that the sum of caption similarities (TF-IDF cosine) is least
(the Hungarian method). Both swaps of a pair are made: with the two factual clips they are a 2x2 grid. The sound's packets are copied
next to the untouched video packets; nothing is encoded again. Works on anybody's factual clips:

    mine = load_clips("my/clips")
    pairs = split_pairs(sorted(mine.labels()), seed=0)
    new = [make_grid(mine.root, i, j) for split in ("train", "test")
           for i, j in choose_swaps(mine.select(split, "factual"), pairs.of(split), rounds=2)]
    save_clips(mine.root, [*mine.clips, *(c for g in new for c in g.clips)], [g.grid for g in new], mine.manifest)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.feature_extraction.text import TfidfVectorizer

from data.clips import Clip, Grid
from data.media import OTHER_HASH, MediaError, mux, stream_hashes
from data.splits import Pair, pair

MAX_SIMILARITY = 0.5


def similarities(captions: Sequence[str]) -> np.ndarray:
    """Cosine of the TF-IDF vectors of every two captions, float (n, n) in [0, 1]; English stop words do not count."""
    if not any(c.strip() for c in captions):
        return np.zeros((len(captions), len(captions)))
    vectors = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b\w+\b").fit_transform(captions)
    return np.clip((vectors @ vectors.T).toarray(), 0.0, 1.0)


def assign(similarity: np.ndarray, allowed: np.ndarray, seed: int = 0) -> list[tuple[int, int]]:
    """The one-to-one assignment row -> column with as many allowed cells as possible and, of these, the least similarity.

    Rows for which no column is left are not in the result. Noise too small to outweigh real differences breaks ties by seed.
    """
    noise = np.random.default_rng([seed, 2]).random(similarity.shape) * 1e-9
    never = len(similarity) + 1.0  # one forbidden cell costs more than all allowed ones together
    rows, columns = linear_sum_assignment(np.where(allowed, similarity + noise, never))
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if allowed[i, j]]


def choose_swaps(
    clips: Sequence[Clip], pairs: Collection[Pair] | None = None, rounds: int = 1, seed: int = 0, max_similarity: float = MAX_SIMILARITY
) -> list[tuple[Clip, Clip]]:
    """Pairs of clips to swap. No unordered pair of clips comes twice, whatever the number of rounds.

    `pairs`: the unordered class pairs that may meet (None: all different classes); both swaps must be in it. Two clips whose captions
    (seen and heard) are more similar than `max_similarity` are never swapped. Each round gives at most len(clips) pairs; fewer if the
    assignment pairs i with j and j with i, or when a clip has no partner left.
    """
    if len(clips) < 2:
        return []
    captions = [f"{c.seen} {c.heard}" for c in clips]
    unique = sorted(set(captions))
    where = np.array([unique.index(c) for c in captions])
    similarity = similarities(unique)[np.ix_(where, where)]

    def may(a: str, b: str) -> bool:
        return a != b and (pairs is None or pair(a, b) in pairs)

    looks, sounds = [c.video_label for c in clips], [c.audio_label for c in clips]
    known = {(a, b): may(a, b) for a in set(looks) for b in set(sounds)}
    conflict = np.array([[known[a, b] for b in sounds] for a in looks])
    allowed = conflict & conflict.T & (similarity <= max_similarity)
    chosen = []
    for number in range(rounds):
        for i, j in assign(similarity, allowed, seed * 1000 + number):
            if allowed[i, j]:
                allowed[i, j] = allowed[j, i] = False
                chosen.append((clips[i], clips[j]))
    return chosen


def make_swap(root: Path, video: Clip, audio: Clip, out: Path | None = None) -> Clip:
    """Mux the picture of one clip with the sound of the other into `out` (default: `root`) / media / <id>.mp4; the new clip.

    Both streams are those of the two clips, as their hashes say, whole: where lengths differ, one of them ends before the other, in the
    swap as in the mirror. Raises MediaError, and leaves no file, where a copy cannot be the same.
    """
    name = f"{video.id}__{audio.id}"
    out = out or root
    (out / "media").mkdir(parents=True, exist_ok=True)
    made = out / "media" / f"{name}.mp4"
    video_sha256, audio_sha256 = mux(root / video.file, root / audio.file, made)
    for number, (clip, copy, known) in enumerate(((video, video_sha256, video.video_sha256), (audio, audio_sha256, audio.audio_sha256))):
        if copy != known:
            made.unlink()
            raise MediaError(_differs(root / clip.file, known, stream_hashes(root / clip.file)[number], "sound" if number else "picture"))
    return replace(
        video,
        id=name,
        file=f"media/{name}.mp4",
        condition="counterfactual",
        audio_label=audio.audio_label,
        heard=audio.heard,
        audio_source=audio.audio_source,
        audio_rendering=audio.audio_rendering,
        video_sha256=video_sha256,
        audio_sha256=audio_sha256,
    )


def _differs(file: Path, known: str, found: str, what: str) -> str:
    """Why a stream in a swap is not the one in the clip's row."""
    if known != found:
        return f"{file}: its {what} is not the one of its hash in clips.jsonl ({OTHER_HASH})"
    return (
        f"{file}: its {what} would be another in an mp4 (times or trimming are written otherwise there), so a grid would not hold the same one "
        f'twice. Copy it once, mux("{file}", "{file}", "NEW.mp4"), and use that as the factual clip.'
    )


class Swapped(NamedTuple):
    """The two new clips of a grid, and the grid."""

    clips: tuple[Clip, Clip]
    grid: Grid


def make_grid(root: Path, i: Clip, j: Clip, out: Path | None = None) -> Swapped:
    """Both swaps of two factual clips of one split, muxed, and the 2x2 grid they make. Where one fails, neither file is left."""
    ox = make_swap(root, i, j, out)
    try:
        xo = make_swap(root, j, i, out)
    except BaseException:
        ((out or root) / ox.file).unlink(missing_ok=True)
        raise
    return Swapped((ox, xo), Grid(f"{i.id}__{j.id}", i.split, i.id, ox.id, xo.id, j.id))
