"""Attention that never writes its scores: softmax(scale·q·kᵀ)·v, block by block of keys.

One kernel serves every size of head up to 512 channels.  Tensor-core tiles have widths that are powers of two, so that
a head of 40 channels is computed as 32 + 16 (two products into one score, two accumulators) or padded to 64; 80 as
64 + 16, 160 as 128 + 32.  With heads this small the exponentials and the instructions around them cost as much as the
products; most of what is unusual below saves an instruction for each score.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Arguments of kernels are Triton's: Python never sees them.

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ....errors import InputError
from ..device import Device
from .dependent import wait
from .strides import alignment_reason
from .variant import Launch, Variant

LAUNCH_US = 2.5
_LOG2_E = 1.4426950408889634
_INT32 = 2**31 - 1


# ------------------------------------------------------------------------------------------------------------ kernel
@triton.jit
def _load_keys(row, offsets_1, offsets_2, live, inside_1, inside_2, SECOND: tl.constexpr, TAIL: tl.constexpr):
    """The two parts of a tile of rows of k or v.  TAIL: only rows `live` exist.

    A first part that has a second is always full, and an address without a mask saves instructions.
    """
    if SECOND:
        if TAIL:
            part_1 = tl.load(row + offsets_1, mask=live, other=0.0)
        else:
            part_1 = tl.load(row + offsets_1)
        part_2 = tl.load(row + offsets_2, mask=live & inside_2, other=0.0)
    else:
        part_1 = tl.load(row + offsets_1, mask=live & inside_1, other=0.0)
        part_2 = part_1
    return part_1, part_2


@triton.jit
def _load_values(
    row, ones, offsets_1, offsets_2, ones_offsets, live, inside_1, inside_2,
    SECOND: tl.constexpr, ONES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The same for v.  ONES: the padded columns read 1 0 0 … from memory, which is loaded with the others anyway."""
    if not ONES:
        part_1, part_2 = _load_keys(row, offsets_1, offsets_2, live, inside_1, inside_2, SECOND, TAIL)
    elif SECOND:
        pointers = tl.where(inside_2, row + offsets_2, ones + ones_offsets)
        if TAIL:
            part_1 = tl.load(row + offsets_1, mask=live, other=0.0)
            part_2 = tl.load(pointers, mask=live, other=0.0)
        else:
            part_1 = tl.load(row + offsets_1)
            part_2 = tl.load(pointers)
    else:
        pointers = tl.where(inside_1, row + offsets_1, ones + ones_offsets)
        if TAIL:
            part_1 = tl.load(pointers, mask=live, other=0.0)
        else:
            part_1 = tl.load(pointers)
        part_2 = part_1
    return part_1, part_2


@triton.jit
def _bias(mask, rows, keys, num_rows, num_keys, mask_key, factor, MASK: tl.constexpr):
    """What a mask adds to scores that `factor` multiplies afterwards; -inf beyond the last row and key.

    mask  [ROWS, 1] pointers to its rows
    MASK  1: of booleans; 2: to be added
    """
    there = (rows < num_rows)[:, None] & (keys < num_keys)[None, :]
    pointers = mask + (keys * mask_key)[None, :]
    if MASK == 1:
        bias = tl.where(tl.load(pointers, mask=there, other=0) != 0, 0.0, -float("inf"))
    else:
        value = tl.load(pointers, mask=there, other=-float("inf")).to(tl.float32)
        # The most negative numbers of bfloat16 and float32 would become -inf; a row of them alone counts evenly.
        bias = tl.maximum(value * (1.4426950408889634 / factor), -1e36)
        bias = tl.where(value == -float("inf"), value, bias)
    return bias


@triton.jit
def _scores(q_1, q_2, k_1, k_2, bias, SECOND: tl.constexpr, MASK: tl.constexpr):
    if MASK:
        s = tl.dot(q_1, tl.trans(k_1), bias, input_precision="ieee")
    else:
        s = tl.dot(q_1, tl.trans(k_1), input_precision="ieee")
    if SECOND:
        s = tl.dot(q_2, tl.trans(k_2), s, input_precision="ieee")
    return s


@triton.jit
def _counting(s, rows, keys, num_keys, CAUSAL: tl.constexpr):
    """Scores of keys that there are and a row may look at, else -inf."""
    live = (keys < num_keys)[None, :]
    if CAUSAL:
        live = live & (keys[None, :] <= rows[:, None])
    return tl.where(live, s, -float("inf"))


@triton.jit
def _weight(total, MASK: tl.constexpr):
    """1/total; something finite for a row that may look at nothing, whose sums are 0."""
    if MASK:
        total = tl.where(total > 0, total, 1.0)
    return (1.0 / total)[:, None]


@triton.jit
def _shrink(top, m, total, acc_1, acc_2, SECOND: tl.constexpr, ONES: tl.constexpr):
    """What was summed relative to 2^m, relative to 2^top."""
    factor = tl.exp2(m - top)
    acc_1 = acc_1 * factor[:, None]
    if SECOND:
        acc_2 = acc_2 * factor[:, None]
    if not ONES:
        total = total * factor
    return total, acc_1, acc_2


