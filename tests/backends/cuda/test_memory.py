"""Who lies in whose memory, and what a run needs, held against the tensors that are alive while stages run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from allaprima import ops
from allaprima.backends.cuda import plan as plan_module
from allaprima.backends.cuda.device import nearest
from allaprima.backends.cuda.memory import _Block, block_bytes, memory_of, sizes_of
from allaprima.backends.cuda.order import in_order
from allaprima.backends.cuda.plan import arguments_of, lower
from allaprima.graph import Graph, aten
from tests.rewrite.test_whole import unet_call

from .networks import aten_writing_over, decoder_program, run, small, unet_program


def test_places_in_a_block_are_apart_and_free_ones_merge() -> None:
    block, unit = _Block(), 3 << 20
    places = [block.take(unit * n) for n in (4, 1, 2, 1)]
    assert [p[0] // unit for p in places] == [0, 4, 5, 7]
    assert block.used == 8 * unit
    block.give(places[0])
    block.give(places[2])
    assert block.take(2 * unit) == places[2], "the smallest that is large enough"
    block.give(places[2])
    block.give(places[1])
    assert block.take(7 * unit) == (0, 7 * unit), "four, one and two were one piece again"
    assert block.used == 8 * unit
    assert block.take(1 << 20) == (0, 0), "small tensors lie elsewhere"


# ---- written over --------------------------------------------------------------------------------------------------

NORM, RELU, ADD = aten.layer_norm.default, aten.relu.default, aten.add.Tensor

OVER: dict[str, Callable[..., Any]] = {
    "its only reader": lambda call, x: call(NORM, call(RELU, x), [4]),
    "its last reader": lambda call, x: (lambda a: (call(ADD, a, a), call(NORM, a, [4])))(call(RELU, x)),
    "through a view": lambda call, x: call(NORM, call(aten.reshape.default, call(RELU, x), [-1, 4]), [4]),
    "twice": lambda call, x: call(NORM, call(NORM, call(RELU, x), [4]), [4]),
    "a view that ended": lambda call, x: (lambda a: (call(RELU, call(aten.t.default, a, shape=(4, "s0"))),
                                                     call(NORM, a, [4])))(call(RELU, x)),
    "with SiLU": lambda call, x: call(ops.group_norm_silu, call(RELU, x), 2, None, None, 1e-5),
}  # fmt: skip

APART: dict[str, Callable[..., Any]] = {
    "the caller's": lambda call, x: call(NORM, x, [4]),
    "a view of the caller's": lambda call, x: call(NORM, call(aten.reshape.default, x, [-1, 4]), [4]),
    "a view of the caller's, which is read again": lambda call, x: call(
        ADD, call(NORM, call(aten.reshape.default, x, [-1, 4]), [4]), x),
    "read later": lambda call, x: (lambda a: call(ADD, call(NORM, a, [4]), a))(call(RELU, x)),
    "a view read later": lambda call, x: (lambda a: (lambda v: call(ADD, call(NORM, a, [4]), v))(
        call(aten.reshape.default, a, [-1, 4])))(call(RELU, x)),
    "what it is a view of, read later": lambda call, x: (lambda a: (lambda v: call(ADD, call(NORM, v, [4]), a))(
        call(aten.reshape.default, a, [-1, 4])))(call(RELU, x)),
    "a result": lambda call, x: (lambda a: (a, call(NORM, a, [4])))(call(RELU, x)),
    "a view is a result": lambda call, x: (lambda a: (call(aten.reshape.default, a, [-1, 4]), call(NORM, a, [4])))(
        call(RELU, x)),
    "of another shape": lambda call, x: call(NORM, call(RELU, x), [4], shape=("s0", 8)),
    "an operator without such a kernel": lambda call, x: call(aten.softmax.int, call(RELU, x), 1),
    "two sources": lambda call, x: call(ops.group_norm_silu_cat, [call(RELU, x), x], 2, None, None, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER)
def test_a_result_is_written_over_an_argument_that_ends(name: str) -> None:
    graph = small(OVER[name], ("s0", 4))
    memory = memory_of(graph.calls(), graph.results)
    norms = set(graph.calls(NORM, ops.group_norm_silu))
    assert memory.over == norms
    (first,) = graph.calls(RELU)[:1]
    assert {memory.owners[n] for n in norms} == {first}


@pytest.mark.parametrize("name", APART)
def test_a_result_is_not_written_over_what_is_needed(name: str) -> None:
    graph = small(APART[name], ("s0", 4))
    memory = memory_of(graph.calls(), graph.results)
    assert memory.over == frozenset()


# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "call"),
    [
        (unet_program, lambda device: unet_call(2, 8, 12, 5, device=device)),
        (decoder_program, lambda device: (torch.randn(1, 4, 6, 8, device=device),)),
    ],
    ids=["unet", "decoder"],
)
def test_a_block_is_what_lives_at_once_and_little_more(
    network: Any, call: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the memory of the tensors that are alive while the stages run, for the first time and again."""
    module, staged = network(device)
    monkeypatch.setattr(_Block, "LEAST", 0)  # the tensors of a test are small
    monkeypatch.setattr(plan_module, "choose", aten_writing_over)
    live: dict[int, int] = {}
    peak = 0
    make = plan_module._call

    def seen(value: Any) -> None:
        nonlocal peak
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in live:
                storage = tensor.untyped_storage()
                live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, live.pop, storage._cdata, None)
        peak = max(peak, sum(live.values()))

    def watching(call: Any) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            value = call(*arguments, **options)
            seen(value)
            return value

        return watched

    needs: list[tuple[int, int, int]] = []

    def measured(g: Graph, weights: dict[str, torch.Tensor], inputs: list[Any]) -> list[Any]:
        nonlocal peak
        given = arguments_of(g, weights, inputs)
        calls, needed = in_order(g, given)
        live.clear()
        peak = 0
        plan, made = lower(g, given, nearest(90), calls)
        made = [r.clone() for r in made]  # nothing of the first run is there at the second
        over = memory_of(calls, g.results).over
        assert {x.node for x in plan.launches if "out" in x.options} == {n.name for n in over}
        plan.launches = [replace(x, call=watching(x.call)) for x in plan.launches]
        first, peak = peak, 0
        again = plan.run(given)
        needs.append((needed, first, peak))
        assert len(again) == len(made)
        return made

    monkeypatch.setattr(plan_module, "_call", watching(make))
    with torch.no_grad():
        run(staged, module, call(device), measured)
    needed, first, again = needs[-1]
    assert again <= first, "what replays take"
    assert first <= needed < 1.2 * first


def test_a_size_that_no_argument_has_needs_no_block() -> None:
    graph = small(lambda call, x: call(RELU, x, shape=("u0", 4)), ("s0", 4))
    with pytest.raises(NameError):
        sizes_of(graph.calls(), {"s0": 3})
    assert in_order(graph, {"x0": torch.randn(3, 4)}) == (graph.calls(), 0)


def test_results_written_over_arguments_take_no_place() -> None:
    def build(call: Any, x: Any) -> Any:
        made = call(RELU, x)
        for _ in range(5):
            made = call(NORM, made, [1 << 19])
        return made

    graph = small(build, ("s0", 1 << 19))
    sizes = sizes_of(graph.calls(), {"s0": 3})
    assert block_bytes(graph.calls(), graph.results, sizes) == 6 << 20
