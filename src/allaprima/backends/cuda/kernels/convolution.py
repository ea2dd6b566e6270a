# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Convolutions as implicit matrix products: rows are pixels, columns are output channels, the sum runs over taps and
input channels.  Nothing is unfolded: a tap is an offset from the pixel, and zeros beyond the border are masked loads.

One kernel also makes nearest-neighbour upsampling and its folded form (`upsampling.py`), which differ from a plain
convolution in where a tap reads and where a pixel is stored, and in nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ....errors import InputError
from ..device import Device
from .dependent import wait
from .epilogue import (
    INT32,
    LAUNCH_US,
    Pixels,
    addend_pixels,
    aligned,
    ceil_div,
    finish_launch,
    finish_us,
    finish_variants,
    pixels_of,
)
from .few_channels import (
    Flat,
    Patch,
    few_channels_candidates,
    few_channels_launch,
    few_channels_supports,
    few_channels_us,
    few_channels_variants,
)
from .variant import Launch, Variant


# ----------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _taps_inside(first, limit, num_taps):
    """Bit r says whether 0 <= first + r < limit, for r < num_taps."""
    end = tl.minimum(tl.maximum(limit - first, 0), num_taps)
    begin = tl.minimum(tl.maximum(-first, 0), num_taps)
    return (1 << end) - (1 << begin)


