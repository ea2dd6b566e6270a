"""Binding times: cut a graph into what runs once for the weights, the prompt, the schedule, and what runs each step.

Every input is declared with its binding time, a node's time is the latest of what it reads, and the graph is cut along
those borders.  What crosses a border is a value with a name; a stage runs again only when one of its inputs changed.
Sizes have no stage: each stage reads them off its own tensors, or gets them as whole numbers.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from .errors import GraphError
from .graph import SIZE_OPERATORS, Dim, Graph, SizeSpec, TensorSpec, aten, is_size, verify


class Time(IntEnum):
    """When a value becomes known."""

    WEIGHTS = 1
    PROMPT = 2
    SCHEDULE = 3
    STEP = 4


@dataclass(frozen=True)
class Stage:
    """One binding time's part of the program.

    graph    placeholders: the call's inputs and earlier stages' values by name, weights, sizes
    outputs  names of the values it computes, in the order of the graph's results
    rows     whether the stage is row-wise in its only input, so that many timesteps can run as one batch
    """

    time: Time
    graph: Graph
    outputs: tuple[str, ...]
    rows: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(p.meta["source"] for p in self.graph.placeholders("input"))


@dataclass
class Program:
    """A staged graph.

    stages   in the order of their times; empty ones are left out
    inputs   names of the call's tensors
    results  what the call returns: values by name, sizes by expression, constants
    ranges, outputs  as in Graph
    """

    stages: dict[Time, Stage]
    inputs: tuple[str, ...]
    results: tuple[Any, ...]
    symbols: Graph
    outputs: Any = None
    fired: dict[str, int] = field(default_factory=dict)

    def count(self, time: Time, *targets: Callable[..., Any]) -> int:
        return self.stages[time].graph.count(*targets) if time in self.stages else 0


@dataclass(frozen=True)
class Value:
    """A result by its name: an input, a weight, or what a stage computes.

    shared  whether it outlives the call, so that the caller must get a copy
    """

    name: str
    role: str = "input"
    shared: bool = False


def binding_times(graph: Graph, declared: Mapping[str, Time]) -> dict[Node, Time]:
    """The time of every tensor node.  `declared` maps inputs to their times; an input that is not named is of the step.

    A node that reads sizes is known no earlier than the first input from which those sizes can be read.
    """
    times: dict[Node, Time] = {}
    symbol_times: dict[str, Time] = {}
    for node in graph.placeholders():
        is_input = node.meta["role"] == "input"
        times[node] = declared.get(node.meta["source"], Time.STEP) if is_input else Time.WEIGHTS
        if is_input:
            for symbol in _symbols(node.meta["spec"].shape):
                symbol_times[symbol] = min(times[node], symbol_times.get(symbol, Time.STEP))
    for node in graph.calls():
        if is_size(node):
            continue
        read = [times[n] for n in node.all_input_nodes if not is_size(n)]
        sizes = [n.meta["spec"].expr for n in node.all_input_nodes if is_size(n)]
        known = [symbol_times.get(s, Time.STEP) for s in _symbols(sizes)]
        times[node] = max(read + known, default=Time.WEIGHTS)
    return times


def _symbols(dims: Any) -> set[str]:
    return {n.id for d in dims if isinstance(d, str) for n in ast.walk(ast.parse(d)) if isinstance(n, ast.Name)} - set(
        _FUNCTIONS
    )


def cut(graph: Graph, declared: Mapping[str, Time], fired: Mapping[str, int] | None = None) -> Program:
    """Cut a graph into stages.  raises GraphError where a stage cannot be built."""
    times = binding_times(graph, declared)
    results = [r for r in graph.results if isinstance(r, Node)]
    stages = {}
    for time in Time:
        nodes = [n for n in graph.calls() if times.get(n) == time]
        leaving = [n for n in nodes if n in results or any(times.get(u, time) > time for u in n.users)]
        leaving = [n for n in leaving if isinstance(n.meta["spec"], TensorSpec)]
        if leaving:
            stages[time] = _build(time, graph, set(nodes), leaving, times)
    return Program(
        stages=stages,
        inputs=tuple(p.meta["source"] for p in graph.placeholders("input")),
        results=tuple(_result(r, graph, times) if isinstance(r, Node) else r for r in graph.results),
        symbols=_signature_only(graph),
        outputs=graph.outputs,
        fired=dict(fired or {}),
    )


def _result(node: Node, graph: Graph, times: Mapping[Node, Time]) -> Any:
    if is_size(node):
        return node.meta["spec"]
    if node.meta.get("role") == "constant":
        return graph.constants[node.name]
    if node.op == "placeholder":
        return Value(_value_name(node), node.meta["role"])
    role = "derived" if times[node] == Time.WEIGHTS else "input"
    return Value(_value_name(node), role, shared=times[node] != Time.STEP)


def _value_name(node: Node) -> str:
    """Inputs are known by their own names; what a stage computes by "%" and the node's name."""
    return str(node.meta["source"]) if node.op == "placeholder" else f"%{node.name}"


