"""Every way to run every operator of a network, timed beside the one that the model chose.

python -m allaprima.bench.operators --arch sd15 --dtype float16 --what step,vae,text --sizes 512x512 --seconds 300

The calls are those of the plans which the engine makes for a workload, each distinct call once.  A candidate is first
compared with float32, then timed as it runs in a network: launches recorded in one CUDA graph, each with weights of its
own that lie in no cache.  The most expensive calls come first, so that a run which its time limit ends is of use.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import ops
from ..backends import settle
from ..backends.cuda.choose import OPERATORS, Candidate, Choice, Form
from ..backends.cuda.device import Device
from ..backends.cuda.plan import Plan, Slot
from ..graph import target_name
from ..stage import Time
from ..verification import exact_float32
from .report import compact
from .workloads import WORKLOADS, Case, aliased, cases, subject

COLD_BYTES = 128 << 20  # more than a GPU's second-level cache holds
GRAPH_US = 3000.0  # launches in a graph take about so long together, and are at most LAUNCHES
LAUNCHES = 20
REPLAYS = 5


@dataclass
class Call:
    """One distinct call of an operator.

    cold   which of its tensors, counted through, are weights: each launch finds others there
    count  how often the plans make it
    """

    choice: Choice
    cold: frozenset[int]
    count: int = 0

    @property
    def name(self) -> str:
        return target_name(self.choice.target).removeprefix("allaprima.ops.").removeprefix("aten.")

    @property
    def sizes(self) -> str:
        """Shapes of its tensors: "2x4096x320 960x320"."""
        return " ".join("x".join(map(str, form.shape)) for form in _forms(self.choice.forms))


@dataclass(frozen=True)
class Timed:
    """One candidate of a call.

    us        one launch, median over the replays; None where it was not timed
    estimate  what the model expects, µs
    error     root mean square of the difference to float32 over that of the truth;  limit: of that error
    note      why it is not timed, or why its time does not count
    """

    candidate: str
    estimate_us: float
    chosen: bool
    us: float | None = None
    error: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def counts(self) -> bool:
        return self.us is not None and not self.note


@dataclass(frozen=True)
class Measured:
    """All candidates of one call, the operations and bytes that it cannot do without, and the time that they take."""

    operator: str
    sizes: str
    dtype: str
    count: int
    gflops: float
    mbytes: float
    floor_us: float
    timed: tuple[Timed, ...] = field(default=())

    @property
    def chosen(self) -> Timed | None:
        return next((t for t in self.timed if t.chosen and t.counts), None)

    @property
    def best(self) -> Timed | None:
        return min((t for t in self.timed if t.counts), key=lambda t: t.us or 0.0, default=None)


# ---- which calls there are -----------------------------------------------------------------------------------------


def plans_of(pipe: Any, points: Sequence[Case]) -> Iterator[tuple[Case, list[Plan]]]:
    """For each case the plans that the engine makes for what runs at every call; `pipe` stays as it is."""
    from ..config import Config
    from ..pipelines import engines, optimize, restore

    for case in points:
        own = aliased(pipe)
        optimize(own, Config(cache_dir=None, cuda_graphs=False))
        call = WORKLOADS[case.what].cycle(own, case)
        call()
        settle(own.device)
        call()
        runners = [r for engine in engines(own).values() for r in engine.runners()]
        steps = [r.executables[Time.STEP] for r in runners if Time.STEP in r.executables]
        yield case, [plan for executable in steps for plan in getattr(executable, "plans", [])]
        restore(own)


def calls_of(plans: Sequence[Plan]) -> list[Call]:
    """The distinct calls, those first that the model expects to cost most in all."""
    found: dict[Any, Call] = {}
    for plan in plans:
        given = set(plan.placeholders.values())
        for launch in plan.launches:
            if launch.choice is not None:
                cold = frozenset(_cold(launch.choice.forms, launch.arguments, given))
                key = launch.choice.target, launch.choice.forms
                found.setdefault(key, Call(launch.choice, cold)).count += 1
    return sorted(found.values(), key=lambda c: -c.count * c.choice.estimate_us)


def _cold(forms: Any, templates: Any, given: set[int]) -> Iterator[int]:
    """Positions of the tensors that come from outside of the plan."""
    leaves = (t for t in _leaves(templates) if isinstance(t, Slot))
    return (i for i, slot in enumerate(leaves) if slot.index in given)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)) and not isinstance(value, Form):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _forms(value: Any) -> Iterator[Form]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Form))


# ---- arguments, truth and floor ------------------------------------------------------------------------------------


def arguments_for(call: Call, device: torch.device, copies: int = 1) -> list[list[Any]]:
    """Random arguments; the copies differ in the weights alone."""
    hot: dict[int, torch.Tensor] = {}

    def tensor(position: int, form: Form) -> torch.Tensor:
        if position in call.cold:
            return _random(form, device, weight=True)
        if position not in hot:
            hot[position] = _random(form, device)
        return hot[position]

    given = [_filled(call.choice.forms, tensor, itertools.count()) for _ in range(copies)]
    if call.choice.target is ops.upsample_conv_folded:
        # Both forms must make the same picture: the folded weight is the sums of the other's taps.
        for _, weight, folded, *_ in given:
            folded.copy_(ops.fold_upsample_weight(weight))
    return given


def _filled(value: Any, tensor: Callable[[int, Form], torch.Tensor], positions: Iterator[int]) -> Any:
    if isinstance(value, Form):
        return tensor(next(positions), value)
    if isinstance(value, tuple):
        return [_filled(item, tensor, positions) for item in value]
    return value


def _random(form: Form, device: torch.device, weight: bool = False) -> torch.Tensor:
    """Normal numbers in exactly this layout; a matrix is scaled so that its product has the size of its input."""
    if 0 in form.shape:
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=device)
    behind = form.misaligned // form.dtype.itemsize
    extent = behind + 1 + sum((n - 1) * s for n, s in zip(form.shape, form.stride, strict=True))
    numbers = torch.randn(extent, device=device)
    if weight and len(form.shape) > 1:
        numbers *= form.shape[1:].numel() ** -0.5
    if not form.dtype.is_floating_point:
        numbers = numbers > -2
    return numbers.to(form.dtype).as_strided(form.shape, form.stride, behind)


def floor_of(call: Call, device: Device) -> tuple[int, int, float]:
    """Operations, bytes (every argument read once, the result written once), and the time that either takes, µs."""
    forms = list(_forms(call.choice.forms))

    def empty(_position: int, form: Form) -> torch.Tensor:
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")

    given = _filled(call.choice.forms, empty, itertools.count())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = call.choice.target(*given)
    flops = int(counter.get_total_flops())
    moved = sum(_distinct(f.shape, f.stride) * f.dtype.itemsize for f in forms) + result.numel() * result.itemsize
    tflops = device.half_tflops if result.itemsize == 2 else device.float_tflops
    return flops, moved, max(flops / (tflops * 1e6), moved / (device.memory_tbs * 1e6))


def _distinct(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements that are stored: an expanded axis holds one."""
    count = 1
    for size, step in zip(shape, stride, strict=True):
        count *= size if step else min(size, 1)
    return count


