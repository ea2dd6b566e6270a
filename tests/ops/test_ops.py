"""The fused operators against the plain ones, in float64, and no worse than those in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from allaprima import ops
from allaprima.graph import target_name, target_named
from allaprima.ops import upsampling
from allaprima.ops.convolution import conv2d_flops
from allaprima.ops.linear import linear_flops
from allaprima.ops.sdpa import attention_flops

HALVES = (torch.float16, torch.bfloat16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", ops.__all__)
def test_each_operator_is_found_by_its_name(name: str) -> None:
    operator = getattr(ops, name)
    assert target_name(operator) == f"allaprima.ops.{name}"
    assert target_named(f"allaprima.ops.{name}") is operator
    assert operator.__doc__


# ---- against the plain operators -----------------------------------------------------------------------------------

X = randn(2, 12, 5, 7)
ROWS = randn(2, 5, 12)

CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
    "group_norm_silu": (
        lambda x, w, b: ops.group_norm_silu(x, 4, w, b, 1e-5),
        lambda x, w, b: F.silu(F.group_norm(x, 4, w, b, 1e-5)),
        (X, randn(12), randn(12, seed=1)),
    ),
    "group_norm_silu_cat": (
        lambda x, y, w, b: ops.group_norm_silu_cat([x, y], 3, w, b, 1e-5),
        lambda x, y, w, b: F.silu(F.group_norm(torch.cat([x, y], 1), 3, w, b, 1e-5)),
        (X[:, :5], X[:, 5:] * 3 + 1, randn(12), randn(12, seed=1)),
    ),
    "add_layer_norm": (
        lambda x, y, w, b: ops.add_layer_norm(x, y, w, b, 1e-5)[1],
        lambda x, y, w, b: F.layer_norm(x + y, (12,), w, b, 1e-5),
        (ROWS, randn(2, 5, 12, seed=1), randn(12), randn(12, seed=1)),
    ),
    "linear_add": (
        ops.linear_add,
        lambda x, w, b, y: F.linear(x, w, b) + y,
        (ROWS, randn(9, 12), randn(9), randn(2, 5, 9)),
    ),
    "geglu_linear": (
        ops.geglu_linear,
        lambda x, w, b: (lambda h, g: h * F.gelu(g))(*F.linear(x, w, b).chunk(2, -1)),
        (ROWS, randn(18, 12), randn(18)),
    ),
    "conv2d_add": (
        lambda x, w, b, y: ops.conv2d_add(x, w, b, y, [2, 1], [1, 1], [1, 1], 1),
        lambda x, w, b, y: F.conv2d(x, w, b, (2, 1), (1, 1)) + y,
        (X, randn(6, 12, 3, 3), randn(6), randn(1, 6, 1, 1)),
    ),
    "conv2d_cat": (
        lambda x, y, w, b: ops.conv2d_cat([x, y], w, b, [1, 1], [1, 1], [1, 1]),
        lambda x, y, w, b: F.conv2d(x, w[:, :5], b, padding=1) + F.conv2d(y, w[:, 5:], padding=1),
        (X[:, :5], X[:, 5:], randn(6, 12, 3, 3), randn(6)),
    ),
    "fold_batch_norm": (
        lambda x, w, b, mean, var: F.conv2d(x, *ops.fold_batch_norm(w, b, mean + 1, b, mean, var, 1e-3)),
        lambda x, w, b, mean, var: F.batch_norm(F.conv2d(x, w, b), mean, var, mean + 1, b, eps=1e-3),
        (X, randn(6, 12, 3, 3), randn(6), randn(6, seed=1), randn(6, seed=2) ** 2),
    ),
    "attention": (
        ops.attention,
        lambda q, k, v: torch.einsum(
            "bhnm,bmhe->bnhe", (torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5).softmax(-1), v
        ),
        (randn(2, 5, 3, 8), randn(2, 7, 3, 8), randn(2, 7, 3, 4)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_its_docstring_says(name: str) -> None:
    fused, plain, args = CASES[name]
    assert error(fused(*args), plain(*args)) < 1e-14


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_no_worse_than_the_plain_operators(name: str, dtype: torch.dtype) -> None:
    fused, plain, args = CASES[name]
    short = tuple(a.to(dtype) for a in args)
    truth = plain(*(a.double() for a in short))
    got = fused(*short)
    assert got.dtype == dtype
    assert error(got, truth) <= 2 * error(plain(*short), truth) + torch.finfo(dtype).eps / 2


def test_attention_takes_masks_scales_and_causality() -> None:
    q, k, v = randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1), randn(2, 5, 3, 8, seed=2)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    triangle = torch.ones(5, 5, dtype=torch.bool).tril()
    causal = ops.attention(q, k, v, scale=0.2, causal=True)
    assert error(ops.attention(q, k, v, triangle[None, None], 0.2), causal) < 1e-14
    plain = F.scaled_dot_product_attention(*heads_first, attn_mask=triangle, scale=0.2).transpose(1, 2)
    assert error(causal, plain) < 1e-14


def test_statistics_of_halves_are_kept_in_float32() -> None:
    """Around 100 000 the squares leave float16; the norm must not."""
    x = (randn(1, 4, 8, 8) * 10 + 3e4).half()
    weight, bias = torch.ones(4).half(), torch.zeros(4).half()
    truth = F.silu(F.group_norm(x.double(), 2))
    assert error(ops.group_norm_silu(x, 2, weight, bias, 1e-5), truth) < 1e-3


# ---- upsampling ----------------------------------------------------------------------------------------------------


def upsampled(
    height: int, width: int, lost: tuple[int, int], dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Any, ...]:
    x, weight = randn(2, 3, height, width).to(dtype), randn(4, 3, 3, 3).to(dtype)
    target = max(1, 2 * height - lost[0]), max(1, 2 * width - lost[1])
    return x, weight, ops.fold_upsample_weight(weight), randn(4).to(dtype) if bias else None, *target


@given(
    height=st.integers(1, 9), width=st.integers(1, 9),
    lost=st.tuples(st.integers(0, 1), st.integers(0, 1)), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_folded_upsampling_is_exact_for_all_four_parities(
    height: int, width: int, lost: tuple[int, int], bias: bool
) -> None:
    args = upsampled(height, width, lost, bias=bias)
    plain, folded = ops.upsample_conv(*args), ops.upsample_conv_folded(*args)
    assert plain.shape == folded.shape
    assert error(folded, plain) < 1e-14


def test_taps_are_folded_a_few_outputs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in float32 of all outputs together are several times as large as the result."""
    weight = randn(11, 5, 3, 3).half()
    whole = ops.fold_upsample_weight(weight)
    monkeypatch.setattr(upsampling, "_AT_ONCE", 4)
    with _Wide() as seen:
        folded = ops.fold_upsample_weight(weight)
    assert torch.equal(folded, whole)
    assert 0 < seen.most < whole.numel()