@triton.jit
def _add_block(
    s, v_1, v_2, m, total, acc_1, acc_2, factor,
    SECOND: tl.constexpr, ONES: tl.constexpr, LAZY: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One more block of keys: its scores s, to be scaled by factor, and values v.

    m       [ROWS] the exponent that all is relative to: in units of log2, the largest scaled score so far, or with LAZY
            at most 8 less, since a half holds 2^8 as well as 1
    total   [ROWS] the sum of the weights, without ONES
    acc     [ROWS, …] the weighted values
    """
    top = tl.maximum(m, tl.max(s, 1) * factor)
    if MASK:
        # A row without a score has -inf - -inf = NaN else.
        top = tl.maximum(top, -3e38)
    if LAZY:
        if tl.max(top - m, 0) > 8.0:
            total, acc_1, acc_2 = _shrink(top, m, total, acc_1, acc_2, SECOND, ONES)
            m = top
    else:
        total, acc_1, acc_2 = _shrink(top, m, total, acc_1, acc_2, SECOND, ONES)
        m = top
    # Scaling inside of the exponent is one fused multiply-add, and leaves q unrounded.
    p = tl.exp2(s * factor - m[:, None])
    if not ONES:
        total += tl.sum(p, 1)
    p = p.to(v_1.dtype)
    acc_1 = tl.dot(p, v_1, acc_1, input_precision="ieee")
    if SECOND:
        acc_2 = tl.dot(p, v_2, acc_2, input_precision="ieee")
    return m, total, acc_1, acc_2


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_keys", "num_heads", "num_c8", "q_batch", "q_row", "q_head",
        "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head",
        "mask_batch", "mask_head", "mask_row", "mask_key", "factor",
    ]
)  # fmt: skip
def flash(
    q, k, v, mask, ones, out, num_rows, num_keys, num_heads, num_c8,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    mask_batch, mask_head, mask_row, mask_key, factor,
    K_1: tl.constexpr, K_2: tl.constexpr, V_1: tl.constexpr, V_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ONES: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    """out[b, n, h] = Σₘ softmaxₘ(factor·ln2·q[b, n, h]·k[b, m, h])·v[b, m, h], a block of keys after the other.

    num_c8 and the strides are counted in units of 8 elements, those of the mask in elements: multiplying them here is
    what proves to the compiler that eight elements share one mask and one 16-byte address.

    K_1, K_2   widths of the two parts of q and k; K_2 0: one part, padded
    V_1, V_2   widths of the two parts of v; V_2 0: one part, of which each program of axis 2 makes its own columns
    MASK       0: none; 1: of booleans; 2: to be added
    ONES       the first padded column of v reads 1, so that the product with v also sums the weights
    LAZY       what was summed is rescaled only when the largest score has grown by more than 2^8
    """
    channels = num_c8 * 8
    first_row = tl.program_id(0) * ROWS
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    keys = tl.arange(0, KEYS)
    c_k1 = tl.arange(0, K_1)
    c_k2 = K_1 + tl.arange(0, K_2 if K_2 else 16)
    c_v1 = tl.program_id(2) * V_1 + tl.arange(0, V_1)
    c_v2 = V_1 + tl.arange(0, V_2 if V_2 else 16)
    in_k1 = (c_k1 < channels)[None, :]
    in_k2 = (c_k2 < channels)[None, :]
    in_v1 = (c_v1 < channels)[None, :]
    in_v2 = (c_v2 < channels)[None, :]

    q_rows = q + (batch * q_batch + head * q_head) * 8 + (rows.to(tl.int64) * q_row * 8)[:, None]
    in_rows = (rows < num_rows)[:, None]
    wait()
    q_1 = tl.load(q_rows + c_k1[None, :], mask=in_rows & in_k1, other=0.0)
    q_2 = q_1
    if K_2:
        q_2 = tl.load(q_rows + c_k2[None, :], mask=in_rows & in_k2, other=0.0)

    # Within a block 32-bit offsets; across blocks, heads and batch 64-bit ones.
    k += (batch * k_batch + head * k_head) * 8
    v += (batch * v_batch + head * v_head) * 8
    k_step = k_row.to(tl.int64) * 8
    v_step = v_row.to(tl.int64) * 8
    k_1 = (keys * k_row * 8)[:, None] + c_k1[None, :]
    k_2 = (keys * k_row * 8)[:, None] + c_k2[None, :]
    v_1 = (keys * v_row * 8)[:, None] + c_v1[None, :]
    v_2 = (keys * v_row * 8)[:, None] + c_v2[None, :]
    # Where the columns beyond the last one read 1 0 0 …: one line for all programs would be one bank of the cache.
    ones += (tl.program_id(0) + tl.program_id(1)) % 64 * 512
    if V_2:
        o = (c_v2 - channels)[None, :]
    else:
        o = (c_v1 - channels)[None, :]
    mask_rows = mask + (batch * mask_batch + head * mask_head + (rows.to(tl.int64) * mask_row)[:, None])

    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc_1 = tl.zeros((ROWS, V_1), tl.float32)
    acc_2 = tl.zeros((ROWS, V_2 if V_2 else 16), tl.float32)

    # Blocks before `whole` need no mask; some row looks at those before `last`.
    last = num_keys
    whole = num_keys // KEYS * KEYS
    if CAUSAL:
        last = tl.minimum(num_keys, first_row + ROWS)
        whole = tl.minimum(num_keys, first_row + 1) // KEYS * KEYS
    if MASK:
        whole = 0
    for start in tl.range(0, whole, KEYS):
        t_1, t_2 = _load_keys(k + start * k_step, k_1, k_2, True, in_k1, in_k2, K_2, False)
        s = _scores(q_1, q_2, t_1, t_2, 0.0, K_2, 0)
        u_1, u_2 = _load_values(v + start * v_step, ones, v_1, v_2, o, True, in_v1, in_v2, V_2, ONES, False)
        m, total, acc_1, acc_2 = _add_block(s, u_1, u_2, m, total, acc_1, acc_2, factor, V_2, ONES, LAZY, 0)
    for start in tl.range(whole, last, KEYS, num_stages=1):
        live = (start + keys < num_keys)[:, None]
        t_1, t_2 = _load_keys(k + start * k_step, k_1, k_2, live, in_k1, in_k2, K_2, True)
        u_1, u_2 = _load_values(v + start * v_step, ones, v_1, v_2, o, live, in_v1, in_v2, V_2, ONES, True)
        if MASK:
            bias = _bias(mask_rows, rows, start + keys, num_rows, num_keys, mask_key, factor, MASK)
            s = _scores(q_1, q_2, t_1, t_2, bias, K_2, MASK)
        else:
            s = _counting(_scores(q_1, q_2, t_1, t_2, 0.0, K_2, 0), rows, start + keys, num_keys, CAUSAL)
        m, total, acc_1, acc_2 = _add_block(s, u_1, u_2, m, total, acc_1, acc_2, factor, V_2, ONES, False, MASK)

    if ONES:
        if V_2:
            total = tl.sum(tl.where((c_v2 == channels)[None, :], acc_2, 0.0), 1)
        else:
            total = tl.sum(tl.where((c_v1 == channels)[None, :], acc_1, 0.0), 1)
    weight = _weight(total, MASK)
    to = out + ((batch * num_rows + rows) * num_heads + head)[:, None] * channels
    tl.store(to + c_v1[None, :], (acc_1 * weight).to(out.dtype.element_ty), mask=in_rows & in_v1)
    if V_2:
        tl.store(to + c_v2[None, :], (acc_2 * weight).to(out.dtype.element_ty), mask=in_rows & in_v2)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_keys", "num_heads", "num_c8", "q_batch", "q_row", "q_head",
        "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head",
        "mask_batch", "mask_head", "mask_row", "mask_key", "factor", "turns",
    ]
)  # fmt: skip
def flash_few_keys(
    q, k, v, mask, out, num_rows, num_keys, num_heads, num_c8,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    mask_batch, mask_head, mask_row, mask_key, factor, turns,
    K_1: tl.constexpr, K_2: tl.constexpr, V_1: tl.constexpr, V_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MORE_KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`flash` where all keys fit one block: k and v are read once, then `turns` blocks of rows pass by them.

    MORE_KEYS  keys in a second block, as 77 in 64 + 16, the first being full; 0: none
    STAGES     blocks of rows that are on their way at once
    """
    channels = num_c8 * 8
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    c_k1 = tl.arange(0, K_1)
    c_k2 = K_1 + tl.arange(0, K_2 if K_2 else 16)
    c_v1 = tl.arange(0, V_1)
    c_v2 = V_1 + tl.arange(0, V_2 if V_2 else 16)
    in_k1 = (c_k1 < channels)[None, :]
    in_k2 = (c_k2 < channels)[None, :]
    in_v1 = (c_v1 < channels)[None, :]
    in_v2 = (c_v2 < channels)[None, :]

    k += (batch * k_batch + head * k_head) * 8
    v += (batch * v_batch + head * v_head) * 8
    keys = tl.arange(0, KEYS)
    live = (keys < num_keys)[:, None] | (MORE_KEYS > 0)
    k_rows = (keys * k_row * 8)[:, None]
    v_rows = (keys * v_row * 8)[:, None]
    wait()
    t_1, t_2 = _load_keys(k + k_rows, c_k1[None, :], c_k2[None, :], live, in_k1, in_k2, K_2, not MORE_KEYS)
    u_1, u_2 = _load_keys(v + v_rows, c_v1[None, :], c_v2[None, :], live, in_v1, in_v2, V_2, not MORE_KEYS)
    more = KEYS + tl.arange(0, MORE_KEYS if MORE_KEYS else 16)
    if MORE_KEYS:
        live = (more < num_keys)[:, None]
        k_rows = (more * k_row * 8)[:, None]
        v_rows = (more * v_row * 8)[:, None]
        t_3, t_4 = _load_keys(k + k_rows, c_k1[None, :], c_k2[None, :], live, in_k1, in_k2, K_2, True)
        u_3, u_4 = _load_keys(v + v_rows, c_v1[None, :], c_v2[None, :], live, in_v1, in_v2, V_2, True)

    q += (batch * q_batch + head * q_head) * 8
    mask += batch * mask_batch + head * mask_head
    first = tl.program_id(0) * turns
    last = tl.minimum(first + turns, tl.cdiv(num_rows, ROWS))
    for block in tl.range(first, last, num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS)
        in_rows = (rows < num_rows)[:, None]
        q_rows = q + (rows.to(tl.int64) * q_row * 8)[:, None]
        q_1 = tl.load(q_rows + c_k1[None, :], mask=in_rows & in_k1, other=0.0)
        q_2 = q_1
        if K_2:
            q_2 = tl.load(q_rows + c_k2[None, :], mask=in_rows & in_k2, other=0.0)
        mask_rows = mask + (rows.to(tl.int64) * mask_row)[:, None]

        if MASK:
            bias = _bias(mask_rows, rows, keys, num_rows, num_keys, mask_key, factor, MASK)
            s = _scores(q_1, q_2, t_1, t_2, bias, K_2, MASK)
        else:
            s = _scores(q_1, q_2, t_1, t_2, 0.0, K_2, 0)
            if CAUSAL or not MORE_KEYS:
                s = _counting(s, rows, keys, num_keys, CAUSAL)
        top = tl.max(s, 1)
        if MORE_KEYS:
            if MASK:
                bias = _bias(mask_rows, rows, more, num_rows, num_keys, mask_key, factor, MASK)
                s_2 = _scores(q_1, q_2, t_3, t_4, bias, K_2, MASK)
            else:
                s_2 = _counting(_scores(q_1, q_2, t_3, t_4, 0.0, K_2, 0), rows, more, num_keys, CAUSAL)
            top = tl.maximum(top, tl.max(s_2, 1))
        top *= factor
        if MASK:
            top = tl.maximum(top, -3e38)

        p = tl.exp2(s * factor - top[:, None])
        total = tl.sum(p, 1)
        p = p.to(u_1.dtype)
        acc_1 = tl.dot(p, u_1, input_precision="ieee")
        if V_2:
            acc_2 = tl.dot(p, u_2, input_precision="ieee")
        if MORE_KEYS:
            p_2 = tl.exp2(s_2 * factor - top[:, None])
            total += tl.sum(p_2, 1)
            p_2 = p_2.to(u_1.dtype)
            acc_1 = tl.dot(p_2, u_3, acc_1, input_precision="ieee")
            if V_2:
                acc_2 = tl.dot(p_2, u_4, acc_2, input_precision="ieee")

        weight = _weight(total, MASK)
        to = out + ((batch * num_rows + rows) * num_heads + head)[:, None] * channels
        tl.store(to + c_v1[None, :], (acc_1 * weight).to(out.dtype.element_ty), mask=in_rows & in_v1)
        if V_2:
            tl.store(to + c_v2[None, :], (acc_2 * weight).to(out.dtype.element_ty), mask=in_rows & in_v2)


# ------------------------------------------------------------------------------------------------- launch parameters
@dataclass(frozen=True)
class Blocks:
    """One program makes `rows` rows of one head, `keys` keys at a time.

    split_k   q·k in two products of widths that are powers of two (80 = 64 + 16), else one, padded (80 in 128)
    split_v   p·v likewise
    columns   columns of v that one program makes; 0: all
    registers the most that a thread may use, so that more programs share a multiprocessor; 0: no limit
    single    `flash_few_keys`: all keys in one block, num_stages blocks of rows on their way
    more_keys, turns   see there; turns 0: one
    ones, lazy         see `flash`
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    split_k: bool = False
    split_v: bool = False
    columns: int = 0
    registers: int = 0
    single: bool = False
    more_keys: int = 0
    turns: int = 0
    ones: bool = False
    lazy: bool = False

    def widths(self, head: int) -> tuple[int, int, int, int]:
        """K_1, K_2, V_1, V_2 for heads of the class `head`."""
        values = (self.columns, 0) if self.columns else _parts(head, self.split_v)
        return *_parts(head, self.split_k), *values

    def holds(self, num_keys: int) -> bool:
        """Whether a single block holds that many keys, and they fill the first of two parts."""
        return (self.keys if self.more_keys else 1) <= num_keys <= self.keys + self.more_keys

    def shared_bytes(self, head: int, itemsize: int) -> int:
        """Shared memory of q and the pipeline of k and v."""
        k1, k2, v1, v2 = self.widths(head)
        q, keys = self.rows, self.keys + self.more_keys
        if not self.single:
            keys *= self.num_stages
        elif self.num_stages > 1:
            # One more for what is being multiplied.
            q *= self.num_stages + 1
        return (q * (k1 + k2) + keys * (k1 + k2 + v1 + v2)) * itemsize


HEADS = (40, 64, 80, 128, 160, 256, 512)
"""Classes of heads: one of d channels, a multiple of 8, runs in the first class that is not smaller."""

MASKED_HEADS = (64, 128)
"""The same where there is a mask: what has one are the short sequences of text encoders."""


@functools.cache
def head_class(channels: int, masked: bool = False) -> int:
    # A class of two parts is for heads that fill the first.
    classes = MASKED_HEADS if masked else tuple(h for h in HEADS if channels > h or _fills(h, channels))
    return next(h for h in classes if h >= channels)


def _fills(head: int, channels: int) -> bool:
    first, second = _parts(head, True)
    return not second or channels > first


def _parts(head: int, split: bool) -> tuple[int, int]:
    """Two widths that hold a head, or one: powers of two, at least 16."""
    padded = 1 << (head - 1).bit_length()
    first, rest = padded // 2, head - padded // 2
    if split and 2 * rest <= first:
        return first, max(16, 1 << (rest - 1).bit_length())
    return padded, 0


_BOTH = dict(split_k=True, split_v=True)
_TEXT = Blocks(64, 64, 4, 3, single=True, more_keys=16)

HALF_BLOCKS: dict[int, tuple[Blocks, ...]] = {
    40: (Blocks(128, 64, 8, 3, ones=True, **_BOTH), replace(_TEXT, **_BOTH)),
    64: (Blocks(128, 64, 8, 3, registers=128), Blocks(64, 64, 4, 3), _TEXT),
    80: (
        Blocks(128, 64, 8, 3, registers=128, **_BOTH),
        Blocks(64, 64, 4, 3, **_BOTH),
        replace(_TEXT, **_BOTH),
        replace(_TEXT, num_stages=1, **_BOTH),
    ),
    128: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
    160: (
        Blocks(128, 64, 8, 3, **_BOTH),
        Blocks(64, 64, 4, 2, **_BOTH),
        Blocks(64, 32, 4, 2, **_BOTH),
        replace(_TEXT, rows=128, num_warps=8, **_BOTH),
        replace(_TEXT, num_stages=2, **_BOTH),
        Blocks(64, 64, 4, 1, single=True, **_BOTH),
    ),
    256: (Blocks(64, 32, 4, 2, columns=128),),
    512: (
        Blocks(64, 32, 4, 2, columns=256),
        Blocks(128, 16, 8, 3, columns=256),
        Blocks(32, 32, 4, 1, columns=128),
    ),
}
"""What is compiled for f16 and bf16, by class of head: what was best for some call on an H100, and what fits others."""

FLOAT_BLOCKS: dict[int, tuple[Blocks, ...]] = {
    40: (Blocks(32, 32, 8, 2, **_BOTH),),
    64: (Blocks(32, 32, 8, 2),),
    80: (Blocks(16, 16, 4, 2, **_BOTH),),
    128: (Blocks(16, 16, 8, 2),),
    160: (Blocks(16, 16, 8, 1, **_BOTH),),
}
"""The same for f32, which runs on the ordinary units: right, not fast.  They hold their operands in registers, so that
heads wider than 160 channels are left to others."""

MASKED_BLOCKS: dict[int, tuple[Blocks, ...]] = {
    64: (Blocks(64, 64, 4, 3), replace(_TEXT, num_stages=1)),
    128: (Blocks(64, 64, 4, 2),),
}
"""What is compiled for f16 and bf16 with every kind of mask."""

MAX_FLOAT_HEAD = max(FLOAT_BLOCKS)


def blocks_of(dtype: torch.dtype, head: int, masked: bool = False) -> tuple[Blocks, ...]:
    """The forms that are compiled for a class of heads."""
    if dtype == torch.float32:
        return FLOAT_BLOCKS.get(head, ())
    return MASKED_BLOCKS[head] if masked else HALF_BLOCKS[head]


Mask = torch.dtype | Literal["causal"] | None
"""Which keys a row may look at: the dtype of a mask that says so, those up to its own index, all."""


@functools.cache
def _form(dtype: torch.dtype, head: int, blocks: Blocks, mask: Mask) -> Variant:
    k1, k2, v1, v2 = blocks.widths(head)
    constants: dict[str, Any] = dict(K_1=k1, K_2=k2, V_1=v1, V_2=v2, ROWS=blocks.rows, KEYS=blocks.keys)
    constants |= dict(CAUSAL=mask == "causal", MASK=0 if mask in (None, "causal") else 1 if mask == torch.bool else 2)
    mask_dtype = mask if isinstance(mask, torch.dtype) else dtype
    arguments: tuple[Any, ...] = (dtype,) * 3 + (mask_dtype,)
    if blocks.single:
        constants |= dict(MORE_KEYS=blocks.more_keys, STAGES=blocks.num_stages)
        kernel, arguments = flash_few_keys, (*arguments, dtype, *(1,) * 17, 1.0, 1)
    else:
        constants |= dict(ONES=blocks.ones, LAZY=blocks.lazy)
        kernel, arguments = flash, (*arguments, dtype, dtype, *(1,) * 17, 1.0)
    return Variant(kernel, arguments, constants, blocks.num_warps, blocks.num_stages, blocks.registers or None)


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that `attention` launches with tensors of `dtype` and parameters among `candidates`."""
    for head in HEADS:
        yield from (_form(dtype, head, blocks, None) for blocks in blocks_of(dtype, head))
    masks: tuple[Mask, ...] = ("causal", torch.bool, dtype)
    for head in MASKED_HEADS:
        yield from (_form(dtype, head, blocks, mask) for blocks in blocks_of(dtype, head, True) for mask in masks)


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
    if scale is not None and not scale > 0:
        return f"scale {scale} is not positive"
    sizes, key_sizes = q.shape, k.shape
    if len(sizes) != 4 or key_sizes != v.shape or (sizes[0], *sizes[2:]) != (key_sizes[0], *key_sizes[2:]):
        return f"q {list(sizes)}, k {list(key_sizes)}, v {list(v.shape)} are not [B, N, H, D] and twice [B, M, H, D]"
    refused = _refuses_sizes(sizes, key_sizes[1], q.dtype) or _refuses_layout(q, k, v)
    if not refused and (causal or mask is not None) and sizes[3] > MASKED_HEADS[-1]:
        refused = f"heads of {sizes[3]} channels, more than {MASKED_HEADS[-1]}, with a mask"
    return refused or (None if mask is None else _refuses_mask(mask, q, key_sizes[1], causal))


def _refuses_sizes(sizes: torch.Size, num_keys: int, dtype: torch.dtype) -> str | None:
    batch, num_rows, heads, channels = sizes
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} is not f16, bf16 or f32"
    largest = MAX_FLOAT_HEAD if dtype == torch.float32 else HEADS[-1]
    if channels % 8 or not 0 < channels <= largest:
        return f"heads of {channels} channels: not a multiple of 8 up to {largest}"
    if num_keys == 0 or batch * heads > 65535 or max(num_rows, num_keys) > _INT32 - 1024:
        return f"{num_keys} keys, {batch} × {heads} heads of {num_rows} rows are beyond the grid"
    return None


