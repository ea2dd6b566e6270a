"""CUDA graphs: a plan recorded once and replayed; all of a GPU's graphs work in one pool of memory."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

GRAPH_BUDGET_BYTES = 256 << 20
"""What recorded graphs may take besides the pool; the one that was replayed longest ago goes first."""


class Recorded:
    """One plan at one size as a CUDA graph, with the tensors that it reads and writes.

    own     the tensors that the graph reads its inputs from; a caller's value is copied there unless it is the tensor
    made    the results, overwritten by the next replay
    nbytes  memory that recording took outside of the pool
    """

    def __init__(self, own: list[Any], made: list[Any], graph: torch.cuda.CUDAGraph, nbytes: int) -> None:
        self.own, self.made, self.graph, self.nbytes = own, made, graph, nbytes

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        moved = [
            (mine, given)
            for mine, given in zip(self.own, inputs, strict=True)
            if isinstance(given, torch.Tensor) and given.data_ptr() != mine.data_ptr()
        ]
        if moved:
            torch._foreach_copy_([m for m, _ in moved], [g for _, g in moved])
        self.graph.replay()
        return [r.clone() if isinstance(r, torch.Tensor) else r for r in self.made]


class GraphPool:
    """All graphs of one GPU.

    They share their working memory, so one runs at a time: each waits for the one before, whatever stream that was on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.lock = RLock()
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._recorded: OrderedDict[tuple[int, Any], Recorded] = OrderedDict()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._last)
            yield
            self._last.record(stream)

    def run(self, work: Callable[[], list[Any]]) -> list[Any]:
        """Run without recording, in the pool's memory."""
        with self._turn(), torch.cuda.use_mem_pool(self.memory, self.device):
            return [r.clone() if isinstance(r, torch.Tensor) else r for r in work()]

    def replay(self, key: tuple[int, Any], inputs: Sequence[Any]) -> list[Any] | None:
        """Results of the graph recorded under `key`, or None."""
        with self._turn():
            recorded = self._recorded.get(key)
            if recorded is None:
                return None
            self._recorded.move_to_end(key)
            return recorded.replay(inputs)

    def record(self, key: tuple[int, Any], own: list[Any], work: Callable[[], list[Any]]) -> None:
        """Record `work`, which reads `own`.  raises RuntimeError where something in it cannot be recorded"""
        with self._turn():
            before = torch.cuda.mem_get_info(self.device)[0]
            graph = torch.cuda.CUDAGraph()
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.memory.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
                try:
                    made = work()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            nbytes = max(0, before - torch.cuda.mem_get_info(self.device)[0])
            self._recorded[key] = Recorded(own, made, graph, nbytes)
            self._keep_budget()

    def forget(self, owner: int) -> None:
        """Drop the graphs of one executable."""
        with self.lock:
            for key in [k for k in self._recorded if k[0] == owner]:
                self._recorded.pop(key).graph.reset()

    def _keep_budget(self) -> None:
        while len(self._recorded) > 1 and sum(r.nbytes for r in self._recorded.values()) > GRAPH_BUDGET_BYTES:
            self._recorded.popitem(last=False)[1].graph.reset()

    def __len__(self) -> int:
        return len(self._recorded)


@functools.cache
def pool_of(index: int) -> GraphPool:
    return GraphPool(torch.device("cuda", index))
