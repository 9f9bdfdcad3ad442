"""The whole job: clips, diagnosis, plan, fine-tuning, diagnosis after each checkpoint, before and after.

    accelerate launch train [--config configs/organism.yaml] [--schedule.lr 1e-3 …]

Every stage leaves a file in the run folder, written last and atomically, so its presence means that the stage is done; the same command started again
goes on after the last one:

    config.yaml  code.txt  weights.txt  findings/plan.json  plan.json  findings/before.json  findings/selection.json
    metrics.jsonl  checkpoints/step_000050/{adapter,state,manifest.json,findings.json}  best.json  findings/after.json
    comparison.json  report.html  adapter/ (the chosen one, with a model card)

A step depends on the settings, its number and the parameters only (batches, dropout and learning rate are functions of it), so a run that was
killed and went on ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from tqdm import tqdm

from analysis.compare import compare
from analysis.diagnose import DiagnoseSettings, SettingsError, check_sites, diagnose, used
from analysis.events import require_readable
from analysis.findings import Findings, FindingsError
from analysis.report import write_report
from analysis.tables import comparison_tables
from analysis.trajectory import headline
from analysis.visits import Subject
from analysis.work import code_hash, weights_hash
from data.build import build
from data.check import refusal
from data.clips import Clips, DataError, load_clips
from data.files import quiet_libraries, read_jsonl, write_json, write_text
from data.questions import question
from models import AVLLM, Cut, CutError, ModelError, load_model, self_check
from train.batches import ANCHORED, GATED, Answers, loss_terms, make_micro
from train.best import Best, choose_best, stop_reason
from train.card import save_chosen
from train.checkpoints import (
    CheckpointError,
    clear_leftovers,
    load_adapter,
    load_checkpoint,
    rotate,
    save_checkpoint,
    step_of,
    whole_checkpoints,
)
from train.config import Config, ConfigError, SchedulePart, differences, load_yaml, parse
from train.diagnoses import identity, shared
from train.ema import Ema
from train.objective import total
from train.plan import Plan, PlanError, make_plan, show
from train.sampling import Group, passages, sample_step, share, training_clips

T = TypeVar("T")
FALL = 0.3  # share of the steps in which a trapezoid falls
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}  # any of the modules will do


class TrainError(ValueError):
    """A run that cannot go on. The message says why and what to do."""


class StartError(TrainError):
    """A run that cannot be begun as it was asked for: nothing was measured or trained."""


def main(args: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code; what a user can mend ends in one line on stderr and 2 where the input cannot be used, 1 where the run
    failed on its way."""
    quiet_libraries()
    try:
        run(parse(args))
        return 0
    except (ConfigError, DataError, ModelError, CutError, FindingsError, SettingsError, StartError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PlanError, CheckpointError, TrainError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # a full disk, as a rule
        print(f"error: {error}. Mend that and start the same command again: it goes on where it was.", file=sys.stderr)
    return 1


def run(config: Config) -> Path:
    """Everything, from the first stage that is not done yet. Returns the run folder. Raises the errors that `main` prints."""
    schedule, part, folder = config.schedule, config.diagnosis, Path(config.run.folder)
    accelerator = Accelerator(
        cpu=joined_on_cpu(),
        gradient_accumulation_steps=schedule.accumulate,
        log_with=None if config.run.tracker == "none" else config.run.tracker,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # processes wait for each other in a diagnosis
    )
    if accelerator.num_processes != started():
        raise StartError(
            f"{started()} processes were started, but accelerate counts {accelerator.num_processes}, so each would train on its own. "
            f"On CPU start them with `torchrun --nproc_per_node {started()} train …`, without DeepSpeed."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise StartError(
            "DeepSpeed ZeRO-3 cannot train here: teacher and diagnosis need the whole model in every process (docs/gotchas.md). "
            "Use configs/deepspeed/zero2.json."
        )
    if accelerator.mixed_precision != "no" and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise StartError(
            f"accelerate was told mixed_precision {accelerator.mixed_precision}, which would reach the student and not its teacher or the diagnoses. "
            "Start with --mixed_precision no (accelerate_config.yaml has it) and say --model.dtype bfloat16 instead."
        )
    main_process, console = accelerator.is_main_process, Console(quiet=not accelerator.is_main_process)
    torch.set_num_threads(config.run.threads or default_threads(accelerator.num_processes))
    with accelerator.main_process_first():
        open_folder(folder, config, main_process)
        clips = open_clips(config)
    require_readable(clips)
    check_settings(config, clips, accelerator.num_processes)

    model = load_model(config.model.path, device=accelerator.device, dtype=getattr(torch, config.model.dtype))
    check_fit(config, model)
    check_weights(folder / "weights.txt", model)
    read_clips(config, model, clips, accelerator)
    if main_process:  # only now: what was refused has left no run behind that the mended settings would not fit
        note_begun(folder, config, model)
    sample = clips.select("train", "factual")[:1] or training_clips(clips, config.data.train_on)[:1]
    self_check(model, model.media(sample[0], clips.root), question("hear"))

    def stage(path: Path, make: Callable[[Path], Any], load: Callable[[Path], T], what: str) -> T:
        """Make `path` unless it is there; load it."""
        if main_process and not path.exists():
            console.print(f"[bold]{what}[/bold]")
            make(path)
        accelerator.wait_for_everyone()
        return load(path)

    def measure(path: Path, split: str, settings: DiagnoseSettings, what: str, work: Path) -> None:
        """Write findings to `path`, measured by all processes together."""
        console.print(f"[bold]{what}[/bold]")
        measured = diagnose(model, clips, settings, split, work=work, processes=PartialState())
        if main_process:
            measured.save(path)
            shutil.rmtree(work, ignore_errors=True)
        accelerator.wait_for_everyone()

    def there(path: Path) -> bool:
        """Whether the main process sees `path`: what all processes go by."""
        return broadcast_object_list([path.exists()])[0]

    def diagnosed(path: Path, split: str, settings: DiagnoseSettings, what: str, untrained: bool = False) -> Findings:
        """Findings at `path`, measured where they are not there yet; those of the untrained model copied where another run has measured them."""
        if not there(path) and untrained and config.run.diagnoses is not None:
            waiting = partial(console.print, f"Another run is at it: waiting. [bold]{what}[/bold]")
            key = identity(model, clips, settings, split)
            with shared(Path(config.run.diagnoses), key, accelerator, waiting) as (common, work):
                if there(common):
                    console.print(f"[bold]{what}[/bold]: in {common}")
                else:
                    measure(common, split, settings, what, work)
                if main_process:
                    write_text(path, common.read_text(encoding="utf-8"))
                accelerator.wait_for_everyone()
        elif not there(path):
            measure(path, split, settings, what, path.with_name(f"{path.name}.work"))
        findings = Findings.load(path)
        if findings.data_hash != clips.hash_of(split):
            raise TrainError(
                f"{path} was measured on other clips of the {split} split than {clips.root} holds now. "
                "Restore them, or start anew with --run.overwrite."
            )
        return findings

    def planned(path: Path) -> None:
        plan = make_plan(found, config)
        plan.lora_targets = {
            name: rank
            for layer, rank in zip(plan.lora_layers.value, plan.lora_ranks.value, strict=True)
            for name in model.lora_targets([layer], plan.lora_projections.value)
        }
        plan.save(path)

    found = diagnosed(folder / "findings" / "plan.json", "plan", part.plan, "Diagnosing the plan split", untrained=True)
    plan = stage(folder / "plan.json", planned, Plan.load, "Planning")
    show(plan, console)
    before = diagnosed(folder / "findings" / "before.json", "test", part.test, "Diagnosing the test split, before", untrained=True)
    start = diagnosed(folder / "findings" / "selection.json", "selection", part.selection, "Diagnosing the selection split, before", untrained=True)

    def chosen_after(checkpoint: Path) -> Best:
        """The best checkpoint once this one is diagnosed. Chosen once: that others are cleared away then must not change what is said of it."""
        path = folder / "best.json"
        if path.exists():
            best = Best.load(path)
            if best.newest == checkpoint.name and (folder / "checkpoints" / best.checkpoint).exists():
                return best
        best = choose_best(folder / "checkpoints", start, part.retention_bound, part.tie, plan.leads.value)
        if step_of(checkpoint) < plan.steps.value:
            diagnosed_steps = [step_of(Path(p.stem)) for p in (folder / "findings").glob("step_*.json")]
            best.stopped = stop_reason(best, diagnosed_steps, plan.stop.value)
        best.save(path)
        return best

    def diagnose_checkpoint(checkpoint: Path) -> Best:
        """Findings of a checkpoint (the adapter is the one in the model), the best so far, and the others cleared away."""
        model.adapter = str(checkpoint / "adapter")
        findings = diagnosed(checkpoint / "findings.json", "selection", part.selection, f"\nDiagnosing {checkpoint.name}")
        if main_process:
            stays = folder / "findings" / f"{checkpoint.name}.json"  # when the checkpoint is cleared away
            if not stays.exists():
                findings.save(stays)
            numbers = {f"selection/{name}": estimate.value for name, estimate in headline(findings).items() if estimate.value is not None}
            accelerator.log(numbers, step=step_of(checkpoint))
            best = chosen_after(checkpoint)
            rotate(folder / "checkpoints", config.run.keep, folder / "checkpoints" / best.checkpoint)
        accelerator.wait_for_everyone()
        return Best.load(folder / "best.json")

    named = {"name": folder.name}  # a run taken up again goes on under its name
    also = {"trackio": named | {"resume": "allow", "embed": False}, "wandb": named | {"dir": str(folder)}}
    accelerator.init_trackers("avbalance", config={"run": config.run.folder}, init_kwargs=also)
    processes = f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    console.print(f"[bold]Training[/bold] {plan.steps.value} steps{processes}, LoRA on {len(plan.lora_targets)} modules, weights {plan.weights()}")
    best = train(config, plan, model, clips, accelerator, diagnose_checkpoint)
    if best.stopped:
        console.print(best.stopped)
    console.print(f"[bold]Best checkpoint[/bold] {best.checkpoint}. {best.because}")

    chosen = folder / "checkpoints" / best.checkpoint
    load_adapter(chosen, model)
    model.adapter = str(chosen / "adapter")
    after = diagnosed(folder / "findings" / "after.json", "test", part.test, "Diagnosing the test split, after")
    if main_process:
        comparison = compare(before, after)
        comparison.save(folder / "comparison.json")
        console.print(*comparison_tables(comparison))
        steps = [(f"step {int(p.stem.split('_')[1])}", Findings.load(p)) for p in sorted((folder / "findings").glob("step_*.json"))]
        history = [("before", before), ("step 0", start), *steps, ("after", after)]
        write_report(folder / "report.html", history, clips.root, plan=dataclasses.asdict(plan), comparison=comparison)
        console.print(f"The page: {folder / 'report.html'}")
        console.print(f"The adapter, with a model card: {save_chosen(folder, chosen, config, plan, before, after)}")
    accelerator.end_training()
    return folder


def train(config: Config, plan: Plan, model: AVLLM, clips: Clips, accelerator: Accelerator, after_checkpoint: Callable[[Path], Best]) -> Best:
    """Fine-tune from the newest whole checkpoint, or from the start. Returns the best checkpoint. Raises TrainError on a loss that is not finite."""
    schedule, folder, steps = config.schedule, Path(config.run.folder), plan.steps.value
    every = steps if schedule.checkpoint_every == -1 else schedule.checkpoint_every
    weights, subject = plan.weights(), Subject(model, clips)

    torch.manual_seed(config.run.seed)
    model.add_lora(list(plan.lora_targets), config.lora.r, config.lora.alpha, config.lora.dropout, plan.lora_targets)
    if schedule.gradient_checkpointing:
        cast(Any, model.text_model).gradient_checkpointing_enable({"use_reentrant": False})
    model.precompute(training_clips(clips, config.data.train_on), clips.root, progress=accelerator.is_main_process)
    parameters = [p for _, p in model.trainable_parameters()]
    adamw = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        prepare_deepspeed(accelerator, config, model.decoder)
    decoder, optimizer = accelerator.prepare(model.decoder, adamw)
    ema = Ema(model.trainable_parameters(), config.lora.ema) if config.lora.ema else None

    def judged(step: int) -> Best:
        """The best checkpoint once that of `step` is diagnosed; what is diagnosed is what the checkpoint holds."""
        with ema.applied() if ema else nullcontext():
            return after_checkpoint(folder / "checkpoints" / f"step_{step:06d}")

    done, best = 0, None
    answers: Answers = {}
    if checkpoints := whole_checkpoints(folder / "checkpoints"):
        done, answers = load_checkpoint(checkpoints[-1], model, adamw, accelerator, ema)
        best = judged(done)
    if accelerator.is_main_process:
        forget_metrics_after(folder / "metrics.jsonl", done)
    bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=not accelerator.is_main_process, dynamic_ncols=True)
    for step in range(done, steps):
        if best is not None and best.stopped:
            break
        began = time.perf_counter()
        torch.manual_seed((config.run.seed * 1_000_003 + step) * 4096 + accelerator.process_index)  # dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, schedule)
        groups, sums = sample_step(clips, config, plan, step), dict.fromkeys(weights, 0.0)
        done_so_far: list[Group] = []
        counts = torch.zeros(len(weights), 4)  # answers taught, left out by the gate, asked for, cut off
        parts: list[dict[str, torch.Tensor]] = []
        for part in range(schedule.accumulate):
            mine = share(groups, accelerator.process_index, accelerator.num_processes, part, schedule.accumulate)
            done_so_far += mine
            micro = make_micro(model, mine, clips.root, plan, config.loss, answers, ema.applied if ema else None, subject.reader.names)
            decoder.train()
            with accelerator.accumulate(decoder):
                terms = loss_terms(model, decoder(**micro.inputs), micro, plan)
                accelerator.backward(total(terms, weights))
                norm = accelerator.clip_grad_norm_(parameters, schedule.clip) if accelerator.sync_gradients else None
                if accelerator.sync_gradients and norm is not None and not math.isfinite(norm):
                    raise_not_finite(folder, step, done_so_far, [*parts, terms])
                optimizer.step()
                optimizer.zero_grad()
            counts += torch.tensor([micro.counts()[name] for name in weights])
            parts.append({name: term.detach() for name, term in terms.items()})
            sums = {name: sums[name] + float(term.detach()) / schedule.accumulate for name, term in terms.items()}
        if ema:
            ema.update(step)
        means = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean").tolist()
        record = dict(zip(sums, means, strict=True)) | {"loss": sum(weights[n] * m for n, m in zip(sums, means, strict=True))}
        taught = shares(dict(zip(weights, accelerator.reduce(counts.to(accelerator.device), "sum").tolist(), strict=True)), config.loss.gate)
        if accelerator.is_main_process:
            line = {"step": step + 1, **record, **taught, "lr": learning_rate(step, steps, schedule), "grad_norm": float(norm or 0.0)}
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({**line, "seconds": round(time.perf_counter() - began, 3)}, allow_nan=False) + "\n")
            accelerator.log({f"train/{name}": value for name, value in line.items() if name != "step"}, step=step + 1)
        bar.update()
        bar.set_postfix_str(status(record | taught, best))
        if (step + 1) % every == 0 or step + 1 == steps:
            for others in gather_object([list(answers.items())]):  # so that what a process knows does not depend on when the run was killed
                answers.update({key: ids for key, ids in others if key not in answers})
            save_checkpoint(folder / "checkpoints", step + 1, model, adamw, answers, accelerator, ema)
            accelerator.wait_for_everyone()
            best = judged(step + 1)
            bar.set_postfix_str(status(record | taught, best))
    bar.close()
    if best is None:
        raise TrainError(f"{folder} has no checkpoint and no step is left to take. Start anew with --run.overwrite.")
    return best


