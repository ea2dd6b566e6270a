"""A benchmark must not flatter: what is wrong, broken or endless has to come out as such."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allaprima import engine
from allaprima.bench import measure as subject
from allaprima.bench.floor import Ceiling
from allaprima.bench.measure import Outcome, Results, error_limit, error_to, measure
from allaprima.bench.memory import Peaks
from allaprima.bench.variants import VARIANTS
from allaprima.bench.workloads import Case, cases
from allaprima.capture import capture
from tests.tiny import tiny_pipeline

STEP, TEXT = Case("step", 64, 64, 1), Case("text", 0, 0, 1)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    """A variant whose UNet returns something else."""

    def variant(pipe: Any, components: Any) -> None:
        forward = pipe.unet.forward
        pipe.unet.forward = lambda *args, **kwargs: (change(forward(*args, **kwargs)[0]),)

    return variant


def broken(pipe: Any, components: Any) -> None:
    raise ImportError("no such compiler\nand much more")


def endless(pipe: Any, components: Any) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(60)

    pipe.unet.forward = forward


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "measured_ceiling", lambda dtype, device: Ceiling(1e11, 1e10))
    for name, variant in {
        "same": changed(lambda x: x),
        "wrong": changed(lambda x: x * 1.05),
        "nan": changed(lambda x: x * math.nan),
        "broken": broken,
        "compile": endless,
    }.items():
        monkeypatch.setitem(VARIANTS, name, variant)


def by_variant(results: Results, case: Case) -> dict[str, Outcome]:
    return {outcome.variant: outcome for outcome in results.outcomes if outcome.case == case}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_result(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline(dtype=dtype)
    said: list[str] = []
    names = ["same", "wrong", "nan", "broken", "compile"]
    results = measure(pipe, [STEP], names, repeats=3, compile_limit_s=0.2, say=said.append)
    found = by_variant(results, STEP)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "eager": "ok", "same": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed", "compile": "unfinished",
    }  # fmt: skip
    assert found["broken"].note == "ImportError: no such compiler"
    assert found["compile"].note == "unfinished after 0.2 s"
    for name in ("broken", "compile"):
        assert found[name].times is None
    for name in ("wrong", "nan"):
        assert not found[name].speedup
        assert "at most" in found[name].note
    assert set(found["same"].speedup) == {"eager", "wrong", "nan"}
    assert "time: step 64x64 batch 1" in said


def test_eager_is_always_measured_and_the_pipeline_untouched() -> None:
    pipe = tiny_pipeline()
    os.environ["ALLAPRIMA_CACHE"] = "mine"
    results = measure(pipe, [TEXT], ["same"], repeats=2)
    assert os.environ["ALLAPRIMA_CACHE"] == "mine"
    assert [outcome.variant for outcome in results.outcomes] == ["eager", "same"]
    assert "forward" not in pipe.unet.__dict__


def test_floor_and_first_calls() -> None:
    points = cases(["step", "text"], [(64, 64), (128, 64)], [1], 4)
    results = measure(tiny_pipeline(), points, ["same"], repeats=2, memory=lambda variant, case: Peaks(1, 2, 3))
    small, large = (by_variant(results, case)["same"] for case in points[:2])
    assert small.flops
    assert large.flops
    assert 1.5 < large.flops / small.flops < 2.5
    assert small.floor_ms == pytest.approx(max(small.flops / 1e11, 4 * 1.1e6 / 1e10) * 1000, rel=0.5)
    assert small.floor_share == pytest.approx(small.floor_ms / small.times.median_ms)  # type: ignore[union-attr, operator]
    build = results.builds[1]
    assert build.peaks == Peaks(1, 2, 3)
    assert build.first_s
    assert build.first_s >= small.first_s  # type: ignore[operator]
    assert build.new_size_s == (large.first_s, large.first_s)  # the text encoder's first call is no new size


def test_ours_tells_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(engine, "capture", lambda *args: made.append(args) or capture(*args))
    results = measure(tiny_pipeline(), [TEXT], ["ours"], repeats=2)
    ours = results.builds[1]
    assert by_variant(results, TEXT)["ours"].status == "ok"
    assert ours.captures == 1
    assert all(cost is not None and cost > 0 for cost in (ours.capture_s, ours.rebuild_s, ours.cached_s))
    assert len(made) == 1, "the second pipeline of this architecture captures nothing"
    assert ours.fallbacks == ()


def test_without_costs_captures_of_earlier_runs_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLAPRIMA_CACHE", str(tmp_path))
    first, second = (measure(tiny_pipeline(), [TEXT], ["ours"], repeats=2, costs=False) for _ in range(2))
    assert [results.builds[1].captures for results in (first, second)] == [1, 0]
    for results in (first, second):
        ours = results.builds[1]
        assert by_variant(results, TEXT)["ours"].status == "ok"
        assert (ours.rebuild_s, ours.cached_s, ours.fallbacks) == (None, None, ())


def test_errors_and_their_limits() -> None:
    truth = [torch.tensor([3.0, -4.0]), torch.tensor([0.0, 0.0])]
    assert error_to(truth, truth) == 0
    assert error_to(truth, [truth[0] + 1, truth[1] + 1]) == 0.25
    assert math.isnan(error_to(truth, [truth[0] * math.nan, truth[1]]))
    assert error_to(truth, [truth[0], torch.zeros(1, 2)]) == math.inf
    assert error_limit(torch.float32, 0.5) == pytest.approx(1e-3)  # 60 dB
    assert error_limit(torch.bfloat16, 0.01) == pytest.approx(0.02 + 2**-8)
    assert error_limit(torch.float16, 0.01) == pytest.approx(0.02 + 2**-11)


def test_a_case_that_fails_leaves_the_others() -> None:
    def picky(pipe: Any, components: Any) -> None:
        forward = pipe.unet.forward

        def only_square(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if sample.shape[-1] != sample.shape[-2]:
                raise ValueError("not square")
            return forward(sample, *args, **kwargs)

        pipe.unet.forward = only_square

    VARIANTS["same"] = picky  # the fixture puts it back
    results = measure(tiny_pipeline(), cases(["step"], [(72, 64), (64, 64)], [1], 4), ["same"], repeats=2)
    assert [(o.status, o.note) for o in results.outcomes if o.variant == "same"] == [
        ("failed", "ValueError: not square"),
        ("ok", ""),
    ]
