from __future__ import annotations

import numpy as np

from allaprima.verification import verify
from allaprima.verification.sheet import contact_sheet
from tests.verification.sabotage import SMALL, optimized


def test_every_picture_has_a_row_of_three() -> None:
    report = verify(optimized(), "a red apple", count=2, **SMALL)
    one, two = contact_sheet([report]), contact_sheet([report, report], across=2)
    assert (two.width, two.height) == (2 * one.width, one.height)
    cell = max(report.images[0][0].size)
    assert 3 * cell < one.width < 4 * cell
    pictures = np.asarray(one)[: one.height // 2]
    left, middle = pictures[:, 6 : 6 + 72], pictures[:, 6 + cell + 4 : 6 + cell + 4 + 72]
    top = 2 * 16 + 2
    assert np.array_equal(left[top : top + 64], middle[top : top + 64])  # eager and ours are equal here
    assert np.array_equal(left[top : top + 64], np.asarray(report.images[0][0]))


def test_large_pictures_are_shown_smaller() -> None:
    report = verify(optimized(), "a red apple", **SMALL)
    assert contact_sheet([report], largest=32).width < contact_sheet([report]).width
