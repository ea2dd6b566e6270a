"""Where kernels for Hopper are offered, and which of their tiles the model prefers."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from allaprima import ops
from allaprima.backends.cuda.choose import OPERATORS, Candidate, choose
from allaprima.backends.cuda.compile import every_variant, modules_of
from allaprima.backends.cuda.device import KNOWN, nearest
from allaprima.backends.cuda.kernels import hopper
from allaprima.backends.cuda.kernels.hopper import convolution as c
from allaprima.graph import aten

HALF = torch.float16


def image(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)


def rows(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def convolution(batch: int, channels: int, height: int, width: int, outputs: int) -> tuple[Any, ...]:
    x, weight = image(batch, channels, height, width), image(outputs, channels, 3, 3)
    return (x, weight, rows(outputs), image(batch, outputs, height, width), (1, 1), (1, 1), (1, 1), 1)


def offered(target: Any, arguments: tuple[Any, ...], arch: int = 90) -> list[Candidate]:
    found = OPERATORS[target].candidates(arguments, nearest(arch))
    return sorted((f for f in found if f.name.startswith("hopper ")), key=lambda f: f.estimate_us)


SMALL, LARGE, SQUARE = "8x1x8x128+32", "8x1x16x128+32", "16x1x16x128"
MEASURED = [  # what was fastest on an H100, or within 1 % of it, µs
    ((2, 320, 64, 64, 320), LARGE, 25.7),
    ((2, 640, 64, 64, 320), LARGE, 44.9),
    ((2, 640, 32, 32, 640), SMALL, 24.3),
    ((2, 1280, 32, 32, 640), SMALL, 43.9),
    ((2, 1280, 16, 16, 1280), SMALL, 28.8),
    ((2, 1280, 8, 8, 1280), SMALL, 19.5),
    ((2, 640, 64, 64, 640), LARGE, 86.5),
    ((2, 640, 48, 48, 640), SQUARE, 58.8),
    ((1, 128, 512, 512, 128), SQUARE, 126.3),
    ((1, 512, 64, 64, 512), "8x1x16x64", 29.1),
]


@pytest.mark.parametrize(("sizes", "tile", "us"), MEASURED)
def test_the_tile_that_was_fastest(sizes: tuple[int, ...], tile: str, us: float) -> None:
    first = offered(ops.conv2d_add, convolution(*sizes))[0]
    assert first.name.startswith(f"hopper {tile} ")
    assert first.estimate_us == pytest.approx(us, rel=0.12)


MEASURED_PRODUCTS = [  # M, K, N
    ((8192, 320, 320), "64x128+32", 8.0),
    ((2048, 640, 640), "128x128", 8.6),
    ((8192, 1280, 320), "128x128+32", 15.8),
    ((32768, 1280, 320), "128x128+32", 59.2),
]
MEASURED_GATES = [
    ((8192, 320, 1280), "128x64", 30.2),
    ((512, 1280, 5120), "64x64", 29.1),
    ((128, 1280, 5120), "64x64", 15.0),
    ((2048, 1280, 5120), "128x128", 80.2),
]


@pytest.mark.parametrize(("sizes", "tile", "us"), MEASURED_PRODUCTS)
def test_the_product_that_was_fastest(sizes: tuple[int, int, int], tile: str, us: float) -> None:
    m, k, n = sizes
    first = offered(ops.linear_add, (rows(2, m // 2, k), rows(n, k), rows(n), rows(2, m // 2, n)))[0]
    assert first.name.startswith(f"hopper {tile} ")
    assert first.estimate_us == pytest.approx(us, rel=0.12)


@pytest.mark.parametrize(("sizes", "tile", "us"), MEASURED_GATES)
def test_the_gate_that_was_fastest(sizes: tuple[int, int, int], tile: str, us: float) -> None:
    m, k, n = sizes
    first = offered(ops.geglu_linear, (rows(m, k), rows(2 * n, k), rows(2 * n), "none"))[0]
    assert first.name.startswith(f"hopper {tile} ")
    assert first.estimate_us == pytest.approx(us, rel=0.12)


def test_other_generations_never_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, c.__name__, None)
    monkeypatch.delattr(hopper, "convolution")
    for device in KNOWN:
        if device.arch != 90:
            assert choose(ops.conv2d_add, convolution(1, 64, 8, 8, 64), {}, device) is not None
            assert "hopper.convolution" not in modules_of(device.arch)
    with pytest.raises(ImportError):
        offered(ops.conv2d_add, convolution(1, 64, 8, 8, 64))


def test_every_form_that_is_offered_is_compiled() -> None:
    assert "hopper.convolution" in modules_of(90)
    compiled = {v.name for v in every_variant([HALF], modules_of(90))}
    given = convolution(2, 1280, 16, 16, 1280)
    for found in offered(ops.conv2d_add, given):
        assert isinstance(found.call, functools.partial)
        problem = c.problem_of(*given)
        assert isinstance(problem, c.Problem)
        out = image(2, 1280, 16, 16)
        launches = c.launches_of(problem, found.call.keywords["parameters"], out, 132)
        assert {launch.variant.name for launch in launches} <= compiled


CONV = convolution(1, 64, 16, 16, 64)
PLAIN = (*CONV[:3], *CONV[4:])
OFFERED = [
    (ops.conv2d_add, CONV),
    (aten.conv2d.default, PLAIN),
    (ops.conv2d_add, (CONV[0], image(64, 64, 1, 1), None, CONV[3], (1, 1), (0, 0), (1, 1), 1)),
    (aten.conv2d.default, (CONV[0], image(64, 64, 1, 1))),
    (aten.linear.default, (rows(2, 64, 320), rows(64, 320))),
    (ops.linear_add, (rows(2, 64, 320), rows(64, 320), rows(64), rows(2, 64, 64))),
    (ops.geglu_linear, (rows(64, 320), rows(128, 320), None, "none")),
]


@pytest.mark.parametrize(("target", "arguments"), OFFERED)
def test_it_is_offered(target: Any, arguments: tuple[Any, ...]) -> None:
    assert offered(target, arguments)
    assert not offered(target, arguments, 80)


REFUSED = [
    (aten.conv2d.default, (*PLAIN[:3], (2, 2), (1, 1), (1, 1), 1)),
    (aten.conv2d.default, PLAIN[:3]),  # padding 0
    (aten.conv2d.default, (image(1, 4, 16, 16), image(64, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)),
    (aten.conv2d.default, (rows(1, 64, 16, 16), *PLAIN[1:])),  # not channels-last
    (ops.conv2d_add, (CONV[0].float(), CONV[1].float(), None, CONV[3].float(), *CONV[4:])),
    (ops.conv2d_cat, ([CONV[0], CONV[0]], image(64, 128, 1, 1), None, (1, 1), (0, 0), (1, 1))),
    (ops.geglu_linear, (rows(64, 320), rows(128, 320), None, "tanh")),
    (ops.linear_add, (rows(2, 64, 320), rows(64, 320), None, rows(64))),  # broadcast
    (aten.linear.default, (rows(320, 64).t(), rows(64, 320))),
    (aten.linear.default, (rows(0, 320), rows(64, 320))),
    (aten.linear.default, (rows(4, 4, 640)[:, :3, :320], rows(64, 320))),  # rows of two strides
    (aten.linear.default, (rows(1, 320).expand(64, 320), rows(64, 320))),
]


@pytest.mark.parametrize(("target", "arguments"), REFUSED)
def test_it_is_not_offered(target: Any, arguments: tuple[Any, ...]) -> None:
    assert not offered(target, arguments)
