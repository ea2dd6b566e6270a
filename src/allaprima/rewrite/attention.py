"""Attention."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from .. import ops
from ..graph import arguments, aten, call, is_call, replace, shape, sole_user, spec
from .clean import permutation, permuted
from .rule import Rule, source

SWAP = (0, 2, 1, 3)
"""[B, N, H, D] <-> [B, H, N, D]"""


class AttentionWithoutTransposes(Rule):
    """sdpa(qᵀ, kᵀ, vᵀ)ᵀ = attention(q, k, v), where ᵀ swaps the axes of heads and rows of [B, N, H, D].

    A query or key that is no transposed view (rotary embeddings are applied with heads first) gets its transpose here,
    which is a view.
    """

    roots = (aten.scaled_dot_product_attention.default,)

    def match(self, node: Node) -> tuple[Node, dict[str, Any]]:
        return node, arguments(node)

    def declines(self, found: tuple[Node, dict[str, Any]]) -> str | None:
        node, named = found
        q, k, v = (named[name] for name in ("query", "key", "value"))
        user = sole_user(node)
        if len(shape(node)) != 4:
            return f"rank {len(shape(node))}, not [B, H, N, D]"
        if named["dropout_p"]:
            return "dropout is on"
        if named.get("enable_gqa") or _is_repeated(v) or not shape(q)[:2] == shape(k)[:2] == shape(v)[:2]:
            return "heads share keys and values, or differ in number"
        if named["is_causal"] and named["attn_mask"] is not None:
            return "a mask and is_causal together"
        if named["scale"] is None and not isinstance(shape(q)[3], int):
            return "the channels of a head are not fixed"
        if permutation(v) != SWAP or user is None or permutation(user) != SWAP:
            return "values or result are not transposed views"
        return None

    def rewrite(self, found: tuple[Node, dict[str, Any]]) -> None:
        node, named = found
        q, k, v = (named[name] for name in ("query", "key", "value"))
        scale = named["scale"] if named["scale"] is not None else 1 / math.sqrt(float(shape(q)[3]))
        user = next(iter(node.users))
        args = (*(_rows_first(node, x) for x in (q, k, v)), named["attn_mask"], float(scale), named["is_causal"])
        fused = call(node, ops.attention, args, spec(user))
        replace(user, fused)
        node.graph.erase_node(node)


def _is_repeated(x: Node) -> bool:
    """Whether each head of x stands for several, as grouped queries want it: reshape(expand(…))."""
    return is_call(x, aten.reshape.default) and is_call(source(x), aten.expand.default)


def _rows_first(before: Node, x: Node) -> Node:
    return source(x) if permutation(x) == SWAP else permuted(before, x, SWAP)
