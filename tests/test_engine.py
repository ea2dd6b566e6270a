"""The engine: one program for every size, every change noticed, nothing ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allaprima as ap
from allaprima import engine as engine_module
from allaprima.config import Config
from allaprima.engine import Engine, Profile
from allaprima.pipelines import engines


def aten(**settings: Any) -> Config:
    return Config(**{"backend": "aten", "cache_dir": None, **settings})


def engine_of(module: nn.Module) -> Engine:
    (engine,) = engines(module).values()
    return engine


def agrees(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the optimized module and its own forward give the same numbers."""
    with torch.no_grad():
        ours = module(*args, **kwargs)
        eager = engine_of(module).original(*args, **kwargs)
    return ours.dtype == eager.dtype and torch.equal(ours, eager)


# ---- sizes


class BranchesOnBatch(nn.Module):
    def __init__(self, limit: int = 10) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] >= self.limit else x + 1


class BranchesOnParity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] % 2 else x + 1


def test_a_branch_on_the_batch_makes_a_second_program_and_no_third() -> None:
    module = ap.optimize(BranchesOnBatch().eval(), aten())
    for rows in (4, 12, 1, 5, 11, 200, 9, 10):
        assert agrees(module, torch.randn(rows, 8))
    assert engine_of(module).events.captures == 2
    assert not engine_of(module).events.fallbacks


def test_a_branch_on_parity_is_right_on_both_sides() -> None:
    module = ap.optimize(BranchesOnParity().eval(), aten())
    for size in (4, 5, 6, 7, 8, 9):
        assert agrees(module, torch.randn(2, size))


def test_the_first_call_may_be_beyond_the_range() -> None:
    module = ap.optimize(BranchesOnBatch(limit=64).eval(), aten())
    for rows in (65, 63, 64, 66, 1, 1000):
        assert agrees(module, torch.randn(rows, 3))
    assert engine_of(module).events.captures == 2


