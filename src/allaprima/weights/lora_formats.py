"""What the tensors of an adapter's file are: diffusers', PEFT's, kohya's and LyCORIS' ways of writing changes.

The format is told by the ends of the keys: `unet.….to_q.lora_A.weight` is the part "down" of the layer `unet.….to_q`.
Nothing here knows a model; lora_names.py knows which module a layer's name means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import AdapterError
from .deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Scaled

ENDS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "core",
    "lora_A.weight": "down", "lora_B.weight": "up",
    "lora_B.bias": "up_bias", "lora_up.bias": "up_bias",
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "down.weight": "down", "up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    **{name: name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
    "diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b",
    "weight": "factor", "on_input": "on_input",
}  # fmt: skip
"""How a key ends -> which part of a layer's change it holds."""

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration in the header of a file."""


@dataclass(frozen=True)
class Layer:
    """One module's changes.

    name    as the file has it
    keys    that were read
    weight, bias   the changes of either
    """

    name: str
    keys: tuple[str, ...]
    weight: tuple[Delta, ...] = ()
    bias: tuple[Delta, ...] = ()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A file, understood.

    unused        keys that belong to no known format
    architecture  of the model that it seems to be for, in words, or None
    """

    name: str
    layers: tuple[Layer, ...]
    unused: tuple[str, ...]
    architecture: str | None = None
    nbytes: int = 0


@dataclass
class Scaling:
    """PEFT's alpha and rank rules, where they are not in the tensors.

    settings   of each component: `lora_alpha`, `alpha_pattern`, `use_rslora`; "" stands for all components
    """

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)

    def of(self, layer: str, rank: int, alpha: float | None) -> float:
        """What a product of this rank is multiplied by: alpha / rank, of rank-stabilised ones alpha / √rank."""
        component = layer.partition(".")[0]
        settings = self.settings.get(component) or self.settings.get("") or {}
        if alpha is None:
            alpha = self._alpha(settings, layer)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _alpha(self, settings: Mapping[str, Any], layer: str) -> float | None:
        patterns = settings.get("alpha_pattern") or {}
        for path in patterns:  # paths, or ends of them; PEFT allows regular expressions, which no file has
            if layer == path or layer.endswith(f".{path}"):
                self.matched.add(path)
                return float(patterns[path])
        alpha = settings.get("lora_alpha")
        return None if alpha is None else float(alpha)

    def unmatched(self) -> list[str]:
        patterns = {path for settings in self.settings.values() for path in settings.get("alpha_pattern") or {}}
        return [f"alpha_pattern: {path}" for path in sorted(patterns - self.matched)]