@triton.jit
def _positions(first, total, num_a, num_b, first_a, first_b, BLOCK_M: tl.constexpr):
    """Image, row and column of BLOCK_M positions, and which of them exist."""
    m = first + tl.arange(0, BLOCK_M)
    b = m % num_b + first_b
    a = (m // num_b) % num_a + first_a
    return (m // num_b // num_a).to(tl.int64), a, b, m < total


@triton.jit
def _store(
    acc, n, image, pixel, inside, bias, addend, out, has_bias, has_addend, num_k, addend_image, addend_pixel,
    batch, area, split, PARTIAL: tl.constexpr,
):  # fmt: skip
    mask = inside[:, None] & (n < num_k)[None, :]
    place = image * area + pixel
    if PARTIAL:
        place += split.to(tl.int64) * batch * area
    else:
        if has_bias != 0:
            acc += tl.load(bias + n, mask=n < num_k, other=0.0).to(tl.float32)[None, :]
        if has_addend != 0:
            start = addend + image * addend_image + pixel.to(tl.int64) * addend_pixel
            acc += tl.load(start[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (place * num_k)[:, None] + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "has_bias", "has_addend", "batch", "height", "width", "num_c8", "num_k8", "x_image8", "x_pixel8",
        "kernel_rows", "kernel_columns", "weight_k8", "weight_tap8", "weight_phase8", "plain_k8", "plain_tap8",
        "stride_rows", "stride_columns", "pad_rows", "pad_columns", "shift", "step", "rows", "columns",
        "lost_rows", "lost_columns", "num_edges", "addend_image8", "addend_pixel8",
        "num_m", "num_n", "rows_first", "num_splits",
    ]
)  # fmt: skip
def conv_kernel(
    x, weight, plain, bias, addend, out,
    has_bias, has_addend, batch, height, width, num_c8, num_k8, x_image8, x_pixel8,
    kernel_rows, kernel_columns, weight_k8, weight_tap8, weight_phase8, plain_k8, plain_tap8,
    stride_rows, stride_columns, pad_rows, pad_columns, shift, step, rows, columns,
    lost_rows, lost_columns, num_edges, addend_image8, addend_pixel8,
    num_m, num_n, rows_first, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MORE_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """out[image, step·a + phase, step·b + phase, :] = Σ over taps and channels of x·weight, + bias + addend.

    A program makes BLOCK_M positions (a, b) of one phase and BLOCK_N + MORE_N channels.  A convolution has one phase
    and step 1; an upsampling has four, the parities of row and column, and step 2.  With shift 1 a tap looks at the
    doubled picture of `rows` × `columns` pixels.  The first `num_edges` phases are not phases but what the folded
    form cannot make: the last row and the last column, by the weight `plain` in the plain form.
    With PARTIAL one of num_splits parts of the sum goes to out[split] in f32, without bias and addend.
    Sizes with an 8 are in units of eight elements: so the compiler knows that eight share one mask and one address.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    region = tl.program_id(2)
    # Whichever of x and the weight is the larger is read by neighbouring programs at one time.
    pid_m = tl.where(rows_first != 0, pid % num_m, pid // num_n)
    pid_n = tl.where(rows_first != 0, pid // num_m, pid % num_n)

    # Edges go first, because they take the most steps.
    edge = region < num_edges
    last_row = edge & (region < 2)
    last_column = edge & (region >= 2)
    phase = region - num_edges
    row_phase = tl.where(edge, tl.where(last_row, 0, region & 1), phase >> 1)
    column_phase = tl.where(edge, tl.where(last_row, region & 1, 0), phase & 1)
    num_a = tl.where(last_row, lost_rows, (rows - lost_rows - row_phase + step - 1) // step)
    # The corner belongs to the last row.
    cut = tl.where(last_row, 0, lost_columns)
    num_b = tl.where(last_column, lost_columns, (columns - cut - column_phase + step - 1) // step)
    total = batch * num_a * num_b
    if pid_m * BLOCK_M >= total:
        return

    # Selects, not a branch: a pointer that comes out of a branch is no longer known to be aligned.
    weight = tl.where(edge, plain, weight + (3 - phase) * weight_phase8 * 8)
    weight_k = tl.where(edge, plain_k8, weight_k8).to(tl.int64) * 8
    weight_tap = tl.where(edge, plain_tap8, weight_tap8) * 8
    kernel_rows = tl.where(edge, 3, kernel_rows)
    kernel_columns = tl.where(edge, 3, kernel_columns)
    shift = tl.where(edge, 1, shift)

    first_a = tl.where(last_row, height - 1, 0)
    first_b = tl.where(last_column, width - 1, 0)
    image, a, b, inside = _positions(pid_m * BLOCK_M, total, num_a, num_b, first_a, first_b, BLOCK_M)
    first_row = row_phase - pad_rows
    first_column = column_phase - pad_columns
    row_taps = _taps_inside(a * (stride_rows << shift) + first_row, tl.where(shift != 0, rows, height), kernel_rows)
    column_taps = _taps_inside(
        b * (stride_columns << shift) + first_column, tl.where(shift != 0, columns, width), kernel_columns
    )
    # Both masks in one register: rows of taps in the low half, columns of taps in the high half.
    taps = tl.where(inside, row_taps | (column_taps << 16), 0)

    num_c = num_c8 * 8
    num_k = num_k8 * 8
    x_pixel = x_pixel8 * 8
    x_rows = x + image * x_image8 * 8 + (a * stride_rows * width + b * stride_columns) * x_pixel
    k = tl.arange(0, BLOCK_K)
    n = pid_n * (BLOCK_N + MORE_N) + tl.arange(0, BLOCK_N)
    n_inside = n < num_k
    w_rows = weight + n * weight_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if MORE_N:
        more_n = pid_n * (BLOCK_N + MORE_N) + BLOCK_N + tl.arange(0, MORE_N)
        more_inside = more_n < num_k
        more_rows = weight + more_n * weight_k
        more_acc = tl.zeros([BLOCK_M, MORE_N], tl.float32)

    num_blocks = tl.cdiv(num_c, BLOCK_K)
    num_steps = kernel_rows * kernel_columns * num_blocks
    each = tl.cdiv(num_steps, num_splits)
    begin = split * each
    tap = begin // num_blocks
    c = (begin % num_blocks) * BLOCK_K
    r = tap // kernel_columns
    s = tap % kernel_columns
    # A program without positions is gone: it touches nothing, and others wait for it.
    wait()
    for _ in range(begin, tl.minimum(begin + each, num_steps)):
        k_inside = c + k < num_c
        tap_inside = ((taps >> r) & (taps >> (s + 16)) & 1) != 0
        # Along the taps the offset is the same for all pixels: one addition for each address.
        x_near = (((r + first_row) >> shift) * width + ((s + first_column) >> shift)) * x_pixel + c + k
        x_tile = tl.load(x_rows[:, None] + x_near[None, :], mask=tap_inside[:, None] & k_inside[None, :], other=0.0)
        w_near = tap * weight_tap + c + k
        w_tile = tl.load(w_rows[:, None] + w_near[None, :], mask=n_inside[:, None] & k_inside[None, :], other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
        if MORE_N:
            more_mask = more_inside[:, None] & k_inside[None, :]
            more_tile = tl.load(more_rows[:, None] + w_near[None, :], mask=more_mask, other=0.0)
            more_acc = tl.dot(x_tile, tl.trans(more_tile), more_acc, input_precision="ieee")
        # Counting on is cheaper than dividing.
        c += BLOCK_K
        next_tap = (c >= num_c).to(tl.int32)
        c = tl.where(next_tap != 0, 0, c)
        tap += next_tap
        s += next_tap
        next_row = (s >= kernel_columns).to(tl.int32)
        s = tl.where(next_row != 0, 0, s)
        r += next_row

    # Found again, by a term that is 0 and that the compiler cannot know: else they occupy registers during the loop.
    again = tl.where(num_splits < 0, 8, 0)
    image, a, b, inside = _positions(again + pid_m * BLOCK_M, total, num_a, num_b, first_a, first_b, BLOCK_M)
    n = again + pid_n * (BLOCK_N + MORE_N) + tl.arange(0, BLOCK_N)
    pixel = (a * step + row_phase) * columns + b * step + column_phase
    area = rows * columns
    _store(
        acc, n, image, pixel, inside, bias, addend, out, has_bias, has_addend, num_k, addend_image8 * 8,
        addend_pixel8 * 8, batch, area, split, PARTIAL,
    )  # fmt: skip
    if MORE_N:
        _store(
            more_acc, more_n, image, pixel, inside, bias, addend, out, has_bias, has_addend, num_k, addend_image8 * 8,
            addend_pixel8 * 8, batch, area, split, PARTIAL,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- parameters
@dataclass(frozen=True)
class Tile:
    """How the implicit product is cut.

    m, n    pixels and output channels of one program
    more    further channels in a second accumulator (32: 160 channels, half of 320), or 0
    k       input channels of one step
    splits  parts of the sum, each in its own programs
    registers  the most that a thread may use, so that two programs fit a multiprocessor and one multiplies while
               the other begins or stores; None: no limit
    """

    m: int
    n: int
    more: int
    k: int
    warps: int
    stages: int
    splits: int = 1
    registers: int | None = None

    @property
    def name(self) -> str:
        columns = f"{self.n}+{self.more}" if self.more else str(self.n)
        limit = f" registers={self.registers}" if self.registers else ""
        return f"tile {self.m}x{columns}x{self.k} warps={self.warps} stages={self.stages} splits={self.splits}{limit}"

    def shared_bytes(self, itemsize: int, arch: int) -> int:
        """Shared memory of one program: before Hopper one stage is in registers."""
        buffers = self.stages if arch >= 90 and itemsize == 2 else self.stages - 1
        return buffers * (self.m + self.n + self.more) * self.k * itemsize


@dataclass(frozen=True)
class Library:
    """cuDNN, followed by one kernel in place for what cuDNN cannot add."""

    name: str = "cudnn"


Parameters = Tile | Flat | Patch | Library

HALF_TILES = (
    Tile(128, 256, 64, 64, 8, 3),
    Tile(128, 256, 0, 64, 8, 3),
    Tile(256, 128, 0, 64, 8, 3),
    Tile(128, 128, 32, 64, 8, 5),
    Tile(128, 128, 0, 64, 8, 4),
    Tile(128, 128, 0, 64, 8, 3, registers=128),
    Tile(64, 128, 32, 64, 4, 4),
    Tile(64, 64, 0, 64, 4, 5),
)
"""Widths of 320 and 160 are for networks of 320·n channels.  Each was the best of all tiles for some convolution on an
H100, or is for GPUs of less shared memory."""

WHOLE_TILES = (HALF_TILES[0], HALF_TILES[1], HALF_TILES[2], HALF_TILES[5])
"""Tiles that make whole sums only: where parts pay, smaller tiles are better."""

FLOAT_TILES = (Tile(64, 64, 0, 32, 4, 3), Tile(32, 64, 0, 32, 4, 3))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def tiles(itemsize: int) -> tuple[Tile, ...]:
    """The tiles for numbers of that size; f32 has no tensor cores that keep its precision, so small ones do."""
    return FLOAT_TILES if itemsize == 4 else HALF_TILES


@functools.cache
def _variant(dtype: torch.dtype, tile: Tile, partial: bool) -> Variant:
    return Variant(
        conv_kernel,
        (*(dtype,) * 5, torch.float32 if partial else dtype, *(1,) * 33),
        {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "MORE_N": tile.more, "BLOCK_K": tile.k, "PARTIAL": partial},
        tile.warps,
        tile.stages,
        tile.registers,
    )


def tile_variants(dtype: torch.dtype) -> Iterator[Variant]:
    """The forms of `conv_launches`: the tiles for whole and for split sums, and what adds the parts."""
    for tile in tiles(dtype.itemsize):
        yield _variant(dtype, tile, False)
        if tile not in WHOLE_TILES:
            yield _variant(dtype, tile, True)
    yield from finish_variants(dtype)


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that the calls of this file launch with tensors of `dtype`."""
    yield from tile_variants(dtype)
    yield from few_channels_variants(dtype)


# ----------------------------------------------------------------------------------------------------------- launch
@dataclass(frozen=True)
class Geometry:
    """Where taps read and pixels are stored; see `conv_kernel`."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    rows: int
    columns: int
    step: int = 1
    shift: int = 0
    lost: tuple[int, int] = (0, 0)

    @property
    def num_edges(self) -> int:
        return 4 if any(self.lost) else 0

    @property
    def num_phases(self) -> int:
        return self.step**2

    @property
    def positions(self) -> int:
        """Positions of the largest phase, in one image."""
        return ceil_div(self.rows, self.step) * ceil_div(self.columns, self.step)


def weight_strides(weight: torch.Tensor) -> tuple[int, int] | None:
    """Elements from output to output and from tap to tap of a channels-last [K, C, R, S], or None if it is not."""
    found = pixels_of(weight)
    return None if found is None else (found.image, found.pixel)


def conv_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    plain: torch.Tensor | None,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    shape: Sequence[int],
    geometry: Geometry,
    tile: Tile,
) -> Launch:
    """One launch of `conv_kernel`; `out` is the result [B, K, P, Q] of `shape` or, in f32, [splits, B·P·Q, K]."""
    batch, outputs, rows, columns = shape
    where = pixels_of(x)
    strides = weight_strides(weight)
    plain_strides = (0, 0) if plain is None else weight_strides(plain)
    beside = Pixels(0, 0) if addend is None else addend_pixels(addend, batch, outputs, rows, columns)
    assert where is not None
    assert strides is not None
    assert plain_strides is not None
    assert beside is not None
    partial = out.dim() == 3
    folded = geometry.step == 2 and geometry.shift == 0
    weight_k = 4 * strides[0] if folded else strides[0]
    num_m, num_n = ceil_div(batch * geometry.positions, tile.m), ceil_div(outputs, tile.n + tile.more)
    rows_first = weight.numel() > x.numel()
    return Launch(
        _variant(x.dtype, tile, partial),
        (num_m * num_n, out.shape[0] if partial else 1, geometry.num_edges + geometry.num_phases),
        (
            x, weight, weight if plain is None else plain, x if bias is None else bias, x if addend is None else addend,
            out, int(bias is not None and not partial), int(addend is not None and not partial),
            batch, x.shape[2], x.shape[3], x.shape[1] // 8, outputs // 8, where.image // 8, where.pixel // 8,
            *geometry.kernel, weight_k // 8, strides[1] // 8, strides[0] // 8 if folded else 0,
            plain_strides[0] // 8, plain_strides[1] // 8,
            *geometry.stride, *geometry.padding, geometry.shift, geometry.step, rows, columns,
            *geometry.lost, geometry.num_edges, beside.image // 8, beside.pixel // 8,
            num_m, num_n, int(rows_first), out.shape[0] if partial else 1,
        ),
    )  # fmt: skip


def conv_launches(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    plain: torch.Tensor | None,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    geometry: Geometry,
    tile: Tile,
) -> tuple[Launch, ...]:
    """All launches of a convolution: one, or the parts of the sum (of each source) and what adds them."""
    shape = tuple(out.shape)
    if len(sources) == 1 and tile.splits == 1:
        return (conv_launch(sources[0], weight, plain, bias, addend, out, shape, geometry, tile),)
    area, parts = shape[0] * shape[2] * shape[3], tile.splits
    workspace = torch.empty((parts * len(sources), area, shape[1]), dtype=torch.float32, device=out.device)
    launches, channel = [], 0
    for i, source in enumerate(sources):
        taken = weight[:, channel : channel + source.shape[1]]
        place = workspace[i * parts : (i + 1) * parts]
        launches.append(conv_launch(source, taken, plain, None, None, place, shape, geometry, tile))
        channel += source.shape[1]
    return (*launches, finish_launch(workspace, bias, addend, out))


def supports(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    parameters: Parameters,
) -> str | None:
    """Why `parameters` cannot make this convolution; None: they can.  cuDNN can make all."""
    if isinstance(parameters, Library):
        return None
    given = sources, weight, bias, addend, stride, padding, dilation, groups
    if isinstance(parameters, Tile):
        return refuses_parts(parameters, len(sources)) or unfit(*given)
    return _window_reason(sources[0], weight, stride, padding, dilation, groups) or (
        "several sources"
        if len(sources) > 1
        else few_channels_supports(sources[0], weight, bias, addend, stride, padding, parameters)
    )


def unfit(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why no tile can make this convolution; None: those can that cut its sum as they may."""
    if refused := _window_reason(sources[0], weight, stride, padding, dilation, groups):
        return refused
    if max(weight.shape[2:]) > 15:
        return "more than 15 taps along one axis"
    rows, columns = _result_size(sources[0], weight, stride, padding)
    return fits(sources, (weight,), bias, addend, (sources[0].shape[0], weight.shape[0], rows, columns))


def _window_reason(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    if tuple(dilation) != (1, 1) or groups != 1:
        return "dilation or groups"
    return "an empty result" if min(_result_size(x, weight, stride, padding)) < 1 else None


def refuses_parts(tile: Tile, num_sources: int = 1) -> str | None:
    """Why `tile` cannot cut the sum of that many sources as it says; None: it can."""
    if tile.splits == 1 and num_sources == 1:
        return None
    return "a tile for whole sums of one source" if _cut(tile, 1) in WHOLE_TILES else None


@functools.cache
def _cut(tile: Tile, splits: int) -> Tile:
    return replace(tile, splits=splits)


def fits(
    sources: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    shape: Sequence[int],
) -> str | None:
    """Why `conv_kernel` cannot read these tensors; None: it can."""
    given = [*sources, *weights, *(t for t in (bias, addend) if t is not None)]
    if len({t.dtype for t in given}) > 1 or given[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "dtypes that differ or are not f16, bf16 or f32"
    if shape[1] % 8 or any(s.shape[1] % 8 for s in sources):
        return "channels that are no multiple of 8"
    if addend is not None and addend_pixels(addend, *shape) is None:
        return "an addend that is neither a channels-last residual nor an embedding"
    strided = [*map(pixels_of, [*sources, *weights])] + ([] if addend is None else [addend_pixels(addend, *shape)])
    if any(s is None or not s.vector for s in strided):
        return "a layout that is not channels-last with strides that are multiples of 8"
    if not aligned(*given) or (bias is not None and bias.stride(0) != 1):
        return "a tensor that does not start at a multiple of 16 bytes, or a strided bias"
    inside = max(_extent(t) for t in (*sources, *(t for t in (addend,) if t is not None)))
    apart = max(s.image // 8 for s in strided if s)
    return "an image of 2³¹ elements or more" if max(inside, apart, shape[0] * shape[2] * shape[3]) > INT32 else None


def _extent(x: torch.Tensor) -> int:
    """Elements from the first to the last pixel of an image, with a border."""
    where = pixels_of(x)
    return (x.shape[2] + 2) * (x.shape[3] + 2) * where.pixel if where else 0


def _result_size(
    x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    rows, columns = ((x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in range(2))
    return rows, columns


def launches_of(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    out: torch.Tensor,
    parameters: Tile | Flat | Patch,
) -> tuple[Launch, ...]:
    """What a call with these parameters launches, in order."""
    if not isinstance(parameters, Tile):
        return (few_channels_launch(sources[0], weight, bias, addend, stride, padding, out, parameters),)
    geometry = Geometry(
        (weight.shape[2], weight.shape[3]), (stride[0], stride[1]), (padding[0], padding[1]), out.shape[2], out.shape[3]
    )
    return conv_launches(sources, weight, None, bias, addend, out, geometry, parameters)


# ------------------------------------------------------------------------------------------------------------- call
def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """F.conv2d(x, weight, bias), channels-last.

    x        [B, C, H, W] f16 | bf16 | f32, channels-last; slices of channels are read where they are
    weight   [K, C, R, S] in channels-last storage, bias [K] or None, dtype of x
    out      [B, K, P, Q] channels-last and dense, or None
    returns  out; accumulated in f32, rounded once
    cost     2·B·K·P·Q·C·R·S FLOPs
    raises   InputError where `supports` says so
    """
    return _convolve((x,), weight, bias, None, stride, padding, dilation, groups, parameters, out)


def conv2d_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv2d(x) + bias + addend, in one kernel; see `conv2d` and `ops.convolution.conv2d_add`.

    addend   [B or 1, K, P, Q] channels-last or [B or 1, K, 1, 1], dtype of x; may be `out` itself
    """
    return _convolve((x,), weight, bias, addend, stride, padding, dilation, groups, parameters, out)


def conv2d_cat(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv2d(cat(sources, 1)): each source is a part of the sum, in f32; see `ops.convolution.conv2d_cat`."""
    return _convolve(tuple(sources), weight, bias, None, stride, padding, dilation, 1, parameters, out)


def _convolve(
    sources: tuple[torch.Tensor, ...],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    parameters: Parameters,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if isinstance(parameters, Library):
        x = sources[0] if len(sources) == 1 else torch.cat(sources, 1)
        made = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
        return give(add_in_place(made, addend), out)
    reason = supports(sources, weight, bias, addend, stride, padding, dilation, groups, parameters)
    if reason:
        raise InputError(f"conv2d with {parameters.name}: {reason}")
    shape = (sources[0].shape[0], weight.shape[0], *_result_size(sources[0], weight, stride, padding))
    out = result(out, shape, sources[0])
    for launch in launches_of(sources, weight, bias, addend, stride, padding, out, parameters):
        launch.run()
    return out


def add_in_place(made: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    """made + addend where made was, by one kernel if it can read both."""
    if addend is None:
        return made
    beside = addend_pixels(addend, *made.shape)
    dense = made.is_contiguous(memory_format=torch.channels_last) and made.shape[1] % 8 == 0
    large = made.shape[0] * made.shape[2] * made.shape[3] > INT32
    if not (beside and beside.vector and dense and aligned(made, addend)) or addend.dtype != made.dtype or large:
        return made + addend
    finish_launch(made, None, addend, made).run()
    return made


def result(out: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """`out` if it can be written as it is, else a new channels-last tensor."""
    if out is None:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    if tuple(out.shape) != tuple(shape) or out.dtype != like.dtype:
        raise InputError(f"out is {tuple(out.shape)} {out.dtype}, the result is {tuple(shape)} {like.dtype}")
    if not out.is_contiguous(memory_format=torch.channels_last) or not aligned(out):
        raise InputError("out must be channels-last, dense and start at a multiple of 16 bytes")
    return out


def give(made: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """A library's result, in `out` if there is one, in any case channels-last and dense."""
    return made.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(made)


# --------------------------------------------------------------------------------------------------------- estimate
@dataclass(frozen=True)
class Shape:
    """The sizes of a convolution.  channels are those of all sources together."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    num_sources: int = 1

    @property
    def rows(self) -> int:
        return (self.height + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1

    @property
    def columns(self) -> int:
        return (self.width + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1

    @property
    def flops(self) -> int:
        taps = self.kernel[0] * self.kernel[1]
        return 2 * self.batch * self.rows * self.columns * self.outputs * self.channels * taps


@dataclass(frozen=True)
class Work:
    """The same in the words of the implicit product: `phases` products of positions × outputs × (taps · channels)."""

    positions: int
    outputs: int
    channels: int
    taps: int
    phases: int
    input_elements: int
    weight_elements: int

    def tiles(self, tile: Tile) -> int:
        return ceil_div(self.positions, tile.m) * ceil_div(self.outputs, tile.n + tile.more) * self.phases

    def steps(self, tile: Tile) -> int:
        return self.taps * ceil_div(self.channels, tile.k)


@functools.cache
def work_of(shape: Shape) -> Work:
    """The product that makes a convolution."""
    return Work(
        shape.batch * shape.rows * shape.columns,
        shape.outputs,
        shape.channels,
        shape.kernel[0] * shape.kernel[1],
        1,
        shape.batch * shape.channels * shape.height * shape.width,
        shape.outputs * shape.channels * shape.kernel[0] * shape.kernel[1],
    )


def resident(tile: Tile, itemsize: int, device: Device) -> int:
    """Programs that run on one multiprocessor at a time: shared memory and registers decide."""
    by_shared = (device.shared_bytes + 1024) // (tile.shared_bytes(itemsize, device.arch) + 1024)
    needed = tile.m * (tile.n + tile.more) + 32 * tile.warps * 90
    registers = 32 * tile.warps * tile.registers if tile.registers else needed
    return max(1, min(by_shared, 65536 // registers, 64 // tile.warps))


def holds(tile: Tile, itemsize: int, device: Device) -> bool:
    """Whether a program fits: its buffers, and its sums beside the operands, which before Hopper are in registers."""
    sums = tile.m * (tile.n + tile.more) // (32 * tile.warps)
    return tile.shared_bytes(itemsize, device.arch) <= device.shared_bytes and (sums <= 128 or device.arch >= 90)


SHARED, ISSUE_US, BUSY, CACHE = 1.33, 0.004, 0.32, 2.05
"""What holds a step up beside its products: the rate of shared memory over 128 bytes a clock, as tensor cores read
operands from there; a load that a thread issues, while a program alone multiplies nothing; how much longer all of that
takes while all multiprocessors work; the rate of the cache over what others reach."""

CROWD = 1.15
"""How much longer steps take with sixteen warps on a multiprocessor: their operands compete for shared memory."""

BEGIN_US, END_BYTES = 1.85, 22.5e3
"""What a program takes before its first and after its last step: a latency, and what it stores, bytes a µs."""


def step_times(tile: Tile, itemsize: int, device: Device) -> tuple[float, float]:
    """A step of one program, µs: what multiprocessors do for it, and what only the program itself waits for.

    Of a step's k channels tensor cores read x once for each accumulator and the weight once for 64 rows.
    """
    columns = tile.n + tile.more
    tflops = 1.1 * device.half_tflops if itemsize == 2 else 0.7 * device.float_tflops
    products_us = 2 * tile.m * columns * tile.k / (tflops * 1e6 / device.num_sms)
    loaded = (tile.m + columns) * tile.k * itemsize
    read = (ceil_div(tile.m, 64) * columns + tile.m * (2 if tile.more else 1)) * tile.k * itemsize
    # On Hopper a clock is 4096 operations or 128 bytes, before it 2048 or 128.
    bytes_us = device.half_tflops * 1e6 / device.num_sms / (32 if device.arch >= 90 else 16)
    shared_us = (loaded + read) / (SHARED * bytes_us)
    loads_us = loaded / (CACHE * device.l2_tbs * 1e6 / device.num_sms)
    return max(products_us, shared_us, loads_us), ISSUE_US * loaded / (16 * 32 * tile.warps)


def tile_us(work: Work, itemsize: int, tile: Tile, device: Device, addend: bool = False, parts: int = 1) -> float:
    """Time of `conv_kernel` and of what adds the parts, µs; parts: of the sum, beside the tile's own splits.

    A step of a program takes the longest of its products and its loads.  Programs of one multiprocessor share both.
    """
    num_out = work.positions * work.outputs * work.phases
    parts *= tile.splits
    columns = tile.n + tile.more
    num_tiles = work.tiles(tile) * tile.splits
    busiest = ceil_div(num_tiles, device.num_sms)
    # Products with zeros beyond the border of the result cost time, but neither power nor loads.
    used = work.positions * work.outputs * work.phases / (work.tiles(tile) * tile.m * columns)
    busy = 1 + BUSY * used * num_tiles / (busiest * device.num_sms)
    step_us, issue_us = step_times(tile, itemsize, device)
    written = (4 if parts > 1 else itemsize) + (itemsize * addend if parts == 1 else 0)
    ends_us = BEGIN_US + tile.m * columns * written / END_BYTES
    steps = ceil_div(work.steps(tile), tile.splits)

    def round_us(together: int) -> float:
        crowd = CROWD if together * tile.warps > 8 else 1.0
        return steps * busy * crowd * max(together * step_us, step_us + issue_us) + ends_us

    full, rest = divmod(busiest, resident(tile, itemsize, device))
    busy_us = full * round_us(resident(tile, itemsize, device)) + (round_us(rest) if rest else 0.0)
    # What the previous kernel left in the cache is not read from memory again.
    moved = work.input_elements * itemsize + num_out * written * tile.splits
    memory_us = memory_time(work.weight_elements * itemsize, moved, device)
    # Memory is waited for at the beginning and the end of programs, so that it hides behind products only partly.
    time = LAUNCH_US + math.hypot(busy_us, memory_us)
    return time + (finish_us(parts, num_out, 4, itemsize, addend, device) if parts > 1 else 0.0)


def memory_time(cold_bytes: float, warm_bytes: float, device: Device) -> float:
    """Time to move what lies in no cache, and of what may lie there the part that half of the cache cannot hold, µs."""
    return (cold_bytes + max(0.0, warm_bytes - device.l2_bytes / 2)) / (device.memory_tbs * 1e6)


LIBRARY_COLUMNS = (128, 160, 256)
LIBRARY_SPLITS = (1, 2, 3, 4, 6, 8, 16)


def library_us(work: Work, itemsize: int, device: Device, strided: bool = False) -> float:
    """Time of a convolution of cuDNN, µs, without its launch.

    It behaves like tiles of 128 rows with the best of some widths and splits: of large rate, and with much to do before
    and after the steps.  Fitted on an H100 to 60 convolutions, ±7 %.
    """
    rate = 0.97 * (device.half_tflops if itemsize == 2 else device.float_tflops) / (1.2 if strided else 1.0)
    num_out = work.positions * work.outputs * work.phases
    moved = (work.input_elements + num_out) * itemsize
    depth = work.taps * work.channels

    def cut_us(columns: int, splits: int) -> float:
        tiles = ceil_div(work.positions, 128) * ceil_div(work.outputs, columns) * work.phases * splits
        steps_us = 2 * 128 * columns * depth / splits / (rate * 1e6 / device.num_sms)
        adding_us = finish_us(splits, num_out, 4, itemsize, False, device) if splits > 1 else 0.0
        return ceil_div(tiles, device.num_sms) * (steps_us + 7.5 + 0.022 * columns) + adding_us

    cuts = [(n, s) for n in LIBRARY_COLUMNS for s in LIBRARY_SPLITS if s == 1 or depth >= 512 * s]
    return max(min(cut_us(n, s) for n, s in cuts), 15.0 + memory_time(work.weight_elements * itemsize, moved, device))


def candidate_tiles(work: Work, itemsize: int, device: Device, num_sources: int = 1) -> list[Tile]:
    """Tiles that fit the device, each with the splits that fill it and no more."""
    found = []
    for tile in tiles(itemsize):
        if not holds(tile, itemsize, device):
            continue
        wanted = max(2, resident(tile, itemsize, device)) * device.num_sms
        for splits in SPLITS:
            deep = work.steps(tile) // num_sources >= 4 * splits
            fills = deep and work.tiles(tile) * splits * num_sources <= wanted
            if (splits == 1 or fills) and not refuses_parts(cut := _cut(tile, splits), num_sources):
                found.append(cut)
    return found


def candidates(shape: Shape, itemsize: int, device: Device) -> list[Parameters]:
    """What is worth comparing for these sizes; `supports` has the last word on the tensors."""
    found: list[Parameters] = [Library()]
    if shape.num_sources == 1:
        found += few_channels_candidates(shape.channels, shape.outputs, shape.kernel, shape.stride, shape.padding)
    if shape.channels % 8 == 0 and shape.outputs % 8 == 0:
        found += candidate_tiles(work_of(shape), itemsize, device, shape.num_sources)
    return found


def estimate_us(shape: Shape, itemsize: int, parameters: Parameters, device: Device, addend: bool = False) -> float:
    """Time on `device`, µs, launches included; `addend`: with a residual or an embedding."""
    work = work_of(shape)
    num_out = work.positions * work.outputs
    if isinstance(parameters, Flat | Patch):
        sizes = (shape.batch, shape.channels, shape.height, shape.width, shape.outputs, shape.rows, shape.columns)
        return few_channels_us(sizes, shape.kernel, itemsize, parameters, device)
    if isinstance(parameters, Library):
        time = LAUNCH_US + library_us(work, itemsize, device, max(shape.stride) > 1)
        time += finish_us(1, num_out, itemsize, itemsize, True, device) if addend else 0.0
        cat_us = finish_us(1, work.input_elements, itemsize, itemsize, False, device)
        return time + (cat_us if shape.num_sources > 1 else 0.0)
    if shape.num_sources == 1:
        return tile_us(work, itemsize, parameters, device, addend)
    # Sources are parts of the sum that run one after the other.
    part = work_of(replace(shape, channels=ceil_div(shape.channels, shape.num_sources)))
    once = tile_us(part, itemsize, parameters, device, addend, shape.num_sources)
    adding = finish_us(parameters.splits * shape.num_sources, num_out, 4, itemsize, addend, device)
    return shape.num_sources * (once - adding) + adding
