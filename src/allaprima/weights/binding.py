"""From a module's parameters to what the stages read: sources and derived buffers.

The weights stage is the function from one to the other.  After a change only the derived buffers that depend on a
changed source are computed again.

A derived buffer is either a *fold* (new numbers), or only another arrangement of parameters: one parameter in another
memory format, or several above one another.  Where buffers keep their addresses, an arrangement is *adopted*: the
parameters become views of it, so that nothing is stored twice and a write to a parameter is a write to what the
kernels read.  There all parameters of the module, arranged or not, are gathered in slabs (gathering.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph import Graph, aten
from ..stage import Program, Stage, Time
from ..tuners import inside, merged, peeled, state, unmerge_what_is_off
from .gathering import LEAST_BYTES, PORTION_BYTES, Unit, gather

_UNMERGEABLE: dict[str, torch.Tensor] = {}
"""Stands for what a layer's adapters change where they cannot be merged."""


class Sources:
    """A module's parameters and buffers by name, with adapters merged into them, and which changed since the last look.

    scale       what the adapters' own scales are multiplied by
    unmergeable why the module's adapters cannot be merged, or None
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: dict[str, tuple[torch.Tensor, Any, Any]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._homes: dict[str, torch.Tensor] = {}
        self._passing: set[str] = set()
        self._adapted: set[str] = set()
        self._slots: list[tuple[str, Mapping[str, Any]]] = []
        self._tuners: dict[str, Any] = {}
        self.scale = 1.0
        self.unmergeable: str | None = None

    def refresh(self) -> set[str]:
        """Read the module again.  returns the names whose tensor, version or adapters are new."""
        changed = set()
        before, self.tensors, self.unmergeable = self.tensors, {}, None
        parameters = self._read()
        for tuner in self._tuners.values():
            unmerge_what_is_off(tuner)
        states = {path: state(tuner, self.scale) for path, tuner in self._tuners.items()}
        insides = {path: inside(tuner) for path, tuner in self._tuners.items()}
        made: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in parameters.items():
            path, _, key = name.rpartition(".")
            # `module.to(...)` keeps the Parameter and its version, and gives it other storage.
            now, adapters = _state(tensor), (states.get(path), insides.get(path))
            known, state_then, adapters_then = self._seen.get(name, (None, None, (None, None)))
            same = known is tensor and state_then == now and adapters_then[1] == adapters[1]
            if same and adapters_then == adapters:
                self.tensors[name] = before[name] if name in self._adapted else tensor.detach()
                continue
            if adapters[0] is not None and path not in made:
                made[path] = self._merged(self._tuners[path])
            value = made.get(path, {}).get(key)
            if not same or value is not None or name in self._adapted:
                changed.add(name)
            if known is not None and known is not tensor:
                self._leave(name, known)
            self._adapted.discard(name)
            if not _fits(self._homes.get(name, tensor), [tensor]):
                del self._homes[name]  # the module has another dtype or device now; the old place may go
            self.tensors[name] = tensor.detach() if value is None else self._beside(name, tensor, value)
            failed = path in made and made[path] is _UNMERGEABLE  # told at every look until it is gone
            self._seen[name] = (tensor, _state(tensor), (_UNMERGEABLE, adapters[1]) if failed else adapters)
        return changed

    def forget_layers(self) -> None:
        """Look for the module's layers again: some came or went."""
        self._slots = []

    def _read(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by their names without adapters."""
        if not self._slots:
            with peeled(self._module) as self._tuners:
                parts = list(self._module.named_modules(remove_duplicate=False))
            held = [(path, part._parameters) for path, part in parts] + [(path, part._buffers) for path, part in parts]
            self._slots = [(f"{path}." if path else "", tensors) for path, tensors in held]
        return {
            prefix + key: tensor for prefix, held in self._slots for key, tensor in held.items() if tensor is not None
        }

    def _merged(self, tuner: Any) -> dict[str, torch.Tensor]:
        """A layer's parameters as its adapters change them."""
        try:
            return merged(tuner, self.scale)
        except ValueError as error:
            self.unmergeable = str(error)
            return _UNMERGEABLE

    def _beside(self, name: str, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Where the program reads a parameter with adapters: the parameter itself goes on holding the base."""
        self._adapted.add(name)
        if name not in self._homes:
            return value
        self._leave(name, parameter)
        return self._homes[name].copy_(value)

    def adopt(self, name: str, view: torch.Tensor, passing: bool = False) -> None:
        """Let a parameter live in `view`, which holds its numbers.

        passing   until a program knows how it wants to have it
        """
        self._homes[name] = view
        (self._passing.add if passing else self._passing.discard)(name)
        if name in self._adapted:
            self.tensors[name] = view
            return
        parameter = self._seen[name][0]
        parameter.data = view
        for other, (tensor, _, adapters) in list(self._seen.items()):
            if tensor is parameter:
                self._seen[other] = (parameter, _state(parameter), adapters)
                self.tensors[other] = parameter.detach()

    def _leave(self, name: str, parameter: torch.Tensor) -> None:
        """Give a parameter that another one stands for now memory of its own: somebody may put it back, and its place
        will hold the other's numbers."""
        home = self._homes.get(name)
        if home is not None and parameter.data_ptr() == home.data_ptr():
            with torch.inference_mode(False):
                parameter.data = parameter.data.clone()

    def at_home(self, name: str) -> bool:
        """Whether a parameter lives where a program put it."""
        return name not in self._passing and self._lives_in_home(name)

    def _lives_in_home(self, name: str) -> bool:
        home = self._homes.get(name)
        return home is not None and home.data_ptr() == self.tensors[name].data_ptr()

    def scattered(self) -> list[Unit]:
        """The movable parameters that have not been gathered: in slabs they can wait for their program."""
        names = [name for name in self.movable() if not self._lives_in_home(name)]
        return [
            Unit(tensor.data_ptr(), tensor.nbytes, tensor.device, partial(self._pass, name))
            for name, tensor in ((name, self.tensors[name]) for name in names)
        ]

    def _pass(self, name: str, place: torch.Tensor) -> None:
        tensor = self.tensors[name]
        self.adopt(name, _shaped(place, _form(tensor)).copy_(tensor), passing=True)

    def movable(self) -> list[str]:
        """The parameters that have memory to themselves, each under the first of its names."""
        holders: dict[int, dict[int, str]] = {}
        for name, (tensor, *_) in self._seen.items():
            if _is_plain(tensor):
                holders.setdefault(tensor.untyped_storage().data_ptr(), {}).setdefault(id(tensor), name)
        alone = [next(iter(names.values())) for names in holders.values() if len(names) == 1]
        return [
            name for name in alone if isinstance(self._seen[name][0], nn.Parameter) and _is_whole(self.tensors[name])
        ]

    def release(self) -> None:
        """Give every adopted parameter memory of its own again, in the common order."""
        self.tensors = {}  # or it would keep the slabs
        self.forget_layers()
        for name, parameter in self._read().items():
            home = self._homes.get(name)
            if home is not None and parameter.data_ptr() == home.data_ptr():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._homes.clear()
        self._passing.clear()

    def forget(self) -> None:
        """Take every tensor for changed at the next look (writes through `.data` leave no trace)."""
        self._seen.clear()
        self.forget_layers()


def _state(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its numbers lie in memory, one after another, and nothing else belongs to it."""
    usual = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return usual and tensor.data_ptr() != 0


def _is_whole(tensor: torch.Tensor) -> bool:
    dense = _form(tensor).stride() == tensor.stride()
    return dense and tensor.untyped_storage().nbytes() == tensor.nbytes


class Binding:
    """The values of a program's weight placeholders for the module's present weights."""

    def __init__(self, program: Program) -> None:
        self._stage = program.stages.get(Time.WEIGHTS)
        self._buffers: dict[str, torch.Tensor] = {}
        """The derived buffers, and the places of parameters that are part of none, under these' names."""
        self._source_storages: set[int] = set()
        self._dependencies = _dependencies(self._stage) if self._stage else {}
        self._arrangements = _arrangements(self._stage) if self._stage else {}

    def update(
        self, sources: Mapping[str, torch.Tensor], changed: Iterable[str], owner: Sources | None = None
    ) -> set[str]:
        """Compute the derived buffers that `changed` touches.

        owner    of the sources.  With it, arrangements are adopted, parameters are gathered, and each of them and every
                 derived buffer keeps its address: a change is written into it
        returns  the names of all changed values
        """
        touched = set(changed)
        stale = {
            output
            for output, names in self._dependencies.items()
            if output not in self._buffers or not names.isdisjoint(touched)
        }
        if owner is not None:
            self._settle(stale, touched, owner)
        elif self._stage and stale:
            self._buffers |= _evaluate(self._stage, sorted(stale), sources)
        self._source_storages = {tensor.untyped_storage().data_ptr() for tensor in sources.values()}
        return touched | stale

    def _settle(self, stale: set[str], changed: set[str], owner: Sources) -> None:
        """Bring everything to the place that it has, and what has none into slabs.

        Folds come last: some are nothing but views of parameters.
        """
        groups = {name: parts for name in sorted(stale) if (parts := self._arrangements[name])}
        groups |= {name: [name] for name in self._unarranged(changed, owner)}
        settled = {name for name, parts in groups.items() if self._in_its_buffer(name, parts, owner)}
        forms = self._forms([name for name in groups if name not in settled], owner.tensors)
        homeless = []
        for name, parts in groups.items():
            place = self._buffers[name] if name in settled else self._place(parts, forms[name], owner)
            if place is None:
                tensors = [owner.tensors[part] for part in parts]
                move = partial(self._move_in, name, parts, forms[name], owner)
                address = min(tensor.data_ptr() for tensor in tensors)
                homeless.append(Unit(address, forms[name].nbytes, tensors[0].device, move))
            else:
                self._adopt(name, parts, place, owner)
        gather(homeless)
        self._fold(sorted(stale - groups.keys()), owner.tensors)

    def _unarranged(self, changed: set[str], owner: Sources) -> list[str]:
        """The changed movable parameters that are part of no arrangement, whether or not the program reads them: where
        they lie now, they would keep segments."""
        parts = {part for parts in self._arrangements.values() for part in parts or ()}
        known = [name for name in changed if name in self._buffers and name not in self._arrangements]
        rest = changed - parts - set(known)
        if not rest:
            return sorted(known)
        arranged = {owner.tensors[part].data_ptr() for part in parts}
        movable = (name for name in owner.movable() if owner.tensors[name].data_ptr() not in arranged)
        return sorted(known) + [name for name in movable if name in rest]

    def _forms(self, names: list[str], sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Shapes, strides and dtypes of arrangements, as tensors without memory."""
        forms = {name: _form(sources[name]) for name in names if name not in self._arrangements}
        if arranged := [name for name in names if name in self._arrangements]:
            assert self._stage is not None
            parts = {part for name in arranged for part in self._arrangements[name] or ()}
            forms |= _evaluate(self._stage, arranged, {part: _form(sources[part]) for part in parts})
        return forms

    def _in_its_buffer(self, name: str, parts: list[str], owner: Sources) -> bool:
        """Whether parameters had their place here before, and fit there still."""
        buffer = self._buffers.get(name)
        return buffer is not None and _fits(buffer, [owner.tensors[part] for part in parts])

    def _place(self, parts: list[str], form: torch.Tensor, owner: Sources) -> torch.Tensor | None:
        """Where parameters have their place already because another program arranged them."""
        tensors = [owner.tensors[part] for part in parts]
        if len(parts) > 1:
            return _standing(tensors)
        return tensors[0] if owner.at_home(parts[0]) and tensors[0].stride() == form.stride() else None

    def _move_in(self, name: str, parts: list[str], form: torch.Tensor, owner: Sources, place: torch.Tensor) -> None:
        self._adopt(name, parts, _shaped(place, form), owner)

    def _adopt(self, name: str, parts: list[str], buffer: torch.Tensor, owner: Sources) -> None:
        """Let parameters live in `buffer`, one above another."""
        start = 0
        for part in parts:
            tensor = owner.tensors[part]
            view = buffer if len(parts) == 1 else buffer[start : start + tensor.shape[0]]
            start += 0 if view is buffer else tensor.shape[0]
            if tensor.data_ptr() != view.data_ptr() or tensor.stride() != view.stride():
                owner.adopt(part, view.copy_(tensor))
        self._buffers[name] = buffer

    def _fold(self, names: list[str], sources: Mapping[str, torch.Tensor]) -> None:
        """Compute folds, each into its buffer where it has one.

        Large ones are gathered: what they were computed from may have lain around them.
        """
        waiting: list[Unit] = []
        for name in names:
            assert self._stage is not None
            value, old = _evaluate(self._stage, [name], sources)[name], self._buffers.get(name)
            is_view = self._is_view(name, value, sources)
            if old is not None and not is_view and _fits(old, [value]):
                old.copy_(value)
                continue
            self._buffers[name] = value
            if not is_view and value.untyped_storage().nbytes() >= LEAST_BYTES:
                waiting.append(Unit(value.data_ptr(), value.nbytes, value.device, partial(self._keep, name)))
            del value
            if sum(unit.nbytes for unit in waiting) > PORTION_BYTES:
                gather(waiting)
                waiting = []
        gather(waiting)

    def _is_view(self, name: str, value: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> bool:
        """Whether a fold is nothing but a view of what it was computed from."""
        read = (sources[source] for source in self._dependencies[name] & sources.keys())
        return any(tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() for tensor in read)

    def _keep(self, name: str, place: torch.Tensor) -> None:
        value = self._buffers[name]
        self._buffers[name] = _shaped(place, _form(value)).copy_(value)

    def derived_bytes(self) -> int:
        """Bytes of the buffers that are no views of parameters."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._buffers.values()}
        return sum(size for pointer, size in own.items() if pointer not in self._source_storages)

    def value(self, role: str, name: str, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._buffers[name] if role == "derived" else sources[name]

    def values(self, graph: Graph, sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Placeholder name -> value, for a stage's weight placeholders."""
        found = {}
        for node in graph.placeholders("parameter", "buffer"):
            found[node.name] = sources[node.meta["source"]]
        for node in graph.placeholders("constant"):
            found[node.name] = graph.constants[node.name]
        for node in graph.placeholders("derived"):
            found[node.name] = self._buffers[node.meta["source"]]
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


def _form(tensor: torch.Tensor) -> torch.Tensor:
    """Shape, strides and dtype of a tensor, dense, as a tensor without memory."""
    return torch.empty_like(tensor, device="meta")


def _shaped(place: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """The bytes of a place as a tensor."""
    return place.view(form.dtype).as_strided(form.shape, form.stride())


def _fits(buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Whether `parts` can be written into the buffer of earlier ones."""
    if any(p.dtype != buffer.dtype or p.device != buffer.device for p in parts):
        return False
    if len(parts) == 1:
        return parts[0].shape == buffer.shape
    return sum(p.shape[0] for p in parts) == buffer.shape[0] and all(p.shape[1:] == buffer.shape[1:] for p in parts)


def _standing(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Several dense tensors that already lie one behind another in one storage (another program arranged them so)."""
    first, place = parts[0], parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != place or part.dtype != first.dtype:
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += part.numel() * part.itemsize
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _evaluate(stage: Stage, wanted: list[str], sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the part of the weights stage that `wanted` needs.

    What nobody reads any more goes at once: a fold computes in float32, and its parts together are several times as
    large as its result.
    """
    graph = stage.graph
    nodes = dict(zip(stage.outputs, graph.results, strict=True))
    roots = [nodes[name] for name in wanted]
    needed = _cone(roots)
    order = [node for node in graph.fx.nodes if node in needed]
    last_reader = {read: node for node in order for read in node.all_input_nodes}
    values: dict[Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in order:
            if node.op == "placeholder":
                is_constant = node.meta["role"] == "constant"
                values[node] = graph.constants[node.name] if is_constant else sources[node.meta["source"]]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                del args, kwargs
                for read in node.all_input_nodes:
                    if last_reader[read] is node and read not in roots:
                        del values[read]
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
