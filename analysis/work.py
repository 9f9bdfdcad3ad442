"""Who makes which visit, and where its records are kept: so that several processes share a diagnosis and a killed one goes on where it was.

    work = Work(Path("before.json.work"), key, PartialState())       # PartialState: torchrun or accelerate launch; None: this process alone
    records = work.records("visits", told, lambda i: measure(jobs[i]))    # all records, in order, on every process

Job i is made by process i modulo their number. Jobs are formed before anyone knows how many processes there are, so findings do not depend on
it. A record is written to a temporary name and renamed, one safetensors file a job, arrays as tensors and all else as JSON. Its name is a hash of
the key of the diagnosis (weights, settings, code, threads) and of what the job is told to depend on, its clips above all: where another clip is
taken out of the folder, the record is still there; where anything of its own is another, it is measured anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from analysis.tally import Record
from models import AVLLM

Records = dict[str, Record]  # tally name -> what it measured on one job


class Work:
    """The jobs of one diagnosis. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None, key: Mapping[str, Any], processes: PartialState | None = None):
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.processes = processes
        self.rank: int = processes.process_index if processes else 0
        self.world: int = processes.num_processes if processes else 1

    def mine(self, n: int) -> range:
        """Which of n jobs this process makes."""
        return range(self.rank, n, self.world)

    def missing(self, stage: str, jobs: Sequence[Any]) -> list[int]:
        """Which jobs of this process are not on disk."""
        return [i for i in self.mine(len(jobs)) if self._load(self._file(stage, jobs[i])) is None]

    def records(
        self, stage: str, jobs: Sequence[Any], measure: Callable[[int], Records], done: Callable[[int], None] = lambda i: None
    ) -> list[Records]:
        """The records of all jobs, in order, on every process; those on disk are not measured again. `done(i)` after each job of this process.

        jobs: for each what, besides the key, its record depends on, as JSON can hold it.
        """
        made: dict[int, Records] = {}
        for i in self.mine(len(jobs)):
            file = self._file(stage, jobs[i])
            found = self._load(file)
            if found is None:
                # In the layout that comes back from the disk and from other processes: numpy sums in the order of memory, which moves last digits.
                found = {name: {f: _plain(v) for f, v in record.items()} for name, record in measure(i).items()}
                self._save(file, found)
            made[i] = found
            done(i)
        if self.world > 1:
            made = dict(gather_object(list(made.items())))
        return [made[i] for i in range(len(jobs))]

    def _file(self, stage: str, job: Any) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(json.dumps([self.key, job], sort_keys=True, default=str).encode()).hexdigest()
        return self.folder / f"{stage}_{name[:24]}.safetensors"

    def _save(self, file: Path | None, records: Records) -> None:
        if file is None:
            return
        arrays, values = {}, dict[str, dict[str, Any]]()
        for name, record in records.items():
            values[name] = {}
            for field, value in record.items():
                if isinstance(value, np.ndarray):
                    arrays[f"{name}\n{field}"] = value
                else:
                    values[name][field] = value
        partial = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(arrays, partial, {"key": self.key, "values": json.dumps(values)})
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{file} cannot be written ({error}). Free some space and give the same command again: it goes on where it was.") from None

    def _load(self, file: Path | None) -> Records | None:
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, "np") as opened:
                notes = opened.metadata() or {}
                if notes.get("key") != self.key:
                    return None
                records: Records = json.loads(notes["values"])
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    tally, _, field = name.partition("\n")
                    records[tally][field] = opened.get_tensor(name)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # damaged: measured again
        return records


def _plain(value: Any) -> Any:
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value


def weights_hash(model: AVLLM) -> str:
    """sha256 of every parameter's name and bytes, adapters included."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.thinker.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_hash(*packages: str) -> str:
    """sha256 of the sources of these packages; without any named, of those that measure."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for package in packages or ("data", "models", "analysis") for p in (root / package).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
