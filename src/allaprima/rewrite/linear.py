"""Matrix products."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph import argument, aten, call, is_call, replace, shape, spec
from .rule import Rule


class MergeSiblingLinears(Rule):
    """x·W₁ᵀ, x·W₂ᵀ, … = the column slices of x·[W₁; W₂; …]ᵀ, biases likewise.

    One rule for the query, key and value of self-attention, for the keys and values of all cross-attentions (which
    read the same text), for the time projections of all residual blocks, and for the two halves of a gated MLP.
    """

    roots = (aten.linear.default,)

    def match(self, node: Node) -> list[list[Node]] | None:
        siblings = [u for u in node.args[0].users if is_call(u, aten.linear.default) and u.args[0] is node.args[0]]  # type: ignore[union-attr]
        if len(siblings) < 2 or any(other < node for other in siblings):
            return None
        groups: dict[Any, list[Node]] = {}
        for sibling in sorted(siblings):
            groups.setdefault((_bias(sibling) is None, spec(_weight(sibling)).dtype), []).append(sibling)
        return list(groups.values())

    def declines(self, found: list[list[Node]]) -> str | None:
        if all(len(group) < 2 for group in found):
            return "only some of the linears over this input have a bias, or their dtypes differ"
        for group in found:
            for sibling in group:
                weight, bias = _weight(sibling), _bias(sibling)
                if not (weight < group[0] and (bias is None or bias < group[0])):
                    return f"a weight of {sibling.name} is computed after {group[0].name}"
                if not isinstance(shape(weight)[0], int) or len(shape(weight)) != 2:
                    return f"the number of features of {sibling.name} is not fixed"
        return None

    def rewrite(self, found: list[list[Node]]) -> None:
        for group in found:
            if len(group) > 1:
                _merge(group)


def _merge(group: list[Node]) -> None:
    first, x = group[0], group[0].args[0]
    weights, biases = [_weight(n) for n in group], [_bias(n) for n in group]
    widths = [shape(w)[0] for w in weights]
    total = sum(widths)  # type: ignore[arg-type]
    weight = call(first, aten.cat.default, (weights, 0), spec(weights[0]).with_shape((total, shape(weights[0])[1])))
    args: tuple[Any, ...] = (x, weight)
    if biases[0] is not None:
        args += (call(first, aten.cat.default, (biases, 0), spec(biases[0]).with_shape((total,))),)
    merged = call(first, aten.linear.default, args, spec(first).with_shape((*shape(first)[:-1], total)))
    axis, start = len(shape(first)) - 1, 0
    for node, width in zip(group, widths, strict=True):
        replace(node, call(node, aten.slice.Tensor, (merged, axis, start, start + width), spec(node)))  # type: ignore[operator]
        start += width  # type: ignore[operator]


def _weight(linear: Node) -> Node:
    return argument(linear, 1, "weight")  # type: ignore[no-any-return]


def _bias(linear: Node) -> Node | None:
    return argument(linear, 2, "bias")  # type: ignore[no-any-return]
