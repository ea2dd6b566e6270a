"""The engine: one program for every size, every change noticed, nothing ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allaprima as ap
from allaprima.config import Config
from allaprima.engine import Engine
from allaprima.pipelines import engines


def aten(**settings: Any) -> Config:
    return Config(**{"backend": "aten", "cache_dir": None, **settings})


def engine_of(module: nn.Module) -> Engine:
    (engine,) = engines(module).values()
    return engine


def agrees(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the optimized module and its own forward give the same numbers."""
    with torch.no_grad():
        ours = module(*args, **kwargs)
        eager = engine_of(module).original(*args, **kwargs)
    return ours.dtype == eager.dtype and torch.equal(ours, eager)


# ---- sizes


class BranchesOnBatch(nn.Module):
    def __init__(self, limit: int = 10) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] >= self.limit else x + 1


class BranchesOnParity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] % 2 else x + 1


def test_a_branch_on_the_batch_makes_a_second_program_and_no_third() -> None:
    module = ap.optimize(BranchesOnBatch().eval(), aten())
    for rows in (4, 12, 1, 5, 11, 200, 9, 10):
        assert agrees(module, torch.randn(rows, 8))
    assert engine_of(module).events.captures == 2
    assert not engine_of(module).events.fallbacks


def test_a_branch_on_parity_is_right_on_both_sides() -> None:
    module = ap.optimize(BranchesOnParity().eval(), aten())
    for size in (4, 5, 6, 7, 8, 9):
        assert agrees(module, torch.randn(2, size))
