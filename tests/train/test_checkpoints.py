"""A checkpoint is whole or not there, gives back exactly what was saved, and stock peft reads its adapter."""

import json
import resource
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from data.files import write_text
from models import ModelError
from tests.train.findings_by_hand import biased, following
from train.best import Best, Rates, choose_best, stop_reason
from train.checkpoints import CheckpointError, check, clear_leftovers, load_adapter, load_checkpoint, rotate, save_checkpoint, whole_checkpoints

ANSWERS = {("clip", "What do you hear?", "video->emitters 1:3"): [3, 1, 2], ("clip", "What do you see?", ""): []}


def trained(model, steps=2, seed=0, layers=(0, 2)):
    """LoRA, an optimizer, and a few steps on a made-up loss."""
    torch.manual_seed(seed)
    model.add_lora(model.lora_targets(list(layers), ["q_proj", "o_proj"]), 4, 8)
    parameters = [p for _, p in model.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        step(parameters, optimizer)
    return optimizer


def step(parameters, optimizer):
    optimizer.zero_grad()
    sum((p - 0.1).pow(2).sum() for p in parameters).backward()
    optimizer.step()


def test_round_trip(model, tiny_folder, accelerator, tmp_path):
    optimizer = trained(model)
    folder = save_checkpoint(tmp_path, 7, model, optimizer, ANSWERS, accelerator)
    assert folder.name == "step_000007" and not list(tmp_path.glob("*.partial"))
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    saved = {n: p.detach().clone() for n, p in model.trainable_parameters()}
    moments = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for _, p in model.trainable_parameters()]
    parameters = [p for _, p in model.trainable_parameters()]
    step(parameters, optimizer)
    ahead = [p.detach().clone() for p in parameters]
    done, answers = load_checkpoint(folder, model, optimizer, accelerator)
    assert (done, answers) == (7, ANSWERS)
    for (name, p), old in zip(model.trainable_parameters(), moments, strict=True):
        assert torch.equal(p, saved[name])
        assert all(torch.equal(torch.as_tensor(optimizer.state[p][k]), old[k]) for k in old)
    step(parameters, optimizer)  # the next step is the same, bit for bit
    assert all(torch.equal(a, p) for a, p in zip(ahead, parameters, strict=True))


def test_stock_peft_reads_the_adapter(model, tiny_folder, accelerator, clips, tmp_path):
    optimizer = trained(model)
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {}, accelerator)
    stock = PeftModel.from_pretrained(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny_folder), str(folder / "adapter"))
    ours = {n.replace(".default", ""): p for n, p in model.trainable_parameters()}
    theirs = {n.replace(".default", ""): p for n, p in stock.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_an_adapter_of_other_layers_is_refused(model, accelerator, tmp_path, tiny_folder):
    from models import load_model

    folder = save_checkpoint(tmp_path, 1, model, trained(model), {}, accelerator)
    other = load_model(tiny_folder)
    trained(other, steps=0, layers=(1,))
    with pytest.raises(ModelError, match="another model"):
        load_adapter(folder, other)


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "state/optimizer.safetensors"])
def test_a_full_disk_leaves_nothing_half_written(model, accelerator, tmp_path, name):
    """The kernel refuses to let a file grow as large as this one has to be, as a full disk would."""
    optimizer = trained(model)
    first = save_checkpoint(tmp_path, 1, model, optimizer, {}, accelerator)
    limit = (first / name).stat().st_size - 1
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(CheckpointError, match=r"step_000002 could not be written.*Free space"):
            save_checkpoint(tmp_path, 2, model, optimizer, {}, accelerator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    check(first)


def test_what_a_killed_process_leaves_is_no_checkpoint(model, accelerator, tmp_path):
    folder = save_checkpoint(tmp_path, 1, model, trained(model), {}, accelerator)
    (tmp_path / "step_000002.partial" / "adapter").mkdir(parents=True)
    (tmp_path / "step_000003.deleted").mkdir()
    (tmp_path / "step_000004").mkdir()  # no manifest
    assert whole_checkpoints(tmp_path) == [folder]
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000004"]


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "state/optimizer.safetensors", "state/answers.json"])
def test_damage_is_noticed_and_named(model, accelerator, tmp_path, name):
    optimizer = trained(model)
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {}, accelerator)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder, model, optimizer, accelerator)


def test_optimizer_state_of_other_parameters_is_refused(model, accelerator, tmp_path):
    optimizer = trained(model)
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {}, accelerator)
    fewer = torch.optim.AdamW([p for _, p in model.trainable_parameters()][:-1])
    with pytest.raises(CheckpointError, match="other parameters"):
        load_checkpoint(folder, model, fewer, accelerator)


def test_rotation_never_deletes_the_best(model, accelerator, tmp_path):
    optimizer = trained(model)
    folders = [save_checkpoint(tmp_path, n, model, optimizer, {}, accelerator) for n in (1, 2, 3, 4)]
    rotate(tmp_path, -1, None)
    assert whole_checkpoints(tmp_path) == folders
    rotate(tmp_path, 2, folders[0])
    assert whole_checkpoints(tmp_path) == [folders[0], *folders[2:]]
    assert not list(tmp_path.glob("*.deleted"))