# ---------------------------------------------------------------- small parts


def learning_rate(step: int, steps: int, schedule: SchedulePart) -> float:
    """The rate of step `step` (from 0) of `steps`: warm-up, then the shape. Never 0, so no step is lost."""
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        risen = (step + 1) / warm
        return schedule.lr * (risen if schedule.shape != "one_cycle" else 0.04 + 0.96 * (1 - math.cos(math.pi * risen)) / 2)
    if schedule.shape == "trapezoid":
        return schedule.lr * min(1.0, (steps - step) / max(1.0, FALL * steps))
    fallen = (step - warm) / max(1, steps - warm)
    return schedule.lr if schedule.shape == "constant" else schedule.lr * (1 + math.cos(math.pi * fallen)) / 2


def shares(counts: dict[str, Sequence[float]], gate: float) -> dict[str, float]:
    """Of each term's answers the share that was taught in a step (the others count as 0 in its mean): "taught/distillation" and so on. Where there is
    a gate, of the terms that it bears on, also the share that it left out: "gated/distillation". Of the terms that ask the frozen model, the share
    that it had not ended at loss.max_answer_tokens: "cut_off/distillation". Terms that asked for nothing are not there.

    counts: term -> answers taught, left out by the gate, asked for, ended at the limit, of all processes and parts.
    """
    asked = {name: count for name, count in counts.items() if count[2]}
    taught = {f"taught/{name}": count[0] / count[2] for name, count in asked.items()}
    ended = {f"cut_off/{name}": count[3] / count[2] for name, count in asked.items() if name in (*GATED, *ANCHORED)}
    return taught | ended | ({f"gated/{name}": count[1] / count[2] for name, count in asked.items() if name in GATED} if gate else {})


