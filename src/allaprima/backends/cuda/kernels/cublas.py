"""Matrix products by cuBLAS, in the form of our own kernels: the candidates beside them.

Each call takes what the reference in ops/ takes, then `parameters` (a Library) and `out`.  What cuBLAS has no epilogue
for costs a second kernel; which second kernel is what the forms of one operator differ in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ....errors import InputError
from ..device import Device
from .linear import combine_us, gate, moved_us


@dataclass(frozen=True)
class Library:
    """How an operator is put together from cuBLAS's product.

    form  "product"  the product with its bias, all that `linear` and `geglu_linear` need
          "after"    the product with its bias, then the addend is added in place; for two sources, concatenated first
          "beta"     bias + addend is written first and the product accumulates onto it (rounds once more in between);
                     for two sources, the second product accumulates onto the first
    """

    form: str


FORMS = {
    "linear": (Library("product"),),
    "linear_add": (Library("after"), Library("beta")),
    "geglu_linear": (Library("product"),),
    "conv2d_cat": (Library("after"), Library("beta")),
    "conv2d_add": (Library("after"), Library("beta")),
}
"""What there is to choose from, by operator."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parameters: Library,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias; a bias is cuBLASLt's epilogue.

    x        [..., K], weight [N, K], bias [N] or None, of one dtype
    out      [..., N] contiguous or None
    returns  [..., N]
    """
    if out is None:
        return F.linear(x, weight, bias)
    rows, flat = _rows(x), _flat(out)
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    return out


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    *,
    parameters: Library,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias + addend, as `ops.linear.linear_add`."""
    if parameters.form == "after":
        return linear(x, weight, bias, parameters=parameters, out=out).add_(addend)
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if bias is None:
        out.copy_(addend)
    else:
        torch.add(addend.expand(out.shape), bias, out=out)
    _flat(out).addmm_(_rows(x), weight.t())
    return out


def geglu_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str = "none",
    *,
    parameters: Library,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """h·gelu(g), as `ops.linear.geglu_linear`: the product is written, and our kernel `gate` reads it."""
    return gate(F.linear(x, weight, bias), approximate, out=out)


def conv2d_cat(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    parameters: Library,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 1×1 case of `ops.convolution.conv2d_cat` for channels-last sources; the result is channels-last."""
    xs = [s.permute(0, 2, 3, 1) for s in sources]
    target = None if out is None else out.permute(0, 2, 3, 1)
    matrix = weight[:, :, 0, 0]
    if parameters.form == "after" or len(xs) == 1:
        x = xs[0] if len(xs) == 1 else torch.cat(xs, -1)
        return linear(x, matrix, bias, parameters=parameters, out=target).permute(0, 3, 1, 2)
    k = xs[0].shape[-1]
    made = linear(xs[0], matrix[:, :k], bias, parameters=parameters, out=target)
    for x in xs[1:]:
        _flat(made).addmm_(_rows(x), matrix[:, k : k + x.shape[-1]].t())
        k += x.shape[-1]
    return made.permute(0, 3, 1, 2)


def conv2d_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    parameters: Library,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 1×1 case of `ops.convolution.conv2d_add` for a channels-last x; the result is channels-last."""
    target = None if out is None else out.permute(0, 2, 3, 1)
    rows, added = x.permute(0, 2, 3, 1), addend.permute(0, 2, 3, 1)
    return linear_add(rows, weight[:, :, 0, 0], bias, added, parameters=parameters, out=target).permute(0, 3, 1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[M, K]; a copy where the rows are not evenly spaced."""
    return x.reshape(-1, x.shape[-1])


def _flat(out: torch.Tensor) -> torch.Tensor:
    """[M, N] over the memory of `out`, which must be written in place."""
    if not out.is_contiguous():
        raise InputError(f"out {list(out.shape)} with strides {list(out.stride())} is not contiguous, channels last")
    return out.view(-1, out.shape[-1])


# ------------------------------------------------------------------------------------------------------------ choice
# Fitted to an H100's times (benchmarks/h100-operators.jsonl).
TILES = ((256, 128), (128, 256), (192, 128), (128, 192), (128, 128), (64, 256), (128, 64), (64, 128), (64, 64))
SPLITS = (1, 2, 4, 8)
START_US = 3.3  # of a product
PEAK = 1.25  # of the tensor cores alone, over what large products reach
STORE_TBS = 0.03  # of one SM's epilogue
OVERLAP = 1.9  # of products and memory, as in `linear`
PASS_US = 2.0  # of an elementwise kernel
BROADCAST = 2.7  # adding a bias to a residual takes so much longer than adding two tensors


def product_us(
    m: int, n: int, k: int, itemsize: int, device: Device, onto: bool = False, biased: bool = False
) -> float:
    """cuBLAS's product of [M, K] and [N, K] in µs, added `onto` what is there: the best of its usual tiles by waves,
    FLOPs and bytes.  A bias is added by the product's own epilogue, which then cannot cut K into parts."""
    rate = (device.float_tflops if itemsize == 4 else device.half_tflops * PEAK) / device.num_sms
    memory_us = moved_us(n * k * itemsize, (m * k + m * n * (2 if onto else 1)) * itemsize, device)
    best = float("inf")
    for tile_m, tile_n in TILES:
        for splits in SPLITS if k >= 1024 and not biased else (1,):
            most = -(-(-(-m // tile_m) * -(-n // tile_n) * splits) // device.num_sms)
            flops_us = most * 2 * tile_m * tile_n * -(-k // splits) / rate * 1e-6
            store_us = most * tile_m * tile_n * itemsize / STORE_TBS * 1e-6
            time = (flops_us**OVERLAP + memory_us**OVERLAP) ** (1 / OVERLAP) + store_us
            best = min(best, time + (combine_us(splits, m, n, device) if splits > 1 else 0.0))
    return START_US + best


def elementwise_us(elements: float, itemsize: int, device: Device) -> float:
    """A kernel that reads and writes `elements` in all, of what was just written."""
    return PASS_US + 1.25 * moved_us(0, elements * itemsize, device)


def estimate_us(
    operator: str, m: int, n: int, ks: Sequence[int], itemsize: int, parameters: Library, device: Device
) -> float:
    """Time of `operator` (a key of FORMS) with a result of [M, N] over sources of `ks` channels, in µs."""
    k, after = sum(ks), parameters.form == "after"
    if operator == "geglu_linear":
        return product_us(m, 2 * n, k, itemsize, device) + elementwise_us(3 * m * n, itemsize, device)
    if operator in ("linear_add", "conv2d_add"):
        passed = 3 * m * n if after else BROADCAST * 2 * m * n
        return product_us(m, n, k, itemsize, device, onto=not after, biased=after) + elementwise_us(
            passed, itemsize, device
        )
    if len(ks) == 1:
        return product_us(m, n, k, itemsize, device)
    if after:
        return product_us(m, n, k, itemsize, device) + elementwise_us(2 * m * k, itemsize, device)
    return sum(product_us(m, n, each, itemsize, device, onto=i > 0) for i, each in enumerate(ks))
