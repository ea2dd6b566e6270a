"""GroupNorm over channels-last pictures, with SiLU or without, over one tensor or two that stand side by side.

Two forms.  Whole: one program holds all pixels of its groups in registers: it reads once, writes once and is one
launch; for small pictures.  Split: programs over (image, pixels, groups) write partial statistics, others merge them
while their own pixels are on the way, normalise and write; for what needs the bandwidth of the whole GPU.

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
from .strides import alignment_reason, collapse
from .variant import Launch, Variant

LAUNCH_US = 2.0
"""A kernel that does next to nothing, within a CUDA graph."""

LATENCY_US = 1.0
"""What a program waits for, one after the other: its pixels, exchanges between threads, partial statistics."""

VALUES_US = 0.09
"""1024 numbers of one program: conversions, and SiLU at 16 special functions a cycle."""

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
    """Pixels start + rows (below end), 0 outside."""
    pointers = base + start * step.to(tl.int64) + rows * step
    return tl.load(pointers, mask=(start + rows < end) & live, other=0.0)


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
    following = _load(base, step, begin, rows, end, alive)
    for start in range(begin, end, UNROLL * SLOTS):
        # The next step's pixels are on the way while this one's are added up.
        x = following.to(tl.float32)
        following = _load(base, step, start + UNROLL * SLOTS, rows, end, alive)
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
    total = tl.div_rn(tl.sum(mean * counts, 0), (end - begin).to(tl.float32))
    apart = mean - total[None, :]
    return total, tl.sum(squares + apart * apart * counts, 0)


@triton.jit
def _members(channels, live, first, width, GROUPS: tl.constexpr):
    """Which channels form which group, counted from `first` on: [COLS, GROUPS].

    Sums over groups of any width are products with this matrix: one exchange between threads, where a scan takes many.
    """
    group = channels // width - first
    return (group[:, None] == tl.arange(0, GROUPS)[None, :]) & live[:, None]


@triton.jit
def _to_groups(x, members, GROUPS: tl.constexpr):
    """The sum over each group's channels; x is 0 at channels of none."""
    if GROUPS == 1:
        return tl.sum(x, 0, keep_dims=True)
    else:
        return tl.sum(tl.where(members, x[:, None], 0.0), 0)


@triton.jit
def _to_channels(x, members, COLS: tl.constexpr, GROUPS: tl.constexpr):
    """What belongs to each channel's group."""
    if GROUPS == 1:
        return tl.broadcast_to(x, [COLS])
    else:
        return tl.sum(tl.where(members, x[None, :], 0.0), 1)


@triton.jit
def _merge(partial, first, end, num_parts, pixels_part, pixels, width, SLOTS: tl.constexpr, STEP: tl.constexpr):
    """Mean and sum of squared deviations [SLOTS] of the groups first … end - 1, from their partial statistics.

    All of the at most STEP parts are read at once: the wait for them is paid once.
    """
    group = first + tl.arange(0, SLOTS)
    part = tl.arange(0, STEP)
    known = part < num_parts
    count = tl.where(known, tl.minimum(pixels_part, pixels - part * pixels_part), 0).to(tl.float32)
    pointers = partial + group[:, None] * 2 * num_parts + part[None, :]
    mask = known[None, :] & (group < end)[:, None]
    means = tl.load(pointers, mask=mask, other=0.0)
    inner = tl.load(pointers + num_parts, mask=mask, other=0.0)
    mean = tl.div_rn(tl.sum(means * count[None, :], 1), pixels.to(tl.float32))
    apart = means - mean[:, None]
    return mean, tl.sum(inner + apart * apart * (count * width)[None, :], 1)


@triton.jit
def _affine(weight, bias, addend, channels, live, has_weight, has_bias, has_addend):
    gain = tl.load(weight + channels, mask=live & (has_weight != 0), other=1.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=live & (has_bias != 0), other=0.0).to(tl.float32)
    extra = tl.load(addend + channels, mask=live & (has_addend != 0), other=0.0).to(tl.float32)
    return gain, shift, extra


