"""Fixtures that several test files share.  The models themselves are built in tests/tiny.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Captured graphs of a test run go to a folder of that run, never to the user's own cache."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("ALLAPRIMA_CACHE", str(folder))
    return folder


@pytest.fixture
def repository() -> Path:
    """The root of the working tree."""
    return ROOT


@pytest.fixture
def tiny_pipe() -> StableDiffusionPipeline:
    """A fresh miniature of SD v1.5 with random weights, in float32."""
    from tests.tiny import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture
def tiny_bert_pipe() -> StableDiffusionPipeline:
    """A fresh miniature of Taiyi (BERT text encoder) with random weights, in float32."""
    from tests.tiny import tiny_bert_pipeline

    return tiny_bert_pipeline()
