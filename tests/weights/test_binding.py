"""Sources and derived buffers: what changed, and only what depends on it, is computed again."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph as FxGraph
from torch.utils._python_dispatch import TorchDispatchMode

from allaprima.graph import Graph, TensorSpec, aten
from allaprima.stage import Program, Time, cut
from allaprima.weights import binding
from allaprima.weights.binding import Binding, Sources, weight_names
from allaprima.weights.gathering import gather

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


class _Alive(TorchDispatchMode):
    """The most results of operators that were alive when the next one began."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.most = max(self.most, sum(made() is not None for made in self.made))
        result = func(*args, **(kwargs or {}))
        self.made.append(weakref.ref(result))
        return result


def test_what_a_fold_was_computed_from_goes_at_once(weights: dict[str, torch.Tensor]) -> None:
    fx = FxGraph()
    x, a = (fx.placeholder(name) for name in "xa")
    for node, role in ((x, "input"), (a, "parameter")):
        node.meta = {"role": role, "source": node.name, "spec": SPEC}
    fold = a
    for _ in range(6):
        fold = fx.call_function(aten.mm.default, (fold, a))
        fold.meta["spec"] = SPEC
    fx.output((fx.call_function(aten.linear.default, (x, fold)),))
    list(fx.nodes)[-2].meta["spec"] = SPEC
    with _Alive() as seen:
        Binding(cut(Graph(fx), {})).update(weights, weights)
    assert len(seen.made) == 6
    assert seen.most == 1


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


class Parts(nn.Module):
    """Two matrices that a program reads as one, and a convolution's taps that it reads with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(rows, 4)) for rows in (2, 3))
        self.taps = nn.Parameter(torch.randn(6, 4, 3, 3))


def arranging() -> Program:
    fx = FxGraph()
    nodes: dict[str, Any] = {}
    for name, shape in {"x": (1, 4), "y": (1, 4, 8, 8), "a": (2, 4), "b": (3, 4), "taps": (6, 4, 3, 3)}.items():
        nodes[name] = fx.placeholder(name)
        role = "input" if name in "xy" else "parameter"
        nodes[name].meta = {"role": role, "source": name, "spec": TensorSpec(shape, torch.float32)}
    merged = fx.call_function(aten.cat.default, ([nodes["a"], nodes["b"]], 0))
    last = fx.call_function(aten.contiguous.default, (nodes["taps"],), {"memory_format": torch.channels_last})
    double = fx.call_function(aten.add.Tensor, (nodes["a"], nodes["a"]))
    rows = fx.call_function(aten.linear.default, (nodes["x"], merged))
    fold = fx.call_function(aten.linear.default, (nodes["x"], double))
    picture = fx.call_function(aten.conv2d.default, (nodes["y"], last))
    fx.output((rows, fold, picture))
    shapes = {merged: (5, 4), last: (6, 4, 3, 3), double: (2, 4), rows: (1, 5), fold: (1, 2), picture: (1, 6, 6, 6)}
    for node, shape in shapes.items():
        node.meta["spec"] = TensorSpec(shape, torch.float32)
    return cut(Graph(fx), {})


class Adopted:
    """A module whose parameters live in a program's buffers."""

    def __init__(self) -> None:
        self.module, self.program = Parts(), arranging()
        self.before = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.sources, self.binding = Sources(self.module), Binding(self.program)
        self.look()

    def look(self) -> set[str]:
        changed = self.sources.refresh()
        return self.binding.update(self.sources.tensors, changed, self.sources) if changed else set()

    @property
    def values(self) -> dict[str, torch.Tensor]:
        found = self.binding.values(self.program.stages[Time.STEP].graph, self.sources.tensors)
        by_shape = {(5, 4): "merged", (6, 4, 3, 3): "taps", (2, 4): "double"}
        return {by_shape[tuple(v.shape)]: v for v in found.values()}

    def check(self) -> None:
        a, b, taps = (p.detach() for p in (self.module.a, self.module.b, self.module.taps))
        torch.testing.assert_close(self.values["merged"], torch.cat([a, b]), rtol=0, atol=0)
        torch.testing.assert_close(self.values["double"], a + a, rtol=0, atol=0)
        torch.testing.assert_close(self.values["taps"], taps, rtol=0, atol=0)
        assert self.values["taps"].is_contiguous(memory_format=torch.channels_last)


