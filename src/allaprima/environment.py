"""This machine and its software: without them no figure can be compared with another."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "openvino", "triton")


def environment() -> dict[str, Any]:
    """One plain record: machine, versions, commit, date and the command line."""
    import torch

    from . import __version__

    return {
        "allaprima": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"{_program()} {shlex.join(sys.argv[1:])}".strip(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, and its matrix extension, which decides what bf16 costs."""
    name = _cpu_fields(cpuinfo).get("model name") or platform.processor() or "unknown"
    flags = cpu_flags(cpuinfo)
    extension = next((e for e in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if e in flags), None)
    return f"{name} ({extension or 'no vector extension known'})"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's features by Linux's names; empty where there is no /proc."""
    fields = _cpu_fields(cpuinfo)
    return frozenset(fields.get("flags", fields.get("features", "")).split())


def _cpu_fields(cpuinfo: Path) -> dict[str, str]:
    """What Linux says of the first processor, its keys in lower case (ARM capitalises them)."""
    if not cpuinfo.exists():
        return {}
    first, _, _ = cpuinfo.read_text(errors="replace").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def available_cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be taken without swapping, or None where it cannot be told."""
    if not meminfo.exists():
        return None
    pairs = (line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    kib = {key: value.split()[0] for key, value in pairs}.get("MemAvailable")
    return int(kib) * 1024 if kib else None


def package_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the working tree that this package lies in, with a + where its sources were changed since."""
    here = Path(__file__).resolve().parent
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        return revision + ("+" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _program() -> str:
    """ "allaprima", or "python -m module": never a path of this machine."""
    program = Path(sys.argv[0])
    if program.suffix != ".py":
        return program.name
    parts = program.with_suffix("").parts
    inside = parts[len(parts) - parts[::-1].index("allaprima") :] if "allaprima" in parts else parts[-1:]
    return "python -m " + ".".join(part for part in ("allaprima", *inside) if part != "__main__")