def status(record: dict[str, float], best: Best | None) -> str:
    """What the bar shows: loss terms, each with the share that was taught where that can be less than all, and, once a checkpoint has been diagnosed,
    the rates of the newest."""
    short = {"counterfactual_ce": "ce", "distillation": "kd", "mirror": "mirror", "states": "states", "retention": "keep", "loss": "loss"}
    share = {name: f" (taught {record[f'taught/{name}']:.2f})" for name in GATED if f"taught/{name}" in record}
    text = " ".join(f"{short.get(name, name)} {value:.3f}{share.get(name, '')}" for name, value in record.items() if "/" not in name)
    if best is not None:
        audio, vision, see = (100 * best.candidates[best.newest][name] for name in ("hear_conflicts", "vision_following", "see_conflicts"))
        text += f" | conflicts: hear follows audio {audio:.0f} % vision {vision:.0f} %, see {see:.0f} %"
    return text


def raise_not_finite(folder: Path, step: int, groups: Sequence[Group], parts: Sequence[dict[str, torch.Tensor]]) -> None:
    """Save this process's batch with the terms of each accumulation part, and stop."""
    path = folder / f"not_finite_{os.getpid()}.json"
    values = {name: ", ".join(str(part[name].item()) for part in parts) for name in parts[0]}
    write_json(path, {"step": step + 1, "terms": values, "asks": [[a.clip.id, a.question] for group in groups for a in group.asks]})
    raise TrainError(
        f"The gradient of step {step + 1} is not finite (terms: {values}). No checkpoint has this step in it; the batch is in {path}. "
        "A smaller --schedule.lr or --schedule.clip usually helps; with bfloat16, try --model.dtype float32."
    )


