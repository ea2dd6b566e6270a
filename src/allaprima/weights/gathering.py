"""Tensors that stay, side by side in slabs of device memory.

On CUDA torch's allocator puts a tensor of 1 to 10 MiB into a segment of 20, and gives a segment back only once nothing
lives in it.  Weights that were loaded, cast and rearranged one by one leave holes everywhere: SD 1.5 holds an eighth
more than it needs.  Slabs are as large as what lies in them, and the segments that it came from empty on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

ALIGNMENT = 512
"""Of each place in its slab, in bytes: as the allocator aligns."""

PORTION_BYTES = 48 << 20
"""A slab is no larger, but for the largest tensor in it: so much more memory is held while tensors move."""

MOST_IN_SLAB = 256
"""Tensors in one slab; keeps planning quick where all are tiny."""

LEAST_BYTES = 1 << 20
"""Smaller tensors have segments of 2 MiB for themselves, so that alone they are not worth moving."""


class Unit(NamedTuple):
    """Bytes that get a new place.

    address  where they lie now: neighbours move together
    move     (uint8 `[nbytes]`, the new place) -> None: fills it and gives the old place up
    """

    address: int
    nbytes: int
    device: torch.device
    move: Callable[[torch.Tensor], None]


def gather(*groups: Sequence[Unit]) -> None:
    """Move units into slabs, in the order of their addresses, which empties one segment after another.

    groups   they share no slabs: each will go as a whole
    """
    slabs = sorted((s for group in groups for s in _slabs(group)), key=lambda units: units[0].address)
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be written to later
        for units in slabs:
            give_back(units[0].device)  # or the slab would be cut out of a larger segment, and keep it
            _fill(units)
    for device in {units[0].device for units in slabs}:
        give_back(device)


def _slabs(units: Sequence[Unit]) -> list[list[Unit]]:
    found = []
    for device in dict.fromkeys(unit.device for unit in units):
        there = sorted((u for u in units if u.device == device), key=lambda u: u.address)
        found += [there[run.start : run.stop] for run in portions([unit.nbytes for unit in there])]
    return found


def _fill(units: Sequence[Unit]) -> None:
    starts = offsets([unit.nbytes for unit in units])
    slab = torch.empty(starts[-1] + units[-1].nbytes, dtype=torch.uint8, device=units[0].device)
    for unit, start in zip(units, starts, strict=True):
        unit.move(_with_own_storage(slab[start : start + unit.nbytes]))


def _with_own_storage(piece: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own, which keeps the slab alive: whoever saves, copies or counts a parameter
    by its storage meets the parameter and not the slab."""
    return torch.utils.dlpack.from_dlpack(piece)


def give_back(device: torch.device) -> None:
    """Give empty segments back to CUDA."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # somebody else may be recording
            torch.cuda.empty_cache()


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where tensors of these bytes begin in their slab."""
    starts, place = [], 0
    for size in sizes:
        starts.append(place)
        place += _aligned(size)
    return starts


def portions(sizes: Sequence[int]) -> list[range]:
    """Cut a sequence of tensors into slabs, so that the segments under these are the least in all.

    sizes    bytes
    returns  the indices of each slab's tensors; together they are all, in order
    """
    best: list[tuple[int, int]] = [(0, 0)]  # for each end: bytes of the segments, number of slabs
    begins = [0]
    for end in range(1, len(sizes) + 1):
        total = largest = 0
        found: list[tuple[int, int, int]] = []
        for begin in range(end - 1, max(-1, end - 1 - MOST_IN_SLAB), -1):
            total, largest = total + _aligned(sizes[begin]), max(largest, _aligned(sizes[begin]))
            if total - largest > PORTION_BYTES:
                break
            found.append((best[begin][0] + segment_bytes(total), best[begin][1] + 1, begin))
        held, slabs, begin = min(found)
        best.append((held, slabs))
        begins.append(begin)
    cuts = [len(sizes)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    cuts.reverse()
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def segment_bytes(nbytes: int) -> int:
    """What torch's allocator takes from CUDA for a tensor that finds no room."""
    if nbytes <= 1 << 20:
        return 2 << 20
    return 20 << 20 if nbytes < 10 << 20 else -(-nbytes >> 21) << 21


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
