"""Finding an adapter's file by its name, and reading it.

A name is what A1111's users write: the file's name without `.safetensors`, with or without the folder it lies in, or
the name its trainer gave it (`ss_output_name`).  Files that were read are kept in memory, bounded in bytes.
"""

from __future__ import annotations

import difflib
import json
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, CheckpointError
from ..models import LORAS
from .checkpoints import check_safetensors
from .lora_formats import Adapter, understand

SUFFIX = ".safetensors"
PICKLES = (".pt", ".bin", ".ckpt", ".pth")
IN_FOLDER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""How diffusers and PEFT call the file in an adapter's folder."""
CACHE_BYTES = 1 << 30
NEAREST = 3
LONGEST = 240


def folders(chosen: str | Path | Iterable[str | Path] | None = None) -> tuple[Path, ...]:
    """Where names are looked for: `chosen`, else `$ALLAPRIMA_LORAS` (several with the system's path separator).

    raises   AdapterError where a chosen one is no folder
    """
    if chosen is None:
        given = os.environ.get("ALLAPRIMA_LORAS", "").split(os.pathsep)
        return tuple(Path(place).expanduser() for place in given if place)
    places = [chosen] if isinstance(chosen, str | Path) else list(chosen)
    found = tuple(Path(place).expanduser() for place in places)
    if missing := next((place for place in found if not place.is_dir()), None):
        raise AdapterError(f"{missing} is no folder: give one that holds LoRAs.")
    return found


def find(name: str, places: Sequence[Path] = ()) -> Path:
    """The file that a name means: an embedded LoRA, a path, or a file somewhere below `places`.

    raises   AdapterError for an unknown name (it lists the nearest ones), one that means several files, and pickles
    """
    if name in LORAS:
        return LORAS[name].path
    if (path := _as_path(name)) is not None:
        return path
    wanted = _normal(name).removesuffix(SUFFIX)
    if len(direct := _direct(wanted, places)) == 1:
        return direct[0]  # without looking through folders of thousands
    files = list(_listed(places))
    for matching in (_called, _stemmed, _aliased):
        found = [path for place, path in files if path.suffix == SUFFIX and wanted == matching(place, path)]
        if len(found) > 1:
            listed = ", ".join(map(str, sorted(found)[:5]))
            raise AdapterError(f"LoRA {name!r} means {len(found)} files: {listed}. Give its folder too.")
        if found:
            return found[0]
    for _, path in files:
        if path.suffix in PICKLES and wanted in (path.stem, path.name):
            raise _pickled(path)
    raise _unknown(name, wanted, files)


def read(path: Path) -> Adapter:
    """Read an adapter's file, or take it from memory where it has not changed since.

    raises   CheckpointError for a missing, truncated or hostile file, AdapterError for a pickle and broken factors
    """
    if path.suffix in PICKLES:
        raise _pickled(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"LoRA {path} cannot be read: {error.strerror}.") from error
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    if (known := _CACHE.get(key)) is not None:
        return known
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        # Copies: the file may be written again while we hold them.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    adapter = understand(path.stem, tensors, metadata, _config_beside(path))
    _CACHE.put(key, adapter)
    return adapter


class _Cache:
    """Adapters by file and state of the file: the latest ones up to `CACHE_BYTES`, and those in use anywhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: OrderedDict[tuple[str, int, int], Adapter] = OrderedDict()
        self._alive: WeakValueDictionary[tuple[str, int, int], Adapter] = WeakValueDictionary()

    def get(self, key: tuple[str, int, int]) -> Adapter | None:
        with self._lock:
            found = self._alive.get(key)
            if found is not None:
                self._keep(key, found)
            return found

    def put(self, key: tuple[str, int, int], adapter: Adapter) -> None:
        with self._lock:
            self._alive[key] = adapter
            self._keep(key, adapter)

    def _keep(self, key: tuple[str, int, int], adapter: Adapter) -> None:
        for other in [other for other in self._latest if other[0] == key[0]]:
            del self._latest[other]  # an earlier state of the file
        self._latest[key] = adapter
        while self._latest and sum(kept.nbytes for kept in self._latest.values()) > CACHE_BYTES:
            self._latest.popitem(last=False)


_CACHE = _Cache()


def _as_path(name: str) -> Path | None:
    """A name that is a path to something: a file, or a folder that diffusers or PEFT wrote."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return next((path / file for file in IN_FOLDER if (path / file).is_file()), None)
        if not path.is_file():
            return None
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        return None
    if path.suffix in PICKLES:
        raise _pickled(path)
    return path if path.suffix == SUFFIX else None


def _direct(wanted: str, places: Sequence[Path]) -> list[Path]:
    if not wanted or ".." in wanted.split("/") or len(wanted) > LONGEST or "\0" in wanted:
        return []
    return [path for place in places if (path := place / f"{wanted}{SUFFIX}").is_file()]


def _listed(places: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(place, file) for each file below the places that could be an adapter."""
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.suffix in (SUFFIX, *PICKLES) and path.is_file():
                yield place, path


def _called(place: Path, path: Path) -> str:
    return _normal(path.relative_to(place).as_posix()).removesuffix(SUFFIX)


def _stemmed(place: Path, path: Path) -> str:
    return _normal(path.name).removesuffix(SUFFIX)


def _aliased(place: Path, path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            alias = (file.metadata() or {}).get("ss_output_name")
    except (SafetensorError, OSError, ValueError):
        return None  # it may be any file; its error belongs to the one who asks for it
    return alias and _normal(alias)


def _normal(name: str) -> str:
    """One form of accents and of Windows' separators: file systems differ."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _config_beside(path: Path) -> dict[str, Any] | None:
    """PEFT's adapter_config.json, which belongs to the file that PEFT writes beside it."""
    beside = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{beside} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{beside} holds no settings.")
    return config


def _pickled(path: Path) -> AdapterError:
    return AdapterError(
        f"LoRA {path} is a pickle, which can run any code when it is read. Convert it first: "
        f"`allaprima models convert {path}`."
    )


def _unknown(name: str, wanted: str, files: Sequence[tuple[Path, Path]]) -> AdapterError:
    known = [_stemmed(*file) for file in files if file[1].suffix == SUFFIX] + list(LORAS)
    near = difflib.get_close_matches(wanted, known, n=NEAREST, cutoff=0.4) or known[:NEAREST]
    return AdapterError(
        f"unknown LoRA {name!r}. Nearest names: {', '.join(near)}. Give an embedded name, a {SUFFIX} file, or the name "
        "of one in the folder given by lora_dir (--lora-dir) or $ALLAPRIMA_LORAS."
    )
