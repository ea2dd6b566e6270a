"""Convolutions."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch.fx import Node

from .. import ops
from ..graph import Dim, argument, arguments, aten, call, evaluate, is_call, is_tensor, replace, shape, sole_user, spec
from .rule import Rule, source


class UpsampleConv(Rule):
    """conv3×3(upsample_nearest(x)) = upsample_conv(x), for every target size.

    Fires where the target is 2n or 2n - 1 for an input of n, so that a backend may run it folded (FoldUpsample).
    """

    roots = (aten.conv2d.default,)

    def match(self, node: Node) -> tuple[Node, Node, dict[str, Any]] | None:
        up = source(node)
        return (node, up, arguments(node)) if is_call(up, aten.upsample_nearest2d.vec) else None

    def declines(self, found: tuple[Node, Node, dict[str, Any]]) -> str | None:
        _, up, named = found
        if sole_user(up) is None:
            return f"{up.name} has other readers"
        if shape(named["weight"])[2:] != (3, 3):
            return "the kernel is not 3×3"
        if list(named["padding"]) != [1, 1]:
            return "the padding is not 1"
        if any(s != 1 for s in (*named["stride"], *named["dilation"], named["groups"])):
            return "it has a stride, a dilation or groups"
        return None if _doubles(up) else "the target is not twice the input"

    def rewrite(self, found: tuple[Node, Node, dict[str, Any]]) -> None:
        node, up, named = found
        size = argument(up, 1, "output_size") or (None, None)
        args = (source(up), named["weight"], None, named["bias"], *size)
        replace(node, call(node, ops.upsample_conv, args, spec(node)))


class FoldUpsample(Rule):
    """upsample_conv(x, w) = upsample_conv_folded(x, fold(w)): four 2×2 convolutions over x, 2.25 times fewer FLOPs.

    The folded taps are a function of the weight alone, hence computed once.

    halves  fire in half precision too, where the sums of taps are rounded: for backends that choose between both forms
            when they know sizes and errors
    """

    roots = (ops.upsample_conv,)

    def __init__(self, halves: bool = False) -> None:
        self.halves = halves

    def match(self, node: Node) -> Node:
        return node

    def declines(self, found: Node) -> str | None:
        if not self.halves and spec(found).dtype in (torch.float16, torch.bfloat16):
            return f"sums of taps would be rounded to {str(spec(found).dtype).removeprefix('torch.')}"
        return None

    def rewrite(self, found: Node) -> None:
        args: list[Any] = list(found.args)
        outputs, inputs, *_ = shape(args[1])
        taps = spec(args[1]).with_shape((4 * int(outputs), inputs, 2, 2))
        args[2] = call(found, ops.fold_upsample_weight, (args[1],), taps)
        replace(found, call(found, ops.upsample_conv_folded, tuple(args), spec(found)))


def _doubles(up: Node) -> bool:
    """Whether the target is 2n or 2n - 1, as far as trying sizes tells.

    Trying is enough: nothing becomes wrong by an error here, only the operator is no candidate for folding.
    """
    if argument(up, 1, "output_size") is None:
        return [float(s) for s in argument(up, 2, "scale_factors")] == [2.0, 2.0]
    return all(_doubles_dim(n, t) for n, t in zip(shape(source(up))[2:], shape(up)[2:], strict=True))


def _doubles_dim(dim: Dim, target: Dim) -> bool:
    names = {word for word in "".join(c if c.isalnum() else " " for c in f"{dim} {target}").split() if word[0] == "s"}
    sizes = (7, 8, 9, 10, 32, 65, 128)
    for values in product(sizes, repeat=len(names)) if len(names) < 4 else ():
        symbols = dict(zip(sorted(names), values, strict=True))
        if 2 * evaluate(dim, symbols) - evaluate(target, symbols) not in (0, 1):
            return False
    return len(names) < 4


class ConvAdd(Rule):
    """conv2d(x) + r = conv2d_add(x, r): a residual, or the timestep's embedding [B or 1, K, 1, 1], in the epilogue."""

    roots = (aten.add.Tensor,)

    def match(self, node: Node) -> tuple[Node, Node, Node] | None:
        """(addition, convolution, addend).

        Of two convolutions the one whose input is computed later takes the other's result: a residual block's shortcut
        is then free to run before the block, whose input may end there.
        """
        terms: list[Any] = [a for a in node.args[:2] if is_tensor(a)]
        convs = [a for a in terms if is_call(a, aten.conv2d.default) and sole_user(a) is node]
        if len(terms) < 2 or terms[0] is terms[1] or not convs:
            return None
        conv = max(convs, key=source)
        return node, conv, terms[0] if terms[1] is conv else terms[1]

    def declines(self, found: tuple[Node, Node, Node]) -> str | None:
        node, conv, addend = found
        if argument(node, 2, "alpha", 1) != 1:
            return "the addition has a factor"
        if spec(conv) != spec(node) or spec(addend).dtype != spec(node).dtype:
            return "the addition broadcasts or casts the convolution"
        rows, *rest = shape(addend) if len(shape(addend)) == 4 else (None, None)
        fits = rows in (1, shape(node)[0]) and rest in ([shape(node)[1], 1, 1], list(shape(node)[1:]))
        return None if fits else "the addend is broadcast along some other axis"

    def rewrite(self, found: tuple[Node, Node, Node]) -> None:
        node, conv, addend = found
        named = arguments(conv)
        args = (*(named[n] for n in ("input", "weight", "bias")), addend)
        args += tuple(named[n] for n in ("stride", "padding", "dilation", "groups"))
        replace(node, call(node, ops.conv2d_add, args, spec(node)))
