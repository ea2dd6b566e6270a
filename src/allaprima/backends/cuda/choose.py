"""Which kernel runs an operator: a function of the operator, its sizes, the dtype and the GPU, never of a measurement
made while somebody waits.

Every candidate carries the time that an analytic model expects of it; the smallest is taken.  cuDNN, cuBLAS and ATen
are candidates like our own kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from ... import ops
from ...graph import aten
from .device import Device
from .kernels import attention, convolution, group_norm, layer_norm, products, sdpa, upsampling


@dataclass(frozen=True)
class Candidate:
    """One way to run an operator: call(*arguments), expected to take `estimate_us`."""

    name: str
    call: Callable[..., Any]
    estimate_us: float


@dataclass(frozen=True)
class Choice(Candidate):
    """The candidate that was taken.

    target         the operator
    forms          its arguments, with a Form for each tensor
    num_arguments  how many of the operator's arguments it takes
    writes_over    whether `out` may be the first argument, which then is laid out as the result would be
    reason         what else there was, in words
    """

    target: Any
    forms: tuple[Any, ...]
    num_arguments: int
    writes_over: bool
    reason: str

    def arranged(self, arguments: Sequence[Any], options: Any) -> tuple[Any, ...]:
        """The operator's arguments as the candidate takes them."""
        return tuple(arguments[: self.num_arguments])


