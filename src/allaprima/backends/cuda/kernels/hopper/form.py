"""Forms of kernels in Gluon, and the tiles that they are given."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..variant import Variant

ARCH = 90
"""The one compute capability that these kernels are for."""

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Tile:
    """What the bulk copy engine brings to the shared memory at once.

    dtype   of the tensor
    shape   of the tile, powers of two, an axis for each of the tensor's; what lies outside of the tensor reads zero
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @functools.cached_property
    def layout(self) -> NVMMASharedLayout:
        """In the shared memory: swizzled over as many bytes as a row has, 128 at most."""
        swizzle = min(128, self.shape[-1] * self.dtype.itemsize)
        return NVMMASharedLayout(swizzle, 8 * self.dtype.itemsize, len(self.shape))

    @property
    def type(self) -> str:
        return f"tensordesc<{_TYPES[self.dtype]}[{', '.join(map(str, self.shape))}],{self.layout!r}>"

    def of(self, tensor: Any) -> TensorDescriptor:
        """The descriptor of a tensor, last axis dense, other strides multiples of 16 bytes."""
        # The stride of an axis that is never stepped along may be anything; the copy engine wants a valid one.
        stride = [s if n > 1 else 16 for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
        return TensorDescriptor(tensor, list(tensor.shape), [*stride, 1], list(self.shape), self.layout)


@dataclass(frozen=True)
class Form(Variant):
    """A kernel in Gluon; its arguments may be tiles, for descriptors.

    num_warps  of the part of the program that is not specialised
    registers  of a thread when the program starts; None: as many as one program on a multiprocessor may have
    """

    @property
    def name(self) -> str:
        return f"hopper.{super().name}"

    @property
    def options(self) -> dict[str, int]:
        return {k: v for k, v in super().options.items() if k != "num_stages"}  # the kernels' own constants say that

    @staticmethod
    def _source() -> Any:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource

    @staticmethod
    def _type(argument: Any) -> str:
        return argument.type if isinstance(argument, Tile) else Variant._type(argument)

    @staticmethod
    def _shown(argument: Any) -> Any:
        return argument.of(_Shown(argument)) if isinstance(argument, Tile) else argument


class _Shown:
    """Stands for a tensor where only its kind counts."""

    def __init__(self, tile: Tile) -> None:
        self.dtype, self.shape = tile.dtype, tile.shape

    def stride(self) -> tuple[int, ...]:
        return (*(16 for _ in self.shape[1:]), 1)

    @staticmethod
    def data_ptr() -> int:
        return 0
