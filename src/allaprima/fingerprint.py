"""Noticing that a module changed: its mathematics (structure) and its numbers (weights).

`structure_key` names the mathematics: a captured graph is found again under it, on disk too.  The two watches answer
"has anything changed since?" at every engine call, in about a millisecond for SD1.5.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from operator import is_
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MODULE_STATE = {
    name for name in nn.Module().__dict__ if name != "training"
}  # parameters, buffers, hooks: looked at one by one below
_BOOKKEEPING = {
    "_name_or_path", "name_or_path", "_use_default_values", "_diffusers_version", "transformers_version",
    "architectures", "torch_dtype", "dtype",
}  # fmt: skip
"""Entries of configurations that say where a model came from; the parameters' dtypes are part of the key anyway."""
_IGNORED = _MODULE_STATE | _BOOKKEEPING | {"forward", "_output_capturing_hooks_installed", "_hf_hook", "_old_forward"}


def structure_key(module: nn.Module) -> str:
    """Digest of all that decides the module's mathematics: classes, configuration, attributes, processors, names,
    shapes and dtypes of parameters, train mode.  The weights' values are no part of it."""
    digest = hashlib.sha256()
    for name, part in module.named_modules(remove_duplicate=False):
        digest.update(json.dumps([name, _class(part), *_attributes(part)], default=str).encode())
        for kind in (part._parameters, part._buffers):
            for key, tensor in kind.items():
                shape = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))
                digest.update(f"{key}:{shape};".encode())
    return digest.hexdigest()


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(part.__dict__.items()):
        # An attribute that is None counts as absent: diffusers' disable_freeu leaves None behind.
        if name not in _IGNORED and value is not None:
            yield name, _describe(value)


def _describe(value: Any, depth: int = 0) -> Any:
    """A stable text of an attribute; objects by their class and what they hold, one level deep."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    if isinstance(value, type | FunctionType | MethodType):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_diff_dict"):  # a configuration of transformers
        return {k: str(v) for k, v in sorted(value.to_dict().items()) if k not in _IGNORED}
    if depth > 2 or isinstance(value, nn.Module):
        return _class(value)
    if isinstance(value, dict):
        return {str(k): _describe(v, depth + 1) for k, v in value.items() if k not in _IGNORED}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _describe(v, depth + 1) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    return [_class(value), _describe(getattr(value, "__dict__", {}), depth + 1)]


class StructureWatch:
    """Remembers a module's parts and their attributes by identity."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = list(module.modules())
        inner = [p for p in self.parts if p is not module]
        processors = [p.__dict__["processor"] for p in inner if hasattr(p.__dict__.get("processor"), "__dict__")]
        self._dicts = [d for p in self.parts for d in (p.__dict__, p._modules)] + [p.__dict__ for p in processors]
        # The values are kept alive, so that a new object can never stand at an old one's address.
        self._values = self._read()
        self._hooks = [h for p in inner for h in (p._forward_hooks, p._forward_pre_hooks)]
        self._inner = inner
        self._accelerated = next((type(p).__name__ for p in inner if "_hf_hook" in p.__dict__), None)

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def unchanged(self) -> bool:
        return _identical(self._read(), self._values)

    def hooked(self) -> str | None:
        """Which inner part has a forward hook, which an engine would bypass."""
        if self._accelerated:
            return f"{self._accelerated} (accelerate)"
        if not any(self._hooks):
            return None
        return next((type(p).__name__ for p in self._inner if not _only_recorders(p)), None)


def _identical(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _only_recorders(part: nn.Module) -> bool:
    """transformers leaves hooks behind that record hidden states for `output_hidden_states`; the captured graph returns
    those states itself."""
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return all(getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing") for hook in hooks)


class WeightsWatch:
    """Remembers which tensors a module's parameters and buffers are, and their versions.

    Writes through `.data` change no version: `rebind` is for those.
    """

    def __init__(self, module: nn.Module) -> None:
        self._holders: list[dict[str, Any]] = [d for p in module.modules() for d in (p._parameters, p._buffers)]
        # The tensors themselves are kept, so that a new one can never stand at an old one's address.
        self._held = self._read()
        tensors = [t for t in self._held if t is not None]
        self._versioned = [t for t in tensors if not t.is_inference()]
        self._tensors = tensors
        self._state = self._look()

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _look(self) -> tuple[list[int], list[int]]:
        # `module.to(...)` keeps a parameter and its version, and gives it other storage.
        return [t._version for t in self._versioned], [t.data_ptr() for t in self._tensors]

    def unchanged(self) -> bool:
        return _identical(self._read(), self._held) and self._look() == self._state


def adapters(module: nn.Module) -> list[str]:
    """Names of PEFT adapters in the module, active or not; empty without PEFT."""
    found: set[str] = set()
    for part in module.modules():
        scaling = part.__dict__.get("scaling")
        if isinstance(scaling, dict) and hasattr(part, "merged_adapters"):
            found.update(map(str, scaling))
    return sorted(found)
