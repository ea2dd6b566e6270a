"""The forms of all kernels, and whether they compile: for any GPU, without having one.

python -m allaprima.backends.cuda.compile --arch 80 --arch 90
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from .device import nearest
from .kernels.variant import ARCHES, Variant

MODULES = ("attention", "convolution", "group_norm", "layer_norm", "linear", "upsampling")
"""Files under kernels/ with `variants(dtype)`; what they share with others is yielded there too."""

HOPPER_MODULES = ("hopper.attention", "hopper.convolution")
"""The same for one generation only: imported only for it, since these are written in Gluon."""


def modules_of(arch: int) -> tuple[str, ...]:
    """Modules whose forms a GPU of this compute capability may ask for."""
    return MODULES + (HOPPER_MODULES if arch == 90 else ())


def every_variant(dtypes: Iterable[torch.dtype], modules: Sequence[str] = MODULES) -> list[Variant]:
    """All forms that calls in these dtypes may ask for, each once."""
    found: dict[str, Variant] = {}
    for dtype in dtypes:
        for name in modules:
            module = import_module(f".kernels.{name}", __package__)
            found.update((v.name, v) for v in module.variants(dtype))
    return list(found.values())


def one_of_each(variants: Sequence[Variant]) -> list[Variant]:
    """The last form of each kernel: files list the forms that want much shared memory first."""
    return list({kernel_of(v): v for v in variants}.values())


def kernel_of(variant: Variant) -> str:
    """Its kernel's name with the module's: Hopper's `flash` is not the portable one."""
    return f"{variant.kernel.fn.__module__}.{variant.kernel.__name__}"


@dataclass(frozen=True)
class Checked:
    """What compiling one form for one GPU showed.

    shared_bytes  shared memory of one program, 0 where compiling failed
    error         what the compiler said, or None
    """

    variant: Variant
    arch: int
    shared_bytes: int
    error: str | None

    @property
    def fits(self) -> bool:
        """Whether GPUs of this generation can run it; `candidates` leaves out what is too large for one."""
        return self.error is None and self.shared_bytes <= nearest(self.arch).shared_bytes

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.variant.name}: {self.error or f'{self.shared_bytes} bytes of shared memory'}"


def check(variant: Variant, arch: int) -> Checked:
    """Compile for a GPU that need not be here."""
    try:
        compiled: Any = variant.compile_for(arch)
    except Exception as error:  # the compiler raises anything
        return Checked(variant, arch, 0, f"{type(error).__name__}: {str(error).strip()[:300]}")
    return Checked(variant, arch, compiled.metadata.shared, None)


def problems(checked: Sequence[Checked]) -> list[str]:
    """What failed, and kernels of which no form fits a GPU."""
    wrong = [str(c) for c in checked if c.error]
    kernels = {(kernel_of(c.variant), c.arch) for c in checked}
    fitting = {(kernel_of(c.variant), c.arch) for c in checked if c.fits}
    return wrong + [f"sm_{arch}: no form of {kernel} fits" for kernel, arch in sorted(kernels - fitting)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, action="append", required=True, choices=ARCHES, help="compute capability × 10; repeatable"
    )
    parser.add_argument("--dtype", action="append", choices=("float16", "bfloat16", "float32"), help="default float16")
    parser.add_argument("--module", action="append", choices=MODULES + HOPPER_MODULES, help="kernels of one file only")
    parser.add_argument("--sample", action="store_true", help="one form of each kernel")
    given = parser.parse_args(arguments)
    dtypes = [getattr(torch, name) for name in given.dtype or ["float16"]]

    def of(arch: int) -> list[Variant]:
        allowed = modules_of(arch)
        found = every_variant(dtypes, [m for m in given.module or allowed if m in allowed])
        return one_of_each(found) if given.sample else found

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        checked = list(pool.map(lambda pair: check(*pair), [(v, a) for a in given.arch for v in of(a)]))
    wrong = problems(checked)
    large = sum(not c.fits for c in checked)
    print("\n".join([*wrong, f"{len(checked)} compiled, {len(wrong)} problems, {large} too large for their GPU"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
