"""The moving average: worked out by hand, swapped in and out bit for bit, kept in checkpoints."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.train.conftest import result
from train.checkpoints import load_checkpoint, save_checkpoint
from train.ema import Ema
from train.loop import main


def test_by_hand():
    p = nn.Parameter(torch.tensor([0.0, 8.0]))
    ema = Ema([("p", p)], decay=0.25)
    # step 0: d = min(0.25, 1/10); step 1: min(0.25, 2/11); step 2: min(0.25, 3/12); from then on 0.25
    for step, value, expected in ((0, [1.0, 8.0], [0.9, 8.0]), (1, [0.0, 0.0], [0.9 * 2 / 11, 8.0 * 2 / 11])):
        p.data = torch.tensor(value)
        ema.update(step)
        assert ema.average["p"].tolist() == pytest.approx(expected)
    p.data = torch.tensor([1.0, 1.0])
    ema.update(2)
    ema.update(90)
    assert ema.average["p"].tolist() == pytest.approx([0.25**2 * 1.8 / 11 + 0.9375, 0.25**2 * 16 / 11 + 0.9375])


def test_it_is_kept_in_float32_and_swapped_in_and_out_bit_for_bit():
    p = nn.Parameter(torch.linspace(-1, 1, 7).to(torch.bfloat16))
    own = p.detach().clone()
    ema = Ema([("p", p)], decay=0.5)
    p.data = own * 1.5
    ema.update(100)
    assert ema.average["p"].dtype == torch.float32
    assert torch.equal(ema.average["p"], own.float().lerp((own * 1.5).float(), 0.5))
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert torch.equal(p.detach(), ema.average["p"].to(torch.bfloat16)) and not torch.equal(p.detach(), own * 1.5)
        raise RuntimeError("inside")
    assert torch.equal(p.detach(), own * 1.5)


def test_a_checkpoint_holds_the_average_as_its_adapter_and_gives_back_both(model, accelerator, tmp_path):
    torch.manual_seed(0)
    model.add_lora(model.lora_targets([0, 2], ["q_proj"]), 4, 8)
    named = model.trainable_parameters()
    optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-2)
    ema = Ema(named, 0.9)
    for step in range(3):
        sum((p - 0.1).square().sum() for _, p in named).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    own, average = {n: p.detach().clone() for n, p in named}, {n: t.clone() for n, t in ema.average.items()}
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {}, accelerator, ema)
    assert all(torch.equal(p, own[n]) for n, p in named)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[n.replace(".default", "")], average[n]) and not torch.equal(average[n], own[n]) for n, _ in named)
    with torch.no_grad():
        for _, p in named:
            p.add_(1)
    ema.update(3)
    load_checkpoint(folder, model, optimizer, accelerator, ema)
    assert all(torch.equal(p, own[n]) for n, p in named)
    assert all(torch.equal(ema.average[n], average[n]) for n, _ in named)


def test_a_run_with_an_average_resumes_to_the_same_bytes_and_is_diagnosed_by_it(arguments, tmp_path, monkeypatch):
    import train.loop

    seen = []
    real, step = train.loop.diagnose, train.loop.sample_step

    def looking(model, *rest, **how):
        seen.append({n.replace(".default", ""): p.detach().clone() for n, p in model.trainable_parameters() if "lora_" in n})
        return real(model, *rest, **how)

    def interrupted(clips, config, plan, at):
        if at == 3:
            raise KeyboardInterrupt
        return step(clips, config, plan, at)

    monkeypatch.setattr(train.loop, "diagnose", looking)
    once, twice = ["--lora.ema", "0.9", "--run.folder", str(tmp_path / "once")], ["--lora.ema", "0.9", "--run.folder", str(tmp_path / "twice")]
    assert main([*arguments, *once]) == 0
    assert len(seen) == 6  # plan, test, selection; two checkpoints; test
    for number, weights in zip((2, 4), seen[3:5], strict=True):
        saved = load_file(tmp_path / "once" / "checkpoints" / f"step_{number:06d}" / "adapter" / "adapter_model.safetensors")
        assert saved.keys() == weights.keys() and all(torch.equal(saved[n], weights[n]) for n in saved)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.loop, "sample_step", interrupted)
        main([*arguments, *twice])
    assert main([*arguments, *twice]) == 0
    assert result(tmp_path / "twice") == result(tmp_path / "once")
    ema = [load_file(tmp_path / run / "checkpoints" / "step_000004" / "state" / "ema.safetensors") for run in ("once", "twice")]
    assert all(torch.equal(ema[0][n], ema[1][n]) for n in ema[0]) and ema[0].keys() == ema[1].keys()
