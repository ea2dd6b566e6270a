"""Where and with what a figure was measured: without it no figure can be compared with another."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "openvino", "triton")


def environment() -> dict[str, Any]:
    """One plain record: machine, versions, commit, date and the command line."""
    import torch

    from .. import __version__

    return {
        "allaprima": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def cpu_model() -> str:
    """The processor's name, and its matrix extension, which decides what bf16 costs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    extensions = [
        name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in fields.get("flags", "").split()
    ]
    return f"{fields.get('model name', 'unknown')} ({extensions[0] if extensions else 'no vector extension known'})"


def commit() -> str | None:
    """The commit of the working tree that this package lies in, with a + where its sources were changed since."""
    here = Path(__file__).resolve().parent.parent
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        return revision + ("+" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _program() -> str:
    """ "allaprima", or "python -m module": never a path of this machine."""
    program = Path(sys.argv[0])
    if program.suffix != ".py":
        return program.name
    module = "allaprima" + str(program.with_suffix("")).rpartition("allaprima")[2].replace("/", ".")
    return f"python -m {module}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
