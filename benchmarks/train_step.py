"""One step of training against plain LoRA fine-tuning, in one process, on a random Qwen2.5-Omni. No network.

    python benchmarks/train_step.py                                   # about 100 M parameters, on the CPU, one thread
    python benchmarks/train_step.py --threads 2 --repeats 5
    python benchmarks/train_step.py --device cuda --dtype bfloat16
    python benchmarks/train_step.py --quick                           # a model of a few million, one run each: only to see that it works

The model has the proportions of Qwen2.5-Omni-3B (vision tower 0.67 G parameters, audio tower 0.64 G, decoder 3.40 G with embedding and head: 14, 14
and 72 %). Clips are mp4 files of 10 s; one is factual and one is a conflict, as in a grid. LoRA r16 is on every projection of the decoder.

    recipe       the default recipe (train/batches.py): counterfactual cross-entropy, distillation, mirror, states, retention; tower features cached
    SFT          LoRA fine-tuning on the designated answers of the same questions, towers cached too: `plain` with one sequence a question, `shared`
                 with the questions of a clip on one media prefix, as the recipe has it
    Trainer      what a transformers Trainer with PEFT does: one sequence a question, the mp4 decoded, processed and sent through the towers for
                 each, stock model, SDPA, one backward pass

All of them must give the same loss and the same gradients on the same answers, or nothing is printed. A step is inputs, forward and backward pass;
the optimiser's part is the same everywhere and left out. Runs take turns and the best of each counts. Memory is the peak of all tensors above the
loaded model, as torch counts it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.knockout import attention, peak_memory, random_model, wait
from data.clips import Clip
from data.media import mux, read_audio, read_video, stream_hashes, write_mp4
from data.questions import QUESTIONS, answer
from models import self_check
from models.attention import IMPLEMENTATION
from models.avllm import AUDIO_RATE
from models.qwen2_5_omni import Qwen25Omni
from train.batches import Answers, loss_terms, make_micro
from train.config import LossPart
from train.objective import total
from train.plan import Choice, Plan
from train.sampling import STREAMS, Ask, Group

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "hidden": 512, "layers": 12, "heads": 8, "key_heads": 1, "inner": 2752, "vocabulary": 12_800,
        "vision": 320, "vision_layers": 9, "audio": 320, "audio_layers": 11,
    },
    "tiny": {
        "hidden": 128, "layers": 4, "heads": 4, "key_heads": 2, "inner": 512, "vocabulary": 1024,
        "vision": 64, "vision_layers": 3, "audio": 64, "audio_layers": 4,
    },
}  # fmt: skip
SECONDS, SIDE, MADE_FPS, ANSWER = 10, 336, 24, 24


# ---------------------------------------------------------------- the model, its clips and what is asked about them


def build_model(device: str, dtype: torch.dtype, size: str) -> Qwen25Omni:
    """Random, with an adapter that is not the identity, so that gradients reach all of it."""
    sizes = SIZES[size]
    decoder = {name: value for name, value in sizes.items() if not name.startswith(("vision", "audio"))}

    def towers(config: Any) -> None:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        vision, audio = config.vision_config, config.audio_config
        vision.hidden_size, vision.depth, vision.intermediate_size = sizes["vision"], sizes["vision_layers"], sizes["vision"] * 3420 // 1280
        vision.fullatt_block_indexes = list(range(sizes["vision_layers"]))[2::3]
        audio.d_model, audio.encoder_layers, audio.encoder_ffn_dim = sizes["audio"], sizes["audio_layers"], 4 * sizes["audio"]

    model = random_model(device, dtype, change=towers, **decoder)
    everywhere = model.lora_targets(range(model.n_layers), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model.add_lora(everywhere, r=16, alpha=32)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    return model


def parameters(model: Qwen25Omni) -> dict[str, float]:
    """Millions of parameters of each part, without the adapter."""
    towers = model._model
    parts = {"vision tower": [towers.visual], "audio tower": [towers.audio_tower], "decoder": [model.text_model, model.head]}
    return {name: sum(p.numel() for m in modules for n, p in m.named_parameters() if "lora_" not in n) / 1e6 for name, modules in parts.items()}


def build_clips(root: Path, seconds: int = SECONDS) -> list[Clip]:
    """A factual clip and a conflict with its picture."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        coarse = np.repeat(np.repeat(rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8), 8, 0), 8, 1)
        frames = np.stack([np.roll(coarse, 2 * i, axis=1) for i in range(seconds * MADE_FPS)])
        write_mp4(root / f"{name}.mp4", frames, MADE_FPS, rng.standard_normal(seconds * AUDIO_RATE).astype(np.float32) * 0.1)
    mux(root / "a.mp4", root / "b.mp4", root / "ab.mp4")
    # Phrases as long as captions are: 24 tokens with "I hear" and the end mark.
    seen = "a dog and a cat and a bus and a cow and a bell and a train and a horse"
    heard = "a bus and a cow and a dog and a cat and a horse and a bell and a car"

    def clip(stem: str, condition: Literal["factual", "counterfactual"], sound: str, phrase: str) -> Clip:
        hashes = stream_hashes(root / f"{stem}.mp4")
        return Clip(stem, f"{stem}.mp4", "train", condition, "a", sound, seen, phrase, "a", sound, "a", sound, *hashes, seconds)

    return [clip("a", "factual", "a", heard), clip("ab", "counterfactual", "b", f"a car and {heard[:-10]}")]