class ThreeWays(nn.Module):
    """Even, a multiple of three, and the rest: which is what even numbers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 2 == 0:
            return x + 1
        return x * 2 if x.shape[1] % 3 == 0 else x + 1


def test_a_size_confirmed_says_nothing_of_the_sizes_beside_it() -> None:
    module = ap.optimize(ThreeWays().eval(), aten())
    for size in (4, 5, 9, 7, 15, 8, 11):
        assert agrees(module, torch.randn(2, size)), size
    events = engine_of(module).events
    assert (events.captures, events.discharged) == (2, 1)


def test_a_batch_of_none() -> None:
    module = ap.optimize(nn.Linear(4, 4).eval(), aten())
    assert agrees(module, torch.randn(3, 4))
    assert agrees(module, torch.randn(0, 4))
    assert agrees(module, torch.randn(5, 4))


def test_too_many_programs_end_in_eager_and_are_listed() -> None:
    class OneForEach(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for size in range(2, 30):
                if x.shape[1] == size:
                    return x * size
            return x

    module = ap.optimize(OneForEach().eval(), aten())
    for size in range(2, 20):
        assert agrees(module, torch.randn(2, size))
    assert engine_of(module).events.captures == 8
    assert "captures" in " ".join(engine_of(module).events.fallbacks)
    count = sum(engine_of(module).events.fallbacks.values())
    assert agrees(module, torch.randn(2, 3))
    assert sum(engine_of(module).events.fallbacks.values()) == count, "a size that has a program still uses it"


# ---- calls


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, scale: Any = 1.0, parts: Any = None, **more: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * scale
        for part in parts["add"] if parts else ():
            y = y + part
        return y - sum(more.values())


def test_keywords_nested_inputs_and_flags() -> None:
    module = ap.optimize(Keywords().eval(), aten())
    x = torch.randn(3, 4)
    for call in (
        {},
        {"scale": 2.0},
        {"scale": torch.tensor(3.0)},
        {"parts": {"add": [x, x * 2]}},
        {"parts": {"add": (x,)}},
        {"a": x, "b": x},
    ):
        assert agrees(module, x, **call)
        assert agrees(
            module, x[:1], **torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t[:1] if t.dim() else t, call)
        )
    assert engine_of(module).events.captures == 6


class Scales(nn.Module):
    def forward(self, x: torch.Tensor, by: Any) -> torch.Tensor:
        return x * by


def test_numbers_of_different_kinds_are_different_calls() -> None:
    module = ap.optimize(Scales().eval(), aten())
    x = torch.arange(6).reshape(2, 3)
    for by in (1, 1.0, True, 2, 0, False, 0.0):
        assert agrees(module, x, by), by


def test_strided_inputs_and_views() -> None:
    module = ap.optimize(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), aten())
    x = torch.randn(4, 3, 5)
    assert agrees(module, x[:, :, :4])
    assert agrees(module, x.transpose(0, 1)[:, :4, :3].transpose(1, 2))
    assert agrees(module, torch.randn(1, 3, 4).expand(5, 3, 4))


def test_a_wrong_call_raises_what_the_module_raises_and_spoils_nothing() -> None:
    module = ap.optimize(nn.Linear(4, 4).eval(), aten())
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 5))
        with pytest.raises(TypeError):
            module(torch.randn(2, 4), 3)
        assert agrees(module, torch.randn(2, 4))
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 5))
        before = sum(engine_of(module).events.fallbacks.values())
        assert agrees(module, torch.randn(2, 4))
    assert sum(engine_of(module).events.fallbacks.values()) == before


def test_random_numbers_are_drawn_as_eager_draws_them() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    for backend in ("aten", "auto"):
        module = ap.optimize(Noisy().eval(), Config(backend=backend, cache_dir=None))
        results = []
        for forward in (module, engine_of(module).original):
            torch.manual_seed(3)
            results.append(forward(torch.zeros(2, 2)))
        assert torch.equal(*results)


def test_gradients_come_from_eager() -> None:
    module = ap.optimize(nn.Linear(4, 4).eval(), aten())
    x = torch.randn(2, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert "gradients" in " ".join(engine_of(module).events.fallbacks)


def test_results_are_the_callers_own() -> None:
    module = ap.optimize(nn.Linear(4, 4).eval(), Config(cache_dir=None))
    x = torch.randn(2, 4)
    with torch.no_grad():
        first = module(x)
        kept = first.clone()
        second = module(x)
        assert torch.equal(first, kept)
        second.zero_()
        assert torch.equal(module(x), kept)


def test_results_made_of_weights_alone_are_the_callers_own() -> None:
    class Product(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.weight @ self.weight, x

    module = ap.optimize(Product(4, 4).eval(), aten())
    with torch.no_grad():
        module(torch.zeros(1))[0].zero_()
        assert torch.equal(module(torch.zeros(1))[0], module.weight @ module.weight)


# ---- weights


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.plain = torch.ones(4)
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.first(self.norm(x))) * self.plain


WRITES = {
    "a buffer": lambda m: m.norm.running_mean.add_(1),
    "a buffer behind our back": lambda m: (m.norm.running_var.data.mul_(4), ap.rebind(m)),
    "a plain tensor": lambda m: m.plain.mul_(3),
    "another plain tensor": lambda m: setattr(m, "plain", torch.full((4,), 5.0)),
    "a tied weight": lambda m: m.tied.weight.mul_(2),
    "another parameter": lambda m: setattr(m.first, "weight", nn.Parameter(torch.eye(4))),
    "untied": lambda m: setattr(m, "tied", nn.Linear(4, 4, bias=False)),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("backend", ["aten", "auto"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write: str, backend: str) -> None:
    module = ap.optimize(Normed().eval(), Config(backend=backend, cache_dir=None))
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = module(x)
        WRITES[write](module)
        if write == "double":
            x, module.plain = x.double(), module.plain.double()
        after, eager = module(x), engine_of(module).original(x)
        torch.testing.assert_close(after, eager)
        assert write == "double" or not torch.equal(before, after)
    assert not engine_of(module).events.fallbacks


# ---- who stands where


def test_a_module_inside_an_optimized_one_may_be_optimized_too() -> None:
    inner = nn.Linear(4, 4)
    module = ap.optimize(nn.Sequential(ap.optimize(inner, aten()), nn.ReLU()).eval(), aten())
    assert agrees(module, torch.randn(2, 4))
    ap.restore(module)
    assert isinstance(inner.__dict__["forward"], Engine)
    ap.restore(inner)
    assert "forward" not in inner.__dict__


def test_a_forward_put_around_the_engine_stays() -> None:
    module = ap.optimize(nn.Linear(4, 4).eval(), aten())
    engine = engine_of(module)
    module.forward = lambda x: engine(x) * 2
    engine.remove()
    x = torch.randn(2, 4)
    assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias) * 2)


def test_a_forward_of_the_user_is_kept_and_comes_back() -> None:
    module = nn.Linear(4, 4).eval()
    mine = module.forward = lambda x: nn.functional.linear(x, module.weight) * 2
    ap.optimize(module, aten())
    assert agrees(module, torch.randn(2, 4))
    assert ap.restore(module).forward is mine


def test_only_code_with_a_version_is_kept_on_disk(tmp_path: Path) -> None:
    for module, kept in ((nn.Linear(4, 4), 1), (Scales(), 0)):
        cache = tmp_path / type(module).__name__
        ap.optimize(module.eval(), aten(cache_dir=cache))
        agrees(module, torch.randn(2, 4), *([2] if isinstance(module, Scales) else []))
        assert len(list(cache.rglob("*.json.gz"))) == kept


def test_a_damaged_record_is_captured_again(tmp_path: Path) -> None:
    for damage in (b"", b"\x80\x04K\x01.", None):
        module = ap.optimize(nn.Linear(4, 4).eval(), aten(cache_dir=tmp_path))
        assert agrees(module, torch.randn(2, 4))
        assert engine_of(module).events.captures == (1 if damage is not None or not list(tmp_path.rglob("x")) else 0)
        if damage is not None:
            (record,) = tmp_path.rglob("*.json.gz")
            record.write_bytes(damage)


def test_versions_are_part_of_a_records_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (("a",), ("b",), ("a",)):
        monkeypatch.setattr("allaprima.engine._versions", lambda version=version: version)
        module = ap.optimize(nn.Linear(4, 4).eval(), aten(cache_dir=tmp_path))
        assert agrees(module, torch.randn(2, 4))
    assert engine_of(module).events.loaded == 1
    assert len(list(tmp_path.rglob("*.json.gz"))) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = ap.optimize(nn.Linear(4, 4).eval(), aten(cache_dir=tmp_path / "file"))
    assert agrees(module, torch.randn(2, 4))


def test_a_capture_does_not_see_what_other_threads_call() -> None:
    """torch's tracer replaces Module.__call__ for the whole process while it works; this call of another thread begins
    inside a part of the captured module and ends after it."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    begun, over = Event(), Event()

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            begun.set()
            over.wait(20)
            return x + 1

    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(pool.submit(slow, given))
            assert begun.wait(20)
            return x * 2

    slow, given, calls = Slow(), torch.randn(3, 4), []
    with ThreadPoolExecutor(4) as pool:
        root = nn.Sequential(Part(), nn.SiLU()).eval()
        root.slow = slow  # calls of the captured module's own parts are what the tracer records
        root.forward = lambda x: root[1](root[0](x))
        module = ap.optimize(root, aten())
        with torch.no_grad():
            result = module(given)
        over.set()
        torch.testing.assert_close(result, nn.functional.silu(given * 2))
        assert engine_of(module).events.captures == 1
        assert calls
        for call in calls:
            torch.testing.assert_close(call.result(), given + 1)


