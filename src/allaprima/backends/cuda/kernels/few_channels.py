# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Convolutions from or to few channels: the first of a UNet or decoder (4 → 320) and the last (320 → 4, 128 → 3).

From few: taps and channels together are one short axis of the product, gathered element by element.

To few: every tap of every output is one column of a single product, t[pixel, (tap, k)] = x[pixel]·w[k, tap], so that x
is read once and not once a tap; out[pixel, k] = Σ over taps of t[pixel + tap, (tap, k)] then moves numbers only inside
a patch with a border, which its neighbours compute again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..device import Device
from .dependent import wait
from .epilogue import INT32, LAUNCH_US, Pixels, addend_pixels, aligned, ceil_div, pixels_of
from .variant import Launch, Variant


# ---------------------------------------------------------------------------------------------------------- kernels
@triton.jit(
    do_not_specialize=[
        "has_bias", "has_addend", "batch", "height", "width", "channels", "outputs", "rows", "columns",
        "x_image", "x_row", "x_column", "x_channel", "kernel_columns", "depth", "weight_k",
        "stride_rows", "stride_columns", "pad_rows", "pad_columns", "addend_image", "addend_pixel",
    ]
)  # fmt: skip
def flat_kernel(
    x, weight, bias, addend, out,
    has_bias, has_addend, batch, height, width, channels, outputs, rows, columns,
    x_image, x_row, x_column, x_channel, kernel_columns, depth, weight_k,
    stride_rows, stride_columns, pad_rows, pad_columns, addend_image, addend_pixel,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[pixel, :] = Σ over q < depth of x[pixel + tap(q), channel(q)]·weight[:, q], + bias + addend.

    q counts channels inside taps, as a channels-last weight stores them.  UNIT channels are one load: 1 for any strides
    of x and any number of channels, 4 where four lie side by side.
    outputs, addend_image and addend_pixel are in units of ALIGN elements; channels, depth, weight_k and the strides of
    x in units of UNIT.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_k = outputs * ALIGN
    inside = m < batch * rows * columns
    q = m % columns
    p = (m // columns) % rows
    image = (m // columns // rows).to(tl.int64)
    top = p * stride_rows - pad_rows
    left = q * stride_columns - pad_columns
    x_start = x + (image * x_image + top * x_row + left * x_column) * UNIT
    w_start = weight + n.to(tl.int64) * weight_k * UNIT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait()
    for first in range(0, depth * UNIT, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        unit = k // UNIT
        tap = unit // channels
        r = tap // kernel_columns
        s = tap % kernel_columns
        near = (r * x_row + s * x_column + (unit % channels) * x_channel) * UNIT + k % UNIT
        h = top[:, None] + r[None, :]
        w = left[:, None] + s[None, :]
        mask = (h >= 0) & (h < height) & (w >= 0) & (w < width) & inside[:, None] & (unit < depth)[None, :]
        x_tile = tl.load(x_start[:, None] + near[None, :], mask=mask, other=0.0)
        w_mask = (n < num_k)[:, None] & (unit < depth)[None, :]
        w_tile = tl.load(w_start[:, None] + k[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    mask = inside[:, None] & (n < num_k)[None, :]
    if has_bias != 0:
        acc += tl.load(bias + n, mask=n < num_k, other=0.0).to(tl.float32)[None, :]
    if has_addend != 0:
        pixel = p * columns + q
        start = addend + image * addend_image * ALIGN + pixel.to(tl.int64) * addend_pixel * ALIGN
        acc += tl.load(start[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (m.to(tl.int64) * num_k)[:, None] + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "has_bias", "height", "width", "num_c8", "outputs", "x_image8", "x_pixel8", "weight_k8", "weight_tap8",
        "num_across", "num_down",
    ]
)  # fmt: skip
def patch_kernel(
    x, weight, bias, out,
    has_bias, height, width, num_c8, outputs, x_image8, x_pixel8, weight_k8, weight_tap8, num_across, num_down,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A 3×3 convolution with at most 4 outputs; a program reads ROWS × COLUMNS pixels and makes those inside."""
    PIXELS: tl.constexpr = ROWS * COLUMNS
    pid = tl.program_id(0)
    across = pid % num_across
    down = (pid // num_across) % num_down
    image = (pid // num_across // num_down).to(tl.int64)
    m = tl.arange(0, PIXELS)
    patch_row = m // COLUMNS
    patch_column = m % COLUMNS
    h = down * (ROWS - 2) + patch_row - 1
    w = across * (COLUMNS - 2) + patch_column - 1
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    num_c = num_c8 * 8
    x_start = x + image * x_image8 * 8 + (h * width + w) * (x_pixel8 * 8)
    # Column 4·tap + k of the product, for 16 taps of which 9 exist.
    n = tl.arange(0, 64)
    wanted = (n // 4 < 9) & (n % 4 < outputs)
    w_start = weight + (n % 4) * (weight_k8 * 8) + (n // 4) * (weight_tap8 * 8)
    acc = tl.zeros([PIXELS, 64], tl.float32)
    wait()
    for first in range(0, num_c, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_inside = k < num_c
        x_tile = tl.load(x_start[:, None] + k[None, :], mask=inside[:, None] & k_inside[None, :], other=0.0)
        w_tile = tl.load(w_start[:, None] + k[None, :], mask=wanted[:, None] & k_inside[None, :], other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    # Pixels at the rim of the patch gather from beyond it: any place will do, they are not stored.
    tap = tl.minimum(n // 4, 8)
    source = m[:, None] + ((tap // 3 - 1) * COLUMNS + tap % 3 - 1)[None, :]
    source = tl.minimum(tl.maximum(source, 0), PIXELS - 1)
    moved = tl.gather(acc, source, 0)
    total = tl.sum(tl.reshape(moved, [PIXELS, 16, 4]), 1)
    k = tl.arange(0, 4)
    if has_bias != 0:
        total += tl.load(bias + k, mask=k < outputs, other=0.0).to(tl.float32)[None, :]
    made = inside & (patch_row > 0) & (patch_row < ROWS - 1) & (patch_column > 0) & (patch_column < COLUMNS - 1)
    place = ((image * height + h) * width + w) * outputs
    mask = made[:, None] & (k < outputs)[None, :]
    tl.store(out + place[:, None] + k[None, :], total.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------- parameters
@dataclass(frozen=True)
class Flat:
    """The gathered product: m pixels by n outputs."""

    m: int
    n: int
    warps: int

    @property
    def name(self) -> str:
        return f"flat {self.m}x{self.n} warps={self.warps}"


@dataclass(frozen=True)
class Patch:
    """The patch that one program reads, its border included."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"patch {self.rows}x{self.columns} warps={self.warps} stages={self.stages}"


FLATS = (Flat(64, 64, 4),)
PATCHES = (Patch(8, 16, 4, 3),)
MAX_FLAT_CHANNELS = 16
"""From here on whole tiles of channels are worth more than the padding of the axis."""


@functools.cache
def _flat_variant(dtype: torch.dtype, flat: Flat, align: int, unit: int) -> Variant:
    depth = 32 if dtype.itemsize == 4 else 64
    constants = {"ALIGN": align, "UNIT": unit, "BLOCK_M": flat.m, "BLOCK_N": flat.n, "BLOCK_K": depth}
    return Variant(flat_kernel, (*(dtype,) * 5, *(1,) * 22), constants, flat.warps, 1)


@functools.cache
def _patch_variant(dtype: torch.dtype, patch: Patch) -> Variant:
    constants = {"ROWS": patch.rows, "COLUMNS": patch.columns, "BLOCK_K": 32 if dtype.itemsize == 4 else 64}
    return Variant(patch_kernel, (*(dtype,) * 4, *(1,) * 11), constants, patch.warps, patch.stages)


def few_channels_variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every compiled form that the launches of this file may ask for with that dtype."""
    yield from (_flat_variant(dtype, flat, *wide) for flat in FLATS for wide in ((8, 4), (8, 1), (1, 1)))
    yield from (_patch_variant(dtype, patch) for patch in PATCHES)


# ----------------------------------------------------------------------------------------------------------- launch
def few_channels_supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    parameters: Flat | Patch,
) -> str | None:
    """Why `parameters` cannot make this convolution (dilation 1, one group); None: they can."""
    given = [x, weight, *(t for t in (bias, addend) if t is not None)]
    if len({t.dtype for t in given}) > 1 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "dtypes that differ or are not f16, bf16 or f32"
    if not aligned(*given) or (bias is not None and bias.stride(0) != 1):
        return "a tensor that does not start at a multiple of 16 bytes, or a strided bias"
    where, strides = pixels_of(x), pixels_of(weight)
    if strides is None or x.shape[1] != weight.shape[1]:
        return "a weight that is not channels-last, or of other channels"
    if isinstance(parameters, Patch):
        plain = tuple(weight.shape[2:]) == (3, 3) and tuple(stride) == (1, 1) and tuple(padding) == (1, 1)
        if not plain or weight.shape[0] > 4 or addend is not None or x.shape[1] % 8:
            return "other than 3×3, padding 1, stride 1, at most 4 outputs, without addend, channels in eights"
        if where is None or not where.vector or not strides.vector:
            return "a layout that is not channels-last with strides that are multiples of 8"
    elif strides.pixel != weight.shape[1] and weight.shape[2] * weight.shape[3] > 1:
        return "a slice of a weight"
    rows, columns = ((x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in range(2))
    if isinstance(parameters, Flat) and addend is not None:
        beside = addend_pixels(addend, x.shape[0], weight.shape[0], rows, columns)
        if beside is None or (weight.shape[0] % 8 == 0 and not beside.vector):
            return "an addend that is neither a channels-last residual nor an embedding"
    inside = sum((n + 2 * max(padding)) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    too_large = max(inside, x.stride(0), weight.stride(0), x.shape[0] * rows * columns) > INT32
    return "an image of 2³¹ elements or more" if too_large else None


def few_channels_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    out: torch.Tensor,
    parameters: Flat | Patch,
) -> Launch:
    """The launch of what `supports` allows; out is channels-last and dense."""
    batch, channels, height, width = x.shape
    outputs, rows, columns = out.shape[1:]
    strides = pixels_of(weight)
    assert strides is not None
    if isinstance(parameters, Patch):
        where = pixels_of(x)
        assert where is not None
        across = ceil_div(columns, parameters.columns - 2)
        down = ceil_div(rows, parameters.rows - 2)
        return Launch(
            _patch_variant(x.dtype, parameters),
            (batch * down * across, 1, 1),
            (
                x, weight, x if bias is None else bias, out,
                int(bias is not None), height, width, channels // 8, outputs,
                where.image // 8, where.pixel // 8, strides.image // 8, strides.pixel // 8, across, down,
            ),
        )  # fmt: skip
    beside = Pixels(0, 0) if addend is None else addend_pixels(addend, batch, outputs, rows, columns)
    assert beside is not None
    align = 8 if outputs % 8 == 0 else 1
    image, channel, row, column = x.stride()
    in_units = x.shape[1] % 4 == 0 and channel == 1 and not (image % 4 or row % 4 or column % 4 or strides.image % 4)
    unit = 4 if align == 8 and in_units else 1
    return Launch(
        _flat_variant(x.dtype, parameters, align, unit),
        (ceil_div(batch * rows * columns, parameters.m), ceil_div(outputs, parameters.n), 1),
        (
            x, weight, x if bias is None else bias, x if addend is None else addend, out,
            int(bias is not None), int(addend is not None), batch, height, width, channels // unit, outputs // align,
            rows, columns, image // unit, row // unit, column // unit, channel, weight.shape[3],
            channels // unit * weight.shape[2] * weight.shape[3], strides.image // unit, *stride, *padding,
            beside.image // align, beside.pixel // align,
        ),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- estimate
def few_channels_candidates(
    channels: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> list[Flat | Patch]:
    """Those that are not silly for the numbers of channels."""
    found: list[Flat | Patch] = []
    if channels <= MAX_FLAT_CHANNELS or channels % 8 or outputs % 8:
        found += FLATS
    if outputs <= 4 and channels % 8 == 0 and (kernel, stride, padding) == ((3, 3), (1, 1), (1, 1)):
        found += PATCHES
    return found


def few_channels_us(
    sizes: tuple[int, int, int, int, int, int, int],
    kernel: tuple[int, int],
    itemsize: int,
    parameters: Flat | Patch,
    device: Device,
) -> float:
    """Time of a launch, µs; sizes are B, C, H, W, K, P, Q.

    The gathered product is bound by finding and gathering its elements, alone or four at a time; patches by reading x.
    """
    batch, channels, height, width, outputs, rows, columns = sizes
    moved = batch * (channels * height * width + outputs * rows * columns) * itemsize
    if isinstance(parameters, Patch):
        num_patches = batch * ceil_div(rows, parameters.rows - 2) * ceil_div(columns, parameters.columns - 2)
        pixels = parameters.rows * parameters.columns
        # The product has 64 columns, and each number goes through shared memory to the pixel it belongs to.
        loads_us = pixels * channels * itemsize / (device.l2_tbs * 1e6 / device.num_sms)
        tflops = device.half_tflops if itemsize == 2 else device.float_tflops
        products_us = 2 * pixels * 64 * channels / (0.5 * tflops * 1e6 / device.num_sms)
        each_us = max(loads_us, products_us) + pixels * 64 * 4 * 3 / 150e3
        waves = max(1.0, num_patches / device.num_sms)
        return LAUNCH_US + 3.0 + max(waves * each_us, moved / (device.memory_tbs * 1e6))
    depth = 64 * ceil_div(channels * kernel[0] * kernel[1], 64)
    num_tiles = ceil_div(batch * rows * columns, parameters.m) * ceil_div(outputs, parameters.n)
    each_us = (0.8 if channels % 4 == 0 else 2.5) * depth / 64
    rate = device.l2_tbs if moved < device.l2_bytes else device.memory_tbs
    return LAUNCH_US + 2.0 + max(max(1.0, num_tiles / device.num_sms) * each_us, moved / (rate * 1e6))
