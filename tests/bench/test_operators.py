"""The operator timings: every candidate, right before fast, and nothing ends the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allaprima import ops
from allaprima.backends.cuda.choose import OPERATORS, Candidate, Form, Operator, choose
from allaprima.backends.cuda.device import nearest
from allaprima.bench import operators
from allaprima.bench.operators import Call, arguments_for, calls_of, floor_of, measure, plans_of, table
from allaprima.bench.workloads import Case
from tests.bench.planning import plan_here
from tests.tiny import tiny_pipeline

H100, HERE = nearest(90), torch.device("cuda" if torch.cuda.is_available() else "cpu")


def call_of(target: Any, *arguments: Any, cold: tuple[int, ...] = ()) -> Call:
    choice = choose(target, arguments, {}, H100)
    assert choice is not None
    return Call(choice, frozenset(cold), 1)


def a_linear() -> Call:
    add = [torch.empty(s, device=HERE) for s in ((2, 5, 16), (24, 16), (24,), (2, 5, 24))]
    return call_of(ops.linear_add, *add, cold=(1, 2))


def test_the_calls_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_here(monkeypatch)
    pipe = tiny_pipeline().to(HERE)
    ((case, plans),) = plans_of(pipe, [Case("text", 0, 0, 1)])
    calls = calls_of(plans)
    assert str(case) == "text batch 1"
    assert sum(c.count for c in calls) == sum(x.choice is not None for plan in plans for x in plan.launches) > 0
    assert {c.name for c in calls} >= {"linear.default", "layer_norm.default", "attention"}
    estimates = [c.count * c.choice.estimate_us for c in calls]
    assert estimates == sorted(estimates, reverse=True)
    linear = next(c for c in calls if c.name == "linear.default")
    assert {1, 2} <= linear.cold, "weight and bias"
    assert 0 not in linear.cold, "the activations"
    assert "forward" not in pipe.text_encoder.__dict__


def test_a_folded_weight_belongs_to_the_plain_one() -> None:
    x, weight, folded = (torch.empty(s, device=HERE) for s in ((1, 8, 4, 4), (16, 8, 3, 3), (64, 8, 2, 2)))
    call = call_of(ops.upsample_conv_folded, x, weight, folded, None, 8, 8, cold=(1, 2))
    for given in arguments_for(call, HERE, copies=2):
        torch.testing.assert_close(given[2], ops.fold_upsample_weight(given[1]))
    (made,) = measure([call], H100, HERE)
    assert {t.candidate.split()[1] for t in made.timed} >= {"cudnn"}
    assert not [t.note for t in made.timed if t.candidate.startswith("upsample cudnn") and t.note]


def test_arguments_lie_as_they_did() -> None:
    base = torch.empty(3, 7, 40, device=HERE)
    x, weight = base[:, 1:, 8:24], torch.empty(24, 16, device=HERE)
    call = call_of(torch.ops.aten.linear.default, x, weight, cold=(1,))
    one, two = arguments_for(call, HERE, copies=2)
    assert one[0].shape == x.shape
    assert one[0].stride() == x.stride()
    assert one[0].data_ptr() % 16 == call.choice.forms[0].misaligned
    assert one[0] is two[0], "activations stay warm"
    assert one[1] is not two[1], "weights are cold"
    mask = operators._random(Form(torch.Size([2, 3]), (3, 1), torch.bool, 0), HERE)
    assert mask.dtype == torch.bool
    assert operators._random(Form(torch.Size([0, 3]), (3, 1), torch.float32, 0), HERE).shape == (0, 3)


def test_the_floor() -> None:
    flops, moved, floor_us = floor_of(a_linear(), H100)
    assert flops == 2 * 10 * 24 * 16
    assert moved == 4 * (10 * 16 + 24 * 16 + 24 + 240 + 240)
    assert floor_us == pytest.approx(max(flops / 50e6, moved / 3e6))
    q = torch.empty(2, 9, 4, 8, device=HERE)
    assert floor_of(call_of(ops.attention, q, q, q, None, None, False), H100)[0] == 4 * 2 * 4 * 9 * 9 * 8


def test_candidates_are_compared_and_timed() -> None:
    (result,) = measure([a_linear()], H100, HERE)
    assert len(result.timed) > 1
    assert [t.note for t in result.timed] == [""] * len(result.timed)
    assert result.best is result.timed[0]
    assert result.chosen is not None
    assert result.best.us <= result.chosen.us  # type: ignore[union-attr, operator]
    assert sum(t.chosen for t in result.timed) == 1
    assert all(t.error <= t.limit for t in result.timed)  # type: ignore[operator]


def test_what_is_wrong_or_raises_is_told_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    call = a_linear()

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image\nand more")

    def candidates(arguments: Any, device: Any) -> Any:
        yield Candidate("good", ops.linear_add, 9.0)
        yield Candidate("wrong", lambda *a: ops.linear_add(*a) * 1.01, 1.0)
        yield Candidate("nan", lambda *a: ops.linear_add(*a) * float("nan"), 1.0)
        yield Candidate("small", lambda *a: ops.linear_add(*a)[0], 1.0)
        yield Candidate("broken", broken, 1.0)

    monkeypatch.setitem(OPERATORS, call.choice.target, Operator(candidates, 4))
    (result,) = measure([call], H100, HERE)
    notes = {t.candidate: t.note for t in result.timed}
    assert notes["good"] == ""
    assert notes["broken"] == "RuntimeError: no kernel image"
    assert all("at most" in notes[name] for name in ("wrong", "nan", "small"))
    assert result.best is not None
    assert result.best.candidate == "good"
    told = table("step", [result], 1)
    assert "none is right" in told, "the chosen one is not among them"
    assert "broken: RuntimeError" in told


def test_a_call_that_cannot_be_measured_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*arguments: Any) -> Any:
        raise MemoryError("too large")

    bad = a_linear()
    monkeypatch.setattr(operators, "floor_of", lambda c, d: unknown() if c is bad else floor_of(c, d))
    assert len(measure([bad, a_linear()], H100, HERE, most=1)) == 1
    assert "too large" in capsys.readouterr().err
    assert measure([a_linear()], H100, HERE, seconds=-1) == []


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_here(monkeypatch)
    monkeypatch.setattr(operators, "subject", lambda *asked: tiny_pipeline().to(HERE))
    path = tmp_path / "operators.jsonl"
    assert operators.main(["--what", "text", "--batches", "1,1", "--most", "2", "--output", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {
        "operator",
        "sizes",
        "dtype",
        "count",
        "floor_us",
        "candidate",
        "us",
        "estimate_us",
        "error",
        "chosen",
    } <= set(lines[0])
    told = capsys.readouterr().out
    assert "text batch 1: " in told
    assert "in all: chosen" in told
    names = {line["operator"] for line in lines}
    assert names >= {"attention", "linear_add"}
    few = tmp_path / "few.jsonl"
    operators.main(["--what", "text", "--seconds", "0", "--output", str(few)])
    assert few.read_text() == ""
