"""Build a clip folder: python -m data --out runs/clips [--classes dog cat ...] [--renderings.train 12] [--render.size 168]"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from data.build import DataConfig, build
from data.clips import DataError


@dataclass(frozen=True)
class Arguments:
    """Build real mp4 clips with known labels from the embedded pictures and recordings, with their counterfactuals."""

    out: Path
    """The folder to build. If it is there and of the same settings, nothing is done."""
    workers: int = 2
    """Threads that render and write."""
    config: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)


def main() -> None:
    """Read the command line, build, say what is there."""
    arguments = tyro.cli(Arguments, prog="python -m data")
    try:
        clips = build(arguments.config, arguments.out, arguments.workers)
    except DataError as error:
        sys.exit(f"error: {error}")
    conditions = {c: len(clips.select(condition=c)) for c in ("factual", "counterfactual", "muted", "blanked")}
    print(f"{clips.root}: {len(clips.clips)} clips ({', '.join(f'{n} {c}' for c, n in conditions.items())}), {len(clips.grids)} grids")
    for split in ("test", "unseen"):
        shared = clips.shared_sources(split)
        told = " and ".join(f"{n} of {of} {what}" for what, (n, of) in zip(("pictures", "recordings"), shared.values(), strict=True))
        print(f"{split}: the train split has {told} too")


if __name__ == "__main__":
    main()
