"""Plans on whole networks: every stage lowered to kernels agrees with the same graph run by ATen."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch

from allaprima import ops
from allaprima.backends.aten import AtenExecutable
from allaprima.backends.cuda import plan as plan_module
from allaprima.backends.cuda.choose import OPERATORS, choose
from allaprima.backends.cuda.device import KNOWN, Device
from allaprima.backends.cuda.plan import Plan, _Block, arguments_of, lower, needed_bytes
from allaprima.graph import Graph, aten
from allaprima.rewrite import rewrite, rules_for
from allaprima.stage import Program, Time, cut
from allaprima.weights.binding import Binding
from tests.rewrite.test_whole import MANY_LEVELS, graph_of, unet_call, unet_dims
from tests.tiny import tiny_unet

H100 = next(d for d in KNOWN if d.name == "H100")


@pytest.fixture(scope="module")
def program(device: torch.device) -> tuple[Any, Program]:
    unet = tiny_unet(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2),
    ).to(device)
    levels, unet.num_upsamplers = unet.num_upsamplers, MANY_LEVELS
    call = unet_call(2, 16, 16, 77, device=device)
    graph = graph_of(unet, *call, dims=unet_dims, return_dict=False)
    unet.num_upsamplers = levels
    rewrite(graph, rules_for("cuda"))
    times = {"timestep": Time.SCHEDULE, "encoder_hidden_states": Time.PROMPT, "sample": Time.STEP}
    return unet, cut(graph, times, Counter())


def run(program: Program, unet: Any, call: tuple[Any, ...], how: Any) -> list[Any]:
    """All stages; `how(graph, weights, inputs)` runs one."""
    weights = {name: p.detach() for name, p in unet.named_parameters()}
    binding = Binding(program)
    binding.update(weights, weights)
    values = dict(zip(program.inputs, call, strict=True))
    symbols = {"s0": call[0].shape[0], "s1": call[0].shape[2], "s2": call[0].shape[3]}
    for time, stage in program.stages.items():
        if time is not Time.WEIGHTS:
            inputs = [
                symbols[p.meta["source"]] if p.meta["role"] == "size" else values[p.meta["source"]]
                for p in stage.graph.placeholders("input", "size")
            ]
            made = how(stage.graph, binding.values(stage.graph, weights), inputs)
            values |= zip(stage.outputs, made, strict=True)
    return [values[r.name] for r in program.results]


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
        plan, first = lower(graph, given, H100)
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


def test_a_plans_place_is_what_lives_at_once_and_little_more(
    program: tuple[Any, Program], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the memory of the tensors that are alive while the stages run for the first time."""
    unet, staged = program
    monkeypatch.setattr(_Block, "LEAST", 0)  # the tensors of a test are small
    live: dict[int, int] = {}
    peak = 0
    call = plan_module._call

    def watched(*arguments: Any) -> Any:
        nonlocal peak
        value = call(*arguments)
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in live:
                storage = tensor.untyped_storage()
                live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, live.pop, storage._cdata, None)
                peak = max(peak, sum(live.values()))
        return value

    needs: list[tuple[int, int]] = []

    def measured(g: Graph, weights: dict[str, torch.Tensor], inputs: list[Any]) -> list[Any]:
        nonlocal peak
        given = arguments_of(g, weights, inputs)
        live.clear()
        peak = 0
        made = lower(g, given, H100)[1]
        needs.append((needed_bytes(g, given), peak))
        return made

    monkeypatch.setattr(plan_module, "_call", watched)
    monkeypatch.setattr(plan_module, "choose", lambda *asked: None)
    with torch.no_grad():
        run(staged, unet, unet_call(2, 8, 12, 5, device=device), measured)
    needed, most = needs[-1]
    assert most <= needed < 1.2 * most


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
