"""Convolutions with their epilogues, over one tensor or over several that stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F


def conv2d_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """conv2d(x) + bias + addend.

    x        [B, C, H, W] f16 | bf16 | f32
    weight   [K, C / groups, R, S], bias [K] or None, dtype of x
    addend   [B or 1, K, P, Q] (a residual) or [B or 1, K, 1, 1] (an embedding of the timestep), dtype of x
    returns  [B, K, P, Q], dtype of x; accumulated in f32
    cost     2·B·K·P·Q·(C / groups)·R·S FLOPs; the addend is read once, in the epilogue
    """
    return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups) + addend


def conv2d_cat(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """conv2d(cat(sources, 1)) = Σᵢ conv2d(sourceᵢ, its channels of weight) + bias: nothing is concatenated.

    sources  [B, Cᵢ, H, W] f16 | bf16 | f32, of one dtype
    weight   [K, ΣCᵢ, R, S], bias [K] or None, dtype of the sources
    returns  [B, K, P, Q], dtype of the sources; accumulated in f32
    cost     2·B·K·P·Q·ΣCᵢ·R·S FLOPs; each source is read where it is
    """
    return F.conv2d(torch.cat(tuple(sources), 1), weight, bias, tuple(stride), tuple(padding), tuple(dilation))


def conv2d_flops(weight: Sequence[int], result: Sequence[int]) -> int:
    """FLOPs of a convolution with weight [K, C / groups, R, S] and result [B, K, P, Q]."""
    return 2 * prod(weight[1:]) * prod(result)
