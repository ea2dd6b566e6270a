"""Matrix products against float64: every tile, every epilogue, odd sizes, slices, and nothing outside touched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from allaprima.backends.cuda.device import KNOWN
from allaprima.backends.cuda.kernels import cublas, products
from allaprima.backends.cuda.kernels import linear as kernels
from allaprima.backends.cuda.kernels.linear import FLOAT_TILES, GATED_TILES, GENERAL, HALF_TILES, Tile
from allaprima.errors import InputError
from allaprima.ops.convolution import conv2d_add, conv2d_cat
from allaprima.ops.linear import geglu_linear, linear_add

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALL = Tile(64, 64, 64, 4, 6)
POINTWISE = ((1, 1), (0, 0), (1, 1))


@pytest.fixture(autouse=True)
def interpreted_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as integers and multiplies them as such: give its product their values."""
    product = interpreter.InterpreterBuilder.create_dot

    def value(handle: Any) -> Any:
        if not handle.dtype.is_bf16():
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, value(a), value(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def embedded(shape: Sequence[int], like: torch.Tensor | None = None, **to: Any) -> torch.Tensor:
    """A tensor in the middle of NaN: more than two rows before and after, sixteen columns between rows."""
    num_rows, pitch = math.prod(shape[:-1]), shape[-1] + 16
    before = (2 * pitch + 7) // 8 * 8  # the first element stays at a multiple of 16 bytes
    flat = torch.full(((num_rows + 2) * pitch + before,), math.nan, **to)
    rows = [pitch * math.prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
    inside = flat.as_strided(tuple(shape), (*rows, 1), before)
    if like is not None:
        inside.copy_(like)
    return inside


class Maker:
    """Tensors of one dtype from one seed, each inside NaN."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.to: dict[str, Any] = dict(device=device, dtype=dtype)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(shape, generator=self.generator)
        if len(shape) == 1:
            return embedded((1, *shape), values[None], **self.to)[0]
        return embedded(shape, values, **self.to)

    def picture(self, *shape: int) -> torch.Tensor:
        """[B, C, H, W], channels-last."""
        b, c, h, w = shape
        return self(b, h, w, c).permute(0, 3, 1, 2)


def assert_right(ours: torch.Tensor, reference: Callable[..., torch.Tensor], *arguments: Any) -> None:
    """Error to float64 at most twice eager's in this dtype, plus one rounding of the result."""
    truth = reference(*[_each(torch.Tensor.double, a) for a in arguments])
    eager = reference(*[_each(torch.clone, a) for a in arguments])  # oneDNN's bf16 product reads into the NaN
    assert ours.shape == eager.shape
    assert ours.dtype == eager.dtype
    rounding = torch.finfo(ours.dtype).eps * truth.abs()
    allowed = 2 * (eager.double() - truth).abs().max() + rounding
    error = (ours.double() - truth).abs()
    assert (error <= allowed).all(), f"error {error.max():.3g}, eager {(eager.double() - truth).abs().max():.3g}"


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return [change(v) for v in value] if isinstance(value, list) else value


def tiles(dtype: torch.dtype) -> Iterator[Tile]:
    yield from kernels.tiles_of(dtype)
    yield replace(kernels.tiles_of(dtype)[-1], splits=3)


def outside_is_nan(view: torch.Tensor) -> bool:
    """Whether what surrounds an embedded tensor is still all NaN."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    return int(storage.isfinite().sum()) == view.numel()


# ---------------------------------------------------------------------------------------------------------- numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 64), (7, 72, 40), (130, 136, 72), (520, 72, 8), (3, 5, 7), (65, 63, 33)]
)
def test_linear_at_odd_sizes(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    make = Maker(device, dtype)
    x, weight, bias = make(m, k), make(n, k), make(n)
    ragged = SMALL if dtype != torch.float32 else FLOAT_TILES[0]
    for tile in (ragged, GENERAL) if n % 8 == 0 and k % 8 == 0 else (GENERAL,):
        assert_right(kernels.linear(x, weight, bias, parameters=tile), F.linear, x, weight, bias)
        assert_right(kernels.linear(x, weight, parameters=tile), F.linear, x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_makes_every_product(device: torch.device, dtype: torch.dtype) -> None:
    make = Maker(device, dtype)
    x, weight, bias, addend = make(2, 17, 256), make(80, 256), make(80), make(2, 17, 80)
    pictures, pointwise = [make.picture(2, 128, 1, 17), make.picture(2, 128, 1, 17)], weight[:, :, None, None]
    for tile in tiles(dtype):
        assert_right(kernels.linear_add(x, weight, bias, addend, parameters=tile), linear_add, x, weight, bias, addend)
        if dtype == torch.float32 or tile.splits > 1 or tile in GATED_TILES:
            assert_right(kernels.geglu_linear(x, weight, bias, parameters=tile), geglu_linear, x, weight, bias)
        ours = kernels.conv2d_cat(pictures, pointwise, bias, *POINTWISE, parameters=tile)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_right(ours, conv2d_cat, pictures, pointwise, bias, *POINTWISE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_two_sources_of_ragged_channels(device: torch.device, dtype: torch.dtype, splits: int) -> None:
    make = Maker(device, dtype)
    sources, weight, bias = (
        [make.picture(1, 72, 5, 3), make.picture(1, 200, 5, 3)],
        make(40, 272)[..., None, None],
        None,
    )
    tile = replace(SMALL if dtype != torch.float32 else FLOAT_TILES[1], splits=splits)
    ours = kernels.conv2d_cat(sources, weight, bias, *POINTWISE, parameters=tile)
    assert_right(ours, conv2d_cat, sources, weight, bias, *POINTWISE)
    if splits == 1:
        odd = [make.picture(1, 7, 5, 3), make.picture(1, 4, 5, 3)]
        weight, bias = make(9, 11)[..., None, None], make(9)
        ours = kernels.conv2d_cat(odd, weight, bias, *POINTWISE, parameters=GENERAL)
        assert_right(ours, conv2d_cat, odd, weight, bias, *POINTWISE)
        one = kernels.conv2d_cat(odd[:1], weight[:, :7], None, *POINTWISE, parameters=GENERAL)
        assert_right(one, conv2d_cat, odd[:1], weight[:, :7], None, *POINTWISE)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gated_where_gelu_saturates(device: torch.device, approximate: str, splits: int) -> None:
    make = Maker(device, torch.float16)
    x, weight, bias = make(9, 320), make(96, 320), make(96, scale=30)
    bias[48] = 300.0  # tanh's exponential overflows
    bias[49] = -300.0
    ours = kernels.geglu_linear(x, weight, bias, approximate, parameters=replace(SMALL, splits=splits))
    assert ours.isfinite().all()
    assert_right(ours, geglu_linear, x, weight, bias, approximate)
    assert_right(
        kernels.geglu_linear(x, weight, None, approximate, parameters=SMALL), geglu_linear, x, weight, None, approximate
    )
    assert_right(
        kernels.geglu_linear(x[:, :33], weight[:34, :33], None, approximate, parameters=GENERAL),
        geglu_linear, x[:, :33], weight[:34, :33], None, approximate,
    )  # fmt: skip


def test_small_gates_are_as_exact_as_eager(device: torch.device) -> None:
    """Far left of zero gelu is the difference of near equals: no worse there than eager, element by element."""
    gates = torch.linspace(-6, 6, 512, device=device).half()
    hg = torch.cat([torch.ones_like(gates), gates])[None]
    truth = F.gelu(gates.double())
    error = (kernels.gate(hg)[0].double() - truth).abs()
    assert (error <= (F.gelu(gates).double() - truth).abs() + 2**-11 * truth.abs() + 2**-24).all()


def addends(make: Maker) -> dict[str, torch.Tensor]:
    rows = make(2, 3, 5, 40)
    return {
        "rows": rows,
        "one row for each picture": make(2, 1, 1, 40),
        "one row": make(1, 1, 1, 40),
        "every second row": make(2, 3, 10, 40)[:, :, ::2],
        "rows of another order": make(3, 2, 5, 40).transpose(0, 1).contiguous()[:, :, :],
        "channels first": make(2, 40, 3, 5).contiguous().permute(0, 2, 3, 1),
        "one number": make(1, 1).expand(2, 3, 5, 40),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_addends_of_any_strides(device: torch.device, dtype: torch.dtype) -> None:
    make = Maker(device, dtype)
    x, weight, bias = make(2, 3, 5, 128), make(40, 128), make(40)
    fast = SMALL if dtype != torch.float32 else FLOAT_TILES[1]
    for name, addend in addends(make).items():
        dense = addend.stride(-1) == 1
        for tile in (fast, replace(fast, splits=2), GENERAL) if dense else (GENERAL,):
            ours = kernels.linear_add(x, weight, bias, addend, parameters=tile)
            assert_right(ours, linear_add, x, weight, bias, addend)
        if not dense:
            with pytest.raises(InputError, match="multiple of 8"):
                kernels.linear_add(x, weight, bias, addend, parameters=fast)
        assert kernels.supports("linear_add", x, weight, bias, addend) is None, name


@pytest.mark.parametrize("splits", [1, 3])
def test_pointwise_convolution_with_a_residual(device: torch.device, splits: int) -> None:
    make = Maker(device, torch.bfloat16)
    x, weight, bias = make.picture(2, 192, 3, 7), make(72, 192)[:, :, None, None], make(72)
    residual, embedding = make.picture(2, 72, 3, 7), make.picture(1, 72, 1, 1)
    for addend in (residual, embedding):
        arguments = (x, weight, bias, addend, *POINTWISE, 1)
        ours = kernels.conv2d_add(*arguments, parameters=replace(SMALL, splits=splits))
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_right(ours, conv2d_add, *arguments)


# ----------------------------------------------------------------------------------------------------------- borders
@pytest.mark.parametrize("tile", [SMALL, replace(SMALL, splits=2), GENERAL], ids=["whole", "split", "general"])
def test_writes_all_of_out_and_nothing_else(device: torch.device, tile: Tile) -> None:
    make = Maker(device, torch.float16)
    x, weight, bias, addend = make(5, 13, 136), make(72, 136), make(72), make(5, 13, 72)
    out = embedded((5, 13, 72), **make.to)
    assert kernels.linear_add(x, weight, bias, addend, parameters=tile, out=out) is out
    assert outside_is_nan(out)
    assert_right(out, linear_add, x, weight, bias, addend)
    gated = embedded((5, 13, 36), **make.to)
    if tile == GENERAL:
        kernels.geglu_linear(x, weight, bias, parameters=tile, out=gated)
        assert outside_is_nan(gated)
    picture = embedded((1, 5, 13, 72), **make.to).permute(0, 3, 1, 2)
    pictures = [x[None].permute(0, 3, 1, 2)]
    made = kernels.conv2d_cat(pictures, weight[..., None, None], bias, *POINTWISE, parameters=tile, out=picture)
    assert made.data_ptr() == picture.data_ptr()
    assert outside_is_nan(picture)


def test_offsets_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Storage is shared under the interpreter: copying it back onto itself would only touch all of its pages.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    far = 2**30  # elements from row to row: the third row's offset does not fit 32 bits
    huge = torch.empty(2 * far + 64, dtype=torch.float16, device=device)
    make = Maker(device, torch.float16)
    x, weight, addend = make(3, 64), make(16, 64), make(3, 16)
    far_x = huge.as_strided((3, 64), (far, 1)).copy_(x)
    assert_right(kernels.linear(far_x, weight, parameters=SMALL), F.linear, x, weight)
    far_weight = huge.as_strided((3, 64), (far, 1)).copy_(weight[:3])
    assert_right(kernels.linear(x, far_weight, parameters=GENERAL), F.linear, x, weight[:3])
    far_addend = huge.as_strided((3, 16), (far, 1)).copy_(addend)
    for tile in (SMALL, GENERAL):
        ours = kernels.linear_add(x, weight, None, far_addend, parameters=tile)
        assert_right(ours, linear_add, x, weight, None, addend)
    pairs, addend = make(3, 2, 64), make(3, 2, 16)
    far_pairs = huge.as_strided((3, 2, 16), (far, 32, 1)).copy_(addend)
    ours = kernels.linear_add(pairs, weight, None, far_pairs, parameters=SMALL)
    assert_right(ours, linear_add, pairs, weight, None, addend)
    far_out = huge.as_strided((3, 16), (far, 1)).fill_(math.nan)
    for tile in (SMALL, replace(SMALL, splits=2)):
        kernels.linear(x.repeat(1, 2), weight.repeat(1, 2), parameters=tile, out=far_out)
        assert_right(far_out, F.linear, x.repeat(1, 2), weight.repeat(1, 2))


def test_empty_batch(device: torch.device) -> None:
    make = Maker(device, torch.float16)
    assert kernels.linear(torch.empty(0, 64, **make.to), make(8, 64), parameters=SMALL).shape == (0, 8)
    assert kernels.gate(torch.empty(0, 64, **make.to)).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [256, 40, 5])
def test_gate(device: torch.device, dtype: torch.dtype, n: int) -> None:
    make = Maker(device, dtype)
    hg = make(3, 3, 2 * n).contiguous()
    out = torch.full((3, 3, n), math.nan, **make.to)
    for approximate in ("none", "tanh"):
        kernels.gate(hg, approximate, out=out)
        assert_right(out, lambda v, a=approximate: v.chunk(2, -1)[0] * F.gelu(v.chunk(2, -1)[1], approximate=a), hg)
    with pytest.raises(InputError):
        kernels.gate(hg.transpose(0, 1))
    with pytest.raises(InputError):
        kernels.gate(hg, out=out[:2])


# ---------------------------------------------------------------------------------------------------- what is refused
def test_refusals_name_the_reason(device: torch.device) -> None:
    make = Maker(device, torch.float16)
    x, weight, bias = make(4, 64), make(16, 64), make(16)
    refused = {
        "does not start at": (x[:, 1:9], weight[:, :8].contiguous(), None),
        "dtypes differ": (x, weight.float(), None),
        "no kernel for torch.float64": (x.double(), weight.double(), None),
        "not a matrix": (make(2, 3, 4, 64).transpose(0, 1)[:, :, ::2], weight, None),
        "rows are not contiguous": (x[:, :16], weight[:16, :16].t(), None),
        "does not fit x": (x, weight[:, :32], None),
        "does not fit weight": (x, weight, bias[:8]),
    }
    for reason, arguments in refused.items():
        assert reason in str(kernels.supports("linear", *arguments))
        with pytest.raises(InputError, match=reason):
            kernels.linear(*arguments, parameters=GENERAL)
    picture, matrix = make.picture(1, 64, 4, 4), weight[:, :, None, None]
    assert kernels.supports("conv2d_cat", [picture], matrix, bias, *POINTWISE) is None
    assert kernels.supports("conv2d_cat", [picture.contiguous()], matrix, bias, *POINTWISE) is not None
    assert kernels.supports("conv2d_cat", [picture], matrix, bias, (2, 2), (0, 0), (1, 1)) is not None
    assert kernels.supports("conv2d_cat", [picture], matrix, bias, (1, 1), (1, 1), (1, 1)) is not None
    assert kernels.supports("conv2d_cat", [picture] * 3, make(16, 192)[..., None, None], bias, *POINTWISE) is not None
    assert kernels.supports("conv2d_add", picture, matrix, bias, picture[:, :16], *POINTWISE, 2) is not None
    assert kernels.supports("geglu_linear", x, weight, bias, "quick") is not None


def test_refuses_tiles_that_were_not_compiled(device: torch.device) -> None:
    make = Maker(device, torch.float16)
    large = HALF_TILES[0]
    for k, tile, reason in [
        (72, large, "not compiled for K"),
        (64, Tile(16, 16, 16, 4, 2), "not compiled for torch.float16"),
        (64, FLOAT_TILES[0], "not compiled for torch.float16"),
        (65, SMALL, "multiple of 8"),
        (64, replace(SMALL, splits=9), "1 to 8 parts"),
        (64, replace(GENERAL, splits=2), "does not split"),
    ]:
        with pytest.raises(InputError, match=reason):
            kernels.linear(make(4, k), make(16, k), parameters=tile)
    with pytest.raises(InputError, match="not compiled"):
        kernels.geglu_linear(make(4, 64), make(16, 64), None, "tanh", parameters=large)


def test_refuses_a_result_it_cannot_write(device: torch.device) -> None:
    make = Maker(device, torch.float16)
    x, weight = make(4, 64), make(16, 64)
    for out in (make(4, 8), make(4, 16).float(), make(16, 4).t(), make(4, 24)[:, 1:17], make(4, 9)[:, :0]):
        with pytest.raises(InputError, match="out"):
            kernels.linear(x, weight, parameters=SMALL, out=out)


# -------------------------------------------------------------------------------------------------- forms and choice
def problems(dtype: torch.dtype) -> Iterator[kernels.Problem]:
    for m, n, k in itertools.product((1, 77, 4096), (4, 320), (4, 72, 320, 1280)):
        x, weight, addend = (torch.empty(s, dtype=dtype) for s in ((m, k), (2 * n, k), (m, 2 * n)))
        x2, pointwise = torch.empty(m, 2 * k, dtype=dtype)[:, :k], torch.empty(n, 2 * k, dtype=dtype)
        for found in (
            kernels.linear_problem(x, weight),
            kernels.linear_add_problem(x, weight, None, addend),
            kernels.linear_add_problem(x, weight, None, torch.empty(2 * n, m, dtype=dtype).t()),
            kernels.geglu_linear_problem(x, weight, None),
            kernels.geglu_linear_problem(x, weight, None, "tanh"),
            kernels._problem((x, x2), pointwise, None),
        ):
            assert isinstance(found, kernels.Problem)
            yield found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_a_call_launches_was_compiled(dtype: torch.dtype) -> None:
    known = {v.name for v in kernels.variants(dtype)}
    used = set()
    for problem in problems(dtype):
        out = torch.empty(problem.shape, dtype=dtype, device="meta")
        given = [*kernels.tiles_of(dtype), GENERAL]
        given += [replace(t, splits=2) for t in given]
        able = [t for t in given if problem.refuses(t) is None]
        assert able
        for tile in able:
            for launch in kernels.launches_of(problem, tile, out):
                used.add(launch.variant.name)
                assert len(launch.arguments) == len(launch.variant.arguments)
                for value, kind in zip(launch.arguments, launch.variant.arguments, strict=True):
                    assert isinstance(value, torch.Tensor) == isinstance(kind, torch.dtype)
                    assert not isinstance(value, torch.Tensor) or value.dtype == kind
    for n, approximate in itertools.product((8, 3), ("none", "tanh")):
        used.add(kernels.gate_launch(torch.empty(2, 2 * n, dtype=dtype), approximate, None)[0].variant.name)
    assert used == known


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda d: d.name)
def test_candidates_fit_the_gpu(gpu: Any) -> None:
    for dtype in DTYPES:
        for m, n, ks in [(1, 20160, (1280,)), (128, 1280, (1280, 1280)), (8192, 320, (320,)), (7, 8, (72,))]:
            found = kernels.candidates(m, n, ks, dtype, gpu)
            assert found
            assert all(t.shared_bytes(dtype.itemsize, gpu.arch) <= gpu.shared_bytes for t in found)
            times = [kernels.estimate_us(m, n, sum(ks), dtype.itemsize, t, gpu) for t in found]
            assert all(0 < t < 1e5 for t in times)
            larger = [kernels.estimate_us(4 * m, n, sum(ks), dtype.itemsize, t, gpu) for t in found]
            assert all(b >= a for a, b in zip(times, larger, strict=True))
    assert kernels.candidates(8, 3, (5,), torch.float16, gpu, aligned=False) == [GENERAL]
    for m, n, k in itertools.product((1, 64, 4096), (8, 1280), (8, 320, 1280)):
        assert GENERAL not in kernels.candidates(m, n, (k,), torch.float16, gpu), "only for what no other tile takes"


def test_few_tiles_ask_for_parts_of_k() -> None:
    """At 8×8 twenty tiles would leave most of an H100 idle: the best candidate cuts K."""
    h100 = next(d for d in KNOWN if d.name == "H100")
    found = kernels.candidates(128, 1280, (5120,), torch.float16, h100)
    best = min(found, key=lambda t: kernels.estimate_us(128, 1280, 5120, 2, t, h100))
    assert best.splits > 1
    found = kernels.candidates(8192, 2560, (320,), torch.float16, h100)
    assert min(found, key=lambda t: kernels.estimate_us(8192, 2560, 320, 2, t, h100)).splits == 1


# ------------------------------------------------------------------------------------------------------------ cuBLAS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_out", [False, True], ids=["new", "out"])
def test_the_library_makes_the_same(device: torch.device, dtype: torch.dtype, given_out: bool) -> None:
    make = Maker(device, dtype)
    x, weight, addend = make(2, 5, 64), make(48, 64), make(2, 5, 48)
    pictures = [make.picture(2, 24, 3, 5), make.picture(2, 40, 3, 5)]
    picture, pointwise = make.picture(2, 64, 3, 5), weight[..., None, None]
    for bias in (make(48), None):
        calls: list[tuple[str, Callable[..., torch.Tensor], tuple[Any, ...]]] = [
            ("linear", F.linear, (x, weight, bias)),
            ("linear_add", linear_add, (x, weight, bias, addend)),
            ("geglu_linear", geglu_linear, (x, weight, bias)),
            ("conv2d_cat", conv2d_cat, (pictures, pointwise, bias, *POINTWISE)),
            ("conv2d_cat", conv2d_cat, ([picture], pointwise, bias, *POINTWISE)),
            ("conv2d_cat", conv2d_cat, (list(picture.split((16, 24, 24), 1)), pointwise, bias, *POINTWISE)),
            ("conv2d_add", conv2d_add, (picture, pointwise, bias, make.picture(2, 48, 3, 5), *POINTWISE, 1)),
            ("conv2d_add", conv2d_add, (picture, pointwise, bias, make.picture(1, 48, 1, 1), *POINTWISE, 1)),
        ]
        for name, reference, arguments in calls:
            for form in cublas.FORMS[name]:
                out = torch.full_like(reference(*arguments), math.nan) if given_out else None
                if out is not None and out.ndim == 4:
                    out = out.contiguous(memory_format=torch.channels_last)
                ours = getattr(cublas, name)(*arguments, parameters=form, out=out)
                assert out is None or ours.data_ptr() == out.data_ptr()
                assert_right(ours, reference, *arguments)
                assert ours.ndim != 4 or ours.is_contiguous(memory_format=torch.channels_last)


def test_estimates_of_the_library_grow() -> None:
    for gpu, (name, forms) in itertools.product(KNOWN, cublas.FORMS.items()):
        for form in forms:
            for small, large in [(128, 512), (512, 8192)]:
                few, many = (cublas.estimate_us(name, m, 1280, (640, 640), 2, form, gpu) for m in (small, large))
                assert 0 < few <= many


# ------------------------------------------------------------------------------------------------------------ choice
def test_candidates_of_a_call_run_it(device: torch.device) -> None:
    make = Maker(device, torch.float16)
    h100 = next(d for d in KNOWN if d.name == "H100")
    picture, weight, bias = make.picture(1, 128, 1, 9), make(24, 128), make(24)
    pointwise, residual = weight[:, :, None, None], make.picture(1, 24, 1, 9)
    for operator, reference, arguments in [
        ("linear", F.linear, (make(9, 128), weight, bias)),
        ("linear_add", linear_add, (make(9, 128), weight, bias, make(9, 24))),
        ("geglu_linear", geglu_linear, (make(9, 128), make(48, 128), None)),
        ("conv2d_cat", conv2d_cat, ([picture[:, :64], picture[:, 64:]], pointwise, bias, *POINTWISE)),
        ("conv2d_add", conv2d_add, (picture, pointwise, bias, residual, *POINTWISE, 1)),
    ]:
        found = products.candidates(operator, arguments, h100)
        assert {c.name.split()[0] for c in found} == {"cublas", "triton"}
        assert found == sorted(found, key=lambda c: c.estimate_us)
        assert len({c.name for c in found}) == len(found)
        for candidate in found:
            assert_right(candidate.call(*arguments, parameters=candidate.parameters), reference, *arguments)


def test_candidates_where_ours_cannot(device: torch.device) -> None:
    make = Maker(device, torch.float16)
    h100 = next(d for d in KNOWN if d.name == "H100")
    x, weight = make(9, 72)[:, 1:65], make(24, 64)
    assert {c.name.split()[0] for c in products.candidates("linear", (x, weight), h100)} == {"cublas"}
    picture, three = make.picture(1, 64, 4, 4), make(24, 64 * 9).view(24, 64, 3, 3)
    assert products.candidates("conv2d_cat", ([picture], three, None, (1, 1), (1, 1), (1, 1)), h100) == []
    grouped = (picture, weight[:, :32, None, None], None, picture[:, :24], *POINTWISE, 2)
    assert products.candidates("conv2d_add", grouped, h100) == []
