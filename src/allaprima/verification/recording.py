"""One run of a pipeline, recorded: noise predictions, latents and pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .drawing import Drawing
from .metrics import Pixels


@dataclass
class Trace:
    """What one run left behind, on the CPU in float64.

    predictions   the guided noise prediction of each step, as the scheduler received it  [B, 4, H/8, W/8]
    latents       after each step                                                         [B, 4, H/8, W/8]
    pixels        the pictures, 0 to 1                                                    [B, H, W, 3]
    """

    predictions: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    pixels: Pixels = field(default_factory=lambda: np.empty(0, np.float32))


def record(pipe: Any, drawing: Drawing, latents: Sequence[torch.Tensor] | None = None) -> Trace:
    """Run `pipe` and record it.  With `latents`, each step hands those on instead of its own."""
    trace = Trace()

    def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = tensors["latents"]
        trace.latents.append(_kept(own))
        return {"latents": latents[step].to(own)} if latents is not None else {}

    with _quiet(pipe), _predictions_of(pipe.scheduler, trace.predictions):
        arguments = drawing.arguments(native=pipe.unet.config.sample_size * pipe.vae_scale_factor)
        trace.pixels = pipe(**arguments, output_type="np", callback_on_step_end=after_step).images
    return trace


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


@contextmanager
def _predictions_of(scheduler: Any, kept: list[torch.Tensor]) -> Iterator[None]:
    """Keep what `scheduler.step` is given: the one place where every pipeline shows its noise prediction."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature of `step`
    def recording_step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.append(_kept(model_output))
        return step(model_output, *args, **kwargs)

    scheduler.step = recording_step
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own: several runs make one verification."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
