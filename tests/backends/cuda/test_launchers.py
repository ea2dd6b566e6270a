"""The functions in C that launch kernels are built with the kernels, so that no first launch waits for them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from allaprima.backends.cuda import launchers
from tests.backends.cuda.simulation import AS_IF_ON_HOPPER


def test_what_cannot_be_built_is_left_to_the_first_launch() -> None:
    launchers.build(object())


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a libcuda that has every function that Triton links, and does nothing."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler")
    import triton.backends.nvidia as nvidia

    text = "".join(p.read_text() for p in Path(nvidia.__path__[0]).glob("driver.*"))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", text)))
    source = tmp_path / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    made = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(made), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path


def test_launchers_are_built_with_the_kernels(driver: Path, tmp_path: Path) -> None:
    """Nothing is left to build for the kernel as a launch compiles it.

    A launcher's code depends on the order of the arguments, which is the same as long as constants are the last.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": str(driver),
        "LD_LIBRARY_PATH": str(driver),
    }
    for script in (_CONSTANTS_LAST, _AS_COMPILED, _AS_LAUNCHED):
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr


_FORM = """
import torch
from triton import knobs
from allaprima.backends.cuda.kernels import layer_norm

form = next(layer_norm.variants(torch.float16))
"""

_CONSTANTS_LAST = """
import torch
from allaprima.backends.cuda.compile import every_variant

for form in every_variant([torch.float16]):
    constant = [p.name in form.constants for p in form.kernel.params]
    assert constant == sorted(constant), form.name
"""

_AS_COMPILED = (
    _FORM
    + """
from pathlib import Path
from allaprima.backends.cuda.launchers import build

build(form.compile_for(90))
assert len(list(Path(knobs.cache.dir).glob("*/__triton_launcher*.so"))) == 1
"""
)

_AS_LAUNCHED = (
    _FORM
    + AS_IF_ON_HOPPER
    + """
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils


def refuse(name, *rest):
    raise AssertionError(f"{name} is built at the first launch")


knobs.build.impl = refuse
kernel = form.warm_up()
CudaUtils()
CudaLauncher(kernel.src, kernel.metadata)
"""
)
