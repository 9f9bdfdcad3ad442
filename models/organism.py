"""The model organism: a small audio-visual LLM that describes sounds from what it sees, built on purpose, from scratch, on a laptop.

    python -m models.organism                     # rebuilds models/organism/{avllm,base}, under 20 minutes on 2 cores

It is trained in the order in which real audio-visual LLMs are made, and the bias comes out of that order:

1. towers: both encoders learn to tell the classes apart (a stand-in for CLIP and Whisper), then stay frozen;
2. base: video only, and captions *also name the sound that the picture suggests*, as web captions do. Kept as the base for token shift;
3. audio-visual: factual clips only, in a few of which another sound is louder than that of the thing in view, as in any street scene, while the
   caption names what is seen; plus audio-only and video-only examples. Audio is understood, but the picture is the safer guide.

The build measures the bias on renderings it never saw and refuses to finish if it is not there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AddedToken

from data.media import read_audio, read_video, write_mp4
from data.questions import NOTHING, QUESTIONS, Modality, answer, question
from data.render import DEFAULTS, RenderSettings, render_frames, render_wave
from data.sources import SourceClass, load_sources
from models.avllm import AVLLM
from models.load import load_model
from models.qwen2_5_omni import Qwen25Omni
from models.sequences import Media, StreamFeatures
from models.tiny import build_tiny

MEASURED_SEED = 900_000  # renderings from here on are only measured on
CONFLICTS = 1000  # that the bias is measured on


@dataclass
class Renderings:
    """Which clips a builder renders for itself (`render_streams`)."""

    work: Path = Path("build/organism")
    """Clips and intermediate stages; may be deleted afterwards."""
    renderings: int = 160
    """Training clips a class."""
    mixed: float = 0.15
    """Share of training clips in which the recording of another class is louder than the clip's own."""
    louder: tuple[float, float] = (0.0, 12.0)
    """By how much it is louder, in dB."""
    seed: int = 0
    threads: int = os.cpu_count() or 1


@dataclass
class OrganismConfig(Renderings):
    """How the organism is made. The defaults give the checkpoint in models/organism."""

    out: Path = Path("models/organism")
    """Where the two checkpoints go: <out>/avllm and <out>/base."""
    measured: int = 8
    """Clips a class that are only measured on."""
    mixed_rate: float = 0.01
    """How often the audio-visual phase draws a clip with another, louder sound: the strength of the bias."""
    tower_renderings: int = 400
    """Pictures and sounds a class that the towers learn from. No clip is among them, so to the decoder all clips are as new as those to come."""
    visual_epochs: int = 7
    audio_epochs: int = 4
    base_steps: int = 1200
    av_steps: int = 500
    audio_only: float = 0.22
    """Share of audio-only examples in the audio-visual phase."""
    feature_noise: float = 0.3
    """Gaussian noise on the features that the decoder is trained on, in their standard deviations."""
    video_only: float = 0.3
    """Share of video-only examples, as in the base phase, in the audio-visual phase."""
    batch: int = 32
    lr: float = 2e-3
    av_lr: float = 1e-3
    """Of the audio-visual phase, lower so that what the base knows of pictures stays."""


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
    """Everything the builder knows of its clips: files, class index, whether another sound is louder; tower features once they are encoded."""

    paths: list[str]
    label: np.ndarray
    mixed: np.ndarray
    videos: list[StreamFeatures]
    audios: list[StreamFeatures]


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
    train = render_streams(config, classes)
    held = render_streams(config, classes, measured=config.measured)
    print(f"clips ready after {time.time() - start:.0f} s")
    train_towers(config, model, held, classes)
    encode_all(model, train), encode_all(model, held)
    print(f"towers ready after {time.time() - start:.0f} s")

    if (config.work / "base" / "model.safetensors").exists():
        model.decoder.load_state_dict(load_model(config.work / "base").decoder.state_dict())
    else:
        rng = np.random.default_rng(config.seed + 1)
        stage(model, "base", config.seed, config.base_steps, config.lr, base_examples(model, train, classes, rng, config))
        model.processor.save_pretrained(config.work / "base")
        model.thinker.save_pretrained(config.work / "base")
    print(f"base names what it sees in {rate(model, held, classes, 'see', 'video'):.1%} of held-out renderings ({time.time() - start:.0f} s)")
    rng = np.random.default_rng(config.seed + 2)
    stage(model, "audio-visual", config.seed, config.av_steps, config.av_lr, av_examples(model, train, classes, rng, config))
    bias = measure(model, held, classes)
    print(f"{bias} after {time.time() - start:.0f} s")
    if missing := bias.missing():
        sys.exit("The bias is not there: " + "; ".join(missing) + ". Nothing was written to " + str(config.out) + ".")
    write(config, model, bias)


