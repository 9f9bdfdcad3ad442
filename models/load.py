"""`load_model`: the only place that looks at which family a folder holds."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from models import qwen2_5_omni, qwen_vl, smolomni
from models.avllm import AVLLM, ModelError, device_fault

FAMILIES = {
    **dict.fromkeys(qwen2_5_omni.MODEL_TYPES, qwen2_5_omni.Qwen25Omni),
    smolomni.SmolOmniConfig.model_type: smolomni.SmolOmni,
    qwen_vl.Qwen25VL.family: qwen_vl.Qwen25VL,  # these two hear nothing: bases of token shift
    qwen_vl.Qwen3VL.family: qwen_vl.Qwen3VL,
}
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Levels of a module's name that tell nothing: wrappers of trainers, and what versions of transformers have or have not in between.
WRAPPERS = frozenset(
    ("base_model", "model", "thinker", "language_model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> AVLLM:
    """Load a model folder (or hub id), and optionally a PEFT adapter on top.

    base: folder of the vision-language base for token shift; by default what the model folder's avbalance.json names.
    Raises ModelError for a folder that is no model, a family that is not supported, incomplete weights, weights that are not finite, an adapter
    that cannot be used (`attach_adapter`), or a given base that is no model; the base itself is loaded by who uses it.
    """
    folder, family = Path(path), family_of(path)
    if base is not None:
        family_of(base)
    note = folder / "avbalance.json"
    if base is None and note.is_file():
        try:
            named = json.loads(note.read_text()).get("base")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{note} is damaged ({error}). Restore it, or remove it: then the model has no base for token shift.") from None
        base = str((folder / named).resolve()) if named else None
    try:
        model = family.load(path, device, dtype, base)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path}: the model cannot be loaded: {str(error).splitlines()[0]}") from None
    check_finite(model)
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
    """Load a PEFT adapter onto the model: LoRA in all of PEFT's forms (DoRA, biases, modules_to_save), under PEFT's names or another trainer's.

    What had to be renamed is said on stderr. Raises ModelError for a damaged file, numbers that are not finite, a method that is not LoRA, settings
    that do not go with the weights, an adapter of another model, and where the model does not hold every weight of the file afterwards.
    """
    from peft import PeftConfig, PeftModel

    folder = Path(adapter)
    said, tensors = _read_adapter(folder)
    places = _places(model, folder, tensors)
    foreign = {name for name, place in places.items() if name != place.name}
    before = [(weight, weight.detach().to("cpu", copy=True)) for weight in _written_over(model, said, places.values())]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / SETTINGS).write_text(json.dumps(said))
            config: Any = PeftConfig.from_pretrained(scratch)
            config.task_type = None  # PEFT would look for the head of a task
            source = str(folder)
            if foreign:
                source = scratch
                _name_modules(model, folder, config, tensors, places)
                tensors = {place.name: tensors[name] for name, place in places.items()}
                save_file(tensors, Path(scratch) / WEIGHTS, {"format": "pt"})
            model.thinker = PeftModel.from_pretrained(model.thinker, source, config=config, is_trainable=trainable)
    except ModelError:
        raise
    except Exception as error:  # PEFT raises of every kind on settings that it did not expect: re.error, ImportError, IndexError, ...
        if device_fault(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"{lines[0]} is missing" if isinstance(error, KeyError) else " ".join(line.strip() for line in lines[:2])
        other = ", so it was made for another model" if "size mismatch" in reason or "not found in the base model" in reason else ""
        raise ModelError(f"{adapter} does not fit {model.path}{other}: {reason}") from None
    _check_names(model, folder, set(tensors))
    _check_values(model, folder, tensors)
    model.written_over = [(weight, old) for weight, old in before if not torch.equal(weight.detach().cpu(), old)]
    if foreign:
        pairs = {_beginnings(places[name]) for name in foreign}
        shown = ", ".join(f"{old or '(nothing)'} -> {new or '(nothing)'}" for old, new in sorted(pairs)[:3])
        print(f"{adapter}: {len(foreign)} of its weights have the names of another trainer; read as {shown}.", file=sys.stderr)
    model.adapter = str(adapter)


def _written_over(model: AVLLM, said: dict[str, Any], places: Iterable[_Place]) -> list[nn.Parameter]:
    """The model's own weights that loading the adapter may change, and that PEFT does not change back where it disables an adapter: biases, and the
    weights that PiSSA and OLoRA take their start from."""
    starts = said.get("init_lora_weights") in ("pissa", "olora")
    names = {f"{place.module}.bias" for place in places if place.part in ("bias", "base_layer.bias")}
    names |= {f"{place.module}.weight" for place in places if starts and place.part.startswith("lora_")}
    return [weight for name, weight in model.thinker.named_parameters() if name in names]


def check_adapter_names(model: AVLLM, folder: Path) -> None:
    """Raises ModelError where the names in the file are not those of the adapter that the model has."""
    _check_names(model, folder, set(_read_adapter(folder)[1]))


def _check_names(model: AVLLM, folder: Path, names: set[str]) -> None:
    """PEFT ignores adapter weights whose module does not exist; an adapter that silently does less than it should is refused."""
    wanted = {_plain_name(name) for name in names}
    have = {_plain_name(name) for name, _ in model.thinker.named_parameters()}
    odd = sorted((wanted - have) | ({name for name in have if "lora_" in name} - wanted))
    if odd:
        raise ModelError(f"{folder} was made for another model than {model.path}: {len(odd)} of its weights do not match, e.g. {odd[0]}.")


def _check_values(model: AVLLM, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ModelError where the model does not hold the file's numbers, or multiplies them by what is no finite number."""
    have = {_plain_name(name): weight for name, weight in model.thinker.named_parameters()}
    for name, tensor in tensors.items():
        weight = have[_plain_name(name)].detach().cpu().flatten()
        if not torch.equal(weight, tensor.to(weight.dtype).flatten()):
            raise ModelError(f"{folder} cannot be used on {model.path}: PEFT does not load its {name}. Save the adapter anew with a current PEFT.")
    for name, module in model.thinker.named_modules():
        for scale in (getattr(module, "scaling", None) or {}).values() if hasattr(module, "lora_A") else ():
            if not abs(scale) <= torch.finfo(model.dtype).max:  # also where it is NaN
                raise ModelError(f"{folder / SETTINGS} multiplies the update of {name} by {scale}: correct its lora_alpha or alpha_pattern.")


