"""Attention for Hopper: one warp loads blocks of keys and values, two or three warpgroups each make 64 rows.

The products are WGMMA from the shared memory, their weights p stay in registers.  While a block's p·v runs, the scores
of the next block are already there and become weights; the warpgroups take turns on the tensor cores by themselves.
Tiles have widths that are powers of two, so that a head of 40 channels is computed as 32 + 16 (or p·v padded to 64),
80 as 64 + 16, 160 as 128 + 32; the copy engine fills what lies outside of a tensor with zeros, so that no size needs
padding in memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Arguments of kernels are Triton's: Python never sees them.

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

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
from triton.runtime.jit import constexpr_function

from .....errors import InputError
from ...device import Device
from ..attention import LAUNCH_US, clock_hz
from ..dependent import wait
from .form import ARCH, Form, Tile

_LOG2_E = 1.4426950408889634


# ----------------------------------------------------------------------------------------------------- loading warps
@gluon.jit
def _copy(parts, buffers, stage, at, bar, batch, row, head, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """A tile of rows of one head, in its one or two parts, to a stage of the buffers; `bar` counts the bytes."""
    tma.async_copy_global_to_shared(parts[0], [batch, row, head, 0], bar, buffers[0].index(stage))
    if SECOND:
        tma.async_copy_global_to_shared(parts[1], [batch, row, head, FIRST], bar, buffers[1].index(stage))


@gluon.jit
def _load(
    tensors, buffers, bars, place, num_blocks,
    KEYS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    K_1: gl.constexpr, K_2: gl.constexpr, V_1: gl.constexpr, V_2: gl.constexpr, ONES: gl.constexpr,
):  # fmt: skip
    """The rows of q once, then blocks of k and v from the last to the first, as stages become free."""
    q, k, v = tensors
    q_s, k_s, v_s = buffers
    q_full, k_full, k_free, v_here, v_full, v_free = bars
    batch, head, first_row = place
    k_bytes: gl.constexpr = KEYS * (K_1 + K_2) * 2
    v_bytes: gl.constexpr = KEYS * (V_1 + V_2) * 2
    q_bytes: gl.constexpr = GROUPS * 64 * (K_1 + K_2) * 2
    mbarrier.expect(q_full, q_bytes)
    for g in gl.static_range(GROUPS):
        _copy(q, q_s, g, 0, q_full, batch, first_row + 64 * g, head, K_1, K_2)
    for i in range(num_blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        key = (num_blocks - 1 - i) * KEYS
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_bytes)
        _copy(k, k_s, stage, 0, k_full.index(stage), batch, key, head, K_1, K_2)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        bar = v_here.index(stage) if ONES else v_full.index(stage)
        mbarrier.expect(bar, v_bytes)
        _copy(v, v_s, stage, 0, bar, batch, key, head, V_1, V_2)


@gluon.jit
def _add_ones(
    v_s, v_here, v_full, num_blocks,
    KEYS: gl.constexpr, STAGES: gl.constexpr, V_1: gl.constexpr, V_2: gl.constexpr, COLUMN: gl.constexpr,
):  # fmt: skip
    """1 0 0 … into the 8 columns of v from COLUMN on, which the copy engine filled with zeros."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    ones = gl.zeros((KEYS, 8), gl.float32, LAYOUT) + gl.where(column == 0, 1.0, 0.0)[None, :]
    ones = ones.to(v_s[0].dtype)
    for i in range(num_blocks):
        stage = i % STAGES
        mbarrier.wait(v_here.index(stage), (i // STAGES) & 1)
        if V_2:
            v_s[1].index(stage).reshape([KEYS, V_2]).slice(COLUMN - V_1, 8, dim=1).store(ones)
        else:
            v_s[0].index(stage).reshape([KEYS, V_1]).slice(COLUMN, 8, dim=1).store(ones)
        fence_async_shared()
        mbarrier.arrive(v_full.index(stage), count=1)


# --------------------------------------------------------------------------------------------------- computing warps
@gluon.jit
def _scores(
    q_s, k_s, group, stage,
    LAYOUT: gl.constexpr, KEYS: gl.constexpr, K_1: gl.constexpr, K_2: gl.constexpr,
):  # fmt: skip
    """Start q·kᵀ of 64 rows."""
    s = gl.zeros((64, KEYS), gl.float32, LAYOUT)
    q = q_s[0].index(group).reshape([64, K_1])
    k = k_s[0].index(stage).reshape([KEYS, K_1]).permute((1, 0))
    s = warpgroup_mma(q, k, s, use_acc=False, is_async=True)
    if K_2:
        q = q_s[1].index(group).reshape([64, K_2])
        k = k_s[1].index(stage).reshape([KEYS, K_2]).permute((1, 0))
        s = warpgroup_mma(q, k, s, is_async=True)
    return s


@constexpr_function
def _rescale_asm(count):
    """PTX: multiply `count` accumulators by the factors of their rows, unless these are 1 in the whole warp."""
    first, second = 2 * count, 2 * count + 2  # operands: results, accumulators, factors; rows alternate in pairs
    lines = [
        "{ .reg .pred p;",
        f"setp.neu.f32 p, ${first}, 0f3F800000;",
        f"setp.neu.or.f32 p, ${second}, 0f3F800000, p;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra DONE;",
        *(f"mul.f32 ${i}, ${i}, ${second if i & 2 else first};" for i in range(count)),
        "DONE: }",
    ]
    return "\n".join(lines)


@constexpr_function
def _rescale_constraints(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def _rescale(acc, factor, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """Accumulators times the factor of their row."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    factors = gl.broadcast(factor[:, None], acc)[0]
    return gl.inline_asm_elementwise(
        _rescale_asm(WIDTH // 2), _rescale_constraints(WIDTH // 2), [acc, factors], gl.float32, True, WIDTH // 2
    )


@gluon.jit
def _row_max(s, KEYS: gl.constexpr):
    """[64]: in several chains at once, since one is as slow as its length."""
    parts = gl.max(gl.max(s.reshape([64, 4, KEYS // 32, 8]), 2), 1)
    return gl.convert_layout(gl.max(parts, 1), gl.SliceLayout(1, s.type.layout), assert_trivial=True)


@gluon.jit
def _row_sums(p, KEYS: gl.constexpr):
    """[64, 8]: sums over every eighth key, which need no other thread."""
    return gl.sum(p.reshape([64, KEYS // 8, 8]), 1)


@gluon.jit
def _weigh(
    p, acc_1, acc_2, v_s, stage,
    P_1: gl.constexpr, P_2: gl.constexpr, KEYS: gl.constexpr, V_1: gl.constexpr, V_2: gl.constexpr,
):  # fmt: skip
    """Start acc + p·v."""
    p_1 = gl.convert_layout(p, P_1, assert_trivial=True)
    acc_1 = warpgroup_mma(p_1, v_s[0].index(stage).reshape([KEYS, V_1]), acc_1, is_async=True)
    if V_2:
        p_2 = gl.convert_layout(p, P_2, assert_trivial=True)
        acc_2 = warpgroup_mma(p_2, v_s[1].index(stage).reshape([KEYS, V_2]), acc_2, is_async=True)
    return acc_1, acc_2


@gluon.jit
def _compute(
    out, buffers, bars, place, sizes, num_blocks, factor,
    GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    K_1: gl.constexpr, K_2: gl.constexpr, V_1: gl.constexpr, V_2: gl.constexpr,
    CHANNELS: gl.constexpr, ONES: gl.constexpr,
):  # fmt: skip
    """64 rows of the result."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    A_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_1, 16])
    A_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_2 if V_2 else 16, 16])
    P_1: gl.constexpr = gl.DotOperandLayout(0, A_1, 2)
    P_2: gl.constexpr = gl.DotOperandLayout(0, A_2, 2)
    q_s, k_s, v_s = buffers
    q_full, k_full, k_free, v_full, v_free = bars
    batch, head, first_row = place
    num_rows, num_keys, num_heads = sizes
    dtype: gl.constexpr = k_s[0].dtype

    # The last block first: it alone needs a mask.
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = _scores(q_s, k_s, GROUP, 0, S, KEYS, K_1, K_2)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    mbarrier.arrive(k_free.index(0), count=1)
    keys = (num_blocks - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
    s = gl.where((keys < num_keys)[None, :], s, -float("inf"))
    m = _row_max(s, KEYS) * factor
    p_wide = gl.exp2(s * factor - m[:, None])
    if ONES:
        total = m
    else:
        total = _row_sums(p_wide, KEYS)
    p = p_wide.to(dtype)
    acc_1 = gl.zeros((64, V_1), gl.float32, A_1)
    acc_2 = gl.zeros((64, V_2 if V_2 else 16), gl.float32, A_2)
    mbarrier.wait(v_full.index(0), 0)

    for i in range(1, num_blocks):
        stage = i % STAGES
        old = (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        s = _scores(q_s, k_s, GROUP, stage, S, KEYS, K_1, K_2)
        acc_1, acc_2 = _weigh(p, acc_1, acc_2, v_s, old, P_1, P_2, KEYS, V_1, V_2)
        # The weights of this block are made while p·v of the block before runs.
        s = warpgroup_mma_wait(num_outstanding=2 if V_2 else 1, deps=(s,))
        mbarrier.arrive(k_free.index(stage), count=1)
        top = gl.maximum(m, _row_max(s, KEYS) * factor)
        # A half holds 2^8 as well as 1: the exponent that all is relative to may stay that far behind.
        top = gl.where(top > m + 8.0, top, m)
        shrink = gl.exp2(m - top)
        m = top
        # Scaling inside of the exponent is one fused multiply-add, and leaves q unrounded.
        p_wide = gl.exp2(s * factor - m[:, None])
        if not ONES:
            by_sum = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
            total = total * by_sum[:, None] + _row_sums(p_wide, KEYS)
        p_next = p_wide.to(dtype)
        # Needed in the next turn only; but the assembler moves nothing across this loop, and without it would put the
        # wait for p·v before the exponentials.
        mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
        acc_1, acc_2, p = warpgroup_mma_wait(num_outstanding=0, deps=(acc_1, acc_2, p))
        mbarrier.arrive(v_free.index(old), count=1)
        acc_1 = _rescale(acc_1, shrink, A_1, V_1)
        if V_2:
            acc_2 = _rescale(acc_2, shrink, A_2, V_2)
        p = p_next

    last = num_blocks - 1
    acc_1, acc_2 = _weigh(p, acc_1, acc_2, v_s, last % STAGES, P_1, P_2, KEYS, V_1, V_2)
    acc_1, acc_2, p = warpgroup_mma_wait(num_outstanding=0, deps=(acc_1, acc_2, p))

    if not ONES:
        sums = gl.sum(total, 1)
    elif V_2:
        column = gl.arange(0, V_2, layout=gl.SliceLayout(0, A_2))
        sums = gl.sum(gl.where((column == CHANNELS - V_1)[None, :], acc_2, 0.0), 1)
    else:
        column = gl.arange(0, V_1, layout=gl.SliceLayout(0, A_1))
        sums = gl.sum(gl.where((column == CHANNELS)[None, :], acc_1, 0.0), 1)
    row = first_row + 64 * GROUP
    _store(out, acc_1, sums, batch, head, row, 0, num_rows, num_heads, A_1, V_1, CHANNELS)
    if V_2:
        _store(out, acc_2, sums, batch, head, row, V_1, num_rows, num_heads, A_2, V_2, CHANNELS)


@gluon.jit
def _store(
    out, acc, sums, batch, head, row, column, num_rows, num_heads,
    LAYOUT: gl.constexpr, WIDTH: gl.constexpr, CHANNELS: gl.constexpr,
):  # fmt: skip
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    sums = gl.convert_layout(sums, gl.SliceLayout(1, LAYOUT))
    value = (acc * (1.0 / sums)[:, None]).to(out.dtype.element_ty)
    to = out + ((batch.to(gl.int64) * num_rows + rows) * num_heads + head)[:, None] * CHANNELS + columns[None, :]
    gl.store(to, value, mask=(rows < num_rows)[:, None] & (columns < CHANNELS)[None, :])


# ------------------------------------------------------------------------------------------------------------ kernel
@gluon.jit
def _buffers(
    part_1, part_2, dtype: gl.constexpr,
    COUNT: gl.constexpr, ROWS: gl.constexpr, W_1: gl.constexpr, W_2: gl.constexpr,
):  # fmt: skip
    """Shared memory for COUNT tiles, in their one or two parts."""
    first = gl.allocate_shared_memory(dtype, [COUNT, 1, ROWS, 1, W_1], part_1.layout)
    if W_2:
        return first, gl.allocate_shared_memory(dtype, [COUNT, 1, ROWS, 1, W_2], part_2.layout)
    else:
        return first, first


@gluon.jit(do_not_specialize=["num_rows", "num_keys", "num_heads", "factor"])
def flash(
    q_1, q_2, k_1, k_2, v_1, v_2, out, num_rows, num_keys, num_heads, factor,
    CHANNELS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    K_1: gl.constexpr, K_2: gl.constexpr, V_1: gl.constexpr, V_2: gl.constexpr,
    ONES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out[b, n, h] = Σₘ softmaxₘ(factor·ln2·q[b, n, h]·k[b, m, h])·v[b, m, h].

    q, k, v    descriptors of [B, N, H, D] in tiles [1, 64 or KEYS, 1, width], twice: the two parts of a head
    out        [B, N, H, D] contiguous
    STAGES     blocks of keys in the shared memory
    GROUPS     warpgroups that compute, of 64 rows each
    K_1, K_2   widths of the two parts of q and k; K_2 0: one part, padded;  V_1, V_2 likewise
    ONES       a padded column of v reads 1, so that the product with v also sums the weights
    REGISTERS  of a thread that computes, from the second warpgroup on; the first takes what is left
    """
    place = (gl.program_id(1) // num_heads, gl.program_id(1) % num_heads, gl.program_id(0) * (64 * GROUPS))
    dtype: gl.constexpr = k_1.dtype
    q_s = _buffers(q_1, q_2, dtype, GROUPS, 64, K_1, K_2)
    k_s = _buffers(k_1, k_2, dtype, STAGES, KEYS, K_1, K_2)
    v_s = _buffers(v_1, v_2, dtype, STAGES, KEYS, V_1, V_2)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_here.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()
    wait()

    tensors = ((q_1, q_2), (k_1, k_2), (v_1, v_2))
    buffers = (q_s, k_s, v_s)
    bars = (q_full, k_full, k_free, v_full, v_free)
    load_bars = (q_full, k_full, k_free, v_here, v_full, v_free)
    sizes = (num_rows, num_keys, num_heads)
    num_blocks = (num_keys + KEYS - 1) // KEYS
    W: gl.constexpr = REGISTERS
    gl.static_assert(GROUPS == 2 or GROUPS == 3)
    if GROUPS == 2:
        gl.warp_specialize([
            (_compute, (
                out, buffers, bars, place, sizes, num_blocks, factor, 0, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2,
                CHANNELS, ONES,
            )),
            (_compute, (
                out, buffers, bars, place, sizes, num_blocks, factor, 1, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2,
                CHANNELS, ONES,
            )),
            (_load, (tensors, buffers, load_bars, place, num_blocks, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2, ONES)),
            (_add_ones, (v_s, v_here, v_full, num_blocks if ONES else 0, KEYS, STAGES, V_1, V_2, CHANNELS)),
        ], [4, 1, 1], [W, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                out, buffers, bars, place, sizes, num_blocks, factor, 0, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2,
                CHANNELS, ONES,
            )),
            (_compute, (
                out, buffers, bars, place, sizes, num_blocks, factor, 1, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2,
                CHANNELS, ONES,
            )),
            (_compute, (
                out, buffers, bars, place, sizes, num_blocks, factor, 2, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2,
                CHANNELS, ONES,
            )),
            (_load, (tensors, buffers, load_bars, place, num_blocks, KEYS, STAGES, GROUPS, K_1, K_2, V_1, V_2, ONES)),
            (_add_ones, (v_s, v_here, v_full, num_blocks if ONES else 0, KEYS, STAGES, V_1, V_2, CHANNELS)),
        ], [4, 4, 1, 1], [W, W, 24, 24])  # fmt: skip


# ------------------------------------------------------------------------------------------------- launch parameters
@dataclass(frozen=True)
class Blocks:
    """One program makes 64·`groups` rows of one head, `keys` keys at a time.

    split_v    p·v in two products of widths that are powers of two, else one, padded
    ones       see `flash`
    """

    groups: int
    keys: int
    num_stages: int
    split_v: bool = True
    ones: bool = False

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def registers(self) -> int:
        """Of a thread that computes: what 24 for each thread of the loading warps leave of the 65,536."""
        return {2: 232, 3: 160}[self.groups]

    def widths(self, channels: int) -> tuple[int, int, int, int]:
        """K_1, K_2, V_1, V_2."""
        return *_parts(channels, True), *_parts(channels, self.split_v)


def _parts(channels: int, split: bool) -> tuple[int, int]:
    """Two widths that hold a head, or one: powers of two, at least 16."""
    padded = 1 << (channels - 1).bit_length()
    first, rest = padded // 2, channels - padded // 2
    if split and 2 * rest <= first:
        return first, max(16, 1 << (rest - 1).bit_length())
    return padded, 0


DTYPES = (torch.float16, torch.bfloat16)

CHANNELS = (40, 80, 160)
"""Of a head, that the kernel is made for."""

BLOCKS: dict[int, tuple[Blocks, ...]] = {
    40: (Blocks(3, 128, 3, split_v=False, ones=True),),
    80: (Blocks(2, 128, 2), Blocks(3, 64, 3)),
}
"""What is compiled, by number of channels.  With 160 the forms were slower than cuDNN and the portable kernel."""


@functools.cache
def form_of(dtype: torch.dtype, channels: int, blocks: Blocks) -> Form:
    k1, k2, v1, v2 = blocks.widths(channels)
    tiles = [
        Tile(dtype, (1, rows, 1, width))
        for rows, widths in ((64, (k1, k2)), (blocks.keys, (k1, k2)), (blocks.keys, (v1, v2)))
        for width in (widths[0], widths[1] or widths[0])
    ]
    constants = dict(
        CHANNELS=channels, KEYS=blocks.keys, STAGES=blocks.num_stages, GROUPS=blocks.groups,
        K_1=k1, K_2=k2, V_1=v1, V_2=v2,
        ONES=blocks.ones, REGISTERS=blocks.registers,
    )  # fmt: skip
    return Form(flash, (*tiles, dtype, 1, 1, 1, 1.0), constants)


def variants(dtype: torch.dtype) -> Iterator[Form]:
    """Every form that `attention` launches with tensors of `dtype` and parameters among `BLOCKS`."""
    if dtype not in DTYPES:
        return
    for channels, several in BLOCKS.items():
        for blocks in several:
            yield form_of(dtype, channels, blocks)


# ---------------------------------------------------------------------------------------------------------- the choice
def candidates(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    device: Device,
) -> list[Blocks]:
    """What can be launched with these tensors; none for few keys, of which the forms would compute mostly padding."""
    if device.arch != ARCH or supports(q, k, v, mask, scale, causal) or k.shape[1] < FEWEST_KEYS:
        return []
    return list(BLOCKS.get(q.shape[3], ()))


def estimate_us(q: torch.Tensor, k: torch.Tensor, blocks: Blocks, device: Device) -> float:
    """Time of one call in µs: that of the busiest multiprocessor, never less than reading needs.

    While one warpgroup multiplies, another takes exponentials: the longer of the two counts.  The constants were fitted
    to an H100 (4 % over 777 to 16,384 tokens).
    """
    batch, num_rows, heads, channels = q.shape
    num_keys, b = k.shape[1], blocks
    programs = -(-num_rows // b.rows) * batch * heads
    busiest = -(-programs // device.num_sms)
    scores = b.rows * b.keys
    products = scores * sum(b.widths(channels)) * 2 / (device.half_tflops * 1e12 / device.num_sms / clock_hz(device))
    step = max(products, scores / EXPONENTIALS) + STEP_CLOCKS
    busy_us = (START_CLOCKS + -(-num_keys // b.keys) * step) * busiest / clock_hz(device) * 1e6
    read = programs * (2 * num_keys + b.rows) * channels * q.itemsize
    return LAUNCH_US + max(busy_us, read / (device.l2_tbs * 1e6))


FEWEST_KEYS = 256
EXPONENTIALS = 14.3  # in a clock: the unit makes 16
STEP_CLOCKS, START_CLOCKS = 550, 10500


# ---------------------------------------------------------------------------------------------------------- the call
def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if mask is not None or causal:
        return "masks are not supported"
    if scale is not None and not scale > 0:
        return f"scale {scale} is not positive"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"{q.dtype}, {k.dtype}, {v.dtype} are not all f16 or all bf16"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} are not [B, N, H, D] and twice [B, M, H, D]"
    batch, num_rows, heads, channels = q.shape
    if channels not in CHANNELS:
        return f"heads of {channels} channels: not one of {CHANNELS}"
    if not k.shape[1] or batch * heads > 65535 or max(num_rows, k.shape[1]) > 2**31 - 1024:
        return f"{k.shape[1]} keys, {batch} × {heads} heads of {num_rows} rows are beyond the grid"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1 or t.data_ptr() % 16 or any(s % 8 or s <= 0 for s in t.stride()[:3]):
            return f"{name} with strides {t.stride()} is not made of aligned rows of 8 elements"
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    *,
    parameters: Blocks,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale·q·kᵀ)·v for each head, heads and channels where the projections left them.

    q           [B, N, H, D] f16 | bf16, D 40, 80 or 160; channels dense, other strides multiples of 8
    k, v        [B, M, H, D], dtype of q
    mask        None;  causal: False
    scale       factor of the scores, positive; None: 1/√D
    out         [B, N, H, D] contiguous, written; None: a new one
    returns     [B, N, H, D] contiguous, dtype of q; softmax in f32
    cost        2·B·H·N·M·2·D FLOPs and B·H·N·M exponentials; reads q once, k and v once for each block of rows
    raises      InputError where `supports` gives a reason
    source      Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608; lazy rescaling: arXiv:2603.05451
    """
    if (reason := supports(q, k, v, mask, scale, causal)) is not None:
        raise InputError(f"attention: {reason}. Take another candidate.")
    if out is None:
        out = q.new_empty(q.shape)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise InputError(f"out {list(out.shape)} {out.dtype} is not contiguous {list(q.shape)} {q.dtype}")
    if not out.numel():
        return out
    batch, num_rows, heads, channels = q.shape
    form = form_of(q.dtype, channels, parameters)
    tiles = [a for a in form.arguments if isinstance(a, Tile)]
    tensors = [tile.of(t) for tile, t in zip(tiles, (q, q, k, k, v, v), strict=True)]
    factor = (channels**-0.5 if scale is None else float(scale)) * _LOG2_E
    grid = (-(-num_rows // parameters.rows), batch * heads)
    form.launch(grid, (*tensors, out, num_rows, k.shape[1], heads, factor))
    return out
