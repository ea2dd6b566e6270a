"""Adapters merged into a module's parameters, in place and exactly.

A touched parameter holds round(base + Σ sᵢ·ΔWᵢ), computed anew from its untouched numbers (the base, kept in host
memory) at every change, so that nothing adds up; one that nothing touches any more holds its base again, bit for bit.
Parameters keep their memory and their versions go up: kernels and recorded graphs read the new numbers, and engines
notice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .deltas import Delta
from .lora_formats import Adapter

Terms: TypeAlias = tuple[tuple[Delta, float], ...]
"""Changes and their strengths."""

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Touched:
    """A parameter that is not what it was.

    base           its untouched numbers, contiguous, in host memory (pinned for a parameter on a GPU)
    version, mark  that we left it with (no mark yet: None): others mean that somebody else wrote it since.  Tensors of
                   inference mode have no version, and writes through `.data` (as by fuse_lora) change only the mark
    """

    parameter: nn.Parameter
    base: torch.Tensor
    terms: Terms = ()
    version: int | None = None
    mark: int | None = None

    def intact(self, mark: int) -> bool:
        """Whether nobody else wrote it; `mark` is that of its present bits."""
        cast = self.parameter.dtype != self.base.dtype  # by module.to(dtype): it has other bits, but no other numbers
        return self.version == _version(self.parameter) and (cast or self.mark in (None, mark))


class Merged:
    """The adapters in one module.

    active   by the user's names: what is told of each, and its factors
    """

    def __init__(self) -> None:
        self.active: dict[str, tuple[Any, Adapter]] = {}
        self._touched: dict[int, Touched] = {}

    @property
    def terms(self) -> list[tuple[nn.Parameter, Terms]]:
        """What `write` was given last."""
        return [(one.parameter, one.terms) for one in self._touched.values()]

    def write(self, wanted: Iterable[tuple[nn.Parameter, Terms]]) -> int:
        """Let exactly these parameters hold these changes.  returns the number of parameters that were written.

        Where it fails on the way, `write(terms of before)` takes back what was written.
        """
        targets = {id(parameter): (parameter, terms) for parameter, terms in wanted if terms}
        for gone in [touched for key, touched in self._touched.items() if key not in targets]:
            targets[id(gone.parameter)] = (gone.parameter, ())
        self._drop_overwritten()
        written: list[Touched] = []
        with full_precision():
            for key, (parameter, terms) in targets.items():
                touched = self._touched.get(key)
                if touched is None and terms:
                    touched = self._touched[key] = Touched(parameter, _kept(parameter))
                if touched is not None and (touched.terms != terms or touched.base.dtype != parameter.dtype):
                    _put(touched, terms)
                    written.append(touched)
                    if not terms:
                        del self._touched[key]
        # This waits for the device, and so for the copies of bases.
        for touched, mark in zip(written, _marks([one.parameter for one in written]), strict=True):
            touched.mark = mark
        return len(written)

    def _drop_overwritten(self) -> None:
        """Forget what somebody gave other numbers: these are what we start from now."""
        lost = self._lost()
        if unseen := [one for one in lost if one.version is not None and one.version == _version(one.parameter)]:
            warnings.warn(
                f"{len(unseen)} parameters were written through .data (fuse_lora does that) while LoRAs of "
                "allaprima.loras were in them; these are part of their numbers from now on. Load the checkpoint again "
                "to be rid of them, and remove LoRAs with loras(pipe, {}) before fusing others.",
                UserWarning,
                stacklevel=5,
            )
        for one in lost:
            del self._touched[id(one.parameter)]

    def _lost(self) -> list[Touched]:
        every = list(self._touched.values())
        marks = _marks([one.parameter for one in every])
        return [one for one, mark in zip(every, marks, strict=True) if not one.intact(mark)]

    def overwritten(self) -> list[nn.Parameter]:
        """The touched parameters that somebody else wrote since: they have lost their adapters."""
        return [one.parameter for one in self._lost()]

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


def _put(touched: Touched, terms: Terms) -> None:
    parameter = touched.parameter
    if touched.base.dtype != parameter.dtype:  # module.to(dtype) came between: as if it had come before
        touched.base = touched.base.to(parameter.dtype)
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.copy_(total(touched.base, terms, parameter.device) if terms else touched.base)
    touched.terms, touched.version, touched.mark = terms, _version(parameter), None


def total(base: torch.Tensor, terms: Sequence[tuple[Delta, float]], device: torch.device) -> torch.Tensor:
    """base + Σ strength · ΔW, not rounded: in float32 (a float64 base in float64), contiguous, on `device`."""
    dtype = torch.promote_types(base.dtype, torch.float32) if base.itemsize > 1 else torch.float32
    untouched = base.to(device, non_blocking=True).to(dtype)
    result = untouched.clone() if len(terms) > 1 or untouched is base else untouched
    for delta, strength in terms:
        delta.add_to(result, untouched, strength)
    return result


def _version(parameter: nn.Parameter) -> int | None:
    return None if parameter.is_inference() else parameter._version


def _marks(parameters: Sequence[nn.Parameter]) -> list[int]:
    """A number for the bits of each parameter, wherever and in whatever layout they lie; one wait a device."""
    marks = [0] * len(parameters)
    for device in {parameter.device for parameter in parameters}:
        there = [i for i, parameter in enumerate(parameters) if parameter.device == device]
        found = [torch.hash_tensor(_words(parameters[i].detach())).view(torch.int64) for i in there]
        for i, mark in zip(there, torch.stack(found).tolist(), strict=True):
            marks[i] = mark
    return marks


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as whole numbers, of 64 bits where they divide so: the hash is no wider than what it is made of."""
    flat = tensor.contiguous().view(-1)
    if flat.nbytes % 8:
        return flat.view(WORDS[flat.itemsize])
    if flat.data_ptr() % 8 or flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within this context float32 products are float32 products, whatever the user allows for pictures."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