def _plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts in between when it is in the model, and not in the file."""
    name = re.sub(r"\.(default|modules_to_save)(?=\.|$)", "", name)
    return re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name)


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the weights, checked as far as that needs no model. Raises ModelError."""
    settings, weights = folder / SETTINGS, folder / WEIGHTS
    if not settings.is_file() or not weights.is_file():
        below = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS}")) if folder.is_dir() else []
        if settings.is_file() and (folder / "adapter_model.bin").is_file():
            raise ModelError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code when it is read, so it is not read here. Convert it where you "
                'trust it: python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
                "torch.load('adapter_model.bin', weights_only=True).items()}, 'adapter_model.safetensors')\""
            )
        raise ModelError(
            f"{folder} is no adapter: it needs {SETTINGS} and {WEIGHTS} "
            "(a run keeps the chosen one in <run>/adapter, each checkpoint its own in <checkpoint>/adapter)."
            + (f" There is one in {below[0]}." if below else "")
        )
    try:
        said = json.loads(settings.read_text(encoding="utf-8-sig"))  # some editors put a mark before it
    except (OSError, ValueError) as error:
        raise ModelError(f"{settings} is damaged, it is no JSON ({error}). Copy the adapter again.") from None
    if not isinstance(said, dict) or not isinstance(said.get("peft_type"), str):
        raise ModelError(f'{settings} is no configuration of PEFT: it has no "peft_type". Copy the adapter again.')
    if said["peft_type"] != "LORA":
        raise ModelError(f"{folder} is an adapter of the kind {said['peft_type']}; only LoRA (also DoRA and modules_to_save) is read here.")
    _check_settings(settings, said)
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{weights} is damaged or cut short ({str(error).splitlines()[0]}). Copy the adapter again.") from None
    if not tensors:
        raise ModelError(f"{weights} holds no weights. Copy the adapter again.")
    if bad := [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]:
        raise ModelError(
            f"{weights} holds numbers that are not finite (NaN or infinite) in {len(bad)} of its {len(tensors)} weights, e.g. {bad[0]}: its "
            "training diverged. Take an earlier checkpoint, or train again with a smaller learning rate."
        )
    return said, tensors


