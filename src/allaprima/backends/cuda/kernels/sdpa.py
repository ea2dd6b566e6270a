"""Attention by the libraries that ATen reaches: cuDNN's and the flash kernel that torch ships."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..device import Device

LAUNCH_US = 3.0


@dataclass(frozen=True)
class Library:
    """One of ATen's own; "any" leaves the choice to it and takes every argument.

    share  of the matrix rate that it reaches with 64 channels and thousands of tokens, measured on an H100
    pad    its channels are multiples of this
    """

    name: str
    backend: SDPBackend | None
    share: float
    pad: int


CUDNN = Library("cudnn", SDPBackend.CUDNN_ATTENTION, 0.58, 8)
FLASH = Library("flash", SDPBackend.FLASH_ATTENTION, 0.38, 32)
ANY = Library("sdpa", None, 0.3, 64)


def candidates(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, device: Device
) -> list[Library]:
    """The libraries that take these tensors; ATen finds some way for all."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    channels = q.shape[-1]
    found = [ANY]
    if half and mask is None and channels % 8 == 0 and q.is_cuda:
        found += [FLASH] if channels <= 256 else []
        found += [CUDNN] if channels <= 128 or (device.arch >= 90 and channels <= 256) else []
    return found


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
    """Time of one call.  cuDNN takes 171 µs for 2 × 8 heads of 4,096 tokens and 40 channels on an H100, flash 276."""
    batch, num_rows, heads, channels = shape
    padded = -(-channels // library.pad) * library.pad
    # The exponentials of a score take as long as 64 channels of the products.
    flops = 4 * batch * heads * num_rows * num_keys * max(64, padded)
    tflops = device.half_tflops if itemsize == 2 else device.float_tflops
    programs = batch * heads * -(-num_rows // 128)
    waves = -(-programs // device.num_sms) * device.num_sms / programs
    fixed = LAUNCH_US + 4.0 * max(1.0, num_keys / 512)
    return fixed + waves * flops / (library.share * tflops * 1e6)
