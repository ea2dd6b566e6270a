"""The results as a table on the terminal, JSON lines in a file and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from .measure import Outcome, Results
    from .timing import Times

MIB = 2**20
TRUSTED_SPREAD = 0.1  # half the distance between the quartiles over the median


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
    record["extra_s"] = outcome.extra_s
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
    """A line for each case, and under it a row for each variant; narrow enough for 80 columns."""
    table = _table("case, variant", "median ms", "±", "× eager", "× OV", "first s", "error", "floor")
    before = None
    for outcome in results.outcomes:
        if outcome.case != before:
            table.add_row(f"[bold]{outcome.case}[/]")
            before = outcome.case
        status = "" if outcome.status == "ok" else f" [bold red]{outcome.status}[/]"
        table.add_row(f"  {outcome.variant}{status}", *_cells(outcome))
    return table


def _cells(outcome: Outcome) -> list[str]:
    times = outcome.times
    return [
        f"{times.median_ms:.2f}" if times else "",
        f"{_half_spread(times):.0%}" if times else "",
        _number(outcome.speedup.get("eager"), ".2f"),
        _number(outcome.speedup.get("openvino"), ".2f"),
        _number(outcome.first_s, ".2g"),
        _number(outcome.error, ".0e"),
        _number(outcome.floor_share, ".0%"),
    ]


def _half_spread(times: Times) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    first, third = times.spread_ms
    return (third - first) / 2 / times.median_ms


def build_table(results: Results) -> Table:
    """What each variant costs before it is fast, and the memory it takes."""
    table = _table("variant", "first s", "again s", "size s", "weight s", "captures", "built MiB", "run MiB")
    for build in results.builds:
        table.add_row(
            build.variant,
            _number(build.first_s, ".2g"),
            _number(build.cached_s, ".2g"),
            _number(build.new_size_s[0] if build.new_size_s else None, ".2g"),
            _number(build.rebuild_s, ".2g"),
            _number(build.captures, "d"),
            _number(build.peaks.building / MIB if build.peaks else None, ".0f"),
            _number(build.peaks.running / MIB if build.peaks else None, ".0f"),
        )
    return table


def notes(results: Results) -> list[str]:
    """Why something has no time, or a time that does not count."""
    found = [f"{o.variant}, {o.case}: {o.status}: {o.note}" for o in results.outcomes if o.note]
    busy = [o for o in results.outcomes if o.times and _half_spread(o.times) > TRUSTED_SPREAD]
    if busy:
        found.append(
            f"{len(busy)} of the times scatter by more than {TRUSTED_SPREAD:.0%}: the machine was busy, measure again."
        )
    return found + [f"{b.variant} ran eager: {reason}" for b in results.builds for reason in b.fallbacks]


def _table(first: str, *headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


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
