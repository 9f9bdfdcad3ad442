"""Attention knockout with exact prefix reuse against the published procedure, in one process, on a random Qwen2.5-Omni. No network.

    python benchmarks/knockout.py                                             # 12 layers, 512 wide, on the CPU, one thread
    python benchmarks/knockout.py --threads 2 --full                          # every cut of the baselines is timed, none is scaled
    python benchmarks/knockout.py --device cuda --dtype bfloat16 --size 3b    # 36 layers, 2048 wide

One clip of 10 s, 24 answer tokens, the standard set of cuts: {video, audio} into {emitters, question, question+emitters}, every single-layer
window (72 cuts at 12 layers). Baselines, written for this comparison:

    published   eager attention everywhere, one cut a time by a hook that edits the mask of its layers (Geva et al. 2023, arXiv 2304.14767), and for
                each cut the whole prompt through towers and decoder; captions by the stock `generate`
    cached      SDPA, tower features computed once, the head at answer rows only; one cut a time, the whole prompt through the decoder

Both must give the log-probabilities of the engine, or nothing is printed. Times are the best of several runs; ratios are what counts.
Memory is the peak of all tensors above the loaded model, as torch counts it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1]))

from analysis.visits import forced
from data.questions import question
from models import Cut, Kind, Media, self_check
from models.attention import IMPLEMENTATION
from models.avllm import AUDIO_RATE
from models.qwen2_5_omni import Qwen25Omni
from models.tiny import build_processor, build_tokenizer, corpus, tiny_config

SITES = [f"{source}->{target}" for source in ("video", "audio") for target in ("emitters", "question", "question+emitters")]
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 512, "layers": 12, "heads": 8, "key_heads": 2, "tower": 128, "tower_layers": 4},
    "3b": {
        "hidden": 2048, "layers": 36, "heads": 16, "key_heads": 2, "inner": 11008, "vocabulary": 151_936, "tower": 1280, "tower_layers": 32,
    },
}  # fmt: skip
ANSWER, FRAME = 24, 168


# ---------------------------------------------------------------- the model and its inputs


def random_model(device: str, dtype: torch.dtype, seed: int = 0, change: Callable[[Any], None] | None = None, **sizes: int) -> Qwen25Omni:
    """Random weights, large enough that attention is far from uniform and cuts matter. change: what else to set in the configuration."""
    tokenizer = build_tokenizer(corpus())
    processor = build_processor(tokenizer)
    processor.video_processor.size = {"shortest_edge": FRAME * FRAME, "longest_edge": FRAME * FRAME}
    config = tiny_config(tokenizer, **sizes)
    if change is not None:
        change(config)
    torch.manual_seed(seed)
    with torch.device(device):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in thinker.model.language_model.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    thinker.set_attn_implementation({"text_config": IMPLEMENTATION})
    thinker.generation_config.eos_token_id = None  # every answer has all its tokens, so that equal work is compared
    return Qwen25Omni("random", thinker.eval(), processor, device, None)


def random_streams(seconds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames (2 * seconds, 3, FRAME, FRAME) and a wave."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (2 * seconds, 3, FRAME, FRAME), dtype=np.uint8)
    return frames, rng.standard_normal(seconds * AUDIO_RATE).astype(np.float32) * 0.1


def encode(model: Qwen25Omni, streams) -> Media:
    """Through the towers."""
    frames, wave = streams
    with torch.no_grad():
        return Media(model.encode_video([frames])[0], model.encode_audio([wave])[0])


def standard_cuts(layers: int) -> list[Cut]:
    """Every single-layer window at every site of the standard set."""
    return [Cut.at(site, layer, layer + 1) for site in SITES for layer in range(layers)]


# ---------------------------------------------------------------- the baselines


@contextmanager
def edited_masks(model: Qwen25Omni, cut: Cut | None, kinds: torch.Tensor) -> Iterator[None]:
    """Hooks that block `cut` in the mask (float or bool) that the decoder's layers are given. kinds: (T,); rows beyond are emitters."""

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"]
        keys = mask.shape[-1]
        known = torch.cat([kinds, kinds.new_full((max(0, keys - len(kinds)),), int(Kind.EMITTER))])[:keys]
        rows = known[keys - mask.shape[-2] :]
        blocked = torch.isin(rows, targets)[:, None] & torch.isin(known, sources)[None, :]
        kwargs["attention_mask"] = mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
        return args, kwargs

    handles = []
    if cut is not None:
        targets, sources = (torch.tensor([int(k) for k in side], device=kinds.device) for side in (cut.target, cut.source))
        for layer in model.text_model.layers[cut.start : cut.stop]:
            handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention(model: Qwen25Omni, implementation: str) -> Iterator[None]:
    """The whole model, towers included, under a stock implementation."""
    model.thinker.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.thinker.set_attn_implementation({"": "sdpa", "text_config": IMPLEMENTATION, "vision_config": "sdpa", "audio_config": "sdpa"})


