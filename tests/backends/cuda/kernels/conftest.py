"""Triton's interpreter is slow: without a GPU, `make test` takes every eighth case of a test, `make prove` all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SAMPLE = 8


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    seen: Counter[str] = Counter()
    for item in items:
        if item.path.parent == HERE:
            test = item.nodeid.split("[")[0]
            if seen[test] % SAMPLE:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
