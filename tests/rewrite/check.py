"""What the tests of rewriting share: capturing small modules, running graphs, and holding them against their specs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node

from allaprima.capture import Call, CallReader, DimRule, DynamicDim, bind_symbols, capture, every_dim
from allaprima.graph import Graph, SizeSpec, TensorSpec, evaluate, evaluate_shape, verify
from allaprima.rewrite import Rewritten, Rule, rewrite

BATCH = DynamicDim(2, "batch", 1, 63)


def read(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Call:
    return CallReader(module.forward)(args, kwargs)


def graph_of(module: torch.nn.Module, *args: Any, dims: DimRule | None = None, **kwargs: Any) -> Graph:
    """Capture with every size of the arguments symbolic."""
    call = read(module, *args, **kwargs)
    return capture(module, module.forward, call, dims or every_dim(BATCH))


def arguments_of(graph: Graph, module: torch.nn.Module, call: Call) -> list[torch.Tensor]:
    """A value for each placeholder of the graph."""
    weights = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    inputs = dict(zip(call.signature.tensor_names, call.tensors, strict=True))
    found = []
    for node in graph.placeholders():
        role, source = node.meta["role"], node.meta["source"]
        found.append(
            inputs[source] if role == "input" else graph.constants[node.name] if role == "constant" else weights[source]
        )
    return found


class _SpecChecker(Interpreter):
    """Runs a graph and compares every value with what its node promised."""

    def __init__(self, graph: Graph, symbols: dict[str, int]) -> None:
        super().__init__(graph.module())
        self.symbols = symbols

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            self.compare(n, n.meta["spec"], value)
        return value

    def compare(self, node: Node, spec: Any, value: Any) -> None:
        if isinstance(spec, TensorSpec):
            promised = (evaluate_shape(spec.shape, self.symbols), spec.dtype)
            assert promised == (tuple(value.shape), value.dtype), f"{node.format_node()}: {spec} but {value.shape}"
        elif isinstance(spec, SizeSpec):
            assert evaluate(spec.expr, self.symbols) == value, node.format_node()
        else:
            assert len(spec) == len(value), node.format_node()
            for one, found in zip(spec, value, strict=True):
                self.compare(node, one, found)


@torch.no_grad()
def check_specs(graph: Graph, module: torch.nn.Module, call: Call) -> list[torch.Tensor]:
    """Run the graph on a call, holding each node's value against its spec.  returns the graph's results."""
    symbols = bind_symbols(graph, call.tensors)
    assert isinstance(symbols, dict), symbols
    return list(_SpecChecker(graph, symbols).run(*arguments_of(graph, module, call)))


@torch.no_grad()
def check_equal(graph: Graph, module: torch.nn.Module, *args: Any, tolerance: float = 1e-12, **kwargs: Any) -> None:
    """The graph computes what the module computes (relative to the largest value), and its specs are true."""
    call = read(module, *args, **kwargs)
    results = check_specs(graph, module, call)
    expected = _flat(module(*args, **kwargs))
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        if want.dtype.is_floating_point:
            error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
            assert error <= tolerance, f"relative error {error:.2e}"
        else:
            assert torch.equal(got, want)


def _flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def rewritten(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, Rewritten]:
    """A copy of the graph after the rules."""
    new = graph.copy()
    verify(new)
    report = rewrite(new, rules)
    verify(new)
    return new, report
