"""From a Graph to an ov.Model, node by node: microseconds a node, no trace, every size.

Every tensor has the type that the graph gives it, bfloat16 included, so that what a module computes in float32 (the
embedding of timesteps, rotary angles, norms) stays in float32.  Sizes are i64 scalars, read off the inputs' shapes once
for each expression.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import openvino as ov
import openvino.opset15 as op
import torch
from torch.fx import Node

from ...graph import Dim, Graph, SizeSpec, TensorSpec, describe, target_name
from .operators import TABLE, Unsupported

Output: TypeAlias = Any
"""An ov.Output: one value of the model."""

ELEMENT_TYPES: dict[torch.dtype, Any] = {
    torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16, torch.int64: ov.Type.i64, torch.int32: ov.Type.i32,
    torch.uint8: ov.Type.u8, torch.bool: ov.Type.boolean,
}  # fmt: skip


def element_type(dtype: torch.dtype) -> Any:
    """The model's type for tensors of a dtype.  raises Unsupported"""
    if dtype not in ELEMENT_TYPES:
        raise Unsupported(f"tensors of {str(dtype).removeprefix('torch.')} are not translated")
    return ELEMENT_TYPES[dtype]


def parameter_for(spec: TensorSpec | SizeSpec, name: str) -> Any:
    """An ov Parameter of a placeholder's shape; symbolic dimensions are free."""
    if isinstance(spec, SizeSpec):
        return op.parameter([], ov.Type.i64, name)
    dims = [d if isinstance(d, int) else -1 for d in spec.shape]
    return op.parameter(ov.PartialShape(dims), element_type(spec.dtype), name)