class Published:
    """Everything anew for every cut, with the stock processor's inputs and the stock model."""

    implementation = "eager"

    def __init__(self, model: Qwen25Omni, streams, suffix):
        frames, wave = streams
        self.model, self.suffix = model, suffix
        text = model.processor.apply_chat_template(
            [
                {"role": "system", "content": model.system_prompt},
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question("hear")}]},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = model.processor(
            text=[text],
            videos=[torch.as_tensor(frames)],
            videos_kwargs={"size": model.video_size, "fps": model.fps, "do_sample_frames": False},
            audio=[wave],
            audio_from_video_indices=[0],
            load_audio_from_video=True,
            return_tensors="pt",
        )
        self.prompt = inputs.to(model.device)
        for name in ("pixel_values_videos", "input_features"):
            self.prompt[name] = self.prompt[name].to(model.dtype)
        answer = suffix.ids[suffix.first + 1 :].to(model.device)[None]
        self.whole = dict(self.prompt)
        self.whole["input_ids"] = torch.cat([self.prompt["input_ids"], answer], 1)
        self.whole["attention_mask"] = torch.ones_like(self.whole["input_ids"])

    def kinds(self, media: Media) -> torch.Tensor:
        layout = self.model.layout(media)
        assert torch.equal(torch.cat([layout.ids, self.suffix.ids]), self.whole["input_ids"][0].cpu()), "the prompts differ"
        return torch.cat([layout.kinds, self.suffix.kinds]).to(self.model.device)

    @torch.no_grad()
    def score(self, cut: Cut | None, kinds: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the answer tokens, (24,)."""
        with edited_masks(self.model, cut, kinds):
            logits = self.model.thinker(**self.whole, use_audio_in_video=True, use_cache=False).logits[0, -ANSWER:]
        return picked(logits, self.suffix.targets)

    @torch.no_grad()
    def caption(self, cut: Cut | None, kinds: torch.Tensor) -> list[int]:
        with edited_masks(self.model, cut, kinds[: self.prompt["input_ids"].shape[1]]):
            ids = self.model.thinker.generate(**self.prompt, use_audio_in_video=True, max_new_tokens=ANSWER, do_sample=False)
        return ids[0, self.prompt["input_ids"].shape[1] :].tolist()


class Cached:
    """SDPA on tower features that are there already, whole prompt for every cut, head at the rows that are wanted."""

    implementation = "sdpa"

    def __init__(self, model: Qwen25Omni, media: Media, suffix):
        self.model, self.suffix = model, suffix
        layout = model.layout(media)
        embeds = model.text_model.embed_tokens(torch.cat([layout.ids, suffix.ids]).to(model.device)[None])
        at = torch.cat([model.is_media(layout.ids), torch.zeros_like(suffix.ids, dtype=torch.bool)]).to(model.device)
        self.embeds = embeds.detach().masked_scatter(at[None, :, None], model._features(media, layout).to(model.device))
        after = layout.next_position
        self.positions = torch.cat([layout.positions, (torch.arange(len(suffix.ids) + ANSWER) + after).expand(3, -1)], 1).to(model.device)[:, None]
        self.prompt = len(layout.ids) + suffix.first + 1

    @torch.no_grad()
    def rows(self, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        past = cache.get_seq_length() if cache is not None else 0
        n = embeds.shape[1]
        causal = torch.ones(n, past + n, dtype=torch.bool, device=embeds.device).tril(past)[None, None]
        return self.model.text_model(
            inputs_embeds=embeds,
            position_ids=self.positions[:, :, past : past + n],
            attention_mask={"full_attention": causal},
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    @torch.no_grad()
    def score(self, cut: Cut | None, kinds: torch.Tensor) -> torch.Tensor:
        with edited_masks(self.model, cut, kinds):
            states = self.rows(self.embeds, None)
        return picked(self.model.head(states[0, -ANSWER:]), self.suffix.targets)

    @torch.no_grad()
    def caption(self, cut: Cut | None, kinds: torch.Tensor) -> list[int]:
        from transformers import DynamicCache

        cache, embeds, said = DynamicCache(), self.embeds[:, : self.prompt], []
        with edited_masks(self.model, cut, kinds[: self.prompt]):
            for _ in range(ANSWER):
                token = self.model.head(self.rows(embeds, cache)[0, -1]).argmax()
                said.append(int(token))
                embeds = self.model.text_model.embed_tokens(token)[None, None]
        return said


def picked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of targets (n,) under logits (n, V)."""
    return logits.float().log_softmax(-1).gather(1, targets.to(logits.device)[:, None])[:, 0].cpu()


# ---------------------------------------------------------------- measuring


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The best of several runs."""
    best = float("inf")
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def wait() -> None:
    """For the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any], device: str) -> float:
    """MB at the peak of `run` above what was there before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return float(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()) / 1e6


def must_recompute(model: Qwen25Omni, cuts: Sequence[Cut], prefix: int, asked: int, said: int) -> tuple[float, float]:
    """Operations (one multiply-add is two) that the cuts of single layers change, and layer passes of rows among them.

    A cut into emitters changes the emitters' rows from its layer on; one into the question those of the question from there on and the emitters' one
    layer later. Question rows of the last layer put nothing out. Where only the question is cut and where both are, question rows are the same.
    """
    config, layers = model.text_model.config, model.n_layers
    linear = sum(p.numel() for p in model.text_model.layers[0].parameters() if p.ndim == 2) * 2
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    passes = operations = 0.0
    for cut in cuts:
        parts = []
        emitters = Kind.EMITTER in cut.target
        if Kind.QUESTION in cut.target and not emitters:
            parts.append((asked, layers - 1 - cut.start, asked / 2))
        parts.append((said, layers - cut.start - (not emitters), asked + said / 2))
        for rows, n, own in parts:
            passes += rows * n
            operations += rows * n * (linear + 4 * width * (prefix + own))
    return operations, passes


def throughput(model: Qwen25Omni, rows: int, prefix: int, repeats: int) -> float:
    """Operations a second of one layer's products alone, at the engine's shapes."""
    config, layer = model.text_model.config, model.text_model.layers[0]
    weights = [p for p in layer.parameters() if p.ndim == 2]
    inputs = [torch.randn(rows, w.shape[1], device=model.device, dtype=model.dtype) for w in weights]
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    groups = heads // config.num_key_value_heads
    q = torch.randn(config.num_key_value_heads, groups * rows, size, device=model.device, dtype=model.dtype)
    k = torch.randn(config.num_key_value_heads, prefix, size, device=model.device, dtype=model.dtype)

    @torch.no_grad()
    def products():
        for x, w in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(x, w)
        (q @ k.transpose(1, 2)) @ k

    return rows * (2 * sum(w.numel() for w in weights) + 4 * heads * size * prefix) / seconds(products, 5 * repeats)


# ---------------------------------------------------------------- the comparison


def compare(args: argparse.Namespace) -> None:
    """Print every figure."""
    dtype = getattr(torch, args.dtype)
    model = random_model(args.device, dtype, **SIZES[args.size])
    streams = random_streams(10)
    suffix = forced(model, "hear", np.random.default_rng(1).integers(0, 300, ANSWER - 1).tolist())
    cuts = standard_cuts(model.n_layers)
    given = [(), *((cut,) for cut in cuts)]

    def score(cuts=given, prefix=None) -> torch.Tensor:
        prefix = prefix or model.prefill([encode(model, streams)])
        return model.logprobs(prefix, [0] * len(cuts), [suffix] * len(cuts), cuts)

    def captions(cuts=given) -> list[list[int]]:
        return model.generate_ids(model.prefill([encode(model, streams)]), [0] * len(cuts), [question("hear")] * len(cuts), cuts, ANSWER)

    media = encode(model, streams)
    start = time.perf_counter()
    self_check(model, media, question("hear"))
    checked = time.perf_counter() - start
    model.end_id = -1  # answers do not end before their 24 tokens
    prefix_rows = len(model.layout(media).ids)
    memory = peaks(model, streams, media, suffix, score, captions, cuts[0])
    print(f"{args.size}: {model.n_layers} layers, {model.hidden_size} wide, {args.dtype} on {args.device}, {torch.get_num_threads()} thread(s)")
    print(f"10 s clip: {prefix_rows} prefix tokens + {suffix.first + 1} prompt + {ANSWER} answer tokens; {len(cuts)} cuts")
    print(f"self-check {checked:.1f} s, once a model")

    ours, said = score().cpu(), captions()
    time_ours, time_captions = seconds(score, args.repeats), seconds(captions, args.repeats)
    prefix = model.prefill([media])
    time_clean = seconds(lambda: score([()]), args.repeats)
    into_emitters = [(cut,) for cut in cuts if cut.target == (Kind.EMITTER,)]
    # The clean pass is there already: what its suffix costs is in both.
    further = (seconds(lambda: score([(), *into_emitters], prefix), args.repeats) - seconds(lambda: score([()], prefix), args.repeats)) / len(
        into_emitters
    )
    rest = seconds(lambda: score(given, prefix), args.repeats) - seconds(lambda: score([()], prefix), args.repeats)
    print(f"\nengine: all by scoring {time_ours:.2f} s (towers and clean pass {time_clean:.2f} s), all captions {time_captions:.2f} s")

    sample = range(len(given)) if args.full else [int(i) for i in np.linspace(1, len(cuts), 4 if args.quick else 12)]
    if not args.full:
        print(f"baselines: {len(sample)} of {len(given)} runs are timed and scaled to all (--full times all)")
    published = Published(model, streams, suffix)
    baselines: dict[str, Published | Cached] = {"published": published, "cached": Cached(model, media, suffix)}
    kinds = published.kinds(media)
    for name, baseline in baselines.items():
        with attention(model, baseline.implementation):
            scores, texts = {}, {}
            each = []
            baseline.score(None, kinds)
            for i in sample:
                cut = given[i][0] if given[i] else None
                start = time.perf_counter()
                scores[i] = baseline.score(cut, kinds)
                wait()
                each.append(time.perf_counter() - start)
            some = list(sample)[:: 1 if args.full else 3]
            spoken = []
            for i in some:
                cut = given[i][0] if given[i] else None
                start = time.perf_counter()
                texts[i] = baseline.caption(cut, kinds)
                wait()
                spoken.append(time.perf_counter() - start)
        error = max(float((scores[i] - ours[i]).abs().max()) for i in sample)
        change = max(float((ours[i] - ours[0]).abs().max()) for i in sample)
        unequal = sum(texts[i] != said[i] for i in some)
        if dtype == torch.float32:
            assert error <= 1e-4, f"{name}: log-probabilities differ by {error:.1e}"
            assert not unequal, f"{name}: {unequal} captions differ"
        # Every run of a baseline is the same work, so the best one stands for all: other people's load does not count for the engine.
        once, once_captions = (np.mean(each), np.mean(spoken)) if args.full else (min(each), min(spoken))
        total, total_captions = once * len(given), once_captions * len(given)
        print(f"\nagainst {name} ({baseline.implementation}): log-probabilities agree to {error:.1e} (cuts change them by up to {change:.2f}), "
              f"captions differ in {unequal} of {len(some)}")  # fmt: skip
        line = "  {:<46} {:>9.3f} s / {:>8.4f} s = {:>6.1f}x   target {}"
        main = name == "published"
        print(line.format("all by scoring", total, time_ours, total / time_ours, ">= 20" if main else "-"))
        print(line.format("each further cut into emitters", once, further, once / further, ">= 30" if main else "-"))
        print(line.format("all captions", total_captions, time_captions, total_captions / time_captions, ">= 8" if main else "-"))
    operations, passes = must_recompute(model, cuts, prefix_rows, suffix.first, ANSWER)
    rate = throughput(model, 512, prefix_rows, args.repeats)
    print(
        f"\noperations that the {len(cuts)} cuts must recompute: {operations / 1e9:.1f} G ({passes:.0f} row-layers); {rate / 1e9:.0f} G/s in products"
    )
    print(f"  time {rest:.3f} s / {operations / rate:.3f} s at that rate = {rest * rate / operations:.2f}   target <= 3")

    print("\npeak memory above the loaded model, engine with all cuts / baseline with one")
    for (name, what), peak in memory.items():
        if name != "engine":
            goal = "   target <= 0.5" if name == "published" and what == "scoring" else ""
            ours_, line = memory["engine", what], f"  {name + ', ' + what:<46} "
            print(f"{line}{memory['engine', what]:>9.1f} MB / {peak:>6.1f} MB = {ours_ / peak:>6.2f} {goal}")


def peaks(model: Qwen25Omni, streams, media: Media, suffix, score, captions, cut: Cut) -> dict[tuple[str, str], float]:
    """MB at the peak of the engine with all cuts and of each baseline with one, by scoring and with captions."""
    device = model.device.type
    out = {("engine", "scoring"): peak_memory(score, device), ("engine", "captions"): peak_memory(captions, device)}
    published = Published(model, streams, suffix)
    kinds = published.kinds(media)
    baselines: dict[str, Published | Cached] = {"published": published, "cached": Cached(model, media, suffix)}
    for name, baseline in baselines.items():
        with attention(model, baseline.implementation):
            out[name, "scoring"] = peak_memory(lambda: baseline.score(cut, kinds), device)  # noqa: B023
            out[name, "captions"] = peak_memory(lambda: baseline.caption(cut, kinds), device)  # noqa: B023
    return out


def growth(args: argparse.Namespace) -> None:
    """How the engine's cost grows."""
    sizes = dict(SIZES[args.size])

    def per_clip(model: Qwen25Omni, length: int, clips: int) -> tuple[int, float]:
        suffix = forced(model, "hear", list(range(ANSWER - 1)))
        cuts = [(), *((cut,) for cut in standard_cuts(model.n_layers))]
        media = [encode(model, random_streams(length, seed)) for seed in range(clips)]

        def run():
            prefix = model.prefill(media)
            which = [i for i in range(clips) for _ in cuts]
            model.logprobs(prefix, which, [suffix] * len(which), cuts * clips)

        return len(model.layout(media[0]).ids), seconds(run, args.repeats)

    print("\ngrowth of clean pass and all cuts by scoring, towers not counted")
    model = random_model(args.device, getattr(torch, args.dtype), **sizes)
    for clips in (1, 2, 4, 8):
        time_ = per_clip(model, 10, clips)[1]
        print(f"  clips {clips:>3}: {time_:7.2f} s, {time_ / clips:.2f} s a clip")
    for length in (5, 10, 20, 40):
        tokens, time_ = per_clip(model, length, 1)
        print(f"  tokens {tokens:>5}: {time_:7.2f} s, {time_ / tokens * 1e3:.2f} ms a token")
    for share in (4, 2, 1):
        layers = sizes["layers"] // share
        del model
        model = random_model(args.device, getattr(torch, args.dtype), **{**sizes, "layers": layers})
        time_ = per_clip(model, 10, 1)[1]
        print(f"  layers {layers:>3}: {time_:7.2f} s, {6 * layers} cuts, {time_ / (6 * layers * layers) * 1e3:.2f} ms a cut and layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer runs of the baselines, no growth")
    parser.add_argument("--full", action="store_true", help="time every cut of the baselines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compare(args)
    if not args.quick:
        growth(args)


if __name__ == "__main__":
    main()
