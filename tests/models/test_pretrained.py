"""Originals into the thinker: the mapping and its check, with random weights in the real architectures. (`make smolomni` checks the real ones,
and only it can show that this file's idea of CTranslate2's layout is theirs.)"""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data.sources import load_sources
from models import ModelError
from models.pretrained import PHOTOGRAPHS, audio_part, build_processor, check_parts, configuration, fill, fill_text, imagenet
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

    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(stored))
    for name, weight in stored.items():
        array = weight.numpy().astype(np.float32)
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape) + struct.pack("<BI", 0, array.nbytes) + array.tobytes()
    return data


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("epsilon", "The language model is not SmolLM2"),
        ("rope", "The language model is not SmolLM2"),
        ("key bias", "The language model is not SmolLM2"),
        ("a row of the vocabulary", "The language model is not SmolLM2"),
        ("audio epsilon", "The audio tower is not Whisper's encoder"),
        ("audio weight", "The audio tower is not Whisper's encoder"),
    ],
)
def test_a_small_deviation_is_found(converted, change, said):
    """Each is a mistake that could be made in converting; none is as small as ROUNDING."""
    text, tower = converted[0].model.language_model, converted[0].model.audio_tower
    undo = []

    def put(owner, name, value):
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    if change == "epsilon":
        for layer in text.layers:
            put(layer.input_layernorm, "variance_epsilon", 1e-2)
    elif change == "rope":
        put(text.rotary_emb, "inv_freq", text.rotary_emb.inv_freq * 1.01)
    elif change == "audio epsilon":
        put(tower.layers[0].final_layer_norm, "eps", 1e-2)
    else:
        weight, at = {
            "key bias": (text.layers[0].self_attn.k_proj.bias, 3),
            "a row of the vocabulary": (text.embed_tokens.weight, (5, 0)),
            "audio weight": (tower.layers[3].fc2.weight, (0, 0)),
        }[change]
        saved = weight.data.clone()
        weight.data[at] += 0.5
        undo.append((weight, "data", saved))
    try:
        assert problems(converted) == [said]
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)


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
