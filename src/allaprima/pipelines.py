"""The one file that knows diffusers: load, optimize, restore.

An optimized pipeline stays the user's: same class, same call, same callbacks and schedulers.  Its components' `forward`
becomes an engine, and three of the pipeline's own methods are wrapped on the instance: `check_inputs` (our errors),
`encode_prompt` (clip_skip) and the image processor's `postprocess` (the numerics flag).
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from . import profiles
from .config import Config
from .engine import Engine, Profile, gather_parameters
from .errors import AllaprimaError, ConfigError, InputError, SchedulerError, SizeError
from .notices import quiet_import
from .numerics import NumericsGuard
from .prompts import forget
from .schedulers import SCHEDULERS, set_scheduler
from .weights.checkpoints import load

with quiet_import():
    import diffusers
    from diffusers import DiffusionPipeline

__all__ = [
    "SCHEDULERS", "Optimized", "as_task", "eager", "engines", "load", "optimize", "rebind", "restore", "set_scheduler",
]  # fmt: skip

Task = Literal["text2img", "img2img", "inpaint"]
TASKS: tuple[Task, ...] = ("text2img", "img2img", "inpaint")
FAMILIES: tuple[dict[str, str], ...] = (
    {"text2img": "StableDiffusionPipeline", "img2img": "StableDiffusionImg2ImgPipeline",
     "inpaint": "StableDiffusionInpaintPipeline"},
    {"text2img": "StableDiffusionXLPipeline", "img2img": "StableDiffusionXLImg2ImgPipeline",
     "inpaint": "StableDiffusionXLInpaintPipeline"},
    {"text2img": "StableDiffusionControlNetPipeline", "img2img": "StableDiffusionControlNetImg2ImgPipeline",
     "inpaint": "StableDiffusionControlNetInpaintPipeline"},
    {"text2img": "StableDiffusionXLControlNetPipeline", "img2img": "StableDiffusionXLControlNetImg2ImgPipeline",
     "inpaint": "StableDiffusionXLControlNetInpaintPipeline"},
    {"text2img": "LatentConsistencyModelPipeline", "img2img": "LatentConsistencyModelImg2ImgPipeline"},
    {"text2img": "StableDiffusion3Pipeline", "img2img": "StableDiffusion3Img2ImgPipeline",
     "inpaint": "StableDiffusion3InpaintPipeline"},
    {"text2img": "FluxPipeline", "img2img": "FluxImg2ImgPipeline", "inpaint": "FluxInpaintPipeline"},
    {"text2img": "AltDiffusionPipeline", "img2img": "AltDiffusionImg2ImgPipeline",
     "inpaint": "StableDiffusionInpaintPipeline"},
)  # fmt: skip
"""The classes that draw with one set of components, by task."""
DENOISERS = frozenset({"unet", "transformer"})
_STATE = "_allaprima"


@dataclass
class Optimized:
    """What `optimize` did to a pipeline, and how to undo it.  Copies of the pipeline are plain ones: they get None."""

    config: Config
    guard: NumericsGuard
    twins: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    schedulers: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Those of the twins; they outlive a pipeline whose parts another one took over (diffusers' from_pipe)."""
    engines: dict[str, Engine] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


# ---- optimize and restore ------------------------------------------------------------------------------------------


def optimize(target: Any, config: Config | None = None) -> Any:
    """Optimize a diffusers pipeline, or any module, in place.  returns it.

    Text and image encoders, UNet or transformer, ControlNets, VAE decoder and encoder each get an engine.  Nothing is
    compiled now; each is captured at its first call and never again, whatever the size, batch, prompt, scheduler or
    checkpoint.
    raises  ConfigError where `target` is neither a pipeline nor a module, and where its weights are offloaded
    """
    config = config or Config()
    if isinstance(target, DiffusionPipeline):
        if state(target) is not None:
            restore(target)
        _optimize_pipeline(target, config)
    elif isinstance(target, nn.Module):
        if isinstance(target.__dict__.get("forward"), Engine):
            restore(target)
        Engine(target, config).install()
    else:
        raise ConfigError(f"optimize() takes a diffusers pipeline or a torch.nn.Module, not a {type(target).__name__}.")
    return target


