from __future__ import annotations

import pytest

from allaprima.errors import InputError
from allaprima.verification import summarize, verify
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
