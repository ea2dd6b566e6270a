from __future__ import annotations

import math

import numpy as np
import pytest

from allaprima.verification.metrics import highest, lowest, median, psnr, ratio, ssim


def test_psnr() -> None:
    a = np.zeros((8, 8, 3), np.float32)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + np.float32(0.001)) == pytest.approx(60, abs=1e-3)


def test_ssim_of_flat_pictures_is_the_formula() -> None:
    a, b = np.full((16, 20, 3), 0.2, np.float32), np.full((16, 20, 3), 0.6, np.float32)
    assert ssim(a, b) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-6)


def test_ssim_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((13, 12, 1)).astype(np.float32)
    b = (0.7 * a + 0.3 * rng.random(a.shape)).astype(np.float32)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for top in range(3):
        for left in range(2):
            x, y = (p[top : top + 11, left : left + 11, 0].astype(float) for p in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            vxy = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)


def test_ratio_of_errors() -> None:
    assert ratio(2.0, 1.0) == 2
    assert ratio(0.0, 0.0) == 0
    assert ratio(1e-9, 0.0) == math.inf
    assert math.isnan(ratio(math.nan, 1.0))


@pytest.mark.parametrize("none", [math.nan, math.inf])
def test_where_eager_has_no_number_a_number_of_ours_is_right(none: float) -> None:
    assert ratio(1e-3, none) == 0
    assert math.isnan(ratio(none, none)), "nobody can say that this is the same picture"


def test_a_median_is_no_number_if_a_value_is_none() -> None:
    assert median([3.0, 1.0, 2.0]) == 2
    assert math.isnan(median([1.0, math.nan, 1.0]))


def test_a_nan_is_the_lowest_and_the_highest() -> None:
    assert math.isnan(lowest([1.0, math.nan, 2.0]))
    assert math.isnan(highest([1.0, math.nan, 2.0]))
    assert (lowest([2.0, 1.0]), highest([2.0, 1.0])) == (1.0, 2.0)
