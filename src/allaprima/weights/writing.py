"""Writing a checkpoint's numbers into modules that live.

Parameters keep their memory, so that captured programs and recorded graphs stay valid; their versions go up, so that
engines notice.  What holds the same numbers already is left alone.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import CheckpointError
from ..notices import quiet_import
from ..tuners import peeled, tuners
from .contents import Component, Identity, fitted, named_tensors

with quiet_import():
    import transformers

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A living tensor and what it shall hold: same shape, any dtype, layout and device."""

STAGE_BYTES = 32 << 20
# What a configuration says of where a model came from, of training, and of ids that no pipeline reads from it.
NO_ARCHITECTURE = {
    "_name_or_path", "name_or_path", "_class_name", "_diffusers_version", "architectures", "torch_dtype", "dtype",
    "transformers_version", "model_type", "initializer_factor", "initializer_range", "attention_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "bos_token_id", "pad_token_id",
    "use_cache", "id2label", "label2id",
}  # fmt: skip


@dataclass
class Write:
    """One module and what is to be written into it.

    needed  False where the module holds these very numbers, read from the same bytes
    """

    component: Component
    module: nn.Module
    pairs: list[Pair]
    needed: bool


def plan(component: Component, module: nn.Module) -> Write | None:
    """What there is to write; None where the module is of another architecture.  Nothing is changed.

    raises  CheckpointError where tensors are missing or do not fit, or the module cannot be written
    """
    if type(module) is not component.kind or _settings(component.kind, component.config) != _own_settings(module):
        return None
    if fused := sorted({str(name) for tuner in tuners(module) for name in getattr(tuner, "merged_adapters", ())}):
        raise CheckpointError(
            f"{component.name} has the fused adapter(s) {', '.join(fused)}, which another checkpoint would overwrite. "
            "Call pipe.unfuse_lora() first."
        )
    with peeled(module):
        living = named_tensors(module)
    if offloaded := next((name for name, tensor in living.items() if tensor.device.type == "meta"), None):
        raise CheckpointError(f"{component.name}.{offloaded} has no memory now (offloaded). Switch before offloading.")
    if _ORIGINS.get(module) == (component.identity, _versions(living.values())):
        return Write(component, module, [], needed=False)
    found = fitted(component, living)
    return Write(component, module, [(living[name], value) for name, value in found.items()], needed=True)


def write(writes: Iterable[Write]) -> int:
    """Carry out what was planned.  returns the number of tensors that were written"""
    count = 0
    for one in writes:
        if one.needed:
            count += copy(one.pairs)
            remember(one.module, one.component.identity)
    return count


def copy(pairs: Iterable[Pair]) -> int:
    """Write tensors, each by the way that is fast for where it goes.  returns how many were not the same already"""
    by_device: dict[torch.device, list[Pair]] = {}
    for living, value in pairs:
        by_device.setdefault(living.device, []).append((living, value))
    count = 0
    with torch.no_grad():
        for device, own in by_device.items():
            if device.type == "cuda":
                through_pinned(own, device)
                count += len(own)
            else:
                count += sum(_copy_if_other(living, value) for living, value in own)
    return count


def _copy_if_other(living: torch.Tensor, value: torch.Tensor) -> bool:
    """On a CPU a look is cheaper than what a change costs: folds, and models that OpenVINO builds again."""
    value = value.to(device=living.device, dtype=living.dtype)
    if _same_bits(living.detach(), value):
        return False
    _put(living, value)
    return True


def _put(living: torch.Tensor, value: torch.Tensor) -> None:
    with torch.inference_mode(living.is_inference()), torch.no_grad():
        living.copy_(value)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, too, in the signs of zeros and in NaNs."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


def through_pinned(pairs: Iterable[Pair], device: torch.device, stage_bytes: int = STAGE_BYTES) -> None:
    """Write tensors on a GPU from mapped files: while one pinned buffer is copied, the other is filled.

    Casts and layouts are left to the GPU.  Values that lie in pinned memory themselves go straight.
    """
    slots = [_Slot(device, stage_bytes), _Slot(device, stage_bytes)]
    waiting: list[Pair] = []
    for living, value in pairs:
        if value.device.type != "cpu" or (device.type == "cuda" and value.is_pinned()):
            _put(living, value.to(device, non_blocking=True))
        else:
            waiting += _pieces(living, value.contiguous(), stage_bytes)
    for number, portion in enumerate(_portions(waiting, stage_bytes)):
        slots[number % 2].send(portion)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the buffers and the file may go now


