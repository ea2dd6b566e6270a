"""What the tests of convolutions and upsampling share: poisoned tensors, the tolerance, what a launch must satisfy."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from allaprima.backends.cuda.kernels.variant import Launch, Variant


@pytest.fixture(autouse=True)
def interpreted_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers and multiplies those; let it multiply what they mean."""
    product = interpreter.InterpreterBuilder.create_dot

    def meant(handle: Any) -> Any:
        if not handle.dtype.is_bf16():
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, meant(a), meant(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def poisoned(shape, dtype, device, beside=8, seed=0):
    """A channels-last tensor of random numbers with NaN before, behind and between its pixels."""
    batch, channels, height, width = shape
    pixel = channels + beside
    size, margin = batch * height * width * pixel, 4096
    storage = torch.full((size + 2 * margin,), float("nan"), dtype=dtype, device=device)
    view = storage.as_strided(shape, (height * width * pixel, 1, width * pixel, pixel), margin)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return view.copy_(numbers.to(device=device, dtype=dtype))


def nan_like(shape, dtype, device):
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    return out.contiguous(memory_format=torch.channels_last)


def wide(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def check(got, call, *arguments):
    """|got - truth| ≤ 2 × the largest error of eager in the same dtype + one rounding."""
    sources = [wide(a) if isinstance(a, tuple) and isinstance(a[0], torch.Tensor) else a for a in arguments]
    truth = call(*wide(sources))
    eager = (call(*arguments).double() - truth).abs().max()
    assert got.isfinite().all()
    error = (got.double() - truth).abs()
    assert (error <= 2 * eager + torch.finfo(got.dtype).eps * truth.abs()).all(), (error.max().item(), eager.item())


def tensors(batch, channels, height, width, outputs, dtype, device, kernel=(3, 3)):
    scale = (channels * kernel[0] * kernel[1]) ** -0.5
    x = poisoned((batch, channels, height, width), dtype, device)
    weight = poisoned((outputs, channels, *kernel), dtype, device, seed=1).mul_(scale)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)).to(device=device, dtype=dtype)
    return x, weight, bias


def check_launch(launch: Launch, variants: Iterator[Variant]) -> None:
    """Its form is among the compiled ones, and the arguments are what that form was compiled for."""
    assert any(launch.variant == v for v in variants)
    names = [n for n in inspect.signature(launch.variant.kernel.fn).parameters if n not in launch.variant.constants]
    assert len(names) == len(launch.arguments) == len(launch.variant.arguments)
    for given, compiled in zip(launch.arguments, launch.variant.arguments, strict=True):
        if isinstance(compiled, torch.dtype):
            assert given.dtype == compiled
            assert given.data_ptr() % 16 == 0
        else:
            assert type(given) is int
            assert abs(given) < 2**31
