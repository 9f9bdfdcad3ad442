"""Adapters that others made: what fits this model is loaded and computes what it computed there; what does not is refused in one true sentence."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from data.questions import question
from models import ModelError, load_model

NAMES = r".*language_model\.layers\.\d+\.self_attn\.(q|v)_proj"
WEIGHTS = "adapter_model.safetensors"


def made(base, folder, config):
    """An adapter with random weights, as stock PEFT saves it on the stock thinker; and the thinker that has it."""
    torch.manual_seed(0)
    model = get_peft_model(Thinker.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or (name.endswith(".bias") and config.bias != "none" and weight.requires_grad):
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(str(folder))
    return folder


def renamed(adapter, folder, change, settings=None):
    """A copy with other names of the weights, and other settings."""
    shutil.copytree(adapter, folder)
    save_file({change(name): weight for name, weight in load_file(adapter / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})
    said = json.loads((adapter / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def logits(base, media, adapter=None):
    model = load_model(base, adapter)
    suffix = model.suffix(question("hear"), "I hear a dog.")
    return model.extend(model.prefill([media[0]]), [0], [suffix]).logits


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=NAMES, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}, alpha_pattern={"v_proj": 3})
    return made(tiny_folder, tmp_path_factory.mktemp("adapters") / "lora", config)


@pytest.fixture(scope="module")
def wanted(tiny_folder, lora, media):
    plain, found = logits(tiny_folder, media), logits(tiny_folder, media, lora)
    assert (found - plain).abs().max() > 0.01  # or nothing below would mean anything
    return found


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        # ms-swift trains the full Omni model, whose thinker is one level down, and gives a pattern for its names
        (
            lambda n: n.replace("base_model.model.", "base_model.model.thinker.").replace("language_model.", ""),
            {"target_modules": r"^(thinker\.model(?=\.).*\.(q_proj|v_proj))$"},
            "thinker.model -> model.language_model",
        ),
        (lambda n: n.replace("model.language_model.", "model."), {"target_modules": ["q_proj", "v_proj"]}, "model -> model.language_model"),
        (lambda n: n.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."), None, "language_model.model -> "),
        (lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."), None, "names of another trainer"),
        (lambda n: n.removeprefix("base_model.model."), None, "names of another trainer"),
        (lambda n: n.replace("base_model.model.", "base_model.model.module._orig_mod."), None, "module._orig_mod -> (nothing)"),
    ],
)
def test_other_names_are_mapped_and_said(tiny_folder, lora, wanted, media, tmp_path, capsys, change, settings, said):
    found = logits(tiny_folder, media, renamed(lora, tmp_path / "other", change, settings))
    assert torch.equal(found, wanted)
    assert said in capsys.readouterr().err


def test_own_names_are_not_spoken_of(tiny_folder, lora, capsys):
    load_model(tiny_folder, lora)
    assert "names of another trainer" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=NAMES, use_dora=True),
        LoraConfig(r=4, target_modules=NAMES, lora_bias=True),
        LoraConfig(r=4, target_modules=NAMES, bias="lora_only"),
        LoraConfig(r=4, target_modules=NAMES, bias="all"),
        LoraConfig(r=4, target_modules=NAMES, bias="all", modules_to_save=["language_model.norm"]),
        LoraConfig(r=4, target_modules=NAMES, init_lora_weights="pissa"),
        LoraConfig(r=4, target_modules=NAMES, init_lora_weights="olora"),
        LoraConfig(r=4, target_modules=NAMES, init_lora_weights="orthogonal"),
        LoraConfig(r=4, target_modules=NAMES, modules_to_save=["language_model.norm"]),
        LoraConfig(r=4, target_modules=NAMES, use_rslora=True, task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    ],
)
def test_every_form_of_lora_loads_with_either_names(tiny_folder, media, tmp_path, config):
    """What stock PEFT makes of the file on the stock thinker, is what it is here, under PEFT's names and under those of the full model."""
    adapter = made(tiny_folder, tmp_path / "own", config)
    plain, found = logits(tiny_folder, media), logits(tiny_folder, media, adapter)
    assert (found - plain).abs().max() > 0.01
    full = renamed(adapter, tmp_path / "full", lambda n: n.replace("base_model.model.", "base_model.model.thinker."))
    assert torch.equal(logits(tiny_folder, media, full), found)
    stock = load_model(tiny_folder)
    from peft import PeftModel

    stock.thinker = PeftModel.from_pretrained(stock.thinker, str(adapter))
    suffix = stock.suffix(question("hear"), "I hear a dog.")
    assert torch.equal(stock.extend(stock.prefill([media[0]]), [0], [suffix]).logits, found)
    adapted = load_model(tiny_folder, adapter)
    with adapted.adapter_off():  # PEFT's own leaves biases, and the weights that PiSSA has changed
        assert torch.equal(adapted.extend(adapted.prefill([media[0]]), [0], [suffix]).logits, plain)
    assert torch.equal(adapted.extend(adapted.prefill([media[0]]), [0], [suffix]).logits, found)


