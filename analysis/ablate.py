"""Runs of an ablation: arms × seeds, each its own `accelerate launch -m train`, and what they found.

    python -m analysis ablate configs/ablations/headline.yaml configs/ablations/layers.yaml --out runs/ablations --jobs 2

A set is a YAML file:

    title: Which teacher                      # heading of the result
    notes: …                                  # optional: a paragraph below it
    base: configs/organism.yaml               # settings of a training run; paths are as seen from the working directory
    common: {schedule.checkpoint_every: 200}  # on top of it, for all arms; dotted keys or nested ones
    seeds: [0, 1, 2]
    reference: plan                           # the arm that the others are compared with
    arms:
      plan: {description: what the diagnosis asks for, set: {}}
      no_mirror: {description: without the mirror term, set: {loss.mirror: 0}}

`--set key=value` comes between `common` and what an arm sets itself. Below `--out`:

    runs/<arm>_<hash of its settings>/seed_0.yaml, seed_0.log, seed_0/      settings, output and run folder (see train/loop.py) of each run
    diagnoses/                                                              of the untrained model, shared by all runs
    ablation.json, ablation.md, ablation.html                               the result (analysis/ablation.py)

An arm is known by its settings: the same one in two sets, or in a later call, is the same run. A run with findings after training is done and is not
started again, even when the code has changed since (the result then says which runs are of other code; delete them); any other goes on where it was.
A run that fails is reported with the end of its log, and the others go on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import yaml
from tqdm import tqdm

from analysis.findings import Findings, FindingsError
from analysis.settings import SettingsError
from data.files import write_text

OURS = ("run.folder", "run.seed", "run.diagnoses", "run.overwrite")  # settings that `ablate` makes, or that would undo what is done
FREE = (*OURS, "run.threads", "run.tracker", "run.keep")  # settings that do not make another run; nor do batch sizes of diagnoses
UNTRAINED = ("plan", "before", "selection")  # findings of the untrained model
PATIENCE = 20.0  # seconds that a run has to end by itself when it is told to


class AblateError(SettingsError):
    """A set that cannot be run. The message names the file and the key."""


@dataclass(frozen=True)
class Arm:
    """One recipe. `settings` are what training is given, flat with dotted keys, without those that `ablate` makes."""

    name: str
    description: str
    changes: dict[str, Any]  # what the set says of it
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for the same settings."""
        made = {key: value for key, value in sorted(self.settings.items()) if key not in FREE and not key.endswith(".batch")}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ArmSet:
    """A YAML file, read."""

    path: Path
    title: str
    notes: str
    reference: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]


@dataclass
class Job:
    """One arm with one seed, and how it stands."""

    arm: Arm
    seed: int
    folder: Path  # the run folder; settings and log lie beside it
    problem: str = ""  # why it failed, with the end of its log
    process: subprocess.Popen | None = None
    log: IO[bytes] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """As the bar and messages call it."""
        return f"{self.arm.name} seed {self.seed}"

    @property
    def config(self) -> Path:
        """The settings it is started with."""
        return self.folder.with_suffix(".yaml")

    @property
    def output(self) -> Path:
        """What it prints."""
        return self.folder.with_suffix(".log")


# ---------------------------------------------------------------- sets