def _signature_only(graph: Graph) -> Graph:
    """The graph's inputs alone: enough to find the symbols of a call."""
    fx = FxGraph()
    for node in graph.placeholders("input"):
        fx.placeholder(node.name).meta = dict(node.meta)
    fx.output(())
    return Graph(fx, graph.ranges)


def _build(time: Time, graph: Graph, nodes: set[Node], leaving: list[Node], times: Mapping[Node, Time]) -> Stage:
    builder = _StageBuilder(time, times)
    for node in graph.fx.nodes:
        if node in nodes:
            for read in node.all_input_nodes:
                builder.outside(read, graph)
    sizes = _Sizes(builder)
    for node in graph.fx.nodes:
        if node in nodes:
            for read in node.all_input_nodes:
                if is_size(read):
                    builder.mapped[read] = sizes.of(read.meta["spec"].expr)
            copied = builder.fx.node_copy(node, lambda n: builder.mapped[n])
            copied.meta = dict(node.meta)
            builder.mapped[node] = copied
    builder.fx.output(tuple(builder.mapped[n] for n in leaving))
    made = Graph(builder.fx, constants=builder.constants)
    made.clean()
    verify(made)
    return Stage(time, made, tuple(_value_name(n) for n in leaving))


class _StageBuilder:
    def __init__(self, time: Time, times: Mapping[Node, Time]) -> None:
        self.time, self.times = time, times
        self.fx = FxGraph()
        self.mapped: dict[Node, Any] = {}
        self.constants: dict[str, torch.Tensor] = {}

    def outside(self, node: Node, graph: Graph) -> None:
        """Make a placeholder for a tensor that this stage reads but does not compute."""
        if node in self.mapped or is_size(node) or (node.op == "call_function" and self.times[node] == self.time):
            return
        if not isinstance(node.meta["spec"], TensorSpec):
            raise GraphError(f"{node.name} has several results and cannot cross a stage's border.")
        new = self.mapped[node] = self.fx.placeholder(node.name)
        new.meta = {"spec": node.meta["spec"], "role": self._role(node), "source": _value_name(node)}
        if node.meta.get("role") == "constant":
            self.constants[new.name] = graph.constants[node.name]

    def _role(self, node: Node) -> str:
        if node.op == "placeholder":
            return str(node.meta["role"])
        return "derived" if self.times[node] == Time.WEIGHTS else "input"


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod, "PythonMod": operator.mod, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "Max": torch.sym_max, "Min": torch.sym_min, "ToFloat": torch.sym_float, "FloatTrueDiv": operator.truediv,
    "IntTrueDiv": operator.truediv, "PowByNatural": operator.pow, "FloatPow": operator.pow,
    "TruncToInt": torch.sym_int, "floor": math.floor, "ceiling": math.ceil,
}  # fmt: skip
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
}  # fmt: skip


