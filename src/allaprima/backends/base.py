"""What a backend is: it makes an Executable from the Graph of one stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch

from ..graph import Graph

WEIGHT_ROLES = ("parameter", "buffer", "constant", "derived")
INPUT_ROLES = ("input", "size")


class Executable(Protocol):
    """One stage, ready for every size.

    `bind` is called before the first `run` and after each change of the weights.  `run` takes the values of
    `graph.placeholders("input", "size")` in order (tensors, and ints for sizes) and returns the graph's results in
    tensors that no later run overwrites.
    """

    graph: Graph

    def bind(self, weights: Mapping[str, torch.Tensor], changed: Collection[str] | None = None) -> bool:
        """Take the weights: name of each placeholder whose role is in WEIGHT_ROLES -> its value.

        changed  which of them are new since the last time; None: all
        returns  whether anything had to be built for them
        """

    def run(self, inputs: Sequence[torch.Tensor | int]) -> list[torch.Tensor]: ...
