"""LayerNorm, alone and behind a residual addition, against float64 and beside eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from allaprima.backends.cuda.device import KNOWN, Device
from allaprima.backends.cuda.kernels import layer_norm as kernels
from allaprima.errors import InputError
from allaprima.ops.layer_norm import add_layer_norm as reference

from .norm_cases import DTYPES, assert_no_worse, in_nan

WARP, BLOCK, WIDE = kernels.PARAMETERS
EPS = 1e-5


def numbers(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (2 * made + 0.5).to(device, dtype)


def poison(like: torch.Tensor) -> torch.Tensor:
    return in_nan(torch.full_like(like, float("nan")))


def assert_nothing_around(out: torch.Tensor) -> None:
    num_all = out.untyped_storage().nbytes() // out.itemsize
    assert int(out.as_strided((num_all,), (1,), 0).isnan().sum()) == num_all - out.numel()


def check(x: torch.Tensor, parameters: kernels.Rows) -> None:
    weight, bias = (numbers(x.device, x.dtype, x.shape[-1], seed=s) for s in (1, 2))
    out = poison(x)
    got = kernels.layer_norm(in_nan(x), x.shape[-1:], weight, bias, EPS, parameters=parameters, out=out)
    assert got is out
    truth = F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), EPS)
    assert_no_worse(got, truth, F.layer_norm(x, x.shape[-1:], weight, bias, EPS))
    assert_nothing_around(out)


def check_add(x: torch.Tensor, parameters: kernels.Rows) -> None:
    residual = numbers(x.device, x.dtype, *x.shape, seed=9)
    weight, bias = (numbers(x.device, x.dtype, x.shape[-1], seed=s) for s in (1, 2))
    outs = poison(x), poison(x)
    total, normal = kernels.add_layer_norm(
        in_nan(x), in_nan(residual), weight, bias, EPS, parameters=parameters, out=outs
    )
    assert total is outs[0]
    assert normal is outs[1]
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # the interpreter cuts bfloat16 off instead of rounding
        assert_no_worse(total, x.double() + residual.double(), x + residual)
    else:
        assert torch.equal(total, x + residual)
    # The rounded sum is what is normalised.
    truth = F.layer_norm(total.double(), x.shape[-1:], weight.double(), bias.double(), EPS)
    assert_no_worse(normal, truth, reference(x, residual, weight, bias, EPS)[1])
    for out in outs:
        assert_nothing_around(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 40), (1, 320), (7, 65), (3, 1), (9, 8), (2, 3, 1, 72)], ids=str)
def test_shapes(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    (parameters,) = kernels.candidates(1, shape[-1], KNOWN[0])
    check(numbers(device, dtype, *shape), parameters)
    check_add(numbers(device, dtype, *shape), parameters)


@pytest.mark.parametrize(
    ("columns", "parameters"),
    [(c, p) for c in (40, 320, 640, 768, 1280, 2560, 8192) for p in kernels.PARAMETERS if p.fits(kernels._cols(c))],
    ids=str,
)
def test_every_form(device: torch.device, columns: int, parameters: kernels.Rows) -> None:
    """Three rows more than one program holds."""
    x = numbers(device, torch.float16, parameters.rows(kernels._cols(columns)) + 3, columns)
    check(x, parameters)
    check_add(x, parameters)


@pytest.mark.parametrize("parameters", kernels.PARAMETERS, ids=str)
def test_in_place(device: torch.device, parameters: kernels.Rows) -> None:
    """Bit for bit what it is elsewhere, over several programs."""
    columns = parameters.most - 8
    x = in_nan(numbers(device, torch.float16, 2, 19, columns))
    weight, bias = (numbers(device, torch.float16, columns, seed=s) for s in (1, 2))
    expected = kernels.layer_norm(x, [columns], weight, bias, EPS, parameters=parameters)
    assert kernels.layer_norm(x, [columns], weight, bias, EPS, parameters=parameters, out=x) is x
    assert torch.equal(x, expected)
    assert_nothing_around(x)


def test_absent_weight_and_bias(device: torch.device) -> None:
    x = numbers(device, torch.float32, 5, 48)
    weight, bias = numbers(device, torch.float32, 48, seed=1), numbers(device, torch.float32, 48, seed=2)
    for w, b in ((None, None), (weight, None), (None, bias)):
        wide = [None if v is None else v.double() for v in (w, b)]
        truth = F.layer_norm(x.double(), (48,), *wide, EPS)
        got = kernels.layer_norm(x, (48,), w, b, EPS, parameters=WARP)
        assert_no_worse(got, truth, F.layer_norm(x, (48,), w, b, EPS))


def test_a_large_mean_does_not_cancel(device: torch.device) -> None:
    x = numbers(device, torch.float32, 5, 320) + 4096
    truth = F.layer_norm(x.double(), (320,), None, None, EPS)
    assert_no_worse(kernels.layer_norm(x, (320,), parameters=BLOCK), truth, F.layer_norm(x, (320,), eps=EPS))


@pytest.mark.parametrize("value", [0.0, 60000.0])
def test_constant_rows(device: torch.device, value: float) -> None:
    x = torch.full((3, 65), value, dtype=torch.float16, device=device)
    bias = numbers(device, torch.float16, 65)
    assert torch.equal(kernels.layer_norm(x, (65,), None, bias, EPS, parameters=WARP), bias.expand(3, 65))


def test_the_sum_is_rounded_before_it_is_normalised(device: torch.device) -> None:
    """Half precision has no number between 2048 and 2050: the sums differ, their roundings do not."""
    x = torch.full((2, 64), 2048.0, dtype=torch.float16, device=device)
    residual = torch.linspace(0, 0.9, 64, device=device).half().expand(2, 64).contiguous()
    total, normal = kernels.add_layer_norm(x, residual, None, None, EPS, parameters=WARP)
    assert torch.equal(total, x)
    assert not normal.any()


def test_rows_that_are_a_slice_of_wider_ones(device: torch.device) -> None:
    wide = numbers(device, torch.float16, 2, 7, 192)
    x = wide[..., 64:128]
    got = kernels.layer_norm(x, (64,), parameters=WARP)
    assert got.is_contiguous()
    assert torch.equal(got, kernels.layer_norm(x.contiguous(), (64,), parameters=WARP))


def test_the_sum_may_go_where_its_terms_are(device: torch.device) -> None:
    x, residual = numbers(device, torch.float16, 5, 64), numbers(device, torch.float16, 5, 64, seed=1)
    expected = kernels.add_layer_norm(x, residual, None, None, EPS, parameters=WARP)
    got = kernels.add_layer_norm(x, residual, None, None, EPS, parameters=WARP, out=(residual, torch.empty_like(x)))
    assert got[0] is residual
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """The tensor reaches over 4 GB, of which only a few pages are touched."""
    big = torch.empty(2**31 + 2**20, dtype=torch.float16, device=device)
    values = numbers(device, torch.float16, 3, 64)
    x = torch.as_strided(big, (3, 64), (2**30, 1)).copy_(values)
    expected = kernels.add_layer_norm(values, values, None, None, EPS, parameters=WARP)
    outs = torch.as_strided(big, (3, 64), (2**30, 1), 64), torch.as_strided(big, (3, 64), (2**30, 1), 128)
    kernels.add_layer_norm(x, x, None, None, EPS, parameters=WARP, out=outs)
    for got, right in zip(outs, expected, strict=True):
        assert torch.equal(got, right)


def test_what_is_not_supported_has_a_reason(device: torch.device) -> None:
    x = torch.zeros(4, 6, 16, device=device)

    def reason(x: torch.Tensor, parameters: kernels.Rows = WARP, **given: torch.Tensor) -> str:
        vectors = [given.pop(name, None) for name in ("weight", "bias")]
        return kernels.supports(x, *vectors, parameters=parameters, **given) or ""

    assert reason(x) == ""
    assert reason(x[:, :1]) == ""
    assert "one distance" in reason(x[:, :3])
    assert "one distance" in reason(x.mT)
    assert "16 bytes" in reason(x[..., 1:])
    assert "do not fit" in reason(torch.zeros(1, 8193, device=device), WIDE)
    assert "do not fit" in reason(torch.zeros(1, 640, device=device), WARP)
    assert "weight must be" in reason(x, weight=torch.zeros(15, device=device))
    assert "residual must be" in reason(x, residual=x.half())
    assert "float64" in reason(x.double())
    with pytest.raises(InputError, match="last axis"):
        kernels.layer_norm(x, (6, 16), parameters=WARP)
    with pytest.raises(InputError, match="one distance"):
        kernels.layer_norm(x[:, :3], (16,), parameters=WARP)
    assert kernels.layer_norm(x[:0], (16,), parameters=WARP).shape == (0, 6, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_among_the_variants(device: torch.device, dtype: torch.dtype) -> None:
    known = list(kernels.variants(dtype))
    for columns in (1, 40, 65, 128, 320, 640, 1280, 2561, 8192):
        x = torch.empty(3, columns, dtype=dtype, device=device)
        fit = [p for p in kernels.PARAMETERS if kernels.supports(x, None, None, parameters=p) is None]
        assert fit == kernels.candidates(3, columns, KNOWN[0])
        assert fit
        for residual in (None, x):
            for parameters in fit:
                launch = kernels.launch_of(x, residual, None, None, EPS, parameters=parameters, total=residual, out=x)
                assert launch.variant in known
                for given, declared in zip(launch.arguments, launch.variant.arguments, strict=True):
                    kind = given.dtype if isinstance(given, torch.Tensor) else type(given)
                    assert kind == (declared if isinstance(declared, torch.dtype) else type(declared))


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda d: d.name)
def test_the_estimate_grows_and_the_choice_fits(gpu: Device) -> None:
    for columns in (320, 640, 768, 1280, 8192):
        times = []
        for rows in (128, 512, 2048, 8192, 32768):
            fitting = kernels.candidates(rows, columns, gpu)
            chosen = min(fitting, key=lambda p: kernels.estimate_us(rows, columns, 2, p, gpu))
            times.append(kernels.estimate_us(rows, columns, 2, chosen, gpu))
            assert kernels.estimate_us(rows, columns, 2, chosen, gpu, add=True) >= times[-1]
        assert times == sorted(times)
    assert kernels.estimate_us(1, 9000, 2, WIDE, gpu) == float("inf")