def _refuses_layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    dtype, device = q.dtype, q.device
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != dtype or t.device != device:
            return f"{name} is {t.dtype} on {t.device}, q is {dtype} on {device}"
        if t.stride(3) != 1:
            return f"the channels of {name} are not dense"
        b, n, h = _strides(t)
        if (b | n | h) & 7 or min(b, n, h) < 0 or max(b, h) >> 3 > _INT32 or n >= 1 << 24:
            return f"strides {t.stride()} of {name} are not multiples of 8 within the bounds of 32 bits"
    return alignment_reason(q=q, k=k, v=v)


def _refuses_mask(mask: torch.Tensor, q: torch.Tensor, num_keys: int, causal: bool) -> str | None:
    batch, num_rows, heads, _ = q.shape
    if causal:
        return "a mask and causal together"
    if mask.dtype not in (torch.bool, q.dtype) or mask.device != q.device:
        return f"the mask is {mask.dtype} on {mask.device}, q is {q.dtype} on {q.device}"
    whole = (batch, heads, num_rows, num_keys)
    if not 2 <= mask.dim() <= 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], whole[::-1], strict=False)):
        return f"the mask {list(mask.shape)} does not broadcast to {list(whole)}"
    b, h, n, m = mask.expand(whole).stride()
    if max(b, h, n, (num_keys + 1024) * m) > _INT32:
        return f"strides {mask.stride()} of the mask are beyond 32 bits"
    return alignment_reason(mask=mask)