class Translator:
    """Holds what has been translated so far.  Entries of the operator table see it as `t`.

    weight     (placeholder, first row, last row) -> what stands for a weight, or for some of its rows
    variable   names of weights that are inputs of the model, after the graph's own and in the graph's order
    node       the call being translated
    """

    def __init__(self, graph: Graph, weight: Callable[..., Output], variable: Collection[str] = ()) -> None:
        self.graph = graph
        self.parameters: list[Any] = []
        self.variable = {node.name: node for node in graph.placeholders() if node.name in variable}
        self._variables = {name: parameter_for(node.meta["spec"], name) for name, node in self.variable.items()}
        self.values: dict[Node, Any] = {}
        self.failures: list[str] = []
        self.node: Node = graph.output
        self._weight = weight
        self._symbols: dict[str, tuple[Node, int | None]] = {}
        self._sizes: dict[Dim, Output] = {}
        self._vectors: dict[tuple[Any, ...], Output] = {}
        self._shapes: dict[Any, Output] = {}
        self._shared: dict[Any, Output] = {}

    # ---- the walk --------------------------------------------------------------------------------------------------

    def translate(self) -> None:
        """Translate every node; what cannot be translated is noted in `failures`, and so is nothing that follows it."""
        self._find_symbols()
        for node in self.graph.fx.nodes:
            self.node = node
            if node.op == "output" or (node.op == "call_function" and isinstance(node.meta["spec"], SizeSpec)):
                continue  # sizes are evaluated where they are read, from their expressions
            if any(self._failed(read) for read in node.all_input_nodes):
                continue
            try:
                self.values[node] = self._placeholder(node) if node.op == "placeholder" else self._call(node)
            except Unsupported as reason:
                self.failures.append(f"{describe(node)}: {reason}")
            except Exception as error:  # OpenVINO's refusals, and forms of a call that nobody thought of
                self.failures.append(f"{describe(node)}: {type(error).__name__}: {_last_line(error)}")

    def _failed(self, node: Node) -> bool:
        return node not in self.values and not isinstance(node.meta.get("spec"), SizeSpec)

    def _placeholder(self, node: Node) -> Any:
        if node.name in self.variable:
            return self._variables[node.name].output(0)
        if node.meta["role"] not in ("input", "size"):
            return self._weight(node)
        parameter = parameter_for(node.meta["spec"], node.name)
        self.parameters.append(parameter)
        return parameter.output(0)

    def _call(self, node: Node) -> Any:
        name = target_name(node.target)
        entry = TABLE.get(name)
        if entry is None:
            raise Unsupported("no translation")
        found = entry(self, **self._arguments(node))
        return [_output(v) for v in found] if isinstance(found, list) else _output(found)

    def _arguments(self, node: Node) -> dict[str, Any]:
        named = dict(_parameters(node.target))
        for name, argument in zip(named, node.args, strict=False):
            named[name] = self._value(argument)
        for name, argument in node.kwargs.items():
            named[name] = self._value(argument)
        return named

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            found = argument.meta["spec"]
            return self.size(found.expr) if isinstance(found, SizeSpec) else self.values[argument]
        if isinstance(argument, list | tuple):
            return [self._value(a) for a in argument]
        return argument

    def model(self) -> Any:
        """The ov.Model: inputs and results in the graph's order, without the results that are numbers or None."""
        results = []
        for result in self.graph.results:
            if not isinstance(result, Node):
                continue
            value = self._value(result)
            results.append(op.result(self.constant(value, ov.Type.i64) if isinstance(value, int) else value))
        return ov.Model(results, [*self.parameters, *self._variables.values()], "stage")

    # ---- values ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> Any:
        """Element type of the current call's result."""
        return element_type(self.spec.dtype)

    @property
    def spec(self) -> TensorSpec:
        found = self.node.meta["spec"]
        found = found[0] if isinstance(found, tuple) else found
        if not isinstance(found, TensorSpec):
            raise Unsupported(f"its result is {found}")
        return found

    def spec_of(self, index: int) -> TensorSpec:
        """Spec of the current call's argument."""
        found: TensorSpec = self.node.args[index].meta["spec"]  # type: ignore[union-attr]
        return found

    def constant(self, value: Any, dtype: Any = None) -> Output:
        """A small constant: a number, or a list of whole numbers."""
        dtype = dtype or self.dtype
        if dtype != ov.Type.bf16:
            return op.constant(value, dtype=dtype).output(0)
        # OpenVINO refuses a bf16 constant that is infinite or has to be rounded to infinity.
        return op.convert(op.constant(np.array(value, np.float32)), "bf16").output(0)

    def ints(self, values: Sequence[int]) -> Output:
        """A constant vector of whole numbers."""
        key = tuple(values)
        if key not in self._vectors:
            self._vectors[key] = op.constant(np.array(values, np.int64)).output(0)
        return self._vectors[key]

    def once(self, key: Any, make: Callable[[], Output]) -> Output:
        """A value that many calls share."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def rows(self, weight: Node, start: int, stop: int) -> Output:
        """Rows of a weight."""
        if weight.name not in self.variable:
            return self._weight(weight, start, stop)
        bounds = (self.ints([number]) for number in (start, stop, 1, 0))
        return op.slice(self.values[weight], *bounds).output(0)

    def cast(self, value: Any, dtype: Any) -> Output:
        """The value as a tensor of another element type; numbers become constants."""
        if isinstance(value, bool | int | float):
            return self.constant(value, dtype)
        return value if value.get_element_type() == dtype else op.convert(value, dtype.to_string()).output(0)

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def _find_symbols(self) -> None:
        """Where each symbol can be read: an input's axis, or a placeholder of role "size"."""
        for node in self.graph.placeholders("size"):
            self._symbols.setdefault(str(node.meta["spec"].expr), (node, None))
        for node in self.graph.placeholders("input"):
            found = node.meta["spec"]
            for axis, dim in enumerate(found.shape if isinstance(found, TensorSpec) else ()):
                if isinstance(dim, str):
                    self._symbols.setdefault(dim, (node, axis))

    def size(self, dim: Dim | Output) -> Any:
        """A size as an int where it is known, else as an i64 scalar."""
        if not isinstance(dim, str):
            return dim
        if dim not in self._sizes:
            if dim in self._symbols:
                self._sizes[dim] = self._read(*self._symbols[dim])
            else:
                self._sizes[dim] = eval(dim, _SIZE_FUNCTIONS, _Names(self))
        found = self._sizes[dim]
        return found.output if isinstance(found, _Size) else found

    def _read(self, node: Node, axis: int | None) -> Any:
        if axis is None:
            return self.values[node]
        if node not in self._shapes:
            self._shapes[node] = op.shape_of(self.values[node]).output(0)
        return op.gather(self._shapes[node], self.constant(axis, ov.Type.i64), self.constant(0, ov.Type.i64)).output(0)

    def symbol(self, name: str) -> Any:
        if name in self._symbols:
            return _wrapped(self.size(name))
        for text in self._symbols:  # "8*s1": solve for s1
            factor, _, symbol = text.partition("*")
            if symbol == name and factor.isdigit():
                return _wrapped(self.size(text)) // int(factor)
        raise Unsupported(f"the size {name} cannot be read off the inputs")

    def dims(self, dims: Iterable[Dim | Output]) -> Output:
        """A shape as an i64 vector: constant where all sizes are known."""
        values = [self.size(d) for d in dims]
        if all(isinstance(v, int) for v in values):
            return self.ints(values)
        key = tuple(v if isinstance(v, int) else id(v) for v in values)
        if key not in self._vectors:
            zero = self.constant(0, ov.Type.i64)
            parts = [self.ints([v]) if isinstance(v, int) else op.unsqueeze(v, zero) for v in values]
            # The scalars must outlive the key, which holds their ids.
            self._shapes[key] = values
            self._vectors[key] = op.concat(parts, 0).output(0)
        return self._vectors[key]

    def reshape(self, x: Output, before: Sequence[Dim], after: Sequence[Dim]) -> Output:
        """Reshape with as little arithmetic on sizes as possible: 0 copies an axis, -1 is worked out by OpenVINO."""
        if tuple(before) == tuple(after):
            return x
        target: list[Any] = [0 if isinstance(d, str) and i < len(before) and before[i] == d else d
                             for i, d in enumerate(after)]  # fmt: skip
        free = [i for i, d in enumerate(target) if isinstance(d, str)]
        if free:
            target[max(free, key=lambda i: len(target[i]))] = -1
        return op.reshape(x, self.dims(target), True).output(0)


