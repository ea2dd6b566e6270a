"""LoRAs of a pipeline, straight from the file to the parameters: `ap.loras(pipe, {"watercolor": 0.8})`.

It works on any diffusers pipeline, optimized or not, and what it did survives `optimize` and `restore`: the numbers
are in the parameters, and their untouched ones are kept with the modules (weights/loras.py).
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from .errors import AdapterError
from .pipelines import engines
from .weights import lora_files
from .weights.deltas import Delta
from .weights.lora_formats import Adapter, Layer
from .weights.lora_names import DENOISERS, Names, Place, modules_by_path
from .weights.loras import Terms, merged

Weight: TypeAlias = float | Mapping[str, float]
"""A number, or one for each component: {"unet": 0.8, "text_encoder": 0.5}."""

_LOCK = threading.RLock()

MOST_TOLD = 20
"""Unused keys that a warning names; the result has them all."""


@dataclass(frozen=True)
class Lora:
    """One adapter in a pipeline.

    weights  strength in each component that it changes
    applied  the file's keys that are in use
    unused   each other key, and what comes nearest to it or why it has no place
    """

    name: str
    path: Path
    weights: Mapping[str, float]
    applied: tuple[str, ...]
    unused: Mapping[str, str]


class Loras(dict[str, Lora]):
    """The adapters in a pipeline by name.

    overwritten  parameters that somebody else wrote since, so that they have lost their adapters
    """

    overwritten: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{lora.name}: {_told(lora.weights)}; {len(lora.applied)} keys" for lora in self.values()]
        lines += [f"  unused: {key} ({why})" for lora in self.values() for key, why in lora.unused.items()]
        lines += [f"overwritten since: {name}" for name in self.overwritten]
        return "\n".join(lines) or "no LoRAs"


@dataclass
class Fitted:
    """An adapter and where each of its changes goes.

    changes  component -> (parameter, change)
    """

    name: str
    path: Path
    adapter: Adapter
    changes: dict[str, list[tuple[nn.Parameter, Delta]]] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)


def loras(
    pipe: Any,
    weights: Mapping[str, Weight] | None = None,
    *,
    lora_dir: str | Path | Iterable[str | Path] | None = None,
) -> Loras:
    """Let a pipeline have exactly these LoRAs; `loras(pipe, {})` removes all, `loras(pipe)` tells what is there.

    pipe      a diffusers pipeline, optimized or not
    weights   name -> strength (any finite number, or one for each component; what is not named there has 1).  A name
              is an embedded LoRA's, a .safetensors file's or a file's in `lora_dir`, there without .safetensors
    lora_dir  folders to look in, with all below them; default $ALLAPRIMA_LORAS
    returns   what is applied, and every key of every file that is not, with the nearest name
    raises    AdapterError for unknown names, strengths that are no numbers, and files that do not fit; CheckpointError
              for truncated ones.  Nothing is changed then
    warns     of unused keys, when a LoRA comes in
    """
    parts = _components(pipe)
    if weights is None:
        found = _present(parts)
        found.overwritten = tuple(_overwritten(parts))
        return found
    if not isinstance(weights, Mapping):
        raise AdapterError(f"loras() takes names and their weights, such as {{'watercolor': 0.8}}, not {weights!r}.")
    places = lora_files.folders(lora_dir)
    strengths = {str(name): _strengths(name, weight, parts) for name, weight in weights.items()}
    names = Names(parts)
    modules = {component: modules_by_path(module) for component, module in parts.items()}
    known = _present(parts)
    fitted = []
    for name in strengths:
        path = known[name].path if name in known and _still_there(known[name].path, places) else None
        path = path or lora_files.find(name, places)
        fitted.append(_fit(name, path, lora_files.read(path), names, modules))
    _write(pipe, parts, fitted, strengths)
    for one in fitted:
        if one.unused and not (one.name in known and known[one.name].path == one.path):
            warnings.warn(_unused_text(one), UserWarning, stacklevel=2)
    return _present(parts)


def reapply(pipe: Any) -> None:
    """Merge what is applied into the parameters that somebody else wrote since, as after a switch of checkpoints."""
    parts = _components(pipe)
    found: dict[str, tuple[Lora, Adapter]] = {}
    strengths: dict[str, dict[str, float]] = {}
    for component, module in parts.items():
        for name, entry in merged(module).active.items():
            found[name] = entry
            strengths.setdefault(name, {})[component] = entry[0].weights[component]
    names = Names(parts)
    modules = {component: modules_by_path(module) for component, module in parts.items()}
    fitted = [_fit(name, lora.path, adapter, names, modules) for name, (lora, adapter) in found.items()]
    _write(pipe, parts, fitted, strengths)


def _still_there(path: Path, places: Sequence[Path]) -> bool:
    """Whether a name that lies in one of the folders means the same file as before: they are not searched again."""
    return any(path.is_relative_to(place) for place in places) and path.is_file()


# ---- what is asked -------------------------------------------------------------------------------------------------


def _components(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline that LoRAs change: denoisers and text encoders."""
    parts = getattr(pipe, "components", None)
    if not isinstance(parts, Mapping):
        raise AdapterError(f"loras() takes a diffusers pipeline, not a {type(pipe).__name__}.")
    wanted = (*DENOISERS, "text_encoder")
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name.startswith(wanted)}