def truth_of(call: Call, arguments: list[Any]) -> tuple[torch.Tensor, float]:
    """The operator in float32 (float64 for a float32 call) on these arguments, and the largest error that is
    right: twice ATen's in the same dtype, and the rounding of the result."""
    narrow = all(f.dtype != torch.float32 for f in _forms(call.choice.forms))
    wide = torch.float32 if narrow else torch.float64
    widened = _mapped(arguments, lambda t: t.to(wide) if t.is_floating_point() else t)
    with torch.no_grad(), exact_float32():
        truth = call.choice.target(*widened)
        own = call.choice.target(*arguments)
    return truth, 2 * error_to(truth, own) + torch.finfo(own.dtype).eps / 2


def error_to(truth: torch.Tensor, got: torch.Tensor) -> float:
    if got.shape != truth.shape:
        return float("inf")
    return float((got.to(truth.dtype) - truth).norm() / truth.norm().clamp_min(1e-30))


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, torch.Tensor) else value


# ---- timing --------------------------------------------------------------------------------------------------------


def measured(call: Call, device: Device, place: torch.device, most: int | None = None) -> Measured:
    """Compare and time the candidates of one call, in random order.

    most   only that many, the best by the model; the chosen one is always among them
    """
    flops, moved, floor_us = floor_of(call, device)
    dtype = str(next(_forms(call.choice.forms)).dtype).removeprefix("torch.")
    result = Measured(call.name, call.sizes, dtype, call.count, flops / 1e9, moved / 1e6, floor_us)
    weight_bytes = sum(
        f.shape.numel() * f.dtype.itemsize for i, f in enumerate(_forms(call.choice.forms)) if i in call.cold
    )
    launches = max(3, min(LAUNCHES, round(GRAPH_US / max(call.choice.estimate_us, 1.0)))) if place.type == "cuda" else 2
    copies = min(launches, COLD_BYTES // max(weight_bytes, 1) + 1)
    given = arguments_for(call, place, max(1, copies))
    truth, limit = truth_of(call, given[0])
    operator = OPERATORS[call.choice.target]
    found = sorted(operator.candidates(given[0][: operator.num_arguments], device), key=lambda c: c.estimate_us)[:most]
    random.Random(0).shuffle(found)
    timed = [_timed(c, call, given, launches, truth, limit) for c in found]
    return replace(result, timed=tuple(sorted(timed, key=lambda t: t.us or float("inf"))))


def _timed(
    candidate: Candidate, call: Call, given: list[list[Any]], launches: int, truth: torch.Tensor, limit: float
) -> Timed:
    """What raises is recorded with its error: it must not end the run."""
    result = Timed(candidate.name, candidate.estimate_us, candidate.name == call.choice.name, limit=limit)
    count = call.choice.num_arguments

    def launch(turn: int) -> Any:
        return candidate.call(*given[turn % len(given)][:count])

    try:
        with torch.no_grad():
            error = error_to(truth, launch(0))
            note = "" if error <= limit else f"error {error:.2g}, at most {limit:.2g} is right"
            us = (graph_us if truth.is_cuda else loop_us)(launch, launches)
    except Exception as raised:
        lines = str(raised).strip().splitlines() or [""]
        return replace(result, note=f"{type(raised).__name__}: {lines[0][:200]}")
    return replace(result, us=us, error=error, note=note)


def loop_us(launch: Callable[[int], Any], launches: int) -> float:
    """On the CPU: the median of single launches."""
    times = []
    for turn in range(launches):
        start = time.perf_counter()
        launch(turn)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def graph_us(launch: Callable[[int], Any], launches: int) -> float:
    """On a GPU: launches in one CUDA graph, replayed with empty caches; the median over the replays, for one launch."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for turn in range(launches):
                launch(turn)
        finally:
            graph.capture_end()
        graph.replay()
        times = [_replay_ms(graph) for _ in range(REPLAYS)]
        stream.synchronize()
    graph.reset()
    return statistics.median(times) * 1000 / launches


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    _scrap().zero_()  # what lay in the caches is gone
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@functools.cache
def _scrap() -> torch.Tensor:
    return torch.empty(2 * COLD_BYTES, dtype=torch.uint8, device="cuda")


# ---- the run -------------------------------------------------------------------------------------------------------


def measure(
    calls: Sequence[Call],
    device: Device,
    place: torch.device,
    *,
    seconds: float = float("inf"),
    most: int | None = None,
    done: Callable[[Measured], None] = lambda m: None,
) -> list[Measured]:
    """Calls in turn until the time is over.  A call that cannot be measured at all is told on stderr and left out."""
    end, results = time.monotonic() + seconds, []
    for call in calls:
        if time.monotonic() > end:
            break
        try:
            results.append(measured(call, device, place, most))
        except Exception as raised:
            print(f"{call.name} {call.sizes}: {type(raised).__name__}: {str(raised)[:200]}", file=sys.stderr)
            continue
        done(results[-1])
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return results


def records(case: str, result: Measured) -> list[dict[str, Any]]:
    """A record for each candidate."""
    about = {k: v for k, v in asdict(result).items() if k != "timed"}
    return [{"kind": "candidate", "case": case, **about, **asdict(t)} for t in result.timed]


def table(title: str, results: Sequence[Measured], num_calls: int) -> str:
    """A line for each call, the most expensive first: chosen against best, and the share of the floor."""
    rows = [f"{title}: {len(results)} of {num_calls} distinct calls timed"]
    rows.append(f"{'operator':<20}{'n':>4}{'chosen µs':>11}{'best µs':>9}{'model':>8}{'floor':>8}{'share':>7}  what")
    rows += [_row(r) for r in sorted(results, key=lambda r: -r.count * (r.chosen or Timed("", 0, True, 0.0)).us)]  # type: ignore[operator]
    both = [(r, r.chosen.us, r.best.us) for r in results if r.chosen and r.best]
    total, best = sum(r.count * (c or 0) for r, c, _ in both), sum(r.count * (b or 0) for r, _, b in both)
    floor = sum(r.count * r.floor_us for r, _, _ in both)
    if total and best:
        rows.append(
            f"in all: chosen {total / 1000:.3f} ms, best {best / 1000:.3f} ms ({best / total:.1%} of chosen), "
            f"floor {floor / 1000:.3f} ms ({floor / total:.0%})"
        )
    failed = sorted({f"{r.operator} {r.sizes}: {t.candidate}: {t.note}" for r in results for t in r.timed if t.note})
    return "\n".join(rows + failed)


def _row(r: Measured) -> str:
    chosen, best = r.chosen, r.best
    if chosen is None or best is None:
        return f"{r.operator:<20}{r.count:>4}{'none is right':>28}  {r.sizes}"
    better = "" if best is chosen else f" -> {best.candidate}"
    share = r.floor_us / (chosen.us or 1.0)
    return (
        f"{r.operator:<20}{r.count:>4}{chosen.us:>11.1f}{best.us:>9.1f}{chosen.estimate_us:>8.1f}{r.floor_us:>8.1f}"
        f"{share:>7.0%}  {r.sizes}: {chosen.candidate}{better}"
    )


def run(pipe: Any, points: Sequence[Case], device: Device, output: Path, *, seconds: float, most: int | None) -> str:
    """Measure and write a line a candidate to `output`.  returns the tables

    Cases share the time that is left equally; calls that an earlier case had are not timed again.
    """
    place, tables = pipe.device, []
    known: dict[Any, Measured] = {}
    end = time.monotonic() + seconds
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for i, (case, plans) in enumerate(plans_of(pipe, points)):
            calls = calls_of(plans)
            new = [c for c in calls if (c.choice.target, c.choice.forms) not in known]
            share = max(0.0, end - time.monotonic()) / (len(points) - i)
            for call in new:
                start = time.monotonic()
                for result in measure([call], device, place, seconds=share, most=most):
                    known[call.choice.target, call.choice.forms] = result
                    file.writelines(compact(line) + "\n" for line in records(str(case), result))
                    file.flush()
                share -= time.monotonic() - start
                if share <= 0:
                    break
            had = [(c, known.get((c.choice.target, c.choice.forms))) for c in calls]
            tables.append(table(str(case), [replace(m, count=c.count) for c, m in had if m], len(calls)))
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_for(__doc__, what="step,vae,text", output="benchmarks/operators.jsonl")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="time for all; the most expensive calls come first"
    )
    parser.add_argument("--most", type=int, default=None, help="time only that many candidates of each call")
    given = parser.parse_args(arguments)
    pipe = subject(given.arch, given.model, given.dtype, given.device)
    points = points_of(given, pipe)
    told = run(pipe, points, device_at(pipe.device), given.output, seconds=given.seconds, most=given.most)
    print(told)
    return 0


def parser_for(about: str | None, what: str, output: str) -> argparse.ArgumentParser:
    """The options that say which network is looked at, at which points, and where the result goes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help="an architecture with random weights: sd15")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--what", default=what)
    parser.add_argument("--sizes", default=None, help="WIDTHxHEIGHT,…; else the native size and its double")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def points_of(given: argparse.Namespace, pipe: Any) -> list[Case]:
    from .command import _batches, _sizes, _words

    return cases(_words(given.what), _sizes(given.sizes, pipe), _batches(given.batches), 20)


def device_at(place: torch.device) -> Device:
    from ..backends.cuda.device import device_of, nearest

    return device_of(place.index or 0) if place.type == "cuda" else nearest(90)


if __name__ == "__main__":
    sys.exit(main())
