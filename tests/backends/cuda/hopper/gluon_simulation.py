"""Runs a kernel in Gluon on the CPU: each group of warps is a thread, and what is asynchronous happens late.

Barriers count phases as the hardware does, so that a wrong parity or a missing arrival shows as a wrong result or as a
wait that does not end.  Copies arrive after a while and leave NaN until then; products are made when they are waited
for, and stores read shared memory when they are waited for: what is released too early is overwritten by then.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SECONDS = 60


class Int(int):
    """A number of a kernel: an int that can be converted."""

    def to(self, _dtype):
        return self

    def _made(name: str):  # type: ignore[misc]
        def method(self, other):
            found = getattr(int, name)(self, other)
            return found if found is NotImplemented else Int(found)

        return method

    __add__, __sub__, __mul__, __floordiv__, __mod__ = map(
        _made, ("__add__", "__sub__", "__mul__", "__floordiv__", "__mod__")
    )


class Tensor(torch.Tensor):
    def split(self):  # type: ignore[override]
        return self.unbind(-1)


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.changed = threading.Condition()

    def _settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.changed.notify_all()

    def arrive(self, bytes_expected: int = 0) -> None:
        with self.changed:
            self.pending -= 1
            self.bytes += bytes_expected
            self._settle()

    def arrived(self, num_bytes: int) -> None:
        with self.changed:
            self.bytes -= num_bytes
            self._settle()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != parity, SECONDS)
        assert done, "a wait did not end"


class Bars:
    def __init__(self, count: int) -> None:
        self.bars = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.bars[i]


class Shared:
    """A part of shared memory: `shape` numbers from `start` on."""

    def __init__(self, numbers: torch.Tensor, start: int, shape: list[int]) -> None:
        self.numbers, self.start, self.shape = numbers, start, list(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    @property
    def view(self) -> torch.Tensor:
        size = torch.Size(self.shape).numel()
        return self.numbers[self.start : self.start + size].view(self.shape)

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0]
        return Shared(self.numbers, self.start + i * torch.Size(self.shape[1:]).numel(), self.shape[1:])

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Shared:
        assert dtype == self.dtype
        return Shared(self.numbers, self.start, shape)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.numbers, self.start, shape)

    def permute(self, order: tuple[int, ...]) -> SimpleNamespace:
        return SimpleNamespace(view=self.view.permute(order))

    def load(self, _layout: Any) -> torch.Tensor:
        return self.view.clone()

    def store(self, value: torch.Tensor) -> None:
        self.view.copy_(value)


class Pointer:
    def __init__(self, numbers: torch.Tensor, offset: Any = 0) -> None:
        self.numbers, self.offset = numbers, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.numbers, self.offset + other)


class Descriptor:
    def __init__(self, given: Any) -> None:
        base = given.base
        self.seen = torch.as_strided(base, given.shape, given.strides, base.storage_offset())
        self.layout, self.dtype = given.layout, base.dtype
        shape = list(given.block_shape)
        self.block_type = SimpleNamespace(shape=shape, nbytes=torch.Size(shape).numel() * base.itemsize)

    def parts(self, place: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The box at `place`, as far as it lies inside: where in the tensor and where in the box."""
        there, here = [], []
        for start, size, limit in zip(place, self.block_type.shape, self.seen.shape, strict=True):
            first, last = max(0, start), max(0, start, min(limit, start + size))
            last = max(first, last)
            there.append(slice(first, last))
            here.append(slice(first - start, last - start))
        return tuple(there), tuple(here)


