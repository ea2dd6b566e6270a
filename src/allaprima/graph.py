"""The one intermediate form: a torch.fx graph of ATen operators whose sizes may be symbols.

Each node carries `meta["spec"]`: a `TensorSpec`, a `SizeSpec`, or a tuple of them for operators with several results.
Sizes are ints or Python expressions over symbols, such as "s0*s1" or "((s1 - 1)//2) + 1"; two dimensions are known to
be equal when their texts are.  Placeholders carry `meta["role"]` and `meta["source"]`:

role        source
input       name of the call's argument, or of an earlier stage's result
parameter   the parameter's name in the module;  buffer, constant likewise
derived     name of a result of the weights stage: computed from parameters once for each state of the weights
size        a symbol: a whole number that the stage cannot read off its tensors
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from .errors import GraphError

Dim: TypeAlias = int | str
aten = torch.ops.aten

ROLES = ("input", "parameter", "buffer", "constant", "derived", "size")


@dataclass(frozen=True)
class TensorSpec:
    """Shape (ints or expressions) and dtype of a tensor."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"

    def with_shape(self, shape: Iterable[Dim]) -> TensorSpec:
        return TensorSpec(tuple(shape), self.dtype)


@dataclass(frozen=True)
class SizeSpec:
    """A whole number that is known once the inputs' sizes are."""

    expr: Dim

    def __str__(self) -> str:
        return f"size {self.expr}"


Spec: TypeAlias = "TensorSpec | SizeSpec | tuple[Any, ...] | None"


@dataclass
class Graph:
    """A captured program: `fx` and what is needed to call it.

    ranges     symbol -> smallest and largest size (None: no bound) for which the capture is known to hold
    guards     what else must hold of the sizes: the branches that the module's code took, as texts
    constants  placeholder name -> tensor that the module made from nothing (role "constant")
    outputs    the call's result as a pytree: text form of its TreeSpec
    """

    fx: FxGraph
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: Any = None

    def placeholders(self, *roles: str) -> list[Node]:
        return [n for n in self.fx.nodes if n.op == "placeholder" and (not roles or n.meta["role"] in roles)]

    @property
    def output(self) -> Node:
        last: Node = list(self.fx.nodes)[-1]
        return last

    @property
    def results(self) -> list[Any]:
        """What the graph returns: nodes, or None and numbers where the module returned those."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    def calls(self, *targets: Callable[..., Any]) -> list[Node]:
        return [n for n in self.fx.nodes if n.op == "call_function" and (not targets or n.target in targets)]

    def count(self, *targets: Callable[..., Any]) -> int:
        return len(self.calls(*targets))

    def clean(self) -> None:
        """Remove what nobody reads; inputs stay, since they are the calling convention."""
        for node in reversed(self.fx.nodes):
            dead = not node.users and node.op != "output"
            if dead and (node.op != "placeholder" or node.meta["role"] != "input"):
                self.constants.pop(node.name, None)
                self.fx.erase_node(node)

    def copy(self) -> Graph:
        fx = FxGraph()
        mapped: dict[Node, Node] = {}
        for node in self.fx.nodes:
            mapped[node] = fx.node_copy(node, lambda n: mapped[n])
            mapped[node].meta = dict(node.meta)
        return Graph(fx, dict(self.ranges), list(self.guards), dict(self.constants), self.outputs)

    def module(self) -> GraphModule:
        """An nn.Module whose arguments are the placeholders in order: the ATen form, ready to run."""
        return GraphModule(torch.nn.Module(), self.fx)

    def __str__(self) -> str:
        return "\n".join(describe(n) for n in self.fx.nodes)


# ---- reading nodes -------------------------------------------------------------------------------------------------


def is_call(node: Any, *targets: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def spec(node: Node) -> TensorSpec:
    """The node's tensor spec.  raises GraphError where the node is no tensor."""
    found = node.meta.get("spec")
    if not isinstance(found, TensorSpec):
        raise GraphError(f"{node.format_node()} has spec {found}, a tensor was expected.")
    return found


