"""Matrix products with their epilogues."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor) -> torch.Tensor:
    """x·weightᵀ + bias + addend.

    x        [..., K] f16 | bf16 | f32
    weight   [N, K], bias [N] or None, dtype of x
    addend   [..., N], the shape of the result, dtype of x; any strides
    returns  [..., N], dtype of x; accumulated in f32
    cost     2·M·N·K FLOPs; the addend is read once, in the epilogue
    """
    return F.linear(x, weight, bias) + addend


def geglu_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none"
) -> torch.Tensor:
    """h·gelu(g) where [h, g] = x·weightᵀ + bias: neither half is ever written.

    x            [..., K] f16 | bf16 | f32
    weight       [2·N, K], the rows of h first, as the checkpoint has them; bias [2·N] or None, dtype of x
    approximate  "none" (erf) or "tanh"
    returns      [..., N], dtype of x; accumulated in f32
    cost         4·M·N·K FLOPs; writes M·N elements (apart: 2·M·N written, read, M·N written)
    source       Shazeer 2020, arXiv:2002.05202
    """
    h, g = F.linear(x, weight, bias).chunk(2, -1)
    return h * F.gelu(g, approximate=approximate)


def linear_flops(x: Sequence[int], weight: Sequence[int]) -> int:
    """FLOPs of a product of shapes [..., K] and [N, K]."""
    return 2 * prod(x) * weight[0]
