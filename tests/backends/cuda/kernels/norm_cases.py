"""What the tests of the norms share: tensors in the middle of NaN, and the bound on the error."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAD = 8
"""Elements between rows on either side: 16 bytes in half precision, as in a slice of channels."""
MARGIN = 512
"""Elements before and behind, a multiple of 16 bytes."""


def assert_no_worse(ours: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor) -> None:
    """Our error is at most twice eager's largest plus one rounding of the output (truth is in float64)."""
    assert ours.dtype == eager.dtype
    assert ours.shape == truth.shape
    rounding = torch.finfo(ours.dtype).eps * truth.abs()
    allowed = 2 * (eager.double() - truth).abs().max() + rounding
    error = (ours.double() - truth).abs()
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


def in_nan(values: torch.Tensor, gap: int = 0) -> torch.Tensor:
    """The same values in a buffer that holds NaN before, behind and between rows, and `gap` rows of it after images."""
    pitch = values.shape[-1] + 2 * PAD
    strides = [1]
    for n in reversed(values.shape[1:]):
        strides.insert(0, pitch if len(strides) == 1 else strides[0] * n)
    if values.dim() > 2:
        strides[0] += gap * pitch
    reach = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    big = values.new_full((2 * MARGIN + reach + 1,), float("nan"))
    return big.as_strided(values.shape, strides, MARGIN).copy_(values)


def channels_last_in_nan(values: torch.Tensor) -> torch.Tensor:
    """[B, C, …] laid out as [B, …, C] in the middle of NaN."""
    return in_nan(values.movedim(1, -1), gap=1).movedim(-1, 1)
