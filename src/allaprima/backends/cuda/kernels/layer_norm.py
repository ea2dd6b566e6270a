"""LayerNorm over the last axis, alone or with the residual addition in front of it.

A program holds whole rows in registers, so that each number is read once; where rows are short it holds several.
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

LAUNCH_US = 1.6
LATENCY_US = 0.6
"""One round of dependent loads from the second-level cache or the memory, with the reduction behind it."""

EFFICIENCY = 0.55, 0.85
"""Shares of the bandwidth of second-level cache and memory that are reached, as measured on an H100."""

ALIGN = 8
"""Elements that share one mask and one address, where the sizes allow it."""

MIN_COLS, MAX_COLS = 64, 8192

_INT32 = 2**31 - 1


# ----------------------------------------------------------------------------------------------------------- kernels
@triton.jit(
    do_not_specialize=[
        "stride_x", "stride_residual", "stride_total", "stride_out", "num_rows", "num_cols", "has_weight", "has_bias",
    ]
)  # fmt: skip
def normalise_rows(
    x, residual, weight, bias, total, out,
    stride_x, stride_residual, stride_total, stride_out, num_rows, num_cols, has_weight, has_bias, eps,
    ALIGN: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = layer_norm(x), or total = x + residual and out = layer_norm(total) (ADD), for ROWS rows of up to COLS.

    Strides and num_cols are in units of ALIGN elements: multiplying them here is what proves to the compiler that
    eight elements share one mask and one 16-byte address.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    num = num_cols * ALIGN
    live = columns < num
    mask = (row < num_rows)[:, None] & live[None, :]
    far = row.to(tl.int64)[:, None] * ALIGN
    wait()
    values = tl.load(x + far * stride_x + columns[None, :], mask=mask, other=0.0)
    gain = tl.load(weight + columns, mask=live & (has_weight != 0), other=1.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=live & (has_bias != 0), other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(residual + far * stride_residual + columns[None, :], mask=mask, other=0.0)
        # Rounded before the norm reads it: whoever reads the sum must see what was normalised.
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(total + far * stride_total + columns[None, :], values, mask=mask)
    wide = values.to(tl.float32)
    mean = tl.sum(wide, 1) / num
    away = tl.where(live[None, :], wide - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(away * away, 1) / num + eps)
    y = away * rstd[:, None] * gain[None, :] + shift[None, :]
    tl.store(out + far * stride_out + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------- launch parameters
@dataclass(frozen=True)
class Rows:
    """A program holds up to `values` numbers in each thread's registers, as whole rows of `least` … `most` columns."""

    values: int
    num_warps: int
    least: int
    most: int

    def rows(self, cols: int) -> int:
        """Rows of `cols` columns in one program."""
        return self.values * 32 * self.num_warps // cols

    def fits(self, cols: int) -> bool:
        """Whether this is for rows of `cols` columns, a power of two."""
        return self.least <= cols <= self.most


PARAMETERS = (Rows(16, 1, MIN_COLS, 128), Rows(16, 4, 256, 2048), Rows(16, 16, 4096, MAX_COLS))
"""Up to 8 rows in a program: more would leave small inputs to a few.  One form for each width: others were slower."""


def _cols(num_cols: int) -> int:
    return max(MIN_COLS, 1 << (num_cols - 1).bit_length())