class _Wide(TorchDispatchMode):
    """The most elements of a result in float32."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.most = max(self.most, result.numel())
        return result


def test_without_a_size_the_picture_is_doubled() -> None:
    *args, height, width = upsampled(5, 6, (0, 0))
    for form in (ops.upsample_conv, ops.upsample_conv_folded):
        assert torch.equal(form(*args), form(*args, height, width))


@pytest.mark.parametrize("target", [(9, 12), (11, 15), (20, 5), (5, 6)])
def test_other_targets_take_the_plain_form(target: tuple[int, int]) -> None:
    *args, _, _ = upsampled(5, 6, (0, 0))
    if target == (9, 12):
        assert error(ops.upsample_conv_folded(*args, *target), ops.upsample_conv(*args, *target)) < 1e-14
    else:
        assert torch.equal(ops.upsample_conv_folded(*args, *target), ops.upsample_conv(*args, *target))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lost", [(0, 0), (1, 1)])
def test_folded_taps_in_half_precision_cost_about_one_rounding(dtype: torch.dtype, lost: tuple[int, int]) -> None:
    args = upsampled(8, 8, lost, dtype)
    truth = ops.upsample_conv(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert (
        error(ops.upsample_conv_folded(*args), truth)
        <= 2 * error(ops.upsample_conv(*args), truth) + torch.finfo(dtype).eps / 2
    )


def test_large_pictures_find_their_neighbours() -> None:
    """Nearest neighbours at 2n - 1 places are the doubled ones, as long as float32 can tell them apart."""
    for size in (255, 256, 1023, 2047):
        x = torch.arange(size, dtype=torch.float32).reshape(1, 1, 1, size)
        got = F.interpolate(x, size=(1, 2 * size - 1), mode="nearest")[0, 0, 0]
        assert torch.equal(got, x[0, 0, 0].repeat_interleave(2)[:-1])


# ---- costs ---------------------------------------------------------------------------------------------------------


def test_costs_count_multiplications_and_additions() -> None:
    assert linear_flops((2, 5, 12), (9, 12)) == 2 * 10 * 12 * 9
    assert conv2d_flops((6, 12, 3, 3), (2, 6, 5, 7)) == 2 * 2 * 6 * 5 * 7 * 12 * 9
    q, k, v = (torch.Size(s) for s in ((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 4)))
    assert attention_flops(q, k, v) == 2 * 2 * 3 * 5 * 7 * 12
