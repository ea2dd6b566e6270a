"""CudaExecutable: one stage on a GPU, planned for each size and recorded while it is planned."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...config import Config
from ...errors import is_out_of_memory
from ...graph import Graph
from ..aten import AtenExecutable
from ..base import INPUT_ROLES
from .device import Device, device_of
from .graphs import GraphPool, no_collection, pool_of
from .order import in_order
from .plan import Plan, arguments_of, lower
from .warming import ready

COMPUTED = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that the kernels compute in."""

FORESEEING_SHARE, FORESEEN_MARGIN = 1 / 8, 1.02
"""From how small a part of the largest stage's memory on a stage tells how that will grow (a text encoder says nothing
of pictures), and by how much it may be wrong."""

_numbers = itertools.count()


class CudaExecutable:
    """A stage as plans of kernels, each replayed as a CUDA graph.

    A new size is recorded while its plan is made, so that kernels are launched once.  The first size of all only runs,
    and is recorded at its second use: libraries begin with things that nothing can record.

    Until the kernels are compiled, which happens once a machine, it runs on ATen.

    graph     what it computes
    dtype     in which most of it is computed; the few kernels for others are compiled when they are launched first
    volatile  names of the inputs that come from the caller: they are copied to the graph's own tensors.  The others are
              buffers of earlier stages, which stay at their addresses and are read where they are, unless they are rows
              of a table
    device    what the choice of kernels knows of the GPU
    failed    why the stage runs on ATen after all, or None
    """

    def __init__(
        self, graph: Graph, config: Config, dtype: torch.dtype, device: torch.device, volatile: frozenset[str]
    ) -> None:
        self.graph, self.config, self._dtype = graph, config, dtype
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._device: Device = device_of(self._index)
        self._volatile = [p.meta["source"] in volatile for p in graph.placeholders(*INPUT_ROLES)]
        self._weights: dict[str, torch.Tensor] = {}
        self._places: tuple[Any, ...] = ()
        self._number = next(_numbers)
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._unrecorded: str | None = None
        self._at_once: bool | None = None
        """Whether a new size is recorded while it is planned; None before the first of all."""
        self._needed_bytes = 0
        self._ready = False
        self._instead: AtenExecutable | None = None
        self.failed: str | None = None
        self.records = 0
        weakref.finalize(self, self._pool.forget, self._number).atexit = False

    def bind(self, weights: Mapping[str, torch.Tensor], changed: Collection[str] | None = None) -> bool:
        """Take the weights.  Where they stay at their addresses, recorded graphs stay valid."""
        self._weights = dict(weights)
        places = tuple((w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights.values())
        moved = places != self._places
        if moved:
            self._plans.clear()
            self._pool.forget(self._number)
        self._places = places
        if self._instead is not None:
            self._instead.bind(weights)
        self._compiled()
        return moved

    def run(self, inputs: Sequence[torch.Tensor | int]) -> list[Any]:
        if self.failed or not self._compiled():
            return self._on_aten().run(inputs)
        key = tuple((v.shape, v.dtype, v.stride()) if isinstance(v, torch.Tensor) else v for v in inputs)
        plan = self._plans.get(key)
        if plan is None:
            try:
                with no_collection():
                    return self._planned(key, inputs)
            except Exception as error:  # a compiler and a driver raise anything
                if is_out_of_memory(error):
                    raise
                return self._give_up(error).run(inputs)
        self._plans.move_to_end(key)
        if self._can_record:
            results = self._pool.replay((self._number, key), inputs)
            if results is None and self._record(key, plan, inputs):
                results = self._pool.replay((self._number, key), inputs)
            if results is not None:
                return results
        return self._pool.run(lambda: self._again(plan, inputs))

    @property
    def waits(self) -> bool:
        """Whether it runs on ATen until the kernels are compiled."""
        return not self._compiled()

    @property
    def plans(self) -> list[Plan]:
        """Of the sizes in use, the latest last."""
        return list(self._plans.values())

    @property
    def _can_record(self) -> bool:
        """Whether graphs are wanted and can be had."""
        return self.config.cuda_graphs and self._unrecorded is None

    @property
    def _pool(self) -> GraphPool:
        return pool_of(self._index)

    def _compiled(self) -> bool:
        """Whether the kernels are there."""
        if not self._ready:
            self._ready = self._dtype not in COMPUTED or ready(self._dtype, self._device)
            if self._ready:
                self._instead = None
        return self._ready

    def _on_aten(self) -> AtenExecutable:
        if self._instead is None:
            self._instead = AtenExecutable(self.graph)
            self._instead.bind(self._weights)
        return self._instead

    def _planned(self, key: Any, inputs: Sequence[torch.Tensor | int]) -> list[Any]:
        """The results of the first run at these sizes, which makes the plan."""
        given = arguments_of(self.graph, self._weights, inputs)
        calls, needed_bytes = in_order(self.graph, given)
        self._pool.reserve(needed_bytes, self._foreseen_bytes(needed_bytes))
        self._needed_bytes = max(self._needed_bytes, needed_bytes)

        def first(inputs: Sequence[Any]) -> list[Any]:
            given = arguments_of(self.graph, self._weights, inputs)
            with _full_precision():
                self._plans[key], results = lower(self.graph, given, self._device, calls)
            return results

        results = self._recorded_first(key, first, inputs)
        if results is None:
            results = self._pool.run(lambda: first(inputs))
        while len(self._plans) > self.config.max_plans:
            self._plans.popitem(last=False)
        return results

    def _foreseen_bytes(self, needed_bytes: int) -> int:
        """What the largest stage should need where this one needs so much: all grow alike with the size of the picture.

        The block then grows once for a picture, before the first of its graphs is recorded, not again at its decoder.
        """
        before, most = self._needed_bytes, self._pool.needed_bytes
        if not before or needed_bytes <= before or before < FORESEEING_SHARE * most:
            return 0
        return int(FORESEEN_MARGIN * most * needed_bytes / before)

    def _recorded_first(
        self, key: Any, first: Callable[[Sequence[Any]], list[Any]], inputs: Sequence[torch.Tensor | int]
    ) -> list[Any] | None:
        """The results of a graph that was recorded while the plan was made; None where there is none, as at the first
        size of all."""
        if not (self._at_once and self._can_record):
            self._at_once = self._at_once is None
            return None
        own = self._own(inputs)
        try:
            self._pool.record((self._number, key), own, lambda: first(own))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Something had to begin first; at the second use all is there.  A failure takes all graphs with it.
            self._at_once = False
            warnings.warn(
                f"new sizes are recorded at their second use, because at the first: {str(error).strip()[:200]}",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        self.records += 1
        return self._pool.replay((self._number, key), inputs)

    def _give_up(self, error: Exception) -> AtenExecutable:
        """Run on ATen from now on: a kernel cannot be compiled or launched on this GPU."""
        self.failed = f"the kernels failed with {type(error).__name__}: {str(error).strip()[:300]}"
        warnings.warn(f"a stage runs on ATen, because {self.failed}", RuntimeWarning, stacklevel=3)
        return self._on_aten()

    def _again(self, plan: Plan, inputs: Sequence[Any]) -> list[Any]:
        with _full_precision():
            return plan.run(arguments_of(self.graph, self._weights, inputs))

    def _own(self, inputs: Sequence[torch.Tensor | int]) -> list[Any]:
        """The tensors that a graph reads its inputs from."""
        with torch.inference_mode(False):
            return [
                torch.empty_like(v) if isinstance(v, torch.Tensor) and (volatile or not _is_whole(v)) else v
                for v, volatile in zip(inputs, self._volatile, strict=True)
            ]

    def _record(self, key: Any, plan: Plan, inputs: Sequence[torch.Tensor | int]) -> bool:
        """Record the plan.  returns False, and says so, where that cannot be done: it runs launch by launch then."""
        own = self._own(inputs)
        try:
            self._pool.record((self._number, key), own, lambda: self._again(plan, own))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._unrecorded = str(error).strip()[:200]
            warnings.warn(f"no CUDA graph could be recorded: {self._unrecorded}", RuntimeWarning, stacklevel=2)
            return False
        self.records += 1
        return True


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no part of a larger one, such as a row of the schedule's table, which moves at every step."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


@contextmanager
def _full_precision() -> Iterator[None]:
    """cuBLAS may add up partial sums in half precision where nobody forbids it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before
