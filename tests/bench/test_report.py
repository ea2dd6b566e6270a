from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from allaprima.bench import report
from allaprima.bench.floor import Ceiling
from allaprima.bench.measure import Build, Outcome, Results
from allaprima.bench.memory import Peaks
from allaprima.bench.timing import Times
from allaprima.bench.workloads import Case

STEP = Case("step", 64, 72, 1)


@pytest.fixture
def results() -> Results:
    eager, ours = Times((20.0, 22.0, 21.0)), Times((10.0, 11.0, 10.5))
    outcomes = (
        Outcome(STEP, "eager", "ok", times=eager, first_s=0.1, error=0.0, limit=1e-3, flops=10**9, floor_ms=5.0),
        Outcome(STEP, "ours", "ok", times=ours, first_s=2.0, error=1e-6, speedup={"eager": 2.0}, floor_ms=5.25),
        Outcome(STEP, "openvino", "wrong", note="error 0.1, at most 0.001 is right", times=ours, error=math.nan),
        Outcome(STEP, "compile", "unfinished", note="unfinished after 3 s"),
    )
    builds = (
        Build("eager", prepare_s=0.0, first_s=0.1, peaks=Peaks(1, 2**20, 3 * 2**20)),
        Build("ours", first_s=2.0, cached_s=0.5, new_size_s=(0.01, 0.02), rebuild_s=0.3, captures=1, capture_s=1.5),
        Build("compile", note="unfinished: unfinished after 3 s"),
    )
    return Results(outcomes, builds, Ceiling(1e11, 1e10))


def test_lines_of_json(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.jsonl"
    report.write_lines(path, report.records({"subject": "tiny"}, results))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines] == ["run"] + ["build"] * 3 + ["outcome"] * 4
    ours = lines[5]
    assert ours["median_ms"] == 10.5
    assert ours["rounds_ms"] == [10.0, 11.0, 10.5]
    assert ours["quartiles_ms"] == [10.25, 10.75]
    assert ours["floor_share"] == 0.5
    assert (ours["what"], ours["width"], ours["height"], ours["batch"]) == ("step", 64, 72, 1)
    assert ours["speedup"] == {"eager": 2.0}
    assert lines[6]["error"] == "nan"
    assert "median_ms" not in lines[7]


def test_compact_is_one_line_of_strict_json() -> None:
    text = report.compact({"a": [1.23456789, math.inf, math.nan], "名": None})
    assert text == '{"a":[1.234568,"inf","nan"],"名":null}'


def test_tables(results: Results) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report.outcome_table(results), report.build_table(results))
    text = console.export_text()
    line = lambda name: next(row for row in text.splitlines() if f"  {name} " in row)  # noqa: E731
    assert line("ours").split() == ["ours", "10.50", "2%", "2.00", "2", "1e-06", "50%"]
    assert line("openvino").split() == ["openvino", "wrong", "10.50", "2%", "nan"]
    assert line("compile").split() == ["compile", "unfinished"]
    assert "step 64x72 batch 1" in text
    assert max(map(len, text.splitlines())) < 90
    assert "compile, step 64x72 batch 1: unfinished: unfinished after 3 s" in report.notes(results)


def test_times_of_a_busy_machine_are_told(results: Results) -> None:
    assert not any("busy" in note for note in report.notes(results))
    scattered = Outcome(STEP, "ours", "ok", times=Times((10.0, 20.0, 30.0)))
    busy = Results((*results.outcomes, scattered), results.builds, results.ceiling)
    assert "1 of the times scatter" in report.notes(busy)[-1]


def test_plot(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    report.plot(tmp_path / "new" / "bench.png", "tiny", results)
    with Image.open(tmp_path / "new" / "bench.png") as picture:
        assert picture.width > 500


def test_what_a_bar_says(results: Results) -> None:
    labels: list[Any] = [report._bar_label(outcome) for outcome in results.outcomes]
    assert labels == [" 21 ms", " 10.5 ms", " 10.5 ms wrong", " unfinished"]
    assert [report._speed_over_eager(outcome) for outcome in results.outcomes] == [1.0, 2.0, 0.0, 0.0]