def _strengths(name: str, weight: Weight, parts: Iterable[str]) -> dict[str, float]:
    """The strength in each component.  "text_encoder" stands for all of them, "unet" for a transformer, too."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys(parts, _strength(name, weight))
    given = {component: _strength(name, value) for component, value in weight.items()}
    found = {}
    for component in parts:
        stand_in = "unet" if component.startswith(DENOISERS) else "text_encoder"
        found[component] = given.get(component, given.get(stand_in, 1.0))
    if unknown := set(given) - set(found) - {"unet", "text_encoder"}:
        raise AdapterError(
            f"LoRA {name!r}: a weight for {', '.join(sorted(unknown))}; this pipeline has {', '.join(found)}."
        )
    return found


def _strength(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise AdapterError(f"LoRA {name!r}: the weight {value!r} is no finite number. Give one such as 0.8 or -0.3.")
    return float(value)


# ---- where it goes -------------------------------------------------------------------------------------------------


def _fit(
    name: str, path: Path, adapter: Adapter, names: Names, modules: Mapping[str, Mapping[str, nn.Module]]
) -> Fitted:
    """Find a parameter for every change of an adapter.

    raises   AdapterError where nothing has a place, where a shape differs, and for parameters that cannot be changed
    """
    fitted = Fitted(name, path, adapter)
    seen: dict[Place, str] = {}
    for layer in adapter.layers:
        place = names.find(layer.name)
        if place is None or place in seen:
            why = f"names the same module as {seen[place]}" if place else _nearest(layer.name, names)
            fitted.unused |= dict.fromkeys(layer.keys, why)
            continue
        seen[place] = layer.name
        module = modules[place.component][place.path]
        _check_place(name, place, modules[place.component])
        for kind, changes in (("weight", layer.weight), ("bias", layer.bias)):
            _fit_kind(fitted, layer, place, module, kind, changes)
        fitted.applied += [key for key in layer.keys if key not in fitted.unused]
    fitted.unused |= {key: _nearest(key, names) for key in adapter.unused}
    if not any(fitted.changes.values()):
        raise AdapterError(_nothing_text(fitted))
    return fitted


def _fit_kind(
    fitted: Fitted, layer: Layer, place: Place, module: nn.Module, kind: str, changes: Sequence[Delta]
) -> None:
    parameter = getattr(module, kind, None)
    if not changes:
        return
    if not isinstance(parameter, nn.Parameter):
        keys = [key for key in layer.keys if kind in ("weight", _kind_of(key))]
        fitted.unused |= dict.fromkeys(keys, f"{place} has no {kind}")
        return
    _check_parameter(fitted.name, f"{place}.{kind}", parameter)
    for change in changes:
        if not change.fits(parameter.shape):
            raise AdapterError(
                f"LoRA {fitted.name!r} does not fit: {' and '.join(layer.keys[:3])} change a {kind} of "
                f"{list(change.shape)}, {place}.{kind} is {list(parameter.shape)}.{_meant_for(fitted.adapter)}"
            )
        fitted.changes.setdefault(place.component, []).append((parameter, change))


def _kind_of(key: str) -> str:
    return "bias" if key.endswith(("bias", "diff_b", "b_norm")) else "weight"


def _check_place(name: str, place: Place, modules: Mapping[str, nn.Module]) -> None:
    """raises AdapterError where the module's weight is not what is computed with."""
    outer, _, last = place.path.rpartition(".")
    parent = modules.get(outer)
    if last.startswith("to_") and getattr(parent, "fused_projections", False):
        raise AdapterError(
            f"LoRA {name!r} changes {place}, which fuse_qkv_projections() has replaced. "
            "Call pipe.unfuse_qkv_projections() first."
        )
    wrapper = getattr(parent, last, None) if parent is not None else None
    if fused := getattr(wrapper, "merged_adapters", None):
        raise AdapterError(
            f"LoRA {name!r} changes {place}, where diffusers has fused {', '.join(map(str, fused))}: the numbers "
            "without it are not known. Call pipe.unfuse_lora() first."
        )


