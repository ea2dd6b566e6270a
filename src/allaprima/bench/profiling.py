"""Where the time of one call goes: each operator's share beside its floor.

python -m allaprima.bench.profiling --arch sd15 --dtype float16 --what step,vae --sizes 512x512

The engine's plans are run launch by launch under torch's profiler, each launch in a range of its own that the kernels
are counted to.  Times are those of the kernels: what a CUDA graph saves between them does not show.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..backends import settle
from ..backends.cuda.device import Device
from ..backends.cuda.plan import Launch, Plan
from ..stage import Time
from .operators import Call, device_at, floor_of, parser_for, points_of
from .workloads import WORKLOADS, Case, aliased, subject

CALLS = 5
_PREFIX = "launch: "


@dataclass(frozen=True)
class Row:
    """All launches of one form in one call of the workload: how many, their time, and the floor of them, µs."""

    operator: str
    sizes: str
    kernel: str
    count: int
    us: float
    floor_us: float | None

    def __str__(self) -> str:
        floor = "" if self.floor_us is None else f"{self.floor_us:.1f}"
        share = "" if not self.floor_us or not self.us else f"{self.floor_us / self.us:.0%}"
        return f"{self.operator:<22}{self.count:>4}{self.us:>10.1f}{floor:>9}{share:>6}  {self.sizes}: {self.kernel}"


def profiled(pipe: Any, case: Case, device: Device) -> list[Row]:
    """Rows of one case, the longest first; `pipe` stays as it is."""
    from ..config import Config
    from ..pipelines import engines, optimize, restore

    own = aliased(pipe)
    optimize(own, Config(cache_dir=None, cuda_graphs=False))
    call = WORKLOADS[case.what].cycle(own, case)
    call()
    settle(own.device)
    call()
    runners = [r for engine in engines(own).values() for r in engine.runners()]
    steps = [r.executables[Time.STEP] for r in runners if Time.STEP in r.executables]
    plans: list[Plan] = [plan for executable in steps for plan in getattr(executable, "plans", [])]
    kinds: dict[str, tuple[Launch, int]] = {}
    for plan in plans:
        plan.launches = [_ranged(launch, kinds) for launch in plan.launches]
    times = _times(call, own.device)
    restore(own)
    rows = [_row(launch, count, times.get(label, 0.0) / CALLS, device) for label, (launch, count) in kinds.items()]
    return sorted(rows, key=lambda row: -row.us)


def _ranged(launch: Launch, kinds: dict[str, tuple[Launch, int]]) -> Launch:
    """The launch within a range that is named like all launches of its form."""
    call = Call(launch.choice, frozenset()) if launch.choice else None
    label = _PREFIX + (f"{call.name} {call.sizes} {call.choice.name}" if call else launch.operator)
    kinds[label] = launch, kinds.get(label, (launch, 0))[1] + 1
    given = launch.call

    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return given(*arguments, **options)

    return replace(launch, call=run)


def _times(call: Callable[[], object], place: torch.device) -> Counter[str]:
    """Range -> µs of the kernels in it over all calls; on the CPU the time of the range itself."""
    on_cuda = place.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as prof:
        for _ in range(CALLS):
            call()
        if on_cuda:
            torch.cuda.synchronize()
    if on_cuda and (found := _on_device(prof.events())):
        return found
    ranges: Counter[str] = Counter()
    for event in prof.events():
        if event.name.startswith(_PREFIX) and event.device_type.name == "CPU":
            ranges[event.name] += event.device_time_total if on_cuda else event.cpu_time_total
    return ranges


def _on_device(events: Iterable[Any]) -> Counter[str]:
    """Range -> µs of the kernels in it.  The device has each range from the start of its first kernel to the end of its
    last one, also for kernels that no operator of ATen launched."""
    there = [e for e in events if e.device_type.name != "CPU"]
    ranges = sorted((e for e in there if e.name.startswith(_PREFIX)), key=lambda e: e.time_range.start)
    starts = [e.time_range.start for e in ranges]
    found: Counter[str] = Counter()
    for event in there:
        if not event.name.startswith(_PREFIX):
            place = bisect_right(starts, event.time_range.start) - 1
            if place >= 0 and event.time_range.end <= ranges[place].time_range.end:
                found[ranges[place].name] += event.time_range.end - event.time_range.start
    return found


def _row(launch: Launch, count: int, us: float, device: Device) -> Row:
    if launch.choice is None:
        return Row(launch.operator.removeprefix("aten."), "", "aten", count, us, None)
    call = Call(launch.choice, frozenset())
    return Row(call.name, call.sizes, call.choice.name, count, us, count * floor_of(call, device)[2])


def table(case: Case, rows: Sequence[Row]) -> str:
    """A line for each form, and sums by operator."""
    lines = [f"{case}: {sum(r.us for r in rows) / 1000:.3f} ms in {sum(r.count for r in rows)} launches"]
    lines.append(f"{'operator':<22}{'n':>4}{'µs':>10}{'floor':>9}{'share':>6}  what")
    lines += map(str, rows)
    lines.append("by operator")
    for name in dict.fromkeys(r.operator for r in rows):
        own = [r for r in rows if r.operator == name]
        floors = [r.floor_us for r in own if r.floor_us is not None]
        floor = sum(floors) if floors else None
        whole = Row(name, f"{len(own)} forms", "", sum(r.count for r in own), sum(r.us for r in own), floor)
        lines.append(str(whole))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser_for(__doc__, what="step", output="benchmarks/profile.json").parse_args(arguments)
    pipe = subject(given.arch, given.model, given.dtype, given.device)
    found: list[dict[str, Any]] = []
    for case in points_of(given, pipe):
        rows = profiled(pipe, case, device_at(pipe.device))
        found.append({"case": str(case), "rows": [asdict(row) for row in rows]})
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(table(case, rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