def _check_settings(path: Path, said: dict[str, Any]) -> None:
    """Raise ModelError where a rank or scale is none, or where the adapter is of a form that its weights alone do not give. Puts {} for patterns
    that are null, and PEFT's own start where the start leaves no trace."""

    def rank(value: Any) -> bool:
        return type(value) is int and value >= 1

    def alpha(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    for key, good, what in (("r", rank, "a whole number of at least 1"), ("lora_alpha", alpha, "a finite number")):
        pattern = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]
        if not good(said.get(key, 8)):
            raise ModelError(f'{path} does not fit its weights: "{key}" is {said[key]!r} and has to be {what}. Copy the adapter again.')
        said[pattern] = said.get(pattern) or {}
        if not isinstance(said[pattern], dict) or not all(good(value) for value in said[pattern].values()):
            raise ModelError(f'{path} does not fit its weights: "{pattern}" has to give {what} for each name. Copy the adapter again.')
    if said.get("trainable_token_indices"):
        raise ModelError(
            f"{path.parent} also trains single tokens (trainable_token_indices), which is not read here. Train it with modules_to_save or without."
        )
    start = said.get("init_lora_weights")
    if start in ("corda", "loftq", "lora_ga") or str(start).startswith("pissa_niter"):
        raise ModelError(
            f"{path.parent} was trained on weights that its start, {start}, had changed, and the file does not hold them. Save it as plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion), or merge it into the model where it was trained."
        )
    if start in ("eva", "gaussian", "orthogonal"):  # pissa and olora change the model's weights, the same way again when PEFT reads them
        said["init_lora_weights"] = True


class _Place(NamedTuple):
    """Where a weight of an adapter belongs: `path` is its module as the file calls it, `module` as this model does, `part` what it is of it."""

    path: str
    module: str
    part: str

    @property
    def name(self) -> str:
        """As PEFT's own file of this model's adapter has it."""
        return f"base_model.model.{self.module}.{self.part}"


def _places(model: AVLLM, folder: Path, names: Iterable[str]) -> dict[str, _Place]:
    """Each weight's place. Other trainers see the model below wrappers, and other versions of transformers have other levels in between, so levels
    that tell nothing (WRAPPERS) are left out where names are compared. Raises ModelError for a weight that has no place, and for
    two that have the same."""
    known = {name for name, _ in model.thinker.named_modules()}
    by_levels = {_levels(name): name for name in sorted(known, key=len)}  # of a wrapper and what it wraps the inner one
    found, lost = dict[str, _Place](), list[str]()
    for name in names:
        tail = re.search(r"\.(lora_[A-Za-z_]+(\.default)?(\.weight|\.bias)?|weight|bias)$", name)
        path = name[: tail.start()] if tail else name
        inner = re.sub(r"\.(base_layer|modules_to_save(\.default)?)$", "", path.removeprefix("base_model.model."))
        module = inner if inner in known else by_levels.get(_levels(inner))
        if tail and module:
            found[name] = _Place(inner, module, tail[1].replace(".default", ""))
        else:
            lost.append(name)
    if lost:
        talker = " They are of the talker, which is not loaded here." if any("talker" in name.split(".") for name in lost) else ""
        raise ModelError(
            f"{folder} was made for another model than {model.path}: {len(lost)} of its weights have no place here, e.g. {lost[0]}.{talker}"
        )
    adapted = {place.module for place in found.values() if place.part.startswith("lora_")}
    first = dict[str, str]()
    for name, (path, module, part) in found.items():
        if module in adapted and not part.startswith("lora_"):  # PEFT moves what was there one level down
            found[name] = _Place(path, module, f"base_layer.{part}")
        if (before := first.setdefault(found[name].name, name)) != name:
            raise ModelError(f"{folder / WEIGHTS} holds {before} and {name}, which are one weight of {model.path}. Save one adapter a file.")
    return found


