"""Matrix products merge and take their epilogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima import ops
from allaprima.graph import aten
from allaprima.rewrite.linear import GegluLinear, LinearAdd, MergeSiblingLinears
from tests.rewrite.check import Case, randn

X = randn(3, 5, 8)
OTHERS = ((randn(1, 5, 8),), (randn(2, 7, 8),))
WEIGHTS = dict(q=randn(4, 8), k=randn(6, 8), v=randn(8, 8), a=randn(4), b=randn(6), c=randn(8), wide=randn(12, 8))


# ---- MergeSiblingLinears -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_linears_over_one_input_become_one(bias: bool) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        pairs = ((m.q, m.a), (m.k, m.b), (m.v, m.c))
        q, k, v = (F.linear(x, w, b if bias else None) for w, b in pairs)
        return torch.cat([v, q * 2, k], -1)

    case = Case(function, X, **WEIGHTS)
    assert case.fires(MergeSiblingLinears()) == 1
    assert case.count(aten.linear.default) == 1
    assert case.count(aten.slice.Tensor) == 3
    assert case.count(aten.cat.default) == (3 if bias else 2)
    case.agrees(*OTHERS)


def test_later_siblings_merge_too() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = F.linear(x, m.v)
        return first + F.linear(torch.sin(first), m.v) + F.linear(x, m.v, m.c)

    def again(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = F.linear(x, m.v)
        return first + torch.sin(first) * F.linear(x, m.v)

    case = Case(again, X, **WEIGHTS)
    assert case.fires(MergeSiblingLinears()) == 1
    case.agrees(*OTHERS)
    assert "only some of the linears" in Case(function, X, **WEIGHTS).reason(MergeSiblingLinears())


def test_those_with_a_bias_and_those_without_merge_apart() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [F.linear(x, m.q, m.a), F.linear(x, m.k), F.linear(x, m.v, m.c), F.linear(x, m.wide)]
        return torch.cat(parts, -1)

    case = Case(function, X, **WEIGHTS)
    assert case.fires(MergeSiblingLinears()) == 1
    assert case.count(aten.linear.default) == 2
    case.agrees(*OTHERS)


def test_linears_over_different_inputs_stay() -> None:
    case = Case(lambda m, x: F.linear(x, m.v) + F.linear(torch.sin(x), m.v), X, **WEIGHTS)
    assert case.reason(MergeSiblingLinears()) == ""
    assert case.count(aten.linear.default) == 2


def test_a_weight_made_of_the_result_is_declined() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = F.linear(x, m.v)
        return first + F.linear(x, m.v * first.mean())

    case = Case(function, X, **WEIGHTS)
    assert "is computed after" in case.reason(MergeSiblingLinears())


def test_a_weight_that_is_an_input_with_free_rows_is_declined() -> None:
    case = Case(lambda m, x, y: F.linear(x, y).sum() + F.linear(x, m.v), X, randn(3, 8), **WEIGHTS)
    assert "not fixed" in case.reason(MergeSiblingLinears())


# ---- GegluLinear ---------------------------------------------------------------------------------------------------

GEGLU: dict[str, Callable[..., Any]] = {
    "h first": lambda h, g: h * F.gelu(g),
    "gelu first": lambda h, g: F.gelu(g) * h,
    "tanh": lambda h, g: h * F.gelu(g, approximate="tanh"),
}


@pytest.mark.parametrize("name", GEGLU)
@pytest.mark.parametrize("bias", [False, True])
def test_geglu_reads_both_halves_where_they_are(name: str, bias: bool) -> None:
    case = Case(lambda m, x: GEGLU[name](*F.linear(x, m.k, m.b if bias else None).chunk(2, -1)), X, **WEIGHTS)
    assert case.fires(GegluLinear()) == 1
    assert [n.target for n in case.graph.calls()] == [ops.geglu_linear]
    case.agrees(*OTHERS)


GEGLU_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "the other half is gated": (lambda m, h, g: F.gelu(h) * g, ""),
    "silu": (lambda m, h, g: h * F.silu(g), ""),
    "the gate alone": (lambda m, h, g: F.gelu(g) * F.gelu(g), ""),
    "added": (lambda m, h, g: h + F.gelu(g), ""),
    "the half is read again": (lambda m, h, g: h * F.gelu(g) + h, "other readers"),
    "the gate is read again": (lambda m, h, g: h * F.gelu(g) + g, "other readers"),
}


@pytest.mark.parametrize("name", GEGLU_MISSES)
def test_what_is_no_geglu_stays(name: str) -> None:
    function, reason = GEGLU_MISSES[name]
    case = Case(lambda m, x: function(m, *F.linear(x, m.k).chunk(2, -1)), X, **WEIGHTS)
    assert reason in case.reason(GegluLinear())
    assert case.count(aten.linear.default) == 1


def test_halves_of_another_axis_or_three_parts_are_declined() -> None:
    def halves(m: Any, x: torch.Tensor) -> torch.Tensor:
        h, g = F.linear(x, m.v).chunk(2, 1)
        return h * F.gelu(g)

    def thirds(m: Any, x: torch.Tensor) -> torch.Tensor:
        h, g, _ = F.linear(x, m.k).chunk(3, -1)
        return h * F.gelu(g)

    for function in (halves, thirds):
        case = Case(function, randn(3, 4, 8), dims=lambda name, t: {}, **WEIGHTS)
        assert "not those of the last axis" in case.reason(GegluLinear())


def test_a_product_that_something_else_reads_is_declined() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        both = F.linear(x, m.k)
        h, g = both.chunk(2, -1)
        return h * F.gelu(g) + both.sum()

    assert "other readers" in Case(function, X, **WEIGHTS).reason(GegluLinear())


# ---- LinearAdd -----------------------------------------------------------------------------------------------------

ADDITIONS: dict[str, Callable[..., Any]] = {
    "left": lambda m, x: F.linear(x, m.v, m.c) + x,
    "right": lambda m, x: x + F.linear(x, m.v),
    "two linears": lambda m, x: F.linear(x, m.v) + F.linear(x, m.v, m.c),
    "permuted": lambda m, x: F.linear(x, m.v).transpose(1, 2) + torch.sin(x).transpose(1, 2),
    "images": lambda m, x: F.linear(x[None], m.v).permute(0, 3, 1, 2) + x[None].permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_a_residual_goes_into_the_epilogue(name: str) -> None:
    case = Case(ADDITIONS[name], X, **WEIGHTS)
    assert case.fires(LinearAdd()) == 1
    assert case.count(aten.add.Tensor) == 0
    assert case.count(ops.linear_add) == 1
    case.agrees(*OTHERS)


ADDITION_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "number": (lambda m, x: F.linear(x, m.v) + 1, ""),
    "to itself": (lambda m, x: (lambda y: y + y)(F.linear(x, m.v)), ""),
    "read again": (lambda m, x: (lambda y: (y + x) * y)(F.linear(x, m.v)), ""),
    "vector": (lambda m, x: F.linear(x, m.v) + m.c, "broadcasts"),
    "broadcast linear": (lambda m, x: F.linear(x[:1], m.v) + x, "broadcasts"),
    "other dtype": (lambda m, x: F.linear(x, m.v) + x.to(torch.float32), "casts"),
    "factor": (lambda m, x: torch.add(F.linear(x, m.v), x, alpha=2), "factor"),
}


@pytest.mark.parametrize("name", ADDITION_MISSES)
def test_other_additions_stay(name: str) -> None:
    function, reason = ADDITION_MISSES[name]
    case = Case(function, X, **WEIGHTS)
    assert reason in case.reason(LinearAdd())
    assert case.count(ops.linear_add) == 0
