"""Every entry of the operator table against ATen: one call each at least, then shapes that nobody thought of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx import Graph as FxGraph

pytest.importorskip("openvino")

from allaprima import ops
from allaprima.backends.openvino import OpenVinoExecutable, unsupported
from allaprima.backends.openvino.operators import TABLE
from allaprima.graph import Graph, TensorSpec, target_named

INT = torch.int64


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.5


def ints(*shape: int, high: int = 5) -> torch.Tensor:
    return torch.randint(-high, high + 1, shape)


def bools(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape).bool()


def graph_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, list[torch.Tensor], Any]:
    """A graph of one call, its inputs, and what the call returns."""
    target = target_named(name)
    expected = target(*args, **kwargs)
    fx, tensors = FxGraph(), []

    def placeholder(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            node = fx.placeholder(f"x{len(tensors)}")
            node.meta = {"spec": TensorSpec(tuple(value.shape), value.dtype), "role": "input", "source": node.name}
            return node
        return [placeholder(v) for v in value] if isinstance(value, list | tuple) else value

    read = tuple(placeholder(a) for a in args), {k: placeholder(v) for k, v in kwargs.items()}
    # fx wants all placeholders first, and they are: a call is made of its arguments only
    node = fx.call_function(target, *read)
    results = list(expected) if isinstance(expected, tuple | list) else [expected]
    specs = tuple(TensorSpec(tuple(r.shape), r.dtype) for r in results)
    if not isinstance(expected, tuple | list):
        node.meta["spec"] = specs[0]
        fx.output((node,))
    else:
        node.meta["spec"] = specs
        getitem = target_named("operator.getitem")
        kept = results[:1] if name.startswith(("aten.native_", "aten._native", "aten.max_pool2d_with")) else results
        items = []
        for i in range(len(kept)):
            items.append(fx.call_function(getitem, (node, i)))
            items[-1].meta["spec"] = specs[i]
        fx.output(tuple(items))
        results = kept
    return Graph(fx), tensors, results


def assert_close(found: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, magnitude: float = 0.0) -> None:
    """At most twice eager's error against float64, plus rounding of the output, or of the largest term where terms of
    `magnitude` in all may cancel (Higham 2002, Accuracy and Stability of Numerical Algorithms, §4.2)."""
    assert found.shape == eager.shape
    assert found.dtype == eager.dtype
    if not eager.dtype.is_floating_point:
        assert torch.equal(found, eager)
        return
    finite = eager.isfinite()
    assert torch.equal(found[~finite].nan_to_num(nan=7.0), eager[~finite].nan_to_num(nan=7.0))
    if not finite.any():
        return
    found, eager, truth = (x[finite].double() for x in (found, eager, truth))
    rounding = 2 * torch.finfo(torch.float32).eps * max(float(truth.abs().max()), magnitude)
    assert (found - truth).abs().max() <= 2 * (eager - truth).abs().max() + rounding


def widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return [widened(v) for v in value]
    return torch.float64 if value is torch.float32 else value


def check(name: str, *args: Any, magnitude: float = 0.0, **kwargs: Any) -> None:
    graph, tensors, expected = graph_of(name, args, kwargs)
    assert unsupported(graph) == []
    executable = OpenVinoExecutable(graph, dtype=torch.float32, threads=1)
    executable.bind({})
    truth = target_named(name)(*widened(args), **{k: widened(v) for k, v in kwargs.items()})
    truths = list(truth) if isinstance(truth, tuple | list) else [truth]
    for found, eager, true in zip(executable.run(tensors), expected, truths, strict=False):
        assert_close(found, eager, true, magnitude)


CASES: list[tuple[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = []


def case(names: str, *args: Callable[[], Any] | Any, **kwargs: Any) -> None:
    """`names` apart from "aten.", separated by spaces; callables make the tensors."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(made(a) for a in args), {k: made(v) for k, v in kwargs.items()}

    CASES.extend((name, make) for name in names.split())


def made(value: Any) -> Any:
    if isinstance(value, list):
        return [made(v) for v in value]
    return value() if callable(value) and not isinstance(value, torch.dtype) else value


