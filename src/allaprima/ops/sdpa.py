"""Scaled dot-product attention without transposes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(scale·q·kᵀ + mask)·v for each head, heads and channels where the projections left them.

    q        [B, N, H, D] f16 | bf16 | f32; any strides with channels dense
    k, v     [B, M, H, D], [B, M, H, E], dtype of q
    mask     broadcastable to [B, H, N, M]: bool (True: may be looked at) or dtype of q (added); None: all
    scale    factor of the scores; None: 1/√D
    causal   row n sees columns up to n; not together with a mask
    returns  [B, N, H, E], dtype of q; softmax in f32
    cost     2·B·H·N·M·(D + E) FLOPs; reads q, k, v once, writes once
    source   Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size) -> int:
    """FLOPs of `attention` for shapes [B, N, H, D], [B, M, H, D], [B, M, H, E]."""
    batch, rows, heads, channels = q
    return 2 * batch * heads * rows * k[1] * (channels + v[3])
