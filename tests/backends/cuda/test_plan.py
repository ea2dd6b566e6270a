"""Plans on whole networks: every stage lowered to kernels agrees with the same graph run by ATen."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from allaprima import ops
from allaprima.backends.aten import AtenExecutable
from allaprima.backends.cuda import plan as plan_module
from allaprima.backends.cuda.choose import OPERATORS, choose
from allaprima.backends.cuda.device import KNOWN, Device
from allaprima.backends.cuda.order import in_order
from allaprima.backends.cuda.plan import Plan, arguments_of, lower
from allaprima.graph import Graph, aten
from allaprima.stage import Program
from tests.rewrite.test_whole import unet_call

from .networks import run, small, unet_program

H100 = next(d for d in KNOWN if d.name == "H100")


@pytest.fixture(scope="module")
def program(device: torch.device) -> tuple[Any, Program]:
    return unet_program(device)


def by_aten(graph: Graph, weights: dict[str, torch.Tensor], inputs: list[Any]) -> list[Any]:
    executable = AtenExecutable(graph)
    executable.bind(weights)
    return executable.run(inputs)


@pytest.mark.parametrize("size", [(1, 5, 6, 7), pytest.param((2, 4, 4, 5), marks=pytest.mark.slow)], ids=str)
def test_a_plan_computes_what_the_graph_does(
    program: tuple[Any, Program], device: torch.device, size: tuple[int, int, int, int]
) -> None:
    unet, staged = program
    call = unet_call(*size, device=device)
    plans: list[Plan] = []

    def by_plan(graph: Graph, weights: dict[str, torch.Tensor], inputs: list[Any]) -> list[Any]:
        given = arguments_of(graph, weights, inputs)
        plan, first = lower(graph, given, H100, in_order(graph, given)[0])
        again = plan.run(given)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=False)
        plans.append(plan)
        return again

    with torch.no_grad():
        (expected,) = run(staged, unet, call, by_aten)
        (made,) = run(staged, unet, call, by_plan)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)  # f32 both: sums in another order
    step = plans[-1]
    assert sum("out" in x.options for x in step.launches) > 5, "results written over a dead argument"
    assert all(x.choice is not None for x in step.launches if x.operator.split(".")[-1] in _NAMES)
    assert step.estimate_us > 0
    assert "expected" in str(step)
    assert len(str(step).splitlines()) == len(step.launches)


_NAMES = {getattr(target, "__name__", "") for target in OPERATORS}


def test_memory_is_free_after_the_last_reader(program: tuple[Any, Program], device: torch.device) -> None:
    """No slot is read after it was given up, and none is kept that nobody reads."""
    unet, staged = program
    plan = Plan()

    def keep(g: Graph, weights: dict[str, torch.Tensor], inputs: list[Any]) -> list[Any]:
        nonlocal plan
        plan, made = lower(g, arguments_of(g, weights, inputs), H100)
        return made

    with torch.no_grad():
        run(staged, unet, unet_call(1, 2, 2, 3, device=device), keep)
    gone: set[int] = set()
    for launch in plan.launches:
        read = {s for a in (*launch.arguments, *launch.options.values()) for s in slots(a)}
        assert not read & gone, launch
        gone |= set(launch.dead)
    results = {s for r in plan.results for s in slots(r)}
    assert not results & gone
    assert gone | results | set(plan.placeholders.values()) >= {x.result for x in plan.launches}


def test_the_first_run_frees_what_nobody_reads_any_more(
    program: tuple[Any, Program], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first picture of a size takes the memory of all activations at once."""
    unet, staged = program
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    call = plan_module._call

    def watched(*arguments: Any) -> Any:
        value = call(*arguments)
        if isinstance(value, torch.Tensor):
            made.append(weakref.ref(value))
            alive.append(sum(r() is not None for r in made))
        return value

    def keep(g: Graph, weights: dict[str, torch.Tensor], inputs: list[Any]) -> list[Any]:
        return lower(g, arguments_of(g, weights, inputs), H100)[1]

    monkeypatch.setattr(plan_module, "_call", watched)
    monkeypatch.setattr(plan_module, "choose", lambda *asked: None)
    with torch.no_grad():
        run(staged, unet, unet_call(1, 2, 2, 3, device=device), keep)
    assert len(made) > 100
    assert max(alive) < len(made) / 4


def test_nothing_is_written_over_what_an_operator_gave_back_unsaid() -> None:
    """Dropout gives its argument back where it does nothing, and its schema does not say so."""

    def build(call: Any, x: Any) -> Any:
        a = call(aten.relu.default, x)
        same = call(aten.dropout.default, a, 0.5, False)
        return call(aten.add.Tensor, call(aten.layer_norm.default, same, [4]), a)

    graph, x = small(build, ("s0", 4)), torch.randn(3, 4)
    plan, (made,) = lower(graph, {"x0": x}, H100)
    (expected,) = by_aten(graph, {}, [x])
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.run({"x0": x})[0], expected, rtol=1e-5, atol=1e-6)


def slots(template: Any) -> set[int]:
    if isinstance(template, list | tuple):
        return set().union(*map(slots, template))
    return {template.index} if hasattr(template, "index") and not isinstance(template, (str, int, float)) else set()


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda d: d.name)
def test_there_is_a_choice_for_every_gpu(gpu: Device) -> None:
    """SD1.5's own sizes in half precision, on the meta device: nothing is computed."""
    half = {"device": "meta", "dtype": torch.float16}
    last = {"memory_format": torch.channels_last}
    picture = torch.empty(2, 320, 64, 64, **half).to(**last)
    calls = {
        aten.linear.default: (torch.empty(2, 4096, 320, **half), torch.empty(960, 320, **half)),
        ops.conv2d_add: (
            picture, torch.empty(320, 320, 3, 3, **half).to(**last), torch.empty(320, **half), picture,
            [1, 1], [1, 1], [1, 1], 1,
        ),
        ops.group_norm_silu: (picture, 32, torch.empty(320, **half), torch.empty(320, **half), 1e-5),
        aten.layer_norm.default: (
            torch.empty(2, 4096, 320, **half), [320], torch.empty(320, **half), torch.empty(320, **half), 1e-5, False,
        ),
        ops.attention: (*(torch.empty(2, 4096, 8, 40, **half) for _ in range(3)), None, None, False),
    }  # fmt: skip
    for target, arguments in calls.items():
        choice = choose(target, arguments, {}, gpu)
        assert choice is not None
        assert 1 < choice.estimate_us < 1e5, (target, choice)
    assert choose(aten.relu.default, (picture,), {}, gpu) is None
