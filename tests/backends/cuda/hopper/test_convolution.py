"""Convolutions and products for Hopper: simulated with their barriers, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels.hopper import convolution as c
from allaprima.ops import convolution as reference
from allaprima.ops.linear import geglu_linear, linear_add

from ..kernels.conv_cases import check, nan_like, poisoned, tensors
from .gluon_simulation import run

H100 = next(d for d in KNOWN if d.name == "H100")
ALL = (*c.CONV_TILES, *c.SPLIT_CONV_TILES, *c.PRODUCT_TILES, *c.GATED_TILES)
HALF = torch.float16


def sampled(*tiles):
    """Parameters of a test: `make test` takes every third tile, `make prove` all."""
    return [pytest.param(t, id=t.name, marks=[pytest.mark.slow] if i % 3 else []) for i, t in enumerate(tiles)]


def conv(x, weight, bias, *addends):
    made = torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
    return sum(addends, made)


def make(problem, tile, out, monkeypatch, num_sms=2):
    assert isinstance(problem, c.Problem), problem
    assert c.refuses(problem, tile) is None
    names = {f.name for f in c.variants(problem.x.dtype)}
    for launch in c.launches_of(problem, tile, out, num_sms):
        if launch.variant.kernel is c.hopper_conv:
            assert launch.variant.name in names
            assert len(launch.arguments) == len(launch.variant.arguments)
            run(launch, c, monkeypatch)
        else:
            launch.run()
    return out


@pytest.mark.parametrize("tile", sampled(*c.CONV_TILES))
@pytest.mark.parametrize("residual", [False, True])
def test_each_tile(tile, residual, monkeypatch):
    # Odd sizes: patches, channels and steps are cut off; five or more units of work for two programs.
    x, weight, bias = tensors(2, 72, 19, 17, 168, HALF, "cpu")
    embedding = poisoned((2, 168, 1, 1), HALF, "cpu", seed=3)
    added = poisoned((2, 168, 19, 17), HALF, "cpu", seed=4) if residual else None
    out = nan_like((2, 168, 19, 17), HALF, "cpu")
    make(c.Problem(x, weight, bias, embedding, added), tile, out, monkeypatch)
    check(out, conv, x, weight, bias, embedding, *([added] if residual else []))


@pytest.mark.parametrize("tile", sampled(*c.SPLIT_CONV_TILES))
@pytest.mark.parametrize("splits", [2, 4])
def test_each_split_tile(tile, splits, monkeypatch):
    x, weight, bias = tensors(3, 72, 9, 10, 40, HALF, "cpu")
    added = poisoned((3, 40, 9, 10), HALF, "cpu", seed=4)
    out = nan_like((3, 40, 9, 10), HALF, "cpu")
    problem = c.problem_of(x, weight, bias, added)
    make(problem, replace(tile, splits=splits), out, monkeypatch, num_sms=5)
    check(out, conv, x, weight, bias, added)


@pytest.mark.parametrize("tile", sampled(*c.PRODUCT_TILES))
@pytest.mark.parametrize("residual", [False, True])
def test_each_product(tile, residual, monkeypatch):
    # Seven steps: more than are held at a time.
    x, weight, bias, added = matrices(2, 150, 424, 168)
    out = torch.full((2, 150, 168), float("nan"), dtype=HALF)
    added = added if residual else None
    make(c.product_of(x, weight, bias, added), tile, c.rows_of(out), monkeypatch)
    check(out, linear_add, x, weight, bias, torch.zeros(1, dtype=HALF) if added is None else added)


@pytest.mark.parametrize("tile", sampled(*c.GATED_TILES))
def test_each_gated_product(tile, monkeypatch):
    x, weight, bias, _ = matrices(1, 300, 200, 2 * 136)
    out = torch.full((1, 300, 136), float("nan"), dtype=HALF)
    make(c.product_of(x, weight, bias, gated=True), tile, c.rows_of(out), monkeypatch)
    check(out, geglu_linear, x, weight, bias)


def test_many_tiles_of_few_steps(monkeypatch):
    """The next residual must not come before the last result has left."""
    x, weight, bias, added = matrices(1, 1500, 64, 136)
    out = torch.full((1, 1500, 136), float("nan"), dtype=HALF)
    for tile in (c.PRODUCT_TILES[0], c.PRODUCT_TILES[2]):
        make(c.product_of(x, weight, bias, added), tile, c.rows_of(out.fill_(float("nan"))), monkeypatch)
        check(out, linear_add, x, weight, bias, added)


def matrices(batch, rows, k, n):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        wide = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), dtype=HALF)
        wide[..., : shape[-1]] = torch.randn(shape, generator=generator)
        return wide[..., : shape[-1]]

    return random(batch, rows, k), random(n, k) * k**-0.5, random(n), random(batch, rows, n)


@pytest.mark.parametrize("addend", [None, (1, 16, 1, 1), (3, 16, 1, 1), (1, 16, 4, 5), (3, 16, 4, 5)])
def test_addends(addend, monkeypatch):
    x, weight, bias = tensors(3, 16, 4, 5, 16, HALF, "cpu")
    added = None if addend is None else poisoned(addend, HALF, "cpu", seed=3)
    out = nan_like((3, 16, 4, 5), HALF, "cpu")
    make(c.problem_of(x, weight, bias, added), c.CONV_TILES[0], out, monkeypatch)
    check(out, conv, x, weight, bias, *([] if added is None else [added]))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 64, 1, 9), (1, 136, 40, 1)])
def test_thin_pictures(shape, monkeypatch):
    x, weight, _ = tensors(*shape, 8, HALF, "cpu")
    out = nan_like((shape[0], 8, *shape[2:]), HALF, "cpu")
    for tile in (c.CONV_TILES[0], replace(c.SPLIT_CONV_TILES[0], splits=3)):
        make(c.problem_of(x, weight, None), tile, out.fill_(float("nan")), monkeypatch)
        check(out, conv, x, weight, None)


def test_a_slice_of_channels_and_of_the_weight(monkeypatch):
    x, weight, bias = tensors(2, 48, 6, 7, 24, torch.bfloat16, "cpu")
    x, weight = x[:, 16:40], weight[:, 8:32]
    out = nan_like((2, 24, 6, 7), torch.bfloat16, "cpu")
    make(c.problem_of(x, weight, bias), c.CONV_TILES[2], out, monkeypatch)
    check(out, conv, x, weight, bias)


def test_pointwise(monkeypatch):
    x, weight, bias = tensors(2, 40, 6, 7, 24, HALF, "cpu", (1, 1))
    added = poisoned((2, 24, 6, 7), HALF, "cpu", seed=4)
    out = nan_like((2, 24, 6, 7), HALF, "cpu")
    make(c.problem_of(x, weight, bias, added), c.PRODUCT_TILES[2], c.flat_pixels(out), monkeypatch)
    check(out, conv, x, weight, bias, added)
    assert reference.conv2d_add is not None


def test_tiles_fit_the_gpu():
    assert all(t.shared_bytes(t in c.GATED_TILES) <= H100.shared_bytes for t in ALL)
    assert all(2 * t.shared_bytes(t in c.GATED_TILES) <= 227 << 10 for t in ALL if t.shared)
    assert all(t.taps == 1 or t.images * t.columns % 8 == 0 for t in ALL)
