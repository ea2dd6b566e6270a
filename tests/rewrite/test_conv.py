"""Convolutions: behind an upsampling, and with an addend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima import ops
from allaprima.capture import DynamicDim
from allaprima.graph import aten
from allaprima.rewrite.conv import ConvAdd, FoldUpsample, UpsampleConv
from tests.rewrite.check import BATCH, Case, check_equal, randn

X = randn(3, 4, 5, 7)
WEIGHTS = dict(w=randn(6, 4, 3, 3), b=randn(6), point=randn(6, 4, 1, 1), thin=randn(4, 1, 3, 3), back=randn(4, 4, 3, 3))


def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    return {i: d for i, d in {0: BATCH, 2: DynamicDim(9), 3: DynamicDim(11)}.items() if tensor.shape[i] > 1}


# ---- UpsampleConv --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_doubling_before_a_convolution_is_one_operator(bias: bool) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), m.w, m.b if bias else None, padding=1)

    case = Case(function, X, dims=dims, **WEIGHTS)
    assert case.fires(UpsampleConv()) == 1
    assert case.count(ops.upsample_conv) == 1
    assert case.count(aten.conv2d.default, aten.upsample_nearest2d.vec) == 0
    others = ((randn(1, 4, 1, 1),), (randn(2, 4, 8, 3),))
    case.agrees(*others)
    assert case.fires(FoldUpsample()) == 1
    assert (case.count(ops.upsample_conv_folded), case.count(ops.fold_upsample_weight)) == (1, 1)
    case.agrees(*others)


def to_the_size_before(m: Any, x: torch.Tensor) -> torch.Tensor:
    """What diffusers' UNet does: halve, and come back to exactly the old size, which may have been odd."""
    small = F.conv2d(x, m.back, stride=2, padding=1)
    return F.conv2d(F.interpolate(small, size=x.shape[2:], mode="nearest"), m.w, m.b, padding=1)


def test_doubling_less_one_is_the_same_operator() -> None:
    case = Case(to_the_size_before, X, dims=dims, **WEIGHTS)
    assert case.fires(UpsampleConv()) == 1
    parities = ((randn(2, 4, 8, 6),), (randn(1, 4, 7, 6),), (randn(1, 4, 6, 9),), (randn(2, 4, 3, 5),))
    case.agrees(*parities)
    assert case.fires(FoldUpsample()) == 1
    case.agrees(*parities)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_taps_are_not_rounded_unless_the_backend_can_choose(dtype: torch.dtype) -> None:
    short = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    case = Case(lambda m, x: F.conv2d(up(x), m.w, m.b, padding=1), X.to(dtype), dims=dims, **short)
    assert "rounded" in case.reason(UpsampleConv(), FoldUpsample())
    assert case.fires(FoldUpsample(halves=True)) == 1
    case.agrees(tolerance=4 * torch.finfo(dtype).eps)


def up(x: torch.Tensor, **how: Any) -> torch.Tensor:
    return F.interpolate(x, **({"scale_factor": 2.0, "mode": "nearest"} | how))


UPSAMPLE_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "1×1": (lambda m, x: F.conv2d(up(x), m.point), "not 3×3"),
    "no padding": (lambda m, x: F.conv2d(up(x), m.w), "padding"),
    "padding 2": (lambda m, x: F.conv2d(up(x), m.w, padding=2), "padding"),
    "stride": (lambda m, x: F.conv2d(up(x), m.w, padding=1, stride=2), "stride"),
    "dilation": (lambda m, x: F.conv2d(up(x), m.w, padding=1, dilation=2), "dilation"),
    "groups": (lambda m, x: F.conv2d(up(x), m.thin, padding=1, groups=4), "groups"),
    "threefold": (lambda m, x: F.conv2d(up(x, scale_factor=3.0), m.w, padding=1), "twice"),
    "to a fixed size": (lambda m, x: F.conv2d(up(x, scale_factor=None, size=(32, 32)), m.w, padding=1), "twice"),
    "one more": (
        lambda m, x: F.conv2d(
            up(x, scale_factor=None, size=(2 * x.shape[2] + 1, 2 * x.shape[3])), m.w, padding=1), "twice",
    ),
    "read twice": (lambda m, x: (lambda y: F.conv2d(y, m.w, padding=1).sum() + y)(up(x)), "other readers"),
    "bilinear": (lambda m, x: F.conv2d(up(x, mode="bilinear"), m.w, padding=1), ""),
    "convolution first": (lambda m, x: up(F.conv2d(x, m.w, padding=1)), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSAMPLE_MISSES)
