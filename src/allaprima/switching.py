"""Another checkpoint for a pipeline that lives: `pipe = ap.switch(pipe, "other")`.

Of the same architecture, its numbers are written into the present parameters: nothing is captured, recorded graphs stay
valid.  Of another one, its modules take the place of the present ones.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import Config
from .errors import CheckpointError, ConfigError
from .merging import Loras, loras, reapply, resting
from .notices import quiet_import
from .pipelines import optimize, restore, share, state
from .tuners import layers_in_force
from .weights.checkpoints import new_pipeline, open_checkpoint, with_parts
from .weights.contents import Checkpoint, build
from .weights.pool import Pool
from .weights.writing import Write, is_from, plan, remember, remember_tokenizer, write

with quiet_import():
    from diffusers import DiffusionPipeline


def switch(
    pipe: Any,
    source: str | Path,
    *,
    pool: Pool | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: bool = False,
) -> Any:
    """Give a pipeline another checkpoint; its dtype, device, optimizer and LoRAs stay.

    All is checked before anything is changed: after an error the pipeline is as it was.

    pipe     a diffusers pipeline, optimized or not
    source, vae, text_encoder, ema  as `load` takes them
    pool     where to look for it first (weights.pool.Pool)
    returns  the pipeline: the same object; but a new one where the checkpoint is for another kind of pipeline (SDXL for
             SD 1, say), and the old one is empty then
    raises   UnknownModelError, CheckpointError, ConfigError
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ConfigError(f"switch() takes a diffusers pipeline, not a {type(pipe).__name__}.")
    checkpoint = pool.checkpoint(source, ema=ema) if pool is not None else open_checkpoint(source, ema=ema)
    swaps = {name: part for name, part in (("vae", vae), ("text_encoder", text_encoder)) if part is not None}
    if swaps:
        checkpoint = with_parts(checkpoint, swaps)
    writes = _plans(pipe, checkpoint)
    others = _others(pipe, checkpoint)
    if all(writes.values()):
        return _write(pipe, [one for one in writes.values() if one is not None], others)
    return _exchange(pipe, checkpoint, writes, others)


# ---- the same architecture -----------------------------------------------------------------------------------------


def _plans(pipe: Any, checkpoint: Checkpoint) -> dict[str, Write | None]:
    """For each part what is to be written into the pipeline's own; None where that is of another architecture."""
    found: dict[str, Write | None] = {}
    for name, component in checkpoint.modules.items():
        module = pipe.components.get(name)
        found[name] = plan(component, module) if isinstance(module, nn.Module) else None
    spare = _modules_of(pipe).keys() - found.keys() - {"safety_checker", "image_encoder", "controlnet"}
    return found | dict.fromkeys(spare)


