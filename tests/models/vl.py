"""Tiny random Qwen2.5-VL and Qwen3-VL checkpoints with the stock processors; their ordinary tokens are the organism's."""

from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from models.tiny import build_tokenizer, corpus

TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_vl(folder: Path, family: str, seed: int = 0, lines: list[str] | None = None) -> Path:
    """Write one, with projections large enough that attention is not uniform. `lines`: what its tokenizer is made of. Returns the folder."""
    tokenizer = build_tokenizer(lines or corpus(), special=TOKENS)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64 + 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    if family == "qwen2_5_vl":
        size, patch, video_class = {"shortest_edge": 84 * 84, "longest_edge": 84 * 84}, 14, Qwen2VLVideoProcessor
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [0, 1],
                  "window_size": 112, "tokens_per_second": 2}  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
        processor_class = Qwen2_5_VLProcessor
    else:
        size, patch, video_class = {"shortest_edge": 96 * 96, "longest_edge": 8 * 96 * 96}, 16, Qwen3VLVideoProcessor
        text |= {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
        vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64, "patch_size": 16,
                  "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 144}  # fmt: skip
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
        processor_class = Qwen3VLProcessor
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("proj" in name or "merger" in name or "linear" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=patch, temporal_patch_size=2, merge_size=2),
        video_processor=video_class(size=size, patch_size=patch, temporal_patch_size=2, merge_size=2),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