def test_captures_of_several_threads_take_turns() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def first_call(width: int) -> None:
        parts = [part for _ in range(12) for part in (nn.Linear(width, width), nn.SiLU())]
        module = nn.Sequential(*parts).eval()
        given = torch.randn(2, width)
        with torch.no_grad():
            wanted = module(given)
            torch.testing.assert_close(ap.optimize(module, aten())(given), wanted)
        assert engine_of(module).events.captures == 1
        assert not engine_of(module).events.fallbacks

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(first_call, (3, 4, 5, 6)))


def test_two_threads_share_an_engine() -> None:
    from concurrent.futures import ThreadPoolExecutor

    module = ap.optimize(nn.Sequential(nn.Linear(4, 4), nn.SiLU()).eval(), Config(cache_dir=None))
    inputs = [torch.randn(i % 5 + 1, 4) for i in range(40)]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, inputs))
    for x, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, engine_of(module).original(x))
    assert engine_of(module).events.captures == 1


def test_a_module_that_did_not_change_is_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is an attribute of the module that it watches: its own state must not count as a change."""
    described = []
    describe = engine_module.structure
    monkeypatch.setattr(engine_module, "structure", lambda module: described.append(module) or describe(module))
    module = ap.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), aten())
    module(torch.randn(2, 4))
    described.clear()
    for rows in (1, 2, 3):
        module(torch.randn(rows, 4))
    assert not described
    module[1].inplace = True
    module(torch.randn(2, 4))
    assert described


def test_an_argument_that_says_what_its_default_says_is_no_other_call() -> None:
    class Optional(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, twice: bool = False) -> torch.Tensor:
            return (x if mask is None else x * mask) * (2 if twice else 1)

    module = ap.optimize(Optional().eval(), aten())
    x = torch.randn(2, 4)
    for arguments in ({}, {"mask": None}, {"twice": False}, {"mask": None, "twice": False}):
        assert agrees(module, x, **arguments)
    assert engine_of(module).events.captures == 1
    assert agrees(module, x, twice=True)
    assert engine_of(module).events.captures == 2


def test_a_stage_that_its_backend_cannot_build_runs_on_aten_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from allaprima.backends.openvino.runtime import OpenVinoExecutable

    def broken(self: Any, weights: Any, changed: Any) -> bool:
        raise RuntimeError("no primitive for this processor")

    monkeypatch.setattr(OpenVinoExecutable, "bind", broken)
    module = ap.optimize(nn.Linear(4, 4).eval(), Config(cache_dir=None))
    assert agrees(module, torch.randn(3, 4))
    assert "no primitive for this processor" in str(ap.explain(module))


def test_a_list_of_timesteps_elsewhere_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(nn.Linear(2, 2), Config(cache_dir=None))
    here = torch.arange(5)
    assert engine._beside_weights(here) is here
    monkeypatch.setattr("allaprima.engine._placement", lambda module: (torch.device("meta"), torch.float32))
    there = engine._beside_weights(here)
    assert there.device.type == "meta"
    assert engine._beside_weights(here.clone()) is there, "the same numbers for the next picture"
    assert engine._beside_weights(here + 1) is not there


def test_a_timestep_of_a_list_is_taken_from_the_list_beside_the_weights() -> None:
    profile = Profile(timestep="timestep")
    engine = Engine(nn.Linear(2, 2), Config(cache_dir=None), profile)
    table = torch.arange(5.0)
    for args, kwargs in (((1, 2), {}), ((1,), {"timestep": 2})):
        new_args, new_kwargs = engine._with_timestep((table, 3), args, kwargs)
        found = new_kwargs.get("timestep", new_args[-1])
        assert float(found) == 3.0
        assert new_args[0] == 1
    assert engine._with_timestep(None, (1, 2), {}) == ((1, 2), {})
