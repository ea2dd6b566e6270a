"""Nearest-neighbour upsampling followed by a convolution, in two algebraic forms.

*Plain*: make the large picture, convolve it.

*Folded*: three neighbouring pixels of the doubled picture are only two different pixels of the small one, so the 3×3
taps w₀, w₁, w₂ (per axis) merge into two, by the parity of the row that is computed:

    row 2k + 1:   (w₀ + w₁)·x[k] + w₂·x[k + 1]
    row 2k:       w₀·x[k - 1] + (w₁ + w₂)·x[k]

Both parities in both axes are one 2×2 convolution with 4·K channels over the small picture with a border of zeros;
its position p reads x[p - 1] and x[p] and yields rows 2p - 1 and 2p, which is a pixel shuffle shifted by one.
16 instead of 36 multiplications for four pixels: 2.25 times fewer.

diffusers asks for 2n - 1 rows or columns where the size of the latent is off its grid of 64 pixels.  Nearest
neighbours of n pixels at 2n - 1 places are the doubled rows without the last one, so all of the above holds except in
row 2n - 2: there w₂ meets the zeros of the padding, while the folded taps w₁ + w₂ saw the second copy of x[n - 1].
That row (column) is computed in the plain form from the last two rows (columns) of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# [parity, tap of the small picture, tap of the large one]; parity 0 is the odd row 2p - 1, which comes first.
_FOLD = (((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)), ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)))

_AT_ONCE = 64
"""Outputs of a weight that are folded at a time."""


def upsample_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    folded: torch.Tensor | None,
    bias: torch.Tensor | None,
    height: int | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """conv2d(upsample_nearest(x, (height, width)), weight, bias, padding=1), in the plain form.

    x        [B, C, H, W] f16 | bf16 | f32
    weight   [K, C, 3, 3], bias [K] or None, dtype of x
    folded   [4·K, C, 2, 2], `fold_upsample_weight(weight)`, or None; only the folded form reads it
    height   rows of the result, any number; None: 2·H.  width likewise
    returns  [B, K, height, width], dtype of x; accumulated in f32
    cost     18·B·K·C·height·width FLOPs
    """
    large = F.interpolate(x, size=_target(x, height, width), mode="nearest")
    return F.conv2d(large, weight, bias, padding=1)


def upsample_conv_folded(
    x: torch.Tensor,
    weight: torch.Tensor,
    folded: torch.Tensor,
    bias: torch.Tensor | None,
    height: int | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """`upsample_conv` in the folded form for targets of 2·H or 2·H - 1 rows and 2·W or 2·W - 1 columns, else plain.

    cost     8·B·K·C·height·width FLOPs
    source   Shi et al. 2016, arXiv:1609.07009 (the pixel shuffle)
    """
    rows, columns = _target(x, height, width)
    lost = 2 * x.shape[2] - rows, 2 * x.shape[3] - columns
    if not set(lost) <= {0, 1}:
        return upsample_conv(x, weight, folded, bias, rows, columns)
    phases = F.conv2d(x, folded, None if bias is None else bias.repeat_interleave(4), padding=1)
    out = F.pixel_shuffle(phases, 2)[:, :, 1 : 1 + rows, 1 : 1 + columns]
    if lost[0]:
        out[:, :, -1:, :] = _last_row(x, weight, bias, columns)
    if lost[1]:
        # The same along the other axis: a picture and its transpose, with transposed taps.
        out[:, :, :, -1:] = _last_row(x.mT, weight.mT, bias, rows).mT
    return out


def fold_upsample_weight(weight: torch.Tensor) -> torch.Tensor:
    """The taps of the folded form: channel 4·k + 2·i + j is output k at row parity i and column parity j.

    weight   [K, C, 3, 3] f16 | bf16 | f32
    returns  [4·K, C, 2, 2], dtype of weight; summed in f32
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    fold = torch.tensor(_FOLD, dtype=wide, device=weight.device)
    folded = weight.new_empty((4 * weight.shape[0], weight.shape[1], 2, 2))
    # A few outputs at a time: all sums in f32 together would take more memory than a small picture does.
    for some, place in zip(torch.split(weight, _AT_ONCE), torch.split(folded, 4 * _AT_ONCE), strict=True):
        place.copy_(torch.einsum("iar,jbs,kcrs->kijcab", fold, fold, some.to(wide)).flatten(0, 2))
    return folded


def _target(x: torch.Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    return 2 * x.shape[2] if height is None else height, 2 * x.shape[3] if width is None else width


def _last_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int) -> torch.Tensor:
    """Row 2n - 2 of the plain form for a target of 2n - 1 rows: below the last two rows of x it sees zeros."""
    tail = x[:, :, -2:]
    wide = F.interpolate(tail, size=(tail.shape[2], columns), mode="nearest")
    return F.conv2d(wide, weight[:, :, :2], bias, padding=(1, 1))[:, :, tail.shape[2] - 1 : tail.shape[2]]