def lazy(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


A, B, V = lazy(rand, 3, 5, 7), lazy(rand, 5, 1), lazy(positive, 3, 5, 7)
L, J, M, N = lazy(ints, 3, 5, 7), lazy(lambda: ints(5, 1).abs() + 1), lazy(bools, 3, 5, 7), lazy(bools, 5, 1)
PICTURE = lazy(rand, 2, 6, 9, 7)

case("contiguous.default clone.default alias.default detach.default lift_fresh_copy.default", A)
case("dropout.default feature_dropout.default alpha_dropout.default", A, 0.3, False)
case("to.dtype", A, torch.float32)
case("to.dtype", lazy(lambda: rand(3, 5) * 4), INT)
case("to.dtype", L, torch.float32)
case("to.dtype", L, torch.bool)
case("to.dtype", M, torch.float32)
case("to.dtype", lazy(lambda: rand(9).relu()), torch.bool)
case("to.device", L, torch.device("cpu"), torch.float32)
case("to.dtype_layout _to_copy.default", L, dtype=torch.float32)
case("to.other type_as.default", L, A)
case("sin.default cos.default tan.default exp.default abs.default neg.default erf.default floor.default ceil.default "
     "sign.default tanh.default sigmoid.default relu.default mish.default hardswish.default silu.default relu6.default "
     "gelu.default square.default softplus.default elu.default leaky_relu.default round.default hardtanh.default", A)
case("log.default sqrt.default rsqrt.default reciprocal.default", V)
case("gelu.default", A, approximate="tanh")
case("elu.default", A, 0.7)
case("leaky_relu.default", A, 0.2)
case("sin.default exp.default abs.default neg.default", L)
case("isnan.default isinf.default", lazy(lambda: torch.tensor([1.0, math.inf, -math.inf, math.nan])))
case("clamp.default", A, -0.5, 0.25)
case("clamp.default", A, None, 0.25)
case("clamp.default", L, -2, 3)
case("hardtanh.default", A, -0.5, 0.25)
case("clamp_min.default clamp_max.default", A, 0.1)
case("logical_not.default bitwise_not.default", M)
case("logical_not.default bitwise_not.default", L)
for _x, _y in ((A, B), (B, A), (A, L), (L, J)):
    case("add.Tensor sub.Tensor mul.Tensor maximum.default minimum.default eq.Tensor ne.Tensor lt.Tensor le.Tensor "
         "gt.Tensor ge.Tensor", _x, _y)
case("add.Tensor sub.Tensor", A, B, alpha=3)
case("mul.Tensor", PICTURE, lazy(rand, 1, 6, 1, 1))
case("add.Tensor", PICTURE, lazy(rand, 2, 6, 1, 1))
case("add.Tensor", PICTURE, PICTURE)
case("add.Tensor", lazy(rand, 1, 6, 9, 7), lazy(rand, 3, 6, 1, 1))
case("add.Tensor mul.Tensor", A, 2.5)
case("add.Scalar sub.Scalar mul.Scalar rsub.Scalar", A, 3)
case("add.Scalar mul.Scalar", L, 3)
case("rsub.Tensor", A, B)
case("rsub.Scalar", L, 3, 2)
case("div.Tensor true_divide.Tensor", A, lazy(positive, 5, 1))
case("div.Tensor", L, J)
case("div.Scalar", A, 3)
case("div.Tensor_mode", L, J, rounding_mode="floor")
case("div.Tensor_mode", A, lazy(positive, 5, 1), rounding_mode="floor")
case("div.Tensor_mode", A, lazy(positive, 5, 1), rounding_mode="trunc")
case("div.Scalar_mode", L, 3, rounding_mode="floor")
case("floor_divide.default remainder.Tensor", L, J)
case("floor_divide.default", A, lazy(positive, 5, 1))
case("floor_divide.Scalar remainder.Scalar", L, 3)
case("pow.Tensor_Scalar", A, 2)
case("pow.Tensor_Scalar", V, -0.5)
case("pow.Tensor_Tensor", V, B)
case("pow.Scalar", 10000.0, A)
case("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar", A, 0.25)
case("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar", L, 2)
case("gt.Scalar", L, 1.5)
case("eq.Scalar", M, 1)
case("__and__.Tensor __or__.Tensor __xor__.Tensor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor", M, N)
case("__and__.Tensor __or__.Tensor __xor__.Tensor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor", L, J)
case("__and__.Scalar __or__.Scalar __xor__.Scalar bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", L, 6)
case("logical_and.default logical_or.default logical_xor.default", M, N)
case("logical_and.default", L, A)
case("where.self", N, A, B)
case("where.ScalarSelf", N, 2.0, A)
case("where.ScalarOther", N, A, -math.inf)
case("where.Scalar", N, 1.0, 0.0)
case("masked_fill.Scalar", A, N, -math.inf)
case("masked_fill.Tensor", A, N, lazy(torch.tensor, 2.0))
case("addcmul.default addcdiv.default", A, B, lazy(positive, 3, 1, 7), value=0.5)
case("lerp.Scalar", A, A, 0.3)
case("lerp.Tensor", A, A, B)
for _keep in (False, True):
    case("mean.dim sum.dim_IntList amax.default amin.default", A, [-1, 0], _keep)
    case("sum.dim_IntList", L, [1], _keep)
    case("sum.dim_IntList", M, [1], _keep)
    case("any.dim all.dim", M, -2, _keep)
    case("any.dims all.dims", M, [0, 2], _keep)
    case("prod.dim_int", A, 1, _keep)
    case("max.dim min.dim argmax.default argmin.default", A, -2, _keep)
    case("max.dim argmax.default argmin.default", L, 1, _keep)
    case("logsumexp.default", A, [-1], _keep)
    case("var.correction std.correction", A, [1], correction=0, keepdim=_keep)
    case("var.dim std.dim", A, [0, 2], True, _keep)
case("mean.default sum.default max.default min.default prod.default var.default std.default argmax.default", A)
case("any.default all.default", M)
case("topk.default", lazy(lambda: torch.randperm(60).float().view(4, 15)), 3)
case("topk.default", lazy(lambda: torch.randperm(60).float().view(4, 15)), 2, 0, False)
case("cumsum.default", A, -1)
case("cumsum.default", L, 0)
case("cumsum.default", M, 1)
case("softmax.int log_softmax.int", A, -2)
case("_softmax.default _log_softmax.default", A, 1, False)
case("view.default reshape.default _unsafe_view.default", A, [5, -1, 3])
case("view_as.default reshape_as.default", A, lazy(rand, 7, 15))
case("flatten.using_ints", A, 1, -1)
case("unflatten.int", lazy(rand, 4, 6), -1, [2, -1])
case("unsqueeze.default", A, -1)
case("unsqueeze.default", A, 0)
case("squeeze.default", lazy(rand, 1, 3, 1, 2))
case("squeeze.dim", lazy(rand, 1, 3, 1, 2), -2)
case("squeeze.dim", lazy(rand, 1, 3, 1, 2), 1)
case("squeeze.dims", lazy(rand, 1, 3, 1, 2), [0, 2])
case("transpose.int swapaxes.default swapdims.default", A, 0, -1)
case("t.default", lazy(rand, 4, 6))
case("permute.default", A, [2, 0, -2])
case("movedim.int", A, 0, -1)
case("movedim.intlist", A, [0, 1], [-1, 0])
case("expand.default", B, [4, -1, 3])
case("expand_as.default", B, A)
case("broadcast_to.default", B, [4, 5, 3])
case("repeat.default", A, [2, 1, 3, 1])
case("cat.default concat.default", [A, lazy(rand, 3, 2, 7)], -2)
case("cat.default", [A, L], 0)
case("stack.default", [A, A], -1)
case("slice.Tensor", A, -1, 1, -2)
case("slice.Tensor", A, 1, -3)
case("slice.Tensor", A, 2, 0, 9223372036854775807, 3)
case("narrow.default", A, 1, 1, 3)
case("narrow.default", A, -1, -3, 3)
case("select.int", A, -2, -1)
case("chunk.default unsafe_chunk.default", A, 3, -1)
case("split.Tensor unsafe_split.Tensor", A, 2, 1)
case("split_with_sizes.default split.sizes", A, [1, 4], 1)
case("tensor_split.sections", A, 3, -1)
case("unbind.int", A, 1)
case("roll.default", A, [2, -1], [0, -1])
case("roll.default", A, [3])
case("flip.default", A, [0, -1])
case("constant_pad_nd.default", A, [1, 2, 0, 3], 1.5)
case("constant_pad_nd.default", A, [-1, 2])
case("pad.default", PICTURE, [1, 2, 3, 0], "reflect")
case("pad.default", PICTURE, [1, 2, 3, 0], "replicate")
case("pad.default", A, [0, 2])
case("pixel_shuffle.default", lazy(rand, 2, 8, 3, 5), 2)
case("pixel_unshuffle.default", lazy(rand, 2, 3, 4, 6), 2)
case("diff.default", L)
case("diff.default", A, 2, 1)
case("diff.default", A, 1, -1, lazy(rand, 3, 5, 1), lazy(rand, 3, 5, 2))
case("full.default", [2, 3], 1.5, dtype=torch.float32)
case("full.default", [2, 3], 4)
case("full_like.default", A, 1.5)
case("new_full.default", A, [2, 3], 7)
case("ones.default zeros.default", [2, 3], dtype=INT)
case("ones_like.default zeros_like.default", A, dtype=torch.bool)
case("new_ones.default new_zeros.default", A, [4])
case("scalar_tensor.default", 2.5)
case("arange.default", 7)
case("arange.default", 7, dtype=torch.float32)
case("arange.start", 2, 9)
case("arange.start_step", 1, 9, 3)
case("arange.start_step", 0.5, 3.0, 0.25)
case("tril.default triu.default", lazy(rand, 2, 4, 6), -1)
case("tril.default triu.default", lazy(bools, 5, 5), 1)
case("embedding.default", lazy(rand, 11, 4), lazy(lambda: torch.randint(0, 11, (2, 3))))
case("index_select.default", A, -1, lazy(lambda: torch.randint(0, 7, (4,))))
case("gather.default", A, 1, lazy(lambda: torch.randint(0, 5, (2, 4, 7))))
case("gather.default", A, -1, lazy(lambda: torch.randint(0, 7, (3, 5, 2))))
case("index.Tensor", A, [None, lazy(lambda: torch.randint(-5, 5, (2, 3)))])
case("index.Tensor _unsafe_index.Tensor", A, [lazy(lambda: torch.randint(-3, 3, (4, 1))),
                                              lazy(lambda: torch.randint(-5, 5, (6,)))])
case("index.Tensor", A, [None, lazy(lambda: torch.randint(0, 5, (4,))), lazy(lambda: torch.randint(0, 7, (2, 1)))])
case("linear.default", A, lazy(rand, 4, 7))
case("linear.default", A, lazy(rand, 4, 7), lazy(rand, 4))
case("matmul.default", A, lazy(rand, 7, 2))
case("matmul.default", A, lazy(rand, 7))
case("matmul.default", lazy(rand, 5), A)
case("mm.default", lazy(rand, 3, 4), lazy(rand, 4, 5))
case("bmm.default", A, lazy(rand, 3, 7, 2))
case("addmm.default", lazy(rand, 5), lazy(rand, 3, 4), lazy(rand, 4, 5), beta=0.5, alpha=2)
case("addmm.default", lazy(rand, 5), lazy(rand, 3, 4), lazy(rand, 4, 5))
case("baddbmm.default", lazy(rand, 3, 5, 2), A, lazy(rand, 3, 7, 2), beta=0, alpha=0.3)
case("einsum.default", "b i d, b j d -> b i j", [A, lazy(rand, 3, 2, 7)])
Q, K = lazy(rand, 2, 4, 9, 16), lazy(rand, 2, 4, 5, 16)
case("scaled_dot_product_attention.default", Q, K, K)
case("scaled_dot_product_attention.default", Q, K, K, scale=0.3)
case("scaled_dot_product_attention.default", Q, Q, Q, is_causal=True)
case("scaled_dot_product_attention.default", Q, K, K, lazy(rand, 2, 1, 9, 5))
HIDDEN_ROW = lazy(lambda: bools(2, 1, 9, 5).index_fill(2, torch.tensor(1), False))
case("scaled_dot_product_attention.default", Q, K, K, HIDDEN_ROW)
case("scaled_dot_product_attention.default", Q, lazy(rand, 2, 2, 5, 16), lazy(rand, 2, 2, 5, 16), enable_gqa=True)
case("scaled_dot_product_attention.default", lazy(rand, 9, 16), lazy(rand, 5, 16), lazy(rand, 5, 3))
KERNEL = lazy(rand, 8, 6, 3, 3)
case("conv2d.default", PICTURE, KERNEL, lazy(rand, 8), [1, 2], [1, 0], [1, 2])
case("conv2d.default", PICTURE, KERNEL)
case("conv2d.default", PICTURE, lazy(rand, 4, 3, 3, 1), None, [2], [1], [1], 2)
case("conv2d.padding", PICTURE, lazy(rand, 8, 6, 3, 2), None, [1, 1], "same")
case("conv2d.padding", PICTURE, KERNEL, None, [2, 2], "valid")
case("conv1d.default", A, lazy(rand, 4, 5, 3), lazy(rand, 4), [2], [1])
case("conv1d.padding", A, lazy(rand, 4, 5, 3), None, [1], "same")
case("conv3d.default", lazy(rand, 1, 2, 4, 5, 6), lazy(rand, 3, 2, 2, 3, 1), lazy(rand, 3))
case("conv_transpose2d.input", PICTURE, lazy(rand, 6, 4, 3, 3), lazy(rand, 4), [2, 2], [1, 1], [1, 0])
case("conv_transpose1d.default", A, lazy(rand, 5, 4, 3), None, [2], [1])
case("convolution.default", PICTURE, KERNEL, lazy(rand, 8), [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
case("convolution.default", PICTURE, lazy(rand, 6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1)
case("group_norm.default", PICTURE, 3, lazy(rand, 6), lazy(rand, 6), 1e-6)
case("group_norm.default", lazy(rand, 2, 6, 11), 2)
case("native_group_norm.default", PICTURE, lazy(rand, 6), lazy(rand, 6), 2, 6, 63, 3, 1e-5)
case("layer_norm.default", A, [7], lazy(rand, 7), lazy(rand, 7), 1e-5)
case("layer_norm.default", A, [5, 7])
case("native_layer_norm.default", A, [7], lazy(rand, 7), lazy(rand, 7), 1e-5)
case("rms_norm.default", A, [7], lazy(rand, 7), 1e-6)
STATISTICS = (lazy(rand, 6), lazy(rand, 6), lazy(rand, 6), lazy(positive, 6))
case("batch_norm.default", PICTURE, *STATISTICS, False, 0.1, 1e-5, False)
case("batch_norm.default", PICTURE, None, None, *STATISTICS[2:], False, 0.1, 1e-5, False)
case("_native_batch_norm_legit_no_training.default", PICTURE, *STATISTICS, 0.1, 1e-5)
case("max_pool2d.default", PICTURE, [3, 3], [2, 2], [1, 1])
case("max_pool2d.default", PICTURE, [2], [], [0], [1], True)
case("max_pool2d_with_indices.default", PICTURE, [3, 2], [2, 1], [1, 0])
case("max_pool1d.default", A, [3], [2], [1])
case("avg_pool2d.default", PICTURE, [3, 2], [2, 1], [1, 0])
case("avg_pool2d.default", PICTURE, [3], [2], [1], True, False)
case("avg_pool1d.default", A, [3], [2], [1])
case("adaptive_avg_pool2d.default _adaptive_avg_pool2d.default", PICTURE, [1, 1])
case("adaptive_avg_pool2d.default _adaptive_avg_pool2d.default", PICTURE, [3, 2])
case("adaptive_avg_pool1d.default", A, [1])
case("upsample_nearest2d.vec", PICTURE, None, [2.0, 2.0])
case("upsample_nearest2d.vec", PICTURE, [17, 14], None)
case("upsample_nearest2d.default", PICTURE, [18, 13])
case("upsample_nearest1d.vec", A, None, [2.0])
case("upsample_bilinear2d.vec", PICTURE, [15, 20], False, None)
case("upsample_bilinear2d.vec", PICTURE, [15, 20], True, None)
case("upsample_bilinear2d.vec", PICTURE, None, False, [2.0, 2.0])
ROWS = lazy(rand, 2, 9, 4, 16)
_own = "allaprima.ops."
case(f"{_own}attention", ROWS, lazy(rand, 2, 5, 4, 16), lazy(rand, 2, 5, 4, 16))
case(f"{_own}attention", ROWS, ROWS, ROWS, None, 0.3, True)
case(f"{_own}attention", ROWS, ROWS, ROWS, lazy(rand, 2, 4, 9, 9))
_geometry = ([1, 1], [1, 1], [1, 1])
case(f"{_own}conv2d_add", PICTURE, KERNEL, lazy(rand, 8), lazy(rand, 2, 8, 9, 7), *_geometry, 1)
case(f"{_own}conv2d_add", PICTURE, KERNEL, None, lazy(rand, 1, 8, 1, 1), *_geometry, 1)
case(f"{_own}conv2d_cat", [lazy(rand, 2, 4, 9, 7), lazy(rand, 2, 2, 9, 7)], KERNEL, lazy(rand, 8), *_geometry)
case(f"{_own}linear_add", A, lazy(rand, 4, 7), lazy(rand, 4), lazy(rand, 3, 5, 4))
case(f"{_own}geglu_linear", A, lazy(rand, 8, 7), lazy(rand, 8))
case(f"{_own}geglu_linear", A, lazy(rand, 8, 7), None, "tanh")
case(f"{_own}group_norm_silu", PICTURE, 3, lazy(rand, 6), lazy(rand, 6), 1e-5)
case(f"{_own}group_norm_silu_cat", [PICTURE, lazy(rand, 2, 3, 9, 7)], 3, lazy(rand, 9), lazy(rand, 9), 1e-5)
case(f"{_own}add_layer_norm", A, A, lazy(rand, 7), lazy(rand, 7), 1e-5)
for _form in ("upsample_conv", "upsample_conv_folded"):
    case(f"{_own}{_form}", lazy(rand, 1, 6, 1, 2), KERNEL, "folded", None, 1, 3)
    for _target in ((None, None), (18, 14), (17, 13), (18, 13), (11, 20)):
        case(f"{_own}{_form}", PICTURE, KERNEL, "folded", lazy(rand, 8), *_target)


@pytest.mark.parametrize(("name", "make"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_operator_agrees_with_aten(name: str, make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    torch.manual_seed(0)
    args, kwargs = make()
    if "folded" in args:
        args = tuple(ops.fold_upsample_weight(args[1]) if a == "folded" else a for a in args)
    check(name if name.startswith("allaprima.") else f"aten.{name}", *args, **kwargs)


def test_every_entry_of_the_table_is_tested() -> None:
    tested = {n if n.startswith("allaprima.") else f"aten.{n}" for n, _ in CASES}
    memory_only = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
    assert set(TABLE) - tested - memory_only == {"operator.getitem"}


def test_every_entry_is_an_operator_that_exists() -> None:
    for name in TABLE:
        target_named(name)


SOME = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
sizes = st.integers(1, 6)


@SOME
@given(shape=st.lists(sizes, min_size=1, max_size=4), data=st.data(), name=st.sampled_from(["add", "sub", "mul"]))
def test_arithmetic_broadcasts(shape: list[int], data: st.DataObject, name: str) -> None:
    other = [1 if data.draw(st.booleans()) else n for n in shape][data.draw(st.integers(0, len(shape) - 1)) :]
    check(f"aten.{name}.Tensor", rand(*shape), rand(*other))


@SOME
@given(
    shape=st.lists(sizes, min_size=1, max_size=4),
    data=st.data(),
    keepdim=st.booleans(),
    name=st.sampled_from(["mean.dim", "sum.dim_IntList", "amax.default"]),
)
def test_reductions(shape: list[int], data: st.DataObject, keepdim: bool, name: str) -> None:
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    signed = [a - len(shape) if data.draw(st.booleans()) else a for a in axes]
    torch.manual_seed(0)  # hypothesis runs a case again and expects the same
    x = rand(*shape)
    magnitude = target_named(f"aten.{name}")(x.abs(), signed).max()
    check(f"aten.{name}", x, signed, keepdim, magnitude=float(magnitude))


@SOME
@given(shape=st.lists(sizes, min_size=2, max_size=4), data=st.data())
def test_permutations_of_strided_inputs(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    check("aten.permute.default", rand(*shape).transpose(0, -1), order)


@SOME
@given(batch=sizes, channels=st.sampled_from([4, 8]), height=st.integers(3, 9), width=st.integers(3, 9),
       stride=st.integers(1, 3), padding=st.integers(0, 2), kernel=st.integers(1, 3),
       groups=st.sampled_from([1, 2, 4]))  # fmt: skip
def test_convolutions(batch: int, channels: int, height: int, width: int, stride: int, padding: int, kernel: int,
                      groups: int) -> None:  # fmt: skip
    x, weight = rand(batch, channels, height, width), rand(8, channels // groups, kernel, kernel)
    check("aten.conv2d.default", x, weight, rand(8), [stride] * 2, [padding] * 2, [1, 1], groups)


@SOME
@given(shape=st.lists(sizes, min_size=1, max_size=3), data=st.data(), step=st.integers(1, 3))
def test_slices(shape: list[int], data: st.DataObject, step: int) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    length = shape[axis]
    start = data.draw(st.integers(-length, length - 1))
    end = data.draw(st.integers(start % length + 1, length))
    check("aten.slice.Tensor", rand(*shape), axis, start, end, step)


@SOME
@given(batch=sizes, heads=st.integers(1, 4), rows=st.integers(1, 20), columns=st.integers(1, 20),
       channels=st.sampled_from([8, 16, 40]), masked=st.booleans())  # fmt: skip
def test_attention(batch: int, heads: int, rows: int, columns: int, channels: int, masked: bool) -> None:
    q, k, v = rand(batch, rows, heads, channels), *(rand(batch, columns, heads, channels) for _ in range(2))
    mask = bools(batch, 1, rows, columns) | torch.eye(rows, columns).bool() if masked else None
    check("allaprima.ops.attention", q, k, v, mask)
