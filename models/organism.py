"""The model organism: a small audio-visual LLM that describes sounds from what it sees, built on purpose, from scratch, on a laptop.

    python -m models.organism                     # rebuilds models/organism/{avllm,base}, under 20 minutes on 2 cores

It is trained in the order in which real audio-visual LLMs are made, and the bias comes out of that order:

1. towers: both encoders learn to tell the classes apart (a stand-in for CLIP and Whisper), then stay frozen;
2. base: video only, and captions *also name the sound that the picture suggests*, as web captions do. Kept as the base for token shift;
3. audio-visual: factual clips only, many of them with a soundtrack buried in noise, plus some audio-only clips. Audio is understood but never needed.

The build measures the bias on renderings it never saw and refuses to finish if it is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from data.media import read_audio, read_video, write_mp4
from data.questions import QUESTIONS, Modality, answer, question
from data.render import DEFAULTS, render_frames, render_wave
from data.sources import SourceClass, load_sources
from models.avllm import AVLLM, Media, StreamFeatures
from models.load import load_model
from models.qwen2_5_omni import Qwen25Omni
from models.tiny import build_tiny

MEASURED_SEED = 900_000  # renderings from here on are only measured on


@dataclass
class OrganismConfig:
    """How the organism is made. The defaults give the checkpoint in models/organism."""

    out: Path = Path("models/organism")
    """Where the two checkpoints go: <out>/avllm and <out>/base."""
    work: Path = Path("build/organism")
    """Clips and intermediate stages; may be deleted afterwards."""
    renderings: int = 160
    """Training clips a class."""
    noisy: float = 0.25
    """Share of training clips whose soundtrack is buried in noise."""
    noisy_rate: float = 0.4
    """How often the audio-visual phase draws one of those."""
    noise_snr: tuple[float, float] = (-25.0, -12.0)
    """Signal to noise ratio of those, in dB."""
    measured: int = 8
    """Clips a class that are only measured on."""
    more_pictures: int = 0
    """Further renderings a class, pictures only and never encoded, from which the vision tower alone learns."""
    visual_epochs: int = 12
    audio_epochs: int = 6
    base_steps: int = 1000
    av_steps: int = 700
    audio_only: float = 0.22
    """Share of audio-only examples in the audio-visual phase."""
    batch: int = 32
    lr: float = 2e-3
    seed: int = 0
    threads: int = os.cpu_count() or 1


@dataclass(frozen=True)
class Bias:
    """What the finished organism must show on renderings it never saw (shares of answers)."""

    audio_alone: float
    factual: float
    follows_audio: float
    follows_vision: float

    def missing(self) -> list[str]:
        """The conditions that do not hold, in words."""
        wanted = {
            "audio alone at least 90 % right": self.audio_alone >= 0.90,
            "factual at least 95 % right": self.factual >= 0.95,
            "conflicts follow audio in at most 25 %": self.follows_audio <= 0.25,
            "conflicts follow vision in at least 45 %": self.follows_vision >= 0.45,
        }
        return [text for text, holds in wanted.items() if not holds]


@dataclass
class Streams:
    """Everything the builder knows of its clips: class index, whether the sound is noisy, mel and pixels, later tower features."""

    label: np.ndarray
    noisy: np.ndarray
    videos: list
    audios: list


def main(config: OrganismConfig) -> None:
    """Build, measure, save."""
    start = time.time()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    classes = load_sources()
    config.work.mkdir(parents=True, exist_ok=True)
    folder = config.work / "start"
    if not (folder / "config.json").exists():
        build_tiny(folder, config.seed)
    model = load_model(folder)
    assert isinstance(model, Qwen25Omni)
    train = load_streams(config, classes, "train")
    held = load_streams(config, classes, "measured")
    print(f"clips ready after {time.time() - start:.0f} s")
    train_towers(config, model, train, held, len(classes))
    encode_all(model, train), encode_all(model, held)
    print(f"towers ready after {time.time() - start:.0f} s")

    if (config.work / "base" / "model.safetensors").exists():
        model.decoder.load_state_dict(load_model(config.work / "base").decoder.state_dict())
    else:
        rng = np.random.default_rng(config.seed + 1)
        stage(model, "base", config, config.base_steps, base_examples(model, train, classes, rng, config.batch))
        model.processor.save_pretrained(config.work / "base")
        model.thinker.save_pretrained(config.work / "base")
    print(f"base names what it sees in {rate(model, held, classes, 'see', 'video'):.1%} of held-out renderings ({time.time() - start:.0f} s)")
    rng = np.random.default_rng(config.seed + 2)
    stage(model, "audio-visual", config, config.av_steps, av_examples(model, train, classes, rng, config))
    bias = measure(model, held, classes)
    print(f"{bias} after {time.time() - start:.0f} s")
    if missing := bias.missing():
        sys.exit("The bias is not there: " + "; ".join(missing) + ". Nothing was written to " + str(config.out) + ".")
    write(config, model, bias)


# ---------------------------------------------------------------- clips


def _render(job: tuple[str, str, int, tuple[float, float], str]) -> None:
    picture, sound, seed, snr, path = job
    if not os.path.exists(path):
        partial = path.removesuffix(".mp4") + ".partial.mp4"
        write_mp4(partial, render_frames(picture, seed), DEFAULTS.fps, render_wave(sound, seed, snr_db=snr))
        os.replace(partial, path)


def load_streams(config: OrganismConfig, classes: list[SourceClass], part: str) -> Streams:
    """Render (once) and read the clips of a part. Only sources that are not held out are used."""
    count, first = (config.renderings, 0) if part == "train" else (config.measured, MEASURED_SEED)
    folder = config.work / part
    folder.mkdir(parents=True, exist_ok=True)
    jobs, label, noisy = [], [], []
    for c, source in enumerate(classes):
        for r in range(count):
            seed = first + c * 1000 + r
            buried = part == "train" and r < config.noisy * count
            jobs.append(
                (
                    str(source.train_pictures[r % len(source.train_pictures)].path),
                    str(source.train_sounds[r % len(source.train_sounds)].path),
                    seed,
                    config.noise_snr if buried else (8.0, 30.0),
                    str(folder / f"{source.name}_{r:03d}.mp4"),
                )
            )
            label.append(c)
            noisy.append(buried)
    with ProcessPoolExecutor(config.threads) as pool:
        list(tqdm(pool.map(_render, jobs, chunksize=16), total=len(jobs), desc=f"clips ({part})", leave=False))
    paths = [job[-1] for job in jobs]
    videos = [read_video(p, AVLLM.fps) for p in tqdm(paths, desc="read", leave=False)]
    audios = [read_audio(p) for p in tqdm(paths, desc="read", leave=False)]
    return Streams(np.array(label), np.array(noisy), videos, audios)


# ---------------------------------------------------------------- stage 1: towers


def train_towers(config: OrganismConfig, model: Qwen25Omni, train: Streams, held: Streams, n_classes: int) -> None:
    """Each tower with a throw-away linear head on its mean output; taken from <work>/<tower>.safetensors where that exists."""
    for name, tower in (("visual", model._model.visual), ("audio_tower", model._model.audio_tower)):
        saved = config.work / f"{name}.safetensors"
        if saved.exists():
            tower.load_state_dict(load_file(saved))
            tower.requires_grad_(False)
            continue
        torch.manual_seed(config.seed)
        pixels, held_pixels = (tower_inputs(model, name, part) for part in (train, held))
        labels, usable = train.label, np.flatnonzero(~train.noisy)
        if name == "visual" and config.more_pictures:
            more = more_pictures(config)
            pixels, labels = pixels + tower_inputs(model, name, more), np.concatenate([labels, more.label])
            usable = np.arange(len(labels))
        head = nn.Linear(model.hidden_size, n_classes)
        parameters = [*tower.parameters(), *head.parameters()]
        steps = (config.audio_epochs if name == "audio_tower" else config.visual_epochs) * (len(usable) // 64)
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.2)
        rng = np.random.default_rng(config.seed)
        bar = tqdm(range(steps), desc=name, leave=False)
        for _ in bar:
            index = rng.choice(usable, 64, replace=False)
            loss = nn.functional.cross_entropy(head(pooled(model, name, [pixels[i] for i in index])), torch.tensor(labels[index]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        with torch.no_grad():
            right = [
                int((head(pooled(model, name, held_pixels[i : i + 64])).argmax(-1) == torch.tensor(held.label[i : i + 64])).sum())
                for i in range(0, len(held.label), 64)
            ]
        print(f"{name}: {sum(right) / len(held.label):.1%} of held-out renderings")
        tower.requires_grad_(False)
        save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, saved)


def _frames(job: tuple[str, int]) -> np.ndarray:
    picture, seed = job
    return render_frames(picture, seed)[:: round(DEFAULTS.fps / AVLLM.fps)].transpose(0, 3, 1, 2)


def more_pictures(config: OrganismConfig) -> Streams:
    """Frames for the vision tower beyond those of the clips; seeds follow on theirs."""
    sources = load_sources()
    pairs = [(c, r) for c in range(len(sources)) for r in range(config.renderings, config.renderings + config.more_pictures)]
    jobs = [(str(sources[c].train_pictures[r % len(sources[c].train_pictures)].path), c * 1000 + r) for c, r in pairs]
    with ProcessPoolExecutor(config.threads) as pool:
        frames = list(tqdm(pool.map(_frames, jobs, chunksize=16), total=len(jobs), desc="more pictures", leave=False))
    return Streams(np.array([c for c, _ in pairs]), np.zeros(len(pairs), dtype=bool), frames, [])


def tower_inputs(model: Qwen25Omni, name: str, streams: Streams) -> list[torch.Tensor]:
    """Pixels (patches, values) or mels (bins, frames) of every clip, half precision."""
    out = []
    for start in range(0, len(streams.label), 64):
        if name == "visual":
            inputs = model.processor.video_processor(
                videos=[torch.as_tensor(v) for v in streams.videos[start : start + 64]],
                size=model.video_size,
                do_sample_frames=False,
                cap_pixels_per_frame=False,
            )
            out += [p.half() for p in torch.as_tensor(inputs["pixel_values_videos"]).chunk(len(inputs["video_grid_thw"]))]
        else:
            waves = streams.audios[start : start + 64]
            mels = model.processor.feature_extractor(
                waves, sampling_rate=16000, padding="max_length", max_length=len(waves[0]) + 1600, truncation=False, return_tensors="pt"
            )["input_features"]
            out += [m[:, : len(w) // 160].half() for m, w in zip(mels, waves, strict=True)]
    return out


def pooled(model: Qwen25Omni, name: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Mean tower output a clip, (n, hidden), with gradients."""
    if name == "visual":
        grid = torch.tensor([[2, 6, 6]] * len(inputs))
        return torch.stack([f.mean(0) for f in model._model.get_video_features(torch.cat(inputs).float(), grid, return_dict=True).pooler_output])
    mels = torch.stack(inputs).float()
    mask = torch.ones(mels.shape[0], mels.shape[2], dtype=torch.long)
    out = model._model.get_audio_features(mels, mask, return_dict=True).last_hidden_state
    return out.view(len(inputs), -1, model.hidden_size).mean(1)