@functools.cache
def _form(dtype: torch.dtype, p: Rows, align: int, add: bool, cols: int) -> Variant:
    constants = dict(ALIGN=align, ADD=add, ROWS=p.rows(cols), COLS=cols)
    return Variant(normalise_rows, (dtype,) * 6 + (1,) * 8 + (1.0,), constants, p.num_warps, 1)


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that the calls of this file launch with tensors of `dtype`."""
    cols = MIN_COLS
    while cols <= MAX_COLS:
        for p in PARAMETERS:
            if p.fits(cols):
                for align in (ALIGN, 1):
                    for add in (False, True):
                        yield _form(dtype, p, align, add, cols)
        cols *= 2


# ------------------------------------------------------------------------------------------------------------- calls
class _Work(NamedTuple):
    """What one call has to do: shared by `supports` and the launch."""

    num_rows: int
    num_cols: int
    strides: tuple[int, int, int, int]
    align: int


def _row_stride(name: str, x: torch.Tensor) -> int | str:
    stride = collapse(x.shape[:-1], x.stride()[:-1])
    if stride is None or stride < 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return f"the rows of {name} do not lie at one distance: shape {tuple(x.shape)}, strides {x.stride()}"
    if stride > _INT32:
        return f"the rows of {name} lie {stride} elements apart"
    return stride


def _work(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    parameters: Rows,
    total: torch.Tensor | None,
    out: torch.Tensor | None,
) -> _Work | str:
    """What is to be done, or why it cannot be."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{x.dtype} is none of float16, bfloat16, float32"
    num_cols = x.shape[-1] if x.dim() else 0
    if not 1 <= num_cols <= MAX_COLS or not parameters.fits(_cols(num_cols)):
        return f"rows of {num_cols} numbers do not fit {parameters}"
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != (num_cols,) or vector.dtype != x.dtype or vector.stride(0) != 1):
            return f"{name} must be [{num_cols}], contiguous and of {x.dtype}"
    strides = []
    for name, tensor in (("x", x), ("residual", residual), ("total", total), ("out", out)):
        if tensor is None:
            strides.append(num_cols)
            continue
        if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device:
            return f"{name} must be {tuple(x.shape)} of {x.dtype}, not {tuple(tensor.shape)} of {tensor.dtype}"
        found = _row_stride(name, tensor)
        if isinstance(found, str):
            return found
        strides.append(found)
    reason = alignment_reason(x=x, residual=residual, weight=weight, bias=bias, total=total, out=out)
    if reason:
        return reason
    align = ALIGN if all(s % ALIGN == 0 for s in (num_cols, *strides)) else 1
    first, second, third, fourth = strides
    return _Work(x.numel() // num_cols, num_cols, (first, second, third, fourth), align)


def supports(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    parameters: Rows,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> str | None:
    """Why the kernel cannot take these tensors with these parameters; None if it can."""
    found = _work(x, residual, weight, bias, parameters, total, out)
    return found if isinstance(found, str) else None


def launch_of(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    parameters: Rows,
    total: torch.Tensor | None,
    out: torch.Tensor,
) -> Launch:
    """The kernel of one call; residual and total are both given or both absent."""
    work = _work(x, residual, weight, bias, parameters, total, out)
    if isinstance(work, str):
        raise InputError(f"layer_norm: {work}. Take another candidate.")
    add, cols = residual is not None, _cols(work.num_cols)
    # Absent tensors are never read: any pointer of the right type will do.
    tensors = [x if t is None else t for t in (residual, weight, bias, total)]
    strides = [s // work.align for s in work.strides]
    has = (int(weight is not None), int(bias is not None))
    arguments = (x, *tensors, out, *strides, work.num_rows, work.num_cols // work.align, *has, eps)
    grid = (-(-work.num_rows // parameters.rows(cols)),)
    return Launch(_form(x.dtype, parameters, work.align, add, cols), grid, arguments)


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    parameters: Rows,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """layer_norm(x) over the last axis.

    x        [..., C] f16 | bf16 | f32, rows at one distance from each other; C ≤ 8192
    weight   [C] or None (1), bias [C] or None (0), dtype of x
    out      where the result goes; may be x itself
    returns  [..., C], dtype of x, contiguous; statistics in f32
    cost     reads once, writes once: 2·N·C·itemsize bytes
    raises   InputError where `supports` gives a reason
    source   Ba et al. 2016, arXiv:1607.06450
    """
    if tuple(normalized_shape) != tuple(x.shape[-1:]):
        raise InputError(f"layer_norm: only the last axis of {tuple(x.shape)}, not {tuple(normalized_shape)}.")
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch_of(x, None, weight, bias, eps, parameters=parameters, total=None, out=out).run()
    return out


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    parameters: Rows,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual and layer_norm(s) over the last axis.

    x        [..., C] f16 | bf16 | f32, rows at one distance from each other; residual alike; C ≤ 8192
    weight   [C] or None (1), bias [C] or None (0), dtype of x
    out      where s and its norm go; s may be x or residual itself
    returns  s and its norm, [..., C], dtype of x, contiguous; s is rounded first, statistics in f32
    cost     reads both once, writes both once: 4·N·C·itemsize bytes
    raises   InputError where `supports` gives a reason
    """
    total, normal = out or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if normal.numel():
        launch_of(x, residual, weight, bias, eps, parameters=parameters, total=total, out=normal).run()
    return total, normal


# ------------------------------------------------------------------------------------------------------------ choice
def estimate_us(
    num_rows: int, num_cols: int, itemsize: int, parameters: Rows, device: Device, add: bool = False
) -> float:
    """Time of one call: a launch, then rounds of programs over the multiprocessors, never faster than the bytes.

    What an earlier kernel wrote is taken to be in the second-level cache where it fits half of that.
    """
    p, cols = parameters, _cols(num_cols)
    if num_cols > MAX_COLS or not p.fits(cols):
        return math.inf
    num_bytes = (4 if add else 2) * num_rows * num_cols * itemsize
    in_cache, in_memory = EFFICIENCY
    fits = num_bytes <= device.l2_bytes // 2
    rate = 1e6 * (device.l2_tbs * in_cache if fits else device.memory_tbs * in_memory)  # bytes per µs
    # Registers limit a multiprocessor to about 32 warps, and some hardware to 16 programs.
    resident = device.num_sms * min(16, 32 // p.num_warps)
    programs = -(-num_rows // p.rows(cols))
    waves = -(-programs // resident)
    # Warps of one row meet at two barriers.
    latency = LATENCY_US * (1.0 if p.num_warps == 1 else 1.2)
    return LAUNCH_US + latency + max((waves - 1) * latency, num_bytes / rate)


def candidates(num_rows: int, num_cols: int, device: Device) -> list[Rows]:
    """The parameters that can take these sizes."""
    return [p for p in PARAMETERS if num_cols <= MAX_COLS and p.fits(_cols(num_cols))]
