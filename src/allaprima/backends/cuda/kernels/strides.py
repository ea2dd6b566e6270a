"""What kernels must know of where the numbers of a tensor lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def collapse(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride with which axes are walked in order, as if they were a single axis; None if there is none.

    Axes of size 1 do not count, whatever their stride.  Nothing to walk: 0.
    """
    step, total = 0, 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if total == 1:
            step = stride
        elif stride != step * total:
            return None
        total *= size
    return step


def alignment_reason(**tensors: torch.Tensor | None) -> str | None:
    """Why 16-byte loads cannot start at these tensors, or None: compiled forms are for addresses that allow them."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
    return None
