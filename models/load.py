"""`load_model`: the only place that looks at which family a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from models import qwen2_5_omni, qwen_vl, smolomni
from models.avllm import AVLLM, ModelError

FAMILIES = {
    **dict.fromkeys(qwen2_5_omni.MODEL_TYPES, qwen2_5_omni.Qwen25Omni),
    smolomni.SmolOmniConfig.model_type: smolomni.SmolOmni,
    qwen_vl.Qwen25VL.family: qwen_vl.Qwen25VL,  # these two hear nothing: bases of token shift
    qwen_vl.Qwen3VL.family: qwen_vl.Qwen3VL,
}


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> AVLLM:
    """Load a model folder (or hub id), and optionally a PEFT adapter on top.

    base: folder of the vision-language base for token shift; by default what the model folder's avbalance.json names.
    Raises ModelError for a folder that is no model, a family that is not supported, incomplete weights, an adapter of another model, or a given
    base that is no model; the base itself is loaded by who uses it.
    """
    folder, family = Path(path), family_of(path)
    if base is not None:
        family_of(base)
    note = folder / "avbalance.json"
    if base is None and note.is_file():
        named = json.loads(note.read_text()).get("base")
        base = str((folder / named).resolve()) if named else None
    try:
        model = family.load(path, device, dtype, base)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path}: the model cannot be loaded: {str(error).splitlines()[0]}") from None
    if adapter is not None:
        attach_adapter(model, adapter)
    return model


def family_of(path: str | Path) -> Any:
    """The class for this folder or hub id, by its config.json. Raises ModelError where there is none."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(f"{path} is no model: it has no config.json. Give the folder of a checkpoint, such as models/organism/avllm.")
    if not folder.exists() and str(path).count("/") != 1:
        raise ModelError(f"{path}: no such model folder.")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is no model that transformers can read: {str(error).splitlines()[0]}") from None
    if config.model_type not in FAMILIES:
        raise ModelError(f"{path} is a {config.model_type} model; the families here are {', '.join(FAMILIES)}.")
    return FAMILIES[config.model_type]


def attach_adapter(model: AVLLM, adapter: str | Path, trainable: bool = False) -> None:
    """Load a PEFT adapter onto the model. Raises ModelError where it was made for another model."""
    from peft import PeftModel

    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{adapter} is no adapter: it needs adapter_config.json and adapter_model.safetensors "
            "(a run keeps the chosen one in <run>/adapter, each checkpoint its own in <checkpoint>/adapter)."
        )
    try:
        model.thinker = PeftModel.from_pretrained(model.thinker, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{adapter} was made for another model than {model.path}: {str(error).strip().splitlines()[0]}") from None
    check_adapter_names(model, folder)
    model.adapter = str(adapter)


def check_adapter_names(model: AVLLM, folder: Path) -> None:
    """PEFT ignores adapter weights whose module does not exist; an adapter that silently does less than it should is refused."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    have = {name.replace(".default", "") for name, _ in model.thinker.named_parameters() if "lora_" in name}
    if names != have:
        odd = sorted(names ^ have)[0]
        raise ModelError(f"{folder} was made for another model than {model.path}: {len(names ^ have)} of its weights do not match, e.g. {odd}.")
