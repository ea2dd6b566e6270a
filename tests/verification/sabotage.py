"""Pipelines whose optimized side is wrong in a chosen way: what verification has to notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import allaprima
from allaprima.pipelines import engines
from tests.tiny import tiny_pipeline

SMALL = dict(num_inference_steps=3, height=64, width=72)
Change = Callable[[torch.Tensor, int], torch.Tensor]


def optimized(dtype: torch.dtype = torch.float32, **changes: Change) -> Any:
    """A pipeline whose engines run the eager modules; `changes` distort what an engine returns at its n-th call."""
    pipe = allaprima.optimize(tiny_pipeline(dtype=dtype))
    for name, engine in engines(pipe).items():
        engine._run = _distorted(engine, changes.get(name.replace(".", "_"), lambda x, n: x))
    return pipe


def _distorted(engine: Any, change: Change) -> Callable[..., Any]:
    calls = 0

    def run(args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = engine.original(*args, **kwargs)
        return change(result, calls) if isinstance(result, torch.Tensor) else (change(result[0], calls), *result[1:])

    return run


def noise(scale: float) -> Change:
    def change(x: torch.Tensor, n: int) -> torch.Tensor:
        return x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(n)).to(x)

    return change
