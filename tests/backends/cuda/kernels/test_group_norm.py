"""GroupNorm against float64, beside eager, in every form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from allaprima.backends.cuda.device import KNOWN, Device
from allaprima.backends.cuda.kernels import group_norm as kernels
from allaprima.errors import InputError

from .norm_cases import DTYPES, assert_no_worse, channels_last_in_nan

HELD = next(p for p in kernels.HELD if p.cols == 64 and p.pixels >= 256)
SMALL, LARGE, NARROW = kernels.WHOLE[0], kernels.SPLIT[0], kernels.SPLIT[1]
MANY_PARTS = dataclasses.replace(NARROW, unroll=1, programs=1000)
"""So many that they are merged by a kernel between."""

EPS = 1e-5

# numpy, which interprets the kernels, warns of infinities: of exp at its limit, and in lanes that are never stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SHAPES = [
    ((2, 40, 3, 5), 4),  # ten channels a group, four groups begin together at a multiple of eight
    ((1, 64, 9, 8), 32),  # two channels a group
    ((2, 64, 65), 2),
    ((1, 24, 1, 1), 3),
    ((3, 7, 3, 1), 7),  # nothing is a multiple of eight
    ((1, 10, 1, 67), 2),
    ((1, 16), 4),
]


def numbers(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (2 * made + 0.5).to(device, dtype)


def truth_of(
    sources: Sequence[torch.Tensor],
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    x = torch.cat([s.to(dtype) for s in sources], 1)
    normal = F.group_norm(x, groups, *(None if v is None else v.to(dtype) for v in (weight, bias)), EPS)
    return F.silu(normal) if silu else normal


def check(sources: Sequence[torch.Tensor], groups: int, silu: bool, parameters: kernels.Parameters) -> None:
    """Inputs and result lie in NaN; what is around the result stays so."""
    x = sources[0]
    channels = sum(s.shape[1] for s in sources)
    weight, bias = (numbers(x.device, x.dtype, channels, seed=s) for s in (1, 2))
    given = [channels_last_in_nan(s) for s in sources]
    out = channels_last_in_nan(torch.full((x.shape[0], channels, *x.shape[2:]), float("nan")).to(x))
    if len(given) == 2:
        got = kernels.group_norm_silu_cat(given, groups, weight, bias, EPS, parameters=parameters, out=out)
    else:
        call = kernels.group_norm_silu if silu else kernels.group_norm
        got = call(given[0], groups, weight, bias, EPS, parameters=parameters, out=out)
    assert got is out
    truth = truth_of(sources, groups, weight, bias, silu)
    assert_no_worse(got, truth, truth_of(sources, groups, weight, bias, silu, x.dtype))
    num_all = out.untyped_storage().nbytes() // out.itemsize
    assert int(out.as_strided((num_all,), (1,), 0).isnan().sum()) == num_all - out.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("parameters", [HELD, SMALL, NARROW], ids=repr)
def test_types(device: torch.device, dtype: torch.dtype, silu: bool, parameters: kernels.Parameters) -> None:
    channels = 80 if parameters is HELD else 20
    check([numbers(device, dtype, 2, channels, 3, 5)], 2, silu, parameters)


@pytest.mark.parametrize("parameters", [SMALL, NARROW], ids=repr)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_shapes(device: torch.device, parameters: kernels.Parameters, shape: tuple[int, ...], groups: int) -> None:
    check([numbers(device, torch.float16, *shape)], groups, True, parameters)


@pytest.mark.parametrize("parameters", kernels.PARAMETERS, ids=repr)
def test_every_form_to_its_limit(device: torch.device, parameters: kernels.Parameters) -> None:
    """All pixels that the registers hold; or more than two steps of the loops, and no multiple of anything."""
    if isinstance(parameters, kernels.Held):
        sizes = 2 * parameters.cols - 16, parameters.pixels
    else:
        sizes = 32, 2 * parameters.slots(parameters.cols) * parameters.unroll + 13
    if isinstance(parameters, kernels.Split):
        parameters = dataclasses.replace(parameters, programs=1)
    check([numbers(device, torch.float16, 1, sizes[0], 1, sizes[1])], 2, True, parameters)


@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_any_number_of_parts(device: torch.device, programs: int) -> None:
    parameters = dataclasses.replace(MANY_PARTS, programs=programs)
    check([numbers(device, torch.float32, 1, 40, 1100)], 4, True, parameters)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 40, 60, 128, 136])
@pytest.mark.parametrize("parameters", [HELD, SMALL, LARGE], ids=repr)
def test_any_width_of_groups(device: torch.device, parameters: kernels.Parameters, width: int) -> None:
    """A few that fill several programs, not evenly; what does not fit is refused or takes the general form."""
    groups = 10 if width > 32 else 40
    x = numbers(device, torch.float16, 2, groups * width, 19)
    if kernels.supports((channels_last_in_nan(x),), groups, None, None, parameters=parameters) is None:
        check([x], groups, False, parameters)


@pytest.mark.parametrize("parameters", [SMALL, LARGE], ids=repr)
@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [(64, 56, 4), (8, 112, 4), (40, 40, 2), (20, 40, 2), (1, 4, 1)],
)
def test_two_sources(
    device: torch.device, parameters: kernels.Parameters, first: int, second: int, groups: int
) -> None:
    """Groups of 30 channels straddle the border at 64, and one of 20 or 1 is no multiple of eight."""
    check([numbers(device, torch.float16, 2, c, 7, 3) for c in (first, second)], groups, True, parameters)


def test_a_held_group_may_straddle_two_sources(device: torch.device) -> None:
    check([numbers(device, torch.float16, 2, c, 7, 3) for c in (48, 72)], 3, True, HELD)


@pytest.mark.parametrize("parameters", [HELD, SMALL, LARGE], ids=repr)
def test_absent_weight_and_bias(device: torch.device, parameters: kernels.Parameters) -> None:
    x = numbers(device, torch.float32, 1, 96, 6, 5)
    weight, bias = numbers(device, torch.float32, 96, seed=1), numbers(device, torch.float32, 96, seed=2)
    for w, b in ((None, None), (weight, None), (None, bias)):
        got = kernels.group_norm(x.contiguous(memory_format=torch.channels_last), 2, w, b, EPS, parameters=parameters)
        assert_no_worse(got, truth_of([x], 2, w, b, False), truth_of([x], 2, w, b, False, x.dtype))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("parameters", [HELD, SMALL, LARGE], ids=repr)
def test_addend(device: torch.device, parameters: kernels.Parameters, rows: int) -> None:
    """The sum is not rounded, so that it is nearer to the truth than x + addend in half precision."""
    x = numbers(device, torch.float16, 2, 96, 6, 5)
    weight, bias = numbers(device, torch.float16, 96, seed=1), numbers(device, torch.float16, 96, seed=2)
    addend = 5 * numbers(device, torch.float16, rows, 112, seed=3)[:, 16:]
    got = kernels.group_norm_silu(
        x.contiguous(memory_format=torch.channels_last), 2, weight, bias, EPS, parameters=parameters, addend=addend
    )
    wide = x.double() + addend.double()[:, :, None, None]
    near = x + addend[:, :, None, None]
    truth = truth_of([wide], 2, weight, bias, True)
    assert_no_worse(got, truth, truth_of([near], 2, weight, bias, True, x.dtype))


@pytest.mark.parametrize("parameters", [HELD, SMALL, LARGE, MANY_PARTS], ids=repr)
def test_a_large_mean_does_not_cancel(device: torch.device, parameters: kernels.Parameters) -> None:
    """Spread 1 around 4,096, another mean in each channel: sums of squares in f32 would leave no digit."""
    channels, groups = (80, 2) if parameters is HELD else (16, 4)
    means = 4096 + 3 * torch.arange(channels, device=device)
    x = numbers(device, torch.float32, 1, channels, 28, 9) + means[None, :, None, None]
    x = x.contiguous(memory_format=torch.channels_last)
    got = kernels.group_norm(x, groups, None, None, EPS, parameters=parameters)
    assert_no_worse(got, truth_of([x], groups, None, None, False), truth_of([x], groups, None, None, False, x.dtype))


@pytest.mark.parametrize("parameters", [HELD, SMALL, LARGE], ids=repr)
@pytest.mark.parametrize("value", [0.0, -3.0, 60000.0])
def test_constant_input(device: torch.device, parameters: kernels.Parameters, value: float) -> None:
    x = torch.full((1, 80, 9, 9), value, dtype=torch.float16, device=device)
    bias = numbers(device, torch.float16, 80)
    got = kernels.group_norm(x.contiguous(memory_format=torch.channels_last), 2, None, bias, EPS, parameters=parameters)
    assert torch.equal(got, bias[None, :, None, None].expand_as(got))


@pytest.mark.parametrize("parameters", [*kernels.PARAMETERS, MANY_PARTS, *kernels.GENERAL], ids=repr)
def test_in_place(device: torch.device, parameters: kernels.Parameters) -> None:
    """Bit for bit what it is elsewhere, with several programs for images, groups and pixels, in the middle of NaN."""
    width = parameters.cols - 8 if isinstance(parameters, kernels.Held) else 20 if parameters.cols < 1024 else 132
    if parameters in kernels.GENERAL:
        width += 1
    x = channels_last_in_nan(numbers(device, torch.float16, 2, 6 * width, 7, 9))
    weight, bias = (numbers(device, torch.float16, 6 * width, seed=s) for s in (1, 2))
    expected = kernels.group_norm_silu(x, 6, weight, bias, EPS, parameters=parameters)
    assert kernels.group_norm_silu(x, 6, weight, bias, EPS, parameters=parameters, out=x) is x
    assert torch.equal(x, expected)
    num_all = x.untyped_storage().nbytes() // x.itemsize
    assert int(x.as_strided((num_all,), (1,), 0).isnan().sum()) == num_all - x.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", kernels.PARAMETERS, ids=repr)
def test_in_place_on_a_full_gpu(parameters: kernels.Parameters) -> None:
    """Many programs at once, none of which may see what another has written."""
    device = torch.device("cuda")
    width, groups = (parameters.cols, 256) if isinstance(parameters, kernels.Held) else (8, 32)
    rows = 8 if isinstance(parameters, kernels.Held) else 256
    x = numbers(device, torch.float16, 4, width * groups, rows, 8).contiguous(memory_format=torch.channels_last)
    weight, bias = (numbers(device, torch.float16, width * groups, seed=s) for s in (1, 2))
    for _ in range(5):
        expected = kernels.group_norm_silu(x, groups, weight, bias, EPS, parameters=parameters)
        kernels.group_norm_silu(x, groups, weight, bias, EPS, parameters=parameters, out=x)
        assert torch.equal(x, expected)


def test_a_result_lies_as_its_argument_does_where_that_is_whole(device: torch.device) -> None:
    x = numbers(device, torch.float16, 2, 32, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    assert kernels.is_laid_out(last)
    assert kernels.is_laid_out(last.flatten(2))
    for other in (x, last[:, :16], last[:, :, 1:], last[:, :, :, ::2]):
        assert not kernels.is_laid_out(other)


def test_far_from_zero_silu_is_its_limit(device: torch.device) -> None:
    x = numbers(device, torch.float32, 1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    for bias in (-200.0, 200.0):
        shift = torch.full((8,), bias, device=device)
        got = kernels.group_norm_silu(x, 1, None, shift, EPS, parameters=SMALL)
        assert_no_worse(got, truth_of([x], 1, None, shift, True), truth_of([x], 1, None, shift, True, x.dtype))


@pytest.mark.parametrize("parameters", [SMALL, LARGE], ids=repr)
@pytest.mark.parametrize("axis", ["image", "pixel"])
def test_offsets_beyond_two_to_the_31(device: torch.device, parameters: kernels.Whole, axis: str) -> None:
    """The tensor reaches over 4 GB, of which only a few pages are touched."""
    shape, strides = ((2, 16, 3), (2**31, 1, 16)) if axis == "image" else ((1, 16, 2050), (0, 1, 2**20))
    big = torch.empty(2**31 + 2**22, dtype=torch.float16, device=device)
    values = numbers(device, torch.float16, *shape)
    x = torch.as_strided(big, shape, strides).copy_(values)
    parameters = dataclasses.replace(parameters, unroll=8)
    got = kernels.group_norm(x, 4, None, None, EPS, parameters=parameters)
    assert_no_worse(got, truth_of([values], 4, None, None, False), truth_of([values], 4, None, None, False, x.dtype))


def test_the_result_is_channels_last_and_repeats_bit_by_bit(device: torch.device) -> None:
    x = numbers(device, torch.float16, 1, 160, 7, 11).contiguous(memory_format=torch.channels_last)
    for parameters in (HELD, SMALL, LARGE):
        first, second = (kernels.group_norm(x, 4, parameters=parameters) for _ in range(2))
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(first, second)
    flat = kernels.group_norm(x.flatten(2), 4, parameters=LARGE)
    assert flat.stride() == (160 * 77, 1, 160)
    assert torch.equal(flat, first.flatten(2))
    assert kernels.group_norm(x[:0], 4, parameters=LARGE).shape == (0, 160, 7, 11)


def test_what_is_not_supported_has_a_reason(device: torch.device) -> None:
    x = torch.zeros(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(17, device=device)

    def reason(*sources: torch.Tensor, groups: int = 2, parameters: kernels.Parameters = SMALL, **given: object) -> str:
        vectors = [given.pop(name, None) for name in ("weight", "bias")]
        return kernels.supports(sources, groups, *vectors, parameters=parameters, **given) or ""  # type: ignore[arg-type]

    assert reason(x) == ""
    assert "channels-last" in reason(x.contiguous())
    assert "16 bytes" in reason(x, weight=weight[1:])
    assert "weight must be" in reason(x, weight=weight)
    assert "fit 1024 columns" in reason(torch.zeros(1, 4, 4, 1032, device=device).movedim(-1, 1), groups=1)
    assert "registers" in reason(torch.zeros(1, 17, 16, 80, device=device).movedim(-1, 1), parameters=HELD)
    assert "groups" in reason(x, groups=3)
    assert "one or two" in reason(x, x[:, :, :2])
    assert "float64" in reason(x.double())
    assert "addend" in reason(x, addend=torch.zeros(3, 16, device=device))
    assert "out must be" in reason(x, out=x.half())
    with pytest.raises(InputError, match="channels-last"):
        kernels.group_norm(x.contiguous(), 2, parameters=SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_among_the_variants(device: torch.device, dtype: torch.dtype) -> None:
    known = list(kernels.variants(dtype))
    for parameters in kernels.PARAMETERS:
        for channels, silu, two in (
            (160, True, False),
            (160, False, False),
            (80, True, True),
            (320, True, False),
            (12, True, False),
        ):
            x = torch.empty((2, 12, 5, channels), dtype=dtype, device=device).movedim(-1, 1)
            sources = (x, x) if two else (x,)
            out = torch.empty((2, 12, 5, channels * len(sources)), dtype=dtype, device=device).movedim(-1, 1)
            if kernels.supports(sources, 4, None, None, parameters=parameters, out=out):
                continue
            for launch in kernels.launches_of(sources, 4, None, None, EPS, silu=silu, parameters=parameters, out=out):
                assert launch.variant in known
                assert len(launch.arguments) == len(launch.variant.arguments)
                for given, declared in zip(launch.arguments, launch.variant.arguments, strict=True):
                    kind = given.dtype if isinstance(given, torch.Tensor) else type(given)
                    assert kind == (declared if isinstance(declared, torch.dtype) else type(declared))


SD15 = [
    (2, channels, side * side)
    for side, widths in ((64, (320, 640, 960)), (32, (320, 640, 960, 1280, 1920)), (16, (640, 1280, 1920, 2560)),
                         (8, (1280, 2560)))
    for channels in widths
]  # fmt: skip
VAE = [(1, 128, 512**2), (1, 256, 256**2), (1, 256, 512**2), (1, 512, 128**2), (1, 512, 64**2), (1, 128, 1024**2)]


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda d: d.name)
def test_the_choice_is_small_where_launches_cost_and_split_where_bytes_do(gpu: Device) -> None:
    for batch, channels, pixels in [(b, c, n) for _, c, n in SD15 for b in (1, 2, 16)] + VAE:
        sizes = batch, channels, pixels, 32
        fitting = kernels.candidates(*sizes, gpu, 2)
        chosen = min(fitting, key=lambda p: kernels.estimate_us(*sizes, 2, p, gpu))
        assert chosen in kernels.PARAMETERS
        if pixels <= 256 and batch <= 2:
            assert not isinstance(chosen, kernels.Split)
        if pixels >= 128**2:
            assert isinstance(chosen, kernels.Split)


def test_the_estimate_grows_with_the_picture() -> None:
    for gpu in KNOWN:
        for parameters in kernels.PARAMETERS:
            times = [
                kernels.estimate_us(batch, 320, pixels, 32, 2, parameters, gpu)
                for batch, pixels in ((1, 64), (2, 1024), (2, 65536), (16, 2**18))
            ]
            assert times == sorted(times)
            assert times[0] > kernels.LAUNCH_US
    assert kernels.estimate_us(1, 4096, 64, 1, 2, LARGE, KNOWN[0]) == float("inf")
