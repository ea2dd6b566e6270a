"""From a module and a call to a Graph: torch.export with symbolic sizes, then our own record of nodes.

A call is split into *tensors*, whose sizes may change from call to call, and everything else (flags, None, numbers),
which belongs to the call's `Signature`.  One graph is captured for each signature, not for each size.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim as ExportDim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph as FxGraph
from torch.fx import Node, _symbolic_trace
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .graph import Graph, SizeSpec, Spec, TensorSpec, aten, evaluate, number, target_name, verify

# ---- calls ---------------------------------------------------------------------------------------------------------

_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Signature:
    """What two calls must share to run the same graph.

    structure  text of the argument tree
    leaves     for each leaf its path and either ("tensor", dtype, rank, device type) or ("constant", value)
    """

    structure: str
    leaves: tuple[tuple[str, tuple[Any, ...]], ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(name for name, leaf in self.leaves if leaf[0] == "tensor")

    def __str__(self) -> str:
        shown = [f"{n}: {_short(leaf)}" for n, leaf in self.leaves if leaf[0] == "tensor" or leaf[1] is not None]
        return ", ".join(shown)


def _short(leaf: tuple[Any, ...]) -> str:
    return f"{str(leaf[1]).removeprefix('torch.')} rank {leaf[2]}" if leaf[0] == "tensor" else repr(leaf[1])


@dataclass(frozen=True)
class Call:
    """One call of a module, taken apart: `tensors` in the order of `signature.tensor_names`."""

    signature: Signature
    tensors: tuple[torch.Tensor, ...]
    tree: pytree.TreeSpec


class CallReader:
    """Turns (args, kwargs) into a Call: arguments in the order of the forward's parameters and without those that equal
    their defaults, so that positional and keyword use, spelled out or not, are the same call."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.parameters = inspect.signature(forward)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        try:
            bound = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(f"the call does not fit forward{self.parameters}: {error}.") from error
        arguments = {name: value for name, value in bound.arguments.items() if not self._is_default(name, value)}
        leaves, tree = pytree.tree_flatten(arguments)
        paths = _paths(arguments, leaves)
        entries = tuple((path, _leaf_key(path, leaf)) for path, leaf in zip(paths, leaves, strict=True))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        return Call(Signature(str(tree), entries), tensors, tree)

    def _is_default(self, name: str, value: Any) -> bool:
        """An argument that says what the default says: with it or without it is the same call."""
        return (value is None or isinstance(value, bool)) and self.parameters.parameters[name].default is value


