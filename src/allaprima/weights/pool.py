"""Recent checkpoints in host memory, so that switching to one reads no disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .checkpoints import open_checkpoint
from .contents import Checkpoint, Component, Identity, Tensors, is_fresh
from .writing import is_from, remember_tokenizer

MOST_KNOWN = 16
SLAB_BYTES = 64 << 20


class Pool:
    """Checkpoints in host memory, the least recently used leave first.  Parts that several share are held once.

    max_bytes  of all tensors together; a part that does not fit is read from its file instead
    pinned     page-locked, which a GPU reads fastest (default: where there is one)
    raises     ConfigError
    """

    def __init__(self, max_bytes: int, *, pinned: bool | None = None) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes {max_bytes}; allowed: 0 or more.")
        self.max_bytes = max_bytes
        self._pinned = torch.cuda.is_available() if pinned is None else pinned
        self._held: OrderedDict[Identity, Tensors] = OrderedDict()
        self._tokenizers: dict[Identity, Any] = {}
        self._known: OrderedDict[tuple[str, str], Checkpoint] = OrderedDict()
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    @property
    def bytes(self) -> int:
        """Bytes of what is held now."""
        with self._lock:
            return self._bytes()

    def prefetch(self, source: str | Path, **options: Any) -> Future[None]:
        """Read a checkpoint in the background.

        options  as `open_checkpoint` takes them
        returns  a future that is done when the checkpoint is in memory, or raises what reading it raised
        """
        return self._worker.submit(self._fetch, source, options)

    def checkpoint(self, source: str | Path, **options: Any) -> Checkpoint:
        """A checkpoint, those of its parts that are held from memory.  raises what `open_checkpoint` raises"""
        found = self._open(source, options)
        return replace(
            found,
            modules={name: self._from_memory(part) for name, part in found.modules.items()},
            others={name: (of, self._built(of, make)) for name, (of, make) in found.others.items()},
        )

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        with self._lock:
            self._held.clear()
            self._known.clear()
            self._tokenizers.clear()

    def _open(self, source: str | Path, options: dict[str, Any]) -> Checkpoint:
        """Looked at again only where one of its files has changed."""
        key = str(source), repr(sorted(options.items()))
        with self._lock:
            known = self._known.pop(key, None)
        if known is None or not known.files or not is_fresh(known.files):
            known = open_checkpoint(source, **options)
        with self._lock:
            self._known[key] = known
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return known

    def _built(self, of: Identity, make: Callable[[], Any]) -> Callable[[], Any]:
        """A tokenizer that was built before, unless tokens were added to it; schedulers are quickly built."""
        present = self._tokenizers.get(of)
        return (lambda: present) if present is not None and is_from(present, of) else make

    def _fetch(self, source: str | Path, options: dict[str, Any]) -> None:
        found = self._open(source, options)
        for name, (of, make) in found.others.items():
            if name.startswith("tokenizer") and not is_from(self._tokenizers.get(of), of):
                self._tokenizers[of] = make()
                remember_tokenizer(self._tokenizers[of], of)
        for part in found.modules.values():
            with self._lock:
                known = part.identity in self._held
                if known:
                    self._held.move_to_end(part.identity)
            if not known:
                self._keep(part)

    def _keep(self, part: Component) -> None:
        mapped = part.read()
        size = sum(tensor.nbytes for tensor in mapped.values())
        if size > self.max_bytes:
            return
        self._make_room(size)
        tensors = in_slabs(mapped) if self._pinned else {name: tensor.clone() for name, tensor in mapped.items()}
        with self._lock:
            self._held[part.identity] = tensors

    def _make_room(self, size: int) -> None:
        with self._lock:
            while self._held and self._bytes() + size > self.max_bytes:
                self._held.popitem(last=False)

    def _from_memory(self, part: Component) -> Component:
        with self._lock:
            tensors = self._held.get(part.identity)
            if tensors is None:
                return part
            self._held.move_to_end(part.identity)
        return replace(part, read=_giver(tensors))

    def _bytes(self) -> int:
        held = (tensor.untyped_storage() for tensors in self._held.values() for tensor in tensors.values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def in_slabs(tensors: Tensors, *, pinned: bool = True) -> Tensors:
    """Copies of tensors in slabs.  torch gives page-locked memory in powers of two, and keeps what is given back for
    the next of that size: slabs of one such size waste little, and serve every checkpoint in turn."""
    found: dict[str, torch.Tensor] = {}
    slab, used = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes > slab.nbytes:
            slab = torch.empty(max(SLAB_BYTES, tensor.nbytes), dtype=torch.uint8, pin_memory=pinned)
            used = 0
        place = slab[used : used + tensor.nbytes]
        found[name] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        used += -(-tensor.nbytes // 64) * 64
    return found


def _giver(tensors: Tensors) -> Callable[[], Tensors]:
    return lambda: tensors