def load_set(path: Path, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None, only: Sequence[str] | None = None) -> ArmSet:
    """Read a set, with `--set`, `--seeds` and `--arms` applied. Raises AblateError naming the file and the key."""
    raw = _mapping(path)
    allowed = {"title", "notes", "base", "common", "seeds", "reference", "arms"}
    if unknown := sorted(set(raw) - allowed):
        raise AblateError(f"{path}: unknown key {unknown[0]!r}; a set has {', '.join(sorted(allowed))}.")
    for key in ("base", "reference", "arms"):
        if not raw.get(key):
            raise AblateError(f"{path} has no {key!r}; see the top of analysis/ablate.py for what a set looks like.")
    if not isinstance(raw["arms"], dict) or not all(isinstance(arm or {}, dict) for arm in raw["arms"].values()):
        raise AblateError(f"{path}: arms should hold `name: {{description: …, set: {{…}}}}` lines.")
    for where, value in (("base", raw["base"]), ("reference", raw["reference"])):
        if not isinstance(value, str):
            raise AblateError(f"{path}: {where} is {value!r}, but should be text.")
    for where, value in (("common", raw.get("common")), *((f"arms.{name}.set", (arm or {}).get("set")) for name, arm in raw["arms"].items())):
        if value is not None and not isinstance(value, dict):
            raise AblateError(f"{path}: {where} should hold `key: value` settings, not {value!r}.")
    base = Path(raw["base"])
    if not base.is_file():
        raise AblateError(f"{path}: base {base} is no file, seen from {Path.cwd()}. Start the command where that path leads to it.")
    shared = flat(_mapping(base)) | flat(raw.get("common") or {})
    for text in overrides:
        shared |= _override(text)
    arms = []
    for name, said in raw["arms"].items():
        said = said or {}
        if unknown := sorted(set(said) - {"description", "set"}):
            raise AblateError(f"{path}: arm {name} has an unknown key {unknown[0]!r}; it has description and set.")
        changes = flat(said.get("set") or {})
        settings = shared | changes
        if made := [key for key in OURS if key in changes or key in flat(raw.get("common") or {})]:
            raise AblateError(f"{path}: arm {name} sets {made[0]}, which `ablate` sets itself. Leave it out.")
        for key in OURS:
            settings.pop(key, None)
        arms.append(Arm(str(name), str(said.get("description") or ""), changes, settings))
    if str(raw["reference"]) not in [arm.name for arm in arms]:
        raise AblateError(f"{path}: reference {raw['reference']!r} is none of its arms: {', '.join(arm.name for arm in arms)}.")
    given = raw.get("seeds", [0]) if seeds is None else seeds
    if (
        not isinstance(given, (list, tuple))
        or not given
        or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in given)
        or len(set(given)) < len(given)
    ):
        raise AblateError(f"{path}: seeds are {given!r}: give different whole numbers, for instance [0, 1, 2].")
    chosen = tuple(arm for arm in arms if only is None or arm.name in only)
    return ArmSet(path, str(raw.get("title") or path.stem), str(raw.get("notes") or ""), str(raw["reference"]), tuple(given), chosen)


def check_settings(one: ArmSet) -> None:
    """Read the settings of every arm with every seed as training will, before the first run. Raises AblateError naming set, arm and key."""
    from train.config import ConfigError, config_of  # the one place that knows them; nothing else of training is needed here

    for arm in one.arms:
        for seed in one.seeds:
            try:
                config_of(nested(arm.settings | {"run.seed": seed}))
            except ConfigError as error:
                raise AblateError(f"{one.path}: arm {arm.name}: {error}") from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys; keys that are dotted already stay."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parts, last = key.split(".")
        at = tree
        for part in parts:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise AblateError(f"{key}: {part} is a value and a section at once.")
        at[last] = value
    return tree


def _mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AblateError(f"{path}: no such file. Ready-made sets are in configs/ablations/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AblateError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise AblateError(f"{path} should hold `key: value` lines.")
    return raw


def _override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise AblateError(f"--set {text}: write key=value, for instance schedule.steps=200.")
    if key.strip() in OURS:
        raise AblateError(f"--set {key.strip()}: `ablate` sets that itself.")
    try:
        return flat({key.strip(): yaml.safe_load(value)})
    except yaml.YAMLError as error:
        raise AblateError(f"--set {text}: the value cannot be read as YAML ({error}).") from None


# ---------------------------------------------------------------- runs


def plan_jobs(sets: Sequence[ArmSet], out: Path) -> dict[tuple[str, int], Job]:
    """The runs of all sets, each once: (key of the arm, seed) -> job. Runs of an earlier call are found again under whatever name they had."""
    jobs: dict[tuple[str, int], Job] = {}
    for one in sets:
        for arm in one.arms:
            for seed in one.seeds:
                if (arm.key, seed) not in jobs:
                    earlier = sorted((out / "runs").glob(f"*_{arm.key}"))
                    home = earlier[0] if earlier else out / "runs" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', arm.name)}_{arm.key}"
                    jobs[arm.key, seed] = Job(arm, seed, home / f"seed_{seed}")
    return jobs


def is_done(job: Job) -> bool:
    """Whether the run has its findings after training, and was made with these settings."""
    try:
        Findings.load(job.folder / "findings" / "after.json")
        saved = flat(_mapping(job.folder / "config.yaml"))
    except (FindingsError, AblateError):
        return False
    wanted = {key: value for key, value in job.arm.settings.items() if key not in FREE and not key.endswith(".batch")}
    return saved.get("run.seed") == job.seed and all(_alike(saved.get(key), value) for key, value in wanted.items())


def _alike(saved: Any, wanted: Any) -> bool:
    """Whether training read `wanted` as `saved`. YAML 1.1 takes 1e-3 for text."""
    if isinstance(saved, float) and isinstance(wanted, str):
        try:
            return float(wanted) == saved
        except ValueError:
            return False
    return saved == wanted


def run_jobs(jobs: Sequence[Job], out: Path, at_once: int = 1, accelerate_config: Path | None = None) -> None:
    """Run what is not done, `at_once` at a time. A job that fails gets a `problem`. When this is interrupted the children are ended first."""
    waiting = [job for job in jobs if not is_done(job)]
    running: list[Job] = []
    shown = ""
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="ablation", unit="run", dynamic_ncols=True)
    try:
        with _ended_by_signals():
            while waiting or running:
                for job in [job for job in waiting if len(running) < at_once]:
                    if len(running) < at_once and _may_start(job, running, jobs) and _start(job, out, at_once, accelerate_config):
                        waiting.remove(job)
                        running.append(job)
                for job in [job for job in running if job.process is None or job.process.poll() is not None]:
                    running.remove(job)
                    _finish(job)
                    if job.problem:
                        bar.write(f"{job.name} failed: {job.problem}", file=sys.stderr)
                    bar.update()
                said = "; ".join(map(progress, running)) or ("another process works on these runs" if waiting else "")
                stages = said if sys.stderr.isatty() else re.sub(r"step \d+", "step", said)  # a log gets a line a stage
                if stages != shown:
                    bar.set_postfix_str(said)
                shown = stages
                time.sleep(0.5)
    finally:
        _end(running)
        bar.close()


