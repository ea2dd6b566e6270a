"""Broadcasts: what is the same for every row of the batch is computed once.

A denoiser expands its timestep to the batch before it embeds it.  Moved behind the whole time MLP and into additions
that broadcast anyway, the expand is gone, the MLP runs on one row, and nothing of it depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..graph import Dim, argument, aten, call, is_call, is_tensor, replace, shape, spec
from .clean import permutation
from .rule import Rule, source

UNARY: tuple[Callable[..., Any], ...] = tuple(
    getattr(aten, name).default
    for name in (
        "silu", "gelu", "relu", "sigmoid", "tanh", "sin", "cos", "exp", "log", "neg", "abs", "sqrt", "rsqrt",
        "reciprocal", "erf", "mish", "softplus", "leaky_relu", "hardswish", "hardsigmoid", "elu", "clamp",
        "bitwise_not", "logical_not", "square", "expm1", "log1p", "floor", "round",
    )
) + (aten.to.dtype, aten.pow.Tensor_Scalar, aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.lt.Scalar,
     aten.eq.Scalar, aten.ne.Scalar)  # fmt: skip

POINTWISE: tuple[Callable[..., Any], ...] = UNARY + tuple(
    getattr(aten, name).Tensor
    for name in ("add", "sub", "mul", "div", "eq", "ne", "ge", "gt", "le", "lt", "__and__", "__or__", "bitwise_and",
                 "bitwise_or")
) + (aten.pow.Tensor_Tensor, aten.where.self, aten.maximum.default, aten.minimum.default, aten.logical_and.default,
     aten.logical_or.default)  # fmt: skip
"""Operators that compute each element from the elements at its place, broadcasting their tensors."""


def broadcast_rows(node: Any) -> Node | None:
    """x where the node is x[1, …] expanded to [B, …], else None."""
    if not is_call(node, aten.expand.default):
        return None
    x: Node = source(node)
    few, many = shape(x), shape(node)
    return x if len(few) == len(many) and few[:1] == (1,) != many[:1] and few[1:] == many[1:] else None


class SinkBroadcast(Rule):
    """f(expand(x)) = expand(f(x)) for an f that treats every row alone, where expand repeats the only row of x.

    Row-wise are the element-wise operators (where the other tensors have one row), and those that work along other
    axes only: linear, layer_norm, cat, slice, unsqueeze, permute.
    """

    roots = (
        *POINTWISE, aten.linear.default, aten.layer_norm.default, aten.cat.default, aten.slice.Tensor,
        aten.unsqueeze.default, aten.permute.default, aten.transpose.int,
    )  # fmt: skip

    def match(self, node: Node) -> tuple[Node, dict[Node, Node]] | None:
        if not is_tensor(node):
            return None
        rank = len(shape(node))
        tensors = [a for a in node.all_input_nodes if is_tensor(a)]
        rows = {a: x for a in tensors if (x := broadcast_rows(a)) is not None}
        if node.target in POINTWISE:
            rows = {a: x for a, x in rows.items() if len(shape(a)) == rank}
            lone = all(a in rows or len(shape(a)) < rank or shape(a)[:1] == (1,) for a in tensors)
        else:
            lone = _treats_rows_alone(node, rank) and _row_inputs(node) <= rows.keys()
            rows = {a: x for a, x in rows.items() if a in _row_inputs(node)}
        return (node, rows) if rows and lone else None

    def rewrite(self, found: tuple[Node, dict[Node, Node]]) -> None:
        node, rows = found
        read: Any = map_arg((node.args, dict(node.kwargs)), lambda a: rows.get(a, a))
        target: Any = node.target
        one = call(node, target, read[0], spec(node).with_shape((1, *shape(node)[1:])), read[1])
        count = argument(next(iter(rows)), 1, "size")[0]
        sizes = [count] + [-1] * (len(shape(node)) - 1)
        replace(node, call(node, aten.expand.default, (one, sizes), spec(node)))


def _row_inputs(node: Node) -> set[Node]:
    """The tensors whose axis 0 is the result's axis 0; the others are weights."""
    first = source(node)
    return set(first) if is_call(node, aten.cat.default) else {first}


def _treats_rows_alone(node: Node, rank: int) -> bool:
    """Whether axis 0 of the result is axis 0 of the first argument and no element looks at another row."""
    if is_call(node, aten.linear.default):
        return rank > 1
    if is_call(node, aten.layer_norm.default):
        return len(argument(node, 1, "normalized_shape")) < rank
    if is_call(node, aten.permute.default, aten.transpose.int):
        order = permutation(node)
        return order is not None and order[:1] == (0,)
    return bool(argument(node, 1, "dim", 0) % rank != 0)


class DropBroadcast(Rule):
    """f(x, expand(y)) = f(x, y) for an f that broadcasts y by itself: element-wise operators, the mask of attention."""

    roots = (*POINTWISE, aten.scaled_dot_product_attention.default)

    def match(self, node: Node) -> tuple[Node, Node, Node] | None:
        if not is_tensor(node):
            return None
        for a in node.all_input_nodes:
            if is_call(a, aten.expand.default) and self._needless(node, a):
                return node, a, source(a)
        return None

    def rewrite(self, found: tuple[Node, Node, Node]) -> None:
        node, expanded, x = found
        node.replace_input_with(expanded, x)
        if another := self.match(node):
            self.rewrite(another)

    @staticmethod
    def _needless(node: Node, expanded: Node) -> bool:
        x = source(expanded)
        if is_call(node, aten.scaled_dot_product_attention.default):
            others = {argument(node, i, name) for i, name in enumerate(("query", "key", "value"))}
            same_rank = len(shape(x)) == len(shape(expanded)) == len(shape(node))
            return expanded not in others and same_rank and shape(x)[-2:] == shape(expanded)[-2:]
        if not shape(x):
            return False  # a tensor without axes takes no part in the choice of the result's dtype
        tensors = [x if a is expanded else a for a in node.all_input_nodes if is_tensor(a)]
        return broadcast_shape(shape(t) for t in tensors) == shape(node)


def broadcast_shape(shapes: Iterable[tuple[Dim, ...]]) -> tuple[Dim, ...] | None:
    """The shape to which the shapes broadcast; None where two different expressions meet."""
    out: list[Dim] = []
    for dims in shapes:
        out = [*[1] * (len(dims) - len(out)), *out]
        for i, dim in enumerate(dims, start=len(out) - len(dims)):
            if out[i] == 1:
                out[i] = dim
            elif dim not in (1, out[i]):
                return None
    return tuple(out)
