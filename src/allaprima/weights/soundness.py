"""Is this a safetensors file that can be read without harm?  Asked of each file before anything of it is used."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 20_000
MAX_NAME = 512
"""SDXL's file has 2,515 tensors in a header of 0.3 MB.  Much more is no checkpoint, but work for the reader."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
HOW_TO_CONVERT = "Convert it once, in a sandbox: `allaprima models convert {}`"


def refuse_pickle(path: Path) -> None:
    """raises CheckpointError if the file's name is one of a pickle."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when it is read. {HOW_TO_CONVERT.format(path)}."
        )


def check_safetensors(path: Path) -> None:
    """Read the header and every tensor's bounds.  raises CheckpointError for a missing, truncated or hostile file."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}.")
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise CheckpointError(f"{path} holds no tensors.")
    except (SafetensorError, OSError, ValueError) as error:
        raise _unsound(path, error) from error


def header(path: Path) -> dict[str, Any]:
    """What a file says of its tensors: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__".

    raises  CheckpointError
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            # A header of 640 bytes begins like a pickle, too; but no pickle is a plausible size.
            if size > MAX_HEADER_BYTES and (start[:2] == b"PK" or start[:1] == b"\x80"):
                raise CheckpointError(
                    f"{path} is a pickle by another name, which can run any code when it is read. Rename it to .ckpt "
                    f"and convert it: `allaprima models convert {path.with_suffix('.ckpt').name}`."
                )
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise _unsound(path, f"a header of {size} bytes; allowed: 2 to {MAX_HEADER_BYTES}")
            found = json.loads(file.read(size))
    except (OSError, ValueError, RecursionError) as error:
        raise _unsound(path, error) from error
    if not isinstance(found, dict):
        raise _unsound(path, "its header is no table")
    return found


def metadata(path: Path) -> dict[str, str]:
    """The texts that a file carries beside its tensors."""
    found = header(path).get("__metadata__")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _check_header(path: Path) -> None:
    entries = header(path)
    if len(entries) > MAX_TENSORS:
        raise _unsound(path, f"{len(entries)} tensors; allowed: {MAX_TENSORS}")
    if long := next((name for name in entries if len(name) > MAX_NAME), None):
        raise _unsound(path, f"a tensor's name of {len(long)} letters; allowed: {MAX_NAME}")


def _unsound(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{path} is no sound safetensors file ({str(reason)[:300]}). Download it again.")
