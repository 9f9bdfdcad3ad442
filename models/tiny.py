"""The architecture of the model organism: a tiny Qwen2.5-Omni thinker with the real processor classes and a small tokenizer.

`build_tiny(folder, seed)` writes one with random weights (tests use it); models/organism.py trains one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from data.questions import QUESTIONS, answer
from data.sources import load_sources
from models.avllm import AVLLM
from models.qwen2_5_omni import SPECIAL_TOKENS, TEMPLATE

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FRAME = 84  # pixels: 3 x 3 merged patches of 28


def corpus() -> list[str]:
    """Everything the organism will ever read or say: the words its tokenizer is made for."""
    lines = [AVLLM.system_prompt, "system\n", "user\n", "assistant\n"] * 8 + [q for wordings in QUESTIONS.values() for q in wordings] * 2
    for source in load_sources():
        lines += [answer(modality, source.seen, source.heard)[0] for modality in ("see", "hear", "both")]
    return lines


def build_tokenizer(lines: Sequence[str], size: int = 704, special: Mapping[str, str] = SPECIAL_TOKENS) -> Qwen2Tokenizer:
    """Byte-level BPE of Qwen's own tokenizer class, with the `special` tokens, Qwen2.5-Omni's unless others are given."""
    # The class's own pre-tokenizer regex is applied before byte-level splitting; using it here makes the learned merges reachable.
    blank: Any = Qwen2Tokenizer()
    stock = blank._tokenizer.pre_tokenizer
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = stock, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    raw.train_from_iterator(lines, trainer)
    vocab, merges = raw.get_vocab(), raw_merges(raw)
    for token in (*CONTROL, *special.values()):
        vocab.setdefault(token, len(vocab))
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        extra_special_tokens={"im_start_token": "<|im_start|>", **special},
    )  # fmt: skip


def raw_merges(tokenizer: Tokenizer) -> Any:
    """The merges of a trained BPE, in order."""
    import json

    return [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5OmniProcessor:
    """The real processor classes with small frames and room for 30 s of sound."""
    size = {"shortest_edge": FRAME * FRAME, "longest_edge": FRAME * FRAME}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=14, temporal_patch_size=2, merge_size=2),
        video_processor=Qwen2VLVideoProcessor(size=size, patch_size=14, temporal_patch_size=2, merge_size=2, min_frames=2),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=64, sampling_rate=16000, hop_length=160, chunk_length=30, n_fft=400, return_attention_mask=True
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def tiny_config(
    tokenizer: Qwen2Tokenizer,
    hidden: int = 128,
    layers: int = 8,
    tower: int = 64,
    tower_layers: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    inner: int | None = None,
    vocabulary: int = 0,
) -> Qwen2_5OmniThinkerConfig:
    """Qwen2.5-Omni thinker: `layers` of width `hidden`, `heads` query heads on `key_heads` key heads, both towers of width `tower`.

    inner: width of the feed-forward layer, 3 * hidden unless given. vocabulary: at least as many tokens as the tokenizer has.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    head = hidden // heads
    make: Any = Qwen2_5OmniThinkerConfig
    return make(
        text_config={
            "vocab_size": -(-max(len(tokenizer), vocabulary) // 64) * 64, "hidden_size": hidden, "intermediate_size": inner or 3 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6]},
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "bos_token_id": None,
        },
        vision_config={
            "depth": tower_layers, "hidden_size": tower, "intermediate_size": 2 * tower, "num_heads": 4, "out_hidden_size": hidden,
            "fullatt_block_indexes": list(range(tower_layers)), "window_size": 112,
        },
        audio_config={
            "num_mel_bins": 64, "encoder_layers": tower_layers, "encoder_attention_heads": 4, "encoder_ffn_dim": 2 * tower, "d_model": tower,
            "output_dim": hidden,
        },
        audio_token_index=ids["audio_token"], image_token_index=ids["image_token"], video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"], audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"], vision_end_token_id=ids["vision_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"), tie_word_embeddings=True,
    )  # fmt: skip


def build_tiny(folder: str | Path, seed: int = 0, **sizes: int) -> Path:
    """Write a random tiny model with its processor; `sizes` go to `tiny_config`. Returns the folder."""
    tokenizer = build_tokenizer(corpus())
    processor = build_processor(tokenizer)
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_config(tokenizer, **sizes))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
