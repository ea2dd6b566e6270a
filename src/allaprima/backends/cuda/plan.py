"""A stage at given sizes: a readable list of launches, made while it runs for the first time."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from ...graph import Graph, SizeSpec, TensorSpec, evaluate_shape, target_name
from ..base import INPUT_ROLES
from .choose import Choice, choose
from .device import Device


@dataclass(frozen=True)
class Slot:
    """The place of a value while a plan runs."""

    index: int


@dataclass(frozen=True)
class Launch:
    """One call of a plan.

    node      the graph's name for it;  operator: what it computes
    choice    which kernel runs it and why; None for what ATen runs
    call      call(*arguments, **options), Slots replaced by their values
    result    its Slot's index;  dead: the slots that nobody reads after it
    """

    node: str
    operator: str
    choice: Choice | None
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    result: int
    dead: tuple[int, ...] = ()

    def __str__(self) -> str:
        kernel = "aten" if self.choice is None else f"{self.choice.name}  ({self.choice.reason})"
        return f"{self.node:<28}{self.operator:<22}{kernel}"


@dataclass
class Plan:
    """The launches of one stage for one set of sizes, and where its arguments and results are.

    Sizes are numbers here: what the graph computes about them is done.
    """

    launches: list[Launch] = field(default_factory=list)
    num_slots: int = 0
    placeholders: dict[str, int] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)

    def run(self, given: Mapping[str, Any]) -> list[Any]:
        """The stage's results; `given` holds a value for each placeholder."""
        values: list[Any] = [None] * self.num_slots
        for name, index in self.placeholders.items():
            values[index] = given[name]
        for launch in self.launches:
            arguments = [_filled(a, values) for a in launch.arguments]
            options = {k: _filled(v, values) for k, v in launch.options.items()} if launch.options else {}
            values[launch.result] = launch.call(*arguments, **options)
            for index in launch.dead:
                values[index] = None
        return [_filled(r, values) for r in self.results]

    @property
    def estimate_us(self) -> float:
        """Time that the chosen kernels should take together; ATen's own calls are not counted."""
        return sum(x.choice.estimate_us for x in self.launches if x.choice is not None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.launches))


def lower(graph: Graph, given: Mapping[str, Any], device: Device) -> tuple[Plan, list[Any]]:
    """Run a stage for the first time at these sizes, and note what was run.

    returns  the plan, and the stage's results
    """
    plan, values = Plan(), dict[Node, Any]()
    slots: dict[Node, int] = {}
    last_read = _last_reads(graph)
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = given[node.name]
            slots[node] = plan.placeholders[node.name] = len(slots)
        elif node.op == "call_function":
            values[node] = _call(node, values, slots, plan, device)
            for read in last_read.get(node, ()):
                if read in slots:  # sizes stay: they are written into the plan
                    del values[read]
    plan.num_slots = len(slots)
    plan.results = [_template(r, values, slots) for r in graph.results]
    plan.launches = _with_ends(plan)
    return plan, [values[r] if isinstance(r, Node) else r for r in graph.results]


def _last_reads(graph: Graph) -> dict[Node, list[Node]]:
    """For each call, what nobody reads after it: kept, all activations of a picture would lie in memory at once."""
    seen = {r for r in graph.results if isinstance(r, Node)}
    last: dict[Node, list[Node]] = {}
    for node in reversed(list(graph.fx.nodes)):
        if node.op == "call_function":
            ended = dict.fromkeys(n for n in (*node.all_input_nodes, node) if n not in seen)
            seen |= ended.keys()
            last[node] = list(ended)
    return last


def _call(node: Node, values: dict[Node, Any], slots: dict[Node, int], plan: Plan, device: Device) -> Any:
    target: Any = node.target
    arguments = [_value(a, values) for a in node.args]
    options = {k: _value(v, values) for k, v in node.kwargs.items()}
    if isinstance(node.meta.get("spec"), SizeSpec):
        return target(*arguments, **options)
    choice = choose(target, arguments, options, device)
    call = target if choice is None else choice.call
    if choice is not None:
        arguments, options = list(choice.arranged(arguments, options)), {}
    value = call(*arguments, **options)
    slots[node] = len(slots)
    given = tuple(_template(a, values, slots) for a in node.args)
    named = {k: _template(v, values, slots) for k, v in node.kwargs.items()}
    if choice is not None:
        given, named = choice.arranged(given, named), {}
    plan.launches.append(Launch(node.name, target_name(target), choice, call, given, named, slots[node]))
    return value


def _value(argument: Any, values: Mapping[Node, Any]) -> Any:
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, list | tuple):
        return [_value(a, values) for a in argument]
    return argument


def _template(argument: Any, values: Mapping[Node, Any], slots: Mapping[Node, int]) -> Any:
    """The argument with Slots for tensors and numbers for sizes."""
    if isinstance(argument, Node):
        return Slot(slots[argument]) if argument in slots else values[argument]
    if isinstance(argument, list | tuple):
        return [_template(a, values, slots) for a in argument]
    return argument


def _filled(template: Any, values: Sequence[Any]) -> Any:
    if type(template) is Slot:
        return values[template.index]
    if type(template) is list:
        return [_filled(t, values) for t in template]
    return template


