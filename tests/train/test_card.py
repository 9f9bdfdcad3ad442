"""The model card, of findings by hand."""

from pathlib import Path

from analysis.findings import Estimate, Findings, Reliance, Sources
from analysis.settings import DiagnoseSettings
from tests.train.findings_by_hand import biased, effect, estimate, following
from train.card import card
from train.config import Config, DataPart, DiagnosisPart, LossPart, SchedulePart
from train.plan import make_plan

CHECKPOINT = Path("checkpoints/step_000060")


def measured(hear, shortcut, hear_new=0.087, see_new=0.419) -> Findings:
    """Findings of the test split: of the unseen split 36 conflicts have a new recording, 172 a new picture."""
    new = [following("unseen_counterfactual", "hear", hear_new), following("unseen_counterfactual", "see", see_new)]
    for row, n, clusters, trained in zip(new, (36, 172), (9, 43), (136, 0), strict=True):
        row.audio.n = row.vision.n = row.correct.n = n
        row.audio.clusters = row.vision.clusters = clusters
        row.trained = trained
    rows = [following("counterfactual", "hear", 0.1), following("factual", "hear", 0.982), *new]
    rows[0].audio = hear
    index = Reliance("hear", effect(1.0), effect(1.0), shortcut)
    return biased(split="test", following=rows, reliance=[index], sources=[Sources("test", 86, 86, 43, 43, 5), Sources("unseen", 0, 43, 34, 43, 5)])


BEFORE = measured(Estimate(0.134, 0.0651, 0.2584, 164, 41), Estimate(0.68, 0.63, 0.73, 82, 41))
AFTER = measured(Estimate(0.976, 0.912, 0.994, 164, 41), Estimate(0.07, 0.06, 0.09, 82, 41), hear_new=0.111)


def test_figures_of_before_and_after(tmp_path):
    config = Config()
    plan = make_plan(biased(), config)
    text = card("plan", CHECKPOINT, config, plan, BEFORE, AFTER)
    assert "| test split of runs/clips | before | after |" in text
    assert "| Conflicts, asked what it hears: names the sound | 13.4 % (6.5–25.8) | 97.6 % (91.2–99.4) |" in text
    assert "| Shortcut Index (0 is ideal): asked what it hears | 0.68 (0.63, 0.73) | 0.07 (0.06, 0.09) |" in text
    assert "| Factual clips: right about the sound | 98.2 % (96.2–100.2) | 98.2 % (96.2–100.2) |" in text
    assert "Step 60, seed 0." in text and "of layers 0 to 4." in text and "abstention 0.4" in text
    for path, named in (("Qwen/Qwen2.5-Omni-7B", True), (str(tmp_path), False)):  # the hub would take a folder for a model of its own
        config.model.path = path
        text = card("plan", CHECKPOINT, config, plan, BEFORE, AFTER)
        assert (f"base_model: {path}" in text.split("---")[1]) == named and f'load_model("{path}"' in text


def test_unseen_sources_say_what_they_are_of():
    """The rate has its own n, what is left out is counted, and what the splits share with the train split is said."""
    config = Config()
    text = card("plan", CHECKPOINT, config, make_plan(biased(), config), BEFORE, AFTER)
    asked = "Conflicts of unseen sources, asked what it"
    sound, picture = f"{asked} hears: names the sound", f"{asked} sees: names the picture"
    assert f"| {sound} (36 clips, 9 sources) | 8.7 % (6.7–10.7) | 11.1 % (9.1–13.1) |" in text
    assert f"| {picture} (172 clips, 43 sources) | 41.9 % (39.9–43.9) | 41.9 % (39.9–43.9) |" in text
    assert "\nTest split: 86 of 86 pictures and 43 of 43 recordings are in the train split too, in other renderings.\n" in text
    assert "\nUnseen split: 0 of 43 pictures and 34 of 43 recordings are in the train split too, in other renderings.\n" in text
    assert "asked what it hears: 36 clips of a new recording; 136 whose recording the train split has are left out." in text
    assert "nothing was trained on" not in text


def test_labels():
    """Where no loss has labels the card says what was chosen on labelled conflicts all the same, how many, and not what the configuration sets."""
    config = Config(data=DataPart(train_on="factual"))
    text = card("x", CHECKPOINT, config, make_plan(biased(), config), BEFORE, AFTER)
    assert (
        "- **Labels**: no label is in the losses. Which question leads, the teacher's cut, the mirror's cut, which layers get an adapter, which "
        "projections, the weight of distillation, the weight of the mirror, the weight of retention, the weight of abstention (on clips that lack a "
        "stream), the number of steps: chosen on at most 120 labelled conflicts (at most 80 for the cuts) and at most 120 labelled factual clips of "
        "the plan split (with both streams and with one alone). The checkpoint: chosen by right answers on the selection split.\n"
    ) in text
    diagnosis = DiagnosisPart(plan=DiagnoseSettings.quick(None, alone=None, knockout=32))
    set_here = Config(schedule=SchedulePart(steps=60, checkpoint_every=-1), loss=LossPart(mirror=0.0), diagnosis=diagnosis)
    text = card("x", CHECKPOINT, set_here, make_plan(biased(), set_here), BEFORE, AFTER)
    assert (
        "- **Labels**: used by counterfactual_ce. Which question leads, the teacher's cut, which layers get an adapter, which projections, the "
        "weight of distillation, the weight of retention, the weight of abstention (on clips that lack a stream): chosen on "
        "all labelled conflicts (at most 32 for the cuts) and all labelled factual clips of the plan split (with both streams and with one alone).\n"
    ) in text


def test_what_was_not_read_is_beside_the_rate():
    """The share of each question's answers on these clips, before and after, where there are any."""
    config = Config()
    new = measured(Estimate(0.976, 0.912, 0.994, 164, 41), Estimate(0.07, 0.06, 0.09, 82, 41))
    new.following[0].unparsed, new.following[0].cut_off = estimate(0.02, 0.01), estimate(0.304, 0.01)
    text = card("plan", CHECKPOINT, config, make_plan(biased(), config), BEFORE, new)
    cells = "| 13.4 % (6.5–25.8) | 97.6 % (91.2–99.4), 2.0 % not read, 30.4 % cut off |"
    assert f"| Conflicts, asked what it hears: names the sound {cells}" in text
    assert "| Factual clips: right about the sound | 98.2 % (96.2–100.2) | 98.2 % (96.2–100.2) |" in text
    assert 'ones "cut off" end at the token limit' in text