def open_folder(folder: Path, config: Config, main_process: bool) -> None:
    """Make the run folder ready: new, or the same run taken up again. Raises StartError where it holds another run or something else."""
    saved = folder / "config.yaml"
    unfinished = saved.with_name(f"{saved.name}.partial")  # of a start that was killed at once
    if folder.exists() and not saved.exists() and set(folder.iterdir()) - {unfinished}:
        raise StartError(f"{folder} is not empty and no run folder (it has no config.yaml). Choose another --run.folder; nothing in it was touched.")
    if saved.exists() and config.run.overwrite and main_process:
        shutil.rmtree(folder)
    if saved.exists() and (odd := differences(load_yaml(saved), config)):
        raise StartError(
            f"{folder} holds a run with other settings: {'; '.join(odd)}. Give the old settings to go on with it, "
            "another --run.folder to keep it, or --run.overwrite to delete it."
        )
    if main_process:
        clear_leftovers(folder / "checkpoints")


def note_begun(folder: Path, config: Config, model: AVLLM) -> None:
    """Write down the settings, the code and the weights' hash, each where it is not there yet."""
    if not (folder / "config.yaml").exists():
        config.save(folder / "config.yaml")
    note_code(folder / "code.txt")
    write_text(folder / "weights.txt", weights_hash(model) + "\n")


