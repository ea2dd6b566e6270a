"""Adapters merged into a module's parameters, in place and exactly.

A touched parameter holds round(base + Σ sᵢ·ΔWᵢ), computed anew from its untouched numbers (the base, kept in host
memory) at every change, so that nothing adds up; one that nothing touches any more holds its base again, bit for bit.
Parameters keep their memory and their versions go up: kernels and recorded graphs read the new numbers, and engines
notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .deltas import Delta
from .lora_formats import Adapter

Terms: TypeAlias = tuple[tuple[Delta, float], ...]
"""Changes and their strengths."""


@dataclass
class Touched:
    """A parameter that is not what it was.

    base     its untouched numbers, contiguous, in host memory (pinned for a parameter on a GPU)
    version  that we left it with; another one means that somebody else wrote it since.  Tensors of inference mode have
             none
    """

    parameter: nn.Parameter
    base: torch.Tensor
    terms: Terms = ()
    version: int | None = None

    @property
    def intact(self) -> bool:
        if self.parameter.is_inference():
            expected = total(self.base, self.terms, self.parameter.device).to(self.parameter.dtype)
            return torch.equal(self.parameter, expected)
        return self.version == self.parameter._version


class Merged:
    """The adapters in one module.

    active   by the user's names: what is told of each, and its factors
    """

    def __init__(self) -> None:
        self.active: dict[str, tuple[Any, Adapter]] = {}
        self._touched: dict[int, Touched] = {}

    def write(self, wanted: Iterable[tuple[nn.Parameter, Terms]]) -> int:
        """Let exactly these parameters hold these changes.  returns the number of parameters that were written.

        Where it fails on the way (memory), what was written is taken back.
        """
        targets = {id(parameter): (parameter, terms) for parameter, terms in wanted if terms}
        for gone in [touched for key, touched in self._touched.items() if key not in targets]:
            targets[id(gone.parameter)] = (gone.parameter, ())
        before = {key: (touched.parameter, touched.terms) for key, touched in self._touched.items()}
        try:
            return self._write(targets)
        except BaseException:
            back = {key: (touched.parameter, ()) for key, touched in self._touched.items()} | before
            with suppress(RuntimeError):
                self._write(back)
            raise

    def _write(self, targets: Mapping[int, tuple[nn.Parameter, Terms]]) -> int:
        written = 0
        with full_precision():
            for key, (parameter, terms) in targets.items():
                touched = self._touched.get(key)
                if touched is not None and not touched.intact:
                    touched = None  # somebody gave it other numbers: these are what we start from now
                    del self._touched[key]
                if touched is None:
                    if not terms:
                        continue
                    touched = self._touched[key] = Touched(parameter, _kept(parameter))
                if touched.terms != terms:
                    _put(parameter, touched, terms)
                    written += 1
                if not terms:
                    del self._touched[key]
        for device in {parameter.device for parameter, _ in targets.values()}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # bases were copied without waiting
        return written

    def overwritten(self) -> list[nn.Parameter]:
        """The touched parameters that somebody else wrote since: they have lost their adapters."""
        return [touched.parameter for touched in self._touched.values() if not touched.intact]

    @property
    def base_bytes(self) -> int:
        """Host memory that the untouched numbers take."""
        return sum(touched.base.nbytes for touched in self._touched.values())


_MERGED: WeakKeyDictionary[nn.Module, Merged] = WeakKeyDictionary()


def merged(module: nn.Module) -> Merged:
    """The adapters in a module: the same object for every pipeline that has the module."""
    return _MERGED.setdefault(module, Merged())


def _kept(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a parameter's numbers in host memory."""
    source = parameter.detach()
    on_gpu = source.device.type == "cuda"
    try:
        copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=on_gpu)
    except RuntimeError:  # no more memory can be pinned; any will do
        copy, on_gpu = torch.empty(source.shape, dtype=source.dtype, device="cpu"), False
    return copy.copy_(source, non_blocking=on_gpu)


def _put(parameter: nn.Parameter, touched: Touched, terms: Terms) -> None:
    if touched.base.dtype != parameter.dtype:  # module.to(dtype) came between: as if it had come before
        touched.base = touched.base.to(parameter.dtype)
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.copy_(total(touched.base, terms, parameter.device) if terms else touched.base)
    touched.terms = terms
    touched.version = None if parameter.is_inference() else parameter._version


def total(base: torch.Tensor, terms: Sequence[tuple[Delta, float]], device: torch.device) -> torch.Tensor:
    """base + Σ strength · ΔW, not rounded: in float32 (a float64 base in float64), contiguous, on `device`."""
    dtype = torch.promote_types(base.dtype, torch.float32) if base.itemsize > 1 else torch.float32
    untouched = base.to(device, non_blocking=True).to(dtype)
    result = untouched.clone() if len(terms) > 1 or untouched is base else untouched
    for delta, strength in terms:
        delta.add_to(result, untouched, strength)
    return result


@contextmanager
def full_precision() -> Iterator[None]:
    """Within this context float32 products are float32 products, whatever the user allows for pictures."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
