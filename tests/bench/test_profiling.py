from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from allaprima.bench import profiling
from tests.bench.planning import plan_here
from tests.tiny import tiny_pipeline


def test_each_operator_beside_its_floor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_here(monkeypatch)
    pipe = tiny_pipeline().to("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(profiling, "subject", lambda *asked: pipe)
    monkeypatch.setattr(profiling, "CALLS", 1)
    path = tmp_path / "profile.json"
    assert profiling.main(["--what", "text", "--output", str(path)]) == 0
    (found,) = json.loads(path.read_text())
    rows = {row["operator"]: row for row in found["rows"]}
    assert rows.keys() >= {"linear.default", "layer_norm.default", "attention", "embedding.default"}
    assert all(row["us"] > 0 for row in found["rows"] if row["floor_us"])
    assert all(0 < row["floor_us"] < row["us"] for row in found["rows"] if row["floor_us"] is not None)
    assert rows["embedding.default"]["floor_us"] is None
    times = [row["us"] for row in found["rows"]]
    assert times == sorted(times, reverse=True)
    told = capsys.readouterr().out
    assert "text batch 1: " in told
    assert "by operator" in told
    assert "forward" not in pipe.text_encoder.__dict__


def test_kernels_are_counted_to_the_range_that_they_ran_in() -> None:
    def event(name: str, start: float, end: float, where: str = "CUDA") -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=where), time_range=SimpleNamespace(start=start, end=end)
        )

    one, two = profiling._PREFIX + "one", profiling._PREFIX + "two"
    events = [
        event(one, 10, 30), event("kernel a", 10, 14), event("kernel b", 25, 30), event("between", 31, 33),
        event(two, 40, 50), event("kernel c", 40, 50), event(one, 60, 61), event("kernel a", 60, 61),
        event(one, 0, 100, "CPU"), event("aten::add", 5, 90, "CPU"), event("before", 1, 2),
    ]  # fmt: skip
    assert profiling._on_device(events) == {one: 4 + 5 + 1, two: 10}