class _Sizes:
    """Size nodes of one stage, built from the texts of the sizes."""

    def __init__(self, builder: _StageBuilder) -> None:
        self.fx = builder.fx
        self.known: dict[str, Node] = {}
        self.sources: dict[str, tuple[Node, int]] = {}
        for node in builder.mapped.values():
            if isinstance(node, Node) and node.meta["role"] == "input":
                for axis, dim in enumerate(node.meta["spec"].shape):
                    if isinstance(dim, str) and dim.isidentifier():
                        self.sources.setdefault(dim, (node, axis))

    def of(self, dim: Dim) -> Node | int:
        if not isinstance(dim, str):
            return dim
        built: Node | int = self._build(ast.parse(dim, mode="eval").body)
        return built

    def _build(self, tree: ast.expr) -> Any:
        text = ast.unparse(tree)
        if isinstance(tree, ast.Constant):
            return tree.value
        if text not in self.known:
            self.known[text] = self._make(tree, text)
        return self.known[text]

    def _make(self, tree: ast.expr, text: str) -> Node:
        if isinstance(tree, ast.Name):
            return self._symbol(tree.id)
        if isinstance(tree, ast.BinOp):
            return self._call(_OPERATORS[type(tree.op)], text, self._build(tree.left), self._build(tree.right))
        if isinstance(tree, ast.UnaryOp):
            return self._call(_OPERATORS[type(tree.op)], text, self._build(tree.operand))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS:
            return self._call(_FUNCTIONS[tree.func.id], text, *map(self._build, tree.args))
        raise GraphError(f"the size {text!r} cannot be computed inside a stage.")

    def _symbol(self, symbol: str) -> Node:
        if symbol in self.sources:
            return self._call(aten.sym_size.int, symbol, *self.sources[symbol])
        first = next(iter(self.fx.nodes), None)
        with self.fx.inserting_before(first):
            node = self.fx.placeholder(f"size_{symbol}")
        node.meta = {"spec": SizeSpec(symbol), "role": "size", "source": symbol}
        return node

    def _call(self, target: Callable[..., Any], text: str, *args: Any) -> Node:
        if target not in SIZE_OPERATORS.values() and target is not aten.sym_size.int:
            raise GraphError(f"no size operator for {text!r}.")
        node = self.fx.call_function(target, args)
        node.meta["spec"] = SizeSpec(text)
        return node


# ---- many timesteps as rows of one batch ---------------------------------------------------------------------------

ROWS = "rows"
"""The symbol for "as many rows as there are timesteps"."""

_POINTWISE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.exp.default,
    aten.sin.default, aten.cos.default, aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default,
    aten.tanh.default, aten.to.dtype, aten.to.dtype_layout, aten.pow.Tensor_Scalar, aten.log.default, aten.mish.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default,
)  # fmt: skip


def batch_rows(stage: Stage, name: str) -> Stage:
    """Let a stage that depends on one number take a column of them: `[]` becomes `[rows]`, every `[1, …]` becomes
    `[rows, …]`.  Equation: f(t) for each row = f(all rows), which holds as long as every operator is row-wise.

    returns the stage unchanged where it is not of that form.
    """
    inputs = stage.graph.placeholders("input", "size")
    if len(inputs) != 1 or inputs[0].meta["source"] != name or inputs[0].meta["spec"].shape != ():
        return stage
    graph = stage.graph.copy()
    (source,) = graph.placeholders("input")
    rows: set[Node] = {source}
    source.meta["spec"] = TensorSpec((ROWS,), source.meta["spec"].dtype)
    for node in graph.calls():
        if rows.isdisjoint(node.all_input_nodes):
            continue
        if _is_first_axis(node, source):
            node.replace_all_uses_with(source)
        elif is_size(node) or not _is_rowwise(node, rows):
            return stage
        else:
            found = node.meta["spec"]
            node.meta["spec"] = found.with_shape((ROWS, *found.shape[1:]))
            rows.add(node)
    if not all(isinstance(r, Node) and r in rows for r in graph.results):
        return stage
    graph.clean()
    verify(graph)
    return Stage(stage.time, graph, stage.outputs, rows=True)


def _is_first_axis(node: Node, source: Node) -> bool:
    """`t[None]`, in any of its forms: the number becomes a row."""
    return node.args[0] is source and node.meta["spec"].shape == (1,)


def _is_rowwise(node: Node, rows: set[Node]) -> bool:
    found = node.meta["spec"]
    if not isinstance(found, TensorSpec) or not found.shape or found.shape[0] != 1:
        return False
    others = [n for n in node.all_input_nodes if n not in rows]
    rank = len(found.shape)
    if any(isinstance(n.meta["spec"], TensorSpec) and len(n.meta["spec"].shape) == rank and n.meta["spec"].shape[0] != 1
           for n in others if node.target is not aten.linear.default):  # fmt: skip
        return False
    if node.target in _POINTWISE:
        return True
    if node.target is aten.linear.default:
        return node.args[0] in rows and not rows & set(node.all_input_nodes[1:])
    if node.target is aten.unsqueeze.default:
        return int(node.args[1]) % rank != 0  # type: ignore[arg-type]
    if node.target in (aten.slice.Tensor, aten.narrow.default):
        return len(node.args) > 1 and int(node.args[1]) % rank != 0  # type: ignore[arg-type]
    if node.target is aten.cat.default:
        parts = node.args[0]
        return all(p in rows for p in parts) and len(node.args) > 1 and int(node.args[1]) % rank != 0  # type: ignore[union-attr,arg-type]
    return False