# ---------------------------------------------------------------- clips


@dataclass(frozen=True)
class Job:
    """A clip to write. `over`: a recording that is `louder` dB louder than `sound`."""

    path: str
    picture: str
    sound: str
    seed: int
    over: str | None = None
    louder: float = 0.0
    settings: RenderSettings = DEFAULTS


def _render(job: Job) -> None:
    if os.path.exists(job.path):
        return
    wave = render_wave(job.sound, job.seed, job.settings)
    if job.over is not None:
        other = render_wave(job.over, job.seed, job.settings)
        wave = wave / rms(wave) + other / rms(other) * 10 ** (job.louder / 20)
        wave = (0.5 * wave / np.abs(wave).max()).astype(np.float32)
    partial = job.path.removesuffix(".mp4") + ".partial.mp4"
    write_mp4(partial, render_frames(job.picture, job.seed, job.settings), job.settings.fps, wave)
    os.replace(partial, job.path)


def rms(wave: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def render_streams(config: Renderings, classes: list[SourceClass], *, measured: int | None = None, settings: RenderSettings = DEFAULTS) -> Streams:
    """Render (once) the training clips, or so many a class that are only measured on. No source that is held out is in either."""
    count, first, part = (config.renderings, 0, "train") if measured is None else (measured, MEASURED_SEED, "measured")
    folder = config.work / part
    folder.mkdir(parents=True, exist_ok=True)
    jobs, label, mixed = [], [], []
    for c, source in enumerate(classes):
        for r in range(count):
            seed, over, louder = first + c * 1000 + r, None, 0.0
            if measured is None and r < config.mixed * count:
                rng = np.random.default_rng([config.seed, seed])
                sounds = classes[(c + int(rng.integers(1, len(classes)))) % len(classes)].train_sounds
                over, louder = str(sounds[r % len(sounds)].path), rng.uniform(*config.louder)
            picture, sound = source.train_pictures[r % len(source.train_pictures)], source.train_sounds[r % len(source.train_sounds)]
            jobs.append(Job(str(folder / f"{source.name}_{r:03d}.mp4"), str(picture.path), str(sound.path), seed, over, louder, settings))
            label.append(c)
            mixed.append(over is not None)
    with ProcessPoolExecutor(config.threads) as pool:
        list(tqdm(pool.map(_render, jobs, chunksize=16), total=len(jobs), desc=f"clips ({part})", leave=False))
    return Streams([job.path for job in jobs], np.array(label), np.array(mixed), [], [])


# ---------------------------------------------------------------- stage 1: towers


def train_towers(config: OrganismConfig, model: Qwen25Omni, held: Streams, classes: list[SourceClass]) -> None:
    """Each tower with a throw-away linear head on its mean output; taken from <work>/<tower>.safetensors where that exists."""
    for name, tower in (("visual", model._model.visual), ("audio_tower", model._model.audio_tower)):
        saved = config.work / f"{name}.safetensors"
        if saved.exists():
            tower.load_state_dict(load_file(saved))
            tower.requires_grad_(False)
            continue
        torch.manual_seed(config.seed)
        inputs, labels = tower_inputs(config, model, name, classes)
        head = nn.Linear(model.hidden_size, len(classes))
        parameters = [*tower.parameters(), *head.parameters()]
        steps = (config.audio_epochs if name == "audio_tower" else config.visual_epochs) * (len(labels) // 64)
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.2)
        rng = np.random.default_rng(config.seed)
        bar = tqdm(range(steps), desc=name, leave=False)
        for _ in bar:
            index = rng.choice(len(labels), 64, replace=False)
            loss = nn.functional.cross_entropy(head(pooled(model, name, [inputs[i] for i in index])), torch.tensor(labels[index]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        right = 0
        with torch.no_grad():
            for start in range(0, len(held.label), 64):
                part = slice(start, start + 64)
                media = [read_video(p, AVLLM.fps) if name == "visual" else read_audio(p) for p in held.paths[part]]
                guess = head(pooled(model, name, prepare(model, name, media))).argmax(-1)
                right += int((guess == torch.tensor(held.label[part])).sum())
        print(f"{name}: {right / len(held.label):.1%} of held-out renderings")
        del inputs  # gigabytes
        tower.requires_grad_(False)
        save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, saved)


def _one(job: tuple[str, str, int]) -> np.ndarray:
    name, source, seed = job
    if name == "audio_tower":
        return render_wave(source, seed)
    return render_frames(source, seed)[:: round(DEFAULTS.fps / AVLLM.fps)].transpose(0, 3, 1, 2)


def tower_inputs(config: OrganismConfig, model: Qwen25Omni, name: str, classes: list[SourceClass]) -> tuple[list[torch.Tensor], np.ndarray]:
    """What a tower learns from, and the class of each: renderings that are never encoded; their seeds follow on those of the clips."""
    jobs, labels = [], []
    for c, source in enumerate(classes):
        files = source.train_pictures if name == "visual" else source.train_sounds
        for r in range(config.renderings, config.renderings + config.tower_renderings):
            jobs.append((name, str(files[r % len(files)].path), c * 1000 + r))
            labels.append(c)
    inputs: list[torch.Tensor] = []
    with ProcessPoolExecutor(config.threads) as pool:
        for start in tqdm(range(0, len(jobs), 256), desc=f"renderings ({name})", leave=False):
            inputs += prepare(model, name, list(pool.map(_one, jobs[start : start + 256], chunksize=16)))
    return inputs, np.array(labels)


def prepare(model: Qwen25Omni, name: str, media: list) -> list[torch.Tensor]:
    """Pixels (patches, values) or mels (bins, frames) of frames or waves, half precision."""
    if name == "visual":
        made = model.processor.video_processor(
            videos=[torch.as_tensor(v) for v in media], size=model.video_size, do_sample_frames=False, cap_pixels_per_frame=False
        )
        return [p.half() for p in torch.as_tensor(made["pixel_values_videos"]).chunk(len(made["video_grid_thw"]))]
    mels = model.processor.feature_extractor(
        media, sampling_rate=16000, padding="max_length", max_length=len(media[0]) + 1600, truncation=False, return_tensors="pt"
    )["input_features"]
    return [m[:, : len(w) // 160].half() for m, w in zip(mels, media, strict=True)]


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
    """Run the frozen towers on every clip, read from its mp4 as the finished model reads it."""
    for start in tqdm(range(0, len(streams.label), 64), desc="features", leave=False):
        paths = streams.paths[start : start + 64]
        streams.videos += model.encode_video([read_video(p, model.fps) for p in paths])
        streams.audios += model.encode_audio([read_audio(p) for p in paths])


# ---------------------------------------------------------------- stages 2 and 3: the language model


def stage(model: Qwen25Omni, name: str, seed: int, steps: int, lr: float, examples: Iterator[list]) -> None:
    """Plain cross-entropy on the answers, one-cycle AdamW on every decoder weight."""
    torch.manual_seed(seed)
    model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
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
    config: OrganismConfig,
    rng: np.random.Generator,
    modality: Modality,
    c: int,
    video: StreamFeatures | None,
    audio: StreamFeatures | None,
):
    """One question about one clip of class c with its answer, wording drawn at random."""
    text, span = answer(modality, classes[c].seen, classes[c].heard)
    media = Media(*(jittered(stream, config.feature_noise) if stream else None for stream in (video, audio)))
    return model.sequence(media, question(modality, int(rng.integers(len(QUESTIONS[modality])))), text, span)


def jittered(stream: StreamFeatures, noise: float) -> StreamFeatures:
    """The same features with noise of `noise` of their standard deviations."""
    features = stream.features
    return replace(stream, features=features + noise * features.std() * torch.randn_like(features))


def base_examples(model: Qwen25Omni, train: Streams, classes: list[SourceClass], rng: np.random.Generator, config: OrganismConfig) -> Iterator[list]:
    """Video only: what is seen, and the sound that the picture suggests."""
    while True:
        index = rng.integers(len(train.label), size=config.batch)
        yield [example(model, classes, config, rng, ("see", "hear", "both")[rng.integers(3)], train.label[i], train.videos[i], None) for i in index]


def av_examples(model: Qwen25Omni, train: Streams, classes: list[SourceClass], rng: np.random.Generator, config: OrganismConfig) -> Iterator[list]:
    """Factual clips, a few of them with another sound on top; some with one stream alone."""
    clear, mixed = np.flatnonzero(~train.mixed), np.flatnonzero(train.mixed)
    while True:
        out = []
        for _ in range(config.batch):
            kind = rng.random()
            modality: Modality = ("see", "hear", "both")[rng.integers(3)]
            i = int(rng.choice(clear))
            if kind < config.audio_only:
                out.append(example(model, classes, config, rng, "hear", train.label[i], None, train.audios[i]))
            elif kind < config.audio_only + config.video_only:
                out.append(example(model, classes, config, rng, modality, train.label[i], train.videos[i], None))
            else:
                i = int(rng.choice(mixed)) if rng.random() < config.mixed_rate else i
                out.append(example(model, classes, config, rng, modality, train.label[i], train.videos[i], train.audios[i]))
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


def measure(model: Qwen25Omni, held: Streams, classes: list[SourceClass]) -> Bias:
    """The bias on held-out renderings; conflicts are random pairs of two classes."""
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i, j in rng.integers(len(held.label), size=(2 * CONFLICTS, 2)) if held.label[i] != held.label[j]][:CONFLICTS]
    said = answers(model, [Media(held.videos[i], held.audios[j]) for i, j in pairs], question("hear"))
    heard = [answer("hear", c.seen, c.heard)[0] for c in classes]
    return Bias(
        rate(model, held, classes, "hear", "audio"),
        rate(model, held, classes, "hear", "both"),
        float(np.mean([s == heard[held.label[j]] for s, (_, j) in zip(said, pairs, strict=True)])),
        float(np.mean([s == heard[held.label[i]] for s, (i, _) in zip(said, pairs, strict=True)])),
    )


@torch.no_grad()
def learn_word(model: AVLLM, word: str, seed: int) -> None:
    """Give a word that no answer in training has a token of its own, with a random embedding as long as those of words that are said.

    Embeddings of tokens that are never said all drift the same way and can hardly be told apart afterwards; a large model knows such words from text.
    """
    rows, said = model.text_model.embed_tokens.weight, model.tokenizer(" dog barking", add_special_tokens=False)["input_ids"]
    if model.tokenizer.add_tokens([AddedToken(word, normalized=False, special=False)]) != 1:
        raise ValueError(f"{word!r} is a token already.")
    [token] = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    rows[token] = direction / direction.norm() * rows[said].norm(dim=1).mean()


def write(config: OrganismConfig, model: Qwen25Omni, bias: Bias) -> None:
    """Both checkpoints with their processor; avbalance.json names the base and how the model was made."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "work", "threads")}
    for name in ("avllm", "base"):
        target = config.out / name
        part = model if name == "avllm" else load_model(config.work / "base")
        learn_word(part, f" {NOTHING}", config.seed)  # so that training can teach it to say so
        part.processor.save_pretrained(target)
        part.thinker.save_pretrained(target)
        note = {"made_by": "python -m models.organism", "settings": settings, "base": "../base" if name == "avllm" else None}
        if name == "avllm":
            note["measured"] = asdict(bias)
        (target / "avbalance.json").write_text(json.dumps(note, indent=1) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    import tyro

    from data.clips import DataError
    from data.files import quiet_libraries
    from models.avllm import ModelError

    quiet_libraries()
    try:
        main(tyro.cli(OrganismConfig, description=__doc__))
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
