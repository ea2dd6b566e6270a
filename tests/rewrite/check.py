"""What the tests of rewriting share: capturing small modules, running graphs, and holding them against their specs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class _Function(torch.nn.Module):
    """A module that is one function of its weights and up to three tensors."""

    def __init__(self, function: Callable[..., Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, z: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.function(self, *(t for t in (x, y, z) if t is not None))


class Case:
    """A small function, captured; what rules make of it."""

    def __init__(
        self, function: Callable[..., Any], *tensors: torch.Tensor, dims: DimRule | None = None, **weights: torch.Tensor
    ) -> None:
        self.module = _Function(function, weights).eval()
        self.tensors = tensors
        self.graph = graph_of(self.module, *tensors, dims=dims)
        self.report = Rewritten()

    def fires(self, *rules: Rule) -> int:
        """Apply the rules.  returns how often the last one fired."""
        self.graph, self.report = rewritten(self.graph, rules)
        return self.report.fired[rules[-1].name]

    def reason(self, *rules: Rule) -> str:
        """Apply the rules, of which the last must not fire.  returns why it declined; "" where it did not match."""
        assert self.fires(*rules) == 0
        return " | ".join(d.reason for d in self.report.declined if d.rule == rules[-1].name)

    def count(self, *targets: Callable[..., Any]) -> int:
        return self.graph.count(*targets)

    def agrees(self, *calls: tuple[torch.Tensor, ...], tolerance: float = 1e-12) -> None:
        """The graph computes what the function does, for the captured sizes and for others."""
        for tensors in (self.tensors, *calls):
            check_equal(self.graph, self.module, *tensors, tolerance=tolerance)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Seeded by the shape: the same for the same shape in every test."""
    generator = torch.Generator().manual_seed(sum((i + 1) * 7919 * n for i, n in enumerate(shape)))
    return torch.randn(shape, dtype=dtype, generator=generator)
