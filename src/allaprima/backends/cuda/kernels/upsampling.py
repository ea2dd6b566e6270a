"""Nearest-neighbour upsampling with the 3×3 convolution behind it: both algebraic forms by the kernel of `convolution`.

Neither makes the large picture.  The four parities of row and column are four products over the small picture.  In the
plain form each has nine taps, some of which meet the same pixel; in the folded form four, whose weights are those sums.
A result is stored where it belongs at once: there is no pixel shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ....errors import InputError
from ....ops import upsampling as reference
from ..device import Device
from .convolution import (
    Geometry,
    Tile,
    Work,
    candidate_tiles,
    conv_launches,
    fits,
    give,
    library_us,
    refuses_parts,
    result,
    tile_us,
    tile_variants,
)
from .epilogue import LAUNCH_US, ceil_div, finish_us
from .variant import Launch, Variant


@dataclass(frozen=True)
class Upsample:
    """An upsampling by our kernel: the tile, and whether by the folded weight."""

    tile: Tile
    folded: bool

    @property
    def name(self) -> str:
        return f"{'folded' if self.folded else 'plain'} {self.tile.name}"


@dataclass(frozen=True)
class UpsampleLibrary:
    """The reference: ATen makes the large picture or shuffles the phases, cuDNN convolves."""

    folded: bool

    @property
    def name(self) -> str:
        return f"cudnn {'folded' if self.folded else 'plain'}"


Parameters = Upsample | UpsampleLibrary


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Every form that the calls of this file launch with tensors of `dtype`: those of convolutions, none besides."""
    yield from tile_variants(dtype)


