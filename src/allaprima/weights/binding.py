"""From a module's parameters to what the stages read: sources and derived buffers.

The weights stage is the function from one to the other.  After a change only the derived buffers that depend on a
changed source are computed again.

A derived buffer is either a *fold* (new numbers), or only another arrangement of parameters: one parameter in another
memory format, or several above one another.  An arrangement can be *adopted*: the parameters become views of it, so
that nothing is stored twice and a write to a parameter is a write to what the kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.fx import Interpreter, Node

from ..graph import Graph, aten
from ..stage import Program, Stage, Time

Adopt: TypeAlias = Callable[[str, torch.Tensor], None]


class Sources:
    """A module's parameters and buffers by name, and which of them changed since the last look."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: dict[str, tuple[torch.Tensor, tuple[int, int, torch.dtype]]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._adopted: set[str] = set()

    def refresh(self) -> set[str]:
        """Read the module again.  returns the names whose tensor or version is new."""
        changed = set()
        self.tensors = {}
        named = (self._module.named_parameters, self._module.named_buffers)
        for name, tensor in (pair for read in named for pair in read(remove_duplicate=False)):
            # `module.to(...)` keeps the Parameter and its version, and gives it other storage.
            state = _state(tensor)
            before = self._seen.get(name)
            if before is None or before[0] is not tensor or before[1] != state:
                changed.add(name)
            self._seen[name] = (tensor, state)
            self.tensors[name] = tensor.detach()
        return changed

    def adopt(self, name: str, view: torch.Tensor) -> None:
        """Let a parameter live in `view`, which holds its numbers."""
        parameter = self._seen[name][0]
        parameter.data = view
        self._adopted.add(name)
        for other, (tensor, _) in list(self._seen.items()):
            if tensor is parameter:
                self._seen[other] = (parameter, _state(parameter))
                self.tensors[other] = parameter.detach()

    def release(self) -> None:
        """Give every adopted parameter memory of its own again, in the common order."""
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        for name in self._adopted & parameters.keys():
            parameters[name].data = parameters[name].data.clone(memory_format=torch.contiguous_format)
        self._adopted.clear()

    def forget(self) -> None:
        """Take every tensor for changed at the next look (writes through `.data` leave no trace)."""
        self._seen.clear()


def _state(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype)


class Binding:
    """The values of a program's weight placeholders for the module's present weights."""

    def __init__(self, program: Program) -> None:
        self._stage = program.stages.get(Time.WEIGHTS)
        self._derived: dict[str, torch.Tensor] = {}
        self._sources_seen: list[torch.Tensor] = []
        self._dependencies = _dependencies(self._stage) if self._stage else {}
        self._arrangements = _arrangements(self._stage) if self._stage else {}

    def update(
        self, sources: Mapping[str, torch.Tensor], changed: Iterable[str], adopt: Adopt | None = None
    ) -> set[str]:
        """Compute the derived buffers that `changed` touches.

        adopt    (name, view) -> None: lets a parameter live in the view.  With it, arrangements are adopted, and every
                 derived buffer keeps its address: a change is written into it
        returns  the names of all changed values
        """
        touched = set(changed)
        if self._stage is not None:
            stale = {
                output
                for output, names in self._dependencies.items()
                if output not in self._derived or not names.isdisjoint(touched)
            }
            touched |= stale
            self._compute(stale, sources, adopt)
        self._sources_seen = list(sources.values())
        return touched

    def _compute(self, stale: set[str], sources: Mapping[str, torch.Tensor], adopt: Adopt | None) -> None:
        assert self._stage is not None
        arranged = {name: parts for name in stale if adopt and (parts := self._arrangements[name])}
        folds = sorted(stale - arranged.keys())
        for name, value in (_evaluate(self._stage, folds, sources) if folds else {}).items():
            self._derived[name] = _kept(self._derived.get(name), value) if adopt else value
        for name, parts in sorted(arranged.items()):  # in turn: each frees the parameters' own memory before the next
            assert adopt is not None
            self._derived[name] = self._arrange(name, parts, sources, adopt)

    def _arrange(
        self, name: str, parts: Sequence[str], sources: Mapping[str, torch.Tensor], adopt: Adopt
    ) -> torch.Tensor:
        """The buffer of an arrangement; its parameters live in it afterwards."""
        assert self._stage is not None
        buffer = self._derived.get(name)
        if buffer is None or not _fits(buffer, [sources[p] for p in parts]):
            buffer = _standing([sources[p] for p in parts])
        if buffer is None:
            buffer = _evaluate(self._stage, [name], sources)[name]
        start = 0
        for part in parts:
            tensor = sources[part]
            view = buffer if len(parts) == 1 else buffer[start : start + tensor.shape[0]]
            start += tensor.shape[0]
            if tensor.data_ptr() != view.data_ptr() or tensor.stride() != view.stride():
                adopt(part, view.copy_(tensor))
        return buffer

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


def _arrangements(stage: Stage) -> dict[str, list[str] | None]:
    """For each derived buffer the parameters that it consists of, from its first row to its last; None for a fold."""
    return {name: _parts(node) for name, node in zip(stage.outputs, stage.graph.results, strict=True)}


def _parts(node: Node) -> list[str] | None:
    if node.target is aten.contiguous.default:
        whole = [node.args[0]]
    elif node.target is aten.cat.default and (*node.args, 0)[1] == 0:
        whole = list(node.args[0])  # type: ignore[arg-type]
    else:
        return None
    parameters = [n.meta["source"] for n in whole if isinstance(n, Node) and n.meta.get("role") == "parameter"]
    return parameters if len(parameters) == len(whole) == len(set(parameters)) else None


def _fits(buffer: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether `parts` can be written into the buffer of an earlier arrangement."""
    same = all(p.dtype == buffer.dtype and p.device == buffer.device for p in parts)
    return same and sum(p.shape[0] for p in parts) == buffer.shape[0] and parts[0].shape[1:] == buffer.shape[1:]


def _standing(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Several dense tensors that already lie one behind another in one storage (another program arranged them so)."""
    first, place = parts[0], parts[0].data_ptr()
    if len(parts) == 1:
        return None
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != place or part.dtype != first.dtype:
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += part.numel() * part.itemsize
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _kept(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """`new`, at the address of `old` where that is possible."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
        return new
    return old.copy_(new)


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
