"""What each operator of a graph becomes in OpenVINO.

An entry takes the translator `t` and the call's arguments under their schema names (`self` as `x`): tensors are
ov.Outputs, sizes ints or i64 scalars.  It returns a node, an output, or a list of them for operators with several
results.  Entries swallow arguments that have no bearing on inference in `**_`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import openvino.opset15 as op

from ...graph import arguments, aten, evaluate, is_call, is_tensor, spec

if TYPE_CHECKING:
    from .translate import Translator

Entry = Callable[..., Any]
TABLE: dict[str, Entry] = {}

BF16, F32, I32, I64, BOOL = ov.Type.bf16, ov.Type.f32, ov.Type.i32, ov.Type.i64, ov.Type.boolean
FLOATS = (BF16, F32)
INT_MAX = 2**63 - 1


class Unsupported(Exception):
    """Why a call cannot be translated."""


def translates(*names: str) -> Callable[[Entry], Entry]:
    """Register an entry for operators by name; "aten." is understood."""

    def register(entry: Entry) -> Entry:
        for name in names:
            TABLE[name if name.startswith(("operator.", "allaprima.")) else f"aten.{name}"] = entry
        return entry

    return register


def rank(x: Any) -> int:
    return len(x.get_partial_shape())


def axis_of(dim: int, x: Any) -> int:
    return dim % max(rank(x), 1)


def axes_of(dims: int | Sequence[int] | None, x: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(rank(x)))
    return [axis_of(d, x) for d in ([dims] if isinstance(dims, int) else dims)]


def pair(values: int | Sequence[int], count: int = 2) -> list[int]:
    """A stride, padding or kernel size for each spatial axis."""
    given = [values] if isinstance(values, int) else list(values)
    return given * count if len(given) == 1 else given


# ---- the same, and casts -------------------------------------------------------------------------------------------


@translates("contiguous.default", "clone.default", "alias.default", "detach.default", "lift_fresh_copy.default",
            "dropout.default", "feature_dropout.default", "alpha_dropout.default")  # fmt: skip
def _same(t: Translator, x: Any = None, input: Any = None, train: bool = False, **_: Any) -> Any:
    if train:
        raise Unsupported("dropout in training mode")
    return input if x is None else x


@translates("to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy.default", "type_as.default")
def _to(t: Translator, x: Any, **_: Any) -> Any:
    source = x.get_element_type()
    if t.dtype in (I32, I64) and source in FLOATS:
        # PyTorch cuts towards zero; so does Convert.
        return op.convert(x, t.dtype.to_string())
    if t.dtype == BOOL and source != BOOL:
        return op.not_equal(x, t.constant(0, source))
    return t.cast(x, t.dtype)


@translates("operator.getitem")
def _getitem(t: Translator, a: list[Any], b: int) -> Any:
    return a[b]


# ---- one tensor ----------------------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Any], Any]] = {
    "sin": op.sin, "cos": op.cos, "tan": op.tan, "exp": op.exp, "log": op.log, "sqrt": op.sqrt, "abs": op.abs,
    "neg": op.negative, "erf": op.erf, "floor": op.floor, "ceil": op.ceiling, "sign": op.sign, "tanh": op.tanh,
    "sigmoid": op.sigmoid, "relu": op.relu, "mish": op.mish, "hardswish": op.hswish,
    "isnan": op.is_nan, "isinf": op.is_inf,
}  # fmt: skip


def _unary(function: Callable[[Any], Any]) -> Entry:
    def entry(t: Translator, x: Any, **_: Any) -> Any:
        return function(t.cast(x, t.dtype) if t.dtype in FLOATS else x)

    return entry


for _name, _function in _UNARY.items():
    TABLE[f"aten.{_name}.default"] = _unary(_function)


@translates("round.default")
def _round(t: Translator, x: Any) -> Any:
    return op.round(x, "half_to_even")


@translates("rsqrt.default")
def _rsqrt(t: Translator, x: Any) -> Any:
    return op.divide(t.constant(1.0), op.sqrt(t.cast(x, t.dtype)))


@translates("reciprocal.default")
def _reciprocal(t: Translator, x: Any) -> Any:
    return op.divide(t.constant(1.0), t.cast(x, t.dtype))


@translates("square.default")
def _square(t: Translator, x: Any) -> Any:
    return op.multiply(x, x)


@translates("gelu.default")
def _gelu(t: Translator, x: Any, approximate: str = "none") -> Any:
    return op.gelu(x, "TANH" if approximate == "tanh" else "ERF")


@translates("leaky_relu.default")
def _leaky_relu(t: Translator, x: Any, negative_slope: float = 0.01) -> Any:
    return op.prelu(x, t.constant([negative_slope]))


@translates("elu.default")
def _elu(t: Translator, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    if (scale, input_scale) != (1.0, 1.0):
        raise Unsupported("elu with scales")
    return op.elu(x, float(alpha))


@translates("softplus.default")
def _softplus(t: Translator, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    if beta != 1:
        raise Unsupported("softplus with a beta")
    return op.softplus(x)


@translates("clamp.default", "hardtanh.default", "clamp_min.default", "clamp_max.default",
            "relu6.default")  # fmt: skip
def _clamp(t: Translator, x: Any, min: Any = None, max: Any = None, **bounds: Any) -> Any:
    low, high = bounds.get("min_val", min), bounds.get("max_val", max)
    if t.node.target.__name__.startswith("relu6"):  # type: ignore[union-attr]
        low, high = 0, 6
    x = t.cast(x, t.dtype)
    x = x if low is None else op.maximum(x, t.cast(low, t.dtype))
    return x if high is None else op.minimum(x, t.cast(high, t.dtype))


@translates("logical_not.default", "bitwise_not.default")
def _not(t: Translator, x: Any) -> Any:
    if t.dtype != BOOL:
        return op.bitwise_not(x)
    return op.logical_not(_bool(t, x))


def _bool(t: Translator, x: Any) -> Any:
    if isinstance(x, bool | int | float):
        return t.constant(bool(x), BOOL)
    kind = x.get_element_type()
    return x if kind == BOOL else op.not_equal(x, t.constant(0, kind)).output(0)


# ---- two tensors ---------------------------------------------------------------------------------------------------


def _is_per_channel(node: Any) -> bool:
    """Whether a call combines [B, C, H, W] with [B or 1, C, 1, 1]."""
    pictures, vector = (tuple(v.meta["spec"].shape) if is_tensor(v) else () for v in node.args[:2])
    return len(pictures) == len(vector) == 4 and pictures[1] == vector[1] and vector[2:] == (1, 1) != pictures[2:]


def _per_channel(t: Translator, function: Callable[..., Any], pictures: Any, vector: Any) -> Any:
    """As [B, C, pixels]: in four dimensions OpenVINO works row by row, which is slow where rows are short."""
    shape = t.spec.shape
    flat = t.ints([0, 0, -1])
    found = function(op.reshape(pictures, flat, True), op.reshape(vector, flat, True))
    return t.reshape(found.output(0), (*shape[:2], ""), shape)


def _arithmetic(function: Callable[..., Any]) -> Entry:
    def entry(t: Translator, x: Any, other: Any, alpha: Any = 1, **_: Any) -> Any:
        dtype = t.dtype
        other = t.cast(other, dtype)
        if alpha != 1:
            other = op.multiply(other, t.constant(alpha))
        x = t.cast(x, dtype)
        return _per_channel(t, function, x, other) if _is_per_channel(t.node) else function(x, other)

    return entry


for _name, _function in {"add": op.add, "sub": op.subtract, "mul": op.multiply}.items():
    TABLE[f"aten.{_name}.Tensor"] = TABLE[f"aten.{_name}.Scalar"] = _arithmetic(_function)
TABLE["aten.maximum.default"] = _arithmetic(op.maximum)
TABLE["aten.minimum.default"] = _arithmetic(op.minimum)


@translates("rsub.Scalar", "rsub.Tensor")
def _rsub(t: Translator, x: Any, other: Any, alpha: Any = 1) -> Any:
    return _arithmetic(op.subtract)(t, other, op.multiply(t.cast(x, t.dtype), t.constant(alpha)).output(0))


@translates("div.Tensor", "div.Scalar", "true_divide.Tensor", "div.Tensor_mode", "div.Scalar_mode")
def _div(t: Translator, x: Any, other: Any, rounding_mode: str | None = None) -> Any:
    dtype = t.dtype
    if rounding_mode is None or dtype in FLOATS:
        quotient = op.divide(t.cast(x, dtype), t.cast(other, dtype))
        if rounding_mode is not None:
            quotient = op.floor(quotient) if rounding_mode == "floor" else _truncate(quotient)
        return t.cast(quotient.output(0), dtype)
    if rounding_mode == "trunc":
        raise Unsupported("whole-number division towards zero")
    return _floor_divide(t, x, other)


def _truncate(x: Any) -> Any:
    return op.multiply(op.sign(x), op.floor(op.abs(x)))


@translates("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(t: Translator, x: Any, other: Any) -> Any:
    x, other = t.cast(x, t.dtype), t.cast(other, t.dtype)
    if t.dtype in FLOATS:
        return op.floor(op.divide(x, other))
    return op.divide(op.subtract(x, op.floor_mod(x, other)), other)


@translates("remainder.Scalar", "remainder.Tensor")
def _remainder(t: Translator, x: Any, other: Any) -> Any:
    return op.floor_mod(t.cast(x, t.dtype), t.cast(other, t.dtype))


@translates("pow.Tensor_Scalar", "pow.Tensor_Tensor")
def _pow(t: Translator, x: Any, exponent: Any) -> Any:
    x = t.cast(x, t.dtype)
    if exponent == 2 and not hasattr(exponent, "get_element_type"):
        return op.multiply(x, x)
    return op.power(x, t.cast(exponent, t.dtype))


@translates("pow.Scalar")
def _scalar_pow(t: Translator, x: Any, exponent: Any) -> Any:
    return op.power(t.cast(x, t.dtype), t.cast(exponent, t.dtype))


_COMPARISONS = {"eq": op.equal, "ne": op.not_equal, "lt": op.less, "le": op.less_equal, "gt": op.greater,
                "ge": op.greater_equal}  # fmt: skip
_RANKING = (BOOL, ov.Type.u8, I32, I64, BF16, F32)


def _comparison(function: Callable[..., Any]) -> Entry:
    def entry(t: Translator, x: Any, other: Any) -> Any:
        kinds = [v.get_element_type() for v in (x, other) if hasattr(v, "get_element_type")]
        if isinstance(other, float) and not any(k in FLOATS for k in kinds):
            kinds.append(F32)
        kind = max(kinds, key=_RANKING.index)
        return function(t.cast(x, kind), t.cast(other, kind))

    return entry


for _name, _function in _COMPARISONS.items():
    TABLE[f"aten.{_name}.Tensor"] = TABLE[f"aten.{_name}.Scalar"] = _comparison(_function)


def _logical(on_bools: Callable[..., Any], on_ints: Callable[..., Any]) -> Entry:
    def entry(t: Translator, x: Any, other: Any) -> Any:
        if t.dtype == BOOL:
            return on_bools(_bool(t, x), _bool(t, other))
        return on_ints(t.cast(x, t.dtype), t.cast(other, t.dtype))

    return entry


for _name, _function, _ints in (("and", op.logical_and, op.bitwise_and), ("or", op.logical_or, op.bitwise_or),
                                ("xor", op.logical_xor, op.bitwise_xor)):  # fmt: skip
    _entry = _logical(_function, _ints)
    for _form in (f"__{_name}__", f"bitwise_{_name}"):
        TABLE[f"aten.{_form}.Tensor"] = TABLE[f"aten.{_form}.Scalar"] = _entry
    TABLE[f"aten.logical_{_name}.default"] = _entry


@translates("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(t: Translator, condition: Any, x: Any, other: Any) -> Any:
    return op.select(_bool(t, condition), t.cast(x, t.dtype), t.cast(other, t.dtype))


@translates("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(t: Translator, x: Any, mask: Any, value: Any) -> Any:
    return op.select(_bool(t, mask), t.cast(value, t.dtype), x)


@translates("addcmul.default")
def _addcmul(t: Translator, x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
    return op.add(x, op.multiply(op.multiply(tensor1, tensor2), t.constant(value)))


@translates("addcdiv.default")
def _addcdiv(t: Translator, x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
    return op.add(x, op.multiply(op.divide(tensor1, tensor2), t.constant(value)))


@translates("lerp.Scalar", "lerp.Tensor")
def _lerp(t: Translator, x: Any, end: Any, weight: Any) -> Any:
    return op.add(x, op.multiply(op.subtract(end, x), t.cast(weight, t.dtype)))


# ---- reductions ----------------------------------------------------------------------------------------------------


def _reduction(function: Callable[..., Any]) -> Entry:
    def entry(t: Translator, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        axes = axes_of(dim, x)
        x = _bool(t, x) if t.dtype == BOOL else t.cast(x, t.dtype)
        return function(x, t.ints(axes), keepdim) if axes else x

    return entry


for _names, _function in (
    (("mean.default", "mean.dim"), op.reduce_mean), (("sum.default", "sum.dim_IntList"), op.reduce_sum),
    (("max.default", "amax.default"), op.reduce_max), (("min.default", "amin.default"), op.reduce_min),
    (("prod.default", "prod.dim_int"), op.reduce_prod),
    (("any.default", "any.dim", "any.dims"), op.reduce_logical_or),
    (("all.default", "all.dim", "all.dims"), op.reduce_logical_and),
):  # fmt: skip
    translates(*_names)(_reduction(_function))


@translates("var.correction", "std.correction", "var.dim", "std.dim", "var.default", "std.default")
def _var(t: Translator, x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False,
         unbiased: bool = True) -> Any:  # fmt: skip
    axes = t.ints(axes_of(dim, x))
    away = 1 if correction is None and unbiased else correction or 0
    centred = op.subtract(x, op.reduce_mean(x, axes, True))
    total = op.reduce_sum(op.multiply(centred, centred), axes, keepdim)
    count = op.reduce_prod(op.gather(op.shape_of(x), axes, t.constant(0, I64)), t.ints([0]), False)
    found = op.divide(total, op.subtract(t.cast(count.output(0), t.dtype), t.constant(float(away))))
    return op.sqrt(found) if "std" in str(t.node.target) else found


@translates("logsumexp.default")
def _logsumexp(t: Translator, x: Any, dim: Any, keepdim: bool = False) -> Any:
    axes = t.ints(axes_of(dim, x))
    top = op.reduce_max(x, axes, True)
    total = op.log(op.reduce_sum(op.exp(op.subtract(x, top)), axes, True))
    found = op.add(total, top)
    return found if keepdim else op.squeeze(found, axes)


@translates("argmax.default", "argmin.default")
def _argmax(t: Translator, x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    mode = "max" if "argmax" in str(t.node.target) else "min"
    before = rank(x)
    if dim is None:
        x, dim = op.reshape(x, t.ints([-1]), False).output(0), 0
    index = _extreme(t, x, dim, mode)[1]
    if keepdim:
        return index if rank(x) == before else op.reshape(index, t.ints([1] * before), False)
    return op.squeeze(index, t.ints([axis_of(dim, x)]))


@translates("max.dim", "min.dim")
def _max_dim(t: Translator, x: Any, dim: int, keepdim: bool = False) -> list[Any]:
    found = _extreme(t, x, dim, "max" if str(t.node.target).startswith("aten.max") else "min")
    return found if keepdim else [op.squeeze(v, t.ints([axis_of(dim, x)])) for v in found]


def _extreme(t: Translator, x: Any, dim: int, mode: str) -> list[Any]:
    """Largest (smallest) value along an axis and the index of its first occurrence, axis kept.

    TopK does not say which of several equal values it finds, so the index is searched for.
    """
    axis = axis_of(dim, x)
    axes = t.ints([axis])
    best = (op.reduce_max if mode == "max" else op.reduce_min)(x, axes, True)
    length = op.squeeze(op.gather(op.shape_of(x), axes, t.constant(0, I64)), t.ints([0]))
    places = op.range(t.constant(0, I64), length, t.constant(1, I64), "i64").output(0)
    places = op.reshape(places, t.ints([-1] + [1] * (rank(x) - 1 - axis)), False)
    first = op.reduce_min(op.select(op.equal(x, best), places, op.unsqueeze(length, t.ints([0]))), axes, True)
    return [best.output(0), first.output(0)]


@translates("topk.default")
def _topk(t: Translator, x: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Any]:
    found = op.topk(x, t.cast(k, I64), axis_of(dim, x), "max" if largest else "min", "value", "i64")
    return [found.output(0), found.output(1)]


@translates("cumsum.default")
def _cumsum(t: Translator, x: Any, dim: int, **_: Any) -> Any:
    return op.cumsum(t.cast(x, t.dtype), t.constant(axis_of(dim, x), I64))


@translates("softmax.int", "_softmax.default")
def _softmax(t: Translator, x: Any, dim: int, **_: Any) -> Any:
    return op.softmax(t.cast(x, t.dtype), axis_of(dim, x))


@translates("log_softmax.int", "_log_softmax.default")
def _log_softmax(t: Translator, x: Any, dim: int, **_: Any) -> Any:
    return op.log_softmax(t.cast(x, t.dtype), axis_of(dim, x))


# ---- shapes --------------------------------------------------------------------------------------------------------


@translates("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
            "view_as.default", "reshape_as.default", "squeeze.default")  # fmt: skip
def _reshape(t: Translator, x: Any, **_: Any) -> Any:
    return t.reshape(x, t.spec_of(0).shape, t.spec.shape)


@translates("unsqueeze.default")
def _unsqueeze(t: Translator, x: Any, dim: int) -> Any:
    return op.unsqueeze(x, t.ints([dim % (rank(x) + 1)]))


@translates("squeeze.dim", "squeeze.dims")
def _squeeze(t: Translator, x: Any, dim: int | list[int]) -> Any:
    shape = t.spec_of(0).shape
    axes = [a for a in axes_of(dim, x) if shape and shape[a] == 1]
    return op.squeeze(x, t.ints(axes)) if axes else x


@translates("transpose.int", "swapaxes.default", "swapdims.default", "t.default")
def _transpose(t: Translator, x: Any, dim0: int = 0, dim1: int = 1, axis0: int | None = None,
               axis1: int | None = None) -> Any:  # fmt: skip
    order = list(range(rank(x)))
    if len(order) < 2:
        return x
    a = axis_of(dim0 if axis0 is None else axis0, x)
    b = axis_of(dim1 if axis1 is None else axis1, x)
    order[a], order[b] = order[b], order[a]
    return op.transpose(x, t.ints(order))


@translates("permute.default")
def _permute(t: Translator, x: Any, dims: list[int]) -> Any:
    return op.transpose(x, t.ints([axis_of(d, x) for d in dims]))


@translates("movedim.int", "movedim.intlist")
def _movedim(t: Translator, x: Any, source: int | list[int], destination: int | list[int]) -> Any:
    moved = dict(zip(axes_of(destination, x), axes_of(source, x), strict=True))
    rest = iter(a for a in range(rank(x)) if a not in moved.values())
    return op.transpose(x, t.ints([moved[a] if a in moved else next(rest) for a in range(rank(x))]))


@translates("expand.default", "expand_as.default", "broadcast_to.default")
def _expand(t: Translator, x: Any, **_: Any) -> Any:
    before, after = t.spec_of(0).shape, t.spec.shape
    padded = (1,) * (len(after) - len(before)) + tuple(before)
    # An axis that stays as it is needs no size: two-way broadcasting with 1 leaves it alone.
    return op.broadcast(x, t.dims([1 if a == b else a for a, b in zip(after, padded, strict=True)]),
                        broadcast_spec="BIDIRECTIONAL")  # fmt: skip


@translates("repeat.default")
def _repeat(t: Translator, x: Any, repeats: list[Any]) -> Any:
    return op.tile(x, t.dims(repeats))


@translates("cat.default", "concat.default")
def _cat(t: Translator, tensors: list[Any], dim: int = 0) -> Any:
    return op.concat([t.cast(v, t.dtype) for v in tensors], axis_of(dim, tensors[0]))


@translates("stack.default")
def _stack(t: Translator, tensors: list[Any], dim: int = 0) -> Any:
    axis = dim % (rank(tensors[0]) + 1)
    return op.concat([op.unsqueeze(t.cast(v, t.dtype), t.ints([axis])) for v in tensors], axis)


@translates("slice.Tensor")
def _slice(t: Translator, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    start = 0 if start is None else start
    end = INT_MAX if end is None else end
    if isinstance(start, int) and isinstance(end, int) and start == 0 and end >= INT_MAX and step == 1:
        return x
    if _is_read_by_columns(t.node.args[0]) and step == 1:
        start, end, _ = slice(start, end).indices(int(t.spec_of(0).shape[-1]))
        return _columns(t, t.node.args[0], start, end)
    return op.slice(x, t.dims([start]), t.dims([end]), t.ints([step]), t.ints([axis_of(dim, x)]))


@translates("narrow.default")
def _narrow(t: Translator, x: Any, dim: int, start: Any, length: Any) -> Any:
    if isinstance(start, int) and isinstance(length, int):
        end: Any = INT_MAX if start < 0 and start + length == 0 else start + length
    else:
        end = op.add(t.cast(start, I64), t.cast(length, I64)).output(0)
    return op.slice(x, t.dims([start]), t.dims([end]), t.ints([1]), t.ints([axis_of(dim, x)]))


@translates("select.int")
def _select(t: Translator, x: Any, dim: int, index: Any) -> Any:
    return op.gather(x, t.cast(index, I64), t.constant(axis_of(dim, x), I64))


@translates("chunk.default", "split.Tensor", "split_with_sizes.default", "split.sizes", "unsafe_chunk.default",
            "unsafe_split.Tensor", "tensor_split.sections")  # fmt: skip
def _split(t: Translator, x: Any, dim: int = 0, **_: Any) -> list[Any]:
    axis = axis_of(dim, x)
    sizes = [s.shape[axis] for s in t.node.meta["spec"]]
    if _is_read_by_columns(t.node.args[0]):
        stops = list(accumulate(sizes))
        return [_columns(t, t.node.args[0], stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    if all(size == sizes[0] for size in sizes):
        return list(op.split(x, t.constant(axis, I64), len(sizes)).outputs())
    return list(op.variadic_split(x, t.constant(axis, I64), t.dims(sizes)).outputs())


@translates("unbind.int")
def _unbind(t: Translator, x: Any, dim: int = 0) -> list[Any]:
    count = len(t.node.meta["spec"])
    axis = axis_of(dim, x)
    return [op.squeeze(v, t.ints([axis])) for v in op.split(x, t.constant(axis, I64), count).outputs()]


@translates("roll.default")
def _roll(t: Translator, x: Any, shifts: list[Any], dims: list[int]) -> Any:
    if dims:
        return op.roll(x, t.dims(shifts), t.ints([axis_of(d, x) for d in dims]))
    flat = op.roll(op.reshape(x, t.ints([-1]), False), t.dims(shifts), t.ints([0]))
    return op.reshape(flat, op.shape_of(x), False)


@translates("flip.default")
def _flip(t: Translator, x: Any, dims: list[int]) -> Any:
    for axis in axes_of(dims, x):
        x = op.slice(x, t.ints([-1]), t.ints([-INT_MAX]), t.ints([-1]), t.ints([axis])).output(0)
    return x


@translates("constant_pad_nd.default", "pad.default")
def _pad(t: Translator, x: Any, pad: list[Any], value: Any = None, mode: str = "constant") -> Any:
    forms = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in forms:
        raise Unsupported(f"padding in mode {mode!r}")
    begin: list[Any] = [0] * rank(x)
    end: list[Any] = [0] * rank(x)
    for i in range(len(pad) // 2):
        begin[-1 - i], end[-1 - i] = pad[2 * i], pad[2 * i + 1]
    filler = t.cast(value or 0, t.dtype) if mode == "constant" else None
    return op.pad(x, t.dims(begin), t.dims(end), forms[mode], filler)


@translates("pixel_shuffle.default")
def _pixel_shuffle(t: Translator, x: Any, upscale_factor: int) -> Any:
    return op.depth_to_space(x, "depth_first", upscale_factor)


@translates("pixel_unshuffle.default")
def _pixel_unshuffle(t: Translator, x: Any, downscale_factor: int) -> Any:
    return op.space_to_depth(x, "depth_first", downscale_factor)


@translates("diff.default")
def _diff(t: Translator, x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    axis = axis_of(dim, x)
    parts = [v for v in (prepend, x, append) if v is not None]
    x = op.concat(parts, axis) if len(parts) > 1 else x
    one, axes = t.ints([1]), t.ints([axis])
    difference = op.not_equal if t.dtype == BOOL else op.subtract
    for _ in range(n):
        later, earlier = (one, t.ints([INT_MAX])), (t.ints([0]), t.ints([-1]))
        x = difference(op.slice(x, *later, one, axes), op.slice(x, *earlier, one, axes))
    return x


# ---- making tensors ------------------------------------------------------------------------------------------------


def _filled(t: Translator, value: Any) -> Any:
    return op.broadcast(t.cast(value, t.dtype), t.dims(t.spec.shape))


@translates("full.default", "full_like.default", "new_full.default")
def _full(t: Translator, fill_value: Any, **_: Any) -> Any:
    return _filled(t, fill_value)


@translates("ones.default", "ones_like.default", "new_ones.default")
def _ones(t: Translator, **_: Any) -> Any:
    return _filled(t, 1)


@translates("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
            "new_empty.default")  # fmt: skip
def _zeros(t: Translator, **_: Any) -> Any:
    return _filled(t, 0)


@translates("scalar_tensor.default")
def _scalar_tensor(t: Translator, s: Any, **_: Any) -> Any:
    return t.cast(s, t.dtype)


@translates("arange.default", "arange.start", "arange.start_step")
def _arange(t: Translator, end: Any, start: Any = 0, step: Any = 1, **_: Any) -> Any:
    exact = F32 if any(isinstance(v, float) for v in (start, end, step)) else I64
    places = op.range(t.cast(start, exact), t.cast(end, exact), t.cast(step, exact), exact.to_string())
    return t.cast(places.output(0), t.dtype)


@translates("tril.default", "triu.default")
def _triangle(t: Translator, x: Any, diagonal: int = 0) -> Any:
    shape = t.spec.shape
    zero, one = t.constant(0, I64), t.constant(1, I64)
    rows = op.range(zero, t.cast(t.size(shape[-2]), I64), one, "i64")
    columns = op.range(zero, t.cast(t.size(shape[-1]), I64), one, "i64")
    distance = op.subtract(columns, op.unsqueeze(rows, t.ints([1])))
    compare = op.less_equal if "tril" in str(t.node.target) else op.greater_equal
    return op.select(compare(distance, t.constant(diagonal, I64)), x, t.constant(0, t.dtype))


# ---- looking up ----------------------------------------------------------------------------------------------------


@translates("embedding.default")
def _embedding(t: Translator, weight: Any, indices: Any, **_: Any) -> Any:
    return op.gather(weight, indices, t.constant(0, I64))


@translates("index_select.default")
def _index_select(t: Translator, x: Any, dim: int, index: Any) -> Any:
    return op.gather(x, index, t.constant(axis_of(dim, x), I64))


@translates("gather.default")
def _gather(t: Translator, x: Any, dim: int, index: Any, **_: Any) -> Any:
    # ATen takes the part of x that the index covers; GatherElements wants the other axes equal.
    axis, before, after = axis_of(dim, x), t.spec_of(0).shape, t.node.args[2].meta["spec"].shape  # type: ignore[union-attr]
    zero, one = t.constant(0, I64), t.constant(1, I64)
    for other in range(rank(x)):
        if other != axis and before[other] != after[other]:
            # Not a Slice: OpenVINO takes those away in front of GatherElements and then refuses the shapes.
            kept = op.range(zero, t.cast(t.size(after[other]), I64), one, "i64")
            x = op.gather(x, kept, t.constant(other, I64)).output(0)
    return op.gather_elements(x, index, axis)


@translates("index.Tensor", "_unsafe_index.Tensor")
def _index(t: Translator, x: Any, indices: list[Any]) -> Any:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(index.get_element_type() in (BOOL, ov.Type.u8) for _, index in given):
        raise Unsupported("indexing by a mask: the result's size depends on the data")
    axes = [axis for axis, _ in given]
    if len(given) == 1:
        return op.gather(x, given[0][1], t.constant(axes[0], I64))
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise Unsupported("indexing by tensors that are not next to each other")
    block = max(rank(index) for _, index in given)
    rest = [a for a in range(rank(x)) if a not in axes]
    shape = op.shape_of(x).output(0)
    if axes[0]:
        x = op.transpose(x, t.ints(axes + rest)).output(0)
    together = given[0][1]
    for _, index in given[1:]:
        together = op.add(together, op.multiply(index, t.constant(0, index.get_element_type()))).output(0)
    columns = []
    for axis, index in given:
        length = op.gather(shape, t.constant(axis, I64), t.constant(0, I64)).output(0)
        length = t.cast(length, index.get_element_type())
        counted = op.floor_mod(op.broadcast(index, op.shape_of(together), broadcast_spec="BIDIRECTIONAL"), length)
        columns.append(op.unsqueeze(t.cast(counted.output(0), I64), t.ints([block])))
    found = op.gather_nd(x, op.concat(columns, block))
    if not axes[0]:
        return found
    lead = list(range(block, block + axes[0]))
    tail = list(range(block + axes[0], block + len(rest)))
    return op.transpose(found, t.ints(lead + list(range(block)) + tail))


# ---- matrices ------------------------------------------------------------------------------------------------------


@translates("linear.default")
def _linear(t: Translator, input: Any, weight: Any, bias: Any = None) -> Any:
    product = op.matmul(input, weight, False, True)
    return product if bias is None else op.add(product, bias)


_COLUMN_READERS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)


def _is_read_by_columns(x: Any) -> bool:
    """Whether a value is a linear of which only ranges of columns are read: the halves of a gated MLP, or queries, keys
    and values.  Then each range becomes a product with its rows of the weight: nothing is copied out afterwards, and
    an activation of a range is fused into its product."""
    if not is_call(x, aten.linear.default) or x.args[1].op != "placeholder":
        return False
    last = (-1, len(spec(x).shape) - 1)
    return all(is_call(u, *_COLUMN_READERS) and arguments(u)["dim"] in last for u in x.users)


def _columns(t: Translator, linear: Any, start: int, stop: int) -> Any:
    named = arguments(linear)
    bias = named["bias"]
    rows = None if bias is None else t.rows(bias, start, stop)
    return _linear(t, t.values[named["input"]], t.rows(named["weight"], start, stop), rows)


@translates("matmul.default", "mm.default", "bmm.default")
def _matmul(t: Translator, x: Any, other: Any = None, mat2: Any = None) -> Any:
    return op.matmul(x, other if mat2 is None else mat2, False, False)


@translates("addmm.default", "baddbmm.default")
def _addmm(t: Translator, x: Any, beta: Any = 1, alpha: Any = 1, **matrices: Any) -> Any:
    a, b = matrices.get("mat1", matrices.get("batch1")), matrices.get("mat2", matrices.get("batch2"))
    product = op.matmul(a, b, False, False)
    product = product if alpha == 1 else op.multiply(product, t.constant(alpha))
    if beta == 0:
        return product
    return op.add(product, x if beta == 1 else op.multiply(x, t.constant(beta)))


@translates("einsum.default")
def _einsum(t: Translator, equation: str, tensors: list[Any], **_: Any) -> Any:
    return op.einsum(tensors, equation.replace(" ", ""))


@translates("scaled_dot_product_attention.default")
def _attention(t: Translator, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Any:  # fmt: skip
    """[B, H, N, D]."""
    if dropout_p:
        raise Unsupported("attention with dropout")
    if enable_gqa:
        key, value = (_repeat_heads(t, x, t.spec_of(0).shape[-3], t.spec_of(1).shape[-3]) for x in (key, value))
    query = op.multiply(query, _scale(t, scale)).output(0)
    if attn_mask is None and not is_causal:
        key, value, attn_mask = _whole_blocks(t, key, value, -2)
    return _attend(t, query, key, value, attn_mask, is_causal)


@translates("allaprima.ops.attention")
def _attention_rows_first(t: Translator, q: Any, k: Any, v: Any, mask: Any, scale: float | None, causal: bool) -> Any:
    """[B, N, H, D].  Scaled before the transpose, so that OpenVINO takes the transpose into its attention kernel."""
    q = op.multiply(q, _scale(t, scale)).output(0)
    if mask is None and not causal:
        k, v, mask = _whole_blocks(t, k, v, 1)
    order = t.ints([0, 2, 1, 3])
    q, k, v = (op.transpose(x, order) for x in (q, k, v))
    return op.transpose(_attend(t, q, k, v, mask, causal), order)


def _scale(t: Translator, scale: float | None) -> Any:
    channels = t.spec_of(0).shape[-1]
    if scale is None and isinstance(channels, str):
        return op.power(t.cast(t.size(channels), t.dtype), t.constant(-0.5))
    return t.constant(channels**-0.5 if scale is None else float(scale))  # type: ignore[operator]


def _whole_blocks(t: Translator, k: Any, v: Any, axis: int) -> tuple[Any, Any, Any]:
    """For cross-attention: keys and values filled up to a multiple of 16 rows, and the mask that hides the filling.

    77 rows of text take 1.7 times as long as 80 where their number is not known in advance.  Self-attention has many
    rows, of which mostly a multiple of 16: there the mask would cost more than it saves.
    """
    rows, queries = t.spec_of(1).shape[axis], t.spec_of(0).shape[axis]
    if isinstance(rows, int) or rows == queries or t.dtype not in FLOATS:
        return k, v, None
    missing = f"15 - Mod(({rows}) + 15, 16)"

    def hiding() -> Any:
        zero, one, end = t.constant(0, I64), t.constant(1, I64), t.size(f"({rows}) + {missing}")
        seen = op.less(op.range(zero, end, one, "i64"), t.size(rows))
        return op.reshape(op.select(seen, t.constant(0.0), t.constant(-np.inf)), t.ints([1, 1, 1, -1]), False).output(0)

    begin, end = [0] * rank(k), [0] * rank(k)
    end[axis] = t.size(missing)
    filled = (op.pad(x, t.ints(begin), t.dims(end), "constant", t.constant(0.0)) for x in (k, v))
    return (*filled, t.once(("hiding", rows, t.dtype.to_string()), hiding))


def _repeat_heads(t: Translator, x: Any, heads: Any, kv_heads: Any) -> Any:
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise Unsupported("grouped-query attention with a symbolic number of heads")
    order = t.ints([h * kv_heads // heads for h in range(heads)])
    return op.gather(x, order, t.constant(rank(x) - 3, I64)).output(0)


def _attend(t: Translator, q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
    """softmax(q·kᵀ + mask)·v, heads first.  A row that a boolean mask hides altogether yields zeros, as in ATen."""
    scores = op.matmul(q, k, False, True)
    if causal:
        size = op.shape_of(scores)
        zero, one = t.constant(0, I64), t.constant(1, I64)
        last = rank(scores.output(0)) - 1
        lengths = (op.gather(size, t.constant(axis, I64), zero) for axis in (last - 1, last))
        rows, columns = (op.range(zero, length, one, "i64") for length in lengths)
        mask = op.less_equal(columns, op.unsqueeze(rows, t.ints([1]))).output(0)
    if mask is None:
        return op.matmul(op.softmax(scores, -1), v, False, False)
    boolean = mask.get_element_type() == BOOL
    added = op.select(mask, t.constant(0.0), t.constant(-np.inf)) if boolean else mask
    found = op.matmul(op.softmax(op.add(scores, added), -1), v, False, False)
    if causal or not boolean:
        return found
    return op.select(op.reduce_logical_or(mask, t.ints([-1]), True), found, t.constant(0.0))


# ---- convolutions and norms ----------------------------------------------------------------------------------------


@translates("conv2d.default", "conv1d.default", "conv3d.default", "conv2d.padding", "conv1d.padding")
def _conv(t: Translator, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> Any:  # fmt: skip
    spatial = rank(input) - 2
    if isinstance(padding, str):
        kernel = t.spec_of(1).shape[2:]
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(pair(dilation, spatial), kernel, strict=True)]  # type: ignore[operator]
        begin = [n // 2 for n in total]
        end = [n - n // 2 for n in total]
    else:
        begin = end = pair(padding, spatial)
    geometry = (pair(stride, spatial), begin, end, pair(dilation, spatial))
    if groups == 1:
        product = op.convolution(input, weight, *geometry)
    else:
        shape = t.spec_of(1).shape
        grouped = op.reshape(weight, t.ints([groups, shape[0] // groups, *shape[1:]]), False)  # type: ignore[operator, list-item]
        product = op.group_convolution(input, grouped, *geometry)
    return product if bias is None else op.add(product, _channels(t, bias, spatial))


def _channels(t: Translator, vector: Any, spatial: int) -> Any:
    """[C] as [1, C, 1, …]."""
    return op.reshape(vector, t.ints([1, -1] + [1] * spatial), False)


@translates("convolution.default")
def _convolution(t: Translator, transposed: bool, output_padding: Any, **arguments: Any) -> Any:
    if transposed:
        return _conv_transpose(t, output_padding=output_padding, **arguments)
    return _conv(t, **arguments)


@translates("conv_transpose2d.input", "conv_transpose1d.default")
def _conv_transpose(t: Translator, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:  # fmt: skip
    spatial = rank(input) - 2
    if groups != 1:
        raise Unsupported("grouped transposed convolution")
    around = pair(padding, spatial)
    product = op.convolution_backprop_data(input, weight, pair(stride, spatial), None, around, around,
                                           pair(dilation, spatial), None, pair(output_padding, spatial))  # fmt: skip
    return product if bias is None else op.add(product, _channels(t, bias, spatial))


@translates("group_norm.default")
def _group_norm(t: Translator, input: Any, num_groups: int, weight: Any = None, bias: Any = None,
                eps: float = 1e-5, **_: Any) -> Any:  # fmt: skip
    return _norm_groups(t, input, num_groups, weight, bias, eps, silu=_is_activated(t.node))


def _norm_groups(t: Translator, x: Any, groups: int, weight: Any, bias: Any, eps: float, silu: bool) -> Any:
    """[B, C, pixels] throughout: OpenVINO's own GroupNormalization scales in four dimensions row by row, which costs
    ten times more where rows are short."""
    shape = t.spec.shape
    if not isinstance(shape[1], int):
        raise Unsupported("group_norm over a symbolic number of channels")
    normal: Any = op.mvn(op.reshape(x, t.ints([0, groups, -1]), True), t.ints([2]), True, eps, "inside_sqrt")
    normal = op.reshape(normal, t.ints([0, shape[1], -1]), True)
    normal = normal if weight is None else op.multiply(normal, _channels(t, weight, 1))
    normal = normal if bias is None else op.add(normal, _channels(t, bias, 1))
    normal = op.swish(normal, t.constant(1.0)) if silu else normal
    return t.reshape(normal.output(0), (*shape[:2], ""), shape)


def _is_activated(norm: Any) -> bool:
    """Whether a group_norm is read by a SiLU only: then it is applied to the flat form, in the same pass."""
    return len(norm.users) == 1 and next(iter(norm.users)).target is aten.silu.default


@translates("silu.default")
def _silu(t: Translator, x: Any) -> Any:
    done = is_call(t.node.args[0], aten.group_norm.default) and _is_activated(t.node.args[0])
    return x if done else op.swish(x, t.constant(1.0))


@translates("layer_norm.default")
def _layer_norm(t: Translator, input: Any, normalized_shape: list[int], weight: Any = None, bias: Any = None,
                eps: float = 1e-5, **_: Any) -> Any:  # fmt: skip
    axes = list(range(rank(input) - len(normalized_shape), rank(input)))
    found = op.mvn(input, t.ints(axes), True, eps, "inside_sqrt")
    found = found if weight is None else op.multiply(found, weight)
    return found if bias is None else op.add(found, bias)


@translates("native_group_norm.default")
def _native_group_norm(t: Translator, input: Any, weight: Any, bias: Any, group: int, eps: float,
                       **_: Any) -> list[Any]:  # fmt: skip
    return [_norm_groups(t, input, group, weight, bias, eps, silu=False)]


@translates("native_layer_norm.default")
def _native_layer_norm(t: Translator, **arguments: Any) -> list[Any]:
    """Its second and third results (mean and reciprocal deviation) serve the backward pass only."""
    return [_layer_norm(t, **arguments)]


@translates("_native_batch_norm_legit_no_training.default")
def _native_batch_norm(t: Translator, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
                       eps: float, **_: Any) -> list[Any]:  # fmt: skip
    return [_batch_norm(t, input, weight, bias, running_mean, running_var, False, eps)]


@translates("rms_norm.default")
def _rms_norm(t: Translator, input: Any, normalized_shape: list[int], weight: Any = None,
              eps: float | None = None) -> Any:  # fmt: skip
    axes = t.ints(list(range(rank(input) - len(normalized_shape), rank(input))))
    mean = op.reduce_mean(op.multiply(input, input), axes, True)
    eps = float(np.finfo(np.float32).eps) if eps is None else eps
    found = op.divide(input, op.sqrt(op.add(mean, t.constant(eps))))
    return found if weight is None else op.multiply(found, weight)


@translates("batch_norm.default")
def _batch_norm(t: Translator, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
                training: bool, eps: float, **_: Any) -> Any:  # fmt: skip
    if training or running_mean is None:
        raise Unsupported("batch_norm with the batch's own statistics")
    channels = t.spec_of(0).shape[1]
    scale = op.constant(np.ones(channels, np.float32), dtype=t.dtype) if weight is None else weight  # type: ignore[arg-type]
    shift = op.constant(np.zeros(channels, np.float32), dtype=t.dtype) if bias is None else bias  # type: ignore[arg-type]
    return op.batch_norm_inference(input, scale, shift, running_mean, running_var, eps)


@translates("max_pool2d_with_indices.default")
def _max_pool_with_indices(t: Translator, **arguments: Any) -> list[Any]:
    return [_max_pool(t, **arguments)]


@translates("max_pool2d.default", "max_pool1d.default")
def _max_pool(t: Translator, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
              ceil_mode: bool = False) -> Any:  # fmt: skip
    spatial = rank(x) - 2
    around = pair(padding, spatial)
    return op.max_pool(x, pair(stride or kernel_size, spatial), pair(dilation, spatial), around, around,
                       pair(kernel_size, spatial), "ceil_torch" if ceil_mode else "floor").output(0)  # fmt: skip


@translates("avg_pool2d.default", "avg_pool1d.default")
def _avg_pool(t: Translator, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
              count_include_pad: bool = True, divisor_override: int | None = None) -> Any:  # fmt: skip
    if divisor_override is not None:
        raise Unsupported("avg_pool with another divisor")
    spatial = rank(x) - 2
    around = pair(padding, spatial)
    return op.avg_pool(x, pair(stride or kernel_size, spatial), around, around, pair(kernel_size, spatial),
                       not count_include_pad, "ceil_torch" if ceil_mode else "floor")  # fmt: skip


@translates("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def _adaptive_avg_pool(t: Translator, x: Any, output_size: list[Any]) -> Any:
    spatial = len(output_size)
    if all(size == 1 for size in output_size if isinstance(size, int)):
        return op.reduce_mean(x, t.ints(list(range(rank(x) - spatial, rank(x)))), True)
    if rank(x) != spatial + 2:
        raise Unsupported("adaptive_avg_pool without a batch axis")
    return op.adaptive_avg_pool(x, t.dims(output_size))


@translates("upsample_nearest2d.vec", "upsample_nearest2d.default", "upsample_nearest1d.vec")
def _upsample_nearest(t: Translator, output_size: Any = None, scale_factors: Any = None, x: Any = None,
                      input: Any = None, **_: Any) -> Any:  # fmt: skip
    x = input if x is None else x
    axes = t.ints(list(range(2, rank(x))))
    if output_size is None:
        sizes, by = t.constant([float(s) for s in scale_factors], F32), "scales"
    else:
        sizes, by = t.dims(output_size), "sizes"
    return op.interpolate(x, sizes, "nearest", by, coordinate_transformation_mode="asymmetric", nearest_mode="floor",
                          axes=axes)  # fmt: skip


@translates("upsample_bilinear2d.vec")
def _upsample_bilinear(t: Translator, input: Any, output_size: Any, align_corners: bool,
                       scale_factors: Any = None) -> Any:  # fmt: skip
    if output_size is None:
        sizes, by = t.constant([float(s) for s in scale_factors], F32), "scales"
    else:
        sizes, by = t.dims(output_size), "sizes"
    corners = "align_corners" if align_corners else "pytorch_half_pixel"
    return op.interpolate(input, sizes, "linear_onnx", by, coordinate_transformation_mode=corners,
                          nearest_mode="floor", axes=t.ints([2, 3]))  # fmt: skip


# ---- allaprima's own operators: OpenVINO fuses epilogues itself, so they are written out -----------------------------


@translates("allaprima.ops.conv2d_add")
def _conv_add(t: Translator, addend: Any, x: Any, **convolution: Any) -> Any:
    return op.add(_conv(t, x, **convolution), addend)


@translates("allaprima.ops.conv2d_cat")
def _conv_cat(t: Translator, sources: list[Any], **convolution: Any) -> Any:
    return _conv(t, op.concat(sources, 1).output(0), **convolution)


@translates("allaprima.ops.linear_add")
def _linear_add(t: Translator, x: Any, weight: Any, bias: Any, addend: Any) -> Any:
    return op.add(_linear(t, x, weight, bias), addend)


@translates("allaprima.ops.geglu_linear")
def _geglu_linear(t: Translator, x: Any, weight: Any, bias: Any, approximate: str) -> Any:
    both = _linear(t, x, weight, bias).output(0)
    h, g = op.split(both, t.constant(rank(both) - 1, I64), 2).outputs()
    return op.multiply(h, _gelu(t, g, approximate))


@translates("allaprima.ops.group_norm_silu")
def _group_norm_silu(t: Translator, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
    return _norm_groups(t, x, groups, weight, bias, eps, silu=True)


@translates("allaprima.ops.group_norm_silu_cat")
def _group_norm_silu_cat(t: Translator, sources: list[Any], groups: int, weight: Any, bias: Any, eps: float) -> Any:
    return _norm_groups(t, op.concat(sources, 1), groups, weight, bias, eps, silu=True)


@translates("allaprima.ops.add_layer_norm")
def _add_layer_norm(t: Translator, x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> list[Any]:
    total = op.add(x, residual).output(0)
    return [total, _layer_norm(t, total, [0], weight, bias, eps)]


@translates("allaprima.ops.upsample_conv", "allaprima.ops.upsample_conv_folded")
def _upsample_conv(t: Translator, x: Any, weight: Any, folded: Any, bias: Any, height: Any, width: Any) -> Any:
    """The folded form needs 2.25 times fewer multiplications; its equations are in ops/upsampling.py.

    Where a target may be 2n - 1 as well as 2n, its last row (column) is computed in the plain form, which is right for
    both: from the two rows (columns) of the doubled picture that it sees.
    """
    before, after = t.spec_of(0).shape[2:], t.spec.shape[2:]
    lost = [_shortfalls(n, target) for n, target in zip(before, after, strict=True)]
    if folded is not None and all(short <= {0, 1} for short in lost):
        phases = op.convolution(x, folded, [1, 1], [1, 1], [1, 1], [1, 1])
        ends = t.dims([f"({n}) + 1" if isinstance(n, str) else n + 1 for n in after])
        both = op.depth_to_space(phases, "depth_first", 2)
        found = op.slice(both, t.ints([1, 1]), ends, t.ints([1, 1]), t.ints([2, 3]))
        for axis in (2, 3):
            if 1 in lost[axis - 2]:
                rest = op.slice(found, t.ints([0]), t.ints([-1]), t.ints([1]), t.ints([axis]))
                found = op.concat([rest, _last_line(t, x, weight, after, axis)], axis)
    else:
        large = _upsample_nearest(t, after, None, x)
        found = op.convolution(large, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    return found if bias is None else op.add(found, _channels(t, bias, 2))


def _shortfalls(size: Any, target: Any) -> set[int]:
    """By how much the target falls short of 2n, for many n that the size may be."""
    names = {n.id for text in (size, target) if isinstance(text, str) for n in ast.walk(ast.parse(text))
             if isinstance(n, ast.Name)}  # fmt: skip
    sizes = ({name: value + 3 * i for i, name in enumerate(sorted(names))} for value in range(1, 130))
    return {2 * evaluate(size, s) - evaluate(target, s) for s in sizes}


def _last_line(t: Translator, x: Any, weight: Any, after: Any, axis: int) -> Any:
    """The last row (axis 2) or column (axis 3) of the plain form, without bias."""
    length = t.cast(t.size(after[axis - 2]), I64)
    one, two = t.constant(1, I64), t.constant(2, I64)
    last = op.divide(op.subtract(length, one), two)
    # The line before the last: n - 2, or n - 1 again, or none where the target is a single line.
    exists = op.greater(length, one)
    former = op.divide(op.maximum(op.subtract(length, two), t.constant(0, I64)), two)
    lines = op.concat([op.unsqueeze(i, t.ints([0])) for i in (former, last)], 0)
    seen = op.gather(x, lines, t.constant(axis, I64))
    keep = op.concat([op.reshape(t.cast(exists.output(0), t.dtype), t.ints([1]), False), t.constant([1.0])], 0)
    seen = op.multiply(seen, op.reshape(keep, t.ints([1, 1, 2, 1] if axis == 2 else [1, 1, 1, 2]), False))
    wide = op.interpolate(seen, t.dims([after[3 - axis]]), "nearest", "sizes", axes=t.ints([5 - axis]),
                          coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    taps = op.slice(weight, t.ints([0]), t.ints([2]), t.ints([1]), t.ints([axis]))
    around = [0, 1] if axis == 2 else [1, 0]
    return op.convolution(wide, taps, [1, 1], around, around, [1, 1])