def command(config: Path, accelerate_config: Path | None = None) -> list[str]:
    """What starts one run. Without an accelerate config: one process, whatever `accelerate config` was told on this machine about several."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if accelerate_config is not None:
        launch += ["--config_file", str(accelerate_config)]
    else:
        launch += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, "-m", "train", "--config", str(config)]


def progress(job: Job) -> str:
    """What a run does now, e.g. `plan seed 0: step 120/390`."""
    steps = "?"
    if (plan := job.folder / "plan.json").is_file():
        steps = str(json.loads(plan.read_text())["steps"]["value"])
    findings = job.folder / "findings"
    metrics = job.folder / "metrics.jsonl"
    taken = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    if taken and str(taken) == steps:
        return f"{job.name}: last diagnoses"
    if taken or (findings / "selection.json").exists():
        return f"{job.name}: step {taken}/{steps}"
    return f"{job.name}: first diagnoses"


def _may_start(job: Job, running: Sequence[Job], jobs: Sequence[Job]) -> bool:
    """Runs share clips and diagnoses of the untrained model: while the first of them makes these, those that would make the same wait."""
    alike = [other for other in jobs if _shared(other.arm) == _shared(job.arm)]
    made = any(all((other.folder / "findings" / f"{name}.json").exists() for name in UNTRAINED) for other in alike)
    return made or not any(other in running for other in alike)


def _shared(arm: Arm) -> str:
    """What the diagnoses of the untrained model depend on."""
    kept = {key: value for key, value in arm.settings.items() if key.startswith(("model.", "diagnosis.", "data.clips", "data.build"))}
    return json.dumps(kept, sort_keys=True)


def _start(job: Job, out: Path, at_once: int, accelerate_config: Path | None) -> bool:
    """Start a run. False while another process works on it (one that a killed `ablate` left behind, or another call)."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.output.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # children hold it with their output, so it outlives us and ends with them
    except BlockingIOError:
        log.close()
        return False
    if is_done(job):  # meanwhile, by that other process
        log.close()
        return True
    threads = job.arm.settings.get("run.threads") or max(1, (psutil.cpu_count(logical=False) or 1) // at_once)
    made = {"run.folder": str(job.folder), "run.seed": job.seed, "run.diagnoses": str(out / "diagnoses"), "run.threads": threads}
    write_text(job.config, yaml.safe_dump(nested(job.arm.settings | made), sort_keys=False))
    log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {job.name}\n".encode())
    log.flush()
    line = command(job.config, accelerate_config)
    job.process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    log.close()
    return True


def _finish(job: Job) -> None:
    """Say what went wrong, if anything did."""
    if job.process is None or is_done(job):
        return
    text = job.output.read_text(encoding="utf-8", errors="replace") if job.output.is_file() else ""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    said = [line for line in lines if line.startswith("error: ")]
    tail = said[-1:] or [line for line in lines if line][-12:]
    code = job.process.returncode
    job.problem = f"{'ended by signal ' + str(-code) if code < 0 else f'exit code {code}'}; {job.output} ends with: " + "\n    ".join(tail)


def _end(running: Sequence[Job]) -> None:
    """End runs that still work, with everything they started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [job.process for job in running if job.process is not None and _alive(job.process.pid)]
        for process in left:
            os.killpg(process.pid, number)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(_alive(process.pid) for process in left):
            for process in left:
                process.poll()
            time.sleep(0.05)


def _alive(group: int) -> bool:
    """Whether a process group has members that are not zombies."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM is like Ctrl-C: children are ended on the way out."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever has that one looks after signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
