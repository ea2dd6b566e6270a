"""1×1 convolutions between rows, and channels-last storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima.capture import DynamicDim
from allaprima.graph import aten
from allaprima.rewrite.clean import ComposePermutes, MergeEqualCalls, RemoveNoOps
from allaprima.rewrite.layout import (
    ChannelsLastInputs,
    ChannelsLastWeights,
    PointwiseConvFromRows,
    PointwiseConvToRows,
)
from tests.rewrite.check import BATCH, Case, randn

X = randn(3, 8, 5, 7)
OTHERS = ((randn(1, 8, 1, 1),), (randn(2, 8, 6, 3),))
WEIGHTS = dict(
    point=randn(6, 8, 1, 1), back=randn(8, 6, 1, 1), wide=randn(6, 8, 3, 3), thin=randn(8, 1, 1, 1), b=randn(6)
)  # fmt: skip
ROWS = (0, 2, 3, 1)


def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    return {0: BATCH, 2: DynamicDim(tensor.shape[2]), 3: DynamicDim(tensor.shape[3])}


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(ROWS).reshape(x.shape[0], -1, x.shape[1])


@pytest.mark.parametrize("bias", [False, True])
def test_a_pointwise_convolution_before_rows_is_a_linear(bias: bool) -> None:
    case = Case(lambda m, x: rows(F.conv2d(x, m.point, m.b if bias else None)), X, dims=dims, **WEIGHTS)
    assert case.fires(PointwiseConvToRows()) == 1
    assert (case.count(aten.conv2d.default), case.count(aten.linear.default)) == (0, 1)
    case.agrees(*OTHERS)


@pytest.mark.parametrize("bias", [False, True])
def test_a_pointwise_convolution_after_rows_is_a_linear(bias: bool) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x.permute(ROWS)).permute(0, 3, 1, 2)
        return F.conv2d(y, m.point, m.b if bias else None) * 2

    case = Case(function, X, dims=dims, **WEIGHTS)
    assert case.fires(PointwiseConvFromRows()) == 1
    assert (case.count(aten.conv2d.default), case.count(aten.linear.default)) == (0, 1)
    case.agrees(*OTHERS)


def test_a_transformer_block_is_left_with_two_views() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(rows(F.conv2d(x, m.point, m.b)))
        y = y.reshape(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2).contiguous()
        return F.conv2d(y, m.back) + x

    case = Case(function, X, dims=dims, **WEIGHTS)
    assert case.fires(RemoveNoOps(), PointwiseConvToRows(), PointwiseConvFromRows()) == 1
    assert case.count(aten.permute.default) == 2, "one in, one out"
    assert case.count(aten.contiguous.default, aten.conv2d.default) == 0
    case.agrees(*OTHERS)


MISSES: dict[str, Callable[..., Any]] = {
    "3×3": lambda m, x: rows(F.conv2d(x, m.wide, padding=1)),
    "stride": lambda m, x: rows(F.conv2d(x, m.point, stride=2)),
    "padding": lambda m, x: rows(F.conv2d(x, m.point, padding=1)),
    "groups": lambda m, x: rows(F.conv2d(x, m.thin, groups=8)),
    "other order": lambda m, x: F.conv2d(x, m.point).permute(0, 3, 2, 1),
    "no permute": lambda m, x: F.conv2d(x, m.point),
}


@pytest.mark.parametrize("name", MISSES)
def test_other_convolutions_stay(name: str) -> None:
    case = Case(MISSES[name], X, dims=dims, **WEIGHTS)
    assert case.reason(PointwiseConvToRows()) == ""
    assert case.reason(PointwiseConvFromRows()) == ""
    assert case.count(aten.conv2d.default) == 1


def test_a_convolution_that_is_read_both_ways_is_declined() -> None:
    case = Case(lambda m, x: (lambda y: rows(y).sum() + y)(F.conv2d(x, m.point)), X, dims=dims, **WEIGHTS)
    assert "channels first" in case.reason(PointwiseConvToRows())


def test_convolutions_get_their_channels_last() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(torch.sin(F.conv2d(x, m.wide)), m.back) + F.conv2d(x, m.point).sum()

    case = Case(function, X, dims=dims, **WEIGHTS)
    assert case.fires(ChannelsLastWeights(), ChannelsLastInputs()) == 3
    assert case.count(aten.contiguous.default) == 6
    assert case.fires(MergeEqualCalls()) == 1, "x is reordered once"
    for conv in case.graph.calls(aten.conv2d.default):
        assert all(a.kwargs["memory_format"] is torch.channels_last for a in conv.args[:2])
    case.agrees((randn(2, 8, 6, 3),))
    assert case.fires(ChannelsLastWeights()) == 0
    assert case.fires(ChannelsLastInputs()) == 0


def test_a_chain_of_convolutions_keeps_its_layout() -> None:
    case = Case(lambda m, x: F.conv2d(F.conv2d(x, m.wide), m.back), X, dims=dims, **WEIGHTS)
    assert case.fires(ChannelsLastWeights()) == 2
    assert case.fires(ChannelsLastInputs()) == 1
    case.agrees(*OTHERS[1:])


def test_composition_removes_the_permutes_between_two_pointwise_convolutions() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(F.conv2d(x, m.point).permute(ROWS))
        return F.conv2d(y.permute(0, 3, 1, 2), m.back).permute(ROWS)

    case = Case(function, X, dims=dims, **WEIGHTS)
    assert case.fires(PointwiseConvToRows(), PointwiseConvFromRows(), ComposePermutes()) >= 1
    assert case.count(aten.permute.default) == 1
    case.agrees(*OTHERS)