def restore(target: Any) -> Any:
    """Undo `optimize`: the pipeline or module is exactly as before.  returns it; no error where it is not optimized."""
    if isinstance(target, nn.Module):
        if isinstance(engine := target.__dict__.get("forward"), Engine):
            engine.remove()
    elif (optimized := state(target)) is not None:
        for undo in reversed(optimized.undo):
            undo()
        del target.__dict__[_STATE]
    return target


def rebind(target: Any) -> Any:
    """Read all weights again: needed only after writes through `tensor.data`, which leave no trace.  returns target."""
    for engine in engines(target).values():
        engine.rebind()
    optimized = None if isinstance(target, nn.Module) else state(target)
    for pipe in optimized.twins if optimized else [target]:
        forget(pipe)
    return target


def state(pipe: Any) -> Optimized | None:
    found = pipe.__dict__.get(_STATE)
    return found if isinstance(found, Optimized) else None


def engines(target: Any) -> dict[str, Engine]:
    """The engines of an optimized pipeline or module by component name; empty where there are none."""
    if isinstance(target, nn.Module):
        engine = target.__dict__.get("forward")
        return {engine.profile.name: engine} if isinstance(engine, Engine) else {}
    optimized = state(target)
    return dict(optimized.engines) if optimized else {}


@contextmanager
def eager(target: Any) -> Iterator[Any]:
    """Within this context every component runs its original forward: for comparing the two in one process."""
    found = engines(target).values()
    before = [engine.bypassed for engine in found]
    for engine in found:
        engine.bypassed = True
    try:
        yield target
    finally:
        for engine, bypassed in zip(found, before, strict=True):
            engine.bypassed = bypassed


def as_task(pipe: DiffusionPipeline, task: Task) -> DiffusionPipeline:
    """The same components, and so the same engines, as a pipeline for another task.

    raises  InputError for an unknown task, and where diffusers has no such pipeline for these components
    """
    if task not in TASKS:
        raise InputError(f"task {task!r}; allowed: {', '.join(TASKS)}.")
    kind = _class_for(pipe, task)
    if type(pipe) is kind:
        return pipe
    twin = kind(**_constructor_arguments(pipe, kind))
    twin.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    share(pipe, twin)
    return twin


def share(pipe: Any, twin: Any) -> None:
    """Let a pipeline of the same components have the engines of `pipe`, if this one has any."""
    if (optimized := state(pipe)) is not None:
        shared = replace(optimized, engines=dict(optimized.engines), undo=[])
        optimized.twins.add(twin)
        twin.__dict__[_STATE] = shared
        _wrap_methods(twin, shared)


def _class_for(pipe: DiffusionPipeline, task: Task) -> type[DiffusionPipeline]:
    name = type(pipe).__name__
    family: dict[str, str] = next((f for f in FAMILIES if name in f.values()), {})
    if task not in family:
        known = ", ".join(family) or "none, as it belongs to no known family"
        raise InputError(f"{name} cannot be used for {task!r}; tasks of its components: {known}.")
    found: type[DiffusionPipeline] = getattr(diffusers, family[task])
    return found


def _constructor_arguments(pipe: DiffusionPipeline, kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """Components and settings of `pipe` that `kind` takes.  (diffusers' own `from_pipe` casts the shared components to
    float32 where no dtype is given.)"""
    parameters = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in (dict(pipe.config) | pipe.components).items() if name in parameters}


def _optimize_pipeline(pipe: Any, config: Config) -> None:
    _check_offloading(pipe)
    optimized = Optimized(config, NumericsGuard())
    optimized.twins.add(pipe)
    for _, module, _ in _components(pipe, optimized):
        if isinstance(old := module.__dict__.get("forward"), Engine):
            old.remove()  # a component shared with another optimized pipeline: the newest owner wins
    _install(pipe, optimized)
    pipe.__dict__[_STATE] = optimized
    _wrap_methods(pipe, optimized)


def _install(pipe: Any, optimized: Optimized) -> None:
    """Give an engine to every component that has none: at first to all, later to those that the user exchanged."""
    components = list(_components(pipe, optimized))
    known = {name: engine.module for name, engine in optimized.engines.items()}
    if all(known.get(name) is module for name, module, _ in components):
        return
    for name, module, profile in components:
        if known.get(name) is not module:
            engine = module.__dict__.get("forward")
            if not isinstance(engine, Engine):
                engine = Engine(module, optimized.config, profile).install()
                optimized.undo.append(functools.partial(_remove, weakref.ref(engine)))
            optimized.engines[name] = engine
    if optimized.config.check_numerics:
        _observe(optimized, pipe)


