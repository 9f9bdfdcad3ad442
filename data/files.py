"""Writing so that nobody ever finds half a file: a temporary name, fsync, rename; and what every command line does first."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

OURS = r"(data|models|analysis|train|benchmarks|__main__)(\.|$)"


def quiet_libraries() -> None:
    """On a command line, warnings of libraries about their own future are noise between our lines; ours are shown."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("default", category=category, module=OURS)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` atomically; the old content stays until the new one is safely on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_text` of indented JSON. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The whole lines of a JSON-lines file; a last line that a killed process left unfinished is dropped. Empty if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def fsync_folder(folder: Path) -> None:
    """Force a folder's files and its own entries to disk, so that a rename after it cannot arrive before them."""
    for path in [*sorted(folder.rglob("*")), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