def _others(pipe: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Scheduler and tokenizers of the checkpoint: the pipeline's own where they are equal."""
    found = {}
    for name, (identity, make) in checkpoint.others.items():
        present = pipe.components.get(name)
        if name == "scheduler":
            new = make()
            same = type(present) is type(new) and _settings(present) == _settings(new)
            found[name] = present if same else new
        elif is_from(present, identity):
            found[name] = present
        else:
            found[name] = make()
            remember_tokenizer(found[name], identity)
    return found


def _settings(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def _write(pipe: Any, writes: list[Write], others: Mapping[str, Any]) -> Any:
    with resting(pipe):
        write(writes)
        for one in _sharing(pipe):
            one.register_modules(**{name: part for name, part in others.items() if name in one.components})
        if loras(pipe):
            reapply(pipe)
    return pipe


def _sharing(pipe: Any) -> list[Any]:
    """The pipeline and those for other tasks that share its components."""
    optimized = state(pipe)
    return list(optimized.twins) if optimized is not None else [pipe]


def _modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


# ---- another one ---------------------------------------------------------------------------------------------------


def _exchange(pipe: Any, checkpoint: Checkpoint, writes: Mapping[str, Write | None], others: Mapping[str, Any]) -> Any:
    """Build what differs in host memory first, then let the old go, then take its place."""
    kind, device = _kind(pipe, checkpoint), pipe.device
    kept = {name: one for name, one in writes.items() if one is not None}
    changed = {name: component for name, component in checkpoint.modules.items() if name not in kept}
    new = {name: build(component, _dtype(pipe, name), torch.device("cpu")) for name, component in changed.items()}
    left, adapters = loras(pipe), _adapters(pipe, _modules_of(pipe).keys() - kept.keys())
    if kept:
        _write(pipe, list(kept.values()), {})
    parts = {**{name: one.module for name, one in kept.items()}, **new, **others}
    config, sharing = _released(pipe)
    if kind is type(pipe):
        for one in sharing:
            _renew(one, parts)
    else:
        replaced = new_pipeline(kind, parts, checkpoint.options)
        replaced.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        for one in sharing:
            one.register_modules(**dict.fromkeys(_modules_of(one)))
        pipe, sharing = replaced, [replaced]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    pipe.to(device)
    for name, component in changed.items():
        remember(new[name], component.identity)
    if config is not None:
        optimize(pipe, config)
        for one in sharing:
            if one is not pipe:
                share(pipe, one)
    _tell_of_lost(left, loras(pipe), adapters)
    return pipe


def _released(pipe: Any) -> tuple[Config | None, list[Any]]:
    """Undo the optimizer.  returns its settings, and the pipelines that share the components"""
    optimized, sharing = state(pipe), _sharing(pipe)
    for one in sharing:
        restore(one)
    return (optimized.config if optimized is not None else None), sharing


def _adapters(pipe: Any, names: Iterable[str]) -> dict[str, set[str]]:
    """PEFT's adapters, and in which of these parts they are."""
    found: dict[str, set[str]] = {}
    for name in names:
        for adapter in layers_in_force(pipe.components[name]):
            found.setdefault(adapter, set()).add(name)
    return found


def _tell_of_lost(before: Loras, after: Loras, adapters: Mapping[str, set[str]]) -> None:
    parts = {
        name: lora.weights.keys() - (after[name].weights if name in after else {}) for name, lora in before.items()
    }
    for name, places in adapters.items():
        parts[name] = parts.get(name, set()) | places
    if lost := [f"{name} ({', '.join(sorted(gone))})" for name, gone in parts.items() if gone]:
        warnings.warn(f"LoRAs were left behind with the parts that were exchanged: {', '.join(lost)}.", stacklevel=4)


def _kind(pipe: Any, checkpoint: Checkpoint) -> type[Any]:
    """The class of the pipeline afterwards: its own, where that takes the checkpoint's parts.

    raises  CheckpointError where parts of the present one would be lost
    """
    own, other = inspect.signature(type(pipe).__init__).parameters, checkpoint.modules.keys() | checkpoint.others.keys()
    required = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2"}
    same_parts = {name for name in own if name in required} == {
        name for name in inspect.signature(checkpoint.pipeline.__init__).parameters if name in required
    }
    channels = checkpoint.modules["unet"].config.get("in_channels") if "unet" in checkpoint.modules else None
    if same_parts and other <= own.keys() and channels == _channels(pipe):
        return type(pipe)
    lost = _modules_of(pipe).keys() - checkpoint.modules.keys() - {"safety_checker", "text_encoder_2", "text_encoder"}
    if lost:
        raise CheckpointError(
            f"{checkpoint.source} is for a {checkpoint.pipeline.__name__}, which has no place for this pipeline's "
            f"{', '.join(sorted(lost))}. Load it by itself: allaprima.load."
        )
    return checkpoint.pipeline


def _channels(pipe: Any) -> int | None:
    unet = pipe.components.get("unet")
    return unet.config.get("in_channels") if isinstance(unet, nn.Module) else None  # type: ignore[union-attr,operator]


def _renew(pipe: Any, parts: Mapping[str, Any]) -> None:
    """Set the pipeline up again around other components: sizes and factors that it keeps are those of its VAE."""
    known = inspect.signature(type(pipe).__init__).parameters
    held = {name: value for name, value in (dict(pipe.config) | pipe.components).items() if name in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        type(pipe).__init__(pipe, **held | {name: part for name, part in parts.items() if name in known})


def _dtype(pipe: Any, name: str) -> torch.dtype:
    """Of the part whose place it takes, else of the denoiser."""
    for other in (name, "unet", "transformer"):
        if isinstance(module := pipe.components.get(other), nn.Module):
            return next(module.parameters()).dtype
    dtype: torch.dtype = pipe.dtype
    return dtype