def understand(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Group the tensors of a file by layer, and see what each group is.

    metadata   of the file's header
    config     what PEFT's adapter_config.json beside it says
    raises     AdapterError for factors that do not belong together, NaN and Inf
    """
    groups: dict[str, dict[str, str]] = {}
    unused: list[str] = []
    for key in tensors:
        layer, part = split(key)
        if part is None or part in groups.setdefault(layer, {}):
            unused.append(key)
        else:
            groups[layer][part] = key
    scaling = Scaling(_settings(metadata, config, name))
    layers = []
    for layer, keys in groups.items():
        found = _layer(layer, keys, tensors, scaling)
        layers.append(found)
        unused += [key for key in keys.values() if key not in found.keys]
    layers = [layer for layer in layers if layer.keys]
    _check_numbers(name, tensors, layers)
    return Adapter(
        name,
        tuple(layers),
        (*unused, *scaling.unmatched()),
        _architecture(tensors, metadata),
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def split(key: str) -> tuple[str, str | None]:
    """ "unet.conv_in.lora_A.weight" -> ("unet.conv_in", "down"); the part is None where the end is not known."""
    pieces = key.split(".")
    if len(pieces) > 3 and pieces[-3] in ("lora_A", "lora_B", "lora_magnitude_vector"):
        del pieces[-2]  # PEFT's name of the adapter
    for size in (3, 2, 1):
        if len(pieces) > size and (part := ENDS.get(".".join(pieces[-size:]))):
            return ".".join(pieces[:-size]), part
    return key, None


def _layer(name: str, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor], scaling: Scaling) -> Layer:
    """The changes in one group.  A key that is part of none is left out of the layer's keys."""
    parts = _Parts({part: tensors[key] for part, key in keys.items()}, name, keys)
    alpha = float(tensors[keys["alpha"]].reshape(-1)[0]) if "alpha" in keys else None
    weight: list[Delta] = []
    bias: list[Delta] = []
    for kind in (_low_rank, _hadamard, _kronecker):
        weight += kind(parts, lambda rank: scaling.of(name, rank, alpha))
    if weight:
        parts.used.add("alpha")
        if parts.has("up_bias") and isinstance(weight[0], LowRank):
            bias.append(LowRank(torch.ones(1, 1), parts.take("up_bias").reshape(-1, 1), weight[0].scale))
        weight = [_decomposed(change, parts) for change in weight]
    if parts.has("diff"):
        weight.append(Full(parts.take("diff")))
    if parts.has("diff_b"):
        bias.append(Full(parts.take("diff_b")))
    if parts.has("factor", "on_input"):
        weight.append(Scaled(parts.take("factor"), axis=int(bool(parts.take("on_input").any()))))
    return Layer(name, tuple(key for part, key in keys.items() if part in parts.used), tuple(weight), tuple(bias))


class _Parts:
    """A layer's tensors, and which of them were used."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], layer: str, keys: Mapping[str, str]) -> None:
        self._tensors, self._layer, self._keys = tensors, layer, keys
        self.used: set[str] = set()

    def has(self, *names: str) -> bool:
        return all(name in self._tensors for name in names)

    def take(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self._tensors[name]

    def check(self, one: str, other: str, same: bool) -> None:
        """raises AdapterError where two factors cannot be multiplied."""
        if not same:
            told = (f"{self._keys[name]} is {list(self._tensors[name].shape)}" for name in (one, other))
            raise AdapterError(f"{' and '.join(told)}: these do not belong together. The file is broken.")


def _low_rank(parts: _Parts, scale: Any) -> Iterable[Delta]:
    if not parts.has("down", "up"):
        return
    down, up = parts.take("down"), parts.take("up")
    core = parts.take("core") if parts.has("core") else None
    rank = down.shape[0]
    parts.check("down", "up", down.dim() > 1 and up.dim() > 1 and up[0].numel() == rank)
    if core is not None:
        parts.check("core", "down", core.dim() > 2 and core.shape[:2] == (up.shape[1], rank))
        parts.check("down", "core", down[0].numel() == down.shape[1])
    yield LowRank(down, up, scale(rank), core)


def _hadamard(parts: _Parts, scale: Any) -> Iterable[Delta]:
    if not parts.has("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        return
    cored = parts.has("hada_t1", "hada_t2")
    for side in "12":
        a, b = parts.take(f"hada_w{side}_a"), parts.take(f"hada_w{side}_b")
        parts.check(f"hada_w{side}_a", f"hada_w{side}_b", a.shape[0 if cored else 1] == b.shape[0])
        if cored:
            core = parts.take(f"hada_t{side}")
            parts.check(f"hada_t{side}", f"hada_w{side}_b", core.dim() > 2 and core.shape[:2] == (b.shape[0],) * 2)
    one, other = (parts.take(f"hada_w{side}_b") for side in "12")
    parts.check("hada_w1_b", "hada_w2_b", one[0].numel() == other[0].numel())
    cores = [parts.take(f"hada_t{side}") if cored else None for side in "12"]
    a1, a2 = (parts.take(f"hada_w{side}_a") for side in "12")
    yield Hadamard(a1, one, a2, other, scale(one.shape[0]), *cores)


def _kronecker(parts: _Parts, scale: Any) -> Iterable[Delta]:
    if not all(parts.has(side) or parts.has(f"{side}_a", f"{side}_b") for side in ("lokr_w1", "lokr_w2")):
        return
    sides: list[tuple[torch.Tensor, ...]] = []
    rank = 0
    cored = parts.has("lokr_t2")
    for side in ("lokr_w1", "lokr_w2"):
        a, b = f"{side}_a", f"{side}_b"
        if parts.has(side):
            sides.append((parts.take(side),))
        else:
            sides.append((parts.take(a), parts.take(b)))
            rank = sides[-1][1].shape[0]
            axis = 0 if cored and side == "lokr_w2" else 1
            parts.check(a, b, sides[-1][0].shape[axis] == rank)
    core = parts.take("lokr_t2") if cored and len(sides[1]) == 2 else None
    # Two whole factors have no rank, and what is written as their alpha means nothing.
    yield Kronecker(sides[0], sides[1], scale(rank) if rank else 1.0, core)


def _decomposed(change: Delta, parts: _Parts) -> Delta:
    if parts.has("magnitude"):
        return Decomposed(change, parts.take("magnitude"), axis=0)
    if parts.has("dora_scale"):
        magnitude = parts.take("dora_scale")
        by_column = magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
        return Decomposed(change, magnitude, axis=int(by_column))
    return change


def _settings(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None, name: str
) -> Mapping[str, Mapping[str, Any]]:
    """PEFT's settings of each component, from the file's header or the file beside it."""
    if config is not None:
        return {"": config}
    try:
        entries = json.loads(metadata.get(METADATA_KEY, "{}"))
        found: dict[str, dict[str, Any]] = {}
        for entry, value in entries.items():
            component, _, setting = entry.rpartition(".")
            found.setdefault(component, {})[setting] = value
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"LoRA {name!r}: {METADATA_KEY} in its header is not understood ({error}).") from error
    return found


def _check_numbers(name: str, tensors: Mapping[str, torch.Tensor], layers: Iterable[Layer]) -> None:
    """A sum shows NaN and Inf, and is quicker than asking each number."""
    for layer in layers:
        for key in layer.keys:
            if tensors[key].is_floating_point() and not math.isfinite(tensors[key].sum(dtype=torch.float32)):
                raise AdapterError(f"LoRA {name!r}: {key} holds NaN or Inf. The file is broken.")


_BY_CONTEXT = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


def _architecture(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str | None:
    """From what trainers write down, or from the width of the text that cross-attention reads."""
    if told := metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version"):
        return told
    if any("single_transformer_blocks" in key or "single_blocks" in key for key in tensors):
        return "Flux"
    if any("joint_blocks" in key for key in tensors):
        return "SD 3"
    for key, tensor in tensors.items():
        layer, part = split(key)
        if part == "down" and layer.endswith(("attn2_to_k", "attn2.to_k")) and tensor.dim() > 1:
            return _BY_CONTEXT.get(tensor.shape[1])
    return "SDXL" if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in tensors) else None
