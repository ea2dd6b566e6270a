"""Where the values of a stage lie while it runs, and how much memory that takes."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ...graph import Graph, SizeSpec, TensorSpec, evaluate_shape
from .choose import OPERATORS


@dataclass(frozen=True)
class Memory:
    """Whose memory each value uses, and until when.

    ends    call -> the values that nobody reads after it; kept, all activations of a picture would lie there at once
    owners  call -> the value in whose memory its result lies: itself, or what the result is a view of or written over
    over    the calls whose result is to be written over their first argument, which ends there
    """

    ends: dict[Node, list[Node]]
    owners: dict[Node, Node]
    over: frozenset[Node]


def memory_of(calls: Sequence[Node], results: Sequence[Any]) -> Memory:
    """calls: a graph's, in the order in which they will run."""
    ends = _ends(calls, results)
    owners: dict[Node, Node] = {}
    over: set[Node] = set()
    alive: Counter[Node] = Counter()
    for node in calls:
        owner = view_of(node, owners)
        if can_write_over(node, owners):
            home = owners[node.args[0]]  # type: ignore[index]
            here = [n for n in node.all_input_nodes if owners.get(n) is home]
            if len(here) == 1 and alive[home] == sum(owners.get(n) is home for n in ends[node]):
                owner = home
                over.add(node)
        owners[node] = owner
        alive[owner] += 1
        alive.subtract(owners.get(n, n) for n in ends[node])
    return Memory(ends, owners, frozenset(over))


def _ends(calls: Sequence[Node], results: Sequence[Any]) -> dict[Node, list[Node]]:
    seen = {r for r in results if isinstance(r, Node)}
    ends: dict[Node, list[Node]] = {}
    for node in reversed(calls):
        ended = dict.fromkeys(n for n in (*node.all_input_nodes, node) if n not in seen)
        seen |= ended.keys()
        ends[node] = list(ended)
    return ends


def view_of(node: Node, owners: Mapping[Node, Node]) -> Node:
    """The value in whose memory an operator puts its result: the result, or the argument that it is a view of.

    A tensor that is made contiguous is taken for one that is so already, as our kernels' results are.
    """
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    view = node.target is operator.getitem or any(r.alias_info is not None for r in returns)
    source = node.all_input_nodes[0] if view and node.all_input_nodes else node
    kinds = [getattr(n.meta.get("spec"), "dtype", None) for n in (node, source)]
    changed = None not in kinds and kinds[0] != kinds[1]  # `to` gives its argument back where it changes nothing
    return node if changed else owners.get(source, source)


def can_write_over(node: Node, owners: Mapping[Node, Node]) -> bool:
    """Whether there is a kernel that writes over its first argument, and that lies in memory which the run made."""
    first = node.args[0] if node.args else None
    if node.target not in _IN_PLACE or not isinstance(first, Node) or first not in owners:
        return False
    return owners[first].op == "call_function" and first.meta.get("spec") == node.meta.get("spec")


_IN_PLACE = frozenset(target for target, known in OPERATORS.items() if known.writes_over is not None)


def symbols_of(graph: Graph, given: Mapping[str, Any]) -> dict[str, int]:
    """Numbers for the symbols in the placeholders' shapes."""
    symbols: dict[str, int] = {}
    for node in graph.placeholders():
        spec, value = node.meta["spec"], given[node.name]
        if isinstance(spec, TensorSpec):
            symbols |= {dim: size for dim, size in zip(spec.shape, value.shape, strict=True) if isinstance(dim, str)}
        elif isinstance(spec, SizeSpec) and isinstance(spec.expr, str):
            symbols[spec.expr] = value
    return symbols


def sizes_of(calls: Sequence[Node], symbols: Mapping[str, int]) -> dict[Node, int]:
    """Bytes of each call's result.  raises NameError where one has a size that is no function of the symbols"""

    @functools.cache  # hundreds of results have some tens of shapes
    def nbytes(spec: Any) -> int:
        if isinstance(spec, TensorSpec):
            return math.prod(evaluate_shape(spec.shape, symbols)) * spec.dtype.itemsize
        return sum(map(nbytes, spec)) if isinstance(spec, tuple) else 0

    return {node: nbytes(node.meta.get("spec")) for node in calls}


def block_bytes(calls: Sequence[Node], results: Sequence[Any], sizes: Mapping[Node, int]) -> int:
    """Size of a block of memory in which torch's allocator finds a place for each value of a run.

    It is more than what lives at once, because the free pieces between others may be too small.  What kernels take for
    themselves is not counted.

    sizes  bytes of each call's result
    """
    memory, block = memory_of(calls, results), _Block()
    alive: Counter[Node] = Counter()
    places: dict[Node, tuple[int, int]] = {}
    for node in calls:
        owner = memory.owners[node]
        alive[owner] += 1
        if owner is node:
            places[node] = block.take(sizes[node])
        for read in memory.ends[node]:
            owner = memory.owners.get(read, read)
            alive[owner] -= 1
            if not alive[owner] and owner in places:
                block.give(places.pop(owner))
    return block.used


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
