"""Noticing that a module changed: its mathematics (structure) and its numbers (weights).

`structure_key` names the mathematics: a captured graph is found again under it, on disk too.  The two watches answer
"has anything changed since?" at every engine call, in about a millisecond for SD1.5.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from .tuners import BOOKKEEPING, TunersWatch, peeled

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MODULE_STATE = {
    name for name in nn.Module().__dict__ if name != "training"
}  # parameters, buffers, hooks: looked at one by one below
_BOOKKEEPING = {
    "_name_or_path", "name_or_path", "_use_default_values", "_diffusers_version", "transformers_version",
    "architectures", "torch_dtype", "dtype", "_class_name",
}  # fmt: skip
"""Entries of configurations that say where a model came from; the parameters' dtypes are part of the key anyway."""
_ORIGIN = {"name_or_path", "_weight_conversions"}
"""Attributes in which transformers notes where and how a model was loaded."""
_REPLACED = {"forward", "_output_capturing_hooks_installed", "_hf_hook", "_old_forward"}
_IGNORED = _MODULE_STATE | _REPLACED | _ORIGIN | BOOKKEEPING
_DEFAULTS = (("_use_kernels", False),)
"""What only `from_pretrained` sets, and what it means where nothing is set."""
_VERSIONED = {"allaprima", "torch", "diffusers", "transformers", *sys.stdlib_module_names} - {"__main__"}
"""Packages whose code is known by their version, which is part of a record's name."""
_DEEP = 4


class Structure(NamedTuple):
    """What decides a module's mathematics.

    key      digest of classes and the code of their forwards, configuration, attributes, processors, names, shapes
             and dtypes of parameters, train mode.  The weights' values are no part of it, and no adapter is
    foreign  a piece of code in the module that no package's version stands for (its source may change from one process
             to the next), or None
    """

    key: str
    foreign: str | None


def structure(module: nn.Module) -> Structure:
    with peeled(module):
        return _structure(module)


def _structure(module: nn.Module) -> Structure:
    describer = _Describer()
    digest = hashlib.sha256()
    for name, part in module.named_modules(remove_duplicate=False):
        digest.update(json.dumps([name, describer.kind(part), *_attributes(part, describer)], default=str).encode())
        for kind in (part._parameters, part._buffers):
            for key, tensor in kind.items():
                shape = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))
                digest.update(f"{key}:{shape};".encode())
    for forward in dict.fromkeys(type(part).forward for part in module.modules()):
        digest.update(json.dumps(describer.function(forward), default=str).encode())
    return Structure(digest.hexdigest(), next(iter(describer.foreign), None))


def structure_key(module: nn.Module) -> str:
    return structure(module).key


def _attributes(part: nn.Module, describer: _Describer) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(part.__dict__.items()):
        # An attribute that is None counts as absent: diffusers' disable_freeu leaves None behind.
        if name not in _IGNORED and value is not None and (name, value) not in _DEFAULTS:
            yield name, describer.text(value)