@lru_cache(maxsize=1024)
def _parameters(target: Any) -> dict[str, Any]:
    """The names of a function's parameters and their defaults; `self` is called x."""
    if isinstance(target, torch._ops.OpOverload):
        return {"x" if a.name == "self" else a.name: a.default_value for a in target._schema.arguments}
    return {p.name: p.default for p in inspect.signature(target).parameters.values()}


def _output(value: Any) -> Output:
    return value.output(0) if hasattr(value, "output") else value


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


class _Size:
    """Arithmetic on i64 scalars of the model, so that Python can evaluate a size's expression on them.

    signed  whether it may be negative on the way, as in (24 - h) // 2: OpenVINO's division rounds towards zero
    """

    def __init__(self, output: Output, signed: bool = False) -> None:
        self.output, self.signed = output, signed


def _wrapped(value: Any) -> Any:
    return value if isinstance(value, int) else _Size(value)


def _size_function(function: Callable[..., Any], swap: bool = False, signed: bool = False) -> Callable[..., Any]:
    def apply(*sizes: Any) -> Any:
        values = [op.constant(s, dtype=np.int64) if isinstance(s, int) else s.output for s in sizes]
        negative = signed or any(s < 0 if isinstance(s, int) else s.signed for s in sizes)
        divides = _floor_divide if negative and function is op.divide else function
        return _Size(divides(*(reversed(values) if swap else values)).output(0), negative)

    return apply


def _floor_divide(a: Any, b: Any) -> Any:
    return op.divide(op.subtract(a, op.floor_mod(a, b)), b)


def _int_or(python: Callable[..., int], model: Callable[..., Any]) -> Callable[..., Any]:
    applied = _size_function(model)
    return lambda *sizes: python(*sizes) if all(isinstance(s, int) for s in sizes) else applied(*sizes)


for _name, _function in {"add": op.add, "sub": op.subtract, "mul": op.multiply, "floordiv": op.divide,
                         "mod": op.floor_mod, "pow": op.power}.items():  # fmt: skip
    setattr(_Size, f"__{_name}__", _size_function(_function, signed=_name == "sub"))
    setattr(_Size, f"__r{_name}__", _size_function(_function, swap=True, signed=_name == "sub"))
setattr(_Size, "__neg__", _size_function(op.negative, signed=True))  # noqa: B010 - like its siblings above

_floor_div = _int_or(lambda a, b: a // b, op.divide)
_SIZE_FUNCTIONS: dict[str, Any] = {
    "FloorDiv": _floor_div, "CleanDiv": _floor_div, "CeilDiv": lambda a, b: _floor_div(a + b - 1, b),
    "Mod": _int_or(lambda a, b: a % b, op.floor_mod), "PythonMod": _int_or(lambda a, b: a % b, op.floor_mod),
    "Max": _int_or(max, op.maximum), "Min": _int_or(min, op.minimum), "PowByNatural": _int_or(pow, op.power),
    "TruncToInt": lambda a: a, "__builtins__": {},
}  # fmt: skip


class _Names(dict[str, Any]):
    """The local variables of a size's expression: symbols."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator

    def __missing__(self, name: str) -> Any:
        if name in _SIZE_FUNCTIONS:
            raise KeyError(name)
        return self.translator.symbol(name)


def unsupported(graph: Graph) -> list[str]:
    """One line for each node that has no translation: found by translating, weights left open."""

    def weight(node: Node, start: int = 0, stop: int | None = None) -> Output:
        found = node.meta["spec"]
        if stop is not None:
            found = found.with_shape((stop - start, *found.shape[1:]))
        return parameter_for(found, node.name).output(0)

    translator = Translator(graph, weight)
    translator.translate()
    return translator.failures
