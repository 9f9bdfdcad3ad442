"""Which clips of a folder cannot be used: every file is decoded, both streams, as a model would read them, and none is left unnamed.

clips = load_clips("my/clips")
bad = check_media(clips)                              # [(clip, reason), …], in the folder's order
clips = leave_out(clips, ["c3", "c7"])                # the folder without these clips and their grids; media files stay
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.clips import Clip, Clips, DataError, load_clips, save_clips

NAMED = 20  # bad clips that a refusal names one by one
FPS = 2.0  # frames a second that are looked at; to find them every picture is decoded


def check_media(clips: Clips, workers: int | None = None, done: Callable[[], object] = lambda: None) -> list[tuple[Clip, str]]:
    """Decode every clip and compare its streams with the hashes in the table: the clips that cannot be used, each with the reason.

    A silent or missing sound makes a clip bad unless it is muted. `workers`: threads, by default one a core. `done()` after each clip.
    """

    def look(clip: Clip) -> str | None:
        try:
            return _problem(clips, clip)
        finally:
            done()

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        found = list(pool.map(look, clips.clips))
    return [(clip, reason) for clip, reason in zip(clips.clips, found, strict=True) if reason is not None]


def _problem(clips: Clips, clip: Clip) -> str | None:
    """What is wrong with a clip's file, in a sentence, or None. Whatever a decoder throws is a fault of this file, not of the check."""
    from data.media import OTHER_HASH, read_audio, read_video, stream_hashes

    path = clips.path(clip)
    try:
        read_video(path, FPS)
        read_audio(path, muted=clip.condition == "muted")
        hashes = stream_hashes(path)
    except DataError as error:
        return str(error)
    except Exception as error:
        return f"{path} cannot be decoded ({type(error).__name__}: {str(error).strip() or 'no reason given'})."
    for kind, now, then in zip(("video", "audio"), hashes, (clip.video_sha256, clip.audio_sha256), strict=True):
        if now != then:
            return f"{path} holds another {kind} stream than clips.jsonl says (its hash begins with {now[:8]}, not {then[:8]}): {OTHER_HASH}."
    return None


def refusal(root: Path, bad: Sequence[tuple[Clip, str]], of: int) -> DataError:
    """One sentence a bad clip, the first `NAMED` of them, and what to do about all, in one line."""
    reasons = [f"({number}) {reason}" if len(bad) > 1 else reason for number, (_, reason) in enumerate(bad[:NAMED], 1)]
    first = f"{root}: {len(bad)} of {of} clips cannot be used. {' '.join('; '.join(reasons).split())}"
    if len(bad) > NAMED:
        return DataError(f"{first}; and {len(bad) - NAMED} more. `python -m data check {root}` names all, and says how to leave them out.")
    return DataError(f"{first} Mend them, or leave them out with `{way_out(root, bad)}`: what was measured on the others is kept.")


def way_out(root: Path, bad: Sequence[tuple[Clip, str]]) -> str:
    """The command that takes the bad clips out of the folder."""
    return f"python -m data check {root} --leave-out {' '.join(clip.id for clip, _ in bad)}"


def leave_out(clips: Clips, ids: Collection[str]) -> Clips:
    """The folder without these clips and without the grids that they are in; its tables are written anew, media files stay. Raises DataError for an
    id that is not there, and where no clip would be left.
    """
    if unknown := sorted(set(ids) - {clip.id for clip in clips.clips}):
        raise DataError(f'{clips.root / "clips.jsonl"} has no clip "{unknown[0]}".')
    kept = [clip for clip in clips.clips if clip.id not in ids]
    if not kept:
        raise DataError(f"{clips.root}: no clip would be left.")
    grids = [grid for grid in clips.grids if not {grid.oo, grid.ox, grid.xo, grid.xx} & set(ids)]
    save_clips(clips.root, kept, grids, clips.manifest)
    return load_clips(clips.root)