def asks_about(clips: Sequence[Clip], questions: int) -> list[Ask]:
    """Half of them about what is heard, half about what is seen."""
    return [Ask(clip, modality, QUESTIONS[modality][i]) for clip in clips for i in range(questions // 2) for modality in STREAMS]


def default_plan(layers: int) -> Plan:
    """The default recipe with cuts as they are usually planned: all of the answer's rows, from a third of the depth on."""
    values = {
        "leads": "hear",
        "fusion_window": [layers // 3, layers], "causal_layers": list(range(layers // 3, layers)),
        "teacher_cut": f"video->question+emitters {layers // 3}:{layers}",
        "mirror_cut": f"audio->question+emitters {layers // 3}:{layers}", "lora_layers": list(range(layers)),
        "lora_ranks": [16] * layers, "lora_projections": [],
        "counterfactual_ce": 1.0, "distillation": 1.0, "mirror": 1.0, "states": 10.0, "retention": 0.5,
        "abstention": 0.0, "logprob_invariance": 0.0, "text_retention": 0.0,
        "extras": {}, "class_weights": {}, "conditions": {}, "steps": 1, "stop": -1,
    }  # fmt: skip
    choices: dict[str, Any] = {name: Choice(value, "") for name, value in values.items()}
    return Plan(**choices)


def known_answers(asks: Sequence[Ask], plan: Plan) -> Answers:
    """Teacher answers of ANSWER tokens with the end mark that differ from the designated ones; on factual clips no cut changes them."""
    rng = np.random.default_rng(1)
    out: Answers = {}
    for ask in asks:
        said = rng.integers(0, 300, ANSWER - 1).tolist()
        for cut in ("", plan.teacher_cut.value, plan.mirror_cut.value):
            out[ask.clip.id, ask.question, cut] = said if ask.clip.condition == "factual" else rng.integers(0, 300, ANSWER - 1).tolist()
    return out


# ---------------------------------------------------------------- the ways


def recipe_inputs(model: Qwen25Omni, asks: Sequence[Ask], root: Path, plan: Plan, answers: Answers) -> Any:
    """The student's sequences, and what the teacher says."""
    return make_micro(model, [Group(tuple(asks))], root, plan, LossPart(max_answer_tokens=ANSWER), answers)


def recipe_terms(model: Qwen25Omni, asks: Sequence[Ask], root: Path, plan: Plan, answers: Answers) -> dict[str, Tensor]:
    """Every term of the recipe. All that this file knows of train/batches.py is here and in `recipe_inputs`."""
    micro = recipe_inputs(model, asks, root, plan, answers)
    return loss_terms(model, model.decoder(**micro.inputs), micro, plan)


def recipe_loss(model: Qwen25Omni, asks: Sequence[Ask], root: Path, plan: Plan, answers: Answers) -> Tensor:
    """What is minimised."""
    return total(recipe_terms(model, asks, root, plan, answers), plan.weights())


def recipe_ce(model: Qwen25Omni, asks: Sequence[Ask], root: Path, plan: Plan, answers: Answers) -> Tensor:
    """Its term on the designated answers alone. They are equally long, so that means over answers and over tokens are the same."""
    return recipe_terms(model, asks, root, plan, answers)["counterfactual_ce"]


def designated(ask: Ask) -> str:
    return answer(ask.modality, ask.clip.seen, ask.clip.heard)[0]


def sft_loss(model: Qwen25Omni, asks: Sequence[Ask], root: Path, share: bool) -> Tensor:
    """Cross-entropy over all answer tokens, towers cached."""
    batch = model.batch([model.sequence(model.media(a.clip, root), a.question, designated(a)) for a in asks], share)
    return functional.cross_entropy(model.forward(batch).float().flatten(0, 1), batch.targets.flatten())


def trainer_loss(model: Qwen25Omni, asks: Sequence[Ask], root: Path) -> Tensor:
    """The same by the stock model on the stock processor's inputs, from the files."""
    texts, frames, waves = [], [], []
    for ask in asks:
        prompt = model.processor.apply_chat_template(
            [
                {"role": "system", "content": model.system_prompt},
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ask.question}]},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        texts.append(f"{prompt}{designated(ask)}<|im_end|>")
        frames.append(torch.as_tensor(read_video(root / ask.clip.file, model.fps)))
        waves.append(read_audio(root / ask.clip.file, AUDIO_RATE))
    inputs = model.processor(
        text=texts,
        videos=frames,
        videos_kwargs={"size": model.video_size, "fps": model.fps, "do_sample_frames": False},
        audio=waves,
        audio_from_video_indices=list(range(len(asks))),
        load_audio_from_video=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    for name in ("pixel_values_videos", "input_features"):
        inputs[name] = inputs[name].to(model.dtype)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, ask in enumerate(asks):
        length = len(model.tokenizer(designated(ask))["input_ids"]) + 1
        labels[row, -length:] = inputs["input_ids"][row, -length:]
    return model.thinker(**inputs, labels=labels, use_audio_in_video=True, use_cache=False).loss


def step(model: Qwen25Omni, make: Callable[[], Tensor], implementation: str = IMPLEMENTATION) -> tuple[Tensor, list[Tensor]]:
    """A loss and the gradients of every trained parameter. implementation: the stock attention instead of the instrumented one."""
    with attention(model, implementation) if implementation != IMPLEMENTATION else nullcontext():
        loss = make()
        return loss.detach(), list(torch.autograd.grad(loss, [p for _, p in model.trainable_parameters()]))


def difference(name: str, ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], exact: bool) -> float:
    """Largest difference of the gradients relative to their largest entry. Raises AssertionError where losses or gradients differ in float32."""
    scale = max(float(g.abs().max()) for g in theirs[1])
    error = max(float((a - b).abs().max()) for a, b in zip(ours[1], theirs[1], strict=True)) / scale
    if exact:
        assert abs(float(ours[0] - theirs[0])) <= 1e-5 * max(1.0, abs(float(theirs[0]))), f"{name}: the losses are {ours[0]} and {theirs[0]}"
        assert error <= 1e-4, f"{name}: gradients differ by {error:.1e} of their largest entry"
    return error


# ---------------------------------------------------------------- the comparison


def race(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The best time of each, in turns, so that other people's load falls on all alike."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, run in ways.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def compare(args: argparse.Namespace, root: Path) -> dict[str, float]:
    """Print every figure. Returns the ratios by name."""
    dtype, exact = getattr(torch, args.dtype), args.dtype == "float32"
    size, repeats = ("tiny", 1) if args.quick else (args.size, args.repeats)
    model, clips = build_model(args.device, dtype, size), build_clips(root, args.seconds)
    model.precompute(clips, root, progress=False)
    media = model.media(clips[0], root)
    self_check(model, media, QUESTIONS["hear"][0])
    plan = default_plan(model.n_layers)
    adapter = sum(p.numel() for _, p in model.trainable_parameters()) / 1e6
    parts = ", ".join(f"{name} {millions:.1f} M" for name, millions in parameters(model).items())
    print(f"{args.device}, {args.dtype}, {torch.get_num_threads()} threads of torch; parameters: {parts}, adapter {adapter:.1f} M")
    print(f"clips of {args.seconds} s, {len(model.layout(media).ids)} rows before the question")
    ratios: dict[str, float] = {}

    def show(name: str, what: str, ours: float, theirs: float, unit: str, target: str = "") -> None:
        ratios[name] = ours / theirs
        print(f"  {what:<56} {ours:>8.3f} / {theirs:>8.3f} {unit:<2} = {ours / theirs:>5.2f}   {target}")

    def ways(asks: Sequence[Ask]) -> dict[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
        known = known_answers(asks, plan)
        return {
            "recipe": partial(step, model, partial(recipe_loss, model, asks, root, plan, known)),
            "plain": partial(step, model, partial(sft_loss, model, asks, root, False)),
            "shared": partial(step, model, partial(sft_loss, model, asks, root, True)),
            "Trainer": partial(step, model, partial(trainer_loss, model, asks, root), "sdpa"),
            "cross-entropy of the recipe": partial(step, model, partial(recipe_ce, model, asks, root, plan, known)),
        }

    two, four = asks_about(clips, 2), asks_about(clips, 4)
    errors = []
    for asks in (two, four):
        results = {name: run() for name, run in ways(asks).items() if name != "recipe"}
        errors += [difference(name, result, results["plain"], exact) for name, result in results.items() if name != "plain"]
    batch = recipe_inputs(model, two, root, plan, known_answers(two, plan)).batch
    print(
        f"losses agree, gradients to {max(errors):.1e} of their largest entry; two questions a clip are {len(two)} answers of "
        f"{int((batch.targets[0] != -100).sum())} tokens and {len(batch.targets)} sequences of the recipe"
    )

    print("\nthe default recipe / LoRA SFT on the same questions, towers cached in both")
    runs = {name: ways(two)[name] for name in ("recipe", "plain", "shared")}
    times = race(runs, repeats)
    heard: Answers = {}
    recipe_inputs(model, two, root, plan, heard)
    teacher = race(
        {
            "asked": lambda: recipe_inputs(model, two, root, plan, {}),
            "known": lambda: recipe_inputs(model, two, root, plan, dict(heard)),
        },
        repeats,
    )
    first = times["recipe"] + teacher["asked"] - teacher["known"]
    peaks = {name: peak_memory(run, args.device) for name, run in runs.items()}
    for name, time_target, memory_target in (("plain", "target <= 1.6", "target <= 1.3"), ("shared", "", "")):
        show(f"time, {name}", f"time, the teacher's answers known; {name}", times["recipe"], times[name], "s", time_target)
        show(f"first, {name}", f"time, the teacher's answers generated; {name}", first, times[name], "s")
        show(f"memory, {name}", f"peak memory; {name}", peaks["recipe"], peaks[name], "MB", memory_target)

    print("\nanswers trained a second / by a Trainer that decodes and encodes media at every step")
    for asks, target in ((two, "target >= 2"), (four, "target >= 3")):
        runs, questions = ways(asks), len(asks) // len(clips)
        rates = {name: len(asks) / t for name, t in race({name: runs[name] for name in ("shared", "recipe", "Trainer")}, repeats).items()}
        show(f"rate, shared, {questions}", f"{questions} questions a clip; SFT, shared", rates["shared"], rates["Trainer"], "/s", target)
        show(f"rate, recipe, {questions}", f"{questions} questions a clip; recipe", rates["recipe"], rates["Trainer"], "/s")
    return ratios


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="length of the clips")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the tiny size, one run of each")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        return compare(args, Path(folder))


if __name__ == "__main__":
    main()
