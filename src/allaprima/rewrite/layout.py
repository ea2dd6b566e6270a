"""Where the channels are: 1×1 convolutions between rows of channels, and channels-last storage."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .. import ops
from ..graph import argument, arguments, aten, call, is_call, is_tensor, replace, shape, sole_user, spec
from .clean import permutation, permuted
from .rule import Rule, source

CHANNELS_LAST_ORDER = (0, 2, 3, 1)
CHANNELS_FIRST_ORDER = (0, 3, 1, 2)


def _is_pointwise(node: Any) -> bool:
    """A convolution that mixes the channels of each pixel and nothing else."""
    if not is_call(node, aten.conv2d.default):
        return False
    named = arguments(node)
    ones = all(s == 1 for s in (*shape(named["weight"])[2:], *named["stride"], named["groups"]))
    return ones and all(p == 0 for p in named["padding"])


def _as_linear(before: Node, conv: Node, rows: Node) -> Node:
    """Insert the convolution as a matrix product over rows [B, H, W, C]."""
    weight, bias = argument(conv, 1, "weight"), argument(conv, 2, "bias")
    features = shape(weight)[:2]
    matrix = call(before, aten.reshape.default, (weight, list(features)), spec(weight).with_shape(features))
    args = (rows, matrix) if bias is None else (rows, matrix, bias)
    return call(before, aten.linear.default, args, spec(rows).with_shape((*shape(rows)[:-1], features[0])))


class PointwiseConvToRows(Rule):
    """permute(conv1×1(x), BHWC) = linear(permute(x, BHWC)): with channels-last activations the permute is a view."""

    roots = (aten.permute.default,)

    def match(self, node: Node) -> tuple[Node, Node] | None:
        conv = source(node)
        if permutation(node) != CHANNELS_LAST_ORDER or not _is_pointwise(conv):
            return None
        return node, conv

    def declines(self, found: tuple[Node, Node]) -> str | None:
        return None if sole_user(found[1]) else f"{found[1].name} is also read with its channels first"

    def rewrite(self, found: tuple[Node, Node]) -> None:
        node, conv = found
        rows = permuted(node, source(conv), CHANNELS_LAST_ORDER)
        replace(node, _as_linear(node, conv, rows))


class PointwiseConvFromRows(Rule):
    """conv1×1(permute(x, BCHW)) = permute(linear(x), BCHW): the rows are read as they lie, nothing is reordered."""

    roots = (aten.conv2d.default,)

    def match(self, node: Node) -> tuple[Node, Node] | None:
        x = source(node)
        if permutation(x) != CHANNELS_FIRST_ORDER or not _is_pointwise(node):
            return None
        return node, source(x)

    def rewrite(self, found: tuple[Node, Node]) -> None:
        node, rows = found
        replace(node, permuted(node, _as_linear(node, node, rows), CHANNELS_FIRST_ORDER))


class ChannelsLastWeights(Rule):
    """conv2d(x, w) = conv2d(x, channels_last(w)): the same numbers, in the order in which kernels read them."""

    roots = (aten.conv2d.default, ops.conv2d_add, ops.conv2d_cat, ops.upsample_conv, ops.upsample_conv_folded)

    def match(self, node: Node) -> tuple[Node, list[int]] | None:
        places = (1, 2) if is_call(node, ops.upsample_conv_folded) else (1,)
        wrong = [i for i in places if not _is_channels_last(node.args[i])]
        return (node, wrong) if wrong else None

    def rewrite(self, found: tuple[Node, list[int]]) -> None:
        node, places = found
        args: list[Any] = list(node.args)
        for i in places:
            args[i] = _channels_last(node, args[i])
        node.args = tuple(args)


class ChannelsLastInputs(Rule):
    """conv2d(x, w) = conv2d(channels_last(x), w): free where x has that layout already."""

    roots = ChannelsLastWeights.roots

    def match(self, node: Node) -> Node | None:
        return node if any(not _is_channels_last(x) for x in _sources(node)) else None

    def rewrite(self, found: Node) -> None:
        for x in _sources(found):
            if not _is_channels_last(x):
                found.replace_input_with(x, _channels_last(found, x))


def _sources(conv: Node) -> list[Node]:
    first = source(conv)
    return [first] if is_tensor(first) else list(first)


def _is_channels_last(x: Any) -> bool:
    if is_call(x, aten.contiguous.default):
        return bool(x.kwargs.get("memory_format") == torch.channels_last)
    return is_call(x, *ChannelsLastWeights.roots)


def _channels_last(before: Node, x: Node) -> Node:
    return call(before, aten.contiguous.default, (x,), spec(x), {"memory_format": torch.channels_last})
