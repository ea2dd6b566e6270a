"""The reference backend: the graph's own operators, run by PyTorch on any device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..graph import Graph
from .base import INPUT_ROLES


class AtenExecutable:
    """Runs the graph as it stands."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._module = graph.module()
        self._placeholders = graph.placeholders()
        self._weights: dict[str, torch.Tensor] = {}

    def bind(self, weights: Mapping[str, torch.Tensor], changed: Collection[str] | None = None) -> bool:
        self._weights = dict(weights)
        return False

    def run(self, inputs: Sequence[torch.Tensor | int]) -> list[Any]:
        given = iter(inputs)
        arguments = [
            next(given) if p.meta["role"] in INPUT_ROLES else self._weights[p.name] for p in self._placeholders
        ]
        return list(self._module(*arguments))
