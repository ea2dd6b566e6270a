"""A stage at given sizes: a readable list of launches, made while it runs for the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from ...graph import Graph, SizeSpec, target_name
from ..base import INPUT_ROLES
from .choose import Choice, choose
from .device import Device
from .memory import memory_of


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


def lower(
    graph: Graph, given: Mapping[str, Any], device: Device, calls: Sequence[Node] | None = None
) -> tuple[Plan, list[Any]]:
    """Run a stage for the first time at these sizes, and note what was run.

    calls    the graph's calls in the order in which they run; None: in the graph's own
    returns  the plan, and the stage's results
    """
    calls = graph.calls() if calls is None else calls
    plan, memory = Plan(), memory_of(calls, graph.results)
    values: dict[Node, Any] = {p: given[p.name] for p in graph.placeholders()}
    slots: dict[Node, int] = {p: index for index, p in enumerate(values)}
    plan.placeholders = {p.name: index for p, index in slots.items()}
    for node in calls:
        values[node] = _call(node, values, slots, plan, device, node in memory.over)
        for read in memory.ends[node]:
            if read in slots:  # sizes stay: they are written into the plan
                del values[read]
    plan.num_slots = len(slots)
    plan.results = [_template(r, values, slots) for r in graph.results]
    plan.launches = _with_ends(plan)
    return plan, [values[r] if isinstance(r, Node) else r for r in graph.results]


def _call(node: Node, values: dict[Node, Any], slots: dict[Node, int], plan: Plan, device: Device, over: bool) -> Any:
    """over: the result is to be written over the first argument, if the kernel that is chosen can."""
    target: Any = node.target
    arguments = [_value(a, values) for a in node.args]
    options = {k: _value(v, values) for k, v in node.kwargs.items()}
    if isinstance(node.meta.get("spec"), SizeSpec):
        return target(*arguments, **options)
    choice = choose(target, arguments, options, device)
    call = target if choice is None else choice.call
    given = tuple(_template(a, values, slots) for a in node.args)
    named = {k: _template(v, values, slots) for k, v in node.kwargs.items()}
    if choice is not None:
        arguments, options = list(choice.arranged(arguments, options)), {}
        given, named = choice.arranged(given, named), {}
        if over and choice.writes_over and _is_alone(node.args[0], values):
            options, named = {"out": arguments[0]}, {"out": given[0]}
    value = call(*arguments, **options)
    slots[node] = len(slots)
    plan.launches.append(Launch(node.name, target_name(target), choice, call, given, named, slots[node]))
    return value


def _is_alone(node: Any, values: Mapping[Node, Any]) -> bool:
    """Whether no other value lies in the memory of this one: some operators give an argument back and do not say so."""
    (mine,) = _storages(values[node])
    return all(mine not in _storages(value) for other, value in values.items() if other is not node)


def _storages(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()._cdata
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _storages(part)


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
