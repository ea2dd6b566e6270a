"""One benchmark from beginning to end: build every variant, compare it with the truth, time it.

A variant that is wrong is called wrong wherever its time is shown, and no speed-up of it is reported: a wrong program's
is none.  One that fails or that a time limit ends is a result too, with its reason.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..backends import settle
from ..verification import MAX_RATIO, MIN_PSNR, exact_float32, precise_copy
from .floor import Ceiling, count_flops, measured_ceiling, weight_bytes
from .memory import Peaks
from .timing import Times, alternate, seconds
from .variants import LIMITED, VARIANTS, Unfinished, time_limit
from .workloads import STEP_OPTIONS, WORKLOADS, Case, aliased, component, components_of

Status = Literal["ok", "wrong", "failed", "unfinished"]
Say = Callable[[str], None]

LOOP_MS = 60.0
"""On CUDA short calls follow one another for so long, as the steps of a picture do."""


@dataclass(frozen=True)
class Outcome:
    """One variant at one case.

    note        why it is not ok
    first_s     the first call at this size: building, capturing or compiling included
    second_s    the second call: recording a CUDA graph included
    error       root mean square of the difference to the truth, over the truth's largest magnitude
    limit       of that error; the truth is eager itself in float32, else a float32 run
    speedup     name of another variant -> how many times faster this one is; empty unless this one is right
    floor_ms    all operations at the machine's measured best, every weight read once
    """

    case: Case
    variant: str
    status: Status
    note: str = ""
    first_s: float | None = None
    second_s: float | None = None
    error: float | None = None
    limit: float | None = None
    times: Times | None = None
    speedup: Mapping[str, float] = field(default_factory=dict)
    flops: int | None = None
    floor_ms: float | None = None

    @property
    def floor_share(self) -> float | None:
        return self.floor_ms / self.times.median_ms if self.floor_ms and self.times else None

    @property
    def extra_s(self) -> float | None:
        """What the first two calls took more than later ones: all that a new size costs."""
        if self.first_s is None or self.second_s is None or self.times is None:
            return None
        return max(0.0, self.first_s + self.second_s - 2 * self.times.median_ms / 1000)


@dataclass(frozen=True)
class Build:
    """What a variant costs before it is fast.

    prepare_s    before the first call: conversion for OpenVINO, next to nothing for the others
    first_s      prepare_s and the first call, with nothing cached: capture included
    cached_s     the same again for another pipeline of this architecture
    new_size_s   the first call at a size never seen, median and worst
    rebuild_s    the first call after a weight was changed
    captures     graphs captured for all components and cases, and capture_s how long that took
    """

    variant: str
    prepare_s: float | None = None
    first_s: float | None = None
    cached_s: float | None = None
    new_size_s: tuple[float, float] | None = None
    rebuild_s: float | None = None
    captures: int | None = None
    capture_s: float | None = None
    rebuilds: int | None = None
    fallbacks: tuple[str, ...] = ()
    peaks: Peaks | None = None
    note: str = ""


@dataclass(frozen=True)
class Results:
    outcomes: tuple[Outcome, ...]
    builds: tuple[Build, ...]
    ceiling: Ceiling


@dataclass
class _Entry:
    """A variant under way: its own pipeline, and at which cases it is right."""

    name: str
    pipe: Any = None
    build: dict[str, Any] = field(default_factory=dict)
    found: dict[Case, dict[str, Any]] = field(default_factory=dict)
    ended: tuple[Status, str] | None = None

    def runs(self, case: Case) -> bool:
        return self.found[case]["status"] in ("ok", "wrong")


def measure(
    pipe: Any,
    cases: Sequence[Case],
    variants: Sequence[str],
    *,
    repeats: int = 20,
    compile_limit_s: float = 300.0,
    costs: bool = True,
    memory: Callable[[str, Case], Peaks] | None = None,
    say: Say = lambda line: None,
) -> Results:
    """Measure every variant at every case.

    pipe       not optimized; it is left as it is
    variants   names of `VARIANTS`; eager is always among them, as the measure of the others
    costs      whether to measure what a first call, a changed weight and a second pipeline cost; else captures of
               earlier runs are used, which is quicker
    memory     (variant, case) -> peak memory, or None to leave it out
    say        is told what is going on
    """
    names = list(dict.fromkeys(["eager", *variants]))
    ceiling = measured_ceiling(pipe.unet.dtype, pipe.device.type)
    with _empty_cache() if costs else contextlib.nullcontext():
        truths = _truths(pipe, cases, say)
        entries = [_built(pipe, name, cases, truths, compile_limit_s, say) for name in names]
        _gate(entries, cases, pipe.unet.dtype)
        times = {case: _timed(entries, case, repeats, say) for case in cases}
        for entry in sorted(entries, key=lambda entry: entry.name == "ours"):
            if entry.name == "ours" and not entry.ended:
                if costs:
                    _later_costs(entry, pipe, cases[0], say)
                entry.build |= _told(entry)
            entry.pipe = None  # its memory is needed: of SD 1.5 in float32 each copy takes gigabytes
    # Before and after: what disturbed the machine at one end should not make the floor look near.
    ceiling = ceiling.or_better(measured_ceiling(pipe.unet.dtype, pipe.device.type))
    for entry in entries:
        entry.build["peaks"] = memory(entry.name, cases[0]) if memory and not entry.ended else None
    floors = {case: _floor(pipe, case, ceiling) for case in cases}
    outcomes = [_outcome(entry, case, times[case], floors[case]) for case in cases for entry in entries]
    return Results(tuple(outcomes), tuple(Build(e.name, **e.build) for e in entries), ceiling)


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """Captures of earlier runs must not make this one look quick."""
    before = os.environ.get("ALLAPRIMA_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALLAPRIMA_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("ALLAPRIMA_CACHE")
            if before is not None:
                os.environ["ALLAPRIMA_CACHE"] = before


# ---- correctness ---------------------------------------------------------------------------------------------------


def _truths(pipe: Any, cases: Sequence[Case], say: Say) -> dict[Case, list[torch.Tensor]]:
    """float32: eager itself.  Half precision: the same weights in float32."""
    say("reference")
    judge = aliased(pipe) if pipe.unet.dtype == torch.float32 else precise_copy(pipe, torch.float32)
    judge.set_progress_bar_config(disable=True)
    with contextlib.nullcontext() if pipe.unet.dtype == torch.float32 else exact_float32():
        return {case: WORKLOADS[case.what].outputs(judge, case) for case in cases}


def error_to(truth: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Root mean square of the difference over the largest magnitude of the truth; infinite where the shapes differ."""
    if any(g.shape != t.shape for g, t in zip(got, truth, strict=True)):
        return math.inf
    difference = torch.cat([(g - t).flatten() for g, t in zip(got, truth, strict=True)])
    return float(difference.square().mean().sqrt() / max(float(t.abs().max()) for t in truth))


