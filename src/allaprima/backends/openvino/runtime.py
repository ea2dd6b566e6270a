"""OpenVinoExecutable: one stage, compiled by OpenVINO once for each state of the weights, run at every size."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
import torch
from torch.fx import Node

from ...errors import GraphError
from ...graph import Graph, SizeSpec
from ..base import INPUT_ROLES
from .translate import Translator, element_type


@lru_cache(maxsize=1)
def _core() -> Any:
    return ov.Core()


class OpenVinoExecutable:
    """A stage as an OpenVINO model for the CPU.

    graph          what it computes
    dtype          the module's; each tensor of the model has the dtype that the graph gives it
    threads        how many threads a run may use; None leaves it to OpenVINO
    share          let the model read the weights' own memory instead of a copy.  OpenVINO packs a weight when a size
                   first needs it, so an edit in place that no `bind` follows would give a mixture of old and new
    build_seconds  time of the last translation, bind_seconds of the last `bind` in all

    Weights are constants, which OpenVINO packs for its kernels.  Matrices that change without the rest, as a LoRA
    changes them, are inputs of the model from then on, so that the next change builds nothing.
    """

    def __init__(self, graph: Graph, *, dtype: torch.dtype, threads: int | None = None, share: bool = False) -> None:
        self.graph = graph
        self.build_seconds = self.bind_seconds = 0.0
        # The model says the type of every tensor; "f32" means: change none of them.  (Without it OpenVINO computes in
        # bf16 wherever the processor can, and with "bf16" it narrows also what the graph computes in float32.)
        self._config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = threads
        self._share = share
        self._weights: dict[str, torch.Tensor] = {}
        self._variable: list[str] = []
        self._request: Any = None
        self._lock = Lock()

    def bind(self, weights: Mapping[str, torch.Tensor], changed: Collection[str] | None = None) -> bool:
        """Translate the graph with these weights and compile it, unless all that changed is an input of the model."""
        started = time.perf_counter()
        with self._lock:
            new = set(weights) if changed is None or self._request is None else set(changed)
            built = self._request is None or not new <= set(self._variable)
            if built:
                if self._request is not None and all(weights[name].dim() == 2 for name in new):
                    self._variable = [p.name for p in self.graph.placeholders() if p.name in {*self._variable, *new}]
                self._request = None  # it reads the copies that are about to be written
            made = {name: weights[name] for name in new}
            self._weights |= _contiguous(made) if self._share else _copied_weights(made, self._weights)
            if built:
                self._compile()
            for index, name in enumerate(self._variable, len(self.graph.placeholders(*INPUT_ROLES))):
                self._request.set_input_tensor(index, _shared(self._weights[name]))
        self.bind_seconds = time.perf_counter() - started
        return built

    def _compile(self) -> None:
        started = time.perf_counter()
        weight = lambda node, *rows: _constant(self._weights[node.name], *rows)  # noqa: E731
        translator = Translator(self.graph, weight, self._variable)
        translator.translate()
        if translator.failures:
            raise GraphError(f"OpenVINO cannot run {'; '.join(translator.failures[:3])}.")
        model = translator.model()
        self.build_seconds = time.perf_counter() - started
        self._request = _core().compile_model(model, "CPU", self._config).create_infer_request()

    def run(self, inputs: Sequence[torch.Tensor | int]) -> list[Any]:
        with self._lock:
            # OpenVINO reads the inputs' own memory without holding it, so they are held here until it is done.
            held = [_dense(value) for value in inputs]
            for index, tensor in enumerate(held):
                self._request.set_input_tensor(index, _shared(tensor))
            self._request.start_async()
            self._request.wait()
            places = iter(range(len(self.graph.results)))
            return [_copied(r, self._request.get_output_tensor(next(places))) if isinstance(r, Node) else r
                    for r in self.graph.results]  # fmt: skip


def _dense(value: torch.Tensor | int) -> torch.Tensor:
    return value.detach().contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value)


def _shared(tensor: torch.Tensor) -> Any:
    """An ov.Tensor over the memory of a dense tensor, which the caller keeps alive."""
    if tensor.dtype is torch.bfloat16:  # which NumPy does not have
        return ov.Tensor(tensor.view(torch.int16).numpy(), ov.Shape(list(tensor.shape)), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)


def _copied(result: Node, tensor: Any) -> Any:
    """A result in memory of its own, since the request writes to the same buffers in the next run."""
    spec = result.meta["spec"]
    data = tensor.data
    if isinstance(spec, SizeSpec):
        return int(data)
    if spec.dtype is torch.bfloat16:
        return torch.from_numpy(np.array(data).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(data)).to(spec.dtype)


def _detached(weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight.detach()) for name, weight in weights.items()]


def _contiguous(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in _detached(weights)}


def _copied_weights(
    weights: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Copies of the weights, in the memory of the copies made before where they fit."""
    copies = {}
    for name, weight in _detached(weights):
        old = before.get(name)
        fits = old is not None and old.shape == weight.shape and old.dtype == weight.dtype
        dense = torch.contiguous_format
        copies[name] = old.copy_(weight) if old is not None and fits else weight.clone(memory_format=dense)
    return copies


def _constant(weight: torch.Tensor, start: int | None = None, stop: int | None = None) -> Any:
    """A dense weight, or some of its rows, as a constant of the model: a view of it."""
    element_type(weight.dtype)
    return op.constant(_shared(weight if start is None else weight[start:stop]), shared_memory=True).output(0)
