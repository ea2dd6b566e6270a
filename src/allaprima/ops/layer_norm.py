"""A residual addition together with the LayerNorm that reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual and layer_norm(s) over the last axis.

    x        [..., C] f16 | bf16 | f32; residual alike
    weight   [C], bias [C], dtype of x
    returns  s and its norm, [..., C], dtype of x; s is rounded first, statistics in f32
    cost     reads both once, writes both once: 4·N·C·itemsize bytes (apart: 5)
    source   Ba et al. 2016, arXiv:1607.06450
    """
    total = x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = F.layer_norm(total.to(wide), (total.shape[-1],), weight.to(wide), bias.to(wide), eps)
    return total, normal.to(x.dtype)
