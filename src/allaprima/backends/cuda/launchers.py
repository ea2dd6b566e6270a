"""What Triton needs beside a compiled kernel to launch it: a function in C for each signature.

Triton has the machine's C compiler build it at the first launch, a third of a second each; here it is built where the
kernels are compiled.  All that this project knows of that part of Triton is in this file.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def build(kernel: Any) -> None:
    """Build the launcher of a CompiledKernel into Triton's cache.

    Without the driver's library, or with another Triton, it is left to the first launch.
    raises   RuntimeError, CalledProcessError where there is no C compiler that works: nothing could be launched then
    """
    with suppress(ImportError, AttributeError, TypeError, AssertionError, OSError):
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        CudaUtils()  # one for all kernels
        CudaLauncher(kernel.src, kernel.metadata)
