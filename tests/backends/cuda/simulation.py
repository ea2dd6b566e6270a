"""Recording and replaying where there is no GPU: a "graph" computes again, from the tensors and into the tensors that
the real one would read and write.  Operators run as ATen has them, because the interpreter is slow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import pytest
import torch

from allaprima.backends.cuda import executable, graphs, plan
from allaprima.backends.cuda.device import nearest
from allaprima.backends.cuda.executable import CudaExecutable
from allaprima.backends.cuda.graphs import GraphPool, Recorded
from allaprima.config import Config
from allaprima.graph import Graph


class _Again:
    def __init__(self, work: Callable[[], list[Any]], made: list[Any]) -> None:
        self.work, self.made = work, made

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            new = graphs._copies(self.work())
        if not self.made:
            self.made += new
        for mine, value in zip(self.made, new, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(value)

    def reset(self) -> None:
        self.work = _gone


def _gone() -> list[Any]:
    raise AssertionError("a graph was replayed that had been dropped")


class SimulatedPool(GraphPool):
    def __init__(self) -> None:
        self.device, self.lock = torch.device("cpu", 0), RLock()
        self._recorded = OrderedDict()
        self.block_bytes = self.needed_bytes = 0

    def _empty_cache(self) -> None:
        pass

    def _renew(self, block_bytes: int) -> None:
        self.clear()
        self.block_bytes = block_bytes

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self.lock:
            yield

    def run(self, work: Callable[[], list[Any]]) -> list[Any]:
        return graphs._copies(work())

    def record(self, key: tuple[int, Any], own: list[Any], work: Callable[[], list[Any]]) -> None:
        made: list[Any] = []  # a recording computes nothing
        self._recorded[key] = Recorded(own, made, _Again(work, made), 1 << 20)  # type: ignore[arg-type]
        self._keep_budget()


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SimulatedPool()

    def build(
        graph: Graph, config: Config, dtype: torch.dtype, device: torch.device, volatile: frozenset[str]
    ) -> tuple[CudaExecutable, str]:
        return CudaExecutable(graph, config, dtype, torch.device("cpu", 0), volatile), "cuda"

    monkeypatch.setattr("allaprima.runner.build", build)
    monkeypatch.setattr("allaprima.engine.preferred", lambda config, device: ("cuda", ""))
    monkeypatch.setattr(executable, "device_of", lambda index: nearest(90))
    monkeypatch.setattr(executable, "pool_of", lambda index: pool)
    monkeypatch.setattr(graphs, "pool_of", lambda index: pool)
    for module in ("runner", "engine"):
        monkeypatch.setattr(f"allaprima.{module}.stays_in_place", lambda device: True)
    monkeypatch.setattr(executable, "ready", lambda *given: True)
    monkeypatch.setattr(plan, "choose", lambda *call: None)


AS_IF_ON_HOPPER = """
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoGpu:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(NoGpu())
"""
"""The beginning of a script in which kernels are compiled as a launch on an H100 would compile them."""
