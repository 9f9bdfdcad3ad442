"""The adapter that a run ends with, ready to be loaded or uploaded: PEFT format, with a model card.

save_chosen(folder, checkpoint, config, plan, before, after)      # folder/adapter/
"""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import ModelCardData

from analysis.findings import Estimate, Findings
from analysis.tables import number, percent
from analysis.trajectory import headline, panel
from data.files import fsync_folder
from train.checkpoints import step_of
from train.config import Config
from train.plan import Plan

SHOWN = (  # names of analysis.trajectory.headline
    "following/counterfactual/hear/audio",
    "following/counterfactual/hear/vision",
    "following/counterfactual/see/vision",
    "following/factual/hear/correct",
    "following/factual/see/correct",
    "following/unseen_counterfactual/hear/audio",
    "following/unseen_counterfactual/see/vision",
    "following/unseen_factual/hear/correct",
    "following/unseen_factual/see/correct",
    "abstention/muted/hear",
    "abstention/near_silent/hear",
    "abstention/blanked/see",
    "abstention/near_black/see",
    "reliance/hear/shortcut",
    "language/perplexity",
    "language/right",
)
LABELLED = ("counterfactual_ce", "hinge", "dpo", "base_divergence", "latent_readout")  # terms that use a clip's labels
FOLLOW = {  # choices of the plan that follow from labelled clips of the plan split
    "leads": "which question leads",
    "teacher_cut": "the teacher's cut",
    "mirror_cut": "the mirror's cut",
    "lora_layers": "which layers get an adapter",
    "lora_projections": "which projections",
    "distillation": "the weight of distillation",
    "mirror": "the weight of the mirror",
    "retention": "the weight of retention",
    "abstention": "the weight of abstention (on clips that lack a stream)",
    "logprob_invariance": "the weight of log-probability invariance (on grids)",
    "steps": "the number of steps",
    "class_weights": "how often a class is drawn",
}
CARD = """---
{data}
---
# {name}

LoRA on {base}, trained with avbalance so that the model answers from the stream it is asked about, also where sound and picture disagree.
Step {step}, seed {seed}.

| {split} split of {clips} | before | after |
|---|---|---|
{rows}

Shares of answers in %, with 95 % intervals that cover other clips of the same kind, not another training run.
Answers "not read" name nothing known, ones "cut off" end at the token limit: both count as not right.
Where a cell says neither, there were none.{trained_on}

```python
from models import load_model

model = load_model("{base}", adapter="path/to/this/folder")
```

`peft.PeftModel.from_pretrained` loads it too, onto the thinker (for Qwen2.5-Omni `Qwen2_5OmniThinkerForConditionalGeneration`).

## Training

- **Data**: `data.train_on: {train_on}` of {clips} (data hash {data_hash}).
- **Losses**: {weights}.
- **Labels**: {labels}
- **Adapters**: rank {rank}, {modules} modules: {projections} of layers {layers}.
- **Steps**: {steps} of {grids} groups of four clips, learning rate {lr}.

## Limits

What was measured is above, for the classes, media and question wordings of these clips. Nothing is known about others:
diagnose it on yours (`python -m analysis diagnose`). The licences of the base model and of the media apply.
"""


def save_chosen(folder: Path, checkpoint: Path, config: Config, plan: Plan, before: Findings, after: Findings) -> Path:
    """Copy the adapter of `checkpoint` to `folder`/adapter, whole or not at all, with a card that says what it is and what was measured of it.
    Returns that path.

    before, after: findings of the test split.
    """
    final, partial = folder / "adapter", folder / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint / "adapter", partial)
    (partial / "README.md").write_text(card(folder.name, checkpoint, config, plan, before, after), encoding="utf-8")
    fsync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def card(name: str, checkpoint: Path, config: Config, plan: Plan, before: Findings, after: Findings) -> str:
    """Text of the model card, with the metadata that the hub reads."""
    old, new = headline(before), headline(after)
    layers, rows = plan.lora_layers.value, []
    for key in SHOWN:
        if key in old and key in new:
            what = panel(key)
            show = percent if what.rate else number
            of = f" ({new[key].n} clips, {new[key].clusters} sources)" if "unseen" in key else ""
            before_after = (f"{show(found[key])}{_unread(found, key)}" for found in (old, new))
            rows.append(f"| {what.title}: {what.line}{of} | {' | '.join(before_after)} |")
    hub_name = None if Path(config.model.path).is_dir() else config.model.path  # the hub would take a folder for a model of its own
    return CARD.format(
        data=ModelCardData(base_model=hub_name, library_name="peft", tags=["lora", "audio-visual", "avbalance"]).to_yaml(),
        name=name,
        base=config.model.path,
        step=step_of(checkpoint),
        seed=config.run.seed,
        split=after.split,
        clips=config.data.clips,
        rows="\n".join(rows),
        trained_on="".join(f"\n{sentence}" for sentence in after.trained_on()),
        train_on=config.data.train_on,
        data_hash=after.data_hash[:12],
        weights=", ".join(f"{term} {weight:g}" for term, weight in plan.weights().items()),
        labels=_labels(config, plan),
        rank=config.lora.r,
        modules=len(plan.lora_targets),
        projections=", ".join(plan.lora_projections.value),
        layers=f"{layers[0]} to {layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else ", ".join(map(str, layers)),
        steps=plan.steps.value,
        grids=config.schedule.grids,
        lr=f"{config.schedule.lr:g}",
    )


def _unread(found: dict[str, Estimate], key: str) -> str:
    """Of the answers behind a rate, the shares that could not be read or were cut off, where there are any. `key`: of headline."""
    kind, *at = key.split("/")
    if kind not in ("following", "abstention"):
        return ""
    shares = [(word, found.get(f"{measure}/{at[0]}/{at[1]}")) for measure, word in (("unparsed", "not read"), ("cut_off", "cut off"))]
    return "".join(f", {100 * share.value:.1f} % {word}" for word, share in shares if share is not None and share.value)


def _labels(config: Config, plan: Plan) -> str:
    """What labels were used for: in the losses, and by the diagnoses that the plan and the choice of the checkpoint follow from."""
    weights, asked = plan.weights(), config.diagnosis.plan
    used = ", ".join(term for term in LABELLED if weights.get(term))
    said = [f"used by {used}." if used else "no label is in the losses."]
    off = {cut for cut, term in (("teacher_cut", "distillation"), ("mirror_cut", "mirror")) if not weights.get(term)}
    chosen = [words for name, words in FOLLOW.items() if name not in off and (choice := getattr(plan, name)).value and not choice.overridden]
    if chosen:
        clips, cut = ("all" if n is None else f"at most {n}" for n in (asked.counterfactual, asked.knockout))
        factual = "all" if asked.factual is None else f"at most {asked.factual}"
        of = f"{clips} labelled conflicts" + (f" ({cut} for the cuts)" if asked.knockout != 0 else "")
        of += f" and {factual} labelled factual clips of the plan split (with both streams and with one alone)"
        names = ", ".join(chosen)
        said.append(f"{names[0].upper()}{names[1:]}: chosen on {of}.")
    if config.schedule.checkpoint_every != -1:
        said.append("The checkpoint: chosen by right answers on the selection split.")
    return " ".join(said)
