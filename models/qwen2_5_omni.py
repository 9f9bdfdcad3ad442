"""Qwen2.5-Omni: the stock thinker and the stock processor behind the interface of models/avllm.py.

Only the thinker is loaded (talker and vocoder do not matter here). The traps of the stock code that this file closes: docs/gotchas.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.image_utils import SizeDict

from models.attention import IMPLEMENTATION, Kind
from models.avllm import AUDIO_RATE, AVLLM, ModelError
from models.sequences import Layout, StreamFeatures

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


class Qwen25Omni(AVLLM):
    """See models.avllm.AVLLM."""

    family = "qwen2_5_omni"
    thinker_class: Any = Qwen2_5OmniThinkerForConditionalGeneration

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device, dtype: torch.dtype, base_path: str | None) -> Qwen25Omni:
        """From a folder (or hub id) of the full model or of the thinker. Raises ModelError where weights do not fill the architecture."""
        loaded: Any = cls.thinker_class.from_pretrained(
            path, dtype=dtype, attn_implementation={"text_config": IMPLEMENTATION}, output_loading_info=True
        )
        thinker, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            lost = sorted(info["missing_keys"])[:3] or sorted(str(k) for k in info["mismatched_keys"])[:3]
            raise ModelError(
                f"{path}: the checkpoint does not fill the model ({len(info['missing_keys'])} weights missing, e.g. {lost}). Is it complete?"
            )
        processor = Qwen2_5OmniProcessor.from_pretrained(path)
        return cls(str(path), thinker.to(device).eval(), processor, device, base_path)

    def __init__(self, path, thinker, processor, device, base_path):
        super().__init__(path, thinker, processor, device, base_path)
        self.video_id, self.audio_id = processor.video_token_id, processor.audio_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad_id = self.tokenizer.pad_token_id
        config = thinker.config
        if (config.video_token_id, config.audio_token_id) != (self.video_id, self.audio_id):
            raise ModelError(f"{path}: the tokenizer's media tokens are not the model's. Tokenizer and weights come from different checkpoints.")

    @property
    def _model(self):
        thinker = self.thinker.get_base_model() if hasattr(self.thinker, "get_base_model") else self.thinker
        return thinker.model

    @property
    def text_model(self):
        return self._model.language_model

    @property
    def head(self):
        thinker = self.thinker.get_base_model() if hasattr(self.thinker, "get_base_model") else self.thinker
        return thinker.lm_head

    @property
    def video_size(self) -> dict[str, int]:
        """Pixel bounds of a frame. The processor class overrides a saved smaller size, so a saved maximum below the class's own is passed on."""
        saved = dict(self.processor.video_processor.size)
        stock = type(self.processor).videos_kwargs["size"]
        return saved if saved["longest_edge"] < stock["longest_edge"] else stock

    def resize(self, frames: np.ndarray) -> np.ndarray:
        processor = self.processor.video_processor
        try:
            small = processor.resize(
                torch.as_tensor(frames)[None],
                size=SizeDict(**self.video_size),
                resample=processor.resample,
                factor=processor.patch_size * processor.merge_size,
                temporal_factor=processor.temporal_patch_size,
                cap_pixels_per_frame=False,
            )
        except ValueError as error:  # a picture 200 times as wide as high
            raise ModelError(
                f"frames of {frames.shape[2]} x {frames.shape[3]} pixels are refused by this model's processor: {error}. Crop them."
            ) from error
        return small[0].numpy()

    def encode_video(self, videos: list[np.ndarray], resized: bool = False) -> list[StreamFeatures]:
        inputs = self.processor.video_processor(
            videos=[torch.as_tensor(v) for v in videos],
            size=self.video_size,
            do_resize=not resized,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            return_tensors="pt",
        )
        grid = inputs["video_grid_thw"].to(self.device)
        features = self._model.get_video_features(inputs["pixel_values_videos"].to(self.device), grid, return_dict=True).pooler_output
        return [StreamFeatures(f.float().cpu(), tuple(g.tolist())) for f, g in zip(features, grid, strict=True)]

    def encode_audio(self, waves: list[np.ndarray]) -> list[StreamFeatures]:
        # One by one: in a batch the last digits depend on the others, and what a run trains on must not depend on what it measured before.
        return [self._encode_wave(wave) for wave in waves]

    def _encode_wave(self, wave: np.ndarray) -> StreamFeatures:
        extractor = self.processor.feature_extractor
        # Padded past the wave by more than one window, frames are those of the processor's padding to its maximum; nothing is truncated.
        length = -(-len(wave) // extractor.hop_length) * extractor.hop_length + 10 * extractor.hop_length
        inputs = extractor(
            [wave],
            sampling_rate=AUDIO_RATE,
            padding="max_length",
            max_length=length,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = inputs["attention_mask"].to(self.device)
        out = self._model.get_audio_features(inputs["input_features"].to(self.device, self.dtype), mask, return_dict=True).last_hidden_state
        return StreamFeatures(out.float().cpu(), (int(mask.sum()),))

    @property
    def _second_per_grid(self) -> float:
        return self.processor.video_processor.temporal_patch_size / self.fps

    def media_layout(self, video: tuple[int, ...] | None, audio: tuple[int, ...] | None) -> Layout:
        processor = self.processor
        frames = torch.tensor(audio) if audio else None
        sounds = {"num_audio_tokens": self._model.audio_tower._get_feat_extract_output_lengths(frames)[1]} if frames is not None else {}
        parts = []
        if video:
            parts.append({"type": "video"})
        elif audio:
            parts.append({"type": "audio"})
        text = processor.apply_chat_template(
            [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": [*parts, {"type": "text", "text": "\x00"}]}],
            tokenize=False,
        ).split("\x00")[0]
        if video:
            replacement = processor.replace_video_token(
                {"video_grid_thw": torch.tensor([video]), "video_second_per_grid": [self._second_per_grid]},
                0,
                processed_audio=sounds,
                video_to_audio_indices=[0 if audio else None],
                load_audio_from_video=True,
                seconds_per_chunk=processor.seconds_per_chunk,
                position_id_per_seconds=processor.position_id_per_seconds,
            )
            text = text.replace(processor.video_token, replacement)
        elif audio:
            text = text.replace(processor.audio_token, processor.replace_audio_token(sounds, 0))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        # The stock function wants the text too: one row of it tells where all of it goes.
        positions = self.stock_positions(torch.cat([ids[0], torch.tensor([self.pad_id])]), video, audio)
        tokens = {name: self.tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
        kinds = torch.full_like(ids[0], Kind.SYSTEM)
        for kind, names in (
            (Kind.VIDEO, ("video_token", "vision_bos_token", "vision_eos_token")),
            (Kind.AUDIO, ("audio_token", "audio_bos_token", "audio_eos_token")),
        ):
            for name in names:
                kinds[ids[0] == tokens[name]] = kind
        return Layout(ids[0], kinds, positions[:, :-1], int(positions[0, -1]))

    def stock_positions(self, ids: torch.Tensor, video: tuple[int, ...] | None, audio: tuple[int, ...] | None) -> torch.Tensor:
        positions, _ = self._model.get_rope_index(
            ids[None],
            video_grid_thw=torch.tensor([video]) if video else None,
            attention_mask=torch.ones_like(ids[None]),
            use_audio_in_video=bool(video and audio),
            audio_seqlens=torch.tensor(audio) if audio else None,
            second_per_grids=torch.tensor([self._second_per_grid]),
        )
        return positions[:, 0]

    def question_text(self, question: str) -> str:
        return self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": f"\x00{question}"}]}], tokenize=False, add_generation_prompt=True
        ).split("\x00")[1]
