# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What follows a convolution: adding the parts of a split sum, the bias and the addend; and what all launches share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..device import Device
from .dependent import wait
from .variant import Launch, Variant

LAUNCH_US = 2.5
"""What one more kernel costs inside a CUDA graph."""

INT32 = 2**31 - 1
"""Offsets inside an image are computed in 32 bits."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Pixels:
    """Where the pixels of a channels-last [B, C, H, W] lie: elements from image to image and from pixel to pixel."""

    image: int
    pixel: int

    @property
    def vector(self) -> bool:
        """Whether eight channels are one aligned load wherever the first pixel is aligned."""
        return self.image % 8 == 0 and self.pixel % 8 == 0


def pixels_of(x: torch.Tensor) -> Pixels | None:
    """The strides of a tensor whose channels lie side by side and whose rows follow each other, else None.

    Strides of axes with one entry mean nothing, and PyTorch leaves anything there.
    """
    batch, channels, height, width = x.shape
    image, channel, row, column = x.stride()
    pixel = column if width > 1 else row if height > 1 else channels
    if (channels > 1 and channel != 1) or (height > 1 and width > 1 and row != width * column):
        return None
    return Pixels(image if batch > 1 else 0, pixel)


def addend_pixels(addend: torch.Tensor, batch: int, outputs: int, rows: int, columns: int) -> Pixels | None:
    """The strides of a residual [B or 1, K, P, Q] or an embedding [B or 1, K, 1, 1]: 0 where it is the same again."""
    if addend.dim() != 4 or addend.shape[0] not in (1, batch) or addend.shape[1] != outputs:
        return None
    found = pixels_of(addend)
    if tuple(addend.shape[2:]) == (rows, columns):
        return found
    return Pixels(found.image, 0) if found and tuple(addend.shape[2:]) == (1, 1) else None


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether all of them start at a multiple of 16 bytes, as the compiled forms take for granted."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


@triton.jit(
    do_not_specialize=[
        "num_parts", "num_rows", "num_k8", "area", "has_bias", "has_addend", "addend_image8", "addend_pixel8",
    ]
)  # fmt: skip
def finish_kernel(
    parts, bias, addend, out,
    num_parts, num_rows, num_k8, area, has_bias, has_addend, addend_image8, addend_pixel8,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[row, k] = Σ parts[·, row, k] + bias[k] + addend[row, k], in the order of the parts."""
    num_k = num_k8 * 8
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < num_rows)[:, None] & (n < num_k)[None, :]
    place = (row.to(tl.int64) * num_k)[:, None] + n[None, :]
    size = num_rows.to(tl.int64) * num_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait()
    for part in range(0, num_parts, 4):
        # Four loads at a time are in flight together; the sum keeps its order.
        first = tl.load(parts + part * size + place, mask=mask, other=0.0)
        second = tl.load(parts + (part + 1) * size + place, mask=mask & (part + 1 < num_parts), other=0.0)
        third = tl.load(parts + (part + 2) * size + place, mask=mask & (part + 2 < num_parts), other=0.0)
        fourth = tl.load(parts + (part + 3) * size + place, mask=mask & (part + 3 < num_parts), other=0.0)
        acc = acc + first.to(tl.float32) + second.to(tl.float32) + third.to(tl.float32) + fourth.to(tl.float32)
    if has_bias != 0:
        acc += tl.load(bias + n, mask=n < num_k, other=0.0).to(tl.float32)[None, :]
    if has_addend != 0:
        image = (row // area).to(tl.int64) * addend_image8 * 8
        start = addend + image + (row % area).to(tl.int64) * addend_pixel8 * 8
        acc += tl.load(start[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


_BLOCK_M, _BLOCK_N, _WARPS = 16, 64, 4


@functools.cache
def _finish_variant(parts: torch.dtype, dtype: torch.dtype) -> Variant:
    sizes = (1,) * 8
    constants = {"BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N}
    return Variant(finish_kernel, (parts, dtype, dtype, dtype, *sizes), constants, _WARPS, 1)


def finish_launch(
    parts: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None, out: torch.Tensor
) -> Launch:
    """out = Σ parts + bias + addend; parts may be `out` itself, as one part.

    parts    [S, B·P·Q, K] f32, or a channels-last [B, K, P, Q] of out's dtype
    bias     [K] or None, dtype of out
    addend   see `addend_pixels`, or None, dtype of out
    out      [B, K, P, Q] channels-last, dense; K a multiple of 8
    """
    batch, outputs, rows, columns = out.shape
    where = Pixels(0, 0) if addend is None else addend_pixels(addend, batch, outputs, rows, columns)
    assert where is not None
    assert where.vector
    assert outputs % 8 == 0
    num_rows = batch * rows * columns
    num_parts = parts.shape[0] if parts.dim() == 3 else 1
    none = out if bias is None else bias
    return Launch(
        _finish_variant(parts.dtype, out.dtype),
        (ceil_div(num_rows, _BLOCK_M), ceil_div(outputs, _BLOCK_N), 1),
        (
            parts, none, out if addend is None else addend, out,
            num_parts, num_rows, outputs // 8, rows * columns,
            int(bias is not None), int(addend is not None), where.image // 8, where.pixel // 8,
        ),
    )  # fmt: skip


def finish_variants(dtype: torch.dtype) -> Iterator[Variant]:
    """The forms of `finish_launch`: for split sums, and in place after a library's convolution."""
    yield from (_finish_variant(parts, dtype) for parts in {torch.float32: 0, dtype: 0})


def finish_us(num_parts: int, num_elements: int, parts_size: int, itemsize: int, addend: bool, device: Device) -> float:
    """Time of `finish_launch`, µs: a latency for every four parts, and what it moves, by the memory or the cache."""
    moved = num_elements * (num_parts * parts_size + itemsize * (1 + addend))
    cached = min(moved, HELD * device.l2_bytes)
    moving_us = cached / (device.l2_tbs * 1e6) + (moved - cached) / (device.memory_tbs * 1e6)
    return FINISH_US + ROUND_US * ceil_div(num_parts, 4) + moving_us


FINISH_US, ROUND_US, HELD = 0.5, 1.6, 0.4
"""A launch behind the one that made the parts; four loads at a time; the part of the cache that still holds them."""