def _gate(entries: Sequence[_Entry], cases: Sequence[Case], dtype: torch.dtype) -> None:
    """Mark what is wrong.  The first entry is eager, whose own error is the measure in half precision."""
    for case in cases:
        limit = error_limit(dtype, entries[0].found[case].get("error", 0.0))
        for entry in entries:
            found = entry.found[case]
            if "error" in found:
                found["limit"] = limit
                if not found["error"] <= limit:  # a NaN is wrong too
                    found |= {"status": "wrong", "note": f"error {found['error']:.2g}, at most {limit:.2g} is right"}


def error_limit(dtype: torch.dtype, error_eager: float) -> float:
    """float32: 60 dB below the truth's largest magnitude.  Half precision: twice eager's, and the result's rounding."""
    if dtype == torch.float32:
        return float(10 ** (-MIN_PSNR / 20))
    return MAX_RATIO * error_eager + torch.finfo(dtype).eps / 2


# ---- the stages of a measurement -----------------------------------------------------------------------------------


def _built(pipe: Any, name: str, cases: Sequence[Case], truths: Mapping[Case, Any], limit_s: float, say: Say) -> _Entry:
    """Prepare the variant, run each case once and compare it with the truth."""
    entry = _Entry(name, aliased(pipe))
    paths = components_of([case.what for case in cases])
    limit = (lambda: time_limit(limit_s)) if name in LIMITED else contextlib.nullcontext
    say(f"{name}: prepare")
    try:
        entry.build["prepare_s"] = seconds(lambda: VARIANTS[name](entry.pipe, paths), pipe.device)
    except Exception as raised:
        entry.ended = _reason(raised)
    for case in cases:
        if entry.ended:
            entry.found[case] = _said(entry.ended)
            continue
        say(f"{name}: {case}")
        try:
            with limit():
                call = WORKLOADS[case.what].cycle(entry.pipe, case)
                first_s = seconds(call, pipe.device)
                settle(pipe.device)
                second_s = seconds(call, pipe.device)
                error = error_to(truths[case], WORKLOADS[case.what].outputs(entry.pipe, case))
            entry.found[case] = {"status": "ok", "first_s": first_s, "second_s": second_s, "error": error}
        except (Exception, Unfinished) as raised:
            reason = _reason(raised)
            entry.found[case] = _said(reason)
            if reason[0] == "unfinished":
                entry.ended = reason  # or every further case would take the whole limit
    entry.build |= _first_calls(entry, cases)
    return entry


