"""What a matrix product may be run by: our kernel with each of its tiles, and cuBLAS in each of its forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..device import Device
from . import cublas, linear


class Candidate(NamedTuple):
    """One way to run an operator: call(*arguments, parameters=parameters, out=…)."""

    name: str
    call: Callable[..., torch.Tensor]
    parameters: linear.Tile | cublas.Library
    estimate_us: float


def candidates(operator: str, arguments: Sequence[Any], device: Device) -> list[Candidate]:
    """All ways to run `operator` (a key of linear.PROBLEMS) on these arguments, the one estimated fastest first.

    Only sizes, strides and dtypes are read: tensors on the meta device will do.  Empty for a convolution that is not a
    matrix product, and where there is nothing to multiply.
    """
    m, n, ks = sizes(operator, arguments)
    weight = arguments[1]
    if not m or not n or not sum(ks):
        return []
    if operator.startswith("conv2d") and not _is_product(operator, arguments):
        return []
    found = []
    for form in cublas.FORMS[operator]:
        time = cublas.estimate_us(operator, m, n, ks, weight.dtype.itemsize, form, device)
        found.append(Candidate(f"cublas {form.form}", getattr(cublas, operator), form, time))
    problem = linear.PROBLEMS[operator](*arguments)
    if isinstance(problem, linear.Problem):
        gated, added = problem.gelu > 0, problem.addend is not None
        for tile in linear.candidates(m, n, ks, weight.dtype, device, gelu=problem.gelu, aligned=problem.aligned()):
            time = linear.estimate_us(m, n, sum(ks), weight.dtype.itemsize, tile, device, gated=gated, added=added)
            found.append(Candidate(f"triton {tile.name}", getattr(linear, operator), tile, time))
    return sorted(found, key=lambda c: c.estimate_us)


def sizes(operator: str, arguments: Sequence[Any]) -> tuple[int, int, tuple[int, ...]]:
    """Rows and columns of the result, and the channels of each source."""
    x, weight = arguments[0], arguments[1]
    n = weight.shape[0] // 2 if operator == "geglu_linear" else weight.shape[0]
    if operator == "conv2d_cat":
        ks = tuple(s.shape[1] for s in x)
        return x[0].numel() // max(1, ks[0]), n, ks
    k = x.shape[1 if operator == "conv2d_add" else -1]
    return x.numel() // max(1, k), n, (k,)


def _is_product(operator: str, arguments: Sequence[Any]) -> bool:
    weight = arguments[1]
    first = 4 if operator == "conv2d_add" else 3
    stride, padding = arguments[first], arguments[first + 1]
    groups = arguments[7] if operator == "conv2d_add" else 1
    return linear.is_pointwise(weight, stride, padding) and groups == 1