class _Describer:
    """Stable texts of attributes; objects by their class and what they hold."""

    def __init__(self) -> None:
        self.foreign: dict[str, None] = {}

    def named(self, value: Any) -> str:
        """The name of a class or function."""
        name = f"{value.__module__}.{value.__qualname__}"
        if str(value.__module__ or "torch").partition(".")[0] not in _VERSIONED:
            self.foreign[name] = None
        return name

    def kind(self, value: Any) -> str:
        return self.named(type(value))

    def text(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, _SIMPLE):
            return repr(value)
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return [str(value.dtype), list(value.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
        if isinstance(value, type):
            return self.named(value)
        if depth > _DEEP or isinstance(value, nn.Module):
            return self.kind(value)
        if isinstance(value, FunctionType | MethodType):
            return self.function(value, depth)
        if hasattr(value, "__qualname__"):  # a function written in C
            return self.named(value)
        return self._contents(value, depth + 1)

    def _contents(self, value: Any, depth: int) -> Any:
        if hasattr(value, "to_diff_dict"):  # a configuration of transformers
            settings = value.to_dict() | {"attention": getattr(value, "_attn_implementation", None)}
            return {k: str(v) for k, v in sorted(settings.items()) if k not in _BOOKKEEPING}
        if isinstance(value, dict):
            known = _BOOKKEEPING if type(value).__name__ == "FrozenDict" else ()  # a configuration of diffusers
            entries = ((str(k), v) for k, v in value.items() if k not in known)
            return {k: self.text(v, depth) for k, v in sorted(entries, key=lambda entry: entry[0])}
        if isinstance(value, list | tuple):
            return [self.text(v, depth) for v in value]
        if isinstance(value, set | frozenset):
            return [self.text(v, depth) for v in sorted(value, key=str)]
        if isinstance(value, functools.partial):
            return [self.text(v, depth) for v in (value.func, value.args, value.keywords)]
        if hasattr(value, "tobytes"):  # an array of numpy
            return [repr(getattr(value, "dtype", None)), hashlib.sha256(value.tobytes()).hexdigest()]
        if hasattr(value, "__dict__"):
            return [self.kind(value), self.text(vars(value), depth)]
        return [self.kind(value), repr(value)]

    def function(self, value: Any, depth: int = 0) -> Any:
        """A function by its name, its code and what it closes over."""
        found = getattr(value, "__func__", value)
        if not isinstance(found, FunctionType):
            return self.named(value)
        held = [_cell(c) for c in found.__closure__ or ()] + list(found.__defaults__ or ())
        return [self.named(found), _code(found.__code__), [self.text(v, depth + 1) for v in held]]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _code(code: CodeType) -> str:
    inner = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return hashlib.sha256(code.co_code + repr((code.co_names, inner)).encode()).hexdigest()


class StructureWatch:
    """Remembers a module's parts and what their attributes are and hold, by identity.  Of adapters it remembers which
    layers have any."""

    def __init__(self, module: nn.Module) -> None:
        inner = [p for p in module.modules() if p is not module]
        with peeled(module):
            self.parts = list(module.modules())
        # Views of dictionaries and lists: they show what these hold at the time of reading.
        self._views = [d.values() for p in self.parts for d in (p.__dict__, p._modules)] + list(_held(self.parts))
        # The values are kept alive, so that a new object can never stand at an old one's address.
        self._values = self._read()
        self._forwards = [(kind, _forward_of(kind)) for kind in dict.fromkeys(map(type, self.parts))]
        # Parameters and buffers are the business of WeightsWatch; a plain tensor is part of the mathematics.
        self._tensors = [v for v in self._values if isinstance(v, torch.Tensor)]
        self._versions = [_version(t) for t in self._tensors]
        self._hooks = [h for p in inner for h in (p._forward_hooks, p._forward_pre_hooks)]
        self._inner = inner
        self._replaced = next((f"{type(p).__name__}: {_replacement(p)}" for p in inner if _replacement(p)), None)

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(self._views))

    def unchanged(self) -> bool:
        same_code = all(_forward_of(kind) is forward for kind, forward in self._forwards)
        same_numbers = [_version(t) for t in self._tensors] == self._versions
        return same_code and same_numbers and _identical(chain.from_iterable(self._views), self._values)

    def hooked(self) -> str | None:
        """Which inner part has a forward hook or another forward, which an engine would bypass."""
        if self._replaced:
            return self._replaced
        if _any_global_hook():
            return "a hook on all modules"
        if not any(self._hooks):
            return None
        return next((type(p).__name__ for p in self._inner if not _only_recorders(p)), None)


_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _forward_of(kind: type[nn.Module]) -> Any:
    return kind.forward


def _held(parts: Iterable[nn.Module]) -> Iterator[Iterable[Any]]:
    """What dictionaries, lists and objects (processors, configurations) in the parts' attributes hold."""
    seen: set[int] = set()
    for part in parts:
        for name, value in part.__dict__.items():
            # Among the ignored names is the engine's own, and an engine changes at every call.
            if name in _IGNORED or id(value) in seen or isinstance(value, _SIMPLE):
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                yield value.values()
            elif isinstance(value, list):
                yield value
            elif not isinstance(value, nn.Module | type | FunctionType | MethodType) and hasattr(value, "__dict__"):
                yield vars(value).values()


def _replacement(part: nn.Module) -> str | None:
    if "_hf_hook" in part.__dict__:
        return "a hook of accelerate"
    forward = part.__dict__.get("forward")
    plain = forward is None or getattr(forward, "__func__", None) is type(part).forward
    return None if plain else "its forward was replaced"


def _identical(now: Iterable[Any], before: Iterable[Any]) -> bool:
    """Whether both hold the same objects in the same order.  The mark at their ends tells which is longer."""
    return all(map(is_, chain(now, (_END,)), chain(before, (_END,))))


_END = object()


def _only_recorders(part: nn.Module) -> bool:
    """transformers leaves hooks behind that record hidden states for `output_hidden_states`; the captured graph returns
    those states itself."""
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return all(getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing") for hook in hooks)


class WeightsWatch:
    """Remembers which tensors a module's parameters and buffers are, their versions, and which adapters are active.

    Writes through `.data` change no version: `rebind` is for those.
    """

    def __init__(self, module: nn.Module) -> None:
        self._holders: list[dict[str, Any]] = [d for p in module.modules() for d in (p._parameters, p._buffers)]
        self._tuners = TunersWatch(module)
        self.look()

    def look(self) -> None:
        """Remember what is there now, in the same layers."""
        # The tensors themselves are kept, so that a new one can never stand at an old one's address.
        self._held = self._read()
        self._tensors = [t for t in self._held if t is not None]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._state = self._numbers()
        self._tuners.look()

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _numbers(self) -> tuple[list[int], list[int]]:
        # `module.to(...)` keeps a parameter and its version, and gives it other storage.
        return [t._version for t in self._versioned], [t.data_ptr() for t in self._tensors]

    def forms(self) -> list[Any]:
        return [(t.shape, t.dtype, t.device) for t in self._tensors]

    def same_layers(self) -> bool:
        """Whether no adapter came and none went, in a module of the same structure."""
        return self._tuners.same_adapters()

    def unchanged(self) -> bool:
        held = chain.from_iterable(map(dict.values, self._holders))
        return _identical(held, self._held) and self._numbers() == self._state and self._tuners.unchanged()
