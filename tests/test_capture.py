"""Capture: calls and their signatures, one raw graph that is bit-equal to the module at every size."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph as FxGraph

from allaprima import profiles
from allaprima.capture import (
    Call,
    CallReader,
    DynamicDim,
    Signature,
    beyond,
    bind_symbols,
    capture,
    dim_rules,
    every_dim,
    no_dim,
    out_of_range,
    same_program,
)
from allaprima.errors import CaptureError
from allaprima.graph import Graph, TensorSpec, aten
from tests.tiny import CROSS_DIM, tiny_unet

# ---- calls and signatures


def forward(x: Any, y: Any = None, *rest: Any, flag: Any = False, **more: Any) -> None: ...


def signature(*args: Any, **kwargs: Any) -> Signature:
    return CallReader(forward)(args, kwargs).signature


X = torch.zeros(2, 3)


def test_positional_and_keyword_use_are_the_same_call() -> None:
    assert signature(X, X) == signature(x=X, y=X) == signature(X, y=X)


def test_sizes_are_no_part_of_the_signature() -> None:
    assert signature(X) == signature(torch.ones(7, 1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, X.double()),
        (X, X.long()),
        (X, X[0]),
        (X, None),
        (X, 3),
        (1, 2),
        (1, 1.0),
        (1, True),
        ([X], [X, X]),
        ([X], (X,)),
        ({"a": X}, {"b": X}),
    ],
)
def test_signatures_differ(one: Any, other: Any) -> None:
    assert signature(X, y=one) != signature(X, y=other)


def test_an_argument_that_is_present_differs_from_one_that_is_not() -> None:
    assert len({signature(X), signature(X, flag=True), signature(X, more=X), signature(X, None, X)}) == 4


def test_tensors_are_named_by_where_they_stand() -> None:
    found = signature(X, {"a": [X, 5], "b": X}, flag=True)
    assert found.tensor_names == ("x", "y.a.0", "y.b")
    assert "flag: True" in str(found)


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(CaptureError, match=r"'y\.a' is a SimpleNamespace"):
        signature(X, {"a": SimpleNamespace()})


def test_a_call_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CaptureError, match="does not fit"):
        CallReader(lambda x: x)((X, X), {})


# ---- the UNet: one graph for every size


def unet_call(module: Any, batch: int, height: int, width: int, tokens: int) -> Call:
    numbers = torch.Generator().manual_seed(batch * 1000 + height * 100 + width * 10 + tokens)
    sample = torch.randn(batch, 4, height, width, generator=numbers)
    text = torch.randn(batch, tokens, CROSS_DIM, generator=numbers)
    return CallReader(module.forward)((sample, torch.tensor(501.0), text), {"return_dict": False})


def captured(module: Any, call: Call, dims: Any) -> Graph:
    with profiles._target_sizes_always(module):
        return capture(module, module.forward, call, dims)


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_unet()


@pytest.fixture(scope="module")
def unet_graph(unet: Any) -> Graph:
    call = unet_call(unet, 1, 16, 16, 77)
    return captured(unet, call, profiles.unet(tuple).dims(call.tensors)[0])


def raw(graph: Graph, module: nn.Module, call: Call) -> list[Any]:
    """The results of the captured graph, as it was captured."""
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    given = dict(zip(call.signature.tensor_names, call.tensors, strict=True)) | weights
    with torch.no_grad():
        return list(graph.module()(*(given[p.meta["source"]] for p in graph.placeholders())))


ON_GRID = ((1, 8, 8, 77), (2, 16, 16, 77), (1, 8, 24, 154), (4, 16, 8, 77))
OFF_GRID = ((2, 9, 13, 5), (1, 10, 17, 1), (3, 12, 20, 2), (1, 1, 1, 77), (1, 3, 2, 154), (2, 11, 9, 77))
BATCHES = ((5, 8, 8, 3), (63, 4, 4, 3), (64, 4, 4, 3), (65, 4, 4, 3))


@pytest.mark.parametrize("sizes", [*ON_GRID, *OFF_GRID, *BATCHES], ids=lambda s: "x".join(map(str, s)))
def test_the_raw_graph_is_bit_equal_at(unet: Any, unet_graph: Graph, sizes: Sequence[int]) -> None:
    call = unet_call(unet, *sizes)
    assert isinstance(bind_symbols(unet_graph, call.tensors), dict)
    with torch.no_grad():
        (expected,) = unet(*call.tensors, return_dict=False)
    (result,) = raw(unet_graph, unet, call)
    assert torch.equal(result, expected)


def test_the_operators_that_rules_look_for_are_kept_whole(unet_graph: Graph) -> None:
    assert unet_graph.count(aten.scaled_dot_product_attention.default) == 14
    assert unet_graph.count(aten.conv2d.default) > 30
    assert unet_graph.count(aten.group_norm.default) > 20
    assert unet_graph.count(aten.linear.default) > 60
    assert unet_graph.count(aten.layer_norm.default) == 21


def test_a_batch_beyond_the_capture_is_out_of_its_range(unet: Any, unet_graph: Graph) -> None:
    inside, outside = (bind_symbols(unet_graph, unet_call(unet, b, 8, 8, 7).tensors) for b in (63, 65))
    assert isinstance(inside, dict)
    assert isinstance(outside, dict)
    assert not out_of_range(unet_graph, inside)
    assert list(out_of_range(unet_graph, outside).values()) == [65]


def test_a_capture_at_a_batch_of_65_is_the_same_program(unet: Any, unet_graph: Graph) -> None:
    call = unet_call(unet, 65, 8, 8, 7)
    assert same_program(unet_graph, captured(unet, call, no_dim), call.tensors)


def test_another_target_size_rule_is_another_program(unet: Any, unet_graph: Graph) -> None:
    """The check tells programs apart: without the target sizes, the graph doubles instead."""
    call = unet_call(unet, 65, 8, 8, 7)
    assert not same_program(unet_graph, capture(unet, unet.forward, call, no_dim), call.tensors)


def test_a_tensor_of_another_width_does_not_fit(unet_graph: Graph) -> None:
    tensors = (torch.zeros(2, 4, 8, 8), torch.tensor(1.0), torch.zeros(2, 7, CROSS_DIM + 1))
    assert bind_symbols(unet_graph, tensors) == "encoder_hidden_states axis 2 is 33, 32 was captured"


def test_tensors_that_disagree_on_the_batch_do_not_fit(unet_graph: Graph) -> None:
    tensors = (torch.zeros(2, 4, 8, 8), torch.tensor(1.0), torch.zeros(3, 7, CROSS_DIM))
    assert "axis 0" in str(bind_symbols(unet_graph, tensors))


# ---- modules of which nothing is known


class Branches(nn.Module):
    """Takes another way at odd widths, and where there are more rows than columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 if x.shape[1] % 2 else x + 1
        return x.sin() if x.shape[0] > x.shape[1] else x.cos()


