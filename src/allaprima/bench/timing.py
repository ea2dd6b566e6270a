"""Times that can be compared: the variants take turns in one process, so that what slows the machine slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round, in the order they were measured."""

    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The first and third quartile: half of the rounds lie between them."""
        if len(self.rounds_ms) < 2:
            return (self.rounds_ms[0], self.rounds_ms[0])
        first, _, third = statistics.quantiles(self.rounds_ms, n=4, method="inclusive")
        return (first, third)

    def speedup_over(self, other: Times) -> float:
        """How many times faster than `other`: the median over the rounds, in each of which both ran."""
        return statistics.median(o / s for o, s in zip(other.rounds_ms, self.rounds_ms, strict=True))


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    least_ms: float = 0.0,
) -> dict[str, Times]:
    """Time every call once a round, `repeats` rounds.

    Each round starts with another variant, so that none always runs behind the same neighbour's caches.

    least_ms   calls shorter than this are repeated within a round until it is reached, and the mean is kept
    """
    stopwatch = cuda_ms if torch.device(device).type == "cuda" else cpu_ms
    inner = {}
    for name, call in calls.items():
        for _ in range(warmup):
            once = stopwatch(call, 1)
        inner[name] = max(1, round(least_ms / max(once, 1e-6))) if warmup else 1
    names = list(calls)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            rounds[name].append(stopwatch(calls[name], inner[name]))
    return {name: Times(tuple(values)) for name, values in rounds.items()}


def cpu_ms(call: Callable[[], object], times: int = 1) -> float:
    """Wall-clock milliseconds of one call, the mean of `times`."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) * 1000 / times


def cuda_ms(call: Callable[[], object], times: int = 1) -> float:
    """Milliseconds between two events of the current stream around `times` calls, divided by `times`.

    A single call starts on an idle stream, so the time the host needs to launch counts.  Several follow one another as
    in a denoising loop, behind one that is not timed: the host's time counts where it is longer than the GPU's.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    if times > 1:
        call()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / times


def seconds(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Wall-clock seconds of one call, the device's work included."""
    start = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