class Form(NamedTuple):
    """What a choice depends on of a tensor; misaligned: bytes between its first element and a multiple of 16."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    misaligned: int


@dataclass(frozen=True)
class Operator:
    """What is known of an operator.

    candidates     the ways to run it for given arguments
    num_arguments  how many arguments they take
    writes_over    whether their `out` may be a given first argument; None: never
    """

    candidates: Callable[[Sequence[Any], Device], Iterator[Candidate]]
    num_arguments: int
    writes_over: Callable[[torch.Tensor], bool] | None = None


def choose(target: Any, arguments: Sequence[Any], options: Any, device: Device) -> Choice | None:
    """The best candidate for a call; None where the operator itself is the only way.

    arguments  the call's own: of tensors only shape, strides, dtype and alignment are read
    """
    operator = OPERATORS.get(target)
    if operator is None or options:
        return None
    key = target, _forms(arguments), device
    if key not in _chosen:
        _chosen[key] = _best(target, operator, arguments, device)
    return _chosen[key]


_chosen: dict[Any, Choice | None] = {}


def _best(target: Any, operator: Operator, arguments: Sequence[Any], device: Device) -> Choice | None:
    found = sorted(operator.candidates(arguments[: operator.num_arguments], device), key=lambda c: c.estimate_us)
    if not found:
        return None
    first, *others = found
    reason = f"{first.estimate_us:.1f} µs expected"
    if others:
        reason += f"; next {others[0].name}, {others[0].estimate_us:.1f}; of {len(found)}"
    over = operator.writes_over is not None and operator.writes_over(arguments[0])
    known = target, _forms(arguments), operator.num_arguments, over, reason
    return Choice(first.name, first.call, first.estimate_us, *known)


def _forms(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return Form(argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16)
    if isinstance(argument, list | tuple):
        return tuple(map(_forms, argument))
    return argument


# ---- the operators -------------------------------------------------------------------------------------------------


def _with(call: Callable[..., Any], parameters: Any) -> Callable[..., Any]:
    return functools.partial(call, parameters=parameters)


def _named(parameters: Any) -> str:
    """A dataclass of launch parameters in a few words: those that say something."""
    return " ".join(
        f"{f.name}={getattr(parameters, f.name)}" for f in fields(parameters) if getattr(parameters, f.name)
    )


def _product(name: str) -> Callable[[Sequence[Any], Device], Iterator[Candidate]]:
    def candidates(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
        for c in products.candidates(name, arguments, device):
            yield Candidate(c.name, _with(c.call, c.parameters), c.estimate_us)
        yield from _hopper(name, arguments, device)

    return candidates


def _hopper(name: str, arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    """Our kernels for one generation, imported only there: they are written in Gluon."""
    if device.arch != 90:
        return
    from .kernels.hopper import convolution as hopper

    problem_of = hopper.PROBLEMS.get(name)
    problem = problem_of(*arguments) if problem_of else ""
    if isinstance(problem, str):
        return
    for tile in hopper.candidates(problem, device):
        yield Candidate(tile.name, _with(getattr(hopper, name), tile), hopper.estimate_us(problem, tile, device))


def _convolution(
    call: Callable[..., Any], arguments: Sequence[Any], device: Device, *, addend: Any = None, groups: int = 1
) -> Iterator[Candidate]:
    """arguments: x or its sources, weight, bias, stride, padding, dilation."""
    given, weight, bias, stride, padding, dilation = arguments
    sources = (given,) if isinstance(given, torch.Tensor) else tuple(given)
    batch, _, height, width = sources[0].shape
    channels = sum(s.shape[1] for s in sources)
    shape = convolution.Shape(
        batch, channels, height, width, weight.shape[0], tuple(weight.shape[2:]), tuple(stride), tuple(padding),
        len(sources),
    )  # fmt: skip
    tensors = sources, weight, bias, addend, stride, padding, dilation, groups
    unfit = convolution.unfit(*tensors)  # the same for all tiles
    for parameters in convolution.candidates(shape, weight.itemsize, device):
        tiled = isinstance(parameters, convolution.Tile)
        refused = unfit if tiled else convolution.supports(*tensors, parameters)
        if not refused:
            time = convolution.estimate_us(shape, weight.itemsize, parameters, device, addend is not None)
            yield Candidate(f"conv {parameters.name}", _with(call, parameters), time)


def _conv2d(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    x, weight, bias, stride, padding, dilation, groups = list(arguments) + list(_CONV2D_DEFAULTS[len(arguments) :])
    if isinstance(padding, str):
        return
    yield from _convolution(convolution.conv2d, (x, weight, bias, stride, padding, dilation), device, groups=groups)
    yield from _hopper("conv2d", arguments, device)


_CONV2D_DEFAULTS = (None, None, None, (1, 1), (0, 0), (1, 1), 1)


def _conv2d_add(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    x, weight, bias, addend, stride, padding, dilation, groups = arguments
    given = (x, weight, bias, stride, padding, dilation)
    yield from _convolution(convolution.conv2d_add, given, device, addend=addend, groups=groups)
    yield from _product("conv2d_add")(arguments, device)


def _conv2d_cat(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    yield from _convolution(convolution.conv2d_cat, arguments, device)
    yield from _product("conv2d_cat")(arguments, device)


def _upsampling(call: Callable[..., Any]) -> Callable[[Sequence[Any], Device], Iterator[Candidate]]:
    def candidates(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
        x, weight, folded, bias, height, width = (*arguments, None, None)[:6]
        rows = 2 * x.shape[2] if height is None else height
        columns = 2 * x.shape[3] if width is None else width
        batch, channels, x_rows, x_columns = x.shape
        shape = upsampling.Shape(batch, channels, x_rows, x_columns, weight.shape[0], rows, columns, folded is not None)
        for parameters in upsampling.candidates(shape, x.itemsize, device):
            if not upsampling.supports(x, weight, folded, bias, height, width, parameters):
                time = upsampling.estimate_us(shape, x.itemsize, parameters, device)
                yield Candidate(f"upsample {parameters.name}", _with(call, parameters), time)

    return candidates


def _group_norm(call: Callable[..., Any]) -> Callable[[Sequence[Any], Device], Iterator[Candidate]]:
    silu = call is not group_norm.group_norm

    def candidates(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
        given, groups, weight, bias, _ = (*arguments, None, None, None)[:5]
        sources = (given,) if isinstance(given, torch.Tensor) else tuple(given)
        if len(sources) > 2:
            return
        batch, pixels = sources[0].shape[0], sources[0].shape[2:].numel()
        sizes = batch, sum(s.shape[1] for s in sources), pixels, groups
        for parameters in group_norm.candidates(*sizes, device, sources[0].itemsize):
            if not group_norm.supports(sources, groups, weight, bias, parameters=parameters):
                time = group_norm.estimate_us(*sizes, sources[0].itemsize, parameters, device, silu)
                yield Candidate(f"group_norm {_named(parameters)}", _with(call, parameters), time)

    return candidates


def _layer_norm(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    x, shape, weight, bias, _ = (*arguments, None, None, None)[:5]
    if tuple(shape) == tuple(x.shape[-1:]):
        yield from _rows(layer_norm.layer_norm, x, None, weight, bias, device)


def _add_layer_norm(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    x, residual, weight, bias, _ = arguments
    yield from _rows(layer_norm.add_layer_norm, x, residual, weight, bias, device)


def _rows(
    call: Callable[..., Any], x: torch.Tensor, residual: Any, weight: Any, bias: Any, device: Device
) -> Iterator[Candidate]:
    num_cols = x.shape[-1]
    num_rows = x.numel() // max(1, num_cols)
    for parameters in layer_norm.candidates(num_rows, num_cols, device):
        if not layer_norm.supports(x, weight, bias, parameters=parameters, residual=residual):
            time = layer_norm.estimate_us(num_rows, num_cols, x.itemsize, parameters, device, residual is not None)
            yield Candidate(f"layer_norm {_named(parameters)}", _with(call, parameters), time)


def _attention(arguments: Sequence[Any], device: Device) -> Iterator[Candidate]:
    q, k, v, mask, scale, causal = (*arguments, None, None, False)[:6]
    for form in sdpa.candidates(q, k, v, mask, device):
        time = sdpa.estimate_us(q.shape, k.shape[1], q.itemsize, form, device)
        yield Candidate(f"aten {form.name}", _with(sdpa.attention, form), time)
    if device.arch == 90:
        from .kernels.hopper import attention as hopper_attention

        for tile in hopper_attention.candidates(q, k, v, mask, scale, causal, device):
            time = hopper_attention.estimate_us(q, k, tile, device)
            yield Candidate(f"hopper flash {_named(tile)}", _with(hopper_attention.attention, tile), time)
    if attention.supports(q, k, v, mask, scale, causal):
        return
    batch, num_rows, heads, channels = q.shape
    masked = causal or mask is not None
    for blocks in attention.candidates(
        num_rows, k.shape[1], channels, q.dtype, device, heads=batch * heads, masked=masked
    ):
        time = attention.estimate_us(
            batch, num_rows, k.shape[1], heads, channels, q.itemsize, blocks, device, causal=causal
        )
        yield Candidate(f"flash {_named(blocks)}", _with(attention.attention, blocks), time)


OPERATORS: dict[Any, Operator] = {
    aten.linear.default: Operator(_product("linear"), 3),
    ops.linear_add: Operator(_product("linear_add"), 4),
    ops.geglu_linear: Operator(_product("geglu_linear"), 4),
    aten.conv2d.default: Operator(_conv2d, 7),
    ops.conv2d_add: Operator(_conv2d_add, 8),
    ops.conv2d_cat: Operator(_conv2d_cat, 6),
    ops.upsample_conv: Operator(_upsampling(upsampling.upsample_conv), 6),
    ops.upsample_conv_folded: Operator(_upsampling(upsampling.upsample_conv_folded), 6),
    aten.group_norm.default: Operator(_group_norm(group_norm.group_norm), 5, group_norm.is_laid_out),
    ops.group_norm_silu: Operator(_group_norm(group_norm.group_norm_silu), 5, group_norm.is_laid_out),
    ops.group_norm_silu_cat: Operator(_group_norm(group_norm.group_norm_silu_cat), 5),
    aten.layer_norm.default: Operator(_layer_norm, 5, torch.Tensor.is_contiguous),
    ops.add_layer_norm: Operator(_add_layer_norm, 5),
    ops.attention: Operator(_attention, 6),
}
"""The operators for which there is a choice; all others run as ATen has them."""
