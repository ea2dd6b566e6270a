"""Norms with their neighbours, and concatenations that are never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima import ops
from allaprima.capture import DynamicDim
from allaprima.graph import aten
from allaprima.rewrite.norm import AddLayerNorm, FoldBatchNorm, GroupNormSilu, NoConcatenation
from tests.rewrite.check import BATCH, Case, randn

X, Y = randn(3, 6, 5, 7), randn(3, 6, 5, 7) * 3
OTHERS = ((randn(1, 6, 2, 3), randn(1, 6, 2, 3)), (randn(2, 6, 4, 1), randn(2, 6, 4, 1)))
WEIGHTS = dict(w=randn(6), b=randn(6), ww=randn(12), bb=randn(12), conv=randn(4, 12, 3, 3), grouped=randn(4, 6, 3, 3))


def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    return {0: BATCH, 2: DynamicDim(tensor.shape[2]), 3: DynamicDim(tensor.shape[3])}


# ---- GroupNormSilu -------------------------------------------------------------------------------------------------


def test_group_norm_and_silu_are_one() -> None:
    case = Case(lambda m, x: F.silu(F.group_norm(x, 3, m.w, m.b, 1e-6)), X, dims=dims, **WEIGHTS)
    assert case.fires(GroupNormSilu()) == 1
    assert [n.target for n in case.graph.calls()] == [ops.group_norm_silu]
    case.agrees(*((x,) for x, _ in OTHERS))


NORM_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "other activation": (lambda m, x: F.gelu(F.group_norm(x, 3, m.w, m.b)), ""),
    "other norm": (lambda m, x: F.silu(F.layer_norm(x, (7,))), ""),
    "no weight": (lambda m, x: F.silu(F.group_norm(x, 3)), "no weight"),
    "read twice": (lambda m, x: (lambda y: F.silu(y) + y)(F.group_norm(x, 3, m.w, m.b)), "without SiLU"),
}


@pytest.mark.parametrize("name", NORM_MISSES)
def test_other_norms_stay(name: str) -> None:
    function, reason = NORM_MISSES[name]
    case = Case(function, X, dims=lambda name, t: {0: BATCH}, **WEIGHTS)
    assert reason in case.reason(GroupNormSilu())
    assert case.count(ops.group_norm_silu) == 0


# ---- FoldBatchNorm -------------------------------------------------------------------------------------------------

STATISTICS = dict(
    kernel=randn(4, 6, 3, 3), offset=randn(4), gain=randn(4), shift=randn(4), mean=randn(4), var=randn(4) ** 2
)


def normal(m: Any, x: torch.Tensor, training: bool = False) -> torch.Tensor:
    return F.batch_norm(x, m.mean, m.var, m.gain, m.shift, training, eps=1e-3)


BATCH_NORMS: dict[str, Callable[..., Any]] = {
    "bias": lambda m, x: normal(m, F.conv2d(x, m.kernel, m.offset, padding=1)),
    "no bias": lambda m, x: normal(m, F.conv2d(x, m.kernel, stride=2)),
    "padding by name": lambda m, x: normal(m, F.conv2d(x, m.kernel, padding="same")),
    "no gain": lambda m, x: F.batch_norm(F.conv2d(x, m.kernel), m.mean, m.var),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_a_batch_norm_goes_into_the_weights(name: str) -> None:
    case = Case(lambda m, x: F.relu(BATCH_NORMS[name](m, x)), X, dims=dims, **STATISTICS)
    assert case.fires(FoldBatchNorm()) == 1
    assert case.count(*FoldBatchNorm.roots) == 0
    case.agrees((randn(1, 6, 4, 4),), (randn(2, 6, 9, 3),))


BATCH_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "activation between": (lambda m, x: normal(m, F.relu(F.conv2d(x, m.kernel))), ""),
    "convolution after": (lambda m, x: F.conv2d(F.batch_norm(x, m.six, m.six_var), m.kernel), ""),
    "read before": (lambda m, x: (lambda y: normal(m, y) + y)(F.conv2d(x, m.kernel)), "before the norm"),
    "weight of the input": (lambda m, x: normal(m, F.conv2d(x, m.kernel * x.mean())), "not a parameter"),
}


@pytest.mark.parametrize("name", BATCH_MISSES)
def test_other_batch_norms_stay(name: str) -> None:
    function, reason = BATCH_MISSES[name]
    case = Case(function, X, dims=dims, six=randn(6), six_var=randn(6) ** 2, **STATISTICS)
    assert reason in case.reason(FoldBatchNorm())
    assert case.count(*FoldBatchNorm.roots) == 1


# ---- AddLayerNorm --------------------------------------------------------------------------------------------------

ROWS, MORE = randn(3, 5, 6), randn(3, 5, 6) * 2


@pytest.mark.parametrize("read_again", [False, True])
def test_addition_and_layer_norm_are_one(read_again: bool) -> None:
    def function(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x + y
        normal = F.layer_norm(total, (6,), m.w, m.b)
        return normal + total if read_again else normal * 2

    case = Case(function, ROWS, MORE, **WEIGHTS)
    assert case.fires(AddLayerNorm()) == 1
    assert case.count(ops.add_layer_norm) == 1
    assert case.count(aten.layer_norm.default) == 0
    case.agrees((randn(1, 2, 6), randn(1, 2, 6)))


def test_the_sum_may_be_read_before_the_norm() -> None:
    def function(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x + y
        early = torch.sin(total)
        return F.layer_norm(total, (6,), m.w, m.b) * early

    case = Case(function, ROWS, MORE, **WEIGHTS)
    assert case.fires(AddLayerNorm()) == 1
    case.agrees((randn(1, 2, 6), randn(1, 2, 6)))


LAYER_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "number": (lambda m, x, y: F.layer_norm(x + 1, (6,), m.w, m.b) + y, ""),
    "product": (lambda m, x, y: F.layer_norm(x * y, (6,), m.w, m.b), ""),
    "broadcast": (lambda m, x, y: F.layer_norm(x + m.w, (6,), m.w, m.b) + y, "broadcasts"),
    "cast": (lambda m, x, y: F.layer_norm(x + y.to(torch.float32), (6,), m.w, m.b), "casts"),
    "factor": (lambda m, x, y: F.layer_norm(torch.add(x, y, alpha=2), (6,), m.w, m.b), "factor"),
    "no weight": (lambda m, x, y: F.layer_norm(x + y, (6,)), "no weight"),
    "two axes": (lambda m, x, y: F.layer_norm(x + y, (5, 6), m.w.expand(5, 6), m.b.expand(5, 6)), "several axes"),
}


@pytest.mark.parametrize("name", LAYER_MISSES)
def test_other_layer_norms_stay(name: str) -> None:
    function, reason = LAYER_MISSES[name]
    case = Case(function, ROWS, MORE, dims=lambda name, t: {0: BATCH}, **WEIGHTS)
    assert reason in case.reason(AddLayerNorm())
    assert case.count(ops.add_layer_norm) == 0


# ---- NoConcatenation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, 4], ids=["a group each", "a group straddles", "two groups each"])
def test_norm_and_convolution_read_two_sources(groups: int) -> None:
    def function(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, y], 1)
        main = F.conv2d(F.silu(F.group_norm(both, groups, m.ww, m.bb)), m.conv, padding=1)
        return main + F.conv2d(both, m.conv, padding=1)

    case = Case(function, X, Y, dims=dims, **WEIGHTS)
    assert case.fires(GroupNormSilu(), NoConcatenation()) == 1
    assert case.count(aten.cat.default) == 0
    assert (case.count(ops.group_norm_silu_cat), case.count(ops.conv2d_cat)) == (1, 1)
    case.agrees(*OTHERS)


CAT_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "other axis": (lambda m, x, y: F.conv2d(torch.cat([x, y], 2), m.grouped), ""),
    "nobody who could": (lambda m, x, y: torch.sin(torch.cat([x, y], 1)), ""),
    "someone who cannot": (lambda m, x, y: (lambda z: F.conv2d(z, m.conv, padding=1).sum() + z)(torch.cat([x, y], 1)),
                           "reads the concatenation itself"),
    "groups": (lambda m, x, y: F.conv2d(torch.cat([x, y], 1), m.grouped, groups=2), "groups"),
    "dtypes": (lambda m, x, y: F.conv2d(torch.cat([x, y.float()], 1), m.conv), "dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAT_MISSES)
def test_other_concatenations_stay(name: str) -> None:
    function, reason = CAT_MISSES[name]
    case = Case(function, X, Y, dims=dims, **WEIGHTS)
    assert reason in case.reason(GroupNormSilu(), NoConcatenation())
    assert case.count(aten.cat.default) == 1