def refusal(base, adapter) -> str:
    with pytest.raises(ModelError) as stopped:
        load_model(base, adapter)
    return str(stopped.value)


@pytest.mark.parametrize("size", [0, 4, 200, 5000])
def test_a_file_that_is_cut_short_is_called_damaged(tiny_folder, lora, tmp_path, size):
    shutil.copytree(lora, tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:size])
    said = refusal(tiny_folder, tmp_path / "cut")
    assert f"{WEIGHTS} is damaged" in said and "Copy the adapter again" in said and "\n" not in said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\udcff"])
def test_a_damaged_configuration_is_called_damaged(tiny_folder, lora, tmp_path, text):
    shutil.copytree(lora, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    said = refusal(tiny_folder, tmp_path / "cut")
    assert "adapter_config.json" in said and "Copy the adapter again" in said and "another model" not in said


def test_numbers_that_are_none_are_said_when_it_is_loaded(tiny_folder, lora, tmp_path):
    shutil.copytree(lora, tmp_path / "nan")
    weights = load_file(lora / WEIGHTS)
    name = sorted(weights)[3]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "nan" / WEIGHTS, {"format": "pt"})
    said = refusal(tiny_folder, tmp_path / "nan")
    assert f"{tmp_path / 'nan' / WEIGHTS} holds numbers that are not finite" in said and name in said


