"""One compiled form of a Gluon kernel; what `variant.Variant` is to kernels in plain Triton."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..dependent import option

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
class Form:
    """What is fixed when a kernel is compiled.

    kernel     the function under @gluon.jit
    arguments  its arguments in order, without constants: a tile for a descriptor, a dtype for a pointer, an int or a
               float for a number (only its type counts)
    constants  the constexpr arguments
    num_warps  of the part of the program that is not specialised
    registers  of a thread when the program starts; None: as many as one program on a multiprocessor may have
    """

    kernel: Any
    arguments: tuple[Tile | torch.dtype | int | float, ...]
    constants: Mapping[str, Any]
    num_warps: int = 4
    registers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))

    @property
    def name(self) -> str:
        given = " ".join(f"{k}={v}" for k, v in self.constants.items())
        types = ",".join(_TYPES[a] for a in self.arguments if isinstance(a, torch.dtype))
        limit = "" if self.registers is None else f" registers={self.registers}"
        return f"hopper.{self.kernel.__name__}({types}) {given} warps={self.num_warps}{limit}"

    @functools.cached_property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch, beside the constants."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, **limit, **option(ARCH)}

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.kernel[grid](*arguments, **self.options, **self.constants)

    def warm_up(self) -> None:
        """Compile for the GPU at hand into Triton's cache, without launching."""
        given = [a.of(_Shown(a)) if isinstance(a, Tile) else a for a in self.arguments]
        self.kernel.warmup(*given, grid=(1,), **self.options, **self.constants)

    def compile_for(self, arch: int = ARCH) -> Any:
        """Compile without a GPU.  returns Triton's CompiledKernel"""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.experimental.gluon._runtime import GluonASTSource

        names = [p.name for p in self.kernel.params if p.name not in self.constants]
        given = dict(zip(names, self.arguments, strict=True))
        aligned = {
            (self.kernel.arg_names.index(n),): [["tt.divisibility", 16]]
            for n, a in given.items()
            if isinstance(a, torch.dtype)
        }
        constants = dict(self.constants)
        signature = {n: _type(a) for n, a in given.items()} | dict.fromkeys(constants, "constexpr")
        source = GluonASTSource(self.kernel, signature, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


class _Shown:
    """Stands for a tensor where only its kind counts."""

    def __init__(self, tile: Tile) -> None:
        self.dtype, self.shape = tile.dtype, tile.shape

    def stride(self) -> tuple[int, ...]:
        return (*(16 for _ in self.shape[1:]), 1)

    @staticmethod
    def data_ptr() -> int:
        return 0


def _type(argument: Tile | torch.dtype | int | float) -> str:
    if isinstance(argument, Tile):
        return argument.type
    if isinstance(argument, torch.dtype):
        return "*" + _TYPES[argument]
    return "fp32" if isinstance(argument, float) else "i32"
