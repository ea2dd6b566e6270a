"""Calls are moved where that needs less memory, and compute the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Node

from allaprima import ops
from allaprima.backends.cuda import order
from allaprima.backends.cuda import plan as plan_module
from allaprima.backends.cuda.device import nearest
from allaprima.backends.cuda.memory import block_bytes, sizes_of, symbols_of
from allaprima.backends.cuda.order import in_order
from allaprima.backends.cuda.plan import arguments_of, lower
from allaprima.graph import Graph, aten
from tests.rewrite.test_whole import unet_call

from .networks import aten_writing_over, decoder_program, run, small, unet_program

NORM, RELU, SLICE = ops.group_norm_silu, aten.relu.default, aten.slice.Tensor
BIG, HALF = (1, 64, "s0"), (1, 32, "s0")
ROWS = 1 << 16


def assert_legal(calls: list[Node], graph: Graph) -> None:
    """Every call once, behind all that it reads."""
    assert len(calls) == len(graph.calls())
    assert set(calls) == set(graph.calls())
    place = {node: i for i, node in enumerate(calls)}
    assert all(place.get(read, -1) < place[node] for node in calls for read in node.all_input_nodes)


def given(graph: Graph) -> dict[str, torch.Tensor]:
    return {p.name: torch.empty(1, p.meta["spec"].shape[1], ROWS, device="meta") for p in graph.placeholders()}


def as_traced(graph: Graph, values: dict[str, Any]) -> int:
    return block_bytes(graph.calls(), graph.results, sizes_of(graph.calls(), symbols_of(graph, values)))


def block(call: Any, x: Any, reads: Callable[[Any, Any], Any]) -> Any:
    """A residual block: what `reads(call, input)` makes of its input, added to what is made of its norm."""
    start = call(RELU, x)
    inner = call(RELU, call(NORM, start, 32, None, None, 1e-5), shape=HALF)
    return call(aten.add.Tensor, call(RELU, inner), reads(start, inner))


MOVED: dict[str, Callable[..., Any]] = {
    "a shortcut": lambda call, x: block(call, x, lambda a, _: call(RELU, a, shape=HALF)),
    "through a view": lambda call, x: block(call, x, lambda a, _: call(RELU, call(SLICE, a, 1, 0, 32, shape=HALF))),
    "through the view of another's": lambda call, x: block(
        call, x, lambda a, _: call(aten.mul.Tensor, call(SLICE, x, 1, 0, 32, shape=HALF), a)
    ),
}

STAYS: dict[str, Callable[..., Any]] = {
    "needs what comes later": lambda call, x: block(call, x, lambda a, b: call(aten.mul.Tensor, b, a)),
    "a view that needs it": lambda call, x: block(
        call, x, lambda a, b: call(aten.mul.Tensor, call(SLICE, b, 1, 0, 32), a)
    ),
    "too large": lambda call, x: block(call, x, lambda a, _: call(RELU, a, shape=(1, 65, "s0"))),
    "the caller's": lambda call, x: block(call, x, lambda a, _: call(RELU, x, shape=HALF)),
    "a result": lambda call, x: (lambda a: (call(RELU, call(NORM, a, 32, None, None, 1e-5)),
                                            call(RELU, a, shape=HALF), a))(call(RELU, x)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_other_readers_run_before_a_norm_that_can_write_over_its_argument(name: str) -> None:
    graph = small(MOVED[name], BIG)
    calls, needed = in_order(graph, given(graph))
    assert_legal(calls, graph)
    unit = 32 * ROWS * 4
    assert needed == 4 * unit, "the input, in whose place the norm lies, the shortcut and half as much of the block"
    assert as_traced(graph, given(graph)) == 5 * unit


@pytest.mark.parametrize("name", STAYS)
def test_otherwise_the_order_stays(name: str) -> None:
    graph = small(STAYS[name], BIG)
    calls, needed = in_order(graph, given(graph))
    assert calls == graph.calls()
    assert needed == as_traced(graph, given(graph))


@pytest.mark.parametrize("name", STAYS)
def test_a_block_that_stays_does_not_keep_another_from_moving(name: str) -> None:
    def build(call: Any, x: Any) -> Any:
        first = STAYS[name](call, x)
        seen.append(len(first.graph.nodes if isinstance(first, Node) else first[0].graph.nodes))
        second = block(call, x, lambda a, _: call(RELU, a, shape=HALF))
        return (*first, second) if isinstance(first, tuple) else (call(aten.sum.default, first, shape=()), second)

    seen: list[int] = []
    graph = small(build, BIG)
    calls, _ = in_order(graph, given(graph))
    assert_legal(calls, graph)
    num_first = seen[0] - 1
    assert calls[:num_first] == graph.calls()[:num_first]
    assert calls != graph.calls()


def test_an_order_that_needs_more_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Best fit may lose more bytes than the order saves."""
    graph = small(MOVED["a shortcut"], BIG)
    monkeypatch.setattr(order, "block_bytes", lambda calls, *given: 1 if calls == graph.calls() else 2)
    assert in_order(graph, given(graph)) == (graph.calls(), 1)


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (unet_program, lambda device: unet_call(1, 6, 7, 3, device=device)),
        (decoder_program, lambda device: (torch.randn(1, 4, 5, 7, device=device),)),
    ],
    ids=["unet", "decoder"],
)
def test_whole_networks_compute_the_same(
    network: Any, inputs: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, at the first run and at the next."""
    module, staged = network(device)
    monkeypatch.setattr(plan_module, "choose", aten_writing_over)
    orders: list[tuple[list[Node], Graph]] = []

    def moved(g: Graph, weights: dict[str, torch.Tensor], values: list[Any]) -> list[Any]:
        by_name = arguments_of(g, weights, values)
        calls, needed = in_order(g, by_name)
        assert_legal(calls, g)
        assert needed <= as_traced(g, by_name)
        orders.append((calls, g))
        plan, first = lower(g, by_name, nearest(90), calls)
        kept = [f.clone() for f in first]
        for a, b in zip(kept, plan.run(by_name), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        return kept

    def traced(g: Graph, weights: dict[str, torch.Tensor], values: list[Any]) -> list[Any]:
        with monkeypatch.context() as patched:
            patched.setattr(plan_module, "choose", lambda *asked: None)
            return lower(g, arguments_of(g, weights, values), nearest(90))[1]

    call = inputs(device)
    with torch.no_grad():
        made, expected = (run(staged, module, call, how)[0] for how in (moved, traced))
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_a_decoder_needs_a_quarter_less(device: torch.device) -> None:
    """Its widest block with a shortcut sets the peak: input, norm and half as much of the block; the norm goes over
    the input."""
    _, staged = decoder_program(device)
    (graph,) = (s.graph for s in staged.stages.values() if s.graph.count(ops.upsample_conv_folded))
    values = arguments_of(graph, Weights(graph), [torch.empty(1, 4, 64, 64, device="meta")])
    start = time.process_time()
    calls, needed = in_order(graph, values)
    assert time.process_time() - start < 0.3
    assert_legal(calls, graph)
    assert calls != graph.calls()
    assert needed <= 0.81 * as_traced(graph, values)


class Weights(dict[str, torch.Tensor]):
    """A tensor without numbers for each placeholder."""

    def __init__(self, graph: Graph) -> None:
        known = [p for p in graph.placeholders() if p.meta["role"] != "input"]
        super().__init__({p.name: torch.empty(p.meta["spec"].shape, device="meta") for p in known})
