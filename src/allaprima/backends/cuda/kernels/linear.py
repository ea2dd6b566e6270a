# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Matrix products: linear, with a residual, gated, and 1×1 convolutions over one or two tensors.

One kernel makes them all, since they differ only in where rows are read and in the epilogue.  Where the result has too
few tiles to fill the GPU, K is split: each part writes f32 partial sums, and a second kernel adds them in a fixed order
and applies the epilogue, so that results never depend on timing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ....errors import InputError
from ..device import Device
from .dependent import wait
from .variant import Launch, Variant

GELU = {None: 0, "none": 1, "tanh": 2}
"""What the constant GEGLU means: no gate, gelu by erf, gelu by tanh."""

NO_ADDEND, ROWS, STRIDED = 0, 1, 2
"""What the constant ADDEND means: none, unit column stride, any strides."""

MAX_SPLITS = 8
_INT32 = 2**31 - 1


# ----------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _gelu(x, GEGLU: tl.constexpr, EXACT: tl.constexpr):
    if GEGLU == 2:
        # (1 + tanh(u)) / 2 = 1 - 1 / (1 + exp(2u)), which is 1 long before the exponential would overflow.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (1.0 + tl.exp(tl.minimum(2.0 * u, 80.0))))
    if EXACT:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    # x·Φ(x) by the tail, whose logarithm is nearly a parabola: log2 Φ(-t) as a polynomial, least relative error of Φ
    # (3e-6) up to t = 5.5.  Half of erf's instructions, in an epilogue that little else hides, and closer to the truth
    # left of -3, where 1 + erf cancels.
    t = tl.abs(x)
    log2_tail = -1.79345646e-06 * t + 6.09042008e-05
    log2_tail = log2_tail * t - 0.000926029257
    log2_tail = log2_tail * t + 0.00849375825
    log2_tail = log2_tail * t - 0.053937848
    log2_tail = log2_tail * t - 0.458480506
    log2_tail = log2_tail * t - 1.15124684
    log2_tail = log2_tail * t - 0.999995465
    return tl.maximum(x, 0.0) - t * tl.exp2(log2_tail)