def _remove(engine: weakref.ref[Engine]) -> None:
    """Weak, so that a pipeline does not keep a component alive that it no longer has."""
    if (found := engine()) is not None:
        found.remove()


def _components(pipe: Any, optimized: Optimized) -> Iterator[tuple[str, nn.Module, Profile]]:
    schedules = functools.partial(_schedules, optimized.twins, optimized.schedulers)
    profile_of: dict[str, Callable[[], Profile]] = {
        "text_encoder": profiles.text_encoder,
        "text_encoder_2": lambda: profiles.text_encoder("text_encoder_2"),
        "text_encoder_3": lambda: profiles.text_encoder("text_encoder_3"),
        "image_encoder": profiles.image_encoder,
        "unet": lambda: profiles.unet(schedules, pipe.unet),
        "transformer": profiles.transformer,
    }
    for name, profile in profile_of.items():
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            yield name, module, profile()
    for name, net in _controlnets(getattr(pipe, "controlnet", None)):
        yield name, net, profiles.controlnet(name, schedules)
    vae: Any = getattr(pipe, "vae", None)
    if isinstance(getattr(vae, "decoder", None), nn.Module):
        yield "vae.decoder", vae.decoder, profiles.vae_decoder()
    if isinstance(getattr(vae, "encoder", None), nn.Module):
        yield "vae.encoder", vae.encoder, profiles.vae_encoder()


def _controlnets(controlnet: Any) -> list[tuple[str, nn.Module]]:
    """Several ControlNets are one module to diffusers; its parts are called one by one."""
    if isinstance(nets := getattr(controlnet, "nets", None), nn.ModuleList):
        return [(f"controlnet.{i}", net) for i, net in enumerate(nets)]
    return [("controlnet", controlnet)] if isinstance(controlnet, nn.Module) else []


def _schedules(twins: weakref.WeakSet[Any], schedulers: weakref.WeakSet[Any]) -> list[torch.Tensor]:
    """The timesteps of every pipeline that shares the UNet: each may have a scheduler of its own."""
    schedulers.update(pipe.scheduler for pipe in twins)
    found = (getattr(scheduler, "timesteps", None) for scheduler in schedulers)
    return [timesteps for timesteps in found if isinstance(timesteps, torch.Tensor)]


def _observe(optimized: Optimized, pipe: Any) -> None:
    for name in DENOISERS & optimized.engines.keys():
        optimized.engines[name].observe = optimized.guard.watch
    if "vae.decoder" in optimized.engines:
        optimized.engines["vae.decoder"].observe = functools.partial(optimized.guard.decoded, pipe.vae.decoder)


# ---- the wrapped methods -------------------------------------------------------------------------------------------


def _wrap_methods(pipe: Any, optimized: Optimized) -> None:
    guard = optimized.guard
    _wrap(pipe, "check_inputs", functools.partial(_checked, pipe, optimized), optimized)
    _wrap(pipe, "encode_prompt", functools.partial(_with_clip_skip, pipe), optimized)
    for name in ("fuse_lora", "unfuse_lora"):
        _wrap(pipe, name, functools.partial(_rebound, pipe), optimized)
    if hasattr(pipe, "image_processor"):
        _wrap(pipe.image_processor, "postprocess", functools.partial(_postprocessed, guard), optimized)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any], optimized: Optimized) -> None:
    original = getattr(owner, name, None)
    if original is None:
        return
    had = name in owner.__dict__
    owner.__dict__[name] = _Wrapped(owner, name, original, wrapper)

    def undo() -> None:
        if had:
            owner.__dict__[name] = original
        else:
            owner.__dict__.pop(name, None)

    optimized.undo.append(undo)


