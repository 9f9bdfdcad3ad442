"""Numbers that are none end a run with their reason: in the weights when they are loaded, in the logits at the first visit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.questions import question
from models import ModelError, load_model, self_check


def changed(base, folder, change):
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def layer_weight(weights, name):
    """The key of a projection of the language model's layer 1."""
    [key] = [k for k in weights if k.endswith(f"layers.1.mlp.{name}.weight") and "visual" not in k and "audio" not in k]
    return key


def overflowing(weights):
    """A layer whose weights are finite and whose inside is beyond float32: up_proj is blown up, down_proj shrunk as much."""
    up, down = layer_weight(weights, "up_proj"), layer_weight(weights, "down_proj")
    largest = weights[up].abs().max()
    weights[up], weights[down] = weights[up] / largest * 3e38, weights[down] * (largest / 3e38)


def test_weights_that_hold_nan_are_refused_when_they_are_loaded(tiny_folder, tmp_path):
    def spoil(weights):
        weights[layer_weight(weights, "up_proj")].view(-1)[7] = float("nan")

    with pytest.raises(ModelError, match=r"the weights hold numbers that are not finite .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(changed(tiny_folder, tmp_path / "nan", spoil))


@pytest.fixture(scope="module")
def spilling(tiny_folder, tmp_path_factory):
    return load_model(changed(tiny_folder, tmp_path_factory.mktemp("models") / "spilling", overflowing))


def test_every_way_to_logits_refuses_them(spilling, media):
    prefix, suffix = spilling.prefill([media[0]]), spilling.suffix(question("hear"), "I hear a dog.", "a dog")
    for way in (
        lambda: spilling.generate(prefix, [0], [question("hear")]),
        lambda: spilling.span_scores(prefix, [0], [suffix]),
        lambda: spilling.extend(prefix, [0], [suffix]),
        lambda: spilling.extend(prefix, [0], [suffix], hidden=True, flow=True),
    ):
        with pytest.raises(ModelError, match=r"in float32 the model's logits are not numbers .*get the checkpoint again"):
            way()


def test_the_self_check_does_not_blame_the_attention(spilling, media):
    with pytest.raises(ModelError, match="logits are not numbers"):
        self_check(spilling, media[0], question("hear"))


def test_the_remedy_is_another_dtype_where_that_helps(tiny, media, monkeypatch):
    monkeypatch.setattr(tiny, "dtype", torch.float16)
    with pytest.raises(ModelError, match=r"in float16 .*use --dtype bfloat16 or --dtype float32"):
        tiny.require_finite(torch.tensor([1.0, float("inf")]))
    tiny.require_finite(torch.tensor([65504.0]))