@triton.jit
def _addend_pointers(addend, rows, columns, inner, outer_stride, inner_stride, column_stride, ALIGN: tl.constexpr,
                     ADDEND: tl.constexpr):  # fmt: skip
    """Pointers to addend[rows, columns], where row r is r // inner outer and r % inner inner strides from the start."""
    offset = (rows // inner).to(tl.int64) * outer_stride * ALIGN + (rows % inner).to(tl.int64) * inner_stride * ALIGN
    if ADDEND == 1:
        return addend + offset[:, None] + columns[None, :]
    return addend + offset[:, None] + columns[None, :].to(tl.int64) * column_stride


@triton.jit(
    do_not_specialize=[
        "num_m", "num_n", "num_k1", "num_k2", "stride_1", "stride_2", "stride_w", "stride_out",
        "inner", "outer_stride", "inner_stride", "column_stride", "has_bias", "splits",
    ]
)  # fmt: skip
def product(
    x1, x2, weight, bias, addend, out,
    num_m, num_n, num_k1, num_k2, stride_1, stride_2, stride_w, stride_out,
    inner, outer_stride, inner_stride, column_stride, has_bias, splits,
    ALIGN: tl.constexpr, EVEN_K: tl.constexpr, SOURCES: tl.constexpr, ADDEND: tl.constexpr, GEGLU: tl.constexpr,
    PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N] = [x1 | x2]·weightᵀ + bias + addend, or h·gelu(g) of it, or one part of K of it in f32 (PARTIAL).

    num_n, num_k1, num_k2 and all strides but column_stride are counted in units of ALIGN elements: multiplying them
    here is what proves to the compiler that eight elements share one mask and one 16-byte address.
    """
    WIDTH: tl.constexpr = BLOCK_N // 2 if GEGLU else BLOCK_N  # columns of the result in one tile
    GROUP: tl.constexpr = 8
    n = num_n * ALIGN
    k1 = num_k1 * ALIGN
    k2 = num_k2 * ALIGN

    # Neighbouring programs share rows of x and of the weight: eight tiles of M go through N together.
    pid = tl.program_id(0)
    split = tl.program_id(1)
    grid_m = tl.cdiv(num_m, BLOCK_M)
    grid_n = tl.cdiv(n, WIDTH)
    group = pid // (GROUP * grid_n)
    first_m = group * GROUP
    size = tl.minimum(grid_m - first_m, GROUP)
    within = pid - group * GROUP * grid_n
    tile_m = first_m + within % size
    tile_n = within // size

    # Rows and columns beyond the end read the first ones and are not stored: no mask inside the loop.  Were it the last
    # one again and again, all programs at the edge would ask one line of the cache for it, which takes longer than all
    # the rest.
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.where(rows < num_m, rows, tl.minimum(rows - num_m, num_m - 1)).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    if GEGLU:
        # Accumulator columns are h0 g0 h1 g1 …: both halves of a result are in one thread, and one product makes both.
        column = tile_n * WIDTH + lane // 2
        feature = tl.where(column < n, column, tl.minimum(column - n, n - 1)) + (lane % 2) * n
    else:
        column = tile_n * WIDTH + lane
        feature = tl.where(column < n, column, tl.minimum(column - n, n - 1))
    offs_k = tl.arange(0, BLOCK_K)
    row_1 = row * stride_1 * ALIGN
    row_2 = row * stride_2 * ALIGN
    w_pointers = weight + (feature.to(tl.int64) * stride_w * ALIGN)[:, None] + offs_k[None, :]

    steps_1 = tl.cdiv(k1, BLOCK_K)
    first = 0
    last = steps_1
    if SOURCES == 2:
        last += tl.cdiv(k2, BLOCK_K)
    if PARTIAL:
        steps = last
        first = (split * steps) // splits
        last = ((split + 1) * steps) // splits

    wait()
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        if SOURCES == 2:
            second = step >= steps_1
            k = (step - tl.where(second, steps_1, 0)) * BLOCK_K
            limit = tl.where(second, k2, k1)
            x_base = tl.where(second, x2, x1)
            x_rows = tl.where(second, row_2, row_1)
            w_k = k + tl.where(second, k1, 0)
        else:
            k = step * BLOCK_K
            limit = k1
            x_base = x1
            x_rows = row_1
            w_k = k
        x_pointers = (x_base + k) + (x_rows[:, None] + offs_k[None, :])
        if EVEN_K:
            x_tile = tl.load(x_pointers)
            w_tile = tl.load(w_pointers + w_k)
        else:
            mask = (offs_k < limit - k)[None, :]
            x_tile = tl.load(x_pointers, mask=mask, other=0.0)
            w_tile = tl.load(w_pointers + w_k, mask=mask, other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")

    columns = tile_n * WIDTH + tl.arange(0, WIDTH)
    mask = (rows < num_m)[:, None] & (columns < n)[None, :]
    rows_out = rows.to(tl.int64)
    if PARTIAL:
        rows_out += split.to(tl.int64) * num_m
    else:
        acc += tl.load(bias + feature, mask=(feature >= 0) & (has_bias != 0), other=0.0).to(tl.float32)[None, :]
        if GEGLU:
            h, g = tl.split(tl.reshape(acc, (BLOCK_M, WIDTH, 2)))
            acc = h * _gelu(g, GEGLU, out.dtype.element_ty == tl.float32)
        if ADDEND:
            pointers = _addend_pointers(
                addend, rows, columns, inner, outer_stride, inner_stride, column_stride, ALIGN, ADDEND
            )
            acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    out_pointers = out + (rows_out * stride_out * ALIGN)[:, None] + columns[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_m", "num_n", "stride_out", "inner", "outer_stride", "inner_stride", "column_stride", "has_bias", "splits",
    ]
)  # fmt: skip
def combine(
    parts, bias, addend, out, num_m, num_n, stride_out,
    inner, outer_stride, inner_stride, column_stride, has_bias, splits,
    ALIGN: tl.constexpr, ADDEND: tl.constexpr, GEGLU: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[M, N] = Σ parts[splits, M, N or 2·N] + bias + addend, or h·gelu(g) of it; at most SPLITS parts."""
    n = num_n * ALIGN
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < num_m)[:, None] & (columns < n)[None, :]
    width = 2 * n if GEGLU else n
    pointers = parts + (rows.to(tl.int64) * width)[:, None] + columns[None, :]
    stride = num_m.to(tl.int64) * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    wait()
    # Unrolled, so that the loads of all parts are in flight together.
    for split in tl.static_range(SPLITS):
        live = mask & (split < splits)
        acc += tl.load(pointers + split * stride, mask=live, other=0.0).to(tl.float32)
        if GEGLU:
            gate += tl.load(pointers + split * stride + n, mask=live, other=0.0).to(tl.float32)
    live_bias = (columns < n) & (has_bias != 0)
    acc += tl.load(bias + columns, mask=live_bias, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        gate += tl.load(bias + n + columns, mask=live_bias, other=0.0).to(tl.float32)[None, :]
        acc *= _gelu(gate, GEGLU, out.dtype.element_ty == tl.float32)
    if ADDEND:
        add_pointers = _addend_pointers(
            addend, rows, columns, inner, outer_stride, inner_stride, column_stride, ALIGN, ADDEND
        )
        acc += tl.load(add_pointers, mask=mask, other=0.0).to(tl.float32)
    out_pointers = out + (rows.to(tl.int64) * stride_out * ALIGN)[:, None] + columns[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------- launch parameters
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """One program makes m×n accumulators (m×n/2 gated results) in steps of k; K is cut into `splits` parts."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    @property
    def name(self) -> str:
        parts = f"/{self.splits}" if self.splits > 1 else ""
        return f"{self.m}x{self.n}x{self.k}{parts} warps={self.num_warps} stages={self.num_stages}"

    def shared_bytes(self, itemsize: int, arch: int) -> int:
        """Shared memory of the pipeline; Hopper's products read it themselves, so that one more stage is held."""
        held = self.num_stages if arch >= 90 else max(1, self.num_stages - 1)
        return (self.m + self.n) * self.k * itemsize * held

    def resident(self, itemsize: int, device: Device) -> int:
        """Programs that share one SM: by shared memory, and by registers (the accumulators and some 72 more)."""
        registers = self.m * self.n // (32 * self.num_warps) + 72
        by_registers = 65536 // (32 * self.num_warps * min(255, registers))
        return max(1, min(device.shared_bytes // self.shared_bytes(itemsize, device.arch), by_registers))


@functools.cache
def _cut(tile: Tile, splits: int) -> Tile:
    return replace(tile, splits=splits)


HALF_TILES = (
    Tile(128, 128, 64, 4, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 128, 64, 4, 5),
    Tile(64, 64, 64, 4, 6),
)
"""Tiles for f16 and bf16.  320 columns are 2.5 tiles of 128, 640 five.  Two or three programs of those with few
stages share an SM and hide each other's start and end, which is half of the time where K is 320; those with more are
for results of less than one tile an SM, where nothing else hides the memory's latency.  All fit the 99 KB of sm_86
and sm_89, which hold one stage less."""

GATED_TILES = (Tile(128, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 6))
"""Tiles that are also compiled with a gate, for which large ones are best: its columns are 2·N."""

SPLIT_TILES = (Tile(64, 128, 64, 4, 5), Tile(64, 64, 64, 4, 6))
"""Tiles that are also compiled for a part of K: where large ones are too few, small ones are better than parts."""

HALF_RAGGED = (Tile(64, 64, 64, 4, 6),)
"""Tiles that are also compiled for a K that is not a multiple of their k, and for gelu by tanh."""

FLOAT_TILES = (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3))
"""Tiles for f32, which runs on the ordinary units: without TF32 the tensor cores cannot make these numbers."""

GENERAL = Tile(64, 64, 32, 4, 1)
"""The one tile for sizes and strides that are not multiples of 8 elements, and for any addend: right, not fast."""

COMBINE_M, COMBINE_N, COMBINE_WARPS = 4, 256, 4


def tiles_of(dtype: torch.dtype) -> tuple[Tile, ...]:
    return FLOAT_TILES if dtype == torch.float32 else HALF_TILES


@functools.cache
def _product_form(
    dtype: torch.dtype, tile: Tile, align: int, even_k: bool, sources: int, addend: int, geglu: int, partial: bool
) -> Variant:
    result = torch.float32 if partial else dtype
    constants = dict(ALIGN=align, EVEN_K=even_k, SOURCES=sources, ADDEND=addend, GEGLU=geglu, PARTIAL=partial)
    blocks = dict(BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k)
    arguments = (dtype,) * 5 + (result,) + (1,) * 14
    return Variant(product, arguments, constants | blocks, tile.num_warps, tile.num_stages)


@functools.cache
def _combine_form(
    parts: torch.dtype, dtype: torch.dtype, align: int, addend: int, geglu: int, splits: int = MAX_SPLITS
) -> Variant:
    constants = dict(ALIGN=align, ADDEND=addend, GEGLU=geglu, SPLITS=splits, BLOCK_M=COMBINE_M, BLOCK_N=COMBINE_N)
    return Variant(combine, (parts, dtype, dtype, dtype) + (1,) * 9, constants, COMBINE_WARPS, 1)


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that the calls of this file launch with tensors of `dtype`."""
    for tile, even_k in itertools.product(tiles_of(dtype), (True, False)):
        for sources, addend, gelu in ((1, 0, 0), (1, ROWS, 0), (2, 0, 0), (1, 0, 1), (1, 0, 2)):
            if _compiled(dtype, tile, even_k, gelu):
                yield _product_form(dtype, tile, 8, even_k, sources, addend, gelu, False)
        for sources in (1, 2):
            if _compiled(dtype, _cut(tile, 2), even_k, 0):
                yield _product_form(dtype, tile, 8, even_k, sources, NO_ADDEND, 0, True)
    for sources, addend, gelu in ((1, 0, 0), (2, 0, 0), (1, ROWS, 0), (1, STRIDED, 0), (1, 0, 1), (1, 0, 2)):
        yield _product_form(dtype, GENERAL, 1, False, sources, addend, gelu, False)
    for addend, gelu in ((NO_ADDEND, 0), (ROWS, 0), (NO_ADDEND, 1), (NO_ADDEND, 2)):
        yield _combine_form(torch.float32, dtype, 8, addend, gelu)
    for align in (8, 1):
        for gelu in (1, 2):
            yield _combine_form(dtype, dtype, align, NO_ADDEND, gelu, 1)


def _compiled(dtype: torch.dtype, tile: Tile, even_k: bool, gelu: int) -> bool:
    """Whether there is a form of `tile`: those rarely asked for exist for a few tiles only."""
    if dtype == torch.float32:
        return True
    whole = _cut(tile, 1)
    return (
        (tile.splits == 1 or whole in SPLIT_TILES)
        and (gelu == 0 or whole in GATED_TILES)
        and ((even_k and gelu < 2) or whole in HALF_RAGGED)
    )


# ------------------------------------------------------------------------------------------------------ from tensors
class Source(NamedTuple):
    """[M, K] as the kernel reads it: unit stride along K."""

    tensor: torch.Tensor
    k: int
    stride: int


class Addend(NamedTuple):
    """[M, N] as the kernel reads it: row r lies r // inner outer and r % inner inner strides from the start."""

    tensor: torch.Tensor
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One product: `shape` is the result's, with its N last; weight [N or 2·N, ΣK] has rows of unit stride."""

    shape: tuple[int, ...]
    m: int
    n: int
    sources: tuple[Source, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    addend: Addend | None
    gelu: int
    channels_first: bool = False

    @property
    def k(self) -> int:
        return sum(s.k for s in self.sources)

    def aligned(self) -> bool:
        """Whether all sizes and strides are multiples of 8, so that vectors of 16 bytes are read."""
        numbers = [self.n, self.weight.stride(0)]
        for source in self.sources:
            numbers += [source.k, source.stride]
        if self.addend is not None:
            if self.addend.column_stride != 1:
                return False
            numbers += [self.addend.outer_stride, self.addend.inner_stride]
        return all(number % 8 == 0 for number in numbers)

    def even_k(self, k: int) -> bool:
        return all(source.k % k == 0 for source in self.sources)

    def refuses(self, tile: Tile) -> str | None:
        """Why `tile` cannot make this product; None if it can."""
        dtype = self.weight.dtype
        if _cut(tile, 1) == GENERAL:
            return None if tile.splits == 1 else "the general tile does not split K"
        if not self.aligned():
            return "a size or stride is not a multiple of 8"
        if _cut(tile, 1) not in tiles_of(dtype):
            return f"{tile} is not compiled for {dtype}"
        if not 1 <= tile.splits <= MAX_SPLITS:
            return f"K is cut into 1 to {MAX_SPLITS} parts"
        gelu = self.gelu if tile.splits == 1 else 0
        if not _compiled(dtype, tile, self.even_k(tile.k), gelu):
            return f"{tile} is not compiled for K={[s.k for s in self.sources]}, gelu={self.gelu}"
        return None


def fold(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) of axes walked in order as at most two loops; None where it takes three."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if levels and levels[-1][0] * levels[-1][1] == stride:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (levels + [(1, 0), (1, 0)])[:2]
    return inner, outer_stride, inner_stride


def _row_stride(x: torch.Tensor) -> int | None:
    """Elements from one row of x to the next, all axes but the last counting as one; None if not uniform."""
    folded = fold(x.shape[:-1], x.stride()[:-1])
    return None if folded is None or folded[1] else folded[2]


def _unit_columns(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _refuse(tensors: Sequence[torch.Tensor]) -> str | None:
    dtype = tensors[0].dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {dtype}"
    for tensor in tensors:
        if tensor.dtype != dtype:
            return f"dtypes differ: {dtype} and {tensor.dtype}"
        if tensor.data_ptr() % 16:
            return f"a tensor of shape {list(tensor.shape)} does not start at a multiple of 16 bytes"
        if any(stride > _INT32 for stride in tensor.stride()):
            return f"a stride of {max(tensor.stride())} does not fit 32 bits"
    return None


def _problem(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None = None,
    gelu: int = 0,
    channels_first: bool = False,
) -> Problem | str:
    """The product of tensors with their channels last, or the reason why no kernel takes it."""
    given = [t for t in (*xs, weight, bias, addend) if t is not None]
    if (reason := _refuse(given)) is not None:
        return reason
    n = weight.shape[0] // 2 if gelu else weight.shape[0]
    shape = (*xs[0].shape[:-1], n)
    k = sum(x.shape[-1] for x in xs)
    if weight.ndim != 2 or weight.shape[1] != k or (gelu and weight.shape[0] % 2):
        return f"weight {list(weight.shape)} does not fit x {[list(x.shape) for x in xs]}"
    if bias is not None and (bias.shape != (weight.shape[0],) or not _unit_columns(bias)):
        return f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}"
    if k == 0 or not _unit_columns(weight):
        return "the weight's rows are not contiguous"
    sources = []
    for x in xs:
        stride = _row_stride(x)
        if x.shape[:-1] != shape[:-1] or stride is None or not _unit_columns(x):
            return f"x {list(x.shape)} with strides {list(x.stride())} is not a matrix of contiguous rows"
        sources.append(Source(x, x.shape[-1], stride))
    added = None
    if addend is not None:
        view = addend.expand(shape)
        folded = fold(shape[:-1], view.stride()[:-1])
        if folded is None:
            return f"addend {list(addend.shape)} with strides {list(addend.stride())} has three levels of rows"
        added = Addend(addend, *folded, 1 if _unit_columns(view) else view.stride(-1))
    m = prod(shape[:-1])
    if max(m, n * 2) > _INT32:
        return "more than 2**31 rows or columns"
    return Problem(shape, m, n, tuple(sources), weight, bias, added, gelu, channels_first)


# ------------------------------------------------------------------------------------------------------------ launch


def launches_of(problem: Problem, tile: Tile, out: torch.Tensor) -> tuple[Launch, ...]:
    """What makes `out` (its channels last): one launch, or two where K is split."""
    p, dtype = problem, out.dtype
    general = _cut(tile, 1) == GENERAL
    align = 1 if general else 8
    even_k = not general and p.even_k(tile.k)
    stride_out = _row_stride(out)
    assert stride_out is not None
    add, addend = _addend_arguments(p, align)
    split = tile.splits > 1
    gelu = 0 if split else p.gelu
    rows = 2 * p.n if p.gelu and split else p.n
    target = torch.empty((tile.splits, p.m, rows), dtype=torch.float32, device=out.device) if split else out
    variant = _product_form(dtype, tile, align, even_k, len(p.sources), NO_ADDEND if split else addend, gelu, split)
    first, second = p.sources[0], p.sources[-1]
    bias = p.weight if p.bias is None else p.bias
    has_bias = int(p.bias is not None)
    numbers = (
        p.m, rows // align, first.k // align, second.k // align if len(p.sources) == 2 else 0,
        first.stride // align, second.stride // align, p.weight.stride(0) // align,
        (rows if split else stride_out) // align,
    )  # fmt: skip
    width = tile.n // 2 if gelu else tile.n
    grid = (_cdiv(p.m, tile.m) * _cdiv(rows, width), tile.splits)
    tensors = (first.tensor, second.tensor, p.weight, bias, add[0], target)
    made = Launch(variant, grid, (*tensors, *numbers, *add[1:], has_bias, tile.splits))
    if not split:
        return (made,)
    last = _combine_form(torch.float32, dtype, align, addend, p.gelu)
    arguments = (target, bias, add[0], out, p.m, p.n // align, stride_out // align, *add[1:], has_bias, tile.splits)
    return made, Launch(last, (_cdiv(p.m, COMBINE_M), _cdiv(p.n, COMBINE_N)), arguments)


def _addend_arguments(p: Problem, align: int) -> tuple[tuple[Any, ...], int]:
    """(tensor, inner, outer stride, inner stride, column stride) and the constant ADDEND."""
    if p.addend is None:
        return (p.weight, 1, 0, 0, 1), NO_ADDEND
    a = p.addend
    mode = ROWS if a.column_stride == 1 else STRIDED
    return (a.tensor, a.inner, a.outer_stride // align, a.inner_stride // align, a.column_stride), mode


def result_of(problem: Problem, out: torch.Tensor | None) -> torch.Tensor:
    """Where the result goes, its channels last: the caller's `out` (checked) or a new tensor."""
    if out is None:
        like = problem.weight
        return torch.empty(problem.shape, dtype=like.dtype, device=like.device)
    view = out.permute(0, 2, 3, 1) if problem.channels_first else out
    if tuple(view.shape) != problem.shape or out.dtype != problem.weight.dtype:
        raise InputError(f"out is {list(out.shape)} {out.dtype}, the result {list(problem.shape)}, channels last")
    stride = _row_stride(view)
    if stride is None or (stride % 8 and problem.aligned()) or not _unit_columns(view):
        raise InputError(f"out {list(out.shape)} with strides {list(out.stride())} is not a matrix of aligned rows")
    if view.data_ptr() % 16:
        raise InputError(f"out {list(out.shape)} does not start at a multiple of 16 bytes")
    return view


def _run(problem: Problem | str, tile: Tile, out: torch.Tensor | None) -> torch.Tensor:
    if isinstance(problem, str):
        raise InputError(f"{problem}; ask `supports` first")
    if (reason := problem.refuses(tile)) is not None:
        raise InputError(f"{reason}; choose among `candidates`")
    result = result_of(problem, out)
    if result.numel():
        for launch in launches_of(problem, tile, result):
            launch.run()
    return result.permute(0, 3, 1, 2) if problem.channels_first else result


# ------------------------------------------------------------------------------------------------------------- calls
def linear_problem(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Problem | str:
    return _problem((x,), weight, bias)


def linear_add_problem(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor
) -> Problem | str:
    return _problem((x,), weight, bias, addend)


def geglu_linear_problem(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none"
) -> Problem | str:
    if approximate not in ("none", "tanh"):
        return f"no kernel for gelu {approximate!r}"
    return _problem((x,), weight, bias, None, GELU[approximate])


def conv2d_cat_problem(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Problem | str:
    if not is_pointwise(weight, stride, padding) or not 1 <= len(sources) <= 2:
        return "not a 1×1 convolution of stride 1 over one or two tensors"
    return _problem([s.permute(0, 2, 3, 1) for s in sources], weight[:, :, 0, 0], bias, channels_first=True)


def conv2d_add_problem(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Problem | str:
    if not is_pointwise(weight, stride, padding) or groups != 1:
        return "not a 1×1 convolution of stride 1 in one group"
    rows = addend.permute(0, 2, 3, 1)
    return _problem((x.permute(0, 2, 3, 1),), weight[:, :, 0, 0], bias, rows, channels_first=True)


def is_pointwise(weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and set(stride) == {1} and set(padding) == {0}


PROBLEMS: dict[str, Callable[..., Problem | str]] = {
    "linear": linear_problem,
    "linear_add": linear_add_problem,
    "geglu_linear": geglu_linear_problem,
    "conv2d_cat": conv2d_cat_problem,
    "conv2d_add": conv2d_add_problem,
}


def supports(operator: str, *arguments: Any) -> str | None:
    """Why no kernel of this file can run `operator` (a key of PROBLEMS) on these arguments; None if one can."""
    found = PROBLEMS[operator](*arguments)
    return found if isinstance(found, str) else None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias.

    x           [..., K] f16 | bf16 | f32, rows of one stride (a slice of a wider matrix is read where it is)
    weight      [N, K] with contiguous rows, bias [N] or None, dtype of x
    parameters  one of `candidates`; out, if given, is written and returned
    returns     [..., N], dtype of x; accumulated in f32, rounded once
    cost        2·M·N·K FLOPs
    raises      InputError where `supports` gives a reason
    """
    return _run(linear_problem(x, weight, bias), parameters, out)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias + addend: as `ops.linear.linear_add`, the addend read in the epilogue and the sum rounded once.

    addend   [..., N] or what broadcasts to it; where its columns lie apart only the general tile takes it
    raises   InputError where `supports` gives a reason
    """
    return _run(linear_add_problem(x, weight, bias, addend), parameters, out)


def geglu_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str = "none",
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """h·gelu(g), [h, g] = x·weightᵀ + bias: as `ops.linear.geglu_linear`, gated in f32 and rounded once.

    raises   InputError where `supports` gives a reason
    """
    return _run(geglu_linear_problem(x, weight, bias, approximate), parameters, out)


def conv2d_cat(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 1×1 case of `ops.convolution.conv2d_cat`: one or two channels-last sources, channels-last result.

    raises   InputError where `supports` gives a reason
    """
    return _run(conv2d_cat_problem(sources, weight, bias, stride, padding, dilation), parameters, out)


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
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 1×1 case of `ops.convolution.conv2d_add`: channels-last x and result.

    raises   InputError where `supports` gives a reason
    """
    return _run(conv2d_add_problem(x, weight, bias, addend, stride, padding, dilation, groups), parameters, out)


def gate(hg: torch.Tensor, approximate: str = "none", *, out: torch.Tensor | None = None) -> torch.Tensor:
    """h·gelu(g) where [h, g] are the halves of the last axis: what follows a library's product.

    hg       [..., 2·N] contiguous, f16 | bf16 | f32
    returns  [..., N], dtype of hg; computed in f32
    cost     reads 2·M·N elements, writes M·N
    """
    launch, result = gate_launch(hg, approximate, out)
    if result.numel():
        launch.run()
    return result


def gate_launch(hg: torch.Tensor, approximate: str, out: torch.Tensor | None) -> tuple[Launch, torch.Tensor]:
    if not hg.is_contiguous() or hg.shape[-1] % 2 or hg.data_ptr() % 16:
        raise InputError(f"{list(hg.shape)} with strides {list(hg.stride())} is not a contiguous, even-sized matrix")
    n = hg.shape[-1] // 2
    m = hg.numel() // max(1, 2 * n)
    if out is None:
        out = hg.new_empty((*hg.shape[:-1], n))
    elif out.shape != (*hg.shape[:-1], n) or not out.is_contiguous() or out.dtype != hg.dtype or out.data_ptr() % 16:
        raise InputError(f"out {list(out.shape)} {out.dtype} is not a contiguous half of {list(hg.shape)} {hg.dtype}")
    align = 8 if n % 8 == 0 else 1
    variant = _combine_form(hg.dtype, hg.dtype, align, NO_ADDEND, GELU[approximate], 1)
    grid = (_cdiv(m, COMBINE_M), _cdiv(n, COMBINE_N))
    return Launch(variant, grid, (hg, hg, hg, out, m, n // align, n // align, 1, 0, 0, 1, 0, 1)), out


# ------------------------------------------------------------------------------------------------------------ choice
# Fitted to an H100's times (benchmarks/h100-operators.jsonl), of which those near the best of their call count most.
START_US = 1.9  # of a kernel, and of one program: addresses, the first operands arrive, the last results leave
LATENCY_US = 0.66  # from asking the memory for an operand until it is there
PEAK = 1.68  # of the tensor cores alone, over what large products reach
SHARED_LINES = 2.0  # neighbouring SMs ask for the same lines at the same time and are answered together
STORE_TBS = 0.03  # of one program's epilogue: results and residual
GATE_FLOPS = 14  # instructions an accumulator of the gate, on the ordinary units
COMBINE_US = 0.9  # of the second kernel
OVERLAP = 2.1  # the larger of two times that run beside each other is missed by little where they differ much
SPLITS = (1, 2, 3, 4, 6, 8)


def estimate_us(
    m: int, n: int, k: int, itemsize: int, parameters: Tile, device: Device, *, gated: bool = False, added: bool = False
) -> float:
    """Time of one product of [M, K] and [N or 2·N, K] in µs.

    The busiest SM makes ⌈programs / SMs⌉ tiles.  It needs the time of their FLOPs and that of its share of the
    second-level cache; the memory must deliver the weights meanwhile; and each program waits: for its start, in each
    step for operands that were asked for only a pipeline's length before, and for its epilogue.  Programs that share an
    SM wait together.
    """
    t = parameters
    rows = 2 * n if gated else n
    steps = _cdiv(_cdiv(k, t.k), t.splits)
    most = _cdiv(_cdiv(m, t.m) * _cdiv(rows, t.n) * t.splits, device.num_sms)
    rounds = _cdiv(most, min(t.resident(itemsize, device), most))
    rate = (device.float_tflops if itemsize == 4 else device.half_tflops * PEAK) / device.num_sms
    # Fewer than 64 rows do not fill Hopper's products, which go at half speed then.
    step_us = 2 * t.m * t.n * t.k / rate * (2e-6 if t.m < 64 else 1e-6)
    gate_us = GATE_FLOPS * t.m * t.n / (device.float_tflops / device.num_sms) * 1e-6 if gated and t.splits == 1 else 0.0
    stored = t.m * t.n * (4 if t.splits > 1 else itemsize * (2 if added else 1)) / (2 if gate_us else 1)
    cache_us = ((t.m + t.n) * t.k * steps * itemsize + stored) / (SHARED_LINES * device.l2_tbs / device.num_sms) * 1e-6
    wait_us = START_US + steps * max(step_us, LATENCY_US / max(1, t.num_stages - 1)) + stored / STORE_TBS * 1e-6
    memory_us = moved_us(rows * k * itemsize, (m * k + m * n * (2 if added else 1)) * itemsize, device)
    time = together_us(
        START_US + most * (steps * step_us + gate_us),
        START_US + most * cache_us,
        START_US + memory_us,
        rounds * (wait_us + gate_us),
    )
    if t.splits > 1:
        time += combine_us(t.splits, m, rows, device)
    return time * (8.0 if _cut(t, 1) == GENERAL else 1.0)


def together_us(*times: float) -> float:
    """The time of what runs beside each other: a little more than the longest."""
    return float(sum(time**OVERLAP for time in times) ** (1 / OVERLAP))


def moved_us(cold_bytes: float, warm_bytes: float, device: Device) -> float:
    """Time to move what lies in the memory, and what was just written or is written now.

    The second-level cache holds the latter if it is at most half as large, and nothing of it if it is larger.
    """
    missed = min(1.0, max(0.0, 2 * warm_bytes / device.l2_bytes - 1))
    warm_us = (1 - missed) / device.l2_tbs + missed / device.memory_tbs
    return (cold_bytes / device.memory_tbs + warm_bytes * warm_us) * 1e-6


def combine_us(splits: int, m: int, rows: int, device: Device) -> float:
    """Time of adding f32 parts of [M, rows] that were just written, and of having written them."""
    return COMBINE_US + 2 * splits * m * rows * 4 / (0.9 * device.l2_tbs) * 1e-6


def candidates(
    m: int, n: int, ks: Sequence[int], dtype: torch.dtype, device: Device, *, gelu: int = 0, aligned: bool = True
) -> list[Tile]:
    """Tiles worth comparing for a product over sources of `ks` channels; `aligned` as `Problem.aligned` says."""
    if not aligned:
        return [GENERAL]
    rows = 2 * n if gelu else n
    found = []
    for tile in tiles_of(dtype):
        even_k = all(k % tile.k == 0 for k in ks)
        too_large = (tile.m > 64 and tile.m >= 2 * m) or (tile.n > 64 and tile.n >= 2 * rows)
        if tile.shared_bytes(dtype.itemsize, device.arch) > device.shared_bytes or too_large:
            continue
        programs = _cdiv(m, tile.m) * _cdiv(rows, tile.n)
        steps = sum(_cdiv(k, tile.k) for k in ks)
        for splits in SPLITS:
            # Splitting pays only where SMs stand idle, and each part must be worth its start.
            if splits > 1 and (programs * splits > 3 * device.num_sms or steps < 3 * splits):
                break
            cut = _cut(tile, splits)
            if _compiled(dtype, cut, even_k, gelu if splits == 1 else 0):
                found.append(cut)
    return found or [GENERAL]