def test_parameters_become_views_of_what_is_only_an_arrangement_of_them() -> None:
    adopted = Adopted()
    adopted.check()
    for name, parameter in adopted.module.named_parameters():
        assert torch.equal(parameter, adopted.before[name])
    assert adopted.module.b.data_ptr() == adopted.values["merged"][2:].data_ptr()
    assert adopted.module.taps.data_ptr() == adopted.values["taps"].data_ptr()
    assert adopted.binding.derived_bytes() == 2 * 4 * 4, "only the fold is stored beside the parameters"
    assert adopted.sources.refresh() == set(), "moving in is no change"


def test_a_write_to_an_adopted_parameter_needs_no_copy() -> None:
    adopted = Adopted()
    addresses = {name: v.data_ptr() for name, v in adopted.values.items()}
    with torch.no_grad():
        for parameter in adopted.module.parameters():
            parameter.mul_(3)
    assert torch.equal(adopted.values["merged"][2:], adopted.before["b"] * 3)
    adopted.look()
    adopted.check()
    assert {name: v.data_ptr() for name, v in adopted.values.items()} == addresses


def test_a_replaced_parameter_moves_into_the_buffer_that_stays() -> None:
    adopted = Adopted()
    addresses = {name: v.data_ptr() for name, v in adopted.values.items()}
    old = adopted.module.a
    adopted.module.a = nn.Parameter(torch.randn(2, 4))
    adopted.module.load_state_dict({"taps": torch.randn(6, 4, 3, 3)}, strict=False, assign=True)
    adopted.look()
    adopted.check()
    assert {name: v.data_ptr() for name, v in adopted.values.items()} == addresses
    assert torch.equal(old, adopted.before["a"])


def test_released_parameters_have_memory_of_their_own() -> None:
    adopted = Adopted()
    adopted.sources.release()
    for name, parameter in adopted.module.named_parameters():
        assert torch.equal(parameter, adopted.before[name])
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    adopted.look()
    adopted.check()


def test_another_dtype_is_another_buffer() -> None:
    adopted = Adopted()
    adopted.module.double()
    adopted.look()
    adopted.check()
    assert adopted.values["merged"].dtype == torch.float64


def test_a_second_program_finds_the_arrangement_of_the_first() -> None:
    adopted = Adopted()
    second = Binding(adopted.program)
    second.update(adopted.sources.tensors, adopted.sources.tensors, adopted.sources)
    adopted.check()
    theirs = second.values(adopted.program.stages[Time.STEP].graph, adopted.sources.tensors).values()
    assert {v.data_ptr() for v in theirs if v.shape[0] > 2} == {
        v.data_ptr() for v in adopted.values.values() if v.shape[0] > 2
    }


def test_tied_parameters_are_arranged_as_often_as_they_are_read() -> None:
    adopted = Adopted.__new__(Adopted)
    adopted.module, adopted.program = Parts(), arranging()
    adopted.module.b = nn.Parameter(torch.randn(2, 4))
    adopted.module.a = adopted.module.b
    adopted.sources, adopted.binding = Sources(adopted.module), Binding(adopted.program)
    for _ in range(2):
        adopted.look()
        merged = next(v for v in adopted.binding._buffers.values() if v.shape == (4, 4))
        assert torch.equal(merged, torch.cat([adopted.module.a.detach()] * 2))
        with torch.no_grad():
            adopted.module.a.add_(1)


