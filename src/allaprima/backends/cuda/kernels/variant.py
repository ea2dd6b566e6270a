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
    arguments: tuple[Any, ...]
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
        short = {"num_warps": "warps", "num_stages": "stages", "maxnreg": "registers"}
        told = " ".join(f"{short[k]}={v}" for k, v in self.options.items())
        return f"{self.kernel.__name__}({types}) {given} {told}"

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told for any GPU."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @functools.cached_property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of a launch on any GPU."""
        return {**self.options, **self.constants}

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.kernel[grid](*arguments, **self.keywords, **option_here())

    def warm_up(self) -> Any:
        """Compile for the GPU at hand into Triton's cache, without launching.  returns Triton's CompiledKernel"""
        return self.kernel.warmup(*map(self._shown, self.arguments), grid=(1,), **self.keywords, **option_here())

    def compile_for(self, arch: int) -> Any:
        """Compile for compute capability `arch` / 10; needs no GPU.  returns Triton's CompiledKernel"""
        import triton
        from triton.backends.compiler import GPUTarget

        names = [p.name for p in self.kernel.params if p.name not in self.constants]
        given = dict(zip(names, self.arguments, strict=True))
        aligned = {
            (self.kernel.arg_names.index(n),): [["tt.divisibility", 16]]
            for n, a in given.items()
            if isinstance(a, torch.dtype)
        }
        constants = dict(self.constants)
        signature = {n: self._type(a) for n, a in given.items()} | dict.fromkeys(constants, "constexpr")
        source = self._source()(self.kernel, signature, constants, aligned)
        options = {**self.options, **option(arch)}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    @staticmethod
    def _source() -> Any:
        """The class of what Triton's compiler takes."""
        from triton.compiler import ASTSource

        return ASTSource

    @staticmethod
    def _type(argument: Any) -> str:
        if isinstance(argument, torch.dtype):
            return "*" + _TYPES[argument]
        return "fp32" if isinstance(argument, float) else "i32"

    @staticmethod
    def _shown(argument: Any) -> Any:
        """What stands for the argument where only its kind counts."""
        return argument


@dataclass(frozen=True)
class Launch:
    """One kernel in its compiled form, the number of programs, and what it is given."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def run(self) -> None:
        self.variant.launch(self.grid, self.arguments)
