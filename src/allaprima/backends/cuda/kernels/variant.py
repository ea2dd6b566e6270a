"""One compiled form of a kernel, and compiling it: for the GPU at hand, or for any other without having one.

Sizes are arguments, never constants: a kernel has as many forms as its file lists, and a new size compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from .dependent import option, option_here

ARCHES = (80, 86, 89, 90)
"""Compute capabilities for which every kernel is compiled in the tests."""

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Variant:
    """What is fixed when a kernel is compiled.

    kernel     the function under @triton.jit
    arguments  its arguments in order, without constants: a dtype for a pointer to such numbers, an int or a float for
               a number (only its type counts)
    constants  the tl.constexpr arguments
    registers  the most that a thread may use, so that more programs fit one multiprocessor; None: no limit
    """

    kernel: Any
    arguments: tuple[torch.dtype | int | float, ...]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    registers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))

    @property
    def name(self) -> str:
        given = " ".join(f"{k}={v}" for k, v in self.constants.items())
        types = ",".join(_TYPES[a] for a in self.arguments if isinstance(a, torch.dtype))
        limit = "" if self.registers is None else f" registers={self.registers}"
        return f"{self.kernel.__name__}({types}) {given} warps={self.num_warps} stages={self.num_stages}{limit}"

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told for any GPU."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @functools.cached_property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of a launch on any GPU."""
        return {**self.options, **self.constants}

    def warm_up(self) -> None:
        """Compile for the GPU at hand into Triton's cache, without launching."""
        self.kernel.warmup(*self.arguments, grid=(1,), **self.keywords, **option_here())

    def compile_for(self, arch: int) -> Any:
        """Compile for compute capability `arch` / 10; needs no GPU.  returns Triton's CompiledKernel"""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [p.name for p in self.kernel.params if p.name not in self.constants]
        signature = {n: _type(a) for n, a in zip(names, self.arguments, strict=True)}
        aligned = {
            (self.kernel.arg_names.index(n),): [["tt.divisibility", 16]]
            for n, a in zip(names, self.arguments, strict=True)
            if isinstance(a, torch.dtype)
        }
        constants = dict(self.constants)
        source = ASTSource(self.kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
        options = {**self.options, **option(arch)}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@dataclass(frozen=True)
class Launch:
    """One kernel in its compiled form, the number of programs, and what it is given."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def run(self) -> None:
        form = self.variant
        form.kernel[self.grid](*self.arguments, **form.keywords, **option_here())


def _type(argument: torch.dtype | int | float) -> str:
    if isinstance(argument, torch.dtype):
        return "*" + _TYPES[argument]
    return "fp32" if isinstance(argument, float) else "i32"
