"""Build a clip folder, or check one.

    python -m data --out runs/clips [--classes dog cat ...] [--renderings.train 12] [--render.size 168]
    python -m data check runs/clips [--leave-out ID ...]

Exit code 2 where the input cannot be used, and where a check finds clips that cannot be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from tyro.conf import Positional

from data.build import DataConfig, build
from data.check import check_media, leave_out, way_out
from data.clips import Clips, DataError, load_clips
from data.files import quiet_libraries
from data.media import OTHER_HASH


@dataclass(frozen=True)
class Arguments:
    """Build real mp4 clips with known labels from the embedded pictures and recordings, with their counterfactuals.

    `python -m data check FOLDER` decodes all clips of a folder instead and names those that cannot be used.
    """

    out: Path
    """The folder to build. If it is there and of the same settings, nothing is done."""
    workers: int = 2
    """Threads that render and write."""
    config: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)

    def run(self) -> int:
        """Build, say what is there."""
        clips = build(self.config, self.out, self.workers)
        conditions = {c: len(clips.select(condition=c)) for c in ("factual", "counterfactual", "muted", "blanked")}
        print(f"{clips.root}: {len(clips.clips)} clips ({', '.join(f'{n} {c}' for c, n in conditions.items())}), {len(clips.grids)} grids")
        _tell_shared(clips)
        return 0


def _tell_shared(clips: Clips) -> None:
    """Say how many sources of the test and of the unseen split the train split has too."""
    for split in ("test", "unseen"):
        shared = clips.shared_sources(split)
        told = " and ".join(f"{n} of {of} {what}" for what, (n, of) in zip(("pictures", "recordings"), shared.values(), strict=True))
        print(f"{split}: the train split has {told} too")


@dataclass(frozen=True)
class Check:
    """Decode both streams of every clip, compare them with the hashes in clips.jsonl, and name every clip that cannot be used."""

    folder: Positional[Path]
    """The clip folder."""
    leave_out: tuple[str, ...] = ()
    """Ids of clips to take out of the folder's tables first, with the grids they are in. Media files stay."""
    workers: int | None = None
    """Threads that decode. None: one a core."""

    def run(self) -> int:
        """Check; a table of what is bad."""
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers is {self.workers}. Set it to 1 or more.")
        clips = load_clips(self.folder)
        if self.leave_out:
            clips = leave_out(clips, self.leave_out)
        with tqdm(total=len(clips.clips), desc="checking clips", unit="clip", leave=False, dynamic_ncols=True) as bar:
            bad = check_media(clips, self.workers, bar.update)
        if not bad:
            print(f"{clips.root}: all {len(clips.clips)} clips can be used.")
            _tell_shared(clips)
            return 0
        known = all(OTHER_HASH in reason for _, reason in bad)
        if len(bad) == len(clips.clips) and known:  # nothing is wrong with any one of them
            print(f"error: {clips.root}: no clip's streams are those of its hashes in clips.jsonl: {OTHER_HASH}.", file=sys.stderr)
            return 2
        table = Table("clip", "split", "condition", "file", "why it cannot be used")
        for clip, reason in bad:
            table.add_row(clip.id, clip.split, clip.condition, clip.file, reason.replace(f"{clips.root}/", ""))
        console = Console()
        console.print(table)
        print(f"error: {clips.root}: {len(bad)} of {len(clips.clips)} clips cannot be used. ", end="", file=sys.stderr)
        if len(bad) == len(clips.clips):
            print("None would be left without them: mend the files, or build the folder again.", file=sys.stderr)
            return 2
        print("Mend them, or leave them out:", file=sys.stderr)
        print(way_out(clips.root, bad), file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do it; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    quiet_libraries()
    try:
        if given[:1] == ["check"]:
            return tyro.cli(Check, prog="python -m data check", args=given[1:]).run()
        return tyro.cli(Arguments, prog="python -m data", args=given).run()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename or 'a file'} cannot be read or written ({error.strerror or error}). Mend that, then run again.", file=sys.stderr
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