def _levels(path: str) -> tuple[str, ...]:
    return tuple(level for level in path.split(".") if level not in WRAPPERS)


def _beginnings(place: _Place) -> tuple[str, str]:
    """A module's two names, without the end that they have in common."""
    old, new = place.path.split("."), place.module.split(".")
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return ".".join(old), ".".join(new)


def _name_modules(model: AVLLM, folder: Path, config: Any, tensors: dict[str, torch.Tensor], places: dict[str, _Place]) -> None:
    """Let a LoRA configuration name this model's modules, each with its rank and scale, instead of patterns over names that are not used here.

    Raises ModelError where the weights have another rank than the configuration says, and where it names modules that have no weights.
    """
    ranks, alphas, whole = dict[str, int](), dict[str, float](), set[str]()
    for name, place in places.items():
        if re.match(r"lora_(embedding_)?A", place.part):
            rank = _by_pattern(config.rank_pattern, place, config.r)
            if tensors[name].dim() < 2 or tensors[name].shape[0] != rank:
                raise ModelError(
                    f"{folder} does not fit its own {SETTINGS}: that says rank {rank} for {name}, whose shape is {tuple(tensors[name].shape)}. Copy "
                    "both files from one checkpoint."
                )
            ranks[place.module] = rank
            alphas[place.module] = _by_pattern(config.alpha_pattern, place, config.lora_alpha)
        elif place.part == "weight":  # a bias alone (bias="all") is put where it belongs as it is
            whole.add(place.module)
    if missing := sorted(_named(model, config, places) - set(ranks)):
        raise ModelError(
            f"{folder / WEIGHTS} is not whole: {SETTINGS} names {len(missing)} modules of which it holds nothing, e.g. {missing[0]}. Copy the "
            "adapter again, or correct target_modules."
        )
    config.target_modules, config.rank_pattern, config.alpha_pattern = set(ranks), ranks, alphas
    config.modules_to_save = sorted(whole) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _by_pattern(pattern: dict[str, Any], place: _Place, default: Any) -> Any:
    """What a rank_pattern or alpha_pattern says of a module, under the file's name for it or this model's."""
    from peft.utils.other import get_pattern_key

    keys = (get_pattern_key(list(pattern), name) for name in (place.path, place.module))
    return next((pattern[key] for key in keys if key in pattern), default)


def _named(model: AVLLM, config: Any, places: dict[str, _Place]) -> set[str]:
    """This model's modules that target_modules names, under the names of the file or under this model's: of the two those under which it names
    every module that the file has. Empty where it does so under neither: then it tells nothing."""
    from peft.tuners.tuners_utils import check_target_module_exists

    adapted = {place for place in places.values() if place.part.startswith("lora_")}
    layers = [
        name for name, module in model.thinker.named_modules() if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    if config.target_modules is None or str(config.target_modules).lower() == "all-linear":
        return set()
    for beginnings in (sorted({_beginnings(place) for place in adapted}, key=lambda pair: -len(pair[1])), [("", "")]):
        paths = {}
        for name in layers:
            old, new = next((pair for pair in beginnings if f"{name}.".startswith(f"{pair[1]}." * bool(pair[1]))), (None, ""))
            if old is not None:
                paths[name] = f"{old}.{name[len(new) :].lstrip('.')}".lstrip(".")
        named = {name for name, path in paths.items() if check_target_module_exists(config, path)}
        if {place.module for place in adapted} <= named:
            return named
    return set()


def check_finite(model: AVLLM) -> None:
    """Raise ModelError where a weight of the model is not a finite number."""
    for name, weight in model.thinker.named_parameters():
        if bool(torch.isfinite(weight).all()):
            continue
        if model.dtype == torch.float16:
            raise ModelError(
                f"{model.path}: in float16 the weights hold numbers that are not finite (NaN or infinite), e.g. {name}: so does the checkpoint, or "
                "it is beyond float16's range. Try bfloat16 or float32; if that says the same, get the checkpoint again."
            )
        raise ModelError(
            f"{model.path}: the weights hold numbers that are not finite (NaN or infinite), e.g. {name}. Get the checkpoint again; if it was merged "
            "or trained by you, take the one before."
        )
