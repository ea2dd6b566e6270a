from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from allaprima.errors import InputError
from allaprima.verification import summarize, verify
from allaprima.verification.report import Report
from tests.verification.sabotage import SMALL, noise, optimized


def test_one_failure_among_many_fails() -> None:
    good = verify(optimized(), "a cat", **SMALL)
    bad = verify(optimized(unet=noise(0.01)), "a dog", **SMALL)
    summary = summarize([good, bad, good])
    assert not summary.passed
    assert len(summary.failed) == 1
    assert "a dog" in summary.failed[0]
    with pytest.raises(InputError):
        summarize([])


def drawn(ratio: float, worst: float = 1.2) -> Report:
    """A report in half precision whose median step has this error over eager's."""
    made = verify(optimized(torch.bfloat16), "a cat", **SMALL)
    checks = tuple(
        replace(c, value=ratio if "noise prediction over eager's, median" in c.name else min(c.value, worst))
        for c in made.checks
    )
    return replace(made, checks=checks)


def test_one_drawing_may_scatter_where_the_median_does_not() -> None:
    summary = summarize([drawn(1.0), drawn(1.13), drawn(1.0)])
    assert summary.passed
    assert not summary.failed
    assert len(summary.scattered) == 1
    assert "a cat" in summary.scattered[0]
    assert "above the median's limit" in str(summary)
    assert not drawn(1.13).passed, "alone it has nothing but its own steps"


@pytest.mark.parametrize("ratio", [2.1, math.nan, math.inf])
def test_no_drawing_may_be_far_off(ratio: float) -> None:
    summary = summarize([drawn(1.0), drawn(ratio), drawn(1.0)])
    assert not summary.passed
    assert len(summary.failed) == 1


def test_a_median_above_the_limit_fails_though_no_drawing_does() -> None:
    reports = [drawn(1.0)] * 3
    worse = [replace(r, ours=replace(r.ours, steps=tuple(1.15 * s for s in r.eager.steps))) for r in reports]  # type: ignore[union-attr, type-var]
    assert summarize(reports).passed
    assert not summarize(worse).passed