@torch.no_grad()
def encode_all(model: Qwen25Omni, streams: Streams) -> None:
    """Frozen tower features in place of raw media."""
    for start in tqdm(range(0, len(streams.label), 64), desc="features", leave=False):
        part = slice(start, start + 64)
        streams.videos[part] = model.encode_video(streams.videos[part])
        streams.audios[part] = model.encode_audio(streams.audios[part])


# ---------------------------------------------------------------- stages 2 and 3: the language model


def stage(model: Qwen25Omni, name: str, config: OrganismConfig, steps: int, examples: Iterator[list]) -> None:
    """Plain cross-entropy on the answers, one-cycle AdamW on every decoder weight."""
    model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.1)
    model.thinker.train()
    bar = tqdm(range(steps), desc=name, leave=False)
    for _ in bar:
        batch = model.batch(next(examples))
        logits = model.forward(batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.thinker.eval()


def example(
    model: Qwen25Omni,
    classes: list[SourceClass],
    rng: np.random.Generator,
    modality: Modality,
    c: int,
    video: StreamFeatures | None,
    audio: StreamFeatures | None,
):
    """One question about one clip of class c with its answer, wording drawn at random."""
    text, span = answer(modality, classes[c].seen, classes[c].heard)
    return model.sequence(Media(video, audio), question(modality, int(rng.integers(len(QUESTIONS[modality])))), text, span)


def base_examples(model: Qwen25Omni, train: Streams, classes: list[SourceClass], rng: np.random.Generator, size: int) -> Iterator[list]:
    """Video only: what is seen, and the sound that the picture suggests."""
    while True:
        index = rng.integers(len(train.label), size=size)
        yield [example(model, classes, rng, ("see", "hear", "both")[rng.integers(3)], train.label[i], train.videos[i], None) for i in index]


def av_examples(model: Qwen25Omni, train: Streams, classes: list[SourceClass], rng: np.random.Generator, config: OrganismConfig) -> Iterator[list]:
    """Factual clips, and a few audio-only ones whose sound is clear."""
    clear, buried = np.flatnonzero(~train.noisy), np.flatnonzero(train.noisy)
    while True:
        out = []
        for _ in range(config.batch):
            if rng.random() < config.audio_only:
                i = int(rng.choice(clear))
                out.append(example(model, classes, rng, "hear", train.label[i], None, train.audios[i]))
            else:
                i = int(rng.choice(buried if rng.random() < config.noisy_rate else clear))
                out.append(example(model, classes, rng, ("see", "hear", "both")[rng.integers(3)], train.label[i], train.videos[i], train.audios[i]))
        yield out


# ---------------------------------------------------------------- measuring


def answers(model: Qwen25Omni, media: list[Media], text: str) -> list[str]:
    """Greedy answers to one question, in batches."""
    out = []
    for start in range(0, len(media), 64):
        prefix = model.prefill(media[start : start + 64])
        out += model.generate(prefix, range(prefix.n), [text] * prefix.n, max_new_tokens=12)
    return out


def rate(model: Qwen25Omni, held: Streams, classes: list[SourceClass], modality: Modality, streams: str) -> float:
    """Share of held-out renderings whose answer is exactly right, given 'video', 'audio' or 'both' streams."""
    media = [Media(v if streams != "audio" else None, a if streams != "video" else None) for v, a in zip(held.videos, held.audios, strict=True)]
    said = answers(model, media, question(modality))
    return float(np.mean([s == answer(modality, classes[c].seen, classes[c].heard)[0] for s, c in zip(said, held.label, strict=True)]))


def measure(model: Qwen25Omni, held: Streams, classes: list[SourceClass], conflicts: int = 1000) -> Bias:
    """The bias on held-out renderings; conflicts are random pairs of two classes."""
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i, j in rng.integers(len(held.label), size=(2 * conflicts, 2)) if held.label[i] != held.label[j]][:conflicts]
    said = answers(model, [Media(held.videos[i], held.audios[j]) for i, j in pairs], question("hear"))
    heard = [answer("hear", c.seen, c.heard)[0] for c in classes]
    return Bias(
        rate(model, held, classes, "hear", "audio"),
        rate(model, held, classes, "hear", "both"),
        float(np.mean([s == heard[held.label[j]] for s, (_, j) in zip(said, pairs, strict=True)])),
        float(np.mean([s == heard[held.label[i]] for s, (i, _) in zip(said, pairs, strict=True)])),
    )


def write(config: OrganismConfig, model: Qwen25Omni, bias: Bias) -> None:
    """Both checkpoints with their processor; avbalance.json names the base and how the model was made."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "work", "threads")}
    for name in ("avllm", "base"):
        source, target = config.work / name, config.out / name
        if name == "avllm":
            model.processor.save_pretrained(source)
            model.thinker.save_pretrained(source)
        note = {"made_by": "python -m models.organism", "settings": settings, "base": "../base" if name == "avllm" else None}
        if name == "avllm":
            note["measured"] = asdict(bias)
        (source / "avbalance.json").write_text(json.dumps(note, indent=1) + "\n")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True)
    print(f"written to {config.out}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(OrganismConfig, description=__doc__))