class _Wrapped:
    """A method of one object with ours around it.  Copies of the object get the method of their class."""

    def __init__(self, owner: Any, name: str, original: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._owner, self._name, self._original, self._wrapper = owner, name, original, wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


def _checked(pipe: Any, optimized: Optimized, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """diffusers' own checks, with our errors in front: they name the nearest size that can be drawn."""
    _check_offloading(pipe)
    optimized.guard.reset()
    _install(pipe, optimized)
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    if "unet" in optimized.engines:
        _check_scheduler(pipe)
    if "unet" in optimized.engines and "set_timesteps" not in pipe.scheduler.__dict__:  # it may have been exchanged
        _wrap(pipe.scheduler, "set_timesteps", _on_the_host, optimized)
    _check_pictures(pipe, inspect.signature(original).parameters, given)
    for axis in ("height", "width"):
        size = given.get(axis)
        if size is not None and (not isinstance(size, Integral) or size % 8 or size < 0):  # 0 means the default
            near = max(8, round(float(size) / 8) * 8) if isinstance(size, Real) else 512
            raise SizeError(f"{axis} {size!r} is not a positive multiple of 8. The nearest is {near}.")
    gather_parameters(optimized.engines.values())
    try:
        return original(*args, **kwargs)
    except AllaprimaError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _check_scheduler(pipe: Any) -> None:
    missing = [n for n in ("set_timesteps", "scale_model_input", "init_noise_sigma") if not hasattr(pipe.scheduler, n)]
    if missing:
        raise SchedulerError(
            f"{type(pipe.scheduler).__name__} does not fit {type(pipe).__name__}: it has no {', '.join(missing)}. "
            f"Fitting ones: {', '.join(SCHEDULERS)} (allaprima.pipelines.set_scheduler)."
        )


def _check_pictures(pipe: Any, parameters: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    unet = getattr(pipe, "unet", None)
    adapted = unet is not None and getattr(unet.config, "encoder_hid_dim_type", None) == "ip_image_proj"
    names = ("ip_adapter_image", "ip_adapter_image_embeds")
    if adapted and names[0] in parameters and all(given.get(name) is None for name in names):
        raise InputError(
            "the pipeline carries an IP-Adapter and got no picture for it. Give ip_adapter_image or "
            "ip_adapter_image_embeds, or take the adapter out with pipe.unload_ip_adapter()."
        )


def _check_offloading(pipe: Any) -> None:
    """Offloading takes the weights away after each call, while engines keep theirs at their addresses.

    accelerate hooks a part as a whole too, whatever it hooks inside.  A hook of somebody else's inside makes the part
    run eagerly.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    hooked = [name for name, module in modules.items() if module.__dict__.get("_hf_hook") is not None]
    if hooked:
        raise ConfigError(
            f"{', '.join(hooked)} of this pipeline: the weights are offloaded (enable_model_cpu_offload, "
            "enable_sequential_cpu_offload or device_map), and an optimized pipeline keeps them on one device. Call "
            "pipe.remove_all_hooks() and pipe.to(device); to save memory, pipe.vae.enable_tiling()."
        )


def _rebound(pipe: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT writes a fused adapter through `.data`, and once it is unloaded nothing tells of it."""
    try:
        return original(*args, **kwargs)
    finally:
        rebind(pipe)


def _with_clip_skip(pipe: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`encode_prompt` with a clip_skip that works: diffusers 0.42 reads `text_encoder.text_model.final_layer_norm`,
    which transformers 5.6 renamed, and which BERT never had.  The old name stands only during this call, because
    diffusers' LoRA loader takes it for a sign of the old layout."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    encoder = pipe.text_encoder
    reads_no_norm = hasattr(pipe, "text_encoder_2")  # these pipelines take hidden states as they are
    if given.get("clip_skip") is None or encoder is None or reads_no_norm or hasattr(encoder, "text_model"):
        return original(*args, **kwargs)
    norm = getattr(encoder, "final_layer_norm", None) or nn.Identity()
    encoder.__dict__["text_model"] = SimpleNamespace(final_layer_norm=norm)
    try:
        return original(*args, **kwargs)
    finally:
        del encoder.__dict__["text_model"]


def _on_the_host(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`set_timesteps` that leaves the timesteps on the host: schedulers look at them one by one at every step, and a
    look at a number on a GPU makes the host wait for everything before it."""
    given = inspect.signature(original).bind(*args, **kwargs)
    if torch.device(given.arguments.get("device") or "cpu").type == "cuda":
        given.arguments["device"] = "cpu"
    return original(*given.args, **given.kwargs)


def _postprocessed(guard: NumericsGuard, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    guard.check()
    return original(*args, **kwargs)