def shape(node: Node) -> tuple[Dim, ...]:
    return spec(node).shape


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("spec"), TensorSpec)


def is_size(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("spec"), SizeSpec)


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An operator's argument, wherever the call put it."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of an ATen call by their names in the operator's schema, defaults filled in."""
    named: dict[str, Any] = {}
    for i, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            named[arg.name] = node.args[i]
        elif arg.name in node.kwargs:
            named[arg.name] = node.kwargs[arg.name]
        else:
            named[arg.name] = arg.default_value if arg.has_default_value() else None
    return named


def sole_user(node: Node) -> Node | None:
    """The only node that reads this one, else None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def describe(node: Node) -> str:
    """One readable line: `conv2d_3 = aten.conv2d.default(...)  # float32[s0, 320, s1, s2]`."""
    found = node.meta.get("spec")
    note = f"  # {found}" if found is not None else ""
    if node.op == "placeholder":
        return f"{node.name} = {node.meta['role']} {node.meta['source']!r}{note}"
    if node.op == "output":
        return f"return {tuple(node.args[0])}"  # type: ignore[arg-type]
    parts = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{node.name} = {target_name(node.target)}({', '.join(parts)}){note}"


# ---- editing -------------------------------------------------------------------------------------------------------


def call(
    before: Node, target: Callable[..., Any], args: tuple[Any, ...], spec: Spec, kwargs: dict[str, Any] | None = None
) -> Node:
    """Insert `target(*args, **kwargs)` in front of a node, with its spec."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs or {})
    node.meta["spec"] = spec
    return node


def replace(old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`, and erase `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


# ---- sizes ---------------------------------------------------------------------------------------------------------

_SIZE_FUNCTIONS = {
    "Mod": operator.mod, "PythonMod": operator.mod, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b), "Max": max, "Min": min, "floor": math.floor, "ceiling": math.ceil,
    "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv, "ToFloat": float, "TruncToInt": int,
    "RoundToInt": round, "PowByNatural": pow, "FloatPow": pow, "Abs": abs, "sqrt": math.sqrt,
    "BitwiseFn_bitwise_and": operator.and_, "BitwiseFn_bitwise_or": operator.or_, "LShift": operator.lshift,
    "RShift": operator.rshift, "Eq": operator.eq, "Ne": operator.ne, "Not": operator.not_,
    "And": lambda *parts: all(parts), "Or": lambda *parts: any(parts),
    "__builtins__": {},
}  # fmt: skip


_ARITHMETIC = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


@lru_cache(maxsize=8192)
def _compiled(expression: str) -> CodeType:
    """raises GraphError for anything but arithmetic: a text may come from a record on disk"""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise GraphError(f"{expression!r} is no size.") from error
    if not all(isinstance(part, _ARITHMETIC) for part in ast.walk(tree)):
        raise GraphError(f"{expression!r} is no size: only arithmetic is allowed.")
    if unknown := {ast.unparse(p.func) for p in ast.walk(tree) if isinstance(p, ast.Call)} - _SIZE_FUNCTIONS.keys():
        raise GraphError(f"{expression!r} calls {', '.join(unknown)}, which is no arithmetic of sizes.")
    return compile(tree, "<size>", "eval")


def number(dim: Dim, symbols: Mapping[str, int]) -> Any:
    """The number that an expression has for given symbols: whole for a size, a float for a quotient of sizes."""
    if not isinstance(dim, str):
        return dim
    return eval(_compiled(dim), _SIZE_FUNCTIONS, symbols)  # noqa: S307 - `_compiled` lets arithmetic through only


def evaluate(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The size that an expression has for given symbols."""
    return int(number(dim, symbols))


