"""Plans where there is no GPU: an executable that works as the one of CUDA without graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from allaprima.backends.cuda.device import nearest
from allaprima.backends.cuda.plan import Plan, arguments_of, lower
from allaprima.config import Config
from allaprima.graph import Graph


class Planning:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.plans: list[Plan] = []
        self.sizes: list[Any] = []

    def bind(self, weights: Mapping[str, torch.Tensor], changed: Any = None) -> bool:
        self.weights = dict(weights)
        return False

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        given = arguments_of(self.graph, self.weights, inputs)
        sizes = [x.shape if isinstance(x, torch.Tensor) else x for x in inputs]
        for plan, known in zip(self.plans, self.sizes, strict=True):
            if known == sizes:
                return plan.run(given)
        plan, results = lower(self.graph, given, nearest(90))
        self.plans.append(plan)
        self.sizes.append(sizes)
        return results


def plan_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines rewrite and plan as on CUDA; on a GPU they do so anyway."""
    if torch.cuda.is_available():
        return

    def build(graph: Graph, config: Config, *rest: Any) -> tuple[Planning, str]:
        return Planning(graph), "cuda"

    monkeypatch.setattr("allaprima.runner.build", build)
    monkeypatch.setattr("allaprima.engine.preferred", lambda config, device: ("cuda", ""))
