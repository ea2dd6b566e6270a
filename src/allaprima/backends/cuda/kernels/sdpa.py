"""Attention by the libraries that ATen reaches: cuDNN's and the flash kernel that torch ships."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..device import Device
from .attention import clock_hz

LAUNCH_US = 3.0


@dataclass(frozen=True)
class Library:
    """One of ATen's own.

    setup_us  from its start to its first product, and the kernels around it
    softmax   a score's share of a multiprocessor outside of its products, in exponentials (16 in a clock)
    share     of the matrix rate that its products reach
    pad       its channels are multiples of this
    rows      of one program
    """

    name: str
    backend: SDPBackend | None
    setup_us: float
    softmax: float
    share: float
    pad: int
    rows: int


CUDNN = Library("cudnn", SDPBackend.CUDNN_ATTENTION, 3.6, 1.18, 1.75, 64, 128)
FLASH = Library("flash", SDPBackend.FLASH_ATTENTION, 3.6, 1.37, 0.5, 32, 64)
ANY = Library("sdpa", None, 6.0, 1.37, 0.15, 32, 32)
"""`ANY` takes every argument: where neither of the others does, ATen computes in smaller tiles, or without fusion."""


def candidates(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, device: Device
) -> list[Library]:
    """The libraries that take these tensors; `ANY` where no other does, as it is one of the others elsewhere."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    channels = q.shape[-1]
    found = []
    if half and mask is None and channels % 8 == 0 and q.device.type != "cpu":
        found += [FLASH] if channels <= 256 else []
        found += [CUDNN] if channels <= 128 or (device.arch >= 90 and channels <= 256) else []
    return found or [ANY]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    *,
    parameters: Library,
) -> torch.Tensor:
    """`ops.sdpa.attention` by one library."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if parameters.backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)
    with sdpa_kernel(parameters.backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def estimate_us(shape: torch.Size, num_keys: int, itemsize: int, library: Library, device: Device) -> float:
    """Time of one call: products and exponentials one after the other, reading and writing.

    As measured on an H100 with heads of 40 to 512 channels, 77 to 16,384 keys: cuDNN within 12 %, the others within a
    third.
    """
    batch, num_rows, heads, channels = shape
    padded = -(-channels // library.pad) * library.pad
    programs = batch * heads * -(-num_rows // library.rows)
    waves = -(-programs // device.num_sms) * device.num_sms / programs
    scores = waves * programs * library.rows * (-(-num_keys // 128) * 128)

    exponentials = 16 * device.num_sms * clock_hz(device)
    tflops = device.half_tflops if itemsize == 2 else device.float_tflops
    products = 4 * padded / (library.share * tflops * 1e12)
    once = 2 * batch * heads * (num_rows + num_keys) * channels * itemsize
    memory = once / (1e12 * (device.l2_tbs if once < device.l2_bytes / 2 else device.memory_tbs))
    return LAUNCH_US + library.setup_us + 1e6 * (scores * (library.softmax / exponentials + products) + memory)
