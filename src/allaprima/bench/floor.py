"""How near to the machine's limit: the floating-point operations of a call against a measured ceiling.

A call cannot be faster than its operations at the machine's best matrix multiplication, nor than reading its weights
once.  The share of that floor which is reached says how much is left to gain; a speed-up over a slow baseline does not.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .timing import cpu_ms, cuda_ms


def on_meta(module: torch.nn.Module) -> torch.nn.Module:
    """The same module with shapes and no numbers: no weight is copied."""
    tensors: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        tensors[id(tensor)] = torch.nn.Parameter(empty, False) if isinstance(tensor, torch.nn.Parameter) else empty
    return copy.deepcopy(module, tensors)


def count_flops(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> int:
    """Floating-point operations of one call, two for a multiply-add; convolutions, matrix products and attention.

    module, args, kwargs   any device; nothing is computed
    """
    meta_args, meta_kwargs = _to_meta(list(args)), _to_meta(dict(kwargs or {}))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(module)(*meta_args, **meta_kwargs)
    return int(counter.get_total_flops())


def _to_meta(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), value)


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values())


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached at best: one large matrix product, one large copy."""

    flops_per_s: float
    bytes_per_s: float

    def or_better(self, other: Ceiling) -> Ceiling:
        return Ceiling(max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s))

    def floor_ms(self, flops: int, num_bytes: int) -> float:
        """The later of the two: all operations at full speed, or every weight read once."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s) * 1000


def measured_ceiling(dtype: torch.dtype, device: str = "cpu", tries: int = 8) -> Ceiling:
    """The best of some tries, in this dtype and with torch's threads; about a second."""
    on_cuda = torch.device(device).type == "cuda"
    stopwatch = cuda_ms if on_cuda else cpu_ms
    size = 8192 if on_cuda else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    product_ms = min(stopwatch(lambda: torch.mm(a, b, out=out)) for _ in range(tries))
    big = torch.empty(2**30 if on_cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(big)
    copy_ms = min(stopwatch(lambda: target.copy_(big)) for _ in range(tries))
    return Ceiling(2 * size**3 / product_ms * 1000, 2 * big.numel() / copy_ms * 1000)
