"""CUDA graphs: a plan recorded once and replayed; all of a GPU's graphs work in one pool of memory."""

from __future__ import annotations

import atexit
import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import RLock, local
from typing import Any

import torch

GRAPH_BUDGET_BYTES = 256 << 20
"""What recorded graphs may take besides the pool; the one that was replayed longest ago goes first."""

BLOCK_GRAIN = 16 << 20
"""The pool's block is a multiple of it."""


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
        return _copies(self.made)


class GraphPool:
    """All graphs of one GPU.

    They share their working memory, so one runs at a time: each waits for the one before, whatever stream that was on.
    What they hand out lies outside of it, or the next graph would write over it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.lock = RLock()
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._recorded: OrderedDict[tuple[int, Any], Recorded] = OrderedDict()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._thread = local()
        self.block_bytes = 0
        self.needed_bytes = 0
        """The most that any plan needed so far."""
        self._begin()
        # Graphs have to go before the pool and before CUDA does; when the interpreter ends, nothing else sees to that.
        atexit.register(self._end)

    def _begin(self) -> None:
        """Take a new pool, and record next to nothing in it: torch 2.11 refuses a pool whose graphs have all gone.

        A recording that ends well also tells the random number generator that none is going on.
        """
        with torch.cuda.device(self.device):
            self.memory = torch.cuda.MemPool()
            self._anchor = torch.cuda.CUDAGraph()
            with self._recording():
                self._captured(self._anchor, lambda: [torch.zeros(1, device=self.device)])

    def _end(self) -> None:
        self.clear()
        self._anchor.reset()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last.record(stream)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that records: blocks of the pool belong to a stream, so that all work on one shares them."""
        stream = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self.stream):
                self._let_cublas_begin()
                yield
        finally:
            stream.wait_stream(self.stream)

    def _let_cublas_begin(self) -> None:
        """cuBLAS takes a workspace for each thread and stream for ever: in the pool, it would hold a block back that
        is to be given up."""
        if not getattr(self._thread, "has_cublas", False):
            x = torch.zeros(16, 16, dtype=torch.float16, device=self.device)
            torch.mm(x, x)
            torch.addmm(x[0], x, x)
            self._thread.has_cublas = True

    def reserve(self, nbytes: int, foreseen_bytes: int = 0) -> None:
        """Let the pool be one block in which a plan that needs `nbytes` finds its place.

        Left alone, the allocator takes a block for each size of tensor, and keeps those of one picture size beside
        those of the next.  When the block grows all graphs go, to be recorded again at their next use, and the GPU is
        waited for.

        foreseen_bytes   what other plans are expected to need, so that it need not grow again for them
        """
        with self.lock:
            self.needed_bytes = max(self.needed_bytes, nbytes)
            nbytes = max(nbytes, foreseen_bytes)
            nbytes += nbytes // 32  # small workspaces of kernels
            if nbytes > self.block_bytes:
                self._empty_cache()
                self._renew(-(-nbytes // BLOCK_GRAIN) * BLOCK_GRAIN)

    def _renew(self, block_bytes: int) -> None:
        """A new pool of one block instead of this one, whose memory goes back to CUDA before.

        Where memory is short the block is not had: plans may find their place in smaller ones.
        """
        self._end()
        self._begin()
        self.block_bytes = block_bytes
        if block_bytes and self._can_split(block_bytes):
            pool = torch.cuda.use_mem_pool(self.memory, self.device)
            with self._turn(), suppress(torch.OutOfMemoryError), self._aside(), pool:
                # Freed at once, it stays in the pool, and later tensors are split off it.
                torch.empty(block_bytes, dtype=torch.uint8, device=self.device)

    def _empty_cache(self) -> None:
        """Give back what the allocator keeps outside of the pool: inside of it, it would not do so for a new block."""
        with suppress(RuntimeError):  # somebody else may be recording
            torch.cuda.empty_cache()

    def _can_split(self, nbytes: int) -> bool:
        """Whether the allocator splits such a block; users of small GPUs often forbid it (max_split_size_mb)."""
        limit: int = torch.cuda.memory_stats(self.device).get("max_split_size", -1)
        return limit <= 0 or nbytes < limit

    def run(self, work: Callable[[], list[Any]]) -> list[Any]:
        """Run without recording, in the pool's memory."""
        with self._turn():
            with self._aside(), torch.cuda.use_mem_pool(self.memory, self.device):
                made = work()
            return _copies(made)

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
            before = self._beside_the_allocator()
            graph = torch.cuda.CUDAGraph()
            try:
                with self._recording():
                    made = self._captured(graph, work)
            except BaseException:
                self._abandon(graph)
                raise
            nbytes = max(0, self._beside_the_allocator() - before)
            self._recorded[key] = Recorded(own, made, graph, nbytes)
            self._keep_budget()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        # A tensor made in inference mode could not be written to outside of it; CUDAGraph makes some of its own.
        with self._aside(), torch.inference_mode(False), torch.no_grad(), no_collection():
            yield

    def _captured(self, graph: torch.cuda.CUDAGraph, work: Callable[[], list[Any]]) -> list[Any]:
        # Relaxed: a kernel that is launched here for the first time is loaded meanwhile.
        graph.capture_begin(pool=self.memory.id, capture_error_mode="relaxed")  # type: ignore[arg-type]
        try:
            made = work()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
                graph.reset()
            raise
        graph.capture_end()
        return made

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failure: leave the pool, which torch 2.11 takes for one that is being recorded to for ever.

        The graph stays: where ending failed, torch's allocators go on to ask it whether it is recording.
        """
        self._failed.append(graph)
        index = self.device.index or 0
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self.memory.id)
            torch._C._cuda_releasePool(index, self.memory.id)
        self._renew(self.block_bytes)

    def _beside_the_allocator(self) -> int:
        """Bytes in use on the GPU that torch's allocator knows nothing of: among them, recorded graphs."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    def forget(self, owner: int) -> None:
        """Drop the graphs of one executable."""
        with self.lock:
            for key in [k for k in self._recorded if k[0] == owner]:
                self._recorded.pop(key).graph.reset()

    def clear(self) -> None:
        """Drop all graphs."""
        with self.lock:
            while self._recorded:
                self._recorded.popitem()[1].graph.reset()

    def _keep_budget(self) -> None:
        while len(self._recorded) > 1 and self.graph_bytes() > GRAPH_BUDGET_BYTES:
            self._recorded.popitem(last=False)[1].graph.reset()

    def graph_bytes(self) -> int:
        """What recording took, besides the pool."""
        return sum(r.nbytes for r in list(self._recorded.values()))

    def __len__(self) -> int:
        return len(self._recorded)


def _copies(made: list[Any]) -> list[Any]:
    return [r.clone() if isinstance(r, torch.Tensor) else r for r in made]


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: it may free CUDA objects in the middle of a recording, which ends it with an error."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def pool_of(index: int) -> GraphPool:
    return GraphPool(torch.device("cuda", index))
