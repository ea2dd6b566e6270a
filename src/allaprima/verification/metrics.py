"""How far two pictures or two tensors are apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Pixels: TypeAlias = npt.NDArray[np.float32]


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures with values 0 to 1, in dB; infinite where they are equal."""
    mean_square = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity of two pictures [H, W, C] with values 0 to 1, averaged over the channels.

    The window shrinks to the largest odd size that fits where a picture is smaller than 11 pixels.

    source   Wang, Bovik, Sheikh, Simoncelli 2004, doi:10.1109/TIP.2003.819861: Gaussian window of 11x11 pixels with
             sigma 1.5, K1 = 0.01, K2 = 0.03
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(p)).double().permute(2, 0, 1)[:, None] for p in (a, b))
    radius = min(5, (min(x.shape[-2:]) - 1) // 2)
    line = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mean = functools.partial(torch.nn.functional.conv2d, weight=window)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference over root mean square of the truth."""
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))


def ratio(ours: float, eager: float) -> float:
    """ours / eager, where nothing over nothing is no error at all, and neither is a number where eager has none (its
    half-precision decoder overflowed, and ours was decoded again).  NaN if neither has one."""
    if not math.isfinite(eager):
        return 0.0 if math.isfinite(ours) else math.nan
    if eager == 0:
        return math.inf if ours > 0 else 0.0
    return ours / eager


def median_rms(a: Pixels, b: Pixels) -> float:
    """Root mean square of each picture's difference; the median over the pictures."""
    squares = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return float(np.median(np.sqrt(squares)))


def median(values: Sequence[float]) -> float:
    """The median; NaN if a value is."""
    return float(np.median(values))


def lowest(values: Sequence[float]) -> float:
    """min(), but for a NaN, which wins."""
    return float(np.min(values))


def highest(values: Sequence[float]) -> float:
    """max(), but for a NaN, which wins."""
    return float(np.max(values))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of any two elements."""
    return float((a - b).abs().max())
