"""NaN and Inf: noticed on the device, read once after the loop, never drawn as a black picture."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from .errors import NumericsError


class NumericsGuard:
    """Watches the latents of one pipeline's runs.

    The flag stays on the device: the denoising loop is never stopped to look at it.
    """

    def __init__(self) -> None:
        self._bad: torch.Tensor | None = None

    def reset(self) -> None:
        self._bad = None

    def watch(self, result: Any, args: tuple[Any, ...]) -> Any:
        """After each UNet call: note whether its prediction is finite."""
        bad = ~torch.isfinite(result[0]).all()
        self._bad = bad if self._bad is None else self._bad | bad
        return result

    def check(self) -> None:
        """After the loop.  raises NumericsError where a prediction was not finite."""
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise NumericsError(
                "the UNet predicted NaN or Inf, so there is no picture. Draw again with allaprima.restore(pipe), in "
                "float32 (dtype='float32'), or with another checkpoint."
            )

    def decoded(self, decoder: nn.Module, picture: Any, args: tuple[Any, ...]) -> Any:
        """After the VAE decoder: a picture with NaN or Inf is decoded again in float32."""
        self.check()
        if bool(torch.isfinite(picture).all()):
            return picture
        latents = args[0]
        if not bool(torch.isfinite(latents).all()):
            raise NumericsError("the latents hold NaN or Inf, so there is no picture to decode.")
        warnings.warn(
            f"the VAE overflowed in {picture.dtype}; decoding again in float32.", RuntimeWarning, stacklevel=2
        )
        with torch.no_grad():
            again = copy.deepcopy(decoder).float()(latents.float())
        if not bool(torch.isfinite(again).all()):
            raise NumericsError(
                "the VAE decodes these latents to NaN or Inf even in float32: the checkpoint is broken."
            )
        return again.to(picture.dtype) if bool(torch.isfinite(again.to(picture.dtype)).all()) else again
