"""SmolOmni: a small audio-visual LLM of the Qwen2.5-Omni class, made of pretrained parts (models/build_smolomni.py).

The stock thinker with one part exchanged: `visual` is an EfficientNet-lite0. Patch 16 x merge 2 is its stride 32, so grid, tokens, positions,
processor and generate are the stock ones. Registered under a model type of its own: checkpoints load with `load_model`, and with `AutoConfig` once
this file is imported; no remote code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniVisionEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniPreTrainedModel

from models.qwen2_5_omni import Qwen25Omni

BACKBONE = "tf_efficientnet_lite0"
CHANNELS = 1280  # of its last feature map, 1/32 of the picture's sides


class SmolOmniConfig(Qwen2_5OmniThinkerConfig):
    """The stock thinker's configuration under another name."""

    model_type = "smolomni_thinker"


class EfficientNetTower(Qwen2_5OmniPreTrainedModel):
    """Drop-in for the stock vision encoder: same patches in, same number and order of tokens out.

    The frames of a temporal patch are averaged after the backbone: two frames averaged as pixels are a blur. `merger` is the projector.
    """

    config: Any

    def __init__(self, config: Qwen2_5OmniVisionEncoderConfig):
        super().__init__(config)
        if config.patch_size * config.spatial_merge_size != 32:
            raise ValueError(f"The backbone has stride 32, not patch_size {config.patch_size} x spatial_merge_size {config.spatial_merge_size}.")
        import timm  # here, so that who loads another family need not have it

        self.spatial_merge_size = config.spatial_merge_size
        self.backbone = timm.create_model(BACKBONE, pretrained=False, num_classes=0, global_pool="")
        self.merger = nn.Linear(CHANNELS, config.out_hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """A backbone without pretrained weights keeps timm's initialisation; the stock one is too small for it to let anything through."""

    def train(self, mode: bool = True) -> EfficientNetTower:
        """Never in training mode: batch norm would replace its statistics by those of our few pictures."""
        return super().train(False)

    def features(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """(tokens, CHANNELS) before the projector. patches: (sum of t·h·w, C · frames · patch²), as the stock video processor lays them out."""
        config, out = self.config, []
        side, merge, depth = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        for part, (t, h, w) in zip(patches.split(grid_thw.prod(-1).tolist()), grid_thw.tolist(), strict=True):
            blocks = part.view(t, h // merge, w // merge, merge, merge, config.in_channels, depth, side, side)
            frames = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * depth, config.in_channels, h * side, w * side)
            maps = self.backbone.forward_features(frames)  # type: ignore[operator]
            out.append(maps.view(t, depth, *maps.shape[1:]).mean(1).flatten(2).transpose(1, 2).flatten(0, 1))
        return torch.cat(out)

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """pooler_output: (tokens, out_hidden_size), in the stock encoder's order (time, then rows of merged patches)."""
        features = self.features(hidden_states, grid_thw)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.merger(features))


class SmolOmniThinker(Qwen2_5OmniThinkerForConditionalGeneration):
    """The stock thinker with EfficientNetTower as `model.visual`."""

    config: Any
    config_class = SmolOmniConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.visual = EfficientNetTower(config.vision_config)
        self.post_init()


class SmolOmni(Qwen25Omni):
    """See models.avllm.AVLLM."""

    family = "smolomni"
    fps = 1.0  # two frames, 49 tokens, for 2 s: half the cost of the stock rate, and our pictures hardly move
    thinker_class = SmolOmniThinker


AutoConfig.register(SmolOmniConfig.model_type, SmolOmniConfig)
