"""Hires fix: draw small, enlarge the latents, draw on at the larger size.  A1111's way and its names.

Both passes run on the same engines, and the larger size is one more size: nothing is captured for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .errors import InputError, SizeError
from .pipelines import as_task

UPSCALERS: Mapping[str, dict[str, Any]] = {
    "Latent": {"mode": "bilinear"},
    "Latent (antialiased)": {"mode": "bilinear", "antialias": True},
    "Latent (bicubic)": {"mode": "bicubic"},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest)": {"mode": "nearest"},
    "Latent (nearest-exact)": {"mode": "nearest-exact"},
}
"""A1111's name -> arguments of `torch.nn.functional.interpolate`."""


def hires(
    pipe: Any,
    prompt: Any = None,
    *,
    scale: float = 2.0,
    size: tuple[int, int] | None = None,
    strength: float = 0.7,
    upscaler: str = "Latent",
    second_steps: int = 0,
    **arguments: Any,
) -> Any:
    """Draw with `pipe`, a text-to-image pipeline, and once more over the enlarged result.  returns the second output.

    scale         of height and width, which are rounded down to multiples of the latents' pixels; or
    size          (width, height) in pixels of the final picture
    strength      how much of the second pass is drawn: A1111's denoising strength
    upscaler      one of UPSCALERS
    second_steps  of the second pass's schedule; 0 takes num_inference_steps
    arguments     of both passes (height and width are the first's).  Generators begin again from their seed, so that a
                  seed gives the noise it gives at the larger size
    raises        InputError, SizeError
    """
    if upscaler not in UPSCALERS:
        raise InputError(f"upscaler {upscaler!r}; allowed: {', '.join(UPSCALERS)}.")
    second = as_task(pipe, "img2img")
    latents = pipe(prompt, **{**arguments, "output_type": "latent"}).images
    if latents.dim() != 4:
        raise InputError(f"{type(pipe).__name__} packs its latents {list(latents.shape)}: hires needs [B, C, H, W].")
    enlarged = F.interpolate(latents, _latent_size(pipe, latents, scale, size), **UPSCALERS[upscaler])
    again = {name: value for name, value in arguments.items() if name not in ("height", "width", "latents")}
    if second_steps:
        again["num_inference_steps"] = second_steps
    _rewind(arguments.get("generator"))
    return second(prompt, image=enlarged, strength=strength, **again)


def _latent_size(pipe: Any, latents: torch.Tensor, scale: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    pixels = pipe.vae_scale_factor
    if size is not None:
        width, height = size
        if height % pixels or width % pixels or min(size) <= 0:
            raise SizeError(f"size {width}x{height}: width and height are multiples of {pixels}.")
        return height // pixels, width // pixels
    if not isinstance(scale, int | float) or not 0 < scale < 64:
        raise InputError(f"scale is {scale!r}; allowed is a number above 0 and below 64.")
    height, width = (max(1, int(side * pixels * scale) // pixels) for side in latents.shape[-2:])
    return height, width


def _rewind(generator: Any) -> None:
    for each in generator if isinstance(generator, list) else [generator]:
        if isinstance(each, torch.Generator):
            each.manual_seed(each.initial_seed())