def small(module: nn.Module, *tensors: torch.Tensor, rule: int = 0) -> tuple[Graph, Call]:
    call = CallReader(module.forward)(tensors, {})
    return capture(module, module.forward, call, dim_rules(call.tensors)[rule]), call


def test_the_branches_of_the_modules_code_are_guards() -> None:
    graph, call = small(Branches(), torch.zeros(3, 4))
    assert len(graph.guards) == 2
    for shape, fits in {(3, 4): True, (2, 8): True, (3, 5): False, (8, 4): False, (9, 5): False}.items():
        symbols = bind_symbols(graph, (torch.zeros(shape),))
        assert isinstance(symbols, dict)
        assert (not out_of_range(graph, symbols)) == fits, shape
    assert call.signature.tensor_names == ("x",)


def test_beyond_captures_at_the_sizes_of_the_call() -> None:
    graph, _ = small(Branches(), torch.zeros(3, 4))
    tensor = torch.zeros(3, 9)
    symbols = bind_symbols(graph, (tensor,))
    assert isinstance(symbols, dict)
    rule = beyond(graph, every_dim(DynamicDim(3, "batch", 1, 100)), out_of_range(graph, symbols))
    assert rule("x", tensor)[1].example == 9


class Square(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y


def test_sizes_that_are_equal_by_chance_stay_apart() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum((1, 2))

    graph, _ = small(Sum(), torch.zeros(4, 4, 4))
    assert isinstance(bind_symbols(graph, (torch.zeros(2, 3, 5),)), dict)


def test_sizes_that_the_code_makes_equal_are_one_symbol() -> None:
    graph, _ = small(Square(), torch.zeros(2, 3, 5), torch.zeros(2, 5, 4))
    assert isinstance(bind_symbols(graph, (torch.zeros(7, 2, 9), torch.zeros(7, 9, 1))), dict)
    assert "9 was expected" in str(bind_symbols(graph, (torch.zeros(7, 2, 9), torch.zeros(7, 8, 1))))


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class WritesItsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


class WritesItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


@pytest.mark.parametrize(
    "module", [DataDependent(), WritesItsBuffer(), WritesItsInput()], ids=lambda m: type(m).__name__
)
def test_what_a_graph_cannot_say_is_refused(module: nn.Module) -> None:
    with pytest.raises(CaptureError):
        small(module, torch.ones(3, 4))


def test_a_capture_leaves_the_module_as_it_was() -> None:
    module = tiny_unet()
    module.mid_block.marks = [1]
    before = {name: dict(part.__dict__) for name, part in module.named_modules()}
    call = unet_call(module, 1, 8, 8, 7)
    captured(module, call, no_dim)
    for name, part in module.named_modules():
        assert part.__dict__.keys() == before[name].keys(), name
        assert all(part.__dict__[k] is v for k, v in before[name].items()), name


# ---- which sizes a graph serves


def signature_graph(*shapes: tuple[Any, ...]) -> Graph:
    fx = FxGraph()
    for i, shape in enumerate(shapes):
        fx.placeholder(f"x{i}").meta = {"role": "input", "source": f"x{i}", "spec": TensorSpec(shape, torch.float32)}
    fx.output(())
    return Graph(fx)


SIZE = st.integers(1, 500)


@given(SIZE, SIZE, SIZE)
def test_symbols_are_read_off_the_tensors(a: int, b: int, factor: int) -> None:
    graph = signature_graph(("s0", 3), ("s1", "s0*s1 + 1"), (f"{factor}*s2",))
    tensors = [torch.empty(s, device="meta") for s in ((a, 3), (b, a * b + 1), (factor * 7,))]
    assert bind_symbols(graph, tensors) == {"s0": a, "s1": b, "s2": 7}


@given(SIZE, SIZE, SIZE)
def test_a_size_that_contradicts_its_expression_does_not_fit(a: int, b: int, wrong: int) -> None:
    graph = signature_graph(("s0",), ("s1",), ("s0 + s1",))
    tensors = [torch.empty(n, device="meta") for n in (a, b, wrong)]
    assert isinstance(bind_symbols(graph, tensors), dict) == (wrong == a + b)


@given(st.integers(1, 100), st.integers(1, 100), SIZE)
def test_ranges_are_inclusive(low: int, extra: int, size: int) -> None:
    graph = signature_graph(("s0",))
    graph.ranges = {"s0": (low, low + extra)}
    assert bool(out_of_range(graph, {"s0": size})) == (not low <= size <= low + extra)
    graph.ranges = {"s0": (low, None)}
    assert bool(out_of_range(graph, {"s0": size})) == (size < low)
