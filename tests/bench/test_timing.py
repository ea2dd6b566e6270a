from __future__ import annotations

import time

import pytest

from allaprima.bench import timing
from allaprima.bench.timing import Times, alternate, seconds


def test_variants_take_turns_and_each_comes_first_in_its_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = alternate(calls, repeats=4, warmup=0)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert all(len(times.rounds_ms) == 4 for times in found.values())


def test_warmup_is_not_counted() -> None:
    calls: list[float] = []

    def slow_at_first() -> None:
        calls.append(0)
        time.sleep(0.05 if len(calls) <= 2 else 0)

    assert alternate({"a": slow_at_first}, repeats=5, warmup=2)["a"].median_ms < 20


def test_short_calls_are_repeated_within_a_round() -> None:
    calls: list[int] = []
    alternate({"a": lambda: calls.append(time.sleep(0.001) or 1)}, repeats=3, warmup=1, least_ms=5)
    assert 1 + 3 * 2 <= len(calls) <= 1 + 3 * 5


def test_median_quartiles_and_speedup() -> None:
    times = Times((4.0, 1.0, 2.0, 3.0, 100.0))
    assert times.median_ms == 3
    assert times.spread_ms == (2.0, 4.0)
    assert Times((7.0,)).spread_ms == (7.0, 7.0)


def test_speedup_pairs_the_rounds() -> None:
    """A disturbance that hits one round hits both variants: the ratio of that round stays."""
    ours, eager = Times((1.0, 10.0, 1.0)), Times((2.0, 20.0, 2.0))
    assert ours.speedup_over(eager) == 2
    assert eager.speedup_over(ours) == 0.5


def test_milliseconds_and_seconds() -> None:
    assert 9 < timing.cpu_ms(lambda: time.sleep(0.01)) < 100
    assert 9 < timing.cpu_ms(lambda: time.sleep(0.01), times=3) < 100
    assert 0.009 < seconds(lambda: time.sleep(0.01)) < 0.1


@pytest.mark.gpu
def test_cuda_events_wait_for_the_device() -> None:
    import torch

    a = torch.randn(8192, 8192, device="cuda")
    assert timing.cuda_ms(lambda: a @ a) > 5  # 1.1 TFLOP: no GPU of today does it faster; the launch alone takes 10 µs