def _check_parameter(name: str, place: str, parameter: nn.Parameter) -> None:
    if parameter.device.type == "meta":
        raise AdapterError(f"LoRA {name!r}: {place} has no memory now (offloaded). Apply LoRAs before offloading.")
    if not parameter.is_floating_point() or type(parameter.data) is not torch.Tensor:
        kind = type(parameter.data).__name__ if parameter.is_floating_point() else parameter.dtype
        raise AdapterError(f"LoRA {name!r}: {place} is quantized ({kind}); LoRAs go into plain weights only.")


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(
    pipe: Any,
    parts: Mapping[str, nn.Module],
    fitted: Sequence[Fitted],
    strengths: Mapping[str, Mapping[str, float]],
) -> None:
    """Merge into all components, or, where that fails (memory), into none."""
    holders = {component: merged(module) for component, module in parts.items()}
    with resting(pipe):
        before = {component: holder.terms for component, holder in holders.items()}
        try:
            for component, holder in holders.items():
                holder.write(_terms(fitted, component, strengths))
        except BaseException:
            with suppress(RuntimeError, MemoryError):
                for component, holder in holders.items():
                    holder.write(before[component])
            raise
    for component, holder in holders.items():
        here = [one for one in fitted if component in one.changes]
        holder.active = {one.name: (_report(one, strengths[one.name]), one.adapter) for one in here}


def _terms(
    fitted: Sequence[Fitted], component: str, strengths: Mapping[str, Mapping[str, float]]
) -> list[tuple[nn.Parameter, Terms]]:
    """All changes of each parameter of a component, in the order in which the adapters were given."""
    found: dict[int, tuple[nn.Parameter, Terms]] = {}
    for one in fitted:
        strength = strengths[one.name].get(component, 0.0)
        for parameter, change in one.changes.get(component, ()) if strength else ():
            earlier = found.get(id(parameter), (parameter, ()))[1]
            found[id(parameter)] = (parameter, (*earlier, (change, strength)))
    return list(found.values())


@contextmanager
def resting(pipe: Any) -> Iterator[None]:
    """Within this context no engine of the pipeline runs, and those whose weights carry no versions look again."""
    found = list(engines(pipe).values())
    with ExitStack() as held:
        for engine in found:
            held.enter_context(engine._lock)
        held.enter_context(_LOCK)  # last: whoever holds engines may ask for it
        try:
            yield
        finally:
            for engine in found:
                if any(parameter.is_inference() for parameter in engine.module.parameters()):
                    engine.rebind()


# ---- what is told --------------------------------------------------------------------------------------------------


def _report(one: Fitted, strengths: Mapping[str, float]) -> Lora:
    weights = {component: strengths.get(component, 0.0) for component in one.changes}
    return Lora(one.name, one.path, weights, tuple(one.applied), dict(one.unused))


def _present(parts: Mapping[str, nn.Module]) -> Loras:
    """What the modules hold: a component that the user exchanged since is no part of it."""
    found = Loras()
    for component, module in parts.items():
        for name, (lora, _) in merged(module).active.items():
            here = dict(found[name].weights) if name in found else {}
            weights = here | {component: lora.weights[component]}
            found[name] = Lora(name, lora.path, weights, lora.applied, lora.unused)
    return found


def _overwritten(parts: Mapping[str, nn.Module]) -> Iterator[str]:
    for component, module in parts.items():
        lost = {id(parameter) for parameter in merged(module).overwritten()}
        yield from (f"{component}.{path}" for path, p in module.named_parameters() if id(p) in lost)


def _nearest(name: str, names: Names) -> str:
    if missing := names.missing_component(name):
        return f"this pipeline has no {missing}"
    near = names.nearest(name)
    return f"nearest is {near}" if near else "nothing is like it"


def _unused_text(one: Fitted) -> str:
    told = [f"{key} ({why})" for key, why in list(one.unused.items())[:MOST_TOLD]]
    more = f" and {len(one.unused) - MOST_TOLD} more" if len(one.unused) > MOST_TOLD else ""
    total = len(one.unused) + len(one.applied)
    return f"LoRA {one.name!r}: {len(one.unused)} of {total} keys are not used: {', '.join(told)}{more}."


def _nothing_text(one: Fitted) -> str:
    told = [f"{key} ({why})" for key, why in list(one.unused.items())[:3]]
    return (
        f"LoRA {one.name!r} fits nothing in this pipeline: none of its {len(one.unused)} keys has a place, for example "
        f"{', '.join(told)}.{_meant_for(one.adapter)}"
    )


def _meant_for(adapter: Adapter) -> str:
    return f" It seems to be for {adapter.architecture}." if adapter.architecture else ""


def _told(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{component} {weight:g}" for component, weight in weights.items()) or "weight 0"