def _strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Elements between batches, rows and heads; 0 where there is one only, whose stride may be anything."""
    sizes, strides = t.shape, t.stride()
    return (
        strides[0] if sizes[0] > 1 else 0,
        strides[1] if sizes[1] > 1 else 0,
        strides[2] if sizes[2] > 1 else 0,
    )


_ONES: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def _ones(like: torch.Tensor) -> torch.Tensor:
    """64 lines of 1 0 0 0 0 0 0 0 and more zeros: what padded columns of v read.

    It is made once a device, unless a CUDA graph is being captured: memory of a graph holds nothing before a replay.
    """
    key = (like.device, like.dtype)
    found = _ONES.get(key)
    if found is None:
        found = torch.zeros(64, HEADS[-1], dtype=like.dtype, device=like.device)
        found[:, :1].fill_(1)
        if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
            _ONES[key] = found
    return found


def launch_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    mask: torch.Tensor | None = None,
    parameters: Blocks,
) -> Launch:
    """What makes `out` from tensors that `supports` takes."""
    batch, num_rows, heads, channels = q.shape
    head, num_keys = head_class(channels, causal or mask is not None), k.shape[1]
    if parameters.single and not parameters.holds(num_keys):
        raise InputError(f"{num_keys} keys do not fit one block of {parameters.keys}; choose among `candidates`")
    if parameters.ones and channels >= sum(parameters.widths(head)[2:]):
        raise InputError(f"{channels} channels leave no column for the ones; choose among `candidates`")
    variant = _form(q.dtype, head, parameters, mask.dtype if mask is not None else "causal" if causal else None)
    programs = -(-channels // parameters.columns) if parameters.columns else 1
    turns = parameters.turns or 1
    grid = (-(-num_rows // (parameters.rows * turns)), batch * heads, programs)
    factor = (channels**-0.5 if scale is None else float(scale)) * _LOG2_E
    strides = [s >> 3 for s in (*_strides(q), *_strides(k), *_strides(v))]
    strides += mask.expand(batch, heads, num_rows, num_keys).stride() if mask is not None else (0, 0, 0, 0)
    numbers = (num_rows, num_keys, heads, channels // 8, *strides, factor)
    given = (q, k, v, q if mask is None else mask)
    if parameters.single:
        return Launch(variant, grid, (*given, out, *numbers, turns))
    return Launch(variant, grid, (*given, _ones(q) if parameters.ones else q, out, *numbers))


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

    q           [B, N, H, D] f16 | bf16 | f32; channels dense, other strides multiples of 8
    k, v        [B, M, H, D], dtype and layout of q
    mask        broadcastable to [B, H, N, M]: bool (True: may be looked at) or dtype of q (added); None: all.  A row
                that may look at nothing is 0
    scale       factor of the scores, positive; None: 1/√D
    causal      row n sees columns up to n
    parameters  one of `candidates`
    out         [B, N, H, D] contiguous, written; None: a new one
    returns     [B, N, H, D] contiguous, dtype of q; softmax in f32
    cost        2·B·H·N·M·2·D FLOPs and B·H·N·M exponentials; reads q once, k and v once for each block of rows
    raises      InputError where `supports` gives a reason
    source      Dao 2023, arXiv:2307.08691; the lazy rescaling: FlashAttention-4, arXiv:2603.05451
    """
    if (reason := supports(q, k, v, mask, scale, causal)) is not None:
        raise InputError(f"attention: {reason}. Take another candidate.")
    if out is None:
        out = q.new_empty(q.shape)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous() or out.data_ptr() % 16:
        raise InputError(f"out {list(out.shape)} {out.dtype} is not contiguous {list(q.shape)} {q.dtype}")
    if out.numel():
        launch_of(q, k, v, out, scale, causal, mask=mask, parameters=parameters).run()
    return out