class Simulation:
    """What a kernel's module finds under the names of Gluon."""

    def __init__(self, program: int, num_programs: int, seed: int) -> None:
        self.program, self.num_programs = program, num_programs
        self.random = random.Random(seed)
        self.own = threading.local()
        self.errors: list[BaseException] = []
        self.copies: list[threading.Thread] = []

    # ---- language
    def gl(self) -> SimpleNamespace:
        return SimpleNamespace(
            program_id=lambda _axis: Int(self.program), num_programs=lambda _axis: self.num_programs,
            static_range=range, minimum=lambda a, b: Int(min(a, b)), where=lambda c, a, b: Int(a if c else b),
            zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype).as_subclass(Tensor),
            arange=lambda a, b, layout=None: torch.arange(a, b), load=_load, store=_store, thread_barrier=lambda: None,
            NVMMASharedLayout=_nothing, NVMMADistributedLayout=_nothing, SliceLayout=_nothing,
            allocate_shared_memory=self.allocate, warp_specialize=self.warp_specialize,
            int64=torch.int64, float32=torch.float32, abs=torch.abs, inline_asm_elementwise=_assembly,
            maximum=torch.clamp_min, convert_layout=lambda value, layout, assert_trivial=False: value,
        )  # fmt: skip

    def allocate(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Any:
        if dtype == torch.int64:
            return Bars(shape[0])
        return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), 0, shape)

    def warp_specialize(self, work: list[Any], _warps: list[int], _registers: list[int]) -> None:
        def one(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            self.own.products, self.own.stores = [], []
            try:
                function(*arguments)
                assert not self.own.products, "products that nobody waited for"
                assert not self.own.stores, "stores that nobody waited for"
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=one, args=item) for item in work]
        for thread in threads:
            thread.start()
        for thread in (*threads, *self.copies):
            thread.join()
        if self.errors:
            raise self.errors[0]

    def pause(self) -> None:
        if self.random.random() < 0.3:
            time.sleep(self.random.random() * 1e-3)

    # ---- barriers
    def mbarrier(self) -> SimpleNamespace:
        def init(bar: Barrier, count: int) -> None:
            bar.count = bar.pending = count

        def arrive(bar: Barrier, count: int = 1, pred: bool = True) -> None:
            assert count == 1
            if pred:
                bar.arrive()

        def wait(bar: Barrier, phase: int) -> None:
            self.pause()
            bar.wait(phase)

        return SimpleNamespace(
            MBarrierLayout=_nothing, init=init, arrive=arrive, wait=wait, expect=lambda bar, size: bar.arrive(size)
        )

    # ---- copy engine
    def tma(self) -> SimpleNamespace:
        def load(desc: Descriptor, place: list[int], bar: Barrier, target: Shared) -> None:
            assert target.shape == desc.block_type.shape or target.reshape(desc.block_type.shape)
            there, here = desc.parts(place)
            target.view.fill_(float("nan"))
            wanted = torch.zeros(desc.block_type.shape, dtype=desc.dtype)
            wanted[here] = desc.seen[there]

            def arrive() -> None:
                self.pause()
                target.view.view(desc.block_type.shape).copy_(wanted)
                bar.arrived(desc.block_type.nbytes)

            self.copies.append(threading.Thread(target=arrive))
            self.copies[-1].start()

        def store(desc: Descriptor, place: list[int], source: Shared) -> None:
            self.own.stores.append((desc, desc.parts(place), source))

        def store_wait(pendings: int) -> None:
            while len(self.own.stores) > pendings:
                desc, (there, here), source = self.own.stores.pop(0)
                desc.seen[there] = source.view[here]

        return SimpleNamespace(
            async_copy_global_to_shared=load, async_copy_shared_to_global=store, store_wait=store_wait
        )

    # ---- products
    def warpgroup_mma(self, a: Shared, b: Any, acc: torch.Tensor, is_async: bool) -> torch.Tensor:
        assert is_async
        self.own.products.append((a, b, acc))
        return acc

    def warpgroup_mma_wait(self, num_outstanding: int, deps: tuple[torch.Tensor, ...]) -> Any:
        self.pause()
        while len(self.own.products) > num_outstanding:
            a, b, acc = self.own.products.pop(0)
            acc += a.view.float() @ b.view.float()
        return deps if len(deps) > 1 else deps[0]


def _nothing(*_given: Any, **_named: Any) -> None:
    return None


def _assembly(text: str, _constraints: str, given: list[torch.Tensor], **_named: Any) -> torch.Tensor:
    return {"rcp": torch.reciprocal, "ex2": torch.exp2}[text.split(".")[0]](*given)


def _load(pointer: Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
    offset = torch.where(mask, pointer.offset, 0)
    return torch.where(mask, pointer.numbers[offset], other)


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    offset, mask = torch.broadcast_tensors(pointer.offset, mask)
    pointer.numbers[offset[mask]] = value[mask]


def run(launch: Any, module: Any, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Runs the programs of a launch one after the other."""
    from triton.experimental.gluon._runtime import GluonJITFunction

    assert isinstance(launch.variant.kernel, GluonJITFunction)
    given = []
    for argument in launch.arguments:
        if isinstance(argument, torch.Tensor):
            extent = 1 + sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True))
            given.append(Pointer(torch.as_strided(argument, (extent,), (1,))))
        else:
            given.append(argument if isinstance(argument, int) else Descriptor(argument))
    with monkeypatch.context() as patch:
        for name, value in vars(module).copy().items():
            if isinstance(value, GluonJITFunction):
                patch.setattr(module, name, value.fn)
        for program in range(launch.grid[0]):
            simulation = Simulation(program, launch.grid[0], seed + program)
            for name in ("gl", "mbarrier", "tma"):
                patch.setattr(module, name, getattr(simulation, name)())
            patch.setattr(module, "warpgroup_mma", simulation.warpgroup_mma)
            patch.setattr(module, "warpgroup_mma_wait", simulation.warpgroup_mma_wait)
            patch.setattr(module, "fence_async_shared", lambda: None)
            launch.variant.kernel.fn(*given, **launch.variant.constants)
