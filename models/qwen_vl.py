"""Qwen2.5-VL and Qwen3-VL as bases of token shift: stock model and stock processor behind the part of models/avllm.py's interface that a base needs.

    base = load_model("Qwen/Qwen2.5-VL-3B-Instruct")
    prefix = base.prefill([base.media(clip, clips.root, audio=False)])
    base.extend(prefix, [0], [suffix])              # logits of an answer by a model that hears nothing

They hear nothing: asked to, they raise ModelError, and without sound no self-check passes, so nothing is cut in them either. The traps that this file
closes: Qwen3-VL adds features of the vision tower's inner layers to the first layers of the decoder (deepstack), which input embeddings alone would
lose, and writes the time before each pair of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from models.attention import IMPLEMENTATION, Kind
from models.avllm import AVLLM, ModelError
from models.sequences import Batch, Example, Layout, Media, StreamFeatures


class Qwen25VL(AVLLM):
    """See models.avllm.AVLLM. A stream's size is (t, h, w) patches and the number of frames."""

    family = "qwen2_5_vl"
    thinker_class: Any = Qwen2_5_VLForConditionalGeneration
    processor_class: Any = Qwen2_5_VLProcessor

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device, dtype: torch.dtype, base_path: str | None) -> Qwen25VL:
        """From a folder or hub id. Raises ModelError where weights do not fill the architecture or the tokenizer is another model's."""
        thinker, info = cls.thinker_class.from_pretrained(
            path, dtype=dtype, attn_implementation={"text_config": IMPLEMENTATION}, output_loading_info=True
        )
        if lost := sorted(str(key) for key in info["missing_keys"] or info["mismatched_keys"]):
            raise ModelError(f"{path}: the checkpoint does not fill the model ({len(lost)} weights missing, e.g. {lost[:3]}). Is it complete?")
        return cls(str(path), thinker.to(device).eval(), cls.processor_class.from_pretrained(path), device, base_path)

    def __init__(self, path, thinker, processor, device, base_path):
        super().__init__(path, thinker, processor, device, base_path)
        self.video_id, self.audio_id = processor.video_token_id, -1  # no token is sound
        self.end_id, self.pad_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>"), self.tokenizer.pad_token_id
        if thinker.config.video_token_id != self.video_id:
            raise ModelError(f"{path}: the tokenizer's video token is not the model's. Tokenizer and weights come from different checkpoints.")

    @property
    def text_model(self):
        return self.thinker.model.language_model

    @property
    def head(self):
        return self.thinker.lm_head

    def _deaf(self) -> NoReturn:
        raise ModelError(f"{self.path} is a {self.family} model, which hears nothing: give it as --base, and a model with sound as the model.")

    def encode_audio(self, waves: list[np.ndarray]) -> list[StreamFeatures]:
        self._deaf()

    def resize(self, frames: np.ndarray) -> np.ndarray:
        return frames  # the size may depend on how many frames there are, so it is given to all of them in `encode_video`

    def encode_video(self, videos: list[np.ndarray], resized: bool = False) -> list[StreamFeatures]:
        inputs = self.processor.video_processor(
            videos=[torch.as_tensor(v) for v in videos], do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
        )
        grid = inputs["video_grid_thw"].to(self.device)
        out = self.thinker.model.get_video_features(inputs["pixel_values_videos"].to(self.device), grid, return_dict=True)
        deep = zip(*out.deepstack_features, strict=True) if getattr(out, "deepstack_features", None) else [None] * len(videos)
        return [
            StreamFeatures(f.float().cpu(), (*g.tolist(), len(v)), torch.stack(d).float().cpu() if d is not None else None)
            for f, g, v, d in zip(out.pooler_output, grid, videos, deep, strict=True)
        ]

    def media_layout(self, video: tuple[int, ...] | None, audio: tuple[int, ...] | None) -> Layout:
        if audio:
            self._deaf()
        processor = self.processor
        content = [*([{"type": "video"}] if video else []), {"type": "text", "text": "\x00"}]
        messages = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False).split("\x00")[0]
        if video:
            # As the processor is told of frames that were taken before it saw them.
            frames = VideoMetadata(total_num_frames=video[3], fps=self.fps, frames_indices=list(range(video[3])))
            inputs = {"video_grid_thw": torch.tensor([video[:3]]), "video_metadata": [frames]}
            text = text.replace(processor.video_token, processor.replace_video_token(inputs, 0))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        # The stock function wants the text too: one row of it tells where all of it goes.
        positions = self.stock_positions(torch.cat([ids, torch.tensor([self.pad_id])]), video, None)
        kinds = torch.full_like(ids, Kind.SYSTEM)
        if video:
            delimiters = torch.tensor([self.tokenizer.convert_tokens_to_ids(t) for t in ("<|vision_start|>", "<|vision_end|>")])
            rows = torch.isin(ids, delimiters).nonzero()
            kinds[rows.min() : rows.max() + 1] = Kind.VIDEO  # with the times written between frames
        return Layout(ids, kinds, positions[:, :-1], int(positions[0, -1]))

    def stock_positions(self, ids: torch.Tensor, video: tuple[int, ...] | None, audio: tuple[int, ...] | None) -> torch.Tensor:
        positions, _ = self.thinker.model.get_rope_index(
            ids[None],
            mm_token_type_ids=(ids == self.video_id).int()[None] * 2,  # 0 text, 2 video
            video_grid_thw=torch.tensor([video[:3]]) if video else None,
            second_per_grid_ts=torch.tensor([self.processor.video_processor.temporal_patch_size / self.fps]),
            attention_mask=torch.ones_like(ids[None]),
        )
        return positions[:, 0]

    def question_text(self, question: str) -> str:
        return self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": f"\x00{question}"}]}], tokenize=False, add_generation_prompt=True
        ).split("\x00")[1]


class Qwen3VL(Qwen25VL):
    """See Qwen25VL."""

    family = "qwen3_vl"
    thinker_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor

    def batch(self, examples: Sequence[Example], share: bool = True) -> Batch:
        """Refused: a training batch has no place for the features that go into later layers. A base is run by `prefill` and `extend`."""
        raise ModelError(f"{self.path} is a {self.family} model: here it can be the base of token shift, and nothing else.")

    def deeper(self, media: Sequence[Media], ids: torch.Tensor, start: int, stop: int) -> dict[str, Any]:
        deep = [m.video.deep for m in media if m.video is not None and m.video.deep is not None]
        if not deep:
            return {}
        places = self.is_media(ids)
        column = places.nonzero()[:, 1]
        now = ((column >= start) & (column < stop)).cpu()
        return {"visual_pos_masks": places[:, start:stop], "deepstack_visual_embeds": [*torch.cat(deep, 1)[:, now].to(self.device, self.dtype)]}
