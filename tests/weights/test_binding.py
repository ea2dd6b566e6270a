"""Sources and derived buffers: what changed, and only what depends on it, is computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph as FxGraph

from allaprima.graph import Graph, TensorSpec, aten
from allaprima.stage import Program, Time, cut
from allaprima.weights.binding import Binding, Sources, weight_names

SPEC = TensorSpec((4, 4), torch.float32)


@pytest.fixture
def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    made[2].weight = made[0].weight
    return made


def test_at_first_everything_is_new(module: nn.Module) -> None:
    sources = Sources(module)
    assert sources.refresh() == {*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())}
    assert sources.refresh() == set()


def test_a_write_names_what_it_changed_under_all_its_names(module: nn.Module) -> None:
    sources = Sources(module)
    sources.refresh()
    with torch.no_grad():
        module[0].weight.add_(1)
        module[1].running_mean.add_(1)
    assert sources.refresh() == {"0.weight", "2.weight", "1.running_mean"}


def test_another_tensor_is_new(module: nn.Module) -> None:
    sources = Sources(module)
    sources.refresh()
    module[0].bias = nn.Parameter(module[0].bias.detach().clone())
    assert sources.refresh() == {"0.bias"}


def test_moving_is_a_change(module: nn.Module) -> None:
    sources = Sources(module)
    every = sources.refresh()
    module.double()
    assert sources.refresh() == every - {"1.num_batches_tracked"}, "whole numbers stay what they are"


def test_forgetting_makes_everything_new(module: nn.Module) -> None:
    sources = Sources(module)
    every = sources.refresh()
    sources.forget()
    assert sources.refresh() == every


def test_sources_are_the_parameters_themselves(module: nn.Module) -> None:
    sources = Sources(module)
    sources.refresh()
    assert sources.tensors["0.weight"].data_ptr() == module[0].weight.data_ptr()
    assert not sources.tensors["0.weight"].requires_grad


def program() -> Program:
    """linear(linear(x, a @ b), c + c), where a@b and c+c are of the weights stage."""
    fx = FxGraph()
    nodes: dict[str, Any] = {}
    for name in ("x", "a", "b", "c"):
        nodes[name] = fx.placeholder(name)
        nodes[name].meta = {"role": "input" if name == "x" else "parameter", "source": name, "spec": SPEC}
    product = fx.call_function(aten.mm.default, (nodes["a"], nodes["b"]))
    double = fx.call_function(aten.add.Tensor, (nodes["c"], nodes["c"]))
    first = fx.call_function(aten.linear.default, (nodes["x"], product))
    second = fx.call_function(aten.linear.default, (first, double))
    fx.output((second,))
    for node in (product, double, first, second):
        node.meta["spec"] = SPEC
    return cut(Graph(fx), {})


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(4, 4) for name in "abc"}


def test_derived_values_are_computed_from_the_sources(weights: dict[str, torch.Tensor]) -> None:
    made = program()
    binding = Binding(made)
    assert len(binding.update(weights, weights) - weights.keys()) == 2
    values = binding.values(made.stages[Time.STEP].graph, weights)
    assert any(torch.equal(v, weights["a"] @ weights["b"]) for v in values.values())
    assert any(torch.equal(v, weights["c"] * 2) for v in values.values())


def test_only_what_depends_on_a_change_is_computed_again(weights: dict[str, torch.Tensor]) -> None:
    made = program()
    binding = Binding(made)
    binding.update(weights, weights)
    step = made.stages[Time.STEP].graph
    before = binding.values(step, weights)
    weights["a"] = torch.randn(4, 4)
    changed = binding.update(weights, {"a"})
    after = binding.values(step, weights)
    same = [name for name in before if before[name] is after[name]]
    assert len(same) == len(before) - 1
    assert len(changed & weight_names(step)) == 1


def test_derived_memory_counts_what_is_no_view(weights: dict[str, torch.Tensor]) -> None:
    binding = Binding(program())
    assert binding.derived_bytes() == 0
    binding.update(weights, weights)
    assert binding.derived_bytes() == 2 * 4 * 4 * 4
