"""Pickled checkpoints (.ckpt, .bin, .pt) made safetensors, in a child that may do little else.

The child (unpickling.py) has no network where the system permits that (a namespace of its own; else Python refuses
sockets), no access token in its environment, and bounded memory, time and disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CheckpointError, ConfigError
from .contents import read_json
from .soundness import PICKLES, check_safetensors

CHILD = Path(__file__).with_name("unpickling.py")
KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
"""No token, no proxy, no password is the child's business."""
SPARE_BYTES = 1 << 30
ALWAYS_SKIPPED = ("safety_checker",)

Progress: TypeAlias = Callable[[Path, int, int], None]
"""(file, bytes written, bytes expected)"""


@dataclass(frozen=True)
class Converted:
    """One file that was converted.

    tensors  how many
    size     their bytes
    skipped  names of entries that are no weights
    network  "none", or "refused by Python alone" where the system permits no namespace
    """

    path: Path
    tensors: int
    size: int
    skipped: tuple[str, ...]
    network: str


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    memory_bytes: int | None = None,
    seconds: int = 900,
    replace: bool = False,
    progress: Progress | None = None,
) -> list[Converted]:
    """Convert a pickle, or all pickled parts of a diffusers folder, to safetensors.

    source        .ckpt, .bin, .pt or .pth file | diffusers folder (parts that have safetensors are left alone)
    output        file or folder (default: beside each pickle; a folder gets a copy of the other files)
    memory_bytes  for each file (default: three times its size and 1 GiB)
    seconds       of time for each file
    replace       a file that is there
    raises        CheckpointError for a file that is hostile, damaged, or takes too much; ConfigError.  What was there
                  before stays as it was
    """
    path = Path(source).expanduser()
    if seconds < 1 or (memory_bytes is not None and memory_bytes < 1):
        raise ConfigError(f"seconds {seconds}, memory_bytes {memory_bytes}; allowed: 1 or more.")
    jobs = list(_jobs(path, Path(output).expanduser() if output is not None else None))
    for _, target in jobs:
        if target.exists() and not replace:
            raise CheckpointError(f"{target} is there already. Give another place (-o), or --replace.")
    if path.is_dir() and output is not None:
        _copy_rest(path, Path(output).expanduser())
    found = [_convert(file, target, memory_bytes, seconds, progress) for file, target in jobs]
    if path.is_dir():
        _write_indexes(path, Path(output).expanduser() if output is not None else path)
    return found


def _jobs(path: Path, output: Path | None) -> Iterator[tuple[Path, Path]]:
    if path.is_dir():
        files = [file for file in sorted(path.glob("*/*.bin")) if file.parent.name not in ALWAYS_SKIPPED]
        waiting = [file for file in files if not list(file.parent.glob("*.safetensors"))]
        if not waiting:
            raise CheckpointError(f"{path} holds no pickled weights that have no .safetensors beside them.")
        for file in waiting:
            yield file, (output or path) / file.parent.name / _new_name(file.name)
    elif not path.is_file():
        raise CheckpointError(f"no file or folder {path}.")
    elif path.suffix.lower() not in PICKLES:
        raise CheckpointError(f"{path} is no pickle by its name; converted are {', '.join(PICKLES)}.")
    else:
        target = path.with_suffix(".safetensors") if output is None else output
        yield path, target / _new_name(path.name) if target.is_dir() else target


def _new_name(name: str) -> str:
    """ "pytorch_model-00001-of-00002.bin" -> "model-00001-of-00002.safetensors", as transformers names them"""
    return re.sub(r"^pytorch_model", "model", Path(name).stem) + ".safetensors"


def _copy_rest(source: Path, output: Path) -> None:
    """Configurations and tokenizers, and the safetensors of parts that have them."""
    for file in source.rglob("*"):
        if file.is_file() and file.suffix.lower() not in PICKLES and "index" not in file.name.partition(".")[2]:
            place = output / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _write_indexes(source: Path, output: Path) -> None:
    """Shards have a table of which tensor is where."""
    for index in source.glob("*/*.bin.index.json"):
        table = read_json(index)
        table["weight_map"] = {name: _new_name(str(file)) for name, file in table.get("weight_map", {}).items()}
        stem = re.sub(r"^pytorch_model", "model", index.name.partition(".")[0])
        place = output / index.parent.name / f"{stem}.safetensors.index.json"
        place.write_text(json.dumps(table, indent=2))


def _convert(
    source: Path, target: Path, memory_bytes: int | None, seconds: int, progress: Progress | None
) -> Converted:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
        part = Path(folder) / "part.safetensors"
        job: dict[str, Any] = {
            "source": str(source.resolve()),
            "target": str(part),
            "memory_bytes": memory_bytes or 3 * size + SPARE_BYTES,
            "file_bytes": (memory_bytes or 3 * size) + (16 << 20),
            "seconds": seconds,
        }
        told = _run(source, job, Path(folder), lambda: progress and progress(target, _size(part), size))
        if "refused" in told:
            raise CheckpointError(f"{source} is not converted: {told['refused']}.")
        check_safetensors(part)
        os.replace(part, target)
    if progress:
        progress(target, size, size)
    return Converted(target, told["tensors"], told["bytes"], tuple(told["skipped"]), told["network"])


def _run(source: Path, job: dict[str, Any], folder: Path, look: Callable[[], Any]) -> dict[str, Any]:
    """Run the child to its end, or to the end of its time.  returns what it says"""
    order, answer, errors = folder / "job.json", folder / "answer", folder / "errors"
    order.write_text(json.dumps(job))
    environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    command = [sys.executable, "-I", str(CHILD), str(order)]
    with answer.open("wb") as out, errors.open("wb") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            _wait(child, time.monotonic() + job["seconds"], look)
        finally:
            late = child.poll() is None
            if late:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if late:
        return {"refused": f"it took more than {job['seconds']} s (--seconds)"}
    return _answer(source, child.returncode, answer, errors)


def _wait(child: subprocess.Popen[bytes], until: float, look: Callable[[], Any]) -> None:
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
        look()


def _answer(source: Path, code: int, answer: Path, errors: Path) -> dict[str, Any]:
    """The child's last line.  It may be a hostile file's puppet: its words are checked like any input."""
    lines = answer.read_bytes()[-65536:].decode(errors="replace").strip().splitlines()
    try:
        told = json.loads(lines[-1]) if lines else {}
    except (ValueError, RecursionError):
        told = {}
    kinds = {"tensors": int, "bytes": int, "skipped": list, "network": str}
    sound = isinstance(told, dict) and all(isinstance(told.get(key), kind) for key, kind in kinds.items())
    if isinstance(told, dict) and isinstance(told.get("refused"), str):
        return {"refused": told["refused"][:500]}
    if code == 0 and sound:
        return {key: told[key] for key in kinds} | {"skipped": [str(name)[:100] for name in told["skipped"]]}
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return {"refused": "it took too much time or memory"}
    last = errors.read_bytes()[-500:].decode(errors="replace").strip().splitlines()[-1:]
    return {"refused": f"reading it failed with code {code} ({' '.join(last)[:200]})"}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
