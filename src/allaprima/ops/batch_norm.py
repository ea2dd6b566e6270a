"""Batch normalisation in eval mode, as a part of the convolution in front of it."""

from __future__ import annotations

import torch


def fold_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias for which conv(x) = gain·(conv(x, weight, bias) - mean) / √(variance + eps) + shift.

    weight   [K, …] f16 | bf16 | f32; bias [K] or None (0)
    gain     [K] or None (1); shift [K] or None (0): of the norm
    mean     [K], variance [K]: running statistics
    returns  weight and bias, shape and dtype of the given weight; computed in f32
    source   Jacob et al. 2017, arXiv:1712.05877 §3.2
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = (variance.to(wide) + eps).rsqrt()
    if gain is not None:
        factor = factor * gain.to(wide)
    offset = -mean.to(wide) * factor if bias is None else (bias.to(wide) - mean.to(wide)) * factor
    if shift is not None:
        offset = offset + shift.to(wide)
    columns = factor.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.to(wide) * columns).to(weight.dtype), offset.to(weight.dtype)
