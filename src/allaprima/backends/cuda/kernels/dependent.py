"""Dependent launch: a kernel's programs come onto the GPU before the kernel in front of it has quite ended.

From compute capability 9.0 on every launch asks for that.  Each program waits before its first access to global memory
until the kernel in front has ended, and that one did the same: so a kernel that has ended has seen all before it end,
and memory may be used again as if launches followed one another.  Weights are no exception: outside of a graph, what
wrote them may have been launched just before.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl

FIRST_ARCH = 90
"""The first compute capability that knows dependent launch."""

_INTERPRETED = triton.knobs.runtime.interpret


def wait(_semantic: Any = None) -> None:
    """In a kernel, before its first access to global memory and before it parts into warps of their own.

    Compiled to nothing where the kernel is not launched dependently; the interpreter calls it without a compiler.
    Triton keys what it keeps by the option, not by this text.
    """
    if _semantic is not None and _semantic.builder.options.launch_pdl:
        tl.extra.cuda.gdc_wait(_semantic=_semantic)


setattr(wait, tl.core.TRITON_BUILTIN, True)  # so the compiler calls it, for triton.jit as for gluon.jit


def option(arch: int) -> dict[str, bool]:
    """What compiling and launching for this compute capability are told beside a kernel's own options."""
    return {"launch_pdl": True} if arch >= FIRST_ARCH else {}


def option_here() -> dict[str, bool]:
    """The same for the GPU that launches go to."""
    return {} if _INTERPRETED else _option_on(triton.runtime.driver.active.get_current_device())


@functools.cache
def _option_on(device: int) -> dict[str, bool]:
    """device: the index of the current GPU"""
    return option(triton.runtime.driver.active.get_current_target().arch)