def _slots_in(template: Any) -> set[int]:
    if isinstance(template, Slot):
        return {template.index}
    if isinstance(template, list | tuple):
        return set().union(*map(_slots_in, template))
    return set()


def _with_ends(plan: Plan) -> list[Launch]:
    """Every launch told which slots are read by it for the last time, so that their memory is free for the next."""
    kept = _slots_in(plan.results)
    seen, launches = set(kept), []
    for launch in reversed(plan.launches):
        read = _slots_in(launch.arguments) | _slots_in(list(launch.options.values())) | {launch.result}
        dead = tuple(sorted(read - seen))
        seen |= read
        launches.append(replace(launch, dead=dead))
    return launches[::-1]


def arguments_of(graph: Graph, weights: Mapping[str, torch.Tensor], inputs: Sequence[Any]) -> dict[str, Any]:
    """A value for each placeholder: the inputs in order, and the weights by name."""
    given = iter(inputs)
    return {p.name: next(given) if p.meta["role"] in INPUT_ROLES else weights[p.name] for p in graph.placeholders()}


# ---- memory --------------------------------------------------------------------------------------------------------


def needed_bytes(graph: Graph, given: Mapping[str, Any]) -> int:
    """Size of a block of memory in which torch's allocator finds a place for each value of a run.

    It is more than what lives at once, because the free pieces between others may be too small.  What kernels take for
    themselves is not counted.  0 where the values' sizes do not follow from those of the arguments.

    given  a value for each placeholder: of tensors only the shapes are read
    """
    symbols, last_read = _symbols(graph, given), _last_reads(graph)
    block = _Block()
    roots: dict[Node, Node] = {}  # of a view, the value in whose memory it lies
    alive: Counter[Node] = Counter()
    places: dict[Node, tuple[int, int]] = {}
    for node in graph.fx.nodes:
        if node.op != "call_function":
            continue
        root = roots[node] = _root(node, roots)
        alive[root] += 1
        if root is node:
            try:
                places[node] = block.take(_nbytes(node.meta.get("spec"), symbols))
            except NameError:  # a size that no argument has as it is
                return 0
        for read in last_read.get(node, ()):
            root = roots.get(read, read)
            alive[root] -= 1
            if not alive[root] and root in places:
                block.give(places.pop(root))
    return block.used


def _symbols(graph: Graph, given: Mapping[str, Any]) -> dict[str, int]:
    """Numbers for the symbols in the placeholders' shapes."""
    symbols: dict[str, int] = {}
    for node in graph.placeholders():
        spec, value = node.meta["spec"], given[node.name]
        if isinstance(spec, TensorSpec):
            symbols |= {dim: size for dim, size in zip(spec.shape, value.shape, strict=True) if isinstance(dim, str)}
        elif isinstance(spec, SizeSpec) and isinstance(spec.expr, str):
            symbols[spec.expr] = value
    return symbols


def _nbytes(spec: Any, symbols: Mapping[str, int]) -> int:
    if isinstance(spec, TensorSpec):
        return math.prod(evaluate_shape(spec.shape, symbols)) * spec.dtype.itemsize
    return sum(_nbytes(s, symbols) for s in spec) if isinstance(spec, tuple) else 0


def _root(node: Node, roots: Mapping[Node, Node]) -> Node:
    """The value in whose memory a call's result lies: its own, or that of the argument that it is a view of.

    A tensor that is made contiguous is taken for one that is so already, as our kernels' results are.
    """
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    view = node.target is operator.getitem or any(r.alias_info is not None for r in returns)
    source = node.all_input_nodes[0] if view and node.all_input_nodes else node
    kinds = [getattr(n.meta.get("spec"), "dtype", None) for n in (node, source)]
    changed = None not in kinds and kinds[0] != kinds[1]  # `to` gives its argument back where it changes nothing
    return node if changed else roots.get(source, source)


class _Block:
    """Where torch's caching allocator places large tensors in one block without end: in the smallest free piece.

    used  bytes from its start that were in use at some time
    """

    GRAIN = 512
    LEAST = 1 << 20
    """What is not larger lies elsewhere, and is not split off when the rest of a piece is no larger."""

    def __init__(self) -> None:
        self._free = [(0, 1 << 60)]
        self.used = 0

    def take(self, nbytes: int) -> tuple[int, int]:
        """A place (start, end) for a tensor."""
        if nbytes <= self.LEAST:
            return 0, 0
        nbytes = -(-nbytes // self.GRAIN) * self.GRAIN
        piece = min((p for p in self._free if p[1] - p[0] >= nbytes), key=lambda p: (p[1] - p[0], p[0]))
        self._free.remove(piece)
        start, end = piece
        if end - start - nbytes > self.LEAST:
            self._free.append((start + nbytes, end))
            end = start + nbytes
        self.used = max(self.used, end)
        return start, end

    def give(self, place: tuple[int, int]) -> None:
        """A place is free again, and one with its free neighbours."""
        start, end = place
        if start == end:
            return
        for piece in [p for p in self._free if start in p or end in p]:
            self._free.remove(piece)
            start, end = min(start, piece[0]), max(end, piece[1])
        self._free.append((start, end))
