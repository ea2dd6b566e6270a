"""GroupNorm followed by SiLU, over one tensor or over several that stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def group_norm_silu(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """silu(group_norm(x)): normalise each group over its channels and pixels, scale, shift, SiLU.

    x        [B, C, …] f16 | bf16 | f32; C divisible by groups
    weight   [C], bias [C], dtype of x
    returns  [B, C, …], dtype of x; statistics in f32
    cost     reads x twice, writes once: 3·B·C·H·W·itemsize bytes
    source   Wu & He 2018, arXiv:1803.08494
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    return F.silu(normal).to(x.dtype)


def group_norm_silu_cat(
    sources: Sequence[torch.Tensor], groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """silu(group_norm(cat(sources, 1))): the concatenation is written once, normalised; never as it is.

    sources  [B, Cᵢ, H, W] f16 | bf16 | f32, of one dtype; C = ΣCᵢ divisible by groups.  A group may straddle two
             sources: its statistics are sums over channels, so those of the parts are added
    weight   [C], bias [C], dtype of the sources
    returns  [B, C, H, W], dtype of the sources; statistics in f32
    cost     reads the sources twice, writes once: 3·B·C·H·W·itemsize bytes (with the concatenation: 5)
    """
    return group_norm_silu(torch.cat(tuple(sources), 1), groups, weight, bias, eps)
