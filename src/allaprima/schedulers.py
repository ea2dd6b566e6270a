"""Schedulers by the names that the web UIs use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from .errors import SchedulerError

_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_NO_CLIP = {"clip_sample": False}  # latents are not bounded; diffusers' default is for pixels

SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DDIM": ("DDIMScheduler", _NO_CLIP),
    "DDPM": ("DDPMScheduler", _NO_CLIP),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", _KARRAS),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", _KARRAS),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", _NO_CLIP),
    "Heun": ("HeunDiscreteScheduler", {}),
}
"""Name -> class of diffusers and the settings that make it what the name says."""

_RESET = {"use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}


def set_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another scheduler, with the noise schedule of its checkpoint.

    raises  SchedulerError for an unknown name
    """
    known = {key.lower(): key for key in SCHEDULERS}
    if name.lower() not in known:
        raise SchedulerError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULERS)}.")
    class_name, settings = SCHEDULERS[known[name.lower()]]
    scheduler = getattr(diffusers, class_name)
    accepted = set(scheduler._get_init_keys(scheduler))
    settings = {key: value for key, value in (_RESET | settings).items() if key in accepted}
    kept = {key: value for key, value in pipe.scheduler.config.items() if key in accepted}
    pipe.scheduler = scheduler.from_config(kept, **settings)
