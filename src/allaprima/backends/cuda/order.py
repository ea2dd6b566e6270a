"""The order in which a stage's calls run: one in which large values end early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from ...graph import Graph, SizeSpec
from .memory import block_bytes, can_write_over, sizes_of, symbols_of, view_of


def in_order(graph: Graph, given: Mapping[str, Any]) -> tuple[list[Node], int]:
    """The calls of a graph in the order in which they should run, and the bytes of the block that they need then.

    The order is the graph's own unless another needs less.  0 bytes: the sizes of the values do not follow from those
    of the arguments.

    given  a value for each placeholder: of tensors only the shapes are read
    """
    calls, results = graph.calls(), graph.results
    try:
        sizes = sizes_of(calls, symbols_of(graph, given))
    except NameError:
        return calls, 0
    orders = [calls]
    moved = _readers_first(calls, results, sizes)
    if moved != calls:
        orders.append(moved)
    needs = [block_bytes(order, results, sizes) for order in orders]
    best = needs.index(min(needs))
    return orders[best], needs[best]


def _readers_first(calls: list[Node], results: Sequence[Any], sizes: Mapping[Node, int]) -> list[Node]:
    """Calls that can write over their argument come after all others that read it, where those could run earlier.

    A residual block's shortcut is traced last: run first, it leaves the norm in front of the block as the last reader
    of the block's input.  The results of what is moved may take no more memory than the argument that ends.
    """
    owners: dict[Node, Node] = {}
    readers: dict[Node, dict[Node, None]] = {}  # of a value's memory
    for node in calls:
        owners[node] = view_of(node, owners)
        for read in node.all_input_nodes:
            readers.setdefault(owners.get(read, read), {})[node] = None
    kept = {owners.get(r, r) for r in results if isinstance(r, Node)}
    place = {node: i for i, node in enumerate(calls)}
    for node in [n for n in calls if can_write_over(n, owners)]:
        home = owners[node.args[0]]  # type: ignore[index]
        late = [n for n in readers[home] if place[n] > place[node]]
        moved = _movable(late, place, place[node], owners) if home not in kept else []
        if moved and sum(sizes[n] for n in moved if owners[n] is n) <= sizes[home]:
            here, gone = place[node], set(moved)
            calls = [*calls[:here], *moved, *(n for n in calls[here:] if n not in gone)]
            place = {node: i for i, node in enumerate(calls)}
    return calls


def _movable(late: list[Node], place: Mapping[Node, int], here: int, owners: Mapping[Node, Node]) -> list[Node]:
    """These calls, with the views and sizes that they need, in order; nothing where they need more than that of what
    is computed behind `here`."""
    needed, asked = set(late), list(late)
    while asked:
        for read in asked.pop().all_input_nodes:
            if place.get(read, -1) >= here and read not in needed:
                if owners[read] is read and not isinstance(read.meta.get("spec"), SizeSpec):
                    return []
                needed.add(read)
                asked.append(read)
    return sorted(needed, key=lambda n: place[n])
