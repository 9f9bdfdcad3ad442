"""Diagnoses of the untrained model that several runs share, so that each is measured once (ablations start many runs from one model).

    with shared(Path("runs/diagnoses"), key, accelerator) as (path, work):     # every process calls it alike
        if not path.exists(): ...                                              # measure, with `work` as the folder of its visits; write `path`

A diagnosis is named by what it depends on (`identity`): weights, clips, settings, code, versions. Of two runs that want the same one the second waits
until the first is done or dead (a lock that the kernel frees), and goes on where that one was. A run folder gets a copy and stays whole by itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from analysis.diagnose import DiagnoseSettings, choose, stated
from analysis.findings import NEUTRAL
from analysis.work import code_hash, weights_hash
from data.clips import Clips
from models import AVLLM, load_model


def identity(model: AVLLM, clips: Clips, settings: DiagnoseSettings, split: str) -> dict[str, Any]:
    """Everything that the findings of this diagnosis depend on, but where and how fast it is measured: runs at once have fewer threads."""
    base = load_model(model.base_path, dtype=model.dtype) if settings.shift != 0 and model.base_path is not None else None
    said = stated(model, clips, settings, split, choose(clips, split, settings))
    return {
        "stated": {name: value for name, value in said.items() if name not in NEUTRAL},
        "split": split,
        "clips": clips.hash_of(split),
        "names": [model.path, model.adapter, model.base_path],
        "weights": [weights_hash(model), weights_hash(base) if base else None],
        "code": code_hash(),
    }


@contextmanager
def shared(folder: Path, key: Mapping[str, Any], accelerator: Accelerator, waiting: Callable[[], None] = lambda: None) -> Iterator[tuple[Path, Path]]:
    """Alone with the diagnosis of this key: where its findings are or will be, and the folder for its visits until then.

    Held by the main process for all of its run's processes. `waiting` is called where another run holds it.
    """
    name = f"{key['split']}_{hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]}"
    path = folder / f"{name}.json"
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield path, folder / f"{name}.work"
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        accelerator.wait_for_everyone()
        yield path, folder / f"{name}.work"