def test_other_upsamplings_stay(name: str) -> None:
    function, reason = UPSAMPLE_MISSES[name]
    case = Case(function, X, dims=dims, **WEIGHTS)
    assert reason in case.reason(UpsampleConv())
    assert case.count(ops.upsample_conv) == 0


# ---- ConvAdd -------------------------------------------------------------------------------------------------------

ADDITIONS: dict[str, Callable[..., Any]] = {
    "residual": lambda m, x: F.conv2d(x, m.back, m.b[:4], padding=1) + x,
    "residual first": lambda m, x: x + F.conv2d(x, m.back, padding=1),
    "stride and dilation": lambda m, x: F.conv2d(x, m.w, None, 2, 2, 2) + torch.sin(F.conv2d(x, m.w, None, 2, 2, 2)),
    "groups": lambda m, x: F.conv2d(x, m.thin, padding=1, groups=4) + x,
    "one row of time": lambda m, x: F.conv2d(x, m.w, padding=1) + m.b[None, :, None, None],
    "a time for each row": lambda m, x: F.conv2d(x, m.back, padding=1) + x.mean((2, 3), keepdim=True),
    "two convolutions": lambda m, x: F.conv2d(x, m.point) + F.conv2d(x, m.w, m.b, padding=1),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addend_goes_into_the_epilogue(name: str) -> None:
    case = Case(ADDITIONS[name], X, dims=dims, **WEIGHTS)
    assert case.fires(ConvAdd()) == 1
    assert case.count(ops.conv2d_add) == 1
    assert case.count(aten.add.Tensor) == 0
    for shape in ((1, 4, 2, 3), (2, 4, 6, 5)):
        check_equal(case.graph, case.module, randn(*shape))


def test_of_two_convolutions_the_one_behind_takes_the_addend() -> None:
    """Whichever is traced first: the other, a shortcut, may then run before the block and let its input go."""
    for function in (
        lambda m, x: F.conv2d(x, m.point) + F.conv2d(torch.sin(x), m.w, padding=1),
        lambda m, x: F.conv2d(torch.sin(x), m.w, padding=1) + F.conv2d(x, m.point),
    ):
        case = Case(function, X, dims=dims, **WEIGHTS)
        assert case.fires(ConvAdd()) == 1
        (fused,) = case.graph.calls(ops.conv2d_add)
        assert fused.args[0].target is aten.sin.default
        check_equal(case.graph, case.module, randn(2, 4, 6, 5))


CONV_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "number": (lambda m, x: F.conv2d(x, m.back, padding=1) + 1, ""),
    "itself": (lambda m, x: (lambda y: y + y)(F.conv2d(x, m.back)), ""),
    "read again": (lambda m, x: (lambda y: (y + x) * y)(F.conv2d(x, m.back, padding=1)), ""),
    "along a row": (lambda m, x: F.conv2d(x, m.back, padding=1) + x[:, :, :1], "some other axis"),
    "one channel": (lambda m, x: F.conv2d(x, m.back, padding=1) + x[:, :1], "some other axis"),
    "lower rank": (lambda m, x: F.conv2d(x, m.back, padding=1) + m.b[:4, None, None], "some other axis"),
    "broadcast convolution": (lambda m, x: F.conv2d(x[:1], m.back, padding=1) + x, "broadcasts"),
    "other dtype": (lambda m, x: F.conv2d(x, m.back, padding=1) + x.float(), "axis"),
    "factor": (lambda m, x: torch.add(F.conv2d(x, m.back, padding=1), x, alpha=2), "factor"),
}


@pytest.mark.parametrize("name", CONV_MISSES)
def test_other_additions_stay(name: str) -> None:
    function, reason = CONV_MISSES[name]
    case = Case(function, X, dims=dims, **WEIGHTS)
    found = case.reason(ConvAdd())
    assert reason in found or "casts" in found
    assert case.count(ops.conv2d_add) == 0