class Unread(Parts):
    """With parameters that no program reads."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)


def looked_at(module: nn.Module) -> Adopted:
    adopted = Adopted.__new__(Adopted)
    adopted.module, adopted.program = module, arranging()  # type: ignore[assignment]
    adopted.sources, adopted.binding = Sources(module), Binding(adopted.program)
    adopted.look()
    return adopted


def test_all_parameters_are_gathered_whether_read_or_not() -> None:
    adopted = looked_at(Unread())
    places = [p.data_ptr() for p in adopted.module.parameters()]
    assert max(places) - min(places) < 5 * 1024, "side by side"
    assert adopted.sources.refresh() == set()


def test_a_replaced_parameter_comes_home_though_it_is_in_no_arrangement() -> None:
    adopted = looked_at(Unread())
    other: Any = adopted.module.other
    home = other.weight.data_ptr()
    old, new = other.weight, torch.randn(4, 4)
    before = old.detach().clone()
    other.weight = nn.Parameter(new.clone())
    adopted.look()
    assert other.weight.data_ptr() == home
    assert torch.equal(other.weight, new)
    assert torch.equal(old, before), "whoever keeps the old one may put it back"
    other.weight = old
    adopted.look()
    assert other.weight.data_ptr() == home
    assert torch.equal(other.weight, before)


def test_a_module_that_went_and_came_back_lives_where_it_did() -> None:
    """As `module.to("cpu").to("cuda")` does: every parameter is at another address."""
    adopted = looked_at(Unread())
    homes = [p.data_ptr() for p in adopted.module.parameters()]
    kept = [v.data_ptr() for v in adopted.values.values()]
    values = [p.detach().clone() for p in adopted.module.parameters()]
    adopted.module.double()
    adopted.module.float()
    assert homes != [p.data_ptr() for p in adopted.module.parameters()]
    adopted.look()
    adopted.check()
    assert all(map(torch.equal, values, adopted.module.parameters()))
    assert homes == [p.data_ptr() for p in adopted.module.parameters()]
    assert kept == [v.data_ptr() for v in adopted.values.values()]


def test_what_was_gathered_for_the_time_being_leaves_its_slab_for_good() -> None:
    module = Unread()
    sources = Sources(module)
    sources.refresh()
    gather(sources.scattered())
    adopted = Adopted.__new__(Adopted)
    adopted.module, adopted.program, adopted.sources = module, arranging(), sources  # type: ignore[assignment]
    adopted.binding = Binding(adopted.program)
    waiting = {name: p.data_ptr() for name, p in module.named_parameters()}
    assert sources.refresh() == set()
    adopted.binding.update(sources.tensors, sources.tensors, sources)
    assert not set(waiting.values()) & {p.data_ptr() for p in module.parameters()}
    assert sources.scattered() == []
    homes = {name: p.data_ptr() for name, p in module.named_parameters()}
    second = Binding(adopted.program)
    second.update(sources.tensors, sources.tensors, sources)
    assert homes == {name: p.data_ptr() for name, p in module.named_parameters()}, "another program finds it there"


def test_large_folds_are_gathered_and_views_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "LEAST_BYTES", 1)
    module = nn.Module()
    module.a, module.b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    fx = FxGraph()
    x, a, b = (fx.placeholder(name) for name in "xab")
    for node, role in ((x, "input"), (a, "parameter"), (b, "parameter")):
        node.meta = {"role": role, "source": node.name, "spec": SPEC}
    view = fx.call_function(aten.reshape.default, (a, [4, 4]))
    fold = fx.call_function(aten.mm.default, (a, b))
    first = fx.call_function(aten.linear.default, (x, view))
    second = fx.call_function(aten.linear.default, (first, fold))
    fx.output((second,))
    for node in (view, fold, first, second):
        node.meta["spec"] = SPEC
    made = cut(Graph(fx), {})
    sources, bound = Sources(module), Binding(made)
    sources.refresh()
    bound.update(sources.tensors, sources.tensors, sources)
    values = list(bound.values(made.stages[Time.STEP].graph, sources.tensors).values())
    assert any(v.data_ptr() == module.a.data_ptr() for v in values), "a view of a parameter stays one"
    assert bound.derived_bytes() == 4 * 4 * 4
    for _ in range(2):
        product = next(v for v in values if torch.allclose(v, module.a @ module.b))
        assert product.untyped_storage().nbytes() == 4 * 4 * 4
        with torch.no_grad():
            module.b.mul_(2)
        bound.update(sources.tensors, sources.refresh(), sources)
