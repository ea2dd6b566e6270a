"""The one file that knows PEFT's layers: adapters that diffusers, transformers or the user put into a module.

PEFT replaces a layer by a *tuner layer*, which holds the layer as its base, the adapters, and which of them are active
at what scale.  The engine looks through them: it captures the module as if the base layers stood in their places
(`peeled`), and gives the program the weights that base and adapters amount to (`merged`).  An adapter is data.
"""

from __future__ import annotations

import copy
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BOOKKEEPING = frozenset({"peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing"})
"""What adapters leave in the attributes of a module, without effect on what it computes."""


def is_tuner(part: nn.Module) -> bool:
    return isinstance(part, _tuner_class()) and isinstance(getattr(part, "base_layer", None), nn.Module)


def _tuner_class() -> Any:
    """PEFT's class of all tuner layers; where nobody imported PEFT, nothing is one."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return getattr(peft, "BaseTunerLayer", ())


@contextmanager
def peeled(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Within this context the base layers stand in the places of the tuner layers around them.

    yields  the tuner layers by the names that their base layers then have
    """
    places = list(_places(module)) if _tuner_class() else []
    for parent, key, _, tuner in places:
        parent._modules[key] = base(tuner)
    try:
        yield {name: tuner for _, _, name, tuner in places}
    finally:
        for parent, key, _, tuner in places:
            parent._modules[key] = tuner


def tuners(module: nn.Module) -> list[Any]:
    """The outermost tuner layers in a module."""
    return [tuner for *_, tuner in _places(module)] if _tuner_class() else []


def base(tuner: Any) -> Any:
    while is_tuner(tuner):
        tuner = tuner.base_layer
    return tuner


def _places(module: nn.Module) -> list[tuple[nn.Module, str, str, Any]]:
    """(parent, key, name, tuner layer) of each tuner layer that is in no other."""
    found = []
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        prefix, parent = waiting.pop()
        for key, child in parent._modules.items():
            if child is None:
                continue
            if is_tuner(child):
                found.append((parent, key, prefix + key, child))
            elif id(child) not in seen:
                seen.add(id(child))
                waiting.append((f"{prefix}{key}.", child))
    return found


class TunersWatch:
    """Remembers which adapters there are, which are active, at what scale, and which are merged into their base."""

    def __init__(self, module: nn.Module) -> None:
        self._tuners = tuners(module)
        self._held = [held for tuner in self._tuners for held in _adapter_dictionaries(tuner)]
        self.look()

    def look(self) -> None:
        self._state, self._sizes = self._switches(), self._counted()

    def _switches(self) -> tuple[list[Any], bytes]:
        switches, scales = [], []
        for tuner in self._tuners:
            held = tuner.__dict__
            merged_names = tuple(held.get("merged_adapters", ()))
            switches.append((active(tuner), merged_names, held.get("_disable_adapters")))
            scales.extend(held.get("scaling", {}).values())
        return switches, _rounded(scales)

    def _counted(self) -> list[int]:
        return [len(held) for held in self._held]

    def same_adapters(self) -> bool:
        """Whether none came and none went."""
        return self._counted() == self._sizes

    def unchanged(self) -> bool:
        return not self._tuners or (self.same_adapters() and self._switches() == self._state)


