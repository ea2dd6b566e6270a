"""Every kernel compiles for every GPU since Ampere, without having one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allaprima.backends.cuda.compile import (
    HOPPER_MODULES,
    MODULES,
    Checked,
    every_variant,
    modules_of,
    one_of_each,
    problems,
)
from allaprima.backends.cuda.kernels.variant import ARCHES


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here the kernels are decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "allaprima.backends.cuda.compile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("arch", ARCHES)
def test_one_form_of_each_kernel(arch: int) -> None:
    done = compiled("--arch", str(arch), "--sample")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " 0 problems" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.timeout(3600)
def test_every_form(arch: int, dtype: str) -> None:
    done = compiled("--arch", str(arch), "--dtype", dtype)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_kernel_is_in_the_sample() -> None:
    half = every_variant([torch.float16], modules_of(90))
    kernels = [v.kernel for v in one_of_each(half)]
    assert len(kernels) == len(set(kernels))
    assert set(kernels) == {v.kernel for v in half}
    assert [k.__name__ for k in kernels].count("flash") == 2, "the portable one and Hopper's"
    assert len({v.name for v in half}) == len(half)


def test_every_file_with_forms_is_listed() -> None:
    from importlib import import_module

    import allaprima.backends.cuda.kernels as kernels

    own = {path.stem for path in Path(kernels.__path__[0]).glob("*.py")}
    named = {m: {v.name for v in every_variant([torch.float16], [m])} for m in MODULES}
    listed = set().union(*named.values())
    for name in own - set(MODULES) - {"__init__"}:
        module = import_module(f"allaprima.backends.cuda.kernels.{name}")
        if hasattr(module, "variants"):
            assert {v.name for v in module.variants(torch.float16)} <= listed, name


def test_what_fails_and_what_fits_nowhere_is_told() -> None:
    first, second = one_of_each(every_variant([torch.float16]))[:2]
    good, large = Checked(first, 86, 1000, None), Checked(first, 86, 1 << 20, None)
    assert problems([good, large]) == []
    assert "no form" in problems([large, Checked(second, 86, 0, None)])[0]
    assert "bad" in problems([Checked(second, 90, 0, "bad"), Checked(second, 90, 0, None)])[0]


def test_forms_for_one_generation_are_in_dtypes_that_it_multiplies() -> None:
    assert [v.name for v in every_variant([torch.float32], HOPPER_MODULES)] == []
    assert every_variant([torch.float16], HOPPER_MODULES)
