"""Attention loses its transposes, in every spelling that the libraries use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allaprima import ops
from allaprima.capture import DynamicDim
from allaprima.graph import aten
from allaprima.rewrite.attention import AttentionWithoutTransposes
from allaprima.rewrite.clean import ComposePermutes, RemoveNoOps, ViewToReshape
from tests.rewrite.check import BATCH, Case, randn

HEADS, CHANNELS = 2, 8
RULES = (ViewToReshape(), RemoveNoOps(), ComposePermutes(), AttentionWithoutTransposes())
X, TEXT = randn(3, 5, 16), randn(3, 7, 16)
OTHERS = ((randn(1, 9, 16), randn(1, 1, 16)), (randn(2, 5, 16), randn(2, 77, 16)))


def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    return {0: BATCH, 1: DynamicDim(tensor.shape[1])}


def split(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], -1, HEADS, CHANNELS).transpose(1, 2)


def join(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, HEADS * CHANNELS)


def permuted(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], x.shape[1], HEADS, CHANNELS).permute(0, 2, 1, 3)


def rotated(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., CHANNELS // 2 :], x[..., : CHANNELS // 2]], -1) * 0.5 + x


SPELLINGS: dict[str, Callable[..., Any]] = {
    "diffusers": lambda m, x, y: join(F.scaled_dot_product_attention(split(x), split(y), split(y))),
    "transformers": lambda m, x, y: (
        F.scaled_dot_product_attention(split(x), split(y), split(y), scale=0.3)
        .reshape(x.shape[0], -1, x.shape[1], CHANNELS)
        .transpose(1, 2)
        .contiguous()
        .reshape(x.shape[0], x.shape[1], -1)
    ),
    "permute": lambda m, x, y: (
        F.scaled_dot_product_attention(permuted(x), permuted(y), permuted(y)).permute(0, 2, 1, 3).flatten(2)
    ),
    "rotary": lambda m, x, y: join(
        F.scaled_dot_product_attention(rotated(split(x)), rotated(split(y)), split(y))
    ),
    "causal": lambda m, x, y: join(F.scaled_dot_product_attention(split(x), split(x), split(x), is_causal=True)),
    "boolean mask": lambda m, x, y: join(
        F.scaled_dot_product_attention(split(x), split(y), split(y), (y[:, None, None, :, 0] < 9))
    ),
    "added mask": lambda m, x, y: join(
        F.scaled_dot_product_attention(split(x), split(y), split(y), y[:, None, None, :, 0] - 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_works_on_rows_first(name: str) -> None:
    case = Case(SPELLINGS[name], X, TEXT, dims=dims)
    assert case.fires(*RULES) == 1
    assert case.count(ops.attention) == 1
    assert case.count(aten.scaled_dot_product_attention.default) == 0
    if name != "rotary":
        assert case.count(aten.transpose.int, aten.permute.default) == 0
    case.agrees(*OTHERS)


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "heads first at the end": (
        lambda m, x, y: F.scaled_dot_product_attention(split(x), split(y), split(y)), "not transposed views",
    ),
    "values that are no view": (
        lambda m, x, y: join(F.scaled_dot_product_attention(split(x), split(y), torch.sin(split(y)))),
        "not transposed views",
    ),
    "result read twice": (
        lambda m, x, y: (lambda z: join(z) + z.sum())(F.scaled_dot_product_attention(split(x), split(y), split(y))),
        "not transposed views",
    ),
    "dropout": (
        lambda m, x, y: join(F.scaled_dot_product_attention(split(x), split(y), split(y), dropout_p=0.5)), "dropout",
    ),
    "shared keys": (
        lambda m, x, y: join(
            F.scaled_dot_product_attention(split(x), split(y)[:, :1], split(y)[:, :1], enable_gqa=True)
        ),
        "heads share",
    ),
    "shared keys, broadcast": (
        lambda m, x, y: join(F.scaled_dot_product_attention(split(x), split(y)[:, :1], split(y))),
        "heads share",
    ),
    "one head without an axis": (lambda m, x, y: F.scaled_dot_product_attention(x, y, y), "rank 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_other_attentions_stay_and_say_why(name: str) -> None:
    function, reason = MISSES[name]
    case = Case(function, X, TEXT, dims=dims)
    assert reason in case.reason(*RULES)
    assert case.count(ops.attention) == 0
    assert case.count(aten.scaled_dot_product_attention.default) == 1


def test_a_transpose_of_other_axes_is_not_peeled() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], -1, HEADS, CHANNELS)
        return F.scaled_dot_product_attention(heads, heads, heads.transpose(-1, -2).transpose(-1, -2)).transpose(0, 1)

    assert "not transposed views" in Case(function, X, dims=dims).reason(*RULES)
