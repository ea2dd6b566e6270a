"""Upsampling in both forms, on the grid and off it, against the plain reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels import convolution as c
from allaprima.backends.cuda.kernels import upsampling as u
from allaprima.errors import InputError
from allaprima.ops import upsampling as reference

from .conv_cases import check_launch, interpreted_bfloat16, nan_like, poisoned, tensors

__all__ = ["interpreted_bfloat16"]
HALF, FLOAT = c.HALF_TILES[-1], c.FLOAT_TILES[-1]
H100 = next(d for d in KNOWN if d.name == "H100")
LOST = [(0, 0), (1, 0), (0, 1), (1, 1)]


def make(shape, outputs, dtype, device):
    """x, weight, folded, bias; both weights are slices of wider ones, with NaN between their channels."""
    x, weight, bias = tensors(*shape, outputs, dtype, device)
    folded = poisoned((4 * outputs, shape[1], 2, 2), dtype, device)
    return x, weight, folded.copy_(reference.fold_upsample_weight(weight)), bias


def check(got, x, weight, folded, bias, size, use_folded=True):
    """|got - truth| ≤ 2 × the largest error of eager in that form and dtype + one rounding."""
    wide = [None if t is None else t.double() for t in (x, weight, None, bias)]
    truth = reference.upsample_conv(*wide, *size)
    call = reference.upsample_conv_folded if use_folded else reference.upsample_conv
    eager = (call(x, weight, folded, bias, *size).double() - truth).abs().max()
    assert tuple(got.shape[2:]) == size
    assert got.isfinite().all()
    error = (got.double() - truth).abs()
    assert (error <= 2 * eager + torch.finfo(got.dtype).eps * truth.abs()).all(), (error.max().item(), eager.item())


@pytest.mark.parametrize(
    ("shape", "splits", "lost"),
    [((2, 16, 2, 3), 1, lost) for lost in LOST]
    + [((1, 8, 1, 1), 1, lost) for lost in LOST]
    + [((1, 72, 2, 1), 3, (1, 1)), ((1, 8, 1, 2), 3, (0, 0))],
)
@pytest.mark.parametrize("folded", [True, False])
def test_sizes(shape, splits, folded, lost, device):
    given = make(shape, 24, torch.float16, device)
    size = 2 * shape[2] - lost[0], 2 * shape[3] - lost[1]
    parameters = u.Upsample(dataclasses.replace(HALF, splits=splits), folded)
    out = nan_like((shape[0], 24, *size), torch.float16, device)
    got = u.upsample_conv(*given, *size, parameters=parameters, out=out)
    assert got is out
    check(got, *given, size, folded)


@pytest.mark.parametrize(
    ("tile", "dtype", "folded"),
    [(t, torch.float16, i % 2 == 0) for i, t in enumerate(c.HALF_TILES)]
    + [(t, torch.float32, i % 2 == 0) for i, t in enumerate(c.FLOAT_TILES)]
    + [(HALF, torch.bfloat16, True), (HALF, torch.bfloat16, False)],
)
def test_each_tile(tile, dtype, folded, device):
    given = make((1, 8, 3, 2), 16, dtype, device)
    got = u.upsample_conv_folded(*given, 5, None, parameters=u.Upsample(tile, folded))
    check(got, *given, (5, 4), folded)


def test_more_positions_than_one_tile(device):
    given = make((2, 8, 5, 9), 8, torch.float16, device)
    got = u.upsample_conv(*given, 9, 17, parameters=u.Upsample(HALF, True))
    check(got, *given, (9, 17))
    got = u.upsample_conv(*given[:2], None, None, 9, 17, parameters=u.Upsample(HALF, False))
    check(got, *given[:3], None, (9, 17), False)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (6, 7), (9, 3)])
def test_library(folded, size, device):
    given = make((1, 8, 3, 4), 16, torch.float16, device)
    out = nan_like((1, 16, *size), torch.float16, device)
    got = u.upsample_conv(*given, *size, parameters=u.UpsampleLibrary(folded), out=out)
    check(got, *given, size, folded)
    fresh = u.upsample_conv(*given, *size, parameters=u.UpsampleLibrary(folded))
    assert fresh.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fresh, got)


def test_what_is_not_supported_says_why():
    x, weight, folded, bias = make((1, 16, 3, 4), 16, torch.float16, "cpu")
    ours = u.Upsample(HALF, True)
    assert u.supports(x, weight, folded, bias, 6, 7, ours) is None
    assert "2·n" in (u.supports(x, weight, folded, bias, 7, 8, ours) or "")
    assert "2·n" in (u.supports(x, weight, folded, bias, 4, 8, ours) or "")
    assert "missing" in (u.supports(x, weight, None, bias, 6, 8, ours) or "")
    assert u.supports(x, weight, None, bias, 6, 8, u.Upsample(HALF, False)) is None
    assert "channels-last" in (u.supports(x.contiguous(), weight, folded, bias, 6, 8, ours) or "")
    assert "channels-last" in (u.supports(x, weight.contiguous(), folded, bias, 6, 8, ours) or "")
    assert "3×3" in (u.supports(x, weight[:, :8], folded, bias, 6, 8, ours) or "")
    assert u.supports(x, weight, folded, bias, 7, 9, u.UpsampleLibrary(True)) is None
    with pytest.raises(InputError, match="2·n"):
        u.upsample_conv(x, weight, folded, bias, 7, 8, parameters=ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_launched_was_compiled(dtype):
    x, weight, folded, bias = make((1, 16, 3, 4), 16, dtype, "cpu")
    out = nan_like((1, 16, 6, 7), dtype, "cpu")
    for tile in c.tiles(dtype.itemsize):
        for splits in (1, 2):
            if c.refuses_parts(dataclasses.replace(tile, splits=splits)):
                continue
            for form in (True, False):
                chosen = u.Upsample(dataclasses.replace(tile, splits=splits), form)
                for launch in u.launches_of(x, weight, folded, bias, out, chosen):
                    check_launch(launch, u.variants(dtype))


@pytest.mark.parametrize("device_", KNOWN, ids=lambda d: d.name)
def test_candidates_are_estimated(device_):
    for channels, size in ((1280, 8), (640, 32), (512, 128)):
        shape = u.Shape(1, channels, size, size, channels, 2 * size, 2 * size)
        found = u.candidates(shape, 2, device_)
        assert {type(p) for p in found} == {u.Upsample, u.UpsampleLibrary}
        assert len(found) < 120
        for parameters in found:
            time = u.estimate_us(shape, 2, parameters, device_)
            assert 2.5 < time < 1e5
            assert u.estimate_us(dataclasses.replace(shape, batch=4), 2, parameters, device_) >= time
    assert all(
        isinstance(p, u.UpsampleLibrary) and not p.folded
        for p in u.candidates(u.Shape(1, 64, 8, 8, 64, 20, 16), 2, device_)
    )


def test_large_pictures_are_folded():
    shape = u.Shape(1, 512, 128, 128, 512, 256, 256)
    best = min(u.candidates(shape, 2, H100), key=lambda p: u.estimate_us(shape, 2, p, H100))
    assert best.folded
