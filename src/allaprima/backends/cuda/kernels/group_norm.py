"""GroupNorm over channels-last pictures, with SiLU or without, over one tensor or two that stand side by side.

Three forms.  Held: one program holds all pixels of one group in registers, reads once and writes once; for few pixels.
Whole: one program walks through whole groups, reads them twice (the second time mostly from the first-level cache) and
writes them; for small pictures, where a launch costs more than the bytes.  Split: programs over (image, pixels, groups)
write partial statistics, others merge them, normalise and write; for large pictures.

Statistics are means and sums of squared deviations, merged after Chan et al. 1982: nothing cancels, there are no
atomics, and the order of additions depends on sizes and launch parameters only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Arguments of kernels are Triton's: Python never sees them.

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....errors import InputError
from ..device import Device
from .dependent import wait
from .strides import alignment_reason, collapse
from .variant import Launch, Variant

LAUNCH_US = 2.2
"""A kernel that does next to nothing, within a CUDA graph."""

HELD_US = 0.14, 0.25
"""1024 numbers that one program holds, from the load to the result: without SiLU and with it."""

STEP_US = 0.9, 1.45
"""One step of the loops of one program that walks alone, statistics and result: without SiLU and with it."""

PASS_US = 1.2
"""What each of two kernels waits for beside its bytes: the first loads, the exchanges between threads."""

SCAN_US, MERGE_US = 0.02, 0.04
"""Latency of adding up groups, for each column of a program; of merging partial statistics, for each part."""

EFFICIENCY = 0.55, 0.85
"""Shares of the bandwidth of second-level cache and memory that loads, conversions and SiLU reach together."""

ALIGN = 8
"""Elements that share one mask and one address, where the sizes allow it."""

MERGE, FINISH = 64, 1024
"""Most partial statistics of a group that the second kernel, and the one between, can merge."""

_INT32 = 2**31 - 1
_MAX_STEP = 2**20


# ----------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _source(first, second, boundary, step_1, step_2, channels, TWO: tl.constexpr):
    """Where each channel's first pixel lies, and how far its next one; `second` holds the channels from boundary."""
    if TWO:
        left = channels < boundary
        return tl.where(left, first + channels, second + (channels - boundary)), tl.where(left, step_1, step_2)
    else:
        return first + channels, step_1


@triton.jit
def _load(base, step, start, rows, end, live):
    """Pixels start + rows (below end) as f32, 0 outside."""
    pointers = base + start * step.to(tl.int64) + rows * step
    return tl.load(pointers, mask=(start + rows < end) & live, other=0.0).to(tl.float32)


@triton.jit
def _divided(x, by):
    """x / by, rounded once: of equal numbers, none is away from their mean.

    The fast division is wrong by two units of the last place, and `div_rn` takes a third more registers.
    """
    y = x / by
    return y + tl.fma(-y, by + tl.zeros_like(y), x) / by


