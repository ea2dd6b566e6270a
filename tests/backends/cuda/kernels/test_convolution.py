"""Convolutions: every tile, split sums, epilogues, several sources, few channels, against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels import convolution as c
from allaprima.backends.cuda.kernels.few_channels import FLATS, PATCHES
from allaprima.errors import InputError
from allaprima.ops import convolution as reference

from .conv_cases import check, check_launch, interpreted_bfloat16, nan_like, poisoned, tensors

HALF, FLOAT = c.HALF_TILES[-1], c.FLOAT_TILES[-1]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
__all__ = ["interpreted_bfloat16"]
A100, A10, H100 = (next(d for d in KNOWN if d.name == name) for name in ("A100", "A10", "H100"))


def conv(x, weight, bias, stride=(1, 1), padding=(1, 1)):
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding)


def conv_add(x, weight, bias, addend, stride=(1, 1), padding=(1, 1)):
    return reference.conv2d_add(x, weight, bias, addend, stride, padding, (1, 1), 1)


def conv_cat(sources, weight, bias, stride=(1, 1), padding=(1, 1)):
    return reference.conv2d_cat(sources, weight, bias, stride, padding, (1, 1))


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [(t, torch.float16) for t in c.HALF_TILES]
    + [(t, torch.float32) for t in c.FLOAT_TILES]
    + [(HALF, torch.bfloat16), (c.HALF_TILES[2], torch.bfloat16)],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_each_tile(tile, dtype, device):
    x, weight, bias = tensors(2, 24, 5, 7, 40, dtype, device, (2, 2))
    addend = poisoned((2, 40, 6, 8), dtype, device, seed=3)
    for splits in (1, 2):
        out = nan_like((2, 40, 6, 8), dtype, device)
        chosen = dataclasses.replace(tile, splits=splits)
        if c.refuses_parts(chosen):
            with pytest.raises(InputError, match="whole sums"):
                c.conv2d(x, weight, bias, padding=(1, 1), parameters=chosen)
            continue
        got = c.conv2d_add(x, weight, bias, addend, (1, 1), (1, 1), (1, 1), 1, parameters=chosen, out=out)
        assert got is out
        check(got, conv_add, x, weight, bias, addend)


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding"),
    [
        ((1, 8, 1, 1), 8, (3, 3), (1, 1), (1, 1)),
        ((3, 72, 3, 5), 8, (3, 3), (1, 1), (1, 1)),
        ((1, 136, 1, 9), 72, (3, 3), (1, 1), (1, 1)),
        ((2, 16, 7, 6), 24, (3, 3), (2, 2), (1, 1)),
        ((1, 16, 9, 1), 16, (3, 3), (2, 1), (1, 0)),
        ((1, 16, 8, 8), 16, (3, 3), (2, 2), (0, 0)),
        ((1, 16, 4, 3), 16, (2, 2), (1, 1), (1, 1)),
        ((1, 16, 6, 5), 16, (1, 1), (1, 1), (0, 0)),
        ((1, 8, 6, 5), 8, (1, 5), (1, 1), (3, 2)),
        ((65, 8, 1, 2), 8, (3, 3), (1, 1), (1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sizes(shape, outputs, kernel, stride, padding, dtype, device):
    if kernel == (3, 3) and padding == (1, 0):
        shape = (*shape[:3], 3)
    x, weight, bias = tensors(*shape, outputs, dtype, device, kernel)
    parameters = HALF if dtype == torch.float16 else FLOAT
    got = c.conv2d(x, weight, bias, stride, padding, parameters=parameters)
    assert got.is_contiguous(memory_format=torch.channels_last)
    check(got, conv, x, weight, bias, stride, padding)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("addend", [(1, 16, 1, 1), (3, 16, 1, 1), (1, 16, 4, 5), (3, 16, 4, 5)])
def test_addends(addend, splits, device):
    x, weight, _ = tensors(3, 16, 4, 5, 16, torch.float16, device)
    added = poisoned(addend, torch.float16, device, seed=3)
    tile = dataclasses.replace(HALF, splits=splits)
    got = c.conv2d_add(x, weight, None, added, (1, 1), (1, 1), (1, 1), 1, parameters=tile)
    check(got, conv_add, x, weight, None, added)


def test_an_embedding_is_a_residual_of_a_picture_of_one_pixel(device):
    x, weight, bias = tensors(2, 16, 1, 1, 16, torch.float16, device)
    added = poisoned((2, 16, 1, 1), torch.float16, device, seed=3)
    for parameters in (HALF, c.Library()):
        got = c.conv2d_add(x, weight, bias, added, (1, 1), (1, 1), (1, 1), 1, parameters=parameters)
        check(got, conv_add, x, weight, bias, added)


def test_the_addend_may_be_the_result(device):
    x, weight, bias = tensors(1, 16, 4, 5, 16, torch.float16, device)
    out = nan_like((1, 16, 4, 5), torch.float16, device).normal_()
    before = out.clone()
    c.conv2d_add(x, weight, bias, out, (1, 1), (1, 1), (1, 1), 1, parameters=HALF, out=out)
    check(out, conv_add, x, weight, bias, before)


def test_split_sums_are_the_same_every_time(device):
    x, weight, bias = tensors(1, 72, 3, 2, 16, torch.float16, device)
    # 18 steps in 16 parts of 2: the last parts are empty.
    tile = dataclasses.replace(HALF, splits=16)
    first, second = (c.conv2d(x, weight, bias, padding=(1, 1), parameters=tile) for _ in range(2))
    assert torch.equal(first, second)
    check(first, conv, x, weight, bias)


@pytest.mark.parametrize("channels", [(16, 24), (8, 72, 16)])
@pytest.mark.parametrize("splits", [1, 2])
def test_several_sources(channels, splits, device):
    dtype = torch.float16
    sources = tuple(poisoned((2, n, 4, 3), dtype, device, seed=n) for n in channels)
    _, weight, bias = tensors(1, sum(channels), 1, 1, 24, dtype, device)
    out = nan_like((2, 24, 4, 3), dtype, device)
    tile = dataclasses.replace(HALF, splits=splits)
    for parameters in (tile, c.Library()):
        got = c.conv2d_cat(sources, weight, bias, (1, 1), (1, 1), (1, 1), parameters=parameters, out=out.clone())
        check(got, conv_cat, sources, weight, bias)


@pytest.mark.parametrize("addend", [(1, 24, 1, 1), (2, 24, 5, 7), (2, 24, 1, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_library_with_an_addend(addend, dtype, device):
    x, weight, bias = tensors(2, 16, 5, 7, 24, dtype, device)
    added = poisoned(addend, dtype, device, seed=3)
    got = c.conv2d_add(x, weight, bias, added, (1, 1), (1, 1), (1, 1), 1, parameters=c.Library())
    check(got, conv_add, x, weight, bias, added)


def far_apart(shape, device):
    """Three images 2³⁰ + 8 elements apart: the memory between them is asked for and never touched."""
    _, channels, height, width = shape
    try:
        storage = torch.empty(2**31 + 16 + height * width * channels, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had")
    view = storage.as_strided(shape, (2**30 + 8, 1, width * channels, channels))
    return view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(4)).half())


def test_offsets_beyond_31_bits(device):
    x = far_apart((3, 16, 2, 3), device)
    near = x.contiguous(memory_format=torch.channels_last)
    _, weight, bias = tensors(1, 16, 1, 1, 16, torch.float16, device)
    dense = weight.contiguous(memory_format=torch.channels_last)
    for parameters in (HALF, dataclasses.replace(HALF, splits=2), FLATS[0]):
        got = c.conv2d_add(x, dense, bias, x, (1, 1), (1, 1), (1, 1), 1, parameters=parameters)
        check(got, conv_add, near, dense, bias, near)
    got = c.conv2d(x, weight[:4], None, padding=(1, 1), parameters=PATCHES[0])
    check(got, conv, near, weight[:4], None)


@pytest.mark.parametrize("flat", FLATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_few_channels(flat, dtype, device):
    x, weight, bias = tensors(2, 4, 5, 7, 40, dtype, device)
    weight = weight.contiguous(memory_format=torch.channels_last)
    addend = poisoned((2, 40, 1, 1), dtype, device, seed=3)
    for layout in (x, x.contiguous()):
        out = nan_like((2, 40, 5, 7), dtype, device)
        got = c.conv2d_add(layout, weight, bias, addend, (1, 1), (1, 1), (1, 1), 1, parameters=flat, out=out)
        check(got, conv_add, layout, weight, bias, addend)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding"),
    [(3, 7, (3, 3), (2, 2), (1, 1)), (1, 1, (3, 3), (1, 1), (1, 1)), (19, 12, (2, 3), (1, 2), (0, 1))],
)
def test_any_number_of_channels(channels, outputs, kernel, stride, padding, device):
    x, weight, bias = tensors(2, channels, 5, 6, outputs, torch.float16, device, kernel)
    weight = weight.contiguous(memory_format=torch.channels_last)
    got = c.conv2d(x, weight, bias, stride, padding, parameters=FLATS[0])
    check(got, conv, x, weight, bias, stride, padding)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 72, 15, 13), (1, 16, 7, 31)])
@pytest.mark.parametrize(("outputs", "dtype"), [(4, torch.float16), (3, torch.bfloat16), (1, torch.float32)])
def test_to_few_channels(patch, shape, outputs, dtype, device):
    x, weight, bias = tensors(*shape, outputs, dtype, device)
    out = nan_like((shape[0], outputs, *shape[2:]), dtype, device)
    check(c.conv2d(x, weight, bias, padding=(1, 1), parameters=patch, out=out), conv, x, weight, bias)
    check(c.conv2d(x, weight, None, padding=(1, 1), parameters=patch), conv, x, weight, None)


def reason(parameters, *, channels=16, outputs=16, dtype=torch.float16, **changes):
    x, weight, bias = tensors(1, channels, 4, 5, outputs, dtype, "cpu")
    given = dict(
        sources=(x,), weight=weight, bias=bias, addend=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1
    )
    return c.supports(**given | changes, parameters=parameters)


def test_what_is_not_supported_says_why():
    x = torch.zeros(1, 16, 4, 5, dtype=torch.float16)
    assert reason(HALF) is None
    assert "dilation" in reason(HALF, dilation=(2, 2))
    assert "multiple of 8" in reason(HALF, channels=12)
    assert "multiple of 8" in reason(HALF, outputs=12)
    assert "channels-last" in reason(HALF, sources=(x,))
    assert "dtypes" in reason(HALF, sources=(x.float(),))
    assert "addend" in reason(HALF, addend=torch.zeros(1, 16, 1, 5, dtype=torch.float16))
    assert "16 bytes" in reason(HALF, bias=torch.zeros(17, dtype=torch.float16)[1:])
    assert "slice" in reason(FLATS[0])
    assert "multiples of 8" in reason(HALF, sources=(poisoned((1, 16, 4, 5), torch.float16, "cpu", beside=4),))
    large = torch.empty(1, 16, 12000, 12000, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    for parameters in (HALF, FLATS[0]):
        weight = torch.zeros(16, 3, 3, 16).permute(0, 3, 1, 2).half()
        assert "2³¹" in reason(parameters, sources=(large,), weight=weight)
    assert "2³¹" in reason(PATCHES[0], sources=(large,), weight=weight[:4], bias=None)
    assert "3×3" in reason(PATCHES[0])
    assert "several" in reason(PATCHES[0], sources=(x, x))
    assert reason(c.Library(), sources=(x.float(),), dilation=(2, 2)) is None
    with pytest.raises(InputError, match="channels-last"):
        c.conv2d(x, torch.zeros(16, 16, 3, 3).half(), padding=(1, 1), parameters=HALF)
    with pytest.raises(InputError, match="out"):
        c.result(torch.zeros(1, 16, 4, 4), (1, 16, 4, 5), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_was_compiled(dtype):
    x, weight, bias = tensors(1, 16, 4, 5, 16, dtype, "cpu")
    out = nan_like((1, 16, 4, 5), dtype, "cpu")
    for tile in c.tiles(dtype.itemsize):
        for splits in (1, 4):
            chosen = dataclasses.replace(tile, splits=splits)
            if c.refuses_parts(chosen):
                continue
            launches = c.launches_of((x,), weight, bias, x, (1, 1), (1, 1), out, chosen)
            assert len(launches) == (1 if splits == 1 else 2)
            for launch in launches:
                check_launch(launch, c.variants(dtype))
    for outputs, parameters in ((16, FLATS), (3, FLATS), (3, PATCHES)):
        made = nan_like((1, outputs, 4, 5), dtype, "cpu")
        for chosen in parameters:
            for launch in c.launches_of((x,), weight[:outputs], bias[:outputs], None, (1, 1), (1, 1), made, chosen):
                check_launch(launch, c.variants(dtype))
    check_launch(c.finish_launch(out, None, x, out), c.variants(dtype))


SHAPES = [
    c.Shape(batch, channels, size, size, outputs, stride=stride)
    for batch in (1, 2, 16)
    for channels, size, outputs, stride in [
        (4, 64, 320, (1, 1)),
        (320, 64, 320, (1, 1)),
        (320, 64, 320, (2, 2)),
        (1280, 8, 1280, (1, 1)),
        (128, 512, 3, (1, 1)),
        (96, 9, 64, (1, 1)),
    ]
]


@pytest.mark.parametrize("device_", KNOWN, ids=lambda d: d.name)
def test_candidates_fit_and_are_estimated(device_):
    for shape in SHAPES:
        found = c.candidates(shape, 2, device_)
        assert c.Library() in found
        assert 1 < len(found) < 80
        for parameters in found:
            if isinstance(parameters, c.Tile):
                assert parameters.shared_bytes(2, device_.arch) <= device_.shared_bytes
            time = c.estimate_us(shape, 2, parameters, device_)
            assert 2.5 < time < 1e5
            larger = dataclasses.replace(shape, batch=4 * shape.batch)
            assert c.estimate_us(larger, 2, parameters, device_) >= time
            assert c.estimate_us(shape, 2, parameters, device_, addend=True) >= time


def test_small_pictures_split_the_sum():
    shape = c.Shape(2, 1280, 8, 8, 1280)
    for device_ in (A100, H100):
        best = min(c.candidates(shape, 2, device_), key=lambda p: c.estimate_us(shape, 2, p, device_))
        assert isinstance(best, c.Tile)
        assert best.splits > 1
    assert any(isinstance(p, c.Tile) for p in c.candidates(c.Shape(2, 1280, 8, 8, 1280), 2, A10))


def test_what_fits_a_multiprocessor():
    wide = next(t for t in c.HALF_TILES if t.n + t.more == 320)
    assert c.holds(wide, 2, H100)
    assert not c.holds(wide, 2, A100), "before Hopper the operands need registers too"
    limited = next(t for t in c.HALF_TILES if t.registers)
    assert c.resident(limited, 2, H100) == 2
    assert c.resident(dataclasses.replace(limited, registers=None), 2, H100) == 1
    assert c.step_times(wide, 2, H100)[0] < 2.5 * c.step_times(limited, 2, H100)[0], "fewer bytes for each product"


def test_few_channels_have_their_own_kernels():
    for shape, kinds in (
        (c.Shape(2, 4, 64, 64, 320), FLATS),
        (c.Shape(2, 320, 64, 64, 4), PATCHES),
        (c.Shape(1, 128, 512, 512, 3), PATCHES),
    ):
        best = min(c.candidates(shape, 2, H100), key=lambda p: c.estimate_us(shape, 2, p, H100))
        assert best in kinds
