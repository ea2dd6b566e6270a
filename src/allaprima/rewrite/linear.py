"""Matrix products."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from .. import ops
from ..graph import argument, aten, call, is_call, is_tensor, replace, shape, sole_user, spec
from .clean import permutation, permuted
from .rule import Rule, source


class MergeSiblingLinears(Rule):
    """x·W₁ᵀ, x·W₂ᵀ, … = the column slices of x·[W₁; W₂; …]ᵀ, biases likewise.

    One rule for the query, key and value of self-attention, for the keys and values of all cross-attentions (which
    read the same text), for the time projections of all residual blocks, and for the two halves of a gated MLP.
    """

    roots = (aten.linear.default,)

    def match(self, node: Node) -> list[list[Node]] | None:
        x = source(node)
        if not is_tensor(x):
            return None
        siblings = [u for u in x.users if is_call(u, aten.linear.default) and source(u) is x]
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
    first = group[0]
    weights, biases = [_weight(n) for n in group], [_bias(n) for n in group]
    widths = [int(shape(w)[0]) for w in weights]
    total = sum(widths)
    weight = call(first, aten.cat.default, (weights, 0), spec(weights[0]).with_shape((total, shape(weights[0])[1])))
    args: tuple[Any, ...] = (source(first), weight)
    if biases[0] is not None:
        args += (call(first, aten.cat.default, (biases, 0), spec(biases[0]).with_shape((total,))),)
    merged = call(first, aten.linear.default, args, spec(first).with_shape((*shape(first)[:-1], total)))
    axis, start = len(shape(first)) - 1, 0
    for node, width in zip(group, widths, strict=True):
        replace(node, call(node, aten.slice.Tensor, (merged, axis, start, start + width), spec(node)))
        start += width


def _weight(linear: Node) -> Any:
    return argument(linear, 1, "weight")


def _bias(linear: Node) -> Any:
    return argument(linear, 2, "bias")


class GegluLinear(Rule):
    """h · gelu(g) where [h, g] = chunk(linear(x), 2) is geglu_linear(x)."""

    roots = (aten.gelu.default,)

    def match(self, node: Node) -> tuple[Node, Node, Node] | None:
        """(multiplication, gelu, linear)"""
        gate = source(node)
        if not is_call(gate, operator.getitem) or gate.args[1] != 1 or not is_call(source(gate), aten.chunk.default):
            return None
        chunk = source(gate)
        product: Any = sole_user(node)
        if not is_call(source(chunk), aten.linear.default) or not is_call(product, aten.mul.Tensor):
            return None
        other = product.args[1] if product.args[0] is node else product.args[0]
        halves = is_call(other, operator.getitem) and other.args == (chunk, 0)
        return (product, node, source(chunk)) if halves else None

    def declines(self, found: tuple[Node, Node, Node]) -> str | None:
        _, _, linear = found
        chunk: Any = next(iter(linear.users))
        if sole_user(linear) is None or any(sole_user(half) is None for half in chunk.users):
            return f"the halves of {linear.name} have other readers"
        last = argument(chunk, 2, "dim", 0) in (-1, len(shape(linear)) - 1)
        return None if last and argument(chunk, 1, "chunks") == 2 else "the halves are not those of the last axis"

    def rewrite(self, found: tuple[Node, Node, Node]) -> None:
        product, gelu, linear = found
        args = (source(linear), _weight(linear), _bias(linear), gelu.kwargs.get("approximate", "none"))
        replace(product, call(product, ops.geglu_linear, args, spec(product)))


class LinearAdd(Rule):
    """linear(x) + r = linear_add(x, r); permute(linear(x)) + r = permute(linear_add(x, permute⁻¹(r)))."""

    roots = (aten.add.Tensor,)

    def match(self, node: Node) -> tuple[Node, Node, Node] | None:
        """(addition, linear or its permutation, addend); of two linears the later one takes the other's result."""
        terms: list[Any] = [a for a in node.args[:2] if is_tensor(a)]
        linears = [a for a in terms if sole_user(a) is node and _linear_below(a) is not None]
        if len(terms) < 2 or terms[0] is terms[1] or not linears:
            return None
        linear = max(linears)
        return node, linear, terms[0] if terms[1] is linear else terms[1]

    def declines(self, found: tuple[Node, Node, Node]) -> str | None:
        node, linear, addend = found
        if argument(node, 2, "alpha", 1) != 1:
            return "the addition has a factor"
        return None if spec(linear) == spec(addend) == spec(node) else "the addition broadcasts or casts"

    def rewrite(self, found: tuple[Node, Node, Node]) -> None:
        node, term, addend = found
        linear: Any = _linear_below(term)
        order = permutation(term)
        if order is not None:
            addend = permuted(node, addend, [order.index(axis) for axis in range(len(order))])
        args = (source(linear), _weight(linear), _bias(linear), addend)
        fused = call(node, ops.linear_add, args, spec(linear))
        replace(node, fused if order is None else permuted(node, fused, order))


def _linear_below(term: Any) -> Node | None:
    """The linear that is this term or whose permutation it is."""
    if permutation(term) is not None and sole_user(source(term)) is not None:
        term = source(term)
    return term if is_call(term, aten.linear.default) else None
