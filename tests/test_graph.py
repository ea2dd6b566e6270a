"""The graph: sizes as texts, the law that `verify` enforces, names of operators."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph as FxGraph

from allaprima.errors import GraphError
from allaprima.graph import (
    Graph,
    SizeSpec,
    TensorSpec,
    aten,
    call,
    describe,
    evaluate,
    evaluate_shape,
    peak_bytes,
    replace,
    target_name,
    target_named,
    verify,
    walk_sizes,
)

FLOAT = torch.float32
SIZES = st.integers(1, 4096)


def chain() -> Graph:
    """relu(silu(x)) of x [s0, 8]."""
    fx = FxGraph()
    x = fx.placeholder("x")
    x.meta = {"role": "input", "source": "x", "spec": TensorSpec(("s0", 8), FLOAT)}
    y = fx.call_function(aten.silu.default, (x,))
    z = fx.call_function(aten.relu.default, (y,))
    fx.output((z,))
    for node in (y, z):
        node.meta["spec"] = TensorSpec(("s0", 8), FLOAT)
    return Graph(fx, {"s0": (1, None)})


# ---- sizes


@given(SIZES, SIZES)
def test_sizes_are_computed_as_python_computes_them(a: int, b: int) -> None:
    symbols = {"s0": a, "s1": b}
    assert evaluate("s0*s1 + 3", symbols) == a * b + 3
    assert evaluate("((s1 - 1)//2) + 1", symbols) == (b - 1) // 2 + 1
    assert evaluate("Mod(s0, 8)", symbols) == a % 8
    assert evaluate("CeilDiv(s0, 8)", symbols) == -(-a // 8)
    assert evaluate("Max(s0, s1) - Min(s0, s1)", symbols) == abs(a - b)
    assert bool(evaluate("Ne(Mod(s0, 2), 0)", symbols)) == (a % 2 == 1)
    assert evaluate_shape((2, "s0", "2*s1"), symbols) == (2, a, 2 * b)


@pytest.mark.parametrize("text", ["().__class__.__base__.__subclasses__()", "[s0][0]", "lambda: 1", "s0 s1"])
def test_a_size_is_arithmetic_and_nothing_else(text: str) -> None:
    with pytest.raises(GraphError):
        evaluate(text, {"s0": 1, "s1": 2})


def test_a_size_knows_no_python_functions() -> None:
    with pytest.raises(GraphError, match="__import__"):
        evaluate("__import__('os')", {})


@given(SIZES)
def test_peak_memory_of_a_chain_is_two_tensors(rows: int) -> None:
    assert peak_bytes(chain(), {"s0": rows}) == 2 * rows * 8 * 4


# ---- the law


def test_a_legal_graph_is_legal() -> None:
    verify(chain())


def test_a_node_that_reads_a_later_one_is_refused() -> None:
    graph = chain()
    _, y, z, _ = graph.fx.nodes
    y.args = (z,)
    with pytest.raises(GraphError, match="comes later"):
        verify(graph)


def test_a_node_without_a_spec_is_refused() -> None:
    graph = chain()
    del graph.calls()[0].meta["spec"]
    with pytest.raises(GraphError, match="no spec"):
        verify(graph)


def test_a_placeholder_without_a_role_is_refused() -> None:
    graph = chain()
    graph.placeholders()[0].meta["role"] = "guest"
    with pytest.raises(GraphError, match="guest"):
        verify(graph)


def test_a_call_of_python_code_is_refused() -> None:
    graph = chain()
    graph.calls()[0].target = print
    with pytest.raises(GraphError, match="may not call"):
        verify(graph)


def test_a_constant_without_a_placeholder_is_refused() -> None:
    graph = chain()
    graph.constants["ghost"] = torch.zeros(1)
    with pytest.raises(GraphError, match="ghost"):
        verify(graph)


# ---- names


@pytest.mark.parametrize("target", [aten.conv2d.default, aten.add.Tensor, operator.mul, torch.sym_max])
def test_a_name_leads_back_to_its_operator(target: Any) -> None:
    assert target_named(target_name(target)) is target


@pytest.mark.parametrize("name", ["aten.no_such_thing.default", "os.system", "builtins.eval", "allaprima.ops.nothing"])
def test_a_name_that_no_graph_has_leads_nowhere(name: str) -> None:
    with pytest.raises(GraphError):
        target_named(name)


# ---- editing


def test_replace_moves_every_reader() -> None:
    graph = chain()
    silu, relu = graph.calls()
    replace(silu, call(silu, aten.gelu.default, (silu.args[0],), silu.meta["spec"]))
    assert graph.count(aten.silu.default) == 0
    assert relu.args[0].target is aten.gelu.default
    verify(graph)


def test_clean_removes_what_nobody_reads_and_keeps_inputs() -> None:
    graph = chain()
    graph.output.args = ((),)
    graph.clean()
    assert not graph.calls()
    assert len(graph.placeholders("input")) == 1


def test_a_copy_shares_nothing_that_can_change() -> None:
    graph = chain()
    twin = graph.copy()
    twin.calls()[0].meta["spec"] = None
    twin.ranges["s0"] = (1, 2)
    twin.guards.append("s0 > 1")
    verify(graph)
    assert graph.ranges == {"s0": (1, None)}
    assert not graph.guards


def test_a_printed_graph_says_what_each_node_is() -> None:
    lines = str(chain()).splitlines()
    assert lines[0] == "x = input 'x'  # float32[s0, 8]"
    assert lines[1] == "silu_default = aten.silu.default(x)  # float32[s0, 8]"
    assert lines[-1] == "return (relu_default,)"


def test_the_graph_runs_as_a_module() -> None:
    x = torch.randn(3, 8)
    (result,) = chain().module()(x)
    assert torch.equal(result, torch.relu(torch.nn.functional.silu(x)))


def test_sizes_behind_sizes_are_found() -> None:
    graph = chain()
    (x,) = graph.placeholders()
    first = graph.calls()[0]
    size = call(first, aten.sym_size.int, (x, 0), SizeSpec("s0"))
    double = call(first, operator.mul, (size, 2), SizeSpec("2*s0"))
    reader = call(first, aten.expand.default, (x, [double, 8]), TensorSpec(("2*s0", 8), FLOAT))
    assert set(walk_sizes(reader)) == {size, double}
    assert "size 2*s0" in describe(double)