@triton.jit
def _merged(mean, squares, count, other_mean, other_squares, other_count):
    """Statistics of two sets of numbers as those of both; the mean moves by a part of the gap, which rounds it less
    than adding means of full size does."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    gap = other_mean - mean
    return mean + gap * share, squares + other_squares + gap * gap * (count * share), total


@triton.jit
def _moments(
    first, second, boundary, step_1, step_2, begin, end, channels, live,
    COLS: tl.constexpr, SLOTS: tl.constexpr, UNROLL: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations [COLS] of each channel over the pixels begin … end - 1.

    Each of SLOTS rows of threads keeps statistics of its own over the UNROLL pixels of a step that it holds in
    registers, so that the loop has neither barriers nor shared memory; the rows are merged once, behind the loop.
    """
    # Threads lie along the outer axes and the middle one is in registers: sums over it need no other thread.
    slot = tl.arange(0, SLOTS)
    rows = tl.arange(0, UNROLL)[None, :, None] * SLOTS + slot[:, None, None]
    columns = channels[None, None, :]
    alive = live[None, None, :]
    mean = tl.zeros([SLOTS, COLS], tl.float32)
    squares = tl.zeros([SLOTS, COLS], tl.float32)
    base, step = _source(first, second, boundary, step_1, step_2, columns, TWO)
    for start in range(begin, end, UNROLL * SLOTS):
        x = _load(base, step, start, rows, end, alive)
        # Every step but the last is full, so what a slot has seen before needs no counting.
        count = (start - begin) // SLOTS * 1.0
        fresh = tl.minimum(tl.maximum((end - start - slot + SLOTS - 1) // SLOTS, 0), UNROLL).to(tl.float32)[:, None]
        here = tl.sum(x, 1) / tl.maximum(fresh, 1.0)
        away = tl.where(start + rows < end, x - here[:, None, :], 0.0)
        share = fresh / tl.maximum(count + fresh, 1.0)
        gap = here - mean
        squares += tl.sum(away * away, 1) + gap * gap * (count * share)
        mean += gap * share
    counts = tl.maximum((end - begin - slot + SLOTS - 1) // SLOTS, 0).to(tl.float32)[:, None]
    mean, squares, _ = tl.reduce((mean, squares, tl.broadcast_to(counts, [SLOTS, COLS])), 0, _merged)
    return mean, squares


@triton.jit
def _add_within(left, left_group, right, right_group):
    return tl.where(left_group == right_group, left + right, right), right_group


@triton.jit
def _over_groups(x, group, last):
    """The sum of x over its group, at every channel of the group; `last` is where the group's last channel is."""
    total, _ = tl.associative_scan((x, group), 0, _add_within)
    return tl.gather(total, last, 0)


@triton.jit
def _groups(mean, squares, pixels, local, width, COLS: tl.constexpr):
    """Statistics of channels -> of the groups that they form, at every channel [COLS]."""
    group = local // width
    last = tl.minimum((group + 1) * width, COLS) - 1
    # Relative to the first channel's mean the sum is small, and so is what rounding takes from it.
    pivot = tl.gather(mean, group * width, 0)
    shift = _divided(_over_groups(mean - pivot, group, last), width.to(tl.float32))
    center = pivot + shift
    apart = mean - pivot - shift
    return center, _over_groups(squares + apart * apart * pixels, group, last)


@triton.jit
def _merge(partial, row, live, num_parts, pixels_part, pixels, width, STEP: tl.constexpr):
    """Mean and sum of squared deviations of the groups whose partial statistics begin at partial + row.

    All of the at most STEP parts are read at once: the wait for them is paid once.
    """
    part = tl.arange(0, STEP)
    known = part < num_parts
    count = tl.where(known, tl.minimum(pixels_part, pixels - part * pixels_part), 0).to(tl.float32)
    pointers = partial + row[:, None] + part[None, :]
    mask = known[None, :] & live[:, None]
    means = tl.load(pointers, mask=mask, other=0.0)
    inner = tl.load(pointers + num_parts, mask=mask, other=0.0)
    mean = _divided(tl.sum(means * count[None, :], 1), pixels.to(tl.float32))
    apart = means - mean[:, None]
    return mean, tl.sum(inner + apart * apart * (count * width)[None, :], 1)


@triton.jit
def _affine(weight, bias, addend, channels, live, has_weight, has_bias, has_addend):
    gain = tl.load(weight + channels, mask=live & (has_weight != 0), other=1.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=live & (has_bias != 0), other=0.0).to(tl.float32)
    extra = tl.load(addend + channels, mask=live & (has_addend != 0), other=0.0).to(tl.float32)
    return gain, shift, extra


@triton.jit
def _finished(away, scale, shift, SILU: tl.constexpr):
    y = away * scale + shift
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _normalise(
    first, second, out, boundary, step_1, step_2, step_out, begin, end, channels, live, center, scale, shift,
    SLOTS: tl.constexpr, UNROLL: tl.constexpr, TWO: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, UNROLL)[None, :, None] * SLOTS + tl.arange(0, SLOTS)[:, None, None]
    columns = channels[None, None, :]
    alive = live[None, None, :]
    base, step = _source(first, second, boundary, step_1, step_2, columns, TWO)
    for start in range(begin, end, UNROLL * SLOTS):
        x = _load(base, step, start, rows, end, alive)
        y = _finished(x - center[None, None, :], scale[None, None, :], shift[None, None, :], SILU)
        pointers = out + start * step_out.to(tl.int64) + rows * step_out + columns
        tl.store(pointers, y.to(out.dtype.element_ty), mask=(start + rows < end) & alive)


@triton.jit(
    do_not_specialize=[
        "boundary", "image_1", "image_2", "image_out", "step_1", "step_2", "step_out", "image_addend",
        "has_weight", "has_bias", "has_addend", "pixels", "span",
    ]
)  # fmt: skip
def normalise_held(
    first, second, weight, bias, addend, out,
    boundary, image_1, image_2, image_out, step_1, step_2, step_out, image_addend,
    has_weight, has_bias, has_addend, pixels, span, eps,
    ALIGN: tl.constexpr, TWO: tl.constexpr, SILU: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All of it for one image of at most ROWS pixels and one group, of `span` channels.

    Strides, boundary and span are in units of ALIGN elements: multiplying them here is what proves to the compiler that
    eight elements share one mask and one 16-byte address.
    """
    image = tl.program_id(1).to(tl.int64)
    width = span * ALIGN
    local = tl.arange(0, COLS)
    live = local < width
    channels = tl.program_id(0) * width + local
    rows = tl.arange(0, ROWS)[:, None]
    mask = (rows < pixels) & live[None, :]
    base, step = _source(
        first + image * image_1 * ALIGN, second + image * image_2 * ALIGN, boundary * ALIGN, step_1 * ALIGN,
        step_2 * ALIGN, channels[None, :], TWO,
    )  # fmt: skip
    wait()
    x = tl.load(base + rows * step, mask=mask, other=0.0).to(tl.float32)
    gain, shift, extra = _affine(
        weight, bias, addend + image * image_addend * ALIGN, channels, live, has_weight, has_bias, has_addend
    )
    count = (pixels * width).to(tl.float32)
    # A constant moves the mean of its channel and nothing else: the addend costs no pass over the pixels.
    mean = tl.div_rn(tl.sum(tl.sum(x, 0) + extra * pixels.to(tl.float32), 0), count)
    away = tl.where(mask, x - (mean - extra)[None, :], 0.0)
    variance = tl.sum(tl.sum(away * away, 0), 0) / count
    y = _finished(away, (tl.rsqrt(variance + eps) * gain)[None, :], shift[None, :], SILU)
    pointers = out + image * image_out * ALIGN + rows * (step_out * ALIGN) + channels[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "boundary", "image_1", "image_2", "image_out", "step_1", "step_2", "step_out", "image_addend",
        "has_weight", "has_bias", "has_addend", "pixels", "channels_total", "span", "width",
    ]
)  # fmt: skip
def normalise_whole(
    first, second, weight, bias, addend, out,
    boundary, image_1, image_2, image_out, step_1, step_2, step_out, image_addend,
    has_weight, has_bias, has_addend, pixels, channels_total, span, width, eps,
    ALIGN: tl.constexpr, TWO: tl.constexpr, SILU: tl.constexpr,
    COLS: tl.constexpr, SLOTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """All of it for one image and the groups in `span` channels.

    Strides, boundary, span and channels_total are in units of ALIGN elements: multiplying them here is what proves to
    the compiler that eight elements share one mask and one 16-byte address.  width: channels of a group.
    """
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, COLS)
    low = tl.program_id(0) * span
    channels = low * ALIGN + local
    live = channels < tl.minimum(low + span, channels_total) * ALIGN
    first += image * image_1 * ALIGN
    second += image * image_2 * ALIGN
    out += image * image_out * ALIGN
    wait()
    gain, shift, extra = _affine(
        weight, bias, addend + image * image_addend * ALIGN, channels, live, has_weight, has_bias, has_addend
    )
    mean, squares = _moments(
        first, second, boundary * ALIGN, step_1 * ALIGN, step_2 * ALIGN, 0, pixels, channels, live,
        COLS, SLOTS, UNROLL, TWO,
    )  # fmt: skip
    # A constant moves the mean of its channel and nothing else: the addend costs no pass over the pixels.
    center, apart = _groups(mean + extra, squares, pixels.to(tl.float32), local, width, COLS)
    scale = tl.rsqrt(apart / (pixels.to(tl.float32) * width) + eps) * gain
    _normalise(
        first, second, out, boundary * ALIGN, step_1 * ALIGN, step_2 * ALIGN, step_out * ALIGN, 0, pixels,
        channels, live, center - extra, scale, shift, SLOTS, UNROLL, TWO, SILU,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "boundary", "image_1", "image_2", "step_1", "step_2", "image_addend", "has_addend",
        "pixels", "channels_total", "span", "width", "groups", "num_parts", "pixels_part",
    ]
)  # fmt: skip
def partial_statistics(
    first, second, addend, partial,
    boundary, image_1, image_2, step_1, step_2, image_addend, has_addend,
    pixels, channels_total, span, width, groups, num_parts, pixels_part,
    ALIGN: tl.constexpr, TWO: tl.constexpr,
    COLS: tl.constexpr, SLOTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Statistics of the groups in `span` channels over one part of the pixels -> partial[image, group, 2, part]."""
    image = tl.program_id(1).to(tl.int64)
    spans = tl.cdiv(channels_total, span)
    part = tl.program_id(0) // spans
    bundle = tl.program_id(0) % spans
    local = tl.arange(0, COLS)
    low = bundle * span
    channels = low * ALIGN + local
    live = channels < tl.minimum(low + span, channels_total) * ALIGN
    wait()
    extra = tl.load(
        addend + image * image_addend * ALIGN + channels, mask=live & (has_addend != 0), other=0.0
    ).to(tl.float32)  # fmt: skip
    begin = part * pixels_part
    end = tl.minimum(begin + pixels_part, pixels)
    mean, squares = _moments(
        first + image * image_1 * ALIGN, second + image * image_2 * ALIGN, boundary * ALIGN,
        step_1 * ALIGN, step_2 * ALIGN, begin, end, channels, live, COLS, SLOTS, UNROLL, TWO,
    )  # fmt: skip
    center, apart = _groups(mean + extra, squares, (end - begin).to(tl.float32), local, width, COLS)
    group = channels // width
    known = live & (local % width == 0)
    pointers = partial + (image * groups + group) * 2 * num_parts + part
    tl.store(pointers, center, mask=known)
    tl.store(pointers + num_parts, apart, mask=known)


@triton.jit(do_not_specialize=["num_parts", "pixels_part", "pixels", "width"])
def finish_statistics(partial, merged, num_parts, pixels_part, pixels, width, STEP: tl.constexpr):
    """partial[image·group, 2, part] -> merged[image·group, 2], one program each."""
    index = tl.program_id(0).to(tl.int64)
    row = index * 2 * num_parts + tl.arange(0, 1)
    wait()
    mean, squares = _merge(partial, row, row >= 0, num_parts, pixels_part, pixels, width, STEP)
    pointers = merged + index * 2 + tl.arange(0, 1)
    tl.store(pointers, mean)
    tl.store(pointers + 1, squares)


@triton.jit(
    do_not_specialize=[
        "boundary", "image_1", "image_2", "image_out", "step_1", "step_2", "step_out", "image_addend",
        "has_weight", "has_bias", "has_addend", "pixels", "channels_total", "width", "groups",
        "num_parts", "pixels_part", "num_tiles", "pixels_tile",
    ]
)  # fmt: skip
def normalise_tile(
    first, second, weight, bias, addend, partial, out,
    boundary, image_1, image_2, image_out, step_1, step_2, step_out, image_addend,
    has_weight, has_bias, has_addend, pixels, channels_total, width, groups,
    num_parts, pixels_part, num_tiles, pixels_tile, eps,
    ALIGN: tl.constexpr, TWO: tl.constexpr, SILU: tl.constexpr,
    COLS: tl.constexpr, SLOTS: tl.constexpr, UNROLL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge the partial statistics of the groups in COLS channels, then normalise one tile of the pixels."""
    # Backwards through images and pixels: what the statistics read last is still in the second-level cache.
    image = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    blocks = tl.cdiv(channels_total * ALIGN, COLS)
    tile = num_tiles - 1 - tl.program_id(0) // blocks
    channels = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    live = channels < channels_total * ALIGN
    wait()
    gain, shift, extra = _affine(
        weight, bias, addend + image * image_addend * ALIGN, channels, live, has_weight, has_bias, has_addend
    )
    row = (image * groups + channels // width) * 2 * num_parts
    mean, squares = _merge(partial, row, live, num_parts, pixels_part, pixels, width, STEP)
    scale = tl.rsqrt(squares / (pixels.to(tl.float32) * width) + eps) * gain
    begin = tile * pixels_tile
    _normalise(
        first + image * image_1 * ALIGN, second + image * image_2 * ALIGN, out + image * image_out * ALIGN,
        boundary * ALIGN, step_1 * ALIGN, step_2 * ALIGN, step_out * ALIGN,
        begin, tl.minimum(begin + pixels_tile, pixels), channels, live, mean - extra, scale, shift,
        SLOTS, UNROLL, TWO, SILU,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- launch parameters
@dataclass(frozen=True)
class Held:
    """One program holds one group, of more than half and up to all of `cols` channels, and up to `pixels` pixels."""

    cols: int
    pixels: int
    num_warps: int


@dataclass(frozen=True)
class Whole:
    """One program holds the groups in up to `cols` channels and walks through the pixels.

    unroll  16-byte loads that a thread has in flight
    """

    cols: int
    unroll: int
    num_warps: int

    def slots(self, cols: int) -> int:
        """Pixels that one load of all threads covers."""
        return 32 * self.num_warps * ALIGN // cols

    def depth(self, itemsize: int) -> int:
        """Pixels that a thread holds at once: half as many in f32, where one takes two loads."""
        return max(1, 2 * self.unroll // itemsize)


@dataclass(frozen=True)
class Split(Whole):
    """Statistics over `cols` channels and a part of the pixels, then a second kernel over tiles of `apply_cols`.

    programs  how many programs each kernel aims at: few long ones merge less, many short ones balance better
    """

    apply_cols: int = 64
    programs: int = 264


Parameters = Held | Whole


HELD = (Held(64, 64, 4), Held(64, 256, 8), Held(128, 64, 8))
WHOLE = (Whole(64, 4, 8), Whole(128, 4, 8))
SPLIT = (Split(128, 4, 8), Split(64, 4, 4, programs=528), Split(1024, 2, 8))
PARAMETERS: tuple[Parameters, ...] = HELD + WHOLE + SPLIT
"""64 columns hold one group of 40 channels, two of 20 or four of 10; 128 hold 120 of SD1.5's and SDXL's channels, or
all of a VAE's last level.  The widest is for groups of more than 128 channels."""

GENERAL = (Split(128, 1, 4), Split(1024, 1, 8))
"""What takes the place of these where channels or strides are no multiples of 8 elements: right, not fast."""


MODES = ((False, False), (False, True), (True, True))
"""(two sources, SiLU)"""


@functools.cache
def _held_form(dtype: torch.dtype, p: Held, two: bool, silu: bool) -> Variant:
    constants = dict(ALIGN=ALIGN, TWO=two, SILU=silu, COLS=p.cols, ROWS=p.pixels)
    return Variant(normalise_held, (dtype,) * 6 + (1,) * 13 + (1.0,), constants, p.num_warps, 1)


@functools.cache
def _whole_form(dtype: torch.dtype, p: Whole, two: bool, silu: bool) -> Variant:
    tile = dict(COLS=p.cols, SLOTS=p.slots(p.cols), UNROLL=p.depth(dtype.itemsize))
    constants = dict(ALIGN=ALIGN, TWO=two, SILU=silu) | tile
    return Variant(normalise_whole, (dtype,) * 6 + (1,) * 15 + (1.0,), constants, p.num_warps, 1)


@functools.cache
def _partial_form(dtype: torch.dtype, p: Split, align: int, two: bool) -> Variant:
    tile = dict(COLS=p.cols, SLOTS=p.slots(p.cols), UNROLL=p.depth(dtype.itemsize))
    arguments = (dtype,) * 3 + (torch.float32,) + (1,) * 14
    return Variant(partial_statistics, arguments, dict(ALIGN=align, TWO=two) | tile, p.num_warps, 1)


@functools.cache
def _finish_form() -> Variant:
    return Variant(finish_statistics, (torch.float32,) * 2 + (1,) * 4, dict(STEP=FINISH), 4, 1)


@functools.cache
def _tile_form(dtype: torch.dtype, p: Split, align: int, two: bool, silu: bool) -> Variant:
    tile = dict(COLS=p.apply_cols, SLOTS=p.slots(p.apply_cols), UNROLL=p.depth(dtype.itemsize), STEP=MERGE)
    arguments = (dtype,) * 5 + (torch.float32, dtype) + (1,) * 19 + (1.0,)
    return Variant(normalise_tile, arguments, dict(ALIGN=align, TWO=two, SILU=silu) | tile, p.num_warps, 1)


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that the calls of this file launch with tensors of `dtype`."""
    forms = [_finish_form()]
    for two, silu in MODES:
        forms += [_held_form(dtype, p, two, silu) for p in HELD]
        forms += [_whole_form(dtype, p, two, silu) for p in WHOLE]
        for align, split in ((ALIGN, SPLIT), (1, GENERAL)):
            for p in split:
                forms += [_partial_form(dtype, p, align, two), _tile_form(dtype, p, align, two, silu)]
    for number, form in enumerate(forms):
        if form not in forms[:number]:
            yield form


# ------------------------------------------------------------------------------------------------------------- calls
class _Picture(NamedTuple):
    """How a channels-last tensor is walked, in elements."""

    step: int  # from pixel to pixel
    image: int


class _Work(NamedTuple):
    """What one call has to do: shared by `supports` and the launches."""

    batch: int
    channels: int
    groups: int
    pixels: int
    first: _Picture
    second: _Picture
    out: _Picture
    boundary: int
    align: int
    bundle: int  # groups in one program
    parameters: Parameters


def _picture(name: str, x: torch.Tensor) -> _Picture | str:
    sizes, strides = x.shape, x.stride()
    pixels = math.prod(sizes[2:])
    step = collapse(sizes[2:], strides[2:])
    if step is None or (sizes[1] > 1 and strides[1] != 1):
        return f"{name} is not channels-last: shape {tuple(sizes)}, strides {tuple(strides)}"
    image = strides[0] if sizes[0] > 1 else 0
    if step > _MAX_STEP or image > _INT32 * ALIGN or pixels > _INT32 // 4 or step < 0:
        return f"{name} is too large: shape {tuple(sizes)}, strides {tuple(strides)}"
    return _Picture(step, image)


def _shape_reason(
    sources: Sequence[torch.Tensor], groups: int, vectors: dict[str, torch.Tensor | None], addend: torch.Tensor | None
) -> str | None:
    x = sources[0]
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{x.dtype} is none of float16, bfloat16, float32"
    if any(s.dim() < 2 or s.dtype != x.dtype or s.device != x.device for s in sources):
        return "sources must be [B, C, …], of one dtype and device"
    if any(s.shape[0] != x.shape[0] or s.shape[2:] != x.shape[2:] for s in sources) or len(sources) > 2:
        return f"sources must be one or two and alike but for channels, not {[tuple(s.shape) for s in sources]}"
    channels = sum(s.shape[1] for s in sources)
    if groups < 1 or channels % groups:
        return f"{channels} channels cannot form {groups} groups"
    if x.shape[0] > 65535:
        return f"batch {x.shape[0]} is above 65535"
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (channels,) or vector.dtype != x.dtype or vector.stride(0) != 1):
            return f"{name} must be [{channels}], contiguous and of {x.dtype}"
    if addend is not None and (
        addend.dim() != 2
        or addend.shape[0] not in (1, x.shape[0])
        or addend.shape[1] != channels
        or addend.dtype != x.dtype
        or addend.stride(1) != 1
    ):
        return f"addend must be [1 or {x.shape[0]}, {channels}], with unit stride and of {x.dtype}"
    return None


def _count(width: int, groups: int, p: Parameters, align: int) -> int:
    """Groups in one program: as many as fit of which each bundle begins at a multiple of `align` channels; or 0."""
    if isinstance(p, Held):
        return int(width % ALIGN == 0 and p.cols // 2 < width <= p.cols)
    unit = align // math.gcd(align, width)
    return min(p.cols // width, groups) // unit * unit


def _general(width: int) -> Split:
    """What runs where nothing is a multiple of eight."""
    return next((p for p in GENERAL if p.cols >= width), GENERAL[-1])


def _work(
    sources: Sequence[torch.Tensor],
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    parameters: Parameters,
    out: torch.Tensor | None,
    addend: torch.Tensor | None,
) -> _Work | str:
    """What is to be done, or why it cannot be."""
    reason = _shape_reason(sources, groups, dict(weight=weight, bias=bias), addend)
    reason = reason or alignment_reason(
        x=sources[0], second=sources[-1], weight=weight, bias=bias, addend=addend, out=out
    )
    if reason:
        return reason
    x, second = sources[0], sources[-1]
    channels = sum(s.shape[1] for s in sources)
    if out is not None and (out.shape != (x.shape[0], channels, *x.shape[2:]) or out.dtype != x.dtype):
        return f"out must be {(x.shape[0], channels, *x.shape[2:])} of {x.dtype}, not {tuple(out.shape)} of {out.dtype}"
    pixels = math.prod(x.shape[2:])
    pictures = []
    for name, tensor in (("x", x), ("second", second), ("out", out)):
        found = _Picture(channels, channels * pixels) if tensor is None else _picture(name, tensor)
        if isinstance(found, str):
            return found
        pictures.append(found)
    strides = [s for p in pictures for s in p]
    if addend is not None and addend.shape[0] > 1:
        strides.append(addend.stride(0))
    width = channels // groups
    aligned = all(s % ALIGN == 0 for s in (channels, x.shape[1], *strides))
    align = ALIGN if aligned and _count(width, groups, parameters, ALIGN) else 1
    if align == 1:
        parameters = _general(width)
    count = _count(width, groups, parameters, align)
    if not count:
        return f"groups of {width} channels do not fit {parameters.cols} columns"
    if isinstance(parameters, Held) and pixels > parameters.pixels:
        return f"{pixels} pixels do not fit the registers of {parameters}"
    if align == 1 and max(strides) > _INT32:
        return f"strides {strides} are too large for rows that are no multiple of {ALIGN} elements"
    first, other, result = pictures
    return _Work(x.shape[0], channels, groups, pixels, first, other, result, x.shape[1], align, count, parameters)


def supports(
    sources: Sequence[torch.Tensor],
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot take these tensors with these parameters; None if they can."""
    found = _work(sources, groups, weight, bias, parameters, out, addend)
    return found if isinstance(found, str) else None


def _parts(pixels: int, programs: int, others: int, tile: int) -> tuple[int, int]:
    """How many parts the pixels are cut into so that parts·others is about `programs`, and the pixels of a part."""
    wanted = max(1, min(-(-programs // others), -(-pixels // tile), FINISH))
    part = -(-pixels // (wanted * tile)) * tile
    return -(-pixels // part), part


def _empty(x: torch.Tensor, channels: int) -> torch.Tensor:
    """A channels-last tensor like x."""
    shape = (x.shape[0], channels, *x.shape[2:])
    if x.dim() == 4:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty((shape[0], *shape[2:], channels), dtype=x.dtype, device=x.device).movedim(-1, 1)


def is_laid_out(x: torch.Tensor) -> bool:
    """Whether x lies as a result of its shape would, so that the result may be written over it.

    Each element is read for the last time by the thread that then writes it: in the form of one kernel all of a group
    has gone into its statistics before; in the others, statistics are a kernel of their own.
    """
    return x.stride() == _empty(x.to("meta"), x.shape[1]).stride()


def launches_of(
    sources: Sequence[torch.Tensor],
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    silu: bool,
    parameters: Parameters,
    out: torch.Tensor,
    addend: torch.Tensor | None = None,
) -> tuple[Launch, ...]:
    """The kernels of one call in order; they share the partial statistics, which are allocated here."""
    work = _work(sources, groups, weight, bias, parameters, out, addend)
    if isinstance(work, str):
        raise InputError(f"group_norm: {work}. Take another candidate.")
    x, second = sources[0], sources[-1]
    two, a, width, p = len(sources) == 2, work.align, work.channels // groups, work.parameters
    # Absent vectors are never read: any pointer of the right type will do.
    vectors = [x if v is None else v for v in (weight, bias, addend)]
    has = [int(v is not None) for v in (weight, bias, addend)]
    extra = addend.stride(0) // a if addend is not None and addend.shape[0] > 1 else 0
    reading = (work.boundary // a, work.first.image // a, work.second.image // a)
    steps = (work.first.step // a, work.second.step // a)
    strides = (*reading, work.out.image // a, *steps, work.out.step // a, extra)
    total, span = work.channels // a, work.bundle * width // a
    spans = -(-total // span)
    if isinstance(p, Held):
        arguments = (x, second, *vectors, out, *strides, *has, work.pixels, span, eps)
        return (Launch(_held_form(x.dtype, p, two, silu), (spans, work.batch), arguments),)
    if not isinstance(p, Split):
        arguments = (x, second, *vectors, out, *strides, *has, work.pixels, total, span, width, eps)
        return (Launch(_whole_form(x.dtype, p, two, silu), (spans, work.batch), arguments),)

    depth = p.depth(x.element_size())
    num, part = _parts(work.pixels, p.programs, work.batch * spans, p.slots(p.cols) * depth)
    partial = torch.empty((work.batch, groups, 2, num), dtype=torch.float32, device=x.device)
    arguments = (x, second, vectors[2], partial, *reading, *steps, extra, has[2])
    arguments += (work.pixels, total, span, width, groups, num, part)
    launches = [Launch(_partial_form(x.dtype, p, a, two), (num * spans, work.batch), arguments)]
    if num > MERGE:
        merged = torch.empty((work.batch, groups, 2, 1), dtype=torch.float32, device=x.device)
        given = (partial, merged, num, part, work.pixels, width)
        launches.append(Launch(_finish_form(), (work.batch * groups,), given))
        partial, num, part = merged, 1, work.pixels
    blocks = -(-work.channels // p.apply_cols)
    tiles, tile = _parts(work.pixels, p.programs, work.batch * blocks, p.slots(p.apply_cols) * depth)
    arguments = (x, second, *vectors, partial, out, *strides, *has, work.pixels, total, width, groups)
    arguments += (num, part, tiles, tile, eps)
    launches.append(Launch(_tile_form(x.dtype, p, a, two, silu), (tiles * blocks, work.batch), arguments))
    return tuple(launches)


def _run(
    sources: Sequence[torch.Tensor],
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    parameters: Parameters,
    out: torch.Tensor | None,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    if out is None:
        out = _empty(sources[0], sum(s.shape[1] for s in sources))
    if out.numel():
        for launch in launches_of(
            sources, groups, weight, bias, eps, silu=silu, parameters=parameters, out=out, addend=addend
        ):
            launch.run()
    return out


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise each group over its channels and pixels, scale, shift.

    x        [B, C, …] f16 | bf16 | f32, channels-last, channels possibly a slice; C divisible by groups
    weight   [C] or None (1), bias [C] or None (0), dtype of x
    addend   [1 or B, C] or None (0): added to x first, unrounded
    returns  [B, C, …], dtype of x, channels-last; statistics in f32
    cost     reads x twice, writes once: 3·B·C·H·W·itemsize bytes
    out      where the result goes; may be x itself
    raises   InputError where `supports` gives a reason
    source   Wu & He 2018, arXiv:1803.08494; merging of statistics: Chan et al. 1982
    """
    return _run((x,), groups, weight, bias, eps, False, parameters, out, addend)


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(group_norm(x)), with the arguments, result and cost of `group_norm`."""
    return _run((x,), groups, weight, bias, eps, True, parameters, out, addend)


def group_norm_silu_cat(
    sources: Sequence[torch.Tensor],
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(group_norm(cat(sources, 1))) of one or two sources, else as `group_norm`; a group may straddle both."""
    return _run(sources, groups, weight, bias, eps, True, parameters, out, addend)


# ------------------------------------------------------------------------------------------------------------ choice
def estimate_us(
    batch: int,
    channels: int,
    pixels: int,
    groups: int,
    itemsize: int,
    parameters: Parameters,
    device: Device,
    silu: bool = True,
) -> float:
    """Time of one call: launches, then rounds of programs over the multiprocessors, never faster than the bytes.

    What an earlier kernel wrote is taken to be in the second-level cache where it fits half of that.
    """
    p, width = parameters, channels // groups
    count = _count(width, groups, p, ALIGN) or _count(width, groups, p, 1)
    if not count or (isinstance(p, Held) and pixels > p.pixels):
        return math.inf
    num_bytes, spans = batch * channels * pixels * itemsize, -(-groups // count)
    in_cache, in_memory = EFFICIENCY
    fits = 2 * num_bytes <= device.l2_bytes
    rate = 1e6 * (device.l2_tbs * in_cache if fits else device.memory_tbs * in_memory)  # bytes per µs
    rounds = -(-batch * spans // device.num_sms)
    if isinstance(p, Held):
        return LAUNCH_US + max(rounds * p.cols * p.pixels / 1024 * HELD_US[silu], 2 * num_bytes / rate)
    tile = p.slots(p.cols) * p.depth(itemsize)
    if not isinstance(p, Split):
        walk = rounds * -(-pixels // tile) * STEP_US[silu]
        return LAUNCH_US + SCAN_US * p.cols + max(walk, 3 * num_bytes / rate)
    num, _ = _parts(pixels, p.programs, batch * spans, tile)
    finish = LAUNCH_US if num > MERGE else 0.0
    # Lanes beyond the groups of a program are idle while it reads for the statistics.
    reads = 2 + p.cols / (count * width)
    latency = SCAN_US * p.cols + MERGE_US * min(num, MERGE)
    return 2 * (LAUNCH_US + PASS_US) + finish + latency + reads * num_bytes / rate


def candidates(
    batch: int, channels: int, pixels: int, groups: int, device: Device, itemsize: int = 2
) -> list[Parameters]:
    """The parameters that can take these sizes, without those that are never the best for them."""
    width = channels // groups
    fit = [p for p in PARAMETERS if channels % ALIGN == 0 and _count(width, groups, p, ALIGN)]
    if not fit:
        return [SPLIT[-1]]  # in whose place the general form runs
    held = [p for p in fit if isinstance(p, Held) and pixels <= p.pixels]
    walking = [p for p in fit if isinstance(p, Whole)]
    narrow = [p for p in walking if p.cols <= 128] or walking
    # Neither a program that walks through a megabyte alone, nor two kernels for what one program reads in a step.
    most = (1 << 20) // (pixels * itemsize) if pixels else 0
    sane = [
        p for p in narrow if (pixels > 256 if isinstance(p, Split) else _count(width, groups, p, ALIGN) * width <= most)
    ]
    return held[:1] + (sane or narrow)
