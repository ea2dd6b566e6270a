# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Convolutions and matrix products for Hopper: tiles are loaded by the copy engine and multiplied by warpgroups out of
shared memory; bias, embedding, residual and gate are in the epilogue.

What limits them is the bandwidth of shared memory, 128 bytes a clock: a step of 16 channels reads the 64 rows of each
warpgroup once for every instruction, all columns once for every warpgroup, and writes what arrives.  Hence few loads of
x (see `hopper_conv`), and wide tiles.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .....errors import InputError
from ...device import Device
from ..convolution import result
from ..dependent import wait
from ..epilogue import (
    addend_pixels,
    aligned,
    ceil_div,
    finish_launch,
    finish_us,
    pixels_of,
)
from ..linear import moved_us
from ..strides import collapse
from ..variant import Launch
from .form import ARCH, Form
from .form import Tile as Box


# ----------------------------------------------------------------------------------------------------------- kernel
@gluon.jit
def _tile(index, num_m, num_n, rows_first):
    """Tile of rows, tile of columns and part of the sum of the index-th unit of work."""
    area = num_m * num_n
    split = index // area
    t = index - split * area
    m = gl.where(rows_first != 0, t % num_m, t // num_n)
    n = gl.where(rows_first != 0, t // num_m, t % num_n)
    return m, n, split


@gluon.jit
def _rows(buffers, first, layout: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr):
    """BM rows of a buffer, from its first-th line of a patch on: lines follow each other without gaps."""
    return buffers.index(first)._reinterpret(buffers.dtype, [BM, BK], layout)


@gluon.jit
def _load(
    x_desc, halo_desc, w_desc, more_desc, res_desc, res_more_desc, a, b, c, stage, stage_more, bars,
    num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, columns, pad, gate, res_images,
    TH: gl.constexpr, TB: gl.constexpr, TW: gl.constexpr, BN: gl.constexpr, MORE: gl.constexpr, BK: gl.constexpr,
    TAPS: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    a_ready, a_empty, b_ready, b_empty, r_ready, r_empty, _turn = bars
    LINES: gl.constexpr = TH + TAPS - 1
    WIDTH: gl.constexpr = BN + MORE
    PIECES: gl.constexpr = 2 if GATED else 1
    a_count = 0
    b_count = 0
    t_count = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m, n, split = _tile(index, num_m, num_n, rows_first)
        w0 = m % num_w * TW
        h0 = m // num_w % num_h * TH
        i0 = m // num_w // num_h * TB
        n0 = n * WIDTH
        for box in range(split * each, gl.minimum(split * each + each, num_boxes)):
            s = box % columns
            k = box // columns * BK
            slot = a_count % SA
            mbarrier.wait(a_empty.index(slot), ((a_count // SA) & 1) ^ 1)
            bar = a_ready.index(slot)
            if TAPS > 1:
                mbarrier.expect(bar, x_desc.block_type.nbytes + halo_desc.block_type.nbytes)
            else:
                mbarrier.expect(bar, x_desc.block_type.nbytes)
            here = a.index(slot * LINES)._reinterpret(a.dtype, x_desc.block_type.shape, x_desc.layout)
            tma.async_copy_global_to_shared(x_desc, [h0 - pad, i0, w0 + s - pad, k], bar, here)
            if TAPS > 1:
                there = a.index(slot * LINES + TH)._reinterpret(a.dtype, halo_desc.block_type.shape, halo_desc.layout)
                tma.async_copy_global_to_shared(halo_desc, [h0 - pad + TH, i0, w0 + s - pad, k], bar, there)
            a_count += 1
            for r in gl.static_range(TAPS):
                slot = b_count % SB
                mbarrier.wait(b_empty.index(slot), ((b_count // SB) & 1) ^ 1)
                bar = b_ready.index(slot)
                if MORE:
                    mbarrier.expect(bar, w_desc.block_type.nbytes + more_desc.block_type.nbytes)
                else:
                    mbarrier.expect(bar, PIECES * w_desc.block_type.nbytes)
                tap = r * columns + s
                tma.async_copy_global_to_shared(w_desc, [n0, tap, k], bar, b.index(slot * PIECES))
                if GATED:
                    tma.async_copy_global_to_shared(w_desc, [n0 + gate, tap, k], bar, b.index(slot * PIECES + 1))
                if MORE:
                    tma.async_copy_global_to_shared(more_desc, [n0 + BN, tap, k], bar, c.index(slot))
                b_count += 1
        if RESIDUAL:
            group = t_count % GROUPS
            mbarrier.wait(r_empty.index(group), ((t_count // GROUPS) & 1) ^ 1)
            bar = r_ready.index(group)
            if MORE:
                mbarrier.expect(bar, res_desc.block_type.nbytes + res_more_desc.block_type.nbytes)
            else:
                mbarrier.expect(bar, res_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(res_desc, [h0, i0 * res_images, w0, n0], bar, stage.index(group))
            if MORE:
                tma.async_copy_global_to_shared(
                    res_more_desc, [h0, i0 * res_images, w0, n0 + BN], bar, stage_more.index(group)
                )
            t_count += 1


@gluon.jit
def _reciprocal(x):
    """1 / x of numbers that are neither tiny nor huge, without what a division does for those."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _power_of_2(x):
    """2 to the x, of which tiny results are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gelu(x):
    """x·Φ(x), by the same tail of Φ as `linear._gelu`."""
    size = gl.abs(x)
    t = _reciprocal(1.0 + 0.23164188773 * size)
    tail = 0.5307027145 * t - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = (tail * t + 0.1274147959) * t * _power_of_2(-0.7213475204444817 * x * x)
    return gl.maximum(x, 0.0) - size * tail


@gluon.jit
def _vector(
    bias, embedding, has_bias, has_embedding, first, limit, N: gl.constexpr, BROAD: gl.constexpr, layout: gl.constexpr
):
    """bias + embedding of BROAD columns, 0 where there are none; those from N on are N columns of the gate."""
    m = gl.arange(0, BROAD, layout=gl.SliceLayout(0, layout))
    n = first + m % N
    place = n + m // N * limit
    v = gl.load(bias + place, mask=(n < limit) & (has_bias != 0), other=0.0).to(gl.float32)
    if BROAD == N:
        v += gl.load(embedding + n, mask=(n < limit) & (has_embedding != 0), other=0.0).to(gl.float32)
    return v


@gluon.jit
def _keep(value, stage, desc, place, BM: gl.constexpr, N: gl.constexpr, RESIDUAL: gl.constexpr, layout: gl.constexpr):
    """value (+ what lies in the stage) to the stage, from where the copy engine stores it, clipped at the borders."""
    flat = stage.reshape([BM, N])
    if RESIDUAL:
        value += flat.load(layout).to(gl.float32)
        gl.thread_barrier()
    flat.store(value.to(stage.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, place, stage)


@gluon.jit
def _keep_part(
    value, parts, split, h0, i0, w0, first, limit, height, batch, width,
    TB: gl.constexpr, TW: gl.constexpr, BM: gl.constexpr, N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """value to its place among the f32 partial sums."""
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    n = first + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    h = h0 + m // (TB * TW)
    i = i0 + m // TW % TB
    w = w0 + m % TW
    place = ((split * batch + i).to(gl.int64) * height + h) * width + w
    mask = ((h < height) & (i < batch) & (w < width))[:, None] & (n < limit)[None, :]
    gl.store(parts + (place * limit)[:, None] + n[None, :], value, mask=mask)


@gluon.jit
def _multiply(
    group: gl.constexpr, a, b, c, stage, stage_more, bars, out_desc, out_more_desc, parts, bias, embedding,
    num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, height, batch, width, limit,
    has_bias, has_embedding, embedding_image,
    TH: gl.constexpr, TB: gl.constexpr, TW: gl.constexpr, BN: gl.constexpr, MORE: gl.constexpr, BK: gl.constexpr,
    TAPS: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr,
    PARTIAL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    a_ready, a_empty, b_ready, b_empty, r_ready, r_empty, turn = bars
    BM: gl.constexpr = TH * TB * TW
    LINES: gl.constexpr = TH + TAPS - 1
    WIDTH: gl.constexpr = BN + MORE
    BROAD: gl.constexpr = 2 * BN if GATED else BN  # columns of the accumulator
    PENDING: gl.constexpr = 2 if MORE else 1
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    broad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BROAD, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MORE if MORE else BN, 16])
    boxes = 0
    t_count = 0
    first = gl.program_id(0)
    for index in range(first, num_tiles, gl.num_programs(0)):
        m, n, split = _tile(index, num_m, num_n, rows_first)
        begin = split * each
        end = gl.minimum(begin + each, num_boxes)
        if t_count % GROUPS == group:
            acc = gl.zeros([BM, BROAD], gl.float32, broad)
            if MORE:
                more = gl.zeros([BM, MORE], gl.float32, more_layout)
            if GROUPS > 1:
                # Until the other group has seen all of its boxes, a phase that is awaited here could be mistaken.
                mbarrier.wait(turn.index(group), ((t_count // GROUPS) & 1) ^ (1 - group))
            for box in range(begin, end):
                count = boxes + (box - begin)
                slot = count % SA
                mbarrier.wait(a_ready.index(slot), (count // SA) & 1)
                for r in gl.static_range(TAPS):
                    b_count = count * TAPS + r
                    b_slot = b_count % SB
                    mbarrier.wait(b_ready.index(b_slot), (b_count // SB) & 1)
                    rows = _rows(a, slot * LINES + r, flat, BM, BK)
                    weights = _rows(b, b_slot * (BROAD // BN), flat, BROAD, BK).permute((1, 0))
                    token = warpgroup_mma(rows, weights, acc, is_async=True)
                    if MORE:
                        others = c.index(b_slot).reshape([MORE, BK]).permute((1, 0))
                        more_token = warpgroup_mma(rows, others, more, is_async=True)
                        acc, more = warpgroup_mma_wait(num_outstanding=PENDING, deps=(token, more_token))
                    else:
                        acc = warpgroup_mma_wait(num_outstanding=PENDING, deps=(token,))
                    # The products of the step before are done: what they read may be overwritten.
                    known = (r > 0) | (box > begin)
                    mbarrier.arrive(b_empty.index((b_count + SB - 1) % SB), count=1, pred=known)
                    if r == 0:
                        mbarrier.arrive(a_empty.index((count + SA - 1) % SA), count=1, pred=known)
            if GROUPS > 1:
                mbarrier.arrive(turn.index(1 - group), count=1)
            w0 = m % num_w * TW
            h0 = m // num_w % num_h * TH
            i0 = m // num_w // num_h * TB
            n0 = n * WIDTH
            # Loaded while the last products run.
            if not PARTIAL:
                near = embedding + i0.to(gl.int64) * embedding_image
                added = _vector(bias, near, has_bias, has_embedding, n0, limit, BN, BROAD, broad)
                if MORE:
                    added_more = _vector(bias, near, has_bias, has_embedding, n0 + BN, limit, MORE, MORE, more_layout)
            if MORE:
                acc, more = warpgroup_mma_wait(num_outstanding=0, deps=(acc, more))
            else:
                acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            if end > begin:
                last = boxes + (end - begin) - 1
                mbarrier.arrive(b_empty.index((last * TAPS + TAPS - 1) % SB), count=1)
                mbarrier.arrive(a_empty.index(last % SA), count=1)
            if PARTIAL:
                _keep_part(acc, parts, split, h0, i0, w0, n0, limit, height, batch, width, TB, TW, BM, BN, layout)
                if MORE:
                    _keep_part(
                        more,
                        parts,
                        split,
                        h0,
                        i0,
                        w0,
                        n0 + BN,
                        limit,
                        height,
                        batch,
                        width,
                        TB,
                        TW,
                        BM,
                        MORE,
                        more_layout,
                    )
            else:
                acc += added[None, :]
                if MORE:
                    more += added_more[None, :]
                if GATED:
                    # Both halves of a result are in one thread.
                    h, g = acc.reshape([BM, 2, BN]).permute((0, 2, 1)).split()
                    value = gl.convert_layout(h * _gelu(g), layout, assert_trivial=True)
                else:
                    value = acc
                if RESIDUAL:
                    mbarrier.wait(r_ready.index(group), (t_count // GROUPS) & 1)
                else:
                    tma.store_wait(pendings=0)
                    gl.thread_barrier()
                _keep(value, stage.index(group), out_desc, [h0, i0, w0, n0], BM, BN, RESIDUAL, layout)
                if MORE:
                    _keep(
                        more,
                        stage_more.index(group),
                        out_more_desc,
                        [h0, i0, w0, n0 + BN],
                        BM,
                        MORE,
                        RESIDUAL,
                        more_layout,
                    )
                if RESIDUAL:
                    tma.store_wait(pendings=0)
                    mbarrier.arrive(r_empty.index(group), count=1)
        boxes += end - begin
        t_count += 1  # noqa: SIM113  # a kernel
    if not PARTIAL:
        tma.store_wait(pendings=0)


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "num_m", "num_n", "rows_first", "num_w", "num_h", "num_boxes", "each", "columns", "pad", "gate",
        "res_images", "height", "batch", "width", "limit8", "has_bias", "has_embedding", "embedding_image8",
    ]
)  # fmt: skip
def hopper_conv(
    x_desc, halo_desc, w_desc, more_desc, out_desc, out_more_desc, res_desc, res_more_desc, parts, bias, embedding,
    num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, columns, pad, gate, res_images,
    height, batch, width, limit8, has_bias, has_embedding, embedding_image8,
    TH: gl.constexpr, TB: gl.constexpr, TW: gl.constexpr, BN: gl.constexpr, MORE: gl.constexpr, BK: gl.constexpr,
    TAPS: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr,
    PARTIAL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out[h, image, w, :] = Σ over taps and channels of x·weight, + bias + embedding[image] + residual, or gated.

    A program makes tiles of TH·TB·TW pixels (rows, images, columns of a patch) and BN + MORE channels; GATED: of BN
    channels, of which MORE = BN accumulators are the gate.  One warp loads; GROUPS of consumers take tiles in turn, so
    that one multiplies while the other stores.

    A patch is loaded with TAPS - 1 further lines, for one column of taps: tap r of that column reads the lines from r
    on, which lie one line further in shared memory.  So x is loaded 3 times and not 9, and the zeros beyond the border
    are the copy engine's.  For a plain product a row of the matrix is a line, and TAPS is 1.
    """
    dtype: gl.constexpr = x_desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    a = gl.allocate_shared_memory(dtype, [SA * (TH + TAPS - 1), TB * TW, BK], flat)
    b = gl.allocate_shared_memory(dtype, [SB * (2 if GATED else 1), BN, 1, BK], w_desc.layout)
    c = b
    if MORE:
        c = gl.allocate_shared_memory(dtype, [SB, MORE, 1, BK], more_desc.layout)
    stage = b
    stage_more = b
    if not PARTIAL:
        stage = gl.allocate_shared_memory(dtype, [GROUPS, TH, TB, TW, BN], out_desc.layout)
        if MORE:
            stage_more = gl.allocate_shared_memory(dtype, [GROUPS, TH, TB, TW, MORE], out_more_desc.layout)
    a_ready = gl.allocate_shared_memory(gl.int64, [SA, 1], mbarrier.MBarrierLayout())
    a_empty = gl.allocate_shared_memory(gl.int64, [SA, 1], mbarrier.MBarrierLayout())
    b_ready = gl.allocate_shared_memory(gl.int64, [SB, 1], mbarrier.MBarrierLayout())
    b_empty = gl.allocate_shared_memory(gl.int64, [SB, 1], mbarrier.MBarrierLayout())
    r_ready = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    r_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SA):
        mbarrier.init(a_ready.index(i), count=1)
        mbarrier.init(a_empty.index(i), count=1)
    for i in gl.static_range(SB):
        mbarrier.init(b_ready.index(i), count=1)
        mbarrier.init(b_empty.index(i), count=1)
    for i in gl.static_range(GROUPS):
        mbarrier.init(r_ready.index(i), count=1)
        mbarrier.init(r_empty.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    wait()
    bars = (a_ready, a_empty, b_ready, b_empty, r_ready, r_empty, turn)
    limit = limit8 * 8
    embedding_image = embedding_image8 * 8
    if GROUPS == 1:
        gl.warp_specialize([
            (_multiply, (
            0, a, b, c, stage, stage_more, bars, out_desc, out_more_desc, parts, bias, embedding,
            num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, height, batch, width, limit,
            has_bias, has_embedding, embedding_image,
            TH, TB, TW, BN, MORE, BK, TAPS, SA, SB, RESIDUAL, GATED, PARTIAL, GROUPS, WARPS,
            )),
            (_load, (
            x_desc, halo_desc, w_desc, more_desc, res_desc, res_more_desc, a, b, c, stage, stage_more, bars,
            num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, columns, pad, gate, res_images,
            TH, TB, TW, BN, MORE, BK, TAPS, SA, SB, RESIDUAL, GATED, GROUPS,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
            0, a, b, c, stage, stage_more, bars, out_desc, out_more_desc, parts, bias, embedding,
            num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, height, batch, width, limit,
            has_bias, has_embedding, embedding_image,
            TH, TB, TW, BN, MORE, BK, TAPS, SA, SB, RESIDUAL, GATED, PARTIAL, GROUPS, WARPS,
            )),
            (_multiply, (
            1, a, b, c, stage, stage_more, bars, out_desc, out_more_desc, parts, bias, embedding,
            num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, height, batch, width, limit,
            has_bias, has_embedding, embedding_image,
            TH, TB, TW, BN, MORE, BK, TAPS, SA, SB, RESIDUAL, GATED, PARTIAL, GROUPS, WARPS,
            )),
            (_load, (
            x_desc, halo_desc, w_desc, more_desc, res_desc, res_more_desc, a, b, c, stage, stage_more, bars,
            num_tiles, num_m, num_n, rows_first, num_w, num_h, num_boxes, each, columns, pad, gate, res_images,
            TH, TB, TW, BN, MORE, BK, TAPS, SA, SB, RESIDUAL, GATED, GROUPS,
            )),
        ], [WARPS, 1], [REGISTERS, 24])  # fmt: skip


# ------------------------------------------------------------------------------------------------------- parameters
BLOCK_K = 64
"""Channels of one step: 128 bytes, the widest line that the copy engine swizzles."""


@dataclass(frozen=True)
class Tile:
    """How the implicit product is cut.

    rows, images, columns  the patch of pixels that a group of warps makes at a time
    n, more                output channels in the first and in the second accumulator; with a gate n of the results
    taps                   3: for 3×3 convolutions; 1: for matrix products, whose rows are `rows`
    x_stages, w_stages     boxes of x (each for `taps` steps) and of the weight that are held
    groups                 of consumers, which take tiles in turn
    warps                  of each group
    splits                 parts of the sum, each in its own units of work
    shared                 whether two programs share a multiprocessor
    """

    rows: int
    images: int
    columns: int
    n: int
    more: int = 0
    taps: int = 3
    x_stages: int = 2
    w_stages: int = 4
    groups: int = 1
    warps: int = 8
    splits: int = 1
    shared: bool = False

    @property
    def m(self) -> int:
        return self.rows * self.images * self.columns

    @property
    def name(self) -> str:
        patch = f"{self.rows}x{self.images}x{self.columns}" if self.taps > 1 else str(self.rows)
        columns = f"{self.n}+{self.more}" if self.more else str(self.n)
        twice = " shared" if self.shared else ""
        return (
            f"hopper {patch}x{columns} stages={self.x_stages},{self.w_stages} groups={self.groups} "
            f"splits={self.splits}{twice}"
        )

    def shared_bytes(self, gated: bool = False) -> int:
        """Shared memory of one program."""
        lines = self.x_stages * (self.rows + self.taps - 1) * self.images * self.columns
        steps = self.w_stages * (2 * self.n if gated else self.n + self.more)
        staged = 0 if self.splits > 1 else self.groups * self.m * (self.n + self.more)
        return 2 * ((lines + steps) * BLOCK_K + staged) + 1024


# Of 57 forms these are, on an H100, the best or within 3 % of it for some call of Stable Diffusion.
CONV_TILES = (
    Tile(8, 1, 16, 128, 32, x_stages=2, w_stages=4, groups=2, warps=4),
    Tile(16, 1, 16, 128, x_stages=2, w_stages=5),
    Tile(8, 1, 8, 128, 32, x_stages=3, w_stages=6, groups=2, warps=4),
    Tile(8, 1, 16, 64, x_stages=2, w_stages=6, warps=4, shared=True),
)
"""160 = 128 + 32 channels: half of 320, a quarter of 640, an eighth of 1280."""

SPLIT_CONV_TILES = (Tile(8, 1, 8, 128, 32, x_stages=3, w_stages=7, warps=4, splits=2),)
"""With f32 partial sums, which need no room in shared memory; small patches leave less to split."""

PRODUCT_TILES = (
    Tile(128, 1, 1, 128, 32, 1, 4, 4, groups=2, warps=4),
    Tile(128, 1, 1, 128, 0, 1, 4, 4, groups=2, warps=4),
    Tile(64, 1, 1, 128, 32, 1, 3, 3, warps=4, shared=True),
)

GATED_TILES = (
    Tile(128, 1, 1, 128, 0, 1, 4, 4),
    Tile(128, 1, 1, 64, 0, 1, 3, 3, warps=4, shared=True),
    Tile(64, 1, 1, 64, 0, 1, 4, 4, warps=4, shared=True),
)
"""n results each: the accumulator has n columns of the first half of the weight and as many of the gate."""

SPLITS = (2, 3, 4, 5, 6, 10, 15)
"""Divisors of 60, the boxes of 1280 channels."""


@functools.cache
def _form(dtype: torch.dtype, tile: Tile, residual: bool, gated: bool) -> Form:
    """The compiled form of a tile: with splits only whether there are any counts."""
    partial = tile.splits > 1
    halo = tile.taps - 1 or tile.rows
    more = tile.more or tile.n
    boxes = (
        (tile.rows, tile.images, tile.columns, BLOCK_K), (halo, tile.images, tile.columns, BLOCK_K),
        (tile.n, 1, BLOCK_K), (more, 1, BLOCK_K),
        *((tile.rows, tile.images, tile.columns, n) for n in (tile.n, more, tile.n, more)),
    )  # fmt: skip
    pointers = (torch.float32 if partial else dtype, dtype, dtype)
    # Two consumers share what one program may have: each group of four warps is given most of it by `setmaxnreg`.
    limit = 128 if tile.shared or tile.groups * tile.warps == 4 else None
    return Form(
        hopper_conv,
        (*(Box(dtype, b) for b in boxes), *pointers, *(1,) * 19),
        {
            "TH": tile.rows, "TB": tile.images, "TW": tile.columns, "BN": tile.n, "MORE": tile.more, "BK": BLOCK_K,
            "TAPS": tile.taps, "SA": tile.x_stages, "SB": tile.w_stages, "RESIDUAL": int(residual),
            "GATED": int(gated), "PARTIAL": int(partial), "GROUPS": tile.groups, "WARPS": tile.warps, "REGISTERS": 240,
        },
        tile.warps,
        registers=limit,
    )  # fmt: skip


def variants(dtype: torch.dtype) -> Iterator[Form]:
    """Every form that the calls of this file launch with tensors of `dtype`, beside `finish_variants`."""
    if dtype == torch.float32:
        return
    for tile in (*CONV_TILES, *PRODUCT_TILES):
        yield _form(dtype, tile, False, False)
        yield _form(dtype, tile, True, False)
    for tile in SPLIT_CONV_TILES:
        yield _form(dtype, tile, False, False)
    for tile in GATED_TILES:
        yield _form(dtype, tile, False, True)


# ----------------------------------------------------------------------------------------------------------- launch
@dataclass(frozen=True)
class Problem:
    """A convolution of padding 1 over [batch, C, height, width], or a product of `height` rows (batch and width 1).

    x, out, residual   4-D with channels in axis 1, in any layout that `pixels_of` knows; weight [K or 2·K, C, R, R]
    embedding          [batch or 1, K, 1, 1] or None
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    embedding: torch.Tensor | None
    residual: torch.Tensor | None
    gated: bool = False

    @property
    def outputs(self) -> int:
        return self.weight.shape[0] // 2 if self.gated else self.weight.shape[0]

    @property
    def taps(self) -> int:
        return self.weight.shape[2]

    @property
    def addend(self) -> torch.Tensor | None:
        return self.residual if self.embedding is None else self.embedding

    @functools.cached_property
    def unreadable(self) -> str | None:
        """Why no tile can make this, whatever its sizes; None where some can."""
        given = [t for t in (self.x, self.weight, self.bias, self.embedding, self.residual) if t is not None]
        if len({t.dtype for t in given}) > 1 or self.x.dtype not in (torch.float16, torch.bfloat16):
            return "dtypes that differ or are not f16 or bf16"
        if not aligned(*given) or (self.bias is not None and self.bias.stride(0) != 1):
            return "a tensor that does not start at a multiple of 16 bytes, or a strided bias"
        if self.x.shape[1] % 8 or self.outputs % 8:
            return "channels that are no multiple of 8"
        strided = [pixels_of(t) for t in (self.x, self.weight, self.residual, self.embedding) if t is not None]
        if any(s is None or not s.vector or not s.pixel for s in strided):
            return "a layout that is not channels-last with strides that are multiples of 8"
        if not self.x.numel():
            return "no pixels or channels"
        return "2³¹ elements" if max(_extent(t) for t in given) >= 2**31 else None

    def num_boxes(self) -> int:
        return self.taps * ceil_div(self.x.shape[1], BLOCK_K)

    def num_patches(self, tile: Tile) -> tuple[int, int, int]:
        """Patches along images, rows and columns."""
        batch, _, height, width = self.x.shape
        return ceil_div(batch, tile.images), ceil_div(height, tile.rows), ceil_div(width, tile.columns)

    def num_units(self, tile: Tile) -> int:
        """Units of work: tiles, or parts of them."""
        images, rows, columns = self.num_patches(tile)
        return images * rows * columns * ceil_div(self.outputs, tile.n + tile.more) * tile.splits


def refuses(problem: Problem, tile: Tile) -> str | None:
    """Why `tile` cannot make this; None if it can."""
    p = problem
    if p.unreadable:
        return p.unreadable
    if p.taps != tile.taps:
        return f"a tile for {tile.taps} taps"
    if p.embedding is not None and p.residual is not None and tile.splits > 1:
        return "two addends of a split sum"
    if tile.images > 1 and tile.splits == 1:
        return "patches over several images whose sum is not split"
    if p.gated and (tile.splits > 1 or p.addend is not None):
        return "a gate with parts or an addend"
    return None


def _extent(x: torch.Tensor) -> int:
    return sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))


def launches_of(problem: Problem, tile: Tile, out: torch.Tensor, num_sms: int) -> tuple[Launch, ...]:
    """What makes `out`: one launch, or two where the sum is split."""
    p = problem
    if tile.splits == 1:
        return (_launch(p, tile, out, num_sms),)
    batch, _, height, width = p.x.shape
    parts = torch.empty((tile.splits, batch * height * width, p.outputs), dtype=torch.float32, device=out.device)
    return _launch(p, tile, parts, num_sms), finish_launch(parts, p.bias, p.addend, out)


def _launch(p: Problem, tile: Tile, out: torch.Tensor, num_sms: int) -> Launch:
    partial = out.dim() == 3
    form = _form(p.x.dtype, _cut(tile, 2) if partial else tile, p.residual is not None and not partial, p.gated)
    batch, _, height, width = p.x.shape
    box = form.arguments
    x = _descriptors(p.x, box[:2])
    lines = p.weight.permute(0, 2, 3, 1).flatten(1, 2)
    w = [b.of(lines) for b in box[2:4]]
    target = p.x if partial else out
    results = _descriptors(target, box[4:6])
    residuals = results if partial or p.residual is None else _descriptors(p.residual, box[6:8])
    images, rows, columns = p.num_patches(tile)
    num_m, num_n = images * rows * columns, ceil_div(p.outputs, tile.n + tile.more)
    units, boxes = num_m * num_n * tile.splits, p.num_boxes()
    none = p.x
    same = p.residual is not None and p.residual.shape[0] == 1
    embedding = None if p.embedding is None else pixels_of(p.embedding)
    return Launch(
        form,
        (min(units, num_sms * (2 if tile.shared else 1)), 1, 1),
        (
            *x, *w, *results, *residuals, out, none if p.bias is None else p.bias,
            none if p.embedding is None else p.embedding,
            units, num_m, num_n, int(p.weight.numel() > p.x.numel()), columns, rows, boxes,
            ceil_div(boxes, tile.splits), p.taps, p.taps // 2, p.outputs, int(not same),
            height, batch, width, p.outputs // 8, int(p.bias is not None and not partial),
            int(p.embedding is not None and not partial), embedding.image // 8 if embedding else 0,
        ),
    )  # fmt: skip


@functools.cache
def _cut(tile: Tile, splits: int) -> Tile:
    return replace(tile, splits=splits)


def _descriptors(x: torch.Tensor, boxes: Sequence[Any]) -> list[Any]:
    """Descriptors of a channels-last tensor, seen as [H, B, W, C]: lines of a patch follow each other."""
    lines = x.permute(2, 0, 3, 1)
    return [box.of(lines) for box in boxes]


# ------------------------------------------------------------------------------------------------------------- call
def problem_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Problem | str:
    """A convolution of 3×3 or 1×1 and stride 1 that keeps the size, or why it is none; padding None: the fitting one.

    addend   as in `ops.convolution.conv2d_add`, or None
    """
    reason = _window_reason(x, weight, stride, padding, dilation, groups)
    if reason:
        return reason
    batch, _, height, width = x.shape
    residual = embedding = None
    if addend is not None:
        if addend_pixels(addend, batch, weight.shape[0], height, width) is None:
            return "an addend that is neither a channels-last residual nor an embedding"
        if tuple(addend.shape[2:]) == (height, width):
            residual = addend
        else:
            embedding = addend
    if weight.shape[2] == 3:
        return Problem(x, weight, bias, embedding, residual)
    if embedding is not None:
        return "an embedding in a matrix product"
    flat = flat_pixels(x)
    added = None if residual is None else flat_pixels(residual)
    if flat is None or (residual is not None and (added is None or residual.shape[0] != batch)):
        return "images that do not follow each other"
    return Problem(flat, weight, bias, None, added)


def _window_reason(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | None,
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    if x.dim() != 4 or tuple(weight.shape[2:]) not in ((3, 3), (1, 1)):
        return "a kernel that is neither 3×3 nor 1×1"
    kept = (weight.shape[2] // 2,) * 2
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1) or groups != 1 or weight.shape[1] != x.shape[1]:
        return "a stride, a dilation or groups"
    return None if padding is None or tuple(padding) == kept else "a padding that changes the size"


def flat_pixels(x: torch.Tensor) -> torch.Tensor | None:
    """All pixels of a channels-last tensor as the rows of one image of one column, or None."""
    where = pixels_of(x)
    batch, channels, height, width = x.shape
    if where is None or (batch > 1 and where.image != height * width * where.pixel):
        return None
    rows = batch * height * width
    return x.as_strided((1, channels, rows, 1), (rows * where.pixel, 1, where.pixel, where.pixel))


def rows_of(x: torch.Tensor) -> torch.Tensor | None:
    """[..., K] with rows of one stride as [1, K, M, 1], or None."""
    rows, k = x.shape[:-1].numel(), x.shape[-1]
    stride = collapse(x.shape[:-1], x.stride()[:-1])
    if stride is None or (rows > 1 and stride < k) or (k > 1 and x.stride(-1) != 1):
        return None
    stride = stride if rows > 1 else k
    return x.as_strided((1, k, rows, 1), (rows * stride, 1, stride, stride))


def product_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    gated: bool = False,
) -> Problem | str:
    """x·weightᵀ + bias + addend, or h·gelu(g) of its halves: [..., K] times [N or 2·N, K]."""
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return "a weight that is no matrix"
    rows = rows_of(x)
    if addend is not None and tuple(addend.shape) != (*x.shape[:-1], weight.shape[0]):
        return "an addend that is broadcast"
    added = None if addend is None else rows_of(addend)
    if rows is None or (addend is not None and added is None) or (weight.shape[1] > 1 and weight.stride(1) != 1):
        return "a tensor that is not a matrix of contiguous rows"
    kernel = weight.as_strided((*weight.shape, 1, 1), (weight.stride(0), 1, weight.stride(0), weight.stride(0)))
    return Problem(rows, kernel, bias, None, added, gated)


def run(problem: Problem | str, tile: Tile, out: torch.Tensor) -> None:
    """Makes `out`, 4-D with channels in axis 1 and dense: [B, K, H, W], or [1, N, M, 1] for a product.

    raises   InputError where `refuses` gives a reason
    """
    reason = problem if isinstance(problem, str) else refuses(problem, tile)
    if reason is not None or isinstance(problem, str):
        raise InputError(f"{tile.name}: {reason}")
    for launch in launches_of(problem, tile, out, _num_sms(out.device)):
        launch.run()


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """F.conv2d(x, weight, bias): see `conv2d_add`."""
    return conv2d_add(x, weight, bias, None, stride, padding, dilation, groups, parameters=parameters, out=out)


def conv2d_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv2d(x) + bias + addend of stride 1, 3×3 with padding 1 or 1×1: see `ops.convolution.conv2d_add`.

    x        [B, C, H, W] f16 | bf16, channels-last
    out      [B, K, H, W] channels-last and dense, or None
    returns  out; accumulated in f32, rounded once
    raises   InputError where `problem_of` or `refuses` gives a reason
    """
    problem = problem_of(x, weight, bias, addend, stride, padding, dilation, groups)
    if isinstance(problem, str):
        raise InputError(f"{parameters.name}: {problem}")
    out = result(out, (x.shape[0], weight.shape[0], *x.shape[2:]), x)
    target = out if problem.taps == 3 else flat_pixels(out)
    assert target is not None
    run(problem, parameters, target)
    return out


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias: see `linear_add`."""
    return linear_add(x, weight, bias, None, parameters=parameters, out=out)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias + addend: see `ops.linear.linear_add`; addend [..., N] or None.

    out      [..., N] contiguous, or None
    raises   InputError where `product_of` or `refuses` gives a reason
    """
    return _product(product_of(x, weight, bias, addend), x, weight.shape[0], parameters, out)


def geglu_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str = "none",
    *,
    parameters: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """h·gelu(g), [h, g] = x·weightᵀ + bias: see `ops.linear.geglu_linear`, gelu by erf only.

    raises   InputError where `gated_of` or `refuses` gives a reason
    """
    return _product(gated_of(x, weight, bias, approximate), x, weight.shape[0] // 2, parameters, out)


def _product(
    problem: Problem | str, x: torch.Tensor, outputs: int, parameters: Tile, out: torch.Tensor | None
) -> torch.Tensor:
    if out is None:
        out = x.new_empty((*x.shape[:-1], outputs))
    elif out.shape != (*x.shape[:-1], outputs) or out.dtype != x.dtype or not out.is_contiguous():
        raise InputError(f"{parameters.name}: out is {list(out.shape)} {out.dtype} or not contiguous")
    target = rows_of(out)
    assert target is not None
    run(problem, parameters, target)
    return out


def gated_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none"
) -> Problem | str:
    """The problem of `geglu_linear`, or why it is none."""
    return product_of(x, weight, bias, None, True) if approximate == "none" else "gelu by tanh"


PROBLEMS: dict[str, Callable[..., Problem | str]] = {
    "conv2d": lambda x, weight, bias=None, stride=(1, 1), padding=(0, 0), *more: problem_of(
        x, weight, bias, None, stride, padding, *more
    ),
    "conv2d_add": problem_of,
    "linear": product_of,
    "linear_add": product_of,
    "geglu_linear": gated_of,
}
"""What each call of this file makes of its arguments."""


# --------------------------------------------------------------------------------------------------------- estimate
# Fitted to an H100's times of 131 calls and tiles, which these give within 6 % where a tile is near the best.
CLOCK = 1755.0  # in a µs
LAUNCH_US = 3.1  # of a kernel whose weights are not in the cache
START_US = 1.9  # from the start of a unit of work to its first product, and from its last one to its end
STORE_US = 7e-6  # of a byte of the epilogue
GATE_US = 1.2e-5  # of a gated result
LATENCY_US = 0.78  # from asking for a box to having it
ARRIVING = 0.16  # the part of the time in which boxes arrive that delays products
OVERLAP = 2.0  # of products and memory, as in `linear`


def estimate_us(problem: Problem, tile: Tile, device: Device) -> float:
    """Time on `device`, µs: the products of the busiest multiprocessor, and what its units of work wait for.

    Units that share a multiprocessor multiply in turn and wait together.
    """
    p, t = problem, tile
    steps = ceil_div(p.num_boxes(), t.splits) * t.taps
    step_us = _step_us(p, t)
    total, beside = p.num_units(t), 2 if t.shared or t.groups > 1 else 1
    programs = device.num_sms * (2 if t.shared else 1)
    units = 1 if total <= device.num_sms else ceil_div(total, programs) * programs // device.num_sms
    rounds = ceil_div(units, beside)
    read = 2 if p.residual is not None and t.splits == 1 else 0
    around_us = START_US + STORE_US * t.m * (t.n + t.more) * ((4 if t.splits > 1 else 2) + read)
    around_us += GATE_US * t.m * t.n if p.gated else 0.0
    waiting_us = rounds * (steps * max(step_us, LATENCY_US / (t.w_stages - 1)) + around_us)
    busy_us = max(units * steps * step_us + rounds * around_us, waiting_us)
    batch, channels, height, width = p.x.shape
    pixels = batch * height * width
    moved = pixels * (channels + p.outputs * (2 if p.residual is not None else 1))
    memory_us = moved_us(p.weight.numel() * 2, moved * 2, device)
    time = LAUNCH_US + float((busy_us**OVERLAP + memory_us**OVERLAP) ** (1 / OVERLAP))
    if t.splits > 1:
        time += finish_us(t.splits, pixels * p.outputs, 4, 2, p.addend is not None, device)
    return time


def _step_us(p: Problem, t: Tile) -> float:
    """Of the products with one box of the weight.  An instruction of 64 rows, n columns and 16 channels takes n / 2
    clocks, or as long as reading its operands; what arrives meanwhile takes some of the same bandwidth."""
    columns = [2 * t.n] if p.gated else [t.n, t.more] if t.more else [t.n]
    products = t.m // 64 * sum(max(n / 2, 16 + n / 4) for n in columns)
    lines = t.m * (t.rows + t.taps - 1) / (t.rows * t.taps) + sum(columns)
    return (BLOCK_K // 16 * products + ARRIVING * lines) / CLOCK


def candidates(problem: Problem, device: Device) -> list[Tile]:
    """Tiles worth comparing for this problem, each with the splits that fill the GPU and no more."""
    if device.arch != ARCH:
        return []
    if problem.gated:
        found = list(GATED_TILES)
    elif problem.taps == 1:
        found = list(PRODUCT_TILES)
    else:
        found = list(CONV_TILES)
        for tile, splits in itertools.product(SPLIT_CONV_TILES, SPLITS):
            split = _cut(tile, splits)
            if problem.num_units(split) <= 1.1 * device.num_sms and problem.num_boxes() >= 3 * splits:
                found.append(split)
    return [t for t in found if refuses(problem, t) is None and t.shared_bytes(problem.gated) <= device.shared_bytes]
