"""The algebra of adapters against its equations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allaprima.weights.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Scaled
from allaprima.weights.loras import full_precision, total

SIZES = st.integers(1, 7)
EPS = torch.finfo(torch.float32).eps


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def within_rounding(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, terms: int) -> None:
    """`size` is the sum of the terms' absolute values: each of them and each addition rounds once."""
    assert got.dtype == torch.float32
    assert ((got.double() - wanted).abs() <= (terms + 4) * EPS * size).all()


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.sampled_from([(), (1, 1), (3, 3)]), st.floats(-3, 3, width=32))
def test_low_rank(rows: int, columns: int, rank: int, kernel: tuple[int, ...], strength: float) -> None:
    base, down, up = random(rows, columns, *kernel), random(rank, columns, *kernel, seed=1), random(rows, rank, seed=2)
    delta = LowRank(down, up, scale=0.5)
    product = (up.double() @ down.double().flatten(1)).reshape(base.shape)
    size = base.double().abs() + abs(strength) * 0.5 * (up.abs().double() @ down.abs().double().flatten(1)).view_as(
        base
    )
    got = total(base, [(delta, strength)], base.device)
    within_rounding(got, base.double() + strength * 0.5 * product, size, rank)
    assert delta.shape == base.shape
    assert delta.fits(base.shape)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, SIZES)
def test_cores_are_products_along_both_axes(rows: int, columns: int, rank: int) -> None:
    core, up, down = random(rank, rank, 3, 2), random(rows, rank, 1, 1, seed=1), random(rank, columns, 1, 1, seed=2)
    wanted = torch.zeros(rows, columns, 3, 2, dtype=torch.float64)
    size = torch.zeros_like(wanted)
    for r in range(rank):
        for s in range(rank):
            outer = (
                up[:, r, 0, 0, None, None, None].double() * down[s, :, 0, 0, None, None].double() * core[r, s].double()
            )
            wanted, size = wanted + outer, size + outer.abs()
    got = LowRank(down, up, 1.0, core).of(torch.zeros(wanted.shape))
    within_rounding(got, wanted, size, 2 * rank)
    a, b = up[:, :, 0, 0].T.contiguous(), down[:, :, 0, 0]
    squared = Hadamard(a, b, a, b, 1.0, core, core)
    assert squared.shape == got.shape
    within_rounding(squared.of(got), wanted**2, size**2, 4 * rank)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_kronecker(o1: int, i1: int, o2: int, i2: int, rank: int) -> None:
    left, a, b = random(o1, i1), random(o2, rank, seed=1), random(rank, i2, seed=2)
    delta = Kronecker((left,), (a, b), 2.0)
    wanted = 2 * torch.kron(left.double(), a.double() @ b.double())
    size = 2 * torch.kron(left.abs().double(), a.abs().double() @ b.abs().double())
    assert delta.shape == wanted.shape
    within_rounding(delta.of(torch.zeros(wanted.shape)), wanted, size, rank)


@pytest.mark.parametrize("axis", [0, 1])
def test_decomposed_goes_straight_from_the_weight_to_the_trained_one(axis: int) -> None:
    base, inner = random(5, 4, 3, 3), LowRank(random(2, 4, 3, 3), random(5, 2), 0.3)
    magnitude = 1 + random(base.shape[axis], seed=9).abs()
    delta = Decomposed(inner, magnitude, axis)
    trained = total(base, [(delta, 1.0)], base.device)
    others = [i for i in range(4) if i != axis]
    assert torch.allclose(torch.linalg.vector_norm(trained, dim=others), magnitude, rtol=16 * EPS, atol=0)
    half = total(base, [(delta, 0.5)], base.device)
    assert torch.allclose(half, (base + trained) / 2, rtol=0, atol=8 * EPS * float(trained.abs().max()))
    assert delta.fits(base.shape)
    assert not Decomposed(inner, magnitude[:-1], axis).fits(base.shape)


def test_a_row_of_zeros_stays_zeros() -> None:
    inner = LowRank(torch.zeros(1, 3), torch.zeros(2, 1), 1.0)
    base = torch.tensor([[0.0, 0, 0], [1, 2, 2]])
    merged = total(base, [(Decomposed(inner, torch.tensor([5.0, 6.0]), 0), 1.0)], base.device)
    assert torch.equal(merged, torch.tensor([[0.0, 0, 0], [2, 4, 4]]))


@pytest.mark.parametrize("axis", [0, 1])
def test_scaled_rows_and_columns(axis: int) -> None:
    base, factor = random(3, 2, 2, 2), random((3, 2)[axis], seed=1)
    sizes = [1] * 4
    sizes[axis] = -1
    got = total(base, [(Scaled(factor, axis), 0.5)], base.device)
    within_rounding(got, base.double() * (1 + 0.5 * factor.double().view(sizes)), base.double().abs() * 3, 1)
    assert Scaled(factor, axis).fits(base.shape)
    assert not Scaled(factor, 1 - axis).fits(base.shape)


def test_several_read_the_untouched_weight_and_not_each_others_work() -> None:
    base = random(4, 4)
    scaled, full = Scaled(torch.full((4,), 2.0), 0), Full(random(4, 4, seed=3))
    one, other = ([(full, 1.0), (scaled, 1.0)], [(scaled, 1.0), (full, 1.0)])
    assert torch.allclose(total(base, one, base.device), total(base, other, base.device), rtol=8 * EPS)
    untouched = base.clone()
    total(base, one[1:], base.device)
    assert torch.equal(base, untouched), "the base is no place to compute in"


@pytest.mark.parametrize(
    ("delta", "weight", "fits"),
    [
        (Full(torch.ones(4, 3)), (4, 3, 1, 1), True),
        (Full(torch.ones(4, 3, 1, 1)), (4, 3), True),
        (Full(torch.ones(4, 27)), (4, 3, 3, 3), True),
        (Full(torch.ones(4, 1)), (4,), True),
        (Full(torch.ones(3, 4)), (4, 3), False),
        (Full(torch.ones(4, 3, 3, 3)), (4, 3), False),
        (Full(torch.ones(1, 4, 3)), (4, 3), False),
        (LowRank(torch.ones(2, 768), torch.ones(320, 2), 1.0), (320, 2048), False),
        (Hadamard(*[torch.ones(4, 2), torch.ones(2, 27)] * 2, 1.0), (4, 3, 3, 3), True),
    ],
)
def test_what_fits(delta: Delta, weight: tuple[int, ...], fits: bool) -> None:
    assert delta.fits(torch.Size(weight)) is fits


def test_products_are_exact_whatever_pictures_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    places: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with full_precision():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == ["bf16", "tf32"]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
