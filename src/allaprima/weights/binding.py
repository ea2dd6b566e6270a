"""From a module's parameters to what the stages read: sources and derived buffers.

The weights stage is the function from one to the other.  After a change only the derived buffers that depend on a
changed source are computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.fx import Interpreter, Node

from ..graph import Graph
from ..stage import Program, Stage, Time


class Sources:
    """A module's parameters and buffers by name, and which of them changed since the last look."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: dict[str, tuple[torch.Tensor, tuple[int, int, torch.dtype]]] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def refresh(self) -> set[str]:
        """Read the module again.  returns the names whose tensor or version is new."""
        changed = set()
        self.tensors = {}
        named = (self._module.named_parameters, self._module.named_buffers)
        for name, tensor in (pair for read in named for pair in read(remove_duplicate=False)):
            # `module.to(...)` keeps the Parameter and its version, and gives it other storage.
            state = (0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype)
            before = self._seen.get(name)
            if before is None or before[0] is not tensor or before[1] != state:
                changed.add(name)
            self._seen[name] = (tensor, state)
            self.tensors[name] = tensor.detach()
        return changed

    def forget(self) -> None:
        """Take every tensor for changed at the next look (writes through `.data` leave no trace)."""
        self._seen.clear()


class Binding:
    """The values of a program's weight placeholders for the module's present weights."""

    def __init__(self, program: Program) -> None:
        self._stage = program.stages.get(Time.WEIGHTS)
        self._derived: dict[str, torch.Tensor] = {}
        self._sources_seen: list[torch.Tensor] = []
        self._dependencies = _dependencies(self._stage) if self._stage else {}

    def update(self, sources: Mapping[str, torch.Tensor], changed: Iterable[str]) -> set[str]:
        """Compute the derived buffers that `changed` touches.  returns the names of all changed values."""
        touched = set(changed)
        self._sources_seen = list(sources.values())
        if self._stage is None:
            return touched
        stale = [
            output
            for output, names in self._dependencies.items()
            if output not in self._derived or not names.isdisjoint(touched)
        ]
        if stale:
            self._derived.update(_evaluate(self._stage, stale, sources))
        return touched | set(stale)

    def derived_bytes(self) -> int:
        """Bytes of the buffers that are no views of parameters."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._derived.values()}
        shared = {s.untyped_storage().data_ptr() for s in self._sources_seen}
        return sum(size for pointer, size in own.items() if pointer not in shared)

    def value(self, role: str, name: str, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._derived[name] if role == "derived" else sources[name]

    def values(self, graph: Graph, sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Placeholder name -> value, for a stage's weight placeholders."""
        found = {}
        for node in graph.placeholders("parameter", "buffer"):
            found[node.name] = sources[node.meta["source"]]
        for node in graph.placeholders("constant"):
            found[node.name] = graph.constants[node.name]
        for node in graph.placeholders("derived"):
            found[node.name] = self._derived[node.meta["source"]]
        return found


def weight_names(graph: Graph) -> set[str]:
    """Names of the sources and derived buffers that a stage reads."""
    return {p.meta["source"] for p in graph.placeholders("parameter", "buffer", "derived")}


def _dependencies(stage: Stage) -> dict[str, frozenset[str]]:
    """For each derived buffer, the sources that it is computed from."""
    read: dict[Node, frozenset[str]] = {}
    for node in stage.graph.fx.nodes:
        own = {node.meta["source"]} if node.op == "placeholder" else set()
        read[node] = frozenset(own.union(*(read[n] for n in node.all_input_nodes)))
    return {name: read[node] for name, node in zip(stage.outputs, stage.graph.results, strict=True)}


def _evaluate(stage: Stage, wanted: list[str], sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the part of the weights stage that `wanted` needs."""
    graph = stage.graph
    nodes = dict(zip(stage.outputs, graph.results, strict=True))
    needed = _cone([nodes[name] for name in wanted])
    interpreter = Interpreter(graph.module())
    values: dict[Node, torch.Tensor] = {}
    own = {n.name: n for n in interpreter.graph.nodes}
    with torch.no_grad():
        for node in graph.fx.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                is_constant = node.meta["role"] == "constant"
                value = graph.constants[node.name] if is_constant else sources[node.meta["source"]]
            else:
                value = interpreter.run_node(own[node.name])
            values[node] = interpreter.env[own[node.name]] = value
    return {name: values[nodes[name]] for name in wanted}


def _cone(roots: list[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
