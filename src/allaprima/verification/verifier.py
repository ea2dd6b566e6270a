"""Draws with the eager and with the optimized pipeline from one seed, and lets a float32 run judge the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..errors import InputError
from ..explanation import explain
from ..pipelines import as_task, eager
from .drawing import TASKS, Drawing, Task
from .judging import Errors, judge
from .metrics import Pixels, largest_difference, psnr, ssim
from .recording import Trace, record
from .report import Report
from .sheet import DIFFERENCE_GAIN
from .truth import NoiseIn, exact_float32, precise_copy


def verify(
    pipe: Any,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    seed: int = 0,
    task: Task = "text2img",
    image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    strength: float = 0.8,
    count: int = 1,
    truth: bool | Literal["float32", "float64"] = True,
) -> Report:
    """Draw with the eager and with the optimized pipeline and compare.

    pipe     an optimized pipeline; it is left as it was
    truth    judge both by a float32 run of the same weights (True; needs a float32 copy in memory), or by a float64
             run, or do not (False).  For a float32 pipeline True means eager itself.
    returns  Report; `.passed` is PSNR to eager ≥ 60 dB in float32, and in half precision no more error than 1.1 times
             eager's in the median step and in the decoding, and nowhere twice eager's
    raises   InputError, ConfigError where the pipeline is not optimized
    """
    settings = dict(locals())
    del settings["pipe"], settings["truth"]
    return Verifier(pipe, truth).verify(Drawing(**settings))


class Verifier:
    """Verifies many drawings of one pipeline; the float32 copy is made once."""

    def __init__(self, pipe: Any, truth: bool | Literal["float32", "float64"] = True) -> None:
        fallbacks(pipe)  # raises where there is nothing to verify
        self.pipe = pipe
        self.dtype: torch.dtype = pipe.unet.dtype
        self.half = self.dtype in (torch.float16, torch.bfloat16)
        self.truth_dtype = _truth_dtype(truth, self.half)
        self._precise = None if self.truth_dtype is None else precise_copy(pipe, self.truth_dtype)

    def verify(self, drawing: Drawing) -> Report:
        pipe = as_task(self.pipe, drawing.task)
        with eager(pipe):
            theirs = record(pipe, drawing)
        ours = record(pipe, drawing)
        errors = self._errors(pipe, drawing, theirs, ours)
        psnrs = tuple(map(psnr, theirs.pixels, ours.pixels))
        return Report(
            drawing=drawing,
            dtype=_name(self.dtype),
            device=str(pipe.device),
            truth=_name(self.truth_dtype) if self.truth_dtype else None,
            images=(_pil(theirs.pixels), _pil(ours.pixels)),
            differences=_pil(np.abs(theirs.pixels - ours.pixels) * DIFFERENCE_GAIN),
            psnrs=psnrs,
            ssims=tuple(map(ssim, theirs.pixels, ours.pixels)),
            latent_differences=tuple(map(largest_difference, theirs.latents, ours.latents)),
            eager=errors and errors[0],
            ours=errors and errors[1],
            checks=judge(psnrs, errors and errors[0], errors and errors[1], self.half),
            fallbacks=fallbacks(self.pipe),
        )

    def _errors(self, pipe: Any, drawing: Drawing, theirs: Trace, ours: Trace) -> tuple[Errors, Errors] | None:
        """Of eager and of ours.  Eager's free run is its stepwise run too: the others follow its latents."""
        if self._precise is None:
            return None
        precise = as_task(self._precise, drawing.task)
        with NoiseIn(self.dtype), exact_float32():
            true_free = record(precise, drawing)
            true_stepwise = record(precise, drawing, theirs.latents)
        ours_stepwise = record(pipe, drawing, theirs.latents)
        return (
            Errors.of(theirs, theirs, true_stepwise, true_free),
            Errors.of(ours_stepwise, ours, true_stepwise, true_free),
        )


def verify_many(
    pipe: Any,
    prompts: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    tasks: Sequence[Task] = TASKS,
    truth: bool | Literal["float32", "float64"] = True,
    progress: bool = True,
    **settings: Any,
) -> list[Report]:
    """Verify every prompt at every size (width, height) in every task; prompt i is drawn with seed + i.

    settings   as of `verify`
    """
    verifier = Verifier(pipe, truth)
    first_seed = settings.pop("seed", 0)
    cases = [(i, size, task) for task in tasks for size in sizes for i in range(len(prompts))]
    reports = []
    shown = track(cases, description="verifying", console=Console(stderr=True), disable=not progress)
    for i, (width, height), task in shown:
        drawing = Drawing(prompts[i], width=width, height=height, task=task, seed=first_seed + i, **settings)
        reports.append(verifier.verify(drawing))
    return reports


def _truth_dtype(truth: bool | str, half: bool) -> torch.dtype | None:
    if truth == "float64":
        return torch.float64
    if truth not in (True, False, "float32"):
        raise InputError(f"truth is {truth!r}; allowed: True, False, 'float32', 'float64'.")
    return torch.float32 if truth and half else None


def fallbacks(pipe: Any) -> tuple[str, ...]:
    """One line for each reason why calls of the optimized pipeline ran eager.

    raises   ConfigError where it is not optimized
    """
    return tuple(f"{count} x {why}" for why, count in explain(pipe).fallbacks.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pil(pixels: Pixels) -> list[Image.Image]:
    levels = (np.nan_to_num(pixels, nan=1.0).clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]