def note_code(path: Path) -> None:
    """Write down which code works on the run: a line for each version of it, by which `analysis ablate` knows that runs are not alike."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    now = code_hash("data", "models", "analysis", "train")
    if lines[-1:] != [now]:
        write_text(path, "\n".join([*lines, now]) + "\n")


def check_weights(path: Path, model: AVLLM) -> None:
    """Raise StartError where the run was begun with other weights under the same path."""
    if path.exists() and path.read_text(encoding="utf-8").strip() != weights_hash(model):
        raise StartError(
            f"{model.path} has other weights than when the run in {path.parent} was begun, so neither its findings nor its checkpoints fit. "
            "Put the old weights back to go on with it, choose another --run.folder to keep it, or give --run.overwrite to delete it."
        )


def open_clips(config: Config) -> Clips:
    """Load the clip folder; build it, or finish building it, where it is ours or not there. Call in the main process first."""
    root = Path(config.data.clips)
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        clips = load_clips(root)  # or a sentence on what it is instead
        if "config" not in clips.manifest:
            return clips  # somebody's own
    return build(config.data.build, config.data.clips)


def check_settings(config: Config, clips: Clips, processes: int) -> None:
    """Refuse what cannot work whatever is found: raises StartError, SettingsError or DataError before a model is loaded."""
    tracker = config.run.tracker
    if tracker != "none" and not any(importlib.util.find_spec(name) for name in TRACKERS[tracker]):
        raise StartError(f"run.tracker is {tracker}, which is not installed here: pip install {tracker}, or leave it out (metrics.jsonl is written).")
    share([None] * config.schedule.grids, 0, processes, 0, config.schedule.accumulate)  # type: ignore[list-item]
    training_clips(clips, config.data.train_on)
    if config.data.text is not None:
        passages(config.data.text)
    for split in ("plan", "selection", "test"):
        settings: DiagnoseSettings = getattr(config.diagnosis, split)
        check_sites(settings)
        there = [c for c in ("factual", "counterfactual") if clips.select(split, c) and getattr(settings, c) != 0]
        for condition in ("factual", "counterfactual"):
            if condition not in there and (split != "test" or not there):
                raise DataError(
                    f"{clips.root}: training needs {condition} clips of the {split} split, and there are none, or "
                    f"diagnosis.{split}.{condition} is 0. (data.counterfactual makes counterfactual clips of factual ones.)"
                )


def check_fit(config: Config, model: AVLLM) -> None:
    """Refuse settings that this model cannot have: raises StartError before anything is measured."""
    layers = f"{model.path} has layers 0 to {model.n_layers - 1}"
    if wrong := [layer for layer in config.lora.layers or () if not 0 <= layer < model.n_layers]:
        raise StartError(f"lora.layers names {wrong}, but {layers}.")
    for name in ("teacher_cut", "mirror_cut"):
        text = getattr(config.loss, name)
        if text is not None and Cut.parse(text).stop > model.n_layers:
            raise StartError(f"loss.{name} is {text!r}, but {layers}, so a cut ends at {model.n_layers} at most.")
    if (given := config.lora.projections) is not None:
        for layer in config.lora.layers or range(model.n_layers):
            missing = [name for name in given if not model.lora_targets([layer], [name])]
            if missing:
                raise StartError(f"lora.projections names {missing}, which layer {layer} of {model.path} does not have.")


def read_clips(config: Config, model: AVLLM, clips: Clips, accelerator: Accelerator) -> None:
    """Read every clip that the run will need, those to be measured on shared out among the processes, before the first is measured on. Raises
    DataError that names all that cannot be used."""
    training, folder = training_clips(clips, config.data.train_on), Path(config.run.folder)
    wanted = {
        "plan": not (folder / "findings" / "plan.json").exists(),
        "selection": not (folder / "findings" / "after.json").exists(),
        "test": not (folder / "findings" / "after.json").exists(),
    }
    measured = [clip for split, there in wanted.items() if there for clip in used(clips, split, getattr(config.diagnosis, split))]
    mine = training * wanted["test"] + measured[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=len(mine), desc="reading media", unit="clip", disable=not accelerator.is_main_process, leave=False, dynamic_ncols=True)
    found = model.unusable([(clip, True, True) for clip in mine], clips.root, bar.update)
    bar.close()
    bad = {clip.id: (clip, reason) for clip, reason in gather_object(found)}
    if bad:
        raise refusal(clips.root, list(bad.values()), len({clip.id for clip in (*training, *measured)}))


def started() -> int:
    """Processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined_on_cpu() -> bool:
    """Whether several processes have to talk without a GPU: accelerate joins them only when it is told so."""
    return started() > 1 and not torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true"


def default_threads(processes: int) -> int:
    """Physical cores that this process may use, shared out among `processes`. (`accelerate launch` sets OMP_NUM_THREADS to 1 unless told.)"""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return max(1, cores // processes)


def forget_metrics_after(path: Path, step: int) -> None:
    """Drop lines of steps that will be taken again."""
    lines = [line for line in read_jsonl(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def prepare_deepspeed(accelerator: Accelerator, config: Config, decoder: torch.nn.Module) -> None:
    """Tell DeepSpeed what it would otherwise read from a data loader, and keep frozen weights out of its checkpoints."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.schedule.grids // config.schedule.accumulate // accelerator.num_processes
    settings["gradient_clipping"] = config.schedule.clip
    settings["bf16"] = {"enabled": config.model.dtype == "bfloat16"}  # accelerate knows only of its own mixed precision, which stays off
    # exclude_frozen_parameters forgets that a tied weight has two names: a head tied to the embeddings would be in every checkpoint
    decoder.register_state_dict_post_hook(trained_only)


def trained_only(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take frozen weights out of a state dict."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)
