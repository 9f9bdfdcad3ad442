"""An independent forward pass through a Qwen2.5-Omni decoder, written out with explicit softmax and explicit blocked pairs. Slow on purpose."""

from __future__ import annotations

import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

from models.attention import Cut, Kind


def allowed(kinds: torch.Tensor, cuts: tuple[Cut, ...], layer: int) -> torch.Tensor:
    """(T, T) True where query row may look at key row, by loops."""
    n = len(kinds)
    out = torch.zeros(n, n, dtype=torch.bool)
    for query in range(n):
        for key in range(query + 1):
            ok = kinds[key] != Kind.PAD
            for cut in cuts:
                if cut.start <= layer < cut.stop and int(kinds[query]) in cut.target and int(kinds[key]) in cut.source:
                    ok = False
            out[query, key] = bool(ok)
    return out


@torch.no_grad()
def forward(model, batch, cuts) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Normed states (B, T, H); weights a layer (B, heads, T, T); states a layer, index 0 the embeddings."""
    text, inputs = model.text_model, batch.inputs
    x = text.embed_tokens(inputs["input_ids"]).masked_scatter(inputs["media_mask"][..., None], inputs["features"])
    cos, sin = text.rotary_emb(x, inputs["position_ids"])
    states, weights = [x], []
    for index, layer in enumerate(text.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        b, t, _ = h.shape
        q, k, v = (p(h).view(b, t, -1, attention.head_dim).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = torch.stack([allowed(kinds, c, index) for kinds, c in zip(batch.kinds, cuts, strict=True)])
        scores = (q @ k.transpose(2, 3) / attention.head_dim**0.5).masked_fill(~mask[:, None], float("-inf"))
        w = torch.softmax(scores, -1)
        weights.append(w)
        x = x + attention.o_proj((w @ v).transpose(1, 2).reshape(b, t, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        states.append(x)
    return text.norm(x), states, weights
