"""Clean-up: one spelling for each operation, and nothing that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import Dim, argument, arguments, aten, call, is_call, is_tensor, replace, shape, spec
from .rule import Rule, source

# ---- one spelling --------------------------------------------------------------------------------------------------


class ViewToReshape(Rule):
    """view(x, s) = reshape(x, s), which is legal for every layout of x."""

    roots = (aten.view.default, aten._unsafe_view.default)

    def match(self, node: Node) -> Node:
        return node

    def rewrite(self, found: Node) -> None:
        found.target = aten.reshape.default
        found.args, found.kwargs = (found.args[0], argument(found, 1, "size")), {}


class CastToDtype(Rule):
    """to(x, device, dtype, …) = to(x, dtype): all tensors of a graph live on one device."""

    roots = (aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default)

    def match(self, node: Node) -> Node | None:
        return node if is_tensor(node) and is_tensor(node.args[0]) else None

    def declines(self, found: Node) -> str | None:
        return None if _keeps_layout(found) else "it changes the memory format"

    def rewrite(self, found: Node) -> None:
        found.target = aten.to.dtype
        found.args, found.kwargs = (found.args[0], spec(found).dtype), {}


class SizesFromInputs(Rule):
    """size(x, i) = size(y, j) where both are the same symbol: y is the first input that has it."""

    roots = (aten.sym_size.int,)

    def match(self, node: Node) -> tuple[Node, tuple[Node, int]] | None:
        first = _first_input_with(node, node.meta["spec"].expr)
        return (node, first) if first is not None and first != tuple(node.args) else None

    def rewrite(self, found: tuple[Node, tuple[Node, int]]) -> None:
        node, args = found
        node.args = args


def _first_input_with(node: Node, dim: Dim) -> tuple[Node, int] | None:
    for other in node.graph.nodes:
        if other.op != "placeholder":
            return None
        if other.meta["role"] == "input" and is_tensor(other) and dim in shape(other):
            return other, shape(other).index(dim)
    return None


# ---- nothing that changes nothing ----------------------------------------------------------------------------------


def _keeps_layout(node: Node) -> bool:
    """Whether the call asks for no other order of the elements in memory."""
    given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.memory_format)]
    return all(m in (torch.preserve_format, torch.contiguous_format) for m in given)


def _always(node: Node) -> bool:
    return True


def _other_is(neutral: int) -> Callable[[Node], bool]:
    def holds(node: Node) -> bool:
        other = argument(node, 1, "other")
        return isinstance(other, int | float) and other == neutral

    return holds


def _is_idle_dropout(node: Node) -> bool:
    named = arguments(node)
    return not named["train"] or named["p"] == 0


NO_OPS: dict[Callable[..., Any], Callable[[Node], bool]] = {
    aten.dropout.default: _is_idle_dropout,
    aten.feature_dropout.default: _is_idle_dropout,
    aten.alpha_dropout.default: _is_idle_dropout,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.contiguous.default: _keeps_layout,
    aten.clone.default: _keeps_layout,
    aten.to.dtype: _keeps_layout,
    aten.reshape.default: _always,
    aten.expand.default: _always,
    aten.slice.Tensor: _always,
    aten.flatten.using_ints: _always,
    aten.add.Tensor: _other_is(0),
    aten.add.Scalar: _other_is(0),
    aten.sub.Tensor: _other_is(0),
    aten.sub.Scalar: _other_is(0),
    aten.mul.Tensor: _other_is(1),
    aten.mul.Scalar: _other_is(1),
    aten.div.Tensor: _other_is(1),
    aten.div.Scalar: _other_is(1),
}
"""Operator -> when it returns its first argument, given that it keeps shape and dtype."""


class RemoveNoOps(Rule):
    """f(x) = x for: dropout in eval; alias, detach; `to` the same dtype; contiguous and clone without a memory format;
    reshape, expand and slice to the same shape; x + 0, x - 0, x · 1, x / 1."""

    roots = tuple(NO_OPS)

    def match(self, node: Node) -> Node | None:
        x, target = source(node), node.target
        if not is_tensor(x) or not is_tensor(node) or spec(x) != spec(node):
            return None
        return node if callable(target) and NO_OPS[target](node) else None

    def declines(self, found: Node) -> str | None:
        x = source(found)
        if _is_result(found) and (x.op == "placeholder" or _is_result(x)):
            return "the caller gets a tensor of its own"
        return None

    def rewrite(self, found: Node) -> None:
        replace(found, source(found))


def _is_result(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


# ---- views of views ------------------------------------------------------------------------------------------------


def permutation(node: Any) -> tuple[int, ...] | None:
    """The order of axes that a permute or transpose gives, as aten.permute writes it; None for other nodes."""
    if not is_call(node, aten.permute.default, aten.transpose.int, aten.t.default):
        return None
    rank = len(shape(node))
    if is_call(node, aten.permute.default):
        return tuple(axis % rank for axis in argument(node, 1, "dims"))
    order = list(range(rank))
    if rank:
        a, b = (0, rank - 1) if is_call(node, aten.t.default) else (node.args[1] % rank, node.args[2] % rank)
        order[a], order[b] = order[b], order[a]
    return tuple(order)


def permuted(before: Node, x: Node, order: Sequence[int]) -> Node:
    """Insert permute(x, order)."""
    kept = spec(x).with_shape(shape(x)[axis] for axis in order)
    return call(before, aten.permute.default, (x, list(order)), kept)


class ComposePermutes(Rule):
    """permute(permute(x, p), q) = permute(x, p∘q), and x where p∘q is the identity."""

    roots = (aten.permute.default, aten.transpose.int, aten.t.default)

    def match(self, node: Node) -> tuple[Node, Node, tuple[int, ...]] | None:
        x, order, inner = source(node), permutation(node), permutation(source(node))
        if order is not None and inner is not None:
            return node, source(x), tuple(inner[axis] for axis in order)
        return (node, x, order) if order is not None and _is_identity(order) else None

    def rewrite(self, found: tuple[Node, Node, tuple[int, ...]]) -> None:
        node, x, order = found
        replace(node, x if _is_identity(order) else permuted(node, x, order))


def _is_identity(order: tuple[int, ...]) -> bool:
    return order == tuple(range(len(order)))


class ComposeReshapes(Rule):
    """reshape(reshape(x, a), b) = reshape(x, b); the inner one may be flatten, squeeze or unsqueeze."""

    roots = (aten.reshape.default,)
    inner = (aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim)

    def match(self, node: Node) -> tuple[Node, Node] | None:
        inner = source(node)
        return (node, source(inner)) if is_call(inner, *self.inner) else None

    def rewrite(self, found: tuple[Node, Node]) -> None:
        node, x = found
        node.args = (x, *node.args[1:])


# ---- everything once -----------------------------------------------------------------------------------------------


class MergeEqualCalls(Rule):
    """f(x) computed twice = f(x) computed once, for every operator that is a function of its arguments."""

    def match(self, node: Node) -> tuple[Node, Node] | None:
        if not _is_pure(node.target):
            return None
        read = node.all_input_nodes
        others: Any = min((r.users for r in read), key=len) if read else node.graph.nodes
        for other in others:
            if other.target is node.target and other is not node and _same_call(node, other):
                return (node, other) if other < node else (other, node)
        return None

    def declines(self, found: tuple[Node, Node]) -> str | None:
        return "both are results, and each is a tensor of its own" if all(map(_is_result, found)) else None

    def rewrite(self, found: tuple[Node, Node]) -> None:
        replace(*found)


def _same_call(a: Node, b: Node) -> bool:
    # The text tells 1 from 1.0 and True, which compare equal but do not compute the same dtype.
    return a.args == b.args and a.kwargs == b.kwargs and repr((a.args, a.kwargs)) == repr((b.args, b.kwargs))


def _is_pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