def _target(x: torch.Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    return 2 * x.shape[2] if height is None else height, 2 * x.shape[3] if width is None else width


def _lost(x: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that the target lacks to the double."""
    return 2 * x.shape[2] - rows, 2 * x.shape[3] - columns


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    folded: torch.Tensor | None,
    bias: torch.Tensor | None,
    height: int | None,
    width: int | None,
    parameters: Parameters,
) -> str | None:
    """Why `parameters` cannot make this upsampling; None: they can."""
    if parameters.folded and folded is None:
        return "the folded weight is missing"
    rows, columns = _target(x, height, width)
    if isinstance(parameters, UpsampleLibrary):
        return None
    if not set(_lost(x, rows, columns)) <= {0, 1} or rows < 1 or columns < 1:
        return "a target that is neither 2·n nor 2·n - 1"
    if tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        return "a weight that is not 3×3 over the channels of x"
    if refused := refuses_parts(parameters.tile):
        return refused
    used = (weight,) if folded is None or not parameters.folded else (weight, folded)
    return fits((x,), used, bias, None, (x.shape[0], weight.shape[0], rows, columns))


def launches_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    folded: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    parameters: Upsample,
) -> tuple[Launch, ...]:
    """What a call with these parameters launches, in order."""
    rows, columns = out.shape[2:]
    if not parameters.folded or folded is None:
        geometry = Geometry((3, 3), (1, 1), (1, 1), rows, columns, step=2, shift=1)
        return conv_launches((x,), weight, None, bias, None, out, geometry, parameters.tile)
    geometry = Geometry((2, 2), (1, 1), (1, 1), rows, columns, step=2, lost=_lost(x, rows, columns))
    return conv_launches((x,), folded, weight, bias, None, out, geometry, parameters.tile)


def upsample_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    folded: torch.Tensor | None,
    bias: torch.Tensor | None,
    height: int | None = None,
    width: int | None = None,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv2d(upsample_nearest(x, (height, width)), weight, bias, padding=1), in the form that `parameters` say.

    x        [B, C, H, W] f16 | bf16 | f32, channels-last
    weight   [K, C, 3, 3], folded [4·K, C, 2, 2] or None, both in channels-last storage, bias [K] or None, dtype of x
    height   2·H or 2·H - 1, None: 2·H; width likewise; other numbers by ATen alone
    out      [B, K, height, width] channels-last and dense, or None
    returns  out; accumulated in f32, rounded once
    cost     8·B·K·C·height·width FLOPs folded, 18·B·K·C·height·width plain
    raises   InputError where `supports` says so
    """
    reason = supports(x, weight, folded, bias, height, width, parameters)
    if reason:
        raise InputError(f"upsample_conv with {parameters.name}: {reason}")
    if isinstance(parameters, UpsampleLibrary):
        if parameters.folded and folded is not None:
            return give(reference.upsample_conv_folded(x, weight, folded, bias, height, width), out)
        return give(reference.upsample_conv(x, weight, folded, bias, height, width), out)
    out = result(out, (x.shape[0], weight.shape[0], *_target(x, height, width)), x)
    for launch in launches_of(x, weight, folded, bias, out, parameters):
        launch.run()
    return out


def upsample_conv_folded(
    x: torch.Tensor,
    weight: torch.Tensor,
    folded: torch.Tensor,
    bias: torch.Tensor | None,
    height: int | None = None,
    width: int | None = None,
    *,
    parameters: Parameters,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`upsample_conv` where the graph holds the folded weight; the parameters still choose the form."""
    return upsample_conv(x, weight, folded, bias, height, width, parameters=parameters, out=out)


# --------------------------------------------------------------------------------------------------------- estimate
@dataclass(frozen=True)
class Shape:
    """The sizes of an upsampling of [batch, channels, height, width] to [batch, outputs, rows, columns]."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    rows: int
    columns: int
    has_folded: bool = True

    @property
    def doubles(self) -> bool:
        return {2 * self.height - self.rows, 2 * self.width - self.columns} <= {0, 1}

    @property
    def off_grid(self) -> bool:
        return (self.rows, self.columns) != (2 * self.height, 2 * self.width)


def work_of(shape: Shape, folded: bool) -> Work:
    """The four products of an upsampling."""
    return Work(
        shape.batch * ceil_div(shape.rows, 2) * ceil_div(shape.columns, 2),
        shape.outputs,
        shape.channels,
        4 if folded else 9,
        4,
        shape.batch * shape.channels * shape.height * shape.width,
        shape.outputs * shape.channels * (16 if folded else 9),
    )


def candidates(shape: Shape, itemsize: int, device: Device) -> list[Parameters]:
    """What is worth comparing for these sizes; `supports` has the last word on the tensors."""
    found: list[Parameters] = [UpsampleLibrary(False)]
    if shape.doubles and shape.has_folded:
        found.append(UpsampleLibrary(True))
    if shape.doubles and shape.channels % 8 == 0 and shape.outputs % 8 == 0:
        for folded in (True, False) if shape.has_folded else (False,):
            found += [Upsample(t, folded) for t in candidate_tiles(work_of(shape, folded), itemsize, device)]
    return found


def estimate_us(shape: Shape, itemsize: int, parameters: Parameters, device: Device) -> float:
    """Time on `device`, µs, launches included."""
    work = work_of(shape, parameters.folded)
    num_out = shape.batch * shape.outputs * shape.rows * shape.columns
    if isinstance(parameters, Upsample):
        time = tile_us(work, itemsize, parameters.tile, device)
        if parameters.folded and shape.off_grid:
            # The edges take nine taps where the rest takes four; they begin first and may end last.
            edge = replace(work, positions=shape.batch * max(shape.rows, shape.columns), taps=9, phases=1)
            time = max(time, tile_us(edge, itemsize, parameters.tile, device))
        return time
    # ATen writes the large picture; or it shuffles the phases and cuts what is outside, in two slow passes.
    passed = num_out if parameters.folded else num_out * shape.channels // shape.outputs
    passes_us = (14 if parameters.folded else 1) * finish_us(1, passed, itemsize, itemsize, False, device)
    return LAUNCH_US + library_us(work, itemsize, device) + passes_us
