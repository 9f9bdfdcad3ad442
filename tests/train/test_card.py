"""The model card, of a run whose findings are in the repository."""

from pathlib import Path

from analysis.findings import Findings
from train.card import card
from train.config import load_yaml
from train.plan import Plan

RUN = Path("docs/results/smolomni/runs/plan_28915273/seed_0")


def test_figures_of_before_and_after(tmp_path):
    before, after = (Findings.load(RUN / "findings" / f"{name}.json") for name in ("before", "after"))
    config, plan = load_yaml(RUN / "config.yaml"), Plan.load(RUN / "plan.json")
    text = card("plan", Path("checkpoints/step_000060"), config, plan, before, after)
    assert "| Conflicts, asked what it hears: names the sound | 13.4 % (6.5–25.8) | 97.6 % (91.2–99.4) |" in text
    assert "| Shortcut Index (0 is ideal): asked what it hears | 0.68 (0.63, 0.73) | 0.07 (0.06, 0.09) |" in text
    assert "Step 60, seed 0." in text and "of layers 0 to 28." in text and "abstention 0.4" in text
    for path, named in (("Qwen/Qwen2.5-Omni-7B", True), (str(tmp_path), False)):  # the hub would take a folder for a model of its own
        config.model.path = path
        text = card("plan", Path("checkpoints/step_000060"), config, plan, before, after)
        assert (f"base_model: {path}" in text.split("---")[1]) == named and f'load_model("{path}"' in text