# -------------------------------------------------------------------------------------------------------- the choice
def candidates(
    num_rows: int,
    num_keys: int,
    channels: int,
    dtype: torch.dtype,
    device: Device,
    *,
    heads: int = 1,
    masked: bool = False,
) -> list[Blocks]:
    """Forms worth comparing: those that fit the shared memory, a single block wherever all keys fit one.

    heads   of all the batch
    masked  whether there is a mask, or a causal one
    """
    head = head_class(channels, masked)
    fit = [b for b in blocks_of(dtype, head, masked) if b.shared_bytes(head, dtype.itemsize) <= device.shared_bytes]
    if device.arch >= 90 and dtype != torch.float32:
        # Hopper's products take 64 rows; with fewer, those of older GPUs ran: 3.6 times slower.
        fit = [b for b in fit if b.rows >= 64]
    single = [b for b in fit if b.single and b.holds(num_keys) and _keeps_registers(b, head, device)]
    several = [b for b in fit if not b.single]
    if single:
        smallest = min(b.keys + b.more_keys for b in single)
        return [
            replace(b, turns=turns)
            for b in single
            if b.keys + b.more_keys == smallest
            for turns in TURNS
            if turns <= -(-num_rows // b.rows)
        ]
    # Some form must do, even one that spills a little.
    return [b for b in several if _keeps_registers(b, head, device)] or several[-1:]


TURNS = (0, 2, 4, 6)


def _keeps_registers(p: Blocks, head: int, device: Device) -> bool:
    """Whether a form compiles without spilling more than a few registers.

    From Hopper on q and k are read from the shared memory; before, they pass through registers.  The share is what
    compiling every form for sm_80 shows.
    """
    if device.arch >= 90:
        return True
    return p.rows * (p.keys + p.more_keys + sum(p.widths(head))) / (32 * p.num_warps) <= 0.7 * (p.registers or 255)


def estimate_us(
    batch: int,
    num_rows: int,
    num_keys: int,
    heads: int,
    channels: int,
    itemsize: int,
    parameters: Blocks,
    device: Device,
    *,
    causal: bool = False,
) -> float:
    """Time of one call in µs: that of the busiest multiprocessor, never less than the caches and the memory need.

    A program multiplies, then takes exponentials, then multiplies: two on one multiprocessor overlap little, and what
    they wait for each other within a block of keys only further warps hide.  Fitted to an H100 with heads of 40 to
    512 channels, 77 to 16,384 keys: within 15 %.
    """
    p, head = parameters, head_class(channels)
    columns = -(-channels // p.columns) if p.columns else 1
    programs = -(-num_rows // (p.rows * (p.turns or 1))) * batch * heads * columns
    busiest = -(-programs // device.num_sms)
    resident = min(busiest, _resident(p, head, itemsize, device))
    products = _product_clocks(p, head, itemsize, device)
    once = 2 * batch * heads * (num_rows + num_keys) * channels * itemsize
    if p.single:
        return LAUNCH_US + _single_us(p, products, busiest, resident, once, device)

    # Across the second-level cache goes what each program reads, to and from the memory each tensor once.
    read = programs * (num_keys * (channels + min(channels, sum(p.widths(head)[2:]))) + p.rows * channels) * itemsize
    read_us = read / (device.l2_tbs * 1e6)
    memory_us = once / (1e6 * (device.l2_tbs if once < device.l2_bytes / 2 else device.memory_tbs))
    steps = -(-num_keys // p.keys) * (0.5 if causal else 1.0) + (0.5 if causal else 0.0)
    step = _step_clocks(p, head, products, resident)
    busy_us = (2500 + busiest * steps * step) / clock_hz(device) * 1e6
    # One group of warps waits for the cache, the more the less of k and v are in the half of it that is near.
    far = min(1.0, 2 * batch * heads * num_keys * channels * itemsize / (device.l2_bytes / 2))
    busy_us += far * read_us * max(0.0, 8 / (resident * p.num_warps) - 1)
    return LAUNCH_US + max(busy_us, memory_us, read_us)


def _step_clocks(p: Blocks, head: int, products: float, resident: int) -> float:
    """Clocks of a multiprocessor for one block of rows and keys."""
    softmax = 0.67 * (p.rows * p.keys / 16 + _instructions(p, head) * p.num_warps / 4)
    warps = resident * p.num_warps
    _, k2, _, v2 = p.widths(head)
    # Products in two parts follow each other, which other programs do not hide.
    if k2 or v2:
        overlap, waits = (warps - 8) / 16, max(250.0, 2000 / warps)
    else:
        overlap, waits = (warps - 8) / 8, 2000 / warps * min(1.0, 8 / warps)
    overlap = max(0.0, min(0.5, overlap))
    return products + softmax - overlap * min(products, softmax) + waits


def _single_us(p: Blocks, products: float, busiest: int, resident: int, once: int, device: Device) -> float:
    """Time of `flash_few_keys`: programs that cannot all run at once start one after the other.

    Its time is that of reading and writing, then of the longer of two: what a program waits for, what it computes.
    """
    turns = p.turns or 1
    starts_us = -(-busiest // resident) * (SINGLE_START_US + SINGLE_STAGE_US * (p.num_stages - 1))
    busy_us = busiest * turns * SINGLE_PRODUCTS * products / clock_hz(device) * 1e6
    missed = min(1.0, max(0.0, 2 * once / device.l2_bytes - 1))
    rate = (1 - missed) / (SINGLE_CACHE * device.l2_tbs) + missed * (1 + SINGLE_TURN * turns) / device.memory_tbs
    return float((starts_us**1.5 + busy_us**1.5) ** (2 / 3) + once * rate * 1e-6)


SINGLE_START_US, SINGLE_STAGE_US = 1.5, 0.03
SINGLE_PRODUCTS = 3.0  # all that is done for a block of rows, over its products
SINGLE_CACHE = 0.66  # of the cache's rate
SINGLE_TURN = 0.12  # what lies in no cache is waited for in each turn


def _product_clocks(p: Blocks, head: int, itemsize: int, device: Device) -> float:
    """Clocks that the tensor cores need for one block of rows and keys.

    From Hopper on q comes out of the shared memory, 128 bytes in a clock, for each 64 rows and each block of keys
    again: with few keys that takes longer than the product.
    """
    k1, k2, v1, v2 = p.widths(head)
    keys = p.keys + p.more_keys
    peak = (device.float_tflops if itemsize == 4 else device.half_tflops) / 0.85
    rate = 2 * p.rows * keys / (peak * 1e12 / device.num_sms / clock_hz(device))
    shared = p.rows / 64 * (64 + keys) * (k1 + k2) * itemsize / 128 if device.arch >= 90 and itemsize == 2 else 0.0
    return max(rate * (k1 + k2), shared) + rate * (v1 + v2)


def clock_hz(device: Device) -> float:
    lanes = 64 if device.arch == 80 else 128
    return device.float_tflops * 1e12 / (2 * lanes * device.num_sms) / 0.85


def _instructions(p: Blocks, head: int) -> float:
    """Instructions of a warp for one block of rows and keys: counted in the machine code for sm_90."""
    threads, values = 32 * p.num_warps, sum(p.widths(head)[2:])
    each = 4.4 + (0.0 if p.ones else 1.2) + (0.5 if p.lazy else values / p.keys)
    return 110 + each * p.rows * p.keys / threads


def _resident(p: Blocks, head: int, itemsize: int, device: Device) -> int:
    """Programs that fit one multiprocessor at once."""
    k1, k2, v1, v2 = p.widths(head)
    threads = 32 * p.num_warps
    columns = (p.keys + p.more_keys) * (1.0 if p.single else 1.5) + v1 + v2 + (k1 + k2 if device.arch < 90 else 0)
    registers = min(p.registers or 255, (35 if p.single else 50) + p.rows * columns / threads)
    by_shared = (device.shared_bytes + 1024) // (p.shared_bytes(head, itemsize) + 1024)
    return max(1, min(int(65536 / (registers * threads)), by_shared))