def _paths(arguments: dict[str, Any], leaves: list[Any]) -> list[str]:
    if len(leaves) == len(arguments) and all(a is b for a, b in zip(arguments.values(), leaves, strict=True)):
        return list(arguments)  # the common case: no argument has parts
    with_paths, _ = pytree.tree_flatten_with_path(arguments)
    return [".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in with_paths]


def _leaf_key(path: str, leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        return "tensor", leaf.dtype, leaf.dim(), leaf.device.type
    if isinstance(leaf, _CONSTANTS):
        return "constant", leaf, type(leaf).__name__  # True, 1 and 1.0 are equal, and not the same call
    raise CaptureError(
        f"argument {path!r} is a {type(leaf).__name__}: only tensors, numbers, texts and None can be captured."
    )


# ---- which sizes change --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that may change between calls.

    example  the size used while capturing (never 0 or 1, which torch.export would take for a constant)
    name     dimensions of one name are equal in every call; None lets torch.export find out
    """

    example: int
    name: str | None = None
    min: int = 1
    max: int = 63


DimRule = Callable[[str, torch.Tensor], dict[int, DynamicDim]]
"""(name of the input, tensor) -> its dimensions that change."""


def dim_rules(tensors: Sequence[torch.Tensor]) -> list[DimRule]:
    """For a module of which nothing is known: what to try, from the most general to the least.

    A shared first dimension is taken for the batch.  diffusers' modules branch at a batch of 64, which is why a smaller
    range is tried as well; every other dimension may change unless the module's code forbids it.
    """
    batches = {t.shape[0] for t in tensors if t.dim() > 0}
    rules = []
    if len(batches) == 1:
        example = max(2, batches.pop())
        rules = [every_dim(DynamicDim(example, "batch", 1, limit)) for limit in (2**16, 63) if example <= limit]
    return [*rules, every_dim(), no_dim]


def every_dim(batch: DynamicDim | None = None) -> DimRule:
    """Every dimension larger than one may change; the first one as `batch` says."""

    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        found = {axis: DynamicDim(size) for axis, size in enumerate(tensor.shape) if size > 1}
        if batch is not None and tensor.dim() > 0:
            found[0] = batch
        return found

    return dims


def no_dim(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    """The rule for a capture at exactly one size."""
    return {}


# ---- capturing -----------------------------------------------------------------------------------------------------


class _Caller(torch.nn.Module):
    """A module whose forward takes the call's tensors and returns the leaves of its result."""

    def __init__(
        self, module: torch.nn.Module, forward: Callable[..., Any], call: Call, trees: list[pytree.TreeSpec]
    ) -> None:
        super().__init__()
        self.module = module
        # torch.export undoes what forward assigns to the module, so the result's structure leaves by this closure.
        self._run: Callable[[Any], list[Any]] = lambda bound: _flat(_apply(forward, bound), trees)
        self._call = call

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        given = iter(tensors)
        leaves = [next(given) if leaf[0] == "tensor" else leaf[1] for _, leaf in self._call.signature.leaves]
        return self._run(pytree.tree_unflatten(leaves, self._call.tree))


def _flat(result: Any, trees: list[pytree.TreeSpec]) -> list[Any]:
    flat, tree = pytree.tree_flatten(result)
    trees.append(tree)
    return list(flat)


def _apply(forward: Callable[..., Any], bound: dict[str, Any]) -> Any:
    signature = inspect.signature(forward)
    arguments = inspect.BoundArguments(signature, dict(bound))
    return forward(*arguments.args, **arguments.kwargs)


def capture(module: torch.nn.Module, forward: Callable[..., Any], call: Call, dims: DimRule) -> Graph:
    """Capture `forward(...)` as a Graph.

    forward  the module's own forward, which an engine may have replaced on the instance
    dims     which sizes are symbols
    raises   CaptureError with the reason that torch.export gave
    """
    trees: list[pytree.TreeSpec] = []
    caller = _Caller(module, forward, call, trees)
    names = call.signature.tensor_names
    wanted = [dims(name, tensor) for name, tensor in zip(names, call.tensors, strict=True)]
    examples = tuple(_example(t, w) for t, w in zip(call.tensors, wanted, strict=True))
    named: dict[str, Any] = {}
    shapes = tuple({i: _export_dim(d, named) for i, d in w.items()} or None for w in wanted)
    try:
        with _alone(), _quiet(), _left_alone(module), torch.no_grad():
            program = torch.export.export(caller, examples, dynamic_shapes=(shapes,), strict=False)
            if any(_mutates(n) for n in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:  # noqa: BLE001 - export raises whatever the module's code raises on symbolic tensors
        raise CaptureError(f"{type(module).__name__} cannot be captured: {_first_lines(error)}") from error
    graph = _Reader(program, names).read()
    graph.outputs = trees[-1]
    verify(graph)
    return graph


def _example(tensor: torch.Tensor, dims: dict[int, DynamicDim]) -> torch.Tensor:
    shape = [dims[i].example if i in dims else size for i, size in enumerate(tensor.shape)]
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _export_dim(dim: DynamicDim, named: dict[str, Any]) -> Any:
    if dim.name is None:
        return ExportDim.AUTO
    return named.setdefault(dim.name, ExportDim(dim.name, min=dim.min, max=dim.max))


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


_one_at_a_time = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """One capture at a time in a process, and none of it seen by other threads: while torch's tracer works, it replaces
    `Module.__call__` and `Module.__getattr__` for everybody, and would record what other threads call."""
    with _one_at_a_time:
        tracing, patch_method = threading.get_ident(), _symbolic_trace._Patcher.patch_method

        def patch_here(self: Any, cls: type, name: str, new: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            old = getattr(cls, name)

            def method(*given: Any, **named: Any) -> Any:
                return (new if threading.get_ident() == tracing else old)(*given, **named)

            patch_method(self, cls, name, method, *args, **kwargs)

        _symbolic_trace._Patcher.patch_method = patch_here  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            _symbolic_trace._Patcher.patch_method = patch_method  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals; nothing of that is the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _left_alone(module: torch.nn.Module) -> Iterator[None]:
    """torch.export leaves copies where the module had lists and tuples; put the module's own back."""
    before = [(part.__dict__, dict(part.__dict__)) for part in module.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.update(values)


def _first_lines(error: BaseException, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:count])[:500]}"


class _Reader:
    """Reads an ExportedProgram into a Graph: specs as texts, symbols named s0, s1, … in order of first use,
    assertions dropped (the ranges that they imply are kept)."""

    def __init__(self, program: torch.export.ExportedProgram, names: Sequence[str]) -> None:
        self.program, self.names = program, names
        self.symbols: dict[Any, Any] = {}

    def read(self) -> Graph:
        graph = Graph(FxGraph())
        inputs = {s.arg.name: s for s in self.program.graph_signature.input_specs}
        self._check_outputs()
        mapped: dict[Node, Node] = {}
        names = iter(self.names)
        for node in self.program.graph.nodes:
            if _is_assertion(node):
                continue
            new = mapped[node] = graph.fx.node_copy(node, lambda n: mapped[n])
            new.meta = {"spec": self._spec(node.meta.get("val"))} if node.op != "output" else {}
            if node.op == "placeholder":
                self._placeholder(new, inputs[node.name], names, graph)
            elif node.op == "call_function":
                target_name(node.target)
        if any(n.op == "get_attr" for n in mapped):
            raise CaptureError("the graph has branches (torch.cond) or nested modules; it runs eagerly.")
        graph.clean()
        graph.ranges = self._ranges(graph)
        graph.guards = self._guards(graph)
        return graph

    def _check_outputs(self) -> None:
        for out in self.program.graph_signature.output_specs:
            if out.kind is not OutputKind.USER_OUTPUT:
                raise CaptureError(f"the module writes to {out.target!r} while it runs; it runs eagerly.")

    def _placeholder(self, node: Node, given: Any, names: Iterator[str], graph: Graph) -> None:
        kind, target = given.kind, str(given.target).removeprefix("module.")
        if kind is InputKind.USER_INPUT:
            node.meta |= {"role": "input", "source": next(names)}
        elif kind is InputKind.PARAMETER:
            node.meta |= {"role": "parameter", "source": target}
        elif kind is InputKind.BUFFER:
            node.meta |= {"role": "buffer", "source": target}
        elif kind is InputKind.CONSTANT_TENSOR:
            node.meta |= {"role": "constant", "source": target}
            graph.constants[node.name] = self.program.constants[given.target].detach()
        else:
            raise CaptureError(f"input {node.name} is a {kind.name}, which a graph cannot hold.")

    def _spec(self, value: Any) -> Spec:
        if isinstance(value, torch.Tensor):
            return TensorSpec(tuple(self._dim(s) for s in value.shape), value.dtype)
        if isinstance(value, tuple | list):
            return tuple(self._spec(v) for v in value)
        if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            return SizeSpec(self._dim(value))
        raise CaptureError(f"a value of type {type(value).__name__} cannot be captured.")

    def _dim(self, size: Any) -> Any:
        if isinstance(size, int | float):
            return size
        expression = size.node.expr
        if not hasattr(expression, "free_symbols"):
            return int(expression)
        for symbol in sorted(expression.free_symbols, key=str):
            self._symbol(symbol)
        renamed = expression.xreplace(self.symbols)
        return int(renamed) if renamed.is_Integer else str(renamed)

    def _symbol(self, symbol: Any) -> None:
        if symbol not in self.symbols:
            import sympy  # type: ignore[import-untyped]

            self.symbols[symbol] = sympy.Symbol(f"s{len(self.symbols)}", integer=True, positive=True)

    def _ranges(self, graph: Graph) -> dict[str, tuple[int, int | None]]:
        ranges = {}
        for symbol, bounds in self.program.range_constraints.items():
            if symbol in self.symbols:
                upper = bounds.upper
                finite = upper.is_Integer and int(upper) < 2**31
                ranges[str(self.symbols[symbol])] = (max(1, int(bounds.lower)), int(upper) if finite else None)
        return ranges

    def _guards(self, graph: Graph) -> list[str]:
        """Branches on sizes that the module's own code took, as texts of our symbols.

        Those that torch took by itself while it worked out shapes and strides change no operator; nor does the choice
        of `max([a, b])` where the graph reads neither a nor b.
        """
        env = _shape_env(self.program)
        live = "\n".join(str(n.meta.get("spec")) for n in graph.fx.nodes)
        found: dict[str, None] = {}
        for guard in env.guards if env is not None else ():
            expression = guard.expr.xreplace(env.replacements).xreplace(self.symbols)
            known = {str(s) for s in expression.free_symbols} <= {str(s) for s in self.symbols.values()}
            sides = [str(side) for side in expression.args if not side.is_number]
            idle = _is_choice(guard) and not any(side in live for side in sides)
            if known and not idle and not _inside_torch(guard):
                found[str(expression)] = None
        return [text for text in found if text != "True"]


def _shape_env(program: torch.export.ExportedProgram) -> Any:
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def _inside_torch(guard: Any) -> bool:
    return "/torch/_" in str(guard.sloc.framework_loc) and not _is_choice(guard)


def _is_choice(guard: Any) -> bool:
    """Whether a `max` or `min` in the module's code compared two sizes."""
    return "_tensor_min_max" in str(guard.sloc.framework_loc)


_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def _is_assertion(node: Node) -> bool:
    return node.op == "call_function" and (
        any(name in str(node.target) for name in _ASSERTIONS) or node.name.startswith("_guards")
    )


# ---- which sizes a graph serves ------------------------------------------------------------------------------------


def bind_symbols(graph: Graph, tensors: Sequence[torch.Tensor]) -> dict[str, int] | str:
    """The size of each symbol in this call, or in words why the graph does not serve the call's shapes."""
    symbols: dict[str, int] = {}
    derived = []
    for node, tensor in zip(graph.placeholders("input"), tensors, strict=True):
        for axis, (dim, size) in enumerate(zip(node.meta["spec"].shape, tensor.shape, strict=True)):
            if isinstance(dim, str) and dim.isidentifier():
                if symbols.setdefault(dim, size) != size:
                    return f"{node.meta['source']} axis {axis} is {size}, {symbols[dim]} was expected"
            else:
                derived.append((node, axis, dim, size))
    for node, axis, dim, size in derived:
        if isinstance(dim, str):
            _solve(dim, size, symbols)
        if evaluate(dim, symbols) != size:
            return f"{node.meta['source']} axis {axis} is {size}, {dim} was captured"
    return symbols


def _solve(dim: str, size: int, symbols: dict[str, int]) -> None:
    """Find the one unknown symbol of a product such as "8*s1"."""
    factor, _, symbol = dim.partition("*")
    if symbol.isidentifier() and factor.isdigit() and symbol not in symbols:
        symbols[symbol] = size // int(factor)
    elif unknown := [s for s in _identifiers(dim) if s not in symbols]:
        raise CaptureError(f"cannot solve {dim} = {size} for {unknown}.")


_WORDS = re.compile(r"\bs\d+\b")


def _identifiers(dim: str) -> list[str]:
    return _WORDS.findall(dim)


def out_of_range(graph: Graph, symbols: Mapping[str, int]) -> dict[str, int]:
    """The symbols whose size lies outside what the capture is known to hold for."""
    outside: dict[str, int] = {}
    for guard in graph.guards:
        if not evaluate(guard, symbols):
            outside |= {symbol: symbols[symbol] for symbol in _identifiers(guard)}
    for symbol, (low, high) in graph.ranges.items():
        size = symbols.get(symbol)
        if size is not None and (size < low or (high is not None and size > high)):
            outside[symbol] = size
    return outside


def range_of(special: Graph, graph: Graph, symbol: str) -> tuple[int, int | None] | None:
    """For which sizes a graph captured beyond `graph`'s ranges is known to hold, in terms of `graph`'s symbol."""
    specs = {p.meta["source"]: p.meta["spec"] for p in special.placeholders("input")}
    for node in graph.placeholders("input"):
        if symbol in node.meta["spec"].shape:
            dim = specs[node.meta["source"]].shape[node.meta["spec"].shape.index(symbol)]
            return special.ranges.get(dim) if isinstance(dim, str) else (dim, dim)
    return None


def widen_guards(graph: Graph, special: Graph, symbols: Mapping[str, int]) -> None:
    """Let guards that a call violates hold as well where the special capture's do."""
    names = _renaming(special, graph)
    texts = [_WORDS.sub(lambda m: names.get(m[0], m[0]), g) for g in special.guards]
    if not {word for g in special.guards for word in _identifiers(g)} <= names.keys():
        texts = [f"{symbol} == {size}" for symbol, size in symbols.items()]
    also = " and ".join(f"({t})" for t in texts) or "True"
    graph.guards = [g if evaluate(g, symbols) else f"({g}) or ({also})" for g in graph.guards]
    graph.guards = [g for g in graph.guards if not g.endswith(" or (True)")]


def _renaming(special: Graph, graph: Graph) -> dict[str, str]:
    """Symbol of one graph -> symbol of another that stands for the same axis."""
    pairs = zip(special.placeholders("input"), graph.placeholders("input"), strict=True)
    dims = (pair for a, b in pairs for pair in zip(a.meta["spec"].shape, b.meta["spec"].shape, strict=True))
    return {a: b for a, b in dims if isinstance(a, str) and isinstance(b, str)}


def beyond(graph: Graph, dims: DimRule, outside: Mapping[str, int]) -> DimRule:
    """The rule `dims`, but the axes whose size lies outside of the graph's ranges take the sizes of the call."""
    shapes = {p.meta["source"]: p.meta["spec"].shape for p in graph.placeholders("input")}

    def found(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        wanted = dims(name, tensor)
        for axis in list(wanted):
            if not outside.keys().isdisjoint(_identifiers(str(shapes[name][axis]))):
                del wanted[axis]
                if tensor.shape[axis] > 1:
                    wanted[axis] = DynamicDim(tensor.shape[axis])
        return wanted

    return found


_ALL_ROWS = 2**63 - 1


def same_program(general: Graph, special: Graph, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a graph captured at a call's sizes is what the general graph becomes there: operators and arguments
    alike."""

    def lines(graph: Graph) -> list[Any]:
        symbols = bind_symbols(graph, tensors)
        if isinstance(symbols, str):
            return [symbols]
        values: dict[Node, Any] = {}
        out: list[Any] = []
        for node in graph.fx.nodes:
            found = node.meta.get("spec")
            if isinstance(found, SizeSpec):
                values[node] = number(found.expr, symbols)
                continue
            if _is_same(node):
                values[node] = values[node.args[0]]
                continue
            read = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            values[node] = _Ref(len(out))
            out.append((node.op, _what(node), repr(_listed(read))))
        return out

    return lines(general) == lines(special)


def _is_same(node: Node) -> bool:
    """Calls that export leaves out at some sizes: contiguous, and the slice that takes everything."""
    whole = node.target is aten.slice.Tensor and tuple(node.args[2:]) == (0, _ALL_ROWS)
    return whole or node.target is aten.contiguous.default


def _what(node: Node) -> Any:
    if node.op == "call_function":
        return target_name(node.target)
    return node.meta.get("source")


def _listed(value: Any) -> Any:
    """Tuples as lists: a record does not tell the two apart."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class _Ref:
    index: int