def test_adapter_bytes_are_the_tensors_only(model, accelerator, tmp_path):
    """Saving twice gives the same bytes, so runs can be compared by them."""
    optimizer = trained(model)
    a = save_checkpoint(tmp_path / "a", 1, model, optimizer, {}, accelerator) / "adapter" / "adapter_model.safetensors"
    b = save_checkpoint(tmp_path / "b", 1, model, optimizer, {}, accelerator) / "adapter" / "adapter_model.safetensors"
    assert a.read_bytes() == b.read_bytes() and load_file(a)


def test_write_text_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(OSError):
            write_text(path, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- the best one


def diagnosed(folder, step, hear, see, hear_factual=0.99, see_factual=0.98):
    """A whole checkpoint with a diagnosis."""
    path = folder / f"step_{step:06d}"
    path.mkdir(parents=True)
    findings = biased(
        split="selection",
        following=[
            following("factual", "hear", hear_factual),
            following("factual", "see", see_factual),
            following("counterfactual", "hear", hear),
            following("counterfactual", "see", see),
        ],
    )
    findings.save(path / "findings.json")
    (path / "manifest.json").write_text(json.dumps({}))


def test_largest_audio_following_wins(tmp_path):
    for step_, hear, see in ((50, 0.70, 0.99), (100, 0.95, 0.80), (150, 0.90, 0.95)):
        diagnosed(tmp_path, step_, hear, see)
    best = choose_best(tmp_path, biased(), 0.01, 0.01)
    assert best.checkpoint == "step_000100" and best.within_bound
    assert "20.0 → 95.0 %" in best.because and "70.0 → 80.0 %" in best.because


def test_where_see_questions_lead_the_picture_is_followed(tmp_path):
    for step_, hear, see in ((50, 0.99, 0.70), (100, 0.80, 0.95), (150, 0.95, 0.945)):
        diagnosed(tmp_path, step_, hear, see)
    best = choose_best(tmp_path, biased(), 0.01, 0.01, "see")
    assert best.checkpoint == "step_000150" and "best on hear-questions among the 2 that follow the picture most" in best.because
    assert choose_best(tmp_path, biased(), 0.01, 0.0, "see").checkpoint == "step_000100"
    assert choose_best(tmp_path, biased(), 0.01, 0.01).checkpoint == "step_000050"


def test_retention_bounds_the_choice(tmp_path):
    diagnosed(tmp_path, 50, 0.80, 0.80)
    diagnosed(tmp_path, 100, 0.99, 0.99, see_factual=0.92)  # 6 of 100 lost, standard error 2.37
    assert choose_best(tmp_path, biased(), 0.01, 0.01).checkpoint == "step_000050"
    assert choose_best(tmp_path, biased(), 0.036, 0.01).checkpoint == "step_000050"
    assert choose_best(tmp_path, biased(), 0.037, 0.01).checkpoint == "step_000100"
    diagnosed(tmp_path, 150, 0.995, 0.99, see_factual=0.96)  # 2 of 100 lost, standard error 1.4: may be chance
    assert choose_best(tmp_path, biased(), 0.01, 0.01).checkpoint == "step_000150"


def test_equal_ones_are_told_apart_by_see_questions_then_the_later(tmp_path):
    for step_, hear, see in ((50, 0.965, 0.95), (100, 0.97, 0.80), (150, 0.965, 0.95)):
        diagnosed(tmp_path, step_, hear, see)
    assert choose_best(tmp_path, biased(), 0.01, 0.01).checkpoint == "step_000150"
    assert choose_best(tmp_path, biased(), 0.01, 0.0).checkpoint == "step_000100"


def test_if_none_keeps_within_the_bound_the_least_harm_wins_and_it_is_said(tmp_path):
    diagnosed(tmp_path, 50, 0.80, 0.80, hear_factual=0.95)
    diagnosed(tmp_path, 100, 0.99, 0.99, hear_factual=0.90)
    best = choose_best(tmp_path, biased(), 0.01, 0.01)
    assert (best.checkpoint, best.within_bound) == ("step_000050", False) and "No checkpoint lost at most 1.0 points" in best.because


def test_without_a_diagnosed_checkpoint_there_is_no_choice(tmp_path):
    with pytest.raises(CheckpointError, match="no diagnosed checkpoint"):
        choose_best(tmp_path, biased(), 0.01, 0.01)


def test_rates_are_read_from_the_rows_they_are_named_after():
    rows = [following("factual", "hear", 0.5), following("factual", "see", 0.6), following("counterfactual", "hear", 0.2, 0.7)]
    rates = Rates.of(biased(following=[*rows, following("counterfactual", "see", 0.9, 0.05)]))
    assert rates == Rates(hear_conflicts=0.2, see_conflicts=0.9, hear_factual=0.5, see_factual=0.6, vision_following=0.7)


def test_the_stop_rule_counts_checkpoints_after_the_best(tmp_path):
    candidates = {"step_000150": {}, "step_000400": {}}  # those between were cleared away
    best = Best("step_000150", "", True, Rates.of(biased()), candidates)
    steps = [50, 100, 150, 200, 250, 400]
    assert best.newest == "step_000400"
    assert stop_reason(best, steps, 4) is None and stop_reason(best, steps, -1) is None
    reason = stop_reason(best, [*steps, 450], 3)  # what lies after the newest (it was deleted by hand) does not count
    assert reason == "Stopped after step 400: none of the last 3 checkpoints was better than that of step 150 (schedule.patience 3)."
    best.checkpoint = "step_000400"
    assert stop_reason(best, steps, 1) is None
    best.stopped = reason
    best.save(tmp_path / "best.json")
    assert Best.load(tmp_path / "best.json") == best