def active(tuner: Any) -> tuple[str, ...]:
    names = tuner.__dict__.get("_active_adapter", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _rounded(scales: Iterable[Any]) -> bytes:
    """Scales as float32, which is what they are applied in: diffusers multiplies them before a call and divides them
    after it, and in float64 that is not always the number it was."""
    numbers = [float(scale) for scale in scales]
    return struct.pack(f"{len(numbers)}f", *numbers)


def layers_in_force(module: nn.Module) -> dict[str, int]:
    """The adapters in a module, and how many layers each of them changes now."""
    found: dict[str, int] = {}
    for tuner in tuners(module):
        for name in tuner._get_available_adapters():
            found[name] = found.get(name, 0) + (name in in_force(tuner) or name in tuner.merged_adapters)
    return dict(sorted(found.items()))


def unmerge_what_is_off(tuner: Any) -> None:
    """What the layer's own forward would do first: adapters that were merged and then switched off leave the base."""
    if tuner.disable_adapters and tuner.merged:
        tuner.unmerge()


def in_force(tuner: Any) -> list[str]:
    """The adapters that change what the base computes: active ones that this layer has, unless they are off, or in the
    base already."""
    if tuner._disable_adapters or tuner.merged_adapters:
        return []
    return [name for name in active(tuner) if any(True for _ in _own_tensors(tuner, name))]


def state(tuner: Any, scale: float) -> tuple[Any, ...] | None:
    """All that the merged weights depend on beside the base; None where they are the base's."""
    found = in_force(tuner)
    if not found:
        return None
    scaling = tuner.__dict__.get("scaling", {})
    return (*found, _rounded([scaling.get(name, 1.0) for name in found] + [scale]), *_marks(tuner, found))


def inside(tuner: Any) -> tuple[Any, ...] | None:
    """Which adapters' changes are in the base's own numbers; None where none are.  PEFT writes them there through
    `.data`, which leaves no trace in the base."""
    names = tuple(tuner.__dict__.get("merged_adapters", ()))
    if not names:
        return None
    scaling = tuner.__dict__.get("scaling", {})
    return (*names, _rounded([scaling.get(name, 1.0) for name in names]), *_marks(tuner, names))


def _marks(tuner: Any, names: Iterable[str]) -> list[tuple[int, int]]:
    """Where the adapters' tensors lie, and their versions."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for n in names for t in _own_tensors(tuner, n)]


def _own_tensors(tuner: Any, name: str) -> Iterator[torch.Tensor]:
    for held in _adapter_dictionaries(tuner):
        part = held.get(name)
        if isinstance(part, torch.Tensor):
            yield part
        elif part is not None:
            yield from part.parameters()


def _adapter_dictionaries(tuner: Any) -> Iterator[dict[str, Any]]:
    """Parameters, or modules that hold them, by the name of their adapter."""
    for key in tuner.adapter_layer_names:
        if (part := tuner._modules.get(key)) is not None:
            yield part._modules if isinstance(part, nn.ModuleDict) else part._parameters


def merged(tuner: Any, scale: float) -> dict[str, torch.Tensor]:
    """What the base's parameters amount to under the adapters in force, computed in float32 and rounded once.

    scale    what `cross_attention_kwargs={"scale": s}` multiplies the adapters' own scales by
    returns  by the parameter's name in the base layer; those of which the adapters change nothing are left out
    raises   ValueError, with the reason, where no weights amount to the same
    """
    found = in_force(tuner)
    if reason := _unmergeable(tuner):
        raise ValueError(reason)
    if all(_is_plain(tuner, name) for name in found):
        return {"weight": _with_products(tuner, found, scale)}
    try:
        return _merged_by_peft(tuner, found, scale)
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(tuner).__name__} cannot be merged: {str(error)[:200]}") from error


def _unmergeable(tuner: Any) -> str | None:
    kind = type(tuner).__name__
    if getattr(tuner, "quantization_backend", None) is not None:
        return f"{kind} on a quantized layer"
    if any(is_tuner(part) for part in tuner.base_layer.modules()):
        return f"{kind} around another adapter's layer"
    return None


def _is_plain(tuner: Any, name: str) -> bool:
    """Whether an adapter adds B·A and no more: LoRA on a linear layer or a convolution."""
    from peft.tuners.lora import layer as lora

    if type(tuner) not in (lora.Linear, lora.Conv2d) or name in tuner.lora_variant or tuner.lora_bias.get(name):
        return False
    up = tuner.lora_B[name].weight
    pointwise = up.dim() == 2 or up.shape[2:].numel() == 1
    return pointwise and getattr(base(tuner), "groups", 1) == 1


def _with_products(tuner: Any, found: list[str], scale: float) -> torch.Tensor:
    weight: torch.Tensor = base(tuner).weight.detach()
    # A copy in any case: float() of a float32 tensor is the tensor itself.
    rows = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format).flatten(1)
    if turned := getattr(tuner, "fan_in_fan_out", False):
        rows = rows.T
    for name in found:
        down, up = (held[name].weight.detach().float().flatten(1) for held in (tuner.lora_A, tuner.lora_B))
        rows.addmm_(up.to(rows.device), down.to(rows.device), alpha=tuner.scaling[name] * scale)
    return (rows.T if turned else rows).reshape(weight.shape).to(weight.dtype)


def _merged_by_peft(tuner: Any, found: list[str], scale: float) -> dict[str, torch.Tensor]:
    """What PEFT itself merges, in a copy in float32."""
    before: Mapping[str, torch.Tensor] = dict(base(tuner).named_parameters())
    with torch.inference_mode(False), torch.no_grad():
        trial: Any = copy.deepcopy(tuner).float()
        if scale != 1.0:
            trial.scale_layer(scale)
        trial.merge(adapter_names=found)
        after = {name: new.detach().to(before[name].dtype) for name, new in base(trial).named_parameters()}
    return {name: new for name, new in after.items() if not torch.equal(new, before[name])}
