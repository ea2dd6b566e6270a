"""The results as a table on the terminal, JSON lines in a file and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from .measure import Build, Outcome, Results

GIB, MIB = 2**30, 2**20


# ---- records -------------------------------------------------------------------------------------------------------


def records(run: dict[str, Any], results: Results) -> list[dict[str, Any]]:
    """Plain values, one record a line: first the run, then builds and outcomes."""
    ceiling = asdict(results.ceiling)
    return [
        {"kind": "run", **run, "ceiling": ceiling},
        *({"kind": "build", **asdict(build)} for build in results.builds),
        *(_outcome_record(outcome) for outcome in results.outcomes),
    ]


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    case, times = outcome.case, outcome.times
    record = {"kind": "outcome", **asdict(case), **asdict(outcome), "floor_share": outcome.floor_share}
    del record["case"], record["times"]
    if times:
        first, third = times.spread_ms
        record |= {"median_ms": times.median_ms, "quartiles_ms": [first, third], "rounds_ms": list(times.rounds_ms)}
    return record


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{compact(line)}\n" for line in lines), encoding="utf-8")


def compact(value: Any) -> str:
    """One line of JSON; floats in seven digits, and no NaN, which JSON does not know."""
    return json.dumps(_rounded(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if value - value == 0 else str(value)
    return value


# ---- tables --------------------------------------------------------------------------------------------------------


def outcome_table(results: Results) -> Table:
    """A row for each case and variant."""
    from rich.table import Table

    table = Table(title="Time of one call", title_justify="left")
    table.add_column("case")
    table.add_column("variant")
    for heading in ("median ms", "quartiles", "× eager", "× openvino", "first call s", "error", "of floor"):
        table.add_column(heading, justify="right")
    before = None
    for outcome in results.outcomes:
        if before not in (None, outcome.case):
            table.add_section()
        status = "" if outcome.status == "ok" else f" [bold red]{outcome.status}[/]"
        table.add_row(str(outcome.case) if outcome.case != before else "", outcome.variant + status, *_cells(outcome))
        before = outcome.case
    return table


def _cells(outcome: Outcome) -> list[str]:
    first = _number(outcome.first_s, ".3g")
    error = _number(outcome.error, ".1e")
    if outcome.times is None:
        return ["", outcome.note, "", "", first, error, ""]
    low, high = outcome.times.spread_ms
    return [
        f"{outcome.times.median_ms:.2f}",
        f"{low:.2f} to {high:.2f}",
        _number(outcome.speedup.get("eager"), ".2f"),
        _number(outcome.speedup.get("openvino"), ".2f"),
        first,
        error,
        _number(outcome.floor_share, ".0%"),
    ]


def build_table(results: Results) -> Table:
    """What each variant costs before it is fast, and the memory it takes."""
    from rich.table import Table

    table = Table(title="What it costs", title_justify="left")
    table.add_column("variant")
    headings = (
        "first result s", "second pipeline s", "new size s (worst)", "changed weight s", "captures", "capture s",
        "peak MiB building", "running",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for build in results.builds:
        table.add_row(build.variant, *_build_cells(build))
    return table


def _build_cells(build: Build) -> list[str]:
    new_size = f"{build.new_size_s[0]:.3g} ({build.new_size_s[1]:.3g})" if build.new_size_s else ""
    return [
        _number(build.first_s, ".3g") or build.note,
        _number(build.cached_s, ".3g"),
        new_size,
        _number(build.rebuild_s, ".3g"),
        "" if build.captures is None else str(build.captures),
        _number(build.capture_s, ".3g"),
        f"{build.peaks.building / MIB:.0f}" if build.peaks else "",
        f"{build.peaks.running / MIB:.0f}" if build.peaks else "",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- plot ----------------------------------------------------------------------------------------------------------

COLOURS = {"eager": "#9e9e9e", "channels-last": "#bcaaa4", "openvino": "#5c8fbf", "ours": "#d1603d"}


def plot(path: Path, title: str, results: Results) -> None:
    """Bars of speed over eager, a group for each case, the milliseconds written on them.

    raises   ImportError without matplotlib
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(outcome.case for outcome in results.outcomes))
    variants = list(dict.fromkeys(outcome.variant for outcome in results.outcomes))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(cases) * (len(variants) + 0.7)), layout="constrained")
    for j, variant in enumerate(variants):
        mine = {o.case: o for o in results.outcomes if o.variant == variant}
        places = [i * (len(variants) + 0.7) + j for i in range(len(cases))]
        speeds = [_speed_over_eager(mine[case]) for case in cases]
        bars = axes.barh(places, speeds, height=0.9, label=variant, color=COLOURS.get(variant))
        labels = [_bar_label(mine[case]) for case in cases]
        axes.bar_label(bars, labels, fontsize=8)
    axes.set_yticks([i * (len(variants) + 0.7) + (len(variants) - 1) / 2 for i in range(len(cases))], map(str, cases))
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.axvline(1, color="#616161", linewidth=0.8)
    axes.set_xlabel("times eager's speed")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(variants))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bar_label(outcome: Outcome) -> str:
    status = "" if outcome.status == "ok" else f" {outcome.status}"
    return (f" {outcome.times.median_ms:.4g} ms" if outcome.times else "") + status


def _speed_over_eager(outcome: Outcome) -> float:
    if outcome.variant == "eager" and outcome.times:
        return 1.0
    return outcome.speedup.get("eager", 0.0)
