"""What the analytic model knows of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    arch          compute capability, ten times major plus minor
    num_sms       streaming multiprocessors
    shared_bytes  shared memory that one block may use
    l2_bytes      second-level cache
    half_tflops   reachable tensor-core rate in f16 and bf16 with f32 accumulation, 1e12 FLOP/s
    float_tflops  reachable rate in f32, without TF32
    memory_tbs    reachable bandwidth of the memory, 1e12 bytes/s
    l2_tbs        reachable bandwidth of the second-level cache
    """

    name: str
    arch: int
    num_sms: int
    shared_bytes: int
    l2_bytes: int
    half_tflops: float
    float_tflops: float
    memory_tbs: float
    l2_tbs: float


KNOWN = (
    Device("A100", 80, 108, 163 << 10, 40 << 20, 270, 17, 1.7, 4.5),
    Device("A10", 86, 72, 99 << 10, 6 << 20, 105, 24, 0.52, 1.6),
    Device("L4", 89, 58, 99 << 10, 48 << 20, 100, 24, 0.27, 1.8),
    Device("RTX 4090", 89, 128, 99 << 10, 72 << 20, 160, 70, 0.92, 4.0),
    Device("H100", 90, 132, 227 << 10, 50 << 20, 800, 50, 3.0, 8.0),
    Device("H200", 90, 132, 227 << 10, 50 << 20, 800, 50, 4.2, 8.0),
)
"""Rates are what large, well-shaped work reaches, not the data sheet's."""


@functools.cache
def device_of(index: int) -> Device:
    """The GPU with this index: by its name, else the known one of its generation scaled to its size."""
    found = torch.cuda.get_device_properties(index)
    arch = 10 * found.major + found.minor
    named = [d for d in KNOWN if d.name in found.name and d.arch == arch]
    like = max(named, key=lambda d: len(d.name), default=None) or nearest(arch)
    share = found.multi_processor_count / like.num_sms
    return replace(
        like,
        arch=arch,
        num_sms=found.multi_processor_count,
        shared_bytes=getattr(found, "shared_memory_per_block_optin", like.shared_bytes),
        l2_bytes=found.L2_cache_size,
        half_tflops=like.half_tflops * share,
        float_tflops=like.float_tflops * share,
    )


def nearest(arch: int) -> Device:
    """The known GPU of the newest generation that is not newer than `arch`."""
    return max((d for d in KNOWN if d.arch <= arch), key=lambda d: (d.arch, d.half_tflops), default=KNOWN[0])
