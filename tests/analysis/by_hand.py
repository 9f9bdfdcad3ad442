"""A Qwen2.5-Omni thinker of two layers whose weights are written by hand, so that what every diagnostic should find is arithmetic.

Queries and keys are zero, so each row spreads its attention evenly over the rows it may see, whatever their positions. The MLPs put out zero.
The residual stream (64 wide) has named axes:

    F          filler: brings every row that enters layer 0 to mean square 1, so that its RMSNorm changes nothing
    V_c A_c    class c, in the rows of a picture / of a sound (the towers' features are put in by hand)
    SEE HEAR   in the rows of the word "see" / "hear"
    STOP       in the rows of every event word: the answer is over
    R_c        what layer 0 makes of the pictures it sees: relay * mean of V_c
    O_c        what layer 1 makes of everything: mean of picture * V_c + sound * A_c + relayed * R_c
    SAW HEARD  likewise: asked * mean of SEE, HEAR

Two key-value heads for four query heads: the first carries V, R and F, the second A, SEE, HEAR and F. Layer 0 reads the first with query heads 0
and 1 by halves; layer 1 reads the first with heads 0 (three quarters) and 1, the second with head 2 (A) and head 3 (SEE, HEAR).

The head: each class has a word for its look and one for its sound. Both rise with O_c; looks with SAW and the relay R_c of the row itself,
sounds with HEARD and the row's own A_c; the end token with STOP; a few idle tokens a little with F, and later classes a little more with SAW
and HEARD than earlier ones, so that nothing ties for the top k.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from data.clips import Clip, Clips, Grid
from models import load_model
from models.avllm import AVLLM
from models.sequences import StreamFeatures
from models.tiny import build_tiny

WIDTH, HEAD = 64, 16  # hidden size, size of an attention head
CLASSES = {
    "dog": ("dog", "barking"), "cat": ("cat", "meowing"), "rooster": ("rooster", "crowing"),
    "train": ("train", "rumbling"), "bell": ("bell", "ringing"), "cow": ("cow", "mooing"),
}  # fmt: skip
NAMES = list(CLASSES)
IDLE = ("horse", "pig", "frog", "rain", "fire")
FRAMES, MELS = (2, 2, 2), (16,)  # patches of a picture: 2 tokens; mel frames of a sound: 4 tokens
PICTURE_TOKENS, SOUND_TOKENS = 2, 4

_names = ["F", *(f"{kind}_{c}" for kind in "VARO" for c in range(6)), "SEE", "HEAR", "STOP", "SAW", "HEARD"]
AXIS = {name: i for i, name in enumerate(_names)}


@dataclass(frozen=True)
class Gains:
    """The numbers that the model is made of."""

    v: float = 6.0  # V_c in a row of a picture
    a: float = 6.0  # A_c in a row of a sound
    asked_word: float = 6.0  # SEE, HEAR
    stop: float = 6.0
    relay: float = 6.0  # layer 0
    picture: float = 3.0  # layer 1, and below
    sound: float = 7.0
    relayed: float = 5.0
    asked: float = 20.0
    norm: float = 1.5  # the final norm's weight on O
    word: float = 0.8  # the head: both words on O_c
    look: float = 0.6  # look word on R_c
    sounds: float = 0.5  # sound word on A_c
    question: float = 1.0  # look words on SAW, sound words on HEARD
    end: float = 7.0
    idle: tuple[float, ...] = (0.05, 0.04, 0.03, 0.02, 0.01)


@cache
def token(model: AVLLM, word: str) -> int:
    """The one token of " word" inside a sentence."""
    (found,) = model.tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"]
    return found


def row(**codes: float) -> torch.Tensor:
    """A row that enters layer 0: these codes, and as much of F as brings its mean square to 1."""
    out = torch.zeros(WIDTH)
    for name, value in codes.items():
        out[AXIS[name]] = value
    out[AXIS["F"]] = (WIDTH - float(out.square().sum())) ** 0.5
    return out


@torch.no_grad()
def build(folder: Path, gains: Gains) -> AVLLM:
    """A real checkpoint in `folder`, loaded, its weights overwritten."""
    model = load_model(build_tiny(folder, hidden=WIDTH, layers=2, tower=32, tower_layers=1))
    text, head = model.text_model, model.head
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight), requires_grad=False)  # no longer tied to the embeddings
    text.embed_tokens.weight.copy_(row().expand_as(text.embed_tokens.weight))
    text.embed_tokens.weight[token(model, "see")] = row(SEE=gains.asked_word)
    text.embed_tokens.weight[token(model, "hear")] = row(HEAR=gains.asked_word)
    for layer in text.layers:
        for p in layer.parameters():
            p.zero_()
        layer.input_layernorm.weight.fill_(1.0)
        layer.post_attention_layernorm.weight.fill_(1.0)
        value = layer.self_attn.v_proj.weight  # (2 heads of 16, width)
        for c in range(6):
            value[c, AXIS[f"V_{c}"]] = value[6 + c, AXIS[f"R_{c}"]] = value[HEAD + c, AXIS[f"A_{c}"]] = 1.0
        value[12, AXIS["F"]] = value[HEAD + 8, AXIS["F"]] = 1.0
        value[HEAD + 6, AXIS["SEE"]] = value[HEAD + 7, AXIS["HEAR"]] = 1.0
    first, second = (layer.self_attn.o_proj.weight for layer in text.layers)  # (width, 4 heads of 16)
    for c in range(6):
        first[AXIS[f"R_{c}"], [c, HEAD + c]] = gains.relay / 2
        for query_head, share in ((0, 0.75), (1, 0.25)):
            second[AXIS[f"O_{c}"], query_head * HEAD + c] = share * gains.picture
            second[AXIS[f"O_{c}"], query_head * HEAD + 6 + c] = share * gains.relayed
        second[AXIS[f"O_{c}"], 2 * HEAD + c] = gains.sound
    second[AXIS["SAW"], 3 * HEAD + 6] = second[AXIS["HEARD"], 3 * HEAD + 7] = gains.asked
    text.norm.weight.fill_(1.0)
    for c, (look, sound) in enumerate(CLASSES.values()):
        text.norm.weight[AXIS[f"O_{c}"]] = gains.norm
        for word, own, strength, about in ((look, f"R_{c}", gains.look, "SAW"), (sound, f"A_{c}", gains.sounds, "HEARD")):
            t = token(model, word)
            text.embed_tokens.weight[t] = row(STOP=gains.stop)
            head.weight[t, AXIS[f"O_{c}"]], head.weight[t, AXIS[own]], head.weight[t, AXIS[about]] = (
                gains.word,
                strength,
                gains.question * (1 + c / 50),
            )
    head.weight[model.end_id, AXIS["STOP"]] = gains.end
    for word, strength in zip(IDLE, gains.idle, strict=True):
        head.weight[token(model, word), AXIS["F"]] = strength
    return model


def clips_for(models: list[AVLLM], gains: Gains, pairs: list[tuple[int, int]], renderings: int = 1, grids: list[tuple[int, int]] = ()) -> Clips:
    """Clips (picture's class, sound's class), in every combination of `renderings` if they conflict, with features put into the models by hand.

    No file exists: nothing would be read that is not already there.
    """
    out = []
    for i, j in pairs:
        for r, s in itertools.product(range(renderings), repeat=2):
            if i != j or r == s:
                out.append(
                    Clip(
                        f"{NAMES[i]}{r}_{NAMES[j]}{s}", "none.mp4", "test", "factual" if i == j else "counterfactual",
                        NAMES[i], NAMES[j], CLASSES[NAMES[i]][0], CLASSES[NAMES[j]][1],
                        f"picture {i} {r}", f"sound {j} {s}", f"{i} {r}", f"{j} {s}", f"v{i}", f"a{j}", 2.0,
                    )
                )  # fmt: skip
    for model in models:
        for c in range(6):
            model._streams["video", f"v{c}"] = StreamFeatures(row(**{f"V_{c}": gains.v}).expand(PICTURE_TOKENS, -1), FRAMES)
            model._streams["audio", f"a{c}"] = StreamFeatures(row(**{f"A_{c}": gains.a}).expand(SOUND_TOKENS, -1), MELS)
            model._opened |= {(Path("nowhere/none.mp4"), "video", f"v{c}"), (Path("nowhere/none.mp4"), "audio", f"a{c}")}
    cells = [[f"{NAMES[v]}0_{NAMES[a]}0" for v, a in ((i, i), (i, j), (j, i), (j, j))] for i, j in grids]
    made = tuple(Grid(f"g{n}", "test", *names) for n, names in enumerate(cells))
    labels = [[name, seen, heard] for name, (seen, heard) in CLASSES.items()]
    return Clips(Path("nowhere"), tuple(out), made, {"version": 1, "labels": labels})