@pytest.mark.parametrize(
    ("config", "kind"),
    [(IA3Config(target_modules=NAMES, feedforward_modules=[]), "IA3"), (PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING")],
)
def test_other_methods_are_named(tiny_folder, lora, tmp_path, config, kind):
    folder = tmp_path / "other"
    shutil.copytree(lora, folder)
    config.save_pretrained(folder)
    said = refusal(tiny_folder, folder)
    assert f"is an adapter of the kind {kind}" in said and "only LoRA" in said and "another model" not in said


def test_a_pickle_is_not_read_and_how_to_convert_it_is_said(tiny_folder, lora, wanted, media, tmp_path, monkeypatch):
    folder = shutil.copytree(lora, tmp_path / "pickle")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    said = refusal(tiny_folder, folder)
    assert "is a pickle" in said
    code = said.split('python -c "')[1].rstrip('"')
    monkeypatch.chdir(folder)
    exec(code, {})
    assert torch.equal(logits(tiny_folder, media, folder), wanted)


def test_what_was_made_for_another_model_is_said_to_be(tiny_folder, lora, tmp_path):
    talker = renamed(lora, tmp_path / "talker", lambda n: n.replace("base_model.model.model.language_model", "base_model.model.talker.model"))
    said = refusal(tiny_folder, talker)
    assert "made for another model" in said and "talker, which is not loaded here" in said
    deeper = renamed(lora, tmp_path / "deeper", lambda n: n.replace("layers.2.", "layers.20."))
    assert "made for another model" in refusal(tiny_folder, deeper)
    weights = {name: weight[:, : weight.shape[1] // 2].contiguous() for name, weight in load_file(lora / WEIGHTS).items()}
    shutil.copytree(lora, tmp_path / "narrow")
    save_file(weights, tmp_path / "narrow" / WEIGHTS, {"format": "pt"})
    said = refusal(tiny_folder, tmp_path / "narrow")
    assert "made for another model" in said and "size mismatch" in said and "\n" not in said


def test_the_folder_above_an_adapter_names_the_one_below(tiny_folder, lora):
    assert f"There is one in {lora}" in refusal(tiny_folder, lora.parent)


def full(name):
    """A weight's name for a trainer of the full Omni model."""
    return name.replace("base_model.model.", "base_model.model.thinker.")


def rewritten(adapter, folder, change=lambda weights: weights, settings=None):
    """A copy with other weights, and other settings."""
    shutil.copytree(adapter, folder)
    weights = {name: weight.contiguous() for name, weight in change(load_file(adapter / WEIGHTS)).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    said = json.loads((adapter / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_foreign_names_are_those_of_the_file(tiny_folder, tmp_path, bias):
    adapter = made(tiny_folder, tmp_path / "own", LoraConfig(r=4, target_modules=NAMES, bias=bias))
    weights = load_file(adapter / WEIGHTS)
    name = "model.language_model.layers.1.self_attn.q_proj"
    wanted = weights[f"base_model.model.{name}.base_layer.bias"]
    assert (wanted - load_model(tiny_folder).thinker.get_parameter(f"{name}.bias")).abs().max() > 0.01
    for at, change in enumerate((full, lambda n: n.replace("base_layer.", ""), lambda n: full(n).replace("base_layer.", ""))):
        model = load_model(tiny_folder, renamed(adapter, tmp_path / str(at), change))
        assert torch.equal(model.thinker.get_parameter(f"base_model.model.{name}.base_layer.bias"), wanted)


def test_a_bias_of_a_module_without_lora_is_read_or_refused(tiny_folder, lora, tmp_path):
    """Not ignored, as PEFT does with names that it does not have."""
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.bias"
    model = load_model(tiny_folder, rewritten(lora, tmp_path / "bias", lambda w: w | {name: torch.full((64,), 5.0)}))
    assert torch.equal(model.thinker.get_parameter(name.replace(".bias", ".base_layer.bias")), torch.full((64,), 5.0))
    mlp = "base_model.model.model.language_model.layers.0.mlp.up_proj.bias"  # that projection has none
    assert mlp in refusal(tiny_folder, rewritten(lora, tmp_path / "mlp", lambda w: w | {mlp: torch.ones(128)}))


def test_two_names_of_one_weight_are_refused(tiny_folder, lora, tmp_path):
    twice = rewritten(lora, tmp_path / "twice", lambda w: w | {full(name): weight * 2 for name, weight in w.items()})
    said = refusal(tiny_folder, twice)
    assert "which are one weight of" in said and "thinker." in said and "another model" not in said
    twice = rewritten(lora, tmp_path / "default", lambda w: w | {n.replace("lora_A.", "lora_A.default."): x.clone() for n, x in w.items()})
    assert "lora_A.default.weight" in refusal(tiny_folder, twice)


@pytest.mark.parametrize("settings", [{"r": 8}, {"r": 2, "use_rslora": True}, {"rank_pattern": {"v_proj": 2}}, {"rank_pattern": None}])
def test_a_rank_that_the_configuration_does_not_say_is_refused(tiny_folder, lora, tmp_path, settings):
    """The scale of the update is made of it. `lora` has rank 4, and 2 in layer 1's q_proj."""
    said = refusal(tiny_folder, rewritten(lora, tmp_path / "rank", lambda w: {full(n): x for n, x in w.items()}, settings))
    assert "does not fit its own adapter_config.json" in said and "Copy both files" in said and "another model" not in said


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": r"thinker\.model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": [f"thinker.model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"]},
        {"target_modules": [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*(audio_tower|visual).*"},
    ],
)
@pytest.mark.parametrize("lost", ["layers.0.", "layers.2.self_attn.v_proj"])
def test_modules_that_the_configuration_names_have_to_be_there(tiny_folder, lora, wanted, media, tmp_path, settings, lost):
    whole = rewritten(lora, tmp_path / "whole", lambda w: {full(n): x for n, x in w.items()}, settings)
    assert torch.equal(logits(tiny_folder, media, whole), wanted)
    part = rewritten(lora, tmp_path / "part", lambda w: {full(n): x for n, x in w.items() if lost not in n}, settings)
    said = refusal(tiny_folder, part)
    assert f"is not whole: adapter_config.json names {2 if lost == 'layers.0.' else 1} modules" in said and lost in said


def test_layers_to_transform_are_those_that_have_to_be_there(tiny_folder, lora, media, tmp_path):
    settings = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "exclude_modules": r".*(audio_tower|visual).*"}
    folder = rewritten(lora, tmp_path / "two", lambda w: {full(n): x for n, x in w.items() if "layers.1." not in n}, settings)
    load_model(tiny_folder, folder)


@pytest.mark.parametrize("change", [str, full])
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"target_modules": "(("}, "unterminated subpattern"),
        ({"rank_pattern": {"((": 3}}, "unterminated subpattern"),
        ({"alpha_pattern": {"((": 3}}, "unterminated subpattern"),
        ({"rank_pattern": ["a"]}, '"rank_pattern" has to give a whole number'),
        ({"alpha_pattern": {"v_proj": "x"}}, '"alpha_pattern" has to give a finite number'),
        ({"megatron_config": {"a": 1}}, "megatron"),
        ({"r": "four"}, "\"r\" is 'four' and has to be a whole number of at least 1"),
        ({"r": 0}, '"r" is 0'),
        ({"lora_alpha": None}, '"lora_alpha" is None'),
        ({"lora_alpha": float("nan")}, '"lora_alpha" is nan'),
        ({"lora_alpha": 1e308}, "multiplies the update of"),
        ({"init_lora_weights": "xyz"}, "Unknown initialization"),
        ({"init_lora_weights": "corda"}, "was trained on weights that its start, corda, had changed"),
        ({"init_lora_weights": "loftq"}, "was trained on weights that its start, loftq, had changed"),
        ({"trainable_token_indices": [1, 2]}, "trains single tokens"),
    ],
)
def test_settings_that_cannot_be_used_are_said_and_no_other_model_is(tiny_folder, lora, tmp_path, change, settings, part):
    said = refusal(tiny_folder, rewritten(lora, tmp_path / "odd", lambda w: {change(n): x for n, x in w.items()}, settings))
    assert part in said and "another model" not in said and "\n" not in said


@pytest.mark.parametrize("change", [str, full])
@pytest.mark.parametrize("weight", [torch.tensor(1.0), torch.zeros(0), torch.zeros(4)])
def test_weights_that_are_no_matrices_are_refused(tiny_folder, lora, tmp_path, change, weight):
    said = refusal(tiny_folder, rewritten(lora, tmp_path / "odd", lambda w: {change(n): weight.clone() for n in w}))
    assert "does not fit" in said and "\n" not in said


def test_a_start_that_leaves_no_trace_and_a_byte_order_mark_are_read(tiny_folder, lora, wanted, media, tmp_path):
    folder = rewritten(lora, tmp_path / "eva", settings={"init_lora_weights": "eva", "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}})
    settings = folder / "adapter_config.json"
    settings.write_bytes(b"\xef\xbb\xbf" + settings.read_bytes())
    assert torch.equal(logits(tiny_folder, media, folder), wanted)
