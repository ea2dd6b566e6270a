"""Choosing a backend for a stage."""

from __future__ import annotations

import torch

from ..config import Config
from ..graph import Graph
from .aten import AtenExecutable
from .base import Executable


def preferred(config: Config, device: torch.device) -> tuple[str, str]:
    """The backend that a module's graphs are rewritten for, and in words why."""
    if config.backend == "aten":
        return "aten", "asked for"
    if device.type == "cuda":
        reason = _no_triton(device)
        return ("aten", reason) if reason else ("cuda", "")
    if device.type != "cpu":
        return "aten", f"no other backend serves {device.type}"
    from . import openvino

    reason = openvino.available()
    return ("aten", reason) if reason else ("openvino", "")


def prepare(config: Config, dtype: torch.dtype, device: torch.device) -> None:
    """Set going beside this process what a backend needs once a machine and what takes long."""
    if device.type == "cuda" and preferred(config, device)[0] == "cuda":
        from .cuda import warming
        from .cuda.device import device_of

        warming.ready(dtype, device_of(device.index or 0))


def settle(device: torch.device) -> None:
    """Wait for what `prepare` set going: for measurements, which should not be taken beside it."""
    if device.type == "cuda":
        from .cuda import warming

        warming.wait()


def _no_triton(device: torch.device) -> str | None:
    """Why our kernels cannot run on a GPU, in words; None where they can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 (Ampere) or later; this GPU has {major}.{minor}"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"Triton cannot be imported ({type(error).__name__}: {error}); pip install 'allaprima[cuda]'"
    return None


def build(
    graph: Graph, config: Config, dtype: torch.dtype, device: torch.device, volatile: frozenset[str]
) -> tuple[Executable, str]:
    """An Executable for a stage, and in words which backend it is and why.  Whether it can run the stage turns out when
    the weights are bound.

    volatile  names of the inputs that come from the caller rather than from an earlier stage
    """
    name, reason = preferred(config, device)
    if name == "aten":
        return AtenExecutable(graph), f"aten: {reason}"
    if name == "cuda":
        from .cuda.executable import CudaExecutable

        return CudaExecutable(graph, config, dtype, device, volatile), "cuda"
    from . import openvino

    # The engine looks at the weights' versions before every run and binds again where one changed, so the model may
    # read the weights' own memory: for SD1.5 in float32 that saves 3.4 GB and seconds of copying at each bind.
    return openvino.OpenVinoExecutable(graph, dtype=dtype, threads=config.threads, share=True), "openvino"