@triton.jit
def _finished(x, center, scale, shift, SILU: tl.constexpr):
    y = (x - center) * scale + shift
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


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
    COLS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """All of it for one image of at most ROWS pixels and the groups in `span` channels.

    Strides, boundary, span and channels_total are in units of ALIGN elements: multiplying them here is what proves to
    the compiler that eight elements share one mask and one 16-byte address.  width: channels of a group.
    """
    image = tl.program_id(1).to(tl.int64)
    low = tl.program_id(0) * span
    channels = low * ALIGN + tl.arange(0, COLS)
    live = channels < tl.minimum(low + span, channels_total) * ALIGN
    rows = tl.arange(0, ROWS)[:, None]
    mask = (rows < pixels) & live[None, :]
    base, step = _source(
        first + image * image_1 * ALIGN, second + image * image_2 * ALIGN, boundary * ALIGN, step_1 * ALIGN,
        step_2 * ALIGN, channels[None, :], TWO,
    )  # fmt: skip
    x = tl.load(base + rows * step, mask=mask, other=0.0).to(tl.float32)
    gain, shift, extra = _affine(
        weight, bias, addend + image * image_addend * ALIGN, channels, live, has_weight, has_bias, has_addend
    )
    members = _members(channels, live, low * ALIGN // width, width, GROUPS)
    count = (pixels * width).to(tl.float32)
    mean = tl.div_rn(_to_groups(tl.sum(x, 0) + extra * pixels.to(tl.float32), members, GROUPS), count)
    # A constant moves the mean of its channel and nothing else: the addend costs no pass over the pixels.
    center = _to_channels(mean, members, COLS, GROUPS) - extra
    away = tl.where(mask, x - center[None, :], 0.0)
    variance = _to_groups(tl.sum(away * away, 0), members, GROUPS) / count
    scale = _to_channels(tl.rsqrt(variance + eps), members, COLS, GROUPS) * gain
    y = _finished(away, 0.0, scale[None, :], shift[None, :], SILU)
    pointers = out + image * image_out * ALIGN + rows * (step_out * ALIGN) + channels[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=mask)


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
    COLS: tl.constexpr, SLOTS: tl.constexpr, UNROLL: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Statistics of the groups in `span` channels over one part of the pixels -> partial[image, group, 2, part]."""
    image = tl.program_id(1).to(tl.int64)
    spans = tl.cdiv(channels_total, span)
    part = tl.program_id(0) // spans
    low = tl.program_id(0) % spans * span
    channels = low * ALIGN + tl.arange(0, COLS)
    live = channels < tl.minimum(low + span, channels_total) * ALIGN
    extra = tl.load(
        addend + image * image_addend * ALIGN + channels, mask=live & (has_addend != 0), other=0.0
    ).to(tl.float32)  # fmt: skip
    begin = part * pixels_part
    end = tl.minimum(begin + pixels_part, pixels)
    mean, squares = _moments(
        first + image * image_1 * ALIGN, second + image * image_2 * ALIGN, boundary * ALIGN,
        step_1 * ALIGN, step_2 * ALIGN, begin, end, channels, live, COLS, SLOTS, UNROLL, TWO,
    )  # fmt: skip
    group = low * ALIGN // width
    members = _members(channels, live, group, width, GROUPS)
    # A constant moves the mean of its channel and nothing else: the addend costs no pass over the pixels.
    mean += extra
    center = tl.div_rn(_to_groups(mean, members, GROUPS), width.to(tl.float32))
    apart = mean - _to_channels(center, members, COLS, GROUPS)
    squares = _to_groups(squares + apart * apart * (end - begin).to(tl.float32), members, GROUPS)
    slot = tl.arange(0, GROUPS)
    known = (slot * width < span * ALIGN) & (group + slot < groups)
    pointers = partial + (image * groups + group + slot) * 2 * num_parts + part
    tl.store(pointers, center, mask=known)
    tl.store(pointers + num_parts, squares, mask=known)


@triton.jit(do_not_specialize=["num_parts", "pixels_part", "pixels", "width"])
def finish_statistics(partial, merged, num_parts, pixels_part, pixels, width, STEP: tl.constexpr):
    """partial[image·group, 2, part] -> merged[image·group, 2], one program each."""
    index = tl.program_id(0).to(tl.int64)
    mean, squares = _merge(partial, index, index + 1, num_parts, pixels_part, pixels, width, 1, STEP)
    pointers = merged + index * 2 + tl.arange(0, 1)
    tl.store(pointers, mean)
    tl.store(pointers + 1, squares)


@triton.jit(
    do_not_specialize=[
        "boundary", "image_1", "image_2", "image_out", "step_1", "step_2", "step_out", "image_addend",
        "has_weight", "has_bias", "has_addend", "pixels", "channels_total", "span", "width", "groups",
        "num_parts", "pixels_part", "num_tiles", "pixels_tile",
    ]
)  # fmt: skip
def normalise_tile(
    first, second, weight, bias, addend, partial, out,
    boundary, image_1, image_2, image_out, step_1, step_2, step_out, image_addend,
    has_weight, has_bias, has_addend, pixels, channels_total, span, width, groups,
    num_parts, pixels_part, num_tiles, pixels_tile, eps,
    ALIGN: tl.constexpr, TWO: tl.constexpr, SILU: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge the partial statistics of the groups in `span` channels, then normalise one tile of the pixels."""
    # Backwards through images and pixels: what the statistics read last is still in the second-level cache.
    image = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    spans = tl.cdiv(channels_total, span)
    begin = (num_tiles - 1 - tl.program_id(0) // spans) * pixels_tile
    end = tl.minimum(begin + pixels_tile, pixels)
    low = tl.program_id(0) % spans * span
    channels = low * ALIGN + tl.arange(0, COLS)
    live = channels < tl.minimum(low + span, channels_total) * ALIGN
    rows = tl.arange(0, ROWS)[:, None]
    alive = live[None, :]
    base, step = _source(
        first + image * image_1 * ALIGN, second + image * image_2 * ALIGN, boundary * ALIGN, step_1 * ALIGN,
        step_2 * ALIGN, channels[None, :], TWO,
    )  # fmt: skip
    # The first pixels are on the way while the statistics are merged.
    x = _load(base, step, begin, rows, end, alive)
    gain, shift, extra = _affine(
        weight, bias, addend + image * image_addend * ALIGN, channels, live, has_weight, has_bias, has_addend
    )
    group = low * ALIGN // width
    mean, squares = _merge(
        partial + image * groups * 2 * num_parts, group, tl.minimum(tl.cdiv((low + span) * ALIGN, width), groups),
        num_parts, pixels_part, pixels, width, GROUPS, STEP,
    )  # fmt: skip
    members = _members(channels, live, group, width, GROUPS)
    center = (_to_channels(mean, members, COLS, GROUPS) - extra)[None, :]
    rstd = tl.rsqrt(squares / (pixels.to(tl.float32) * width) + eps)
    scale = (_to_channels(rstd, members, COLS, GROUPS) * gain)[None, :]
    for start in range(begin, end, ROWS):
        following = _load(base, step, start + ROWS, rows, end, alive)
        y = _finished(x.to(tl.float32), center, scale, shift[None, :], SILU)
        pointers = out + image * image_out * ALIGN + channels[None, :]
        pointers += start * (step_out.to(tl.int64) * ALIGN) + rows * (step_out * ALIGN)
        tl.store(pointers, y.to(out.dtype.element_ty), mask=(start + rows < end) & alive)
        x = following


# ------------------------------------------------------------------------------------------------- launch parameters
@dataclass(frozen=True)
class Whole:
    """One program holds up to `groups` groups in up to `cols` channels, and up to `pixels` pixels."""

    cols: int
    pixels: int
    groups: int
    num_warps: int


def _slots(cols: int) -> int:
    """Groups that a program tells apart: down to 4 channels a group, as long as the matrix of members is small."""
    return min(cols // 4, 8192 // cols)


@dataclass(frozen=True)
class Split:
    """Statistics over up to `cols` channels and a part of the pixels, then a second kernel over `apply_cols`.

    unroll    16-byte loads that a thread has in flight
    programs  how many programs each kernel aims at, ≤ FINISH: few long ones merge less, many short ones balance better
    """

    cols: int
    apply_cols: int
    unroll: int
    num_warps: int
    programs: int = 264

    @property
    def groups(self) -> int:
        """Groups in one program of the first kernel, at most."""
        return _slots(self.cols)

    def slots(self, cols: int) -> int:
        """Pixels that one load of all threads covers."""
        return 32 * self.num_warps * ALIGN // cols

    def depth(self, itemsize: int) -> int:
        """Pixels that a thread holds at once: half as many in f32, where one takes two loads."""
        return max(1, 2 * self.unroll // itemsize)

    def rows(self, cols: int, itemsize: int) -> int:
        """Pixels that a program holds at once."""
        return self.slots(cols) * self.depth(itemsize)


Parameters = Whole | Split

WHOLE = (
    Whole(64, 64, 1, 4), Whole(64, 256, 1, 8), Whole(64, 64, 16, 4), Whole(64, 256, 16, 8),
    Whole(128, 64, 1, 8), Whole(128, 256, 1, 16), Whole(128, 256, 32, 16),
)  # fmt: skip
SPLIT = (Split(128, 64, 4, 8), Split(128, 64, 4, 8, programs=528), Split(1024, 64, 2, 8))
PARAMETERS: tuple[Parameters, ...] = WHOLE + SPLIT
"""64 columns hold one group of 40 channels, two of 20 or four of 10; 128 hold 120 of SD1.5's and SDXL's channels, or
all of a VAE's last level.  The widest is for groups of more than 128 channels."""

GENERAL = (Split(128, 64, 1, 4), Split(1024, 64, 1, 8))
"""What takes the place of these where channels or strides are no multiples of 8 elements: right, not fast."""


MODES = ((False, False), (False, True), (True, True))
"""(two sources, SiLU)"""


@functools.cache
def _whole_form(dtype: torch.dtype, p: Whole, two: bool, silu: bool) -> Variant:
    constants = dict(ALIGN=ALIGN, TWO=two, SILU=silu, COLS=p.cols, ROWS=p.pixels, GROUPS=p.groups)
    return Variant(normalise_whole, (dtype,) * 6 + (1,) * 15 + (1.0,), constants, p.num_warps, 1)


@functools.cache
def _partial_form(dtype: torch.dtype, p: Split, align: int, two: bool) -> Variant:
    tile = dict(COLS=p.cols, SLOTS=p.slots(p.cols), UNROLL=p.depth(dtype.itemsize), GROUPS=p.groups)
    arguments = (dtype,) * 3 + (torch.float32,) + (1,) * 14
    return Variant(partial_statistics, arguments, dict(ALIGN=align, TWO=two) | tile, p.num_warps, 1)


@functools.cache
def _finish_form() -> Variant:
    return Variant(finish_statistics, (torch.float32,) * 2 + (1,) * 4, dict(STEP=FINISH), 4, 1)


@functools.cache
def _tile_form(dtype: torch.dtype, p: Split, align: int, two: bool, silu: bool) -> Variant:
    tile = dict(COLS=p.apply_cols, ROWS=p.rows(p.apply_cols, dtype.itemsize), GROUPS=_slots(p.apply_cols), STEP=MERGE)
    arguments = (dtype,) * 5 + (torch.float32, dtype) + (1,) * 20 + (1.0,)
    return Variant(normalise_tile, arguments, dict(ALIGN=align, TWO=two, SILU=silu) | tile, p.num_warps, 1)


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that the calls of this file launch with tensors of `dtype`."""
    forms = [_finish_form()]
    for two, silu in MODES:
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
    unit = align // math.gcd(align, width)
    return min(p.cols // width, p.groups, groups) // unit * unit


def _apply_span(width: int, p: Split, align: int) -> int:
    """Channels in one program of the second kernel: all of its columns, unless groups are too many for that."""
    cols, slots = p.apply_cols, _slots(p.apply_cols)
    touched = cols // width if cols % width == 0 else (cols - 2) // width + 2
    unit = align // math.gcd(align, width)
    return cols if touched <= slots else max(slots // unit * unit, 1) * width


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
    if isinstance(parameters, Whole) and pixels > parameters.pixels:
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
    if isinstance(p, Whole):
        arguments = (x, second, *vectors, out, *strides, *has, work.pixels, total, span, width, eps)
        return (Launch(_whole_form(x.dtype, p, two, silu), (spans, work.batch), arguments),)

    num, part = _parts(work.pixels, p.programs, work.batch * spans, p.rows(p.cols, x.element_size()))
    partial = torch.empty((work.batch, groups, 2, num), dtype=torch.float32, device=x.device)
    arguments = (x, second, vectors[2], partial, *reading, *steps, extra, has[2])
    arguments += (work.pixels, total, span, width, groups, num, part)
    launches = [Launch(_partial_form(x.dtype, p, a, two), (num * spans, work.batch), arguments)]
    if num > MERGE:
        merged = torch.empty((work.batch, groups, 2, 1), dtype=torch.float32, device=x.device)
        given = (partial, merged, num, part, work.pixels, width)
        launches.append(Launch(_finish_form(), (work.batch * groups,), given))
        partial, num, part = merged, 1, work.pixels
    span = _apply_span(width, p, a) // a
    spans = -(-total // span)
    tiles, tile = _parts(work.pixels, 2 * p.programs, work.batch * spans, p.rows(p.apply_cols, x.element_size()))
    arguments = (x, second, *vectors, partial, out, *strides, *has, work.pixels, total, span, width, groups)
    arguments += (num, part, tiles, tile, eps)
    launches.append(Launch(_tile_form(x.dtype, p, a, two, silu), (tiles * spans, work.batch), arguments))
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
    batch: int, channels: int, pixels: int, groups: int, itemsize: int, parameters: Parameters, device: Device
) -> float:
    """Time of one call: launches, then rounds of programs over the multiprocessors, never faster than the bytes.

    What an earlier kernel wrote is taken to be in the second-level cache where it fits half of that.
    """
    p, width = parameters, channels // groups
    count = _count(width, groups, p, ALIGN) or _count(width, groups, p, 1)
    if not count or (isinstance(p, Whole) and pixels > p.pixels):
        return math.inf
    num_bytes, spans = batch * channels * pixels * itemsize, -(-groups // count)
    in_cache, in_memory = EFFICIENCY
    fits = 2 * num_bytes <= device.l2_bytes
    rate = 1e6 * (device.l2_tbs * in_cache if fits else device.memory_tbs * in_memory)  # bytes per µs
    if isinstance(p, Whole):
        rounds = -(-batch * spans // device.num_sms)
        work = rounds * p.cols * p.pixels / 1024 * VALUES_US
        exchanges = LATENCY_US * (1.0 if p.groups == 1 else 1.4)
        return LAUNCH_US + exchanges + max(work, 2 * num_bytes / rate)
    num, _ = _parts(pixels, p.programs, batch * spans, p.rows(p.cols, itemsize))
    # Fewer programs than this leave multiprocessors without loads in flight.
    idle = max(1.0, 2 * device.num_sms / (batch * spans * num))
    return (2 + (num > MERGE)) * (LAUNCH_US + LATENCY_US) + (idle + 2) * num_bytes / rate


def candidates(
    batch: int, channels: int, pixels: int, groups: int, device: Device, itemsize: int = 2
) -> list[Parameters]:
    """The parameters that can take these sizes, without those that are never the best for them."""
    width = channels // groups
    align = ALIGN if channels % ALIGN == 0 else 1
    fit = [p for p in PARAMETERS if _count(width, groups, p, align)]
    whole = [p for p in fit if isinstance(p, Whole) and pixels <= p.pixels] if align == ALIGN else []
    # Telling groups apart costs exchanges between threads, pixels that are not there cost registers and time.
    whole = [p for p in whole if p.groups == 1 or _count(width, groups, p, align) > 1]
    least = min((p.pixels for p in whole), default=None)
    split = [p for p in fit or SPLIT if isinstance(p, Split) and (least is None or pixels > 64)]
    narrow = [p for p in split if p.cols <= 128] or split
    return [p for p in whole if p.pixels == least] + narrow