class _Slot:
    """A pinned buffer, and when the GPU is through with it."""

    def __init__(self, device: torch.device, stage_bytes: int) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._buffer = torch.empty(stage_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._done = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def send(self, pairs: list[Pair]) -> None:
        if self._done is not None:
            self._done.synchronize()
        start = 0
        for living, value in pairs:
            staged = self._buffer[start : start + value.nbytes].view(value.dtype).view(value.shape)
            start += _aligned(value.nbytes)
            staged.copy_(value)
            _put(living, staged.to(self._device, non_blocking=True))
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))


def _pieces(living: torch.Tensor, value: torch.Tensor, stage_bytes: int) -> list[Pair]:
    """A tensor cut along its first axis, so that each piece fits the buffer."""
    if value.nbytes <= stage_bytes:
        return [(living, value)]
    rows = max(1, stage_bytes // (value.nbytes // value.shape[0]))
    if value.shape[0] == 1 or value[0].nbytes > stage_bytes:
        return [(living, value.pin_memory())]
    return list(zip(torch.split(living, rows), torch.split(value, rows), strict=True))


def _portions(pairs: Iterable[Pair], stage_bytes: int) -> Iterator[list[Pair]]:
    portion: list[Pair] = []
    held = 0
    for living, value in pairs:
        size = _aligned(value.nbytes)
        if portion and held + size > stage_bytes:
            yield portion
            portion, held = [], 0
        portion.append((living, value))
        held += size
    if portion:
        yield portion


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


# ---- what a module holds -------------------------------------------------------------------------------------------

_ORIGINS: weakref.WeakKeyDictionary[Any, tuple[Identity, Any]] = weakref.WeakKeyDictionary()
"""Of modules, and of tokenizers: what they were read from, and the versions of their tensors then."""


def remember(module: nn.Module, identity: Identity) -> None:
    """Note that a module now holds what was read from there.  Whoever writes it afterwards raises a version."""
    with peeled(module):
        _ORIGINS[module] = identity, _versions(named_tensors(module).values())


def remember_tokenizer(tokenizer: Any, identity: Identity) -> None:
    _ORIGINS[tokenizer] = identity, len(tokenizer)


def is_from(tokenizer: Any, identity: Identity) -> bool:
    """Whether a tokenizer was built from there and no token was added to it since (textual inversion does)."""
    return tokenizer is not None and tokenizer in _ORIGINS and _ORIGINS[tokenizer] == (identity, len(tokenizer))


def _versions(tensors: Iterable[torch.Tensor]) -> Any:
    """Tensors of inference mode have no version: their numbers are never taken for known.  `module.to(...)` keeps the
    version and gives other memory."""
    return tuple(object() if t.is_inference() else (t._version, t.data_ptr(), t.dtype) for t in tensors)


def _settings(kind: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides the module's mathematics, defaults filled in."""
    if issubclass(kind, transformers.PreTrainedModel):
        return _plain(kind, kind.config_class(**config).to_dict())  # type: ignore[attr-defined]
    known = inspect.signature(kind.__init__).parameters
    defaults = {name: entry.default for name, entry in known.items() if entry.default is not inspect.Parameter.empty}
    return _plain(kind, defaults | {name: value for name, value in config.items() if name in known})


def _own_settings(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, transformers.PreTrainedModel):
        return _plain(type(module), module.config.to_dict())
    return _settings(type(module), module.config)  # type: ignore[arg-type]


def _plain(kind: type[nn.Module], settings: Mapping[str, Any]) -> dict[str, Any]:
    ignored = NO_ARCHITECTURE | (set() if kind.__name__.endswith("WithProjection") else {"projection_dim"})
    kept = {name: value for name, value in settings.items() if name not in ignored}
    found: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return found