def evaluate_shape(dims: Iterable[Dim], symbols: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(evaluate(d, symbols) for d in dims)


def peak_bytes(graph: Graph, symbols: dict[str, int]) -> int:
    """The most bytes of intermediate tensors that live at once, were each made when its node runs and freed after its
    last reader.  Views count as copies, so this is an upper bound up to the kernels' workspaces."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    freed: dict[int, int] = {}
    live = peak = 0
    for index, node in enumerate(graph.fx.nodes):
        found = node.meta.get("spec")
        if node.op == "call_function" and isinstance(found, TensorSpec):
            size = math.prod(evaluate_shape(found.shape, symbols | {"rows": 1})) * found.dtype.itemsize
            last = max((order[user] for user in node.users), default=index)
            freed[last] = freed.get(last, 0) + size
            live += size
            peak = max(peak, live)
        live -= freed.pop(index, 0)
    return peak


# ---- which functions a graph may call ------------------------------------------------------------------------------

SIZE_OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")
} | {"operator.getitem": operator.getitem, "torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min,
     "torch.sym_float": torch.sym_float, "torch.sym_int": torch.sym_int, "torch.sym_not": torch.sym_not,
     "torch.sym_ite": torch.sym_ite, "math.ceil": math.ceil, "math.floor": math.floor, "builtins.max": builtins.max,
     "builtins.min": builtins.min, "builtins.int": builtins.int}  # fmt: skip
_OPERATOR_NAMES = {function: name for name, function in SIZE_OPERATORS.items()}
OPS_PACKAGE = "allaprima.ops"


def target_name(target: Any) -> str:
    """A stable name for a call's target: "aten.conv2d.default", "operator.mul", "allaprima.ops.geglu"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _OPERATOR_NAMES:
        return _OPERATOR_NAMES[target]
    if getattr(target, "__module__", "").startswith(OPS_PACKAGE):
        return f"{OPS_PACKAGE}.{target.__name__}"
    raise GraphError(f"a graph may not call {target!r}: only ATen operators, size arithmetic and {OPS_PACKAGE}.")


@lru_cache(maxsize=4096)
def target_named(name: str) -> Callable[..., Any]:
    """The inverse of `target_name`.  raises GraphError for a name that no graph of ours has."""
    if name in SIZE_OPERATORS:
        return SIZE_OPERATORS[name]
    if name.startswith(OPS_PACKAGE + "."):
        from . import ops

        found = getattr(ops, name.removeprefix(OPS_PACKAGE + "."), None)
    else:
        namespace, _, rest = name.partition(".")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace, None), packet, None), overload, None)
    if found is None or (not callable(found)):
        raise GraphError(f"no operator {name!r}: the graph was written by another version.")
    return found  # type: ignore[no-any-return]


# ---- the law -------------------------------------------------------------------------------------------------------


def verify(graph: Graph) -> None:
    """Raise GraphError unless the graph is legal: in order, no dangling reads, known targets, a spec on every node."""
    seen: set[Node] = set()
    nodes = list(graph.fx.nodes)
    for node in nodes:
        for read in node.all_input_nodes:
            if read not in seen:
                raise GraphError(f"{node.name} reads {read.name}, which comes later or is not in the graph.")
        seen.add(node)
        _verify_node(node)
    if not nodes or nodes[-1].op != "output":
        raise GraphError("the graph does not end with its output.")
    extra = set(graph.constants) - {n.name for n in graph.placeholders("constant")}
    if extra:
        raise GraphError(f"constants without a placeholder: {sorted(extra)}.")
    for guard in graph.guards:
        _compiled(guard)


def _verify_node(node: Node) -> None:
    if node.op == "output":
        return
    if node.op == "placeholder":
        if node.meta.get("role") not in ROLES or "source" not in node.meta:
            raise GraphError(f"placeholder {node.name} has role {node.meta.get('role')!r}; allowed: {ROLES}.")
    elif node.op == "call_function":
        target_name(node.target)
    else:
        raise GraphError(f"{node.name} is a {node.op}; a graph holds placeholders, calls and one output.")
    if not isinstance(node.meta.get("spec"), TensorSpec | SizeSpec | tuple):
        raise GraphError(f"{describe(node)} has no spec.")


def walk_sizes(node: Node) -> Iterator[Node]:
    """The size nodes that a node reads, directly or through other sizes."""
    for read in node.all_input_nodes:
        if is_size(read):
            yield read
            yield from walk_sizes(read)
