"""Normalisations and what stands around them."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from .. import ops
from ..graph import argument, arguments, aten, call, is_call, is_tensor, replace, shape, sole_user, spec
from .rule import Rule, source


class FoldBatchNorm(Rule):
    """batch_norm(conv(x, w, b)) in eval = conv(x, w', b') with w' = w·gain/σ, b' = (b - mean)·gain/σ + shift."""

    roots = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
    convolutions = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default)

    def match(self, node: Node) -> tuple[Node, Node] | None:
        """(norm, convolution)"""
        conv = source(node)
        return (node, conv) if is_call(conv, *self.convolutions) else None

    def declines(self, found: tuple[Node, Node]) -> str | None:
        norm, conv = found
        if arguments(norm).get("training"):
            return "it normalises by the batch's own statistics"
        if sole_user(conv) is None:
            return f"{conv.name} is also read before the norm"
        if any(user.args[1] != 0 for user in norm.users if is_call(user, operator.getitem)):
            return "its statistics are read"
        weight = argument(conv, 1, "weight")
        if any(x.op != "placeholder" for x in (*norm.all_input_nodes[1:], *conv.all_input_nodes[1:])):
            return "a weight is not a parameter"
        return None if isinstance(shape(weight)[0], int) else "the number of channels is not fixed"

    def rewrite(self, found: tuple[Node, Node]) -> None:
        norm, conv = found
        named, given = arguments(norm), arguments(conv)
        weight, bias = given["weight"], given["bias"]
        norms = (named[name] for name in ("weight", "bias", "running_mean", "running_var", "eps"))
        kernel, offset = spec(weight), spec(weight).with_shape(shape(weight)[:1])
        both = call(conv, ops.fold_batch_norm, (weight, bias, *norms), (kernel, offset))
        folded = [call(conv, operator.getitem, (both, i), kept) for i, kept in enumerate((kernel, offset))]
        conv.args = (source(conv), *folded, *conv.args[3:])
        results = [norm] if is_tensor(norm) else list(norm.users)
        for result in results:
            replace(result, conv)


class GroupNormSilu(Rule):
    """silu(group_norm(x)) = group_norm_silu(x)."""

    roots = (aten.silu.default,)

    def match(self, node: Node) -> tuple[Node, Node, dict[str, Any]] | None:
        norm = source(node)
        return (node, norm, arguments(norm)) if is_call(norm, aten.group_norm.default) else None

    def declines(self, found: tuple[Node, Node, dict[str, Any]]) -> str | None:
        _, norm, named = found
        if sole_user(norm) is None:
            return f"{norm.name} is also read without SiLU"
        return "the norm has no weight or no bias" if named["weight"] is None or named["bias"] is None else None

    def rewrite(self, found: tuple[Node, Node, dict[str, Any]]) -> None:
        node, _, named = found
        args = tuple(named[name] for name in ("input", "num_groups", "weight", "bias", "eps"))
        replace(node, call(node, ops.group_norm_silu, args, spec(node)))


class AddLayerNorm(Rule):
    """s = a + b, layer_norm(s) = add_layer_norm(a, b), which returns both."""

    roots = (aten.layer_norm.default,)

    def match(self, node: Node) -> tuple[Node, Node, dict[str, Any]] | None:
        add = source(node)
        if not is_call(add, aten.add.Tensor) or not all(is_tensor(a) for a in add.args[:2]):
            return None
        return node, add, arguments(node)

    def declines(self, found: tuple[Node, Node, dict[str, Any]]) -> str | None:
        _, add, named = found
        if any(a.meta["spec"] != spec(add) for a in add.args[:2] if isinstance(a, Node)):
            return "the addition broadcasts or casts"
        if argument(add, 2, "alpha", 1) != 1:
            return "the addition has a factor"
        if len(named["normalized_shape"]) != 1:
            return "the norm is over several axes"
        return "the norm has no weight or no bias" if named["weight"] is None or named["bias"] is None else None

    def rewrite(self, found: tuple[Node, Node, dict[str, Any]]) -> None:
        node, add, named = found
        args = (*add.args[:2], named["weight"], named["bias"], named["eps"])
        both = call(add, ops.add_layer_norm, args, (spec(add), spec(node)))
        total = call(add, operator.getitem, (both, 0), spec(add))
        normal = call(add, operator.getitem, (both, 1), spec(node))
        replace(node, normal)
        replace(add, total)


class NoConcatenation(Rule):
    """group_norm_silu(cat(xs, 1)) = group_norm_silu_cat(xs) and conv2d(cat(xs, 1)) = conv2d_cat(xs).

    Fires where every reader of the concatenation can do without it, so that it is never written.
    """

    roots = (aten.cat.default,)

    def match(self, node: Node) -> Node | None:
        known = any(is_call(u, ops.group_norm_silu, aten.conv2d.default) for u in node.users)
        return node if known and argument(node, 1, "dim", 0) == 1 and len(shape(node)) == 4 else None

    def declines(self, found: Node) -> str | None:
        sources = source(found)
        if any(spec(x).dtype != spec(found).dtype for x in sources):
            return "the sources differ in dtype"
        for user in found.users:
            if is_call(user, aten.conv2d.default) and source(user) is found:
                if argument(user, 6, "groups", 1) != 1:
                    return f"{user.name} has groups"
            elif not is_call(user, ops.group_norm_silu):
                return f"{user.name} reads the concatenation itself"
        return None

    def rewrite(self, found: Node) -> None:
        sources = source(found)
        for user in list(found.users):
            if is_call(user, ops.group_norm_silu):
                new = call(user, ops.group_norm_silu_cat, (sources, *user.args[1:]), spec(user))
            else:
                named = arguments(user)
                args = (sources, *(named[n] for n in ("weight", "bias", "stride", "padding", "dilation")))
                new = call(user, ops.conv2d_cat, args, spec(user))
            replace(user, new)
