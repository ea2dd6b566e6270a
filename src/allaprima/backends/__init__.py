"""Choosing a backend for a stage."""

from __future__ import annotations

import torch

from ..config import Config
from ..graph import Graph
from .aten import AtenExecutable
from .base import Executable


def build(graph: Graph, config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Executable, str]:
    """An Executable for a stage, and in words which backend it is and why."""
    if config.backend == "aten":
        return AtenExecutable(graph), "aten: asked for"
    if device.type != "cpu":
        return AtenExecutable(graph), f"aten: no other backend serves {device.type} yet"
    from . import openvino

    if reason := openvino.available():
        return AtenExecutable(graph), f"aten: {reason}"
    if missing := openvino.unsupported(graph):
        return AtenExecutable(graph), f"aten: OpenVINO cannot run {'; '.join(missing[:3])}"
    return openvino.OpenVinoExecutable(graph, dtype=dtype, threads=config.threads), "openvino"
