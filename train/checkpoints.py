"""Checkpoints that are either whole or not there.

    checkpoints/step_000050/
        adapter/         PEFT format: adapter_config.json, adapter_model.safetensors; the moving average, where the run keeps one (lora.ema)
        state/           optimizer.safetensors, optimizer.json, answers.json (what the frozen teacher was heard to say), ema.safetensors
                         (the average and the weights that training goes on with)
        manifest.json    step and sha256 of every file; written last
        findings.json    the diagnosis of this checkpoint, once it is done

Everything is written into `step_000050.partial`, forced to disk and renamed. There is no random state to keep: every step seeds its own
(train/loop.py), and the learning rate is a function of the step. Tensors are safetensors, the rest is JSON; nothing is pickled.
Under DeepSpeed the optimizer's state is split among processes and has a format of its own: accelerate writes it to state/ (`save_state`, without
the frozen weights), and only resuming reads it; adapter and manifest are as ever.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.files import fsync_folder, write_json
from models import AVLLM
from models.load import check_adapter_names
from train.batches import Answers
from train.ema import Ema

FORMAT = 1
NAME = re.compile(r"^step_(\d{6,})$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names the file and what to do."""


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.match(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint: its name should be step_ and at least six digits.")
    return int(match[1])


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    return sorted((p for p in folder.glob("step_*") if NAME.match(p.name) and (p / "manifest.json").is_file()), key=step_of)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    for pattern in ("step_*.partial", "step_*.deleted"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def save_checkpoint(
    folder: Path, step: int, model: AVLLM, optimizer: torch.optim.Optimizer, answers: Answers, accelerator: Accelerator, ema: Ema | None = None
) -> Path:
    """Write `folder/step_<step>` whole or not at all, and return it. Under DeepSpeed every process has to call this.

    Raises CheckpointError where the disk is full or cannot be written; nothing half-written is left behind.
    """
    final, partial = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    deepspeed, main = accelerator.distributed_type == DistributedType.DEEPSPEED, accelerator.is_main_process
    try:
        if main:
            if partial.exists():
                shutil.rmtree(partial)
            (partial / "state").mkdir(parents=True)
            with ema.applied() if ema else nullcontext():
                model.save_adapter(partial / "adapter")
        if deepspeed:
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial / "state"), exclude_frozen_parameters=True)
            accelerator.wait_for_everyone()
        if main:
            if not deepspeed:
                tensors, groups = _optimizer_state(model, optimizer)
                save_file(tensors, partial / "state" / "optimizer.safetensors")
                write_json(partial / "state" / "optimizer.json", groups)
            if ema:
                save_file(ema.state(), partial / "state" / "ema.safetensors")
            write_json(partial / "state" / "answers.json", [[*key, ids] for key, ids in answers.items()])
            files = {str(p.relative_to(partial)): _sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
            fsync_folder(partial)
            write_json(partial / "manifest.json", {"format": FORMAT, "step": step, "files": files})
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            fsync_folder(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written: {error}. Free space on that disk and start the same command again: it goes on from the checkpoint before."
        ) from None
    return final


def load_checkpoint(
    folder: Path, model: AVLLM, optimizer: torch.optim.Optimizer, accelerator: Accelerator, ema: Ema | None = None
) -> tuple[int, Answers]:
    """Put adapter, optimizer and average back as they were; returns step and answers. Raises CheckpointError for a damaged or foreign checkpoint."""
    manifest = check(folder)
    load_adapter(folder, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.load_state(str(folder / "state"), load_module_strict=False)  # it holds the trained weights only
    else:
        _restore_optimizer(model, optimizer, load_file(folder / "state" / "optimizer.safetensors"), _json(folder / "state" / "optimizer.json"))
    if ema:
        ema.restore(load_file(folder / "state" / "ema.safetensors"))
    answers: Answers = {(clip, question, cut): ids for clip, question, cut, ids in _json(folder / "state" / "answers.json")}
    return manifest["step"], answers


def load_adapter(folder: Path, model: AVLLM) -> None:
    """Put the weights of a checkpoint's adapter into the adapter that the model already has (`add_lora`)."""
    from peft import set_peft_model_state_dict

    check_adapter_names(model, folder / "adapter")
    set_peft_model_state_dict(model.thinker, load_file(folder / "adapter" / "adapter_model.safetensors"))


def check(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest; returns the manifest. Raises CheckpointError naming the file that differs."""
    manifest = _json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / 'manifest.json'} is not of format {FORMAT}. Delete {folder}; the run goes on from the checkpoint before.")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is missing or has changed. Delete {folder}; the run goes on from the checkpoint before.")
    return manifest


def rotate(folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; keep = -1 deletes none."""
    whole = whole_checkpoints(folder)
    for path in whole[: max(0, len(whole) - keep)] if keep > 0 else []:
        if path != best:
            doomed = path.with_name(path.name + ".deleted")  # a name that no reader takes for a checkpoint, whenever we are killed
            path.rename(doomed)
            shutil.rmtree(doomed)


def _optimizer_state(model: AVLLM, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors by `<what>.<parameter>`, and the settings of each parameter group with its parameters' names."""
    names = {id(p): name for name, p in model.trainable_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for parameter, state in optimizer.state.items():
        for what, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{what}.{names[id(parameter)]}"] = value.detach().cpu().contiguous().clone()
            else:
                scalars.setdefault(names[id(parameter)], {})[what] = value
    groups = [{k: [names[id(p)] for p in v] if k == "params" else v for k, v in group.items()} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "scalars": scalars}


def _restore_optimizer(model: AVLLM, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], saved: dict) -> None:
    parameters = dict(model.trainable_parameters())
    names = {id(p): name for name, p in parameters.items()}
    if [g["params"] for g in saved["groups"]] != [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]:
        raise CheckpointError("The optimizer's saved state is of other parameters than those trained now.")
    optimizer.state.clear()
    for key, value in tensors.items():
        what, name = key.split(".", 1)
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU, moments beside the parameter.
        optimizer.state[parameter][what] = value.clone() if what == "step" else value.to(parameter.device)
    for name, scalars in saved["scalars"].items():
        optimizer.state[parameters[name]].update(scalars)
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items() if k != "params"})


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Delete {path.parent}; the run goes on from the checkpoint before.") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