def _reason(raised: BaseException) -> tuple[Status, str]:
    """Any variant may fail in any way; what it raised becomes its result, and the others are measured all the same."""
    if isinstance(raised, Unfinished):
        return "unfinished", str(raised)
    lines = str(raised).strip().splitlines() or [""]
    return "failed", f"{type(raised).__name__}: {lines[0][:200]}"


def _said(reason: tuple[Status, str]) -> dict[str, Any]:
    return dict(zip(("status", "note"), reason, strict=True))


def _first_calls(entry: _Entry, cases: Sequence[Case]) -> dict[str, Any]:
    """The very first call, and the first ones at further sizes of a component that has run before."""
    if entry.ended:
        return {"note": ": ".join(entry.ended)}
    firsts = [(case.what, entry.found[case]["first_s"]) for case in cases if entry.runs(case)]
    if not firsts:
        return {"note": entry.found[cases[0]]["note"]}
    later = [first for i, (what, first) in enumerate(firsts) if what in {name for name, _ in firsts[:i]}]
    return {
        "first_s": entry.build["prepare_s"] + firsts[0][1],
        "new_size_s": (statistics.median(later), max(later)) if later else None,
    }


def _timed(entries: Sequence[_Entry], case: Case, repeats: int, say: Say) -> dict[str, Times]:
    say(f"time: {case}")
    calls = {e.name: WORKLOADS[case.what].cycle(e.pipe, case) for e in entries if e.runs(case)}
    device = entries[0].pipe.device
    return alternate(calls, repeats=repeats, device=device, least_ms=LOOP_MS if device.type == "cuda" else 0.0)


def _later_costs(entry: _Entry, pipe: Any, case: Case, say: Say) -> None:
    """What a changed weight and a second pipeline cost."""
    say(f"{entry.name}: a changed weight, a second pipeline")
    call = WORKLOADS[case.what].cycle(entry.pipe, case)
    with torch.no_grad():
        for path in components_of([case.what]):
            next(component(entry.pipe, path).parameters()).mul_(1)  # the same numbers, and a change all the same
    entry.build["rebuild_s"] = seconds(call, pipe.device)
    second = aliased(pipe)
    prepare_s = seconds(lambda: VARIANTS[entry.name](second, components_of([case.what])), pipe.device)
    entry.build["cached_s"] = prepare_s + seconds(WORKLOADS[case.what].cycle(second, case), pipe.device)


def _told(entry: _Entry) -> dict[str, Any]:
    """What `explain` counted."""
    from ..explanation import explain

    told = explain(entry.pipe)
    return {
        "captures": told.captures,
        "capture_s": told.capture_s,
        "rebuilds": told.rebuilds,
        "fallbacks": tuple(f"{count} x {why}" for why, count in told.fallbacks.items()),
    }


# ---- the floor and the result --------------------------------------------------------------------------------------


def _floor(pipe: Any, case: Case, ceiling: Ceiling) -> tuple[int, float] | None:
    """Operations of one call and the time they need at the ceiling; a whole picture is no single call."""
    workload = WORKLOADS[case.what]
    if workload.component is None:
        return None
    module = component(pipe, workload.component)
    flops = count_flops(module, *_arguments_of(case, workload.arguments(pipe, case)[0]))
    return flops, ceiling.floor_ms(flops, weight_bytes(module))


def _arguments_of(case: Case, arguments: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
    if case.what == "step":
        sample, timestep, prompt = arguments
        return [sample, timestep], {"encoder_hidden_states": prompt, **STEP_OPTIONS}
    return list(arguments), {}


def _outcome(entry: _Entry, case: Case, times: Mapping[str, Times], floor: tuple[int, float] | None) -> Outcome:
    mine = times.get(entry.name)
    right = mine if entry.found[case]["status"] == "ok" else None
    others = {name: right.speedup_over(t) for name, t in times.items() if name != entry.name} if right else {}
    flops, floor_ms = floor or (None, None)
    return Outcome(case, entry.name, times=mine, speedup=others, flops=flops, floor_ms=floor_ms, **entry.found[case])
