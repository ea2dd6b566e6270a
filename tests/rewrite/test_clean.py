"""Clean-up rules: each fires, agrees and leaves near misses alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima.graph import Graph, TensorSpec, aten, verify
from allaprima.rewrite.clean import (
    CastToDtype,
    ComposePermutes,
    ComposeReshapes,
    MergeEqualCalls,
    RemoveNoOps,
    SizesFromInputs,
    ViewToReshape,
)
from tests.rewrite.check import Case, randn, rewritten

X = randn(3, 4, 5)
OTHERS = ((randn(1, 4, 5),), (randn(2, 7, 3),))

NO_OPS: dict[str, Callable[..., Any]] = {
    "dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "dropout of nothing": lambda m, x: F.dropout(x, 0.0, True),
    "to the same dtype": lambda m, x: x.to(torch.float64),
    "to the same device and dtype": lambda m, x: x.to(device="cpu", dtype=torch.float64),
    "contiguous": lambda m, x: x.contiguous(),
    "clone": lambda m, x: x.clone(),
    "detach": lambda m, x: x.detach(),
    "view": lambda m, x: x.view(x.shape),
    "reshape with a free size": lambda m, x: x.reshape(x.shape[0], -1, x.shape[2]),
    "expand": lambda m, x: x.expand(x.shape[0], -1, -1),
    "slice": lambda m, x: x[:, 0:],
    "plus 0": lambda m, x: x + 0,
    "minus 0": lambda m, x: x - 0.0,
    "times 1": lambda m, x: x * 1.0,
    "over 1": lambda m, x: x / 1,
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_changes_nothing_goes(name: str) -> None:
    case = Case(lambda m, x: torch.sin(NO_OPS[name](m, x)), X)
    case.fires(ViewToReshape(), CastToDtype(), RemoveNoOps())
    assert [n.target for n in case.graph.calls() if n.meta["spec"].__class__ is TensorSpec] == [aten.sin.default]
    case.agrees(*OTHERS)


KEPT: dict[str, Callable[..., Any]] = {
    "dropout in training": lambda m, x: F.dropout(x, 1.0, True),
    "to another dtype": lambda m, x: x.to(torch.float32),
    "contiguous, channels last": lambda m, x: x.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "clone, channels last": lambda m, x: x.unsqueeze(0).clone(memory_format=torch.channels_last),
    "reshape to another shape": lambda m, x: x.reshape(x.shape[0], -1),
    "expand of one row": lambda m, x: x[:, :1].expand(-1, 6, -1),
    "slice that loses a row": lambda m, x: x[:, 1:],
    "plus 1": lambda m, x: x + 1,
    "times -1": lambda m, x: x * -1,
    "over 2": lambda m, x: x / 2,
    "1 - x": lambda m, x: 1 - x,
    "whole numbers over 1": lambda m, x: x.to(torch.int64) / 1,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_changes_something_stays(name: str) -> None:
    case = Case(lambda m, x: KEPT[name](m, x), X)
    before = len(case.graph.calls())
    assert case.fires(ViewToReshape(), RemoveNoOps()) == 0
    assert len(case.graph.calls()) == before


def test_a_view_becomes_a_reshape() -> None:
    case = Case(lambda m, x: x.view(x.shape[0], -1), X)
    assert case.fires(ViewToReshape()) == 1
    assert (case.count(aten.view.default), case.count(aten.reshape.default)) == (0, 1)
    case.agrees(*OTHERS)


def test_a_view_as_another_dtype_is_no_reshape() -> None:
    case = Case(lambda m, x: x.view(torch.int64), X)
    assert case.reason(ViewToReshape()) == ""


def test_casts_forget_the_device() -> None:
    case = Case(lambda m, x: x.to(device="cpu", dtype=torch.float32) + x.to(torch.float32), X)
    assert case.fires(CastToDtype()) == 1
    assert case.count(aten.to.dtype) == 2
    case.agrees(*OTHERS)


def test_a_cast_that_changes_the_memory_format_is_declined() -> None:
    case = Case(lambda m, x: x[None].to("cpu", torch.float32, memory_format=torch.channels_last).to(torch.float64), X)
    assert "memory format" in case.reason(CastToDtype())


def test_sizes_are_read_off_the_first_input() -> None:
    def function(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y).reshape(y.shape[0], -1) * x.shape[1]

    case = Case(function, X, randn(3, 4, 5))
    assert case.fires(SizesFromInputs()) >= 1
    first = case.graph.placeholders("input")[0]
    assert all(n.args[0] is first for n in case.graph.calls(aten.sym_size.int))
    case.agrees((randn(2, 7, 3), randn(2, 7, 3)))


def test_a_size_that_no_input_has_is_left() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        product = x.flatten()
        return product.reshape(torch.sym_int(product.shape[0]))

    case = Case(function, X)
    before = str(case.graph)
    assert case.reason(SizesFromInputs()) == ""
    assert str(case.graph) == before


PERMUTES: dict[str, tuple[Callable[..., Any], int]] = {
    "two transposes": (lambda m, x: x.transpose(1, 2).transpose(-1, -2), 0),
    "permute and its inverse": (lambda m, x: x.permute(2, 0, 1).permute(1, 2, 0), 0),
    "permute of permute": (lambda m, x: x.permute(2, 0, 1).permute(2, 0, 1), 1),
    "transpose of permute": (lambda m, x: x.permute(2, 0, 1).transpose(0, 2), 1),
    "three": (lambda m, x: x.permute(1, 2, 0).transpose(0, 1).permute(2, 0, 1), 1),
    "identity": (lambda m, x: x.permute(0, 1, 2), 0),
    "transpose of one axis": (lambda m, x: x.transpose(1, 1), 0),
}


@pytest.mark.parametrize("name", PERMUTES)
def test_permutes_compose(name: str) -> None:
    function, left = PERMUTES[name]
    case = Case(lambda m, x: function(m, x) * 2, X)
    assert case.fires(ComposePermutes()) >= 1
    assert case.count(aten.permute.default, aten.transpose.int) == left
    case.agrees(*OTHERS)


def test_a_lone_permute_of_a_square_stays() -> None:
    case = Case(lambda m, x: x.transpose(1, 2) * 2, randn(2, 4, 4), dims=lambda name, t: {})
    assert case.reason(ComposePermutes(), RemoveNoOps()) == ""
    assert case.count(aten.transpose.int) == 1
    case.agrees()


RESHAPES: dict[str, Callable[..., Any]] = {
    "reshape": lambda m, x: x.reshape(-1).reshape(x.shape[0], -1),
    "flatten": lambda m, x: x.flatten().reshape(x.shape[0], -1),
    "unsqueeze": lambda m, x: x.unsqueeze(1).reshape(x.shape[0], -1),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_reshapes_compose(name: str) -> None:
    case = Case(lambda m, x: RESHAPES[name](m, x) * 2, X)
    assert case.fires(ComposeReshapes()) == 1
    assert case.count(aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default) == 1
    case.agrees(*OTHERS)


def test_a_reshape_of_a_permute_stays() -> None:
    case = Case(lambda m, x: x.transpose(1, 2).reshape(x.shape[0], -1), X)
    assert case.reason(ComposeReshapes()) == ""
    case.agrees(*OTHERS)


def test_equal_calls_become_one() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two, three = (torch.sin(F.silu(x) * 2.0) for _ in range(3))
        return one + two.reshape(x.shape[0], -1).sum() + three

    case = Case(function, X)
    assert case.fires(MergeEqualCalls()) >= 6
    assert [case.count(t) for t in (aten.silu.default, aten.mul.Tensor, aten.sin.default)] == [1, 1, 1]
    case.agrees(*OTHERS)


def test_equal_calls_without_inputs_become_one() -> None:
    case = Case(lambda m, x: x + torch.arange(5.0) * torch.arange(5.0), randn(2, 5), dims=lambda name, t: {})
    assert case.fires(MergeEqualCalls()) == 1
    assert case.count(aten.arange.default) == 1
    case.agrees()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.silu(x) + F.gelu(x),
        lambda m, x: x * 2.0 + x * 3.0,
        lambda m, x: (x.long() + 1) + (x.long() + True) + (x.long() + 1.0),
        lambda m, x: x.to(torch.float32).double() + x.to(torch.float16).double(),
        lambda m, x: torch.rand_like(x) + torch.rand_like(x),
        lambda m, x: F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True),
    ],
    ids=["operator", "number", "type of the number", "dtype", "random", "dropout"],
)
def test_calls_that_differ_stay_apart(function: Callable[..., Any]) -> None:
    case = Case(function, X)
    kinds = (aten.silu.default, aten.gelu.default, aten.mul.Tensor, aten.rand_like.default, aten.dropout.default)
    before = [case.count(kind) for kind in kinds], case.count(aten.add.Tensor)
    case.fires(MergeEqualCalls())
    assert ([case.count(kind) for kind in kinds], case.count(aten.add.Tensor)) == before


def test_rules_leave_the_original_alone_when_given_a_copy() -> None:
    case = Case(lambda m, x: (x * 1).clone(), X)
    text = str(case.graph)
    new, _ = rewritten(case.graph, [RemoveNoOps()])
    assert isinstance(new, Graph)
    assert str(case.graph) == text
    verify(case.graph)


def test_results_stay_tensors_of_their_own() -> None:
    """A caller may write into a result: it must be neither his input nor another result."""
    copy = Case(lambda m, x: x.clone(), X)
    assert "of its own" in copy.reason(RemoveNoOps())
    assert copy.count(aten.clone.default) == 1
    both = Case(lambda m, x: (lambda y: (y, y * 1))(torch.sin(x)), X)
    assert "of its own" in both.reason(RemoveNoOps())
    twice = Case(lambda m, x: (torch.sin(x), torch.sin(x)), X)
    assert "of its own" in twice.reason(MergeEqualCalls())
    assert twice.count(aten.sin.default) == 2
