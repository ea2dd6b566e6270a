"""Kernels run on the GPU where there is one, else under Triton's interpreter, chosen before they are decorated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _let_tensors_bound_loops() -> None:
    """The interpreter of Triton 3.6 calls int() on arrays of shape [1], which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    given = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        given(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    _let_tensors_bound_loops()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU `make test` takes of a file only the tests that it names in SAMPLE, if it does."""
    for item in items:
        sample = getattr(getattr(item, "module", None), "SAMPLE", None)
        here = item.path.parent == Path(__file__).parent
        if here and sample and item.originalname not in sample and not torch.cuda.is_available():
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled() -> None:
    """On a GPU; until they are, stages run on ATen."""
    if torch.cuda.is_available():
        from allaprima.backends.cuda import warming
        from allaprima.backends.cuda.device import device_of

        warming.ready(torch.float16, device_of(0))
        warming.wait()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
