"""Dependent launch: in the code for GPUs that know it, and before anything is read or written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from allaprima.backends.cuda.compile import every_variant, kernel_of, modules_of
from allaprima.backends.cuda.kernels import variant
from allaprima.backends.cuda.kernels.dependent import option
from allaprima.backends.cuda.kernels.variant import ARCHES

_CODE = """
import json, re, sys
import torch
from allaprima.backends.cuda.compile import every_variant, kernel_of, modules_of, one_of_each

wait = r"griddepcontrol\\.\\w+"
access = re.compile(rf"^\\s*(?:@\\S+ )?((?:ld|st|red|atom)\\.(?:volatile\\.)?global|cp\\.async\\.\\w+|{wait})", re.M)
before_parting = re.compile(rf"(tt\\.load|tt\\.store|ttng\\.async_tma\\w+|ttg\\.warp_specialize|{wait})")
arch = int(sys.argv[1])
for form in one_of_each(every_variant([torch.float16], modules_of(arch))):
    compiled = form.compile_for(arch)
    in_parts = "ttg.warp_specialize" in compiled.asm["ttgir"]
    code = [m.group(1) for m in access.finditer(compiled.asm["ptx"])]
    first = before_parting.search(compiled.asm["ttgir"]).group(1) if in_parts else code[0]
    print(json.dumps([kernel_of(form), compiled.metadata.launch_pdl, first, code]))
"""


def code_for(arch: int) -> list[Any]:
    """[kernel, launched dependently, first access or wait, all of them in the order of the text] of each kernel.

    Of a program that parts into warps of their own the text ends with what runs first: there the first is that of the
    representation before, where parting counts as an access.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _CODE, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", [a for a in ARCHES if a < 90])
def test_older_gpus_know_nothing_of_it(arch: int) -> None:
    for kernel, dependently, _, code in code_for(arch):
        assert not dependently, kernel
        assert not [c for c in code if c.startswith("griddepcontrol")], kernel


def test_every_kernel_waits_before_its_first_access() -> None:
    found = code_for(90)
    assert {kernel for kernel, *_ in found} == {kernel_of(v) for v in every_variant([torch.float16], modules_of(90))}
    for kernel, dependently, first, code in found:
        assert dependently, kernel
        assert first == "griddepcontrol.wait", kernel
        assert [c for c in code if c.startswith("griddepcontrol")] == ["griddepcontrol.wait"], kernel
        assert len(code) > 2, kernel


class _Launched:
    """Stands for a kernel; keeps what it is launched with."""

    __name__ = "kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **keywords: setattr(self, "seen", (grid, arguments, keywords))


@pytest.mark.parametrize("arch", [89, 90])
def test_every_form_is_launched_as_it_is_compiled(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant, "option_here", lambda: option(arch))
    for form in every_variant([torch.float16], modules_of(arch)):
        kernel = _Launched()
        variant.Launch(replace(form, kernel=kernel), (1, 2, 3), (4, 5)).run()
        grid, arguments, keywords = kernel.seen  # type: ignore[attr-defined]
        assert (grid, arguments) == ((1, 2, 3), (4, 5))
        assert keywords == {**form.constants, **form.options, **option(arch)}
        assert keywords.get("launch_pdl", False) == (arch >= 90)
        assert keywords["num_warps"] == form.num_warps
