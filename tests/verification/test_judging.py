from __future__ import annotations

import math

from allaprima.verification.judging import Check, Errors, judge


def test_a_check_fails_on_nan() -> None:
    assert not Check("x", math.nan, 1.0).passed
    assert not Check("x", math.nan, 1.0, at_least=True).passed
    assert Check("x", 60.0, 60.0, at_least=True).passed
    fine, nan = Errors((1.0,), (1.0,), 1.0, 1.0, 1.0), Errors((math.nan,), (1.0,), 1.0, 1.0, 1.0)
    assert all(check.passed for check in judge([10.0], fine, fine, half=True))
    assert not all(check.passed for check in judge([10.0], fine, nan, half=True))
    assert not judge([math.nan, 99.0], None, None, half=False)[0].passed
