"""Which checkpoint is the best one, by its diagnosis on the selection split.

best = choose_best(checkpoint_folder, findings_before_training, retention_bound=0.01, tie=0.01)
best.save("runs/x/best.json")
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.findings import Findings
from data.files import write_json
from train.checkpoints import CheckpointError, step_of, whole_checkpoints


@dataclass
class Rates:
    """What choice looks at: shares of right answers (that name the designated label alone), on the selection split."""

    hear_conflicts: float  # audio-following
    see_conflicts: float
    hear_factual: float
    see_factual: float
    vision_following: float  # hear-questions on conflicts that were answered with what is seen

    @classmethod
    def of(cls, findings: Findings) -> Rates:
        """Read from findings. Raises CheckpointError where a rate was not measured."""
        values = {}
        for condition, where in (("counterfactual", "conflicts"), ("factual", "factual")):
            for question in ("hear", "see"):
                row = findings.following_rate(condition, question)
                if row is None or row.correct.value is None:
                    raise CheckpointError(
                        f"The diagnosis of {findings.adapter or findings.model} has no rate for {question}-questions on {condition} clips of the "
                        f"{findings.split} split, so checkpoints cannot be compared. Does that split have such clips?"
                    )
                values[f"{question}_{where}"] = row.correct.value
                if (question, where) == ("hear", "conflicts"):
                    values["vision_following"] = row.vision.value or 0.0
        return cls(**values)


@dataclass
class Best:
    """The chosen checkpoint's name and why. `candidates`: name -> its rates and the most it lost on factual clips.

    `stopped`: why no further steps were taken, where the stop rule ended training.
    """

    checkpoint: str
    because: str
    within_bound: bool
    before: Rates
    candidates: dict[str, dict[str, float]]
    stopped: str | None = None

    @property
    def newest(self) -> str:
        """The checkpoint that the choice was made after."""
        return max(self.candidates, key=lambda name: step_of(Path(name)))

    def save(self, path: Path) -> None:
        """Write best.json atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Best:
        """Read best.json. Raises CheckpointError naming the file if it cannot be used."""
        try:
            raw = json.loads(path.read_text())
            return cls(**{**raw, "before": Rates(**raw["before"])})
        except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Delete it and start the run again: it is made anew.") from None


def choose_best(folder: Path, before: Findings, retention_bound: float, tie: float, leads: str = "hear") -> Best:
    """The checkpoint that follows the audio most on conflicts and has lost at most `retention_bound` on factual clips, hear and see, give or take a
    standard error: of some hundred clips one or two more or less are chance, and would else decide between checkpoints that are worlds apart on
    conflicts (the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees).

    Checkpoints within `tie` of the largest audio-following count as equal; of those, the one that is right most often on see-questions about the same
    conflicts, then the later one. Where see-questions lead the plan (the sound covers the picture), the two change places. If none keeps within the
    bound, the one that lost least, and `because` says so.
    Looks at every checkpoint in `folder` that has been diagnosed; raises CheckpointError if there is none.
    """
    start = Rates.of(before)
    found = {p.name: Findings.load(p / "findings.json") for p in whole_checkpoints(folder) if (p / "findings.json").is_file()}
    if not found:
        raise CheckpointError(f"{folder} has no diagnosed checkpoint to choose from.")
    rates = {name: Rates.of(findings) for name, findings in found.items()}
    lost = {name: max(start.hear_factual - r.hear_factual, start.see_factual - r.see_factual) for name, r in rates.items()}
    leading = {name: r.hear_conflicts if leads == "hear" else r.see_conflicts for name, r in rates.items()}
    second = {name: r.see_conflicts if leads == "hear" else r.hear_conflicts for name, r in rates.items()}
    bound = f"{_points(retention_bound)} on factual clips, give or take a standard error"
    kept = [name for name in rates if lost[name] - _chance(lost[name], found[name]) <= retention_bound + 1e-9]
    if kept:
        top = max(leading[name] for name in kept)
        equal = [name for name in kept if leading[name] >= top - tie - 1e-9]
        name = max(equal, key=lambda n: (second[n], n))
        followed, other = ("audio", "see") if leads == "hear" else ("picture", "hear")
        why = f"Of {len(rates)} checkpoints {len(kept)} lost at most {bound}; of these it is "
        why += (
            f"the one that follows the {followed} most"
            if len(equal) == 1
            else f"best on {other}-questions among the {len(equal)} that follow the {followed} most"
        )
    else:
        name = min(rates, key=lambda n: (lost[n], -leading[n]))
        why = f"No checkpoint lost at most {bound}; this one lost least, {_points(lost[name])}"
    r = rates[name]
    because = (
        f"{why}: on conflicts {_change(start.hear_conflicts, r.hear_conflicts)} of hear- and {_change(start.see_conflicts, r.see_conflicts)} of "
        f"see-questions right, on factual clips {_change(start.hear_factual, r.hear_factual)} and {_change(start.see_factual, r.see_factual)}."
    )
    return Best(name, because, bool(kept), start, {n: {**dataclasses.asdict(rates[n]), "lost": max(0.0, lost[n])} for n in rates})


def stop_reason(best: Best, diagnosed: Iterable[int], patience: int) -> str | None:
    """Why training stops after the newest checkpoint: the best one is `patience` checkpoints old. None: it goes on (always with patience -1).

    diagnosed: steps of all checkpoints there have been, those cleared away too.
    """
    at, now = step_of(Path(best.checkpoint)), step_of(Path(best.newest))
    later = sum(at < step <= now for step in diagnosed)
    if patience == -1 or later < patience:
        return None
    return f"Stopped after step {now}: none of the last {later} checkpoints was better than that of step {at} (schedule.patience {patience})."


def _chance(lost: float, findings: Findings) -> float:
    """Standard error of a share of factual clips that were right before and are not now."""
    counts = [row.correct.n for question in ("hear", "see") if (row := findings.following_rate("factual", question)) is not None]
    return math.sqrt(lost * (1 - lost) / min(counts)) if lost > 0 else 0.0


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f} → {100 * after:.1f} %"
