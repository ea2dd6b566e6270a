"""Peak memory of one variant alone.

On CUDA the allocator counts.  On the CPU the peak of a whole process is all that can be had.  Either way each variant
is measured in a process of its own, which loads, builds and runs only that: `python -m allaprima.bench.memory REQUEST`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends import settle


def peak_bytes(device: str | torch.device = "cpu") -> int:
    """The most held at once since `reset_peak`: reserved by torch on CUDA, resident in this process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return _status_bytes("VmHWM")
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(device: str | torch.device = "cpu") -> int:
    """The memory held now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_reserved(device)
    return _status_bytes("VmRSS")


def reset_peak(device: str | torch.device = "cpu") -> None:
    """Start counting again from what is held now."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    # 5 resets the peak resident size (proc(5)); where that is not to be had, the peak counts from the process's start
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Request:
    """What the fresh process is to run: one variant at one case."""

    arch: str | None
    model: str
    dtype: str
    device: str
    variant: str
    case: dict[str, Any]


@dataclass(frozen=True)
class Peaks:
    """Bytes held once the model is loaded, at most while the variant is built, and at most in later calls."""

    loaded: int
    building: int
    running: int


def measured_alone(request: Request, limit_s: float) -> Peaks:
    """`measure_here` in a fresh process.

    raises   RuntimeError with the last line that the process wrote, subprocess.TimeoutExpired
    """
    command = [sys.executable, "-m", "allaprima.bench.memory", json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return Peaks(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure_here(request: Request, calls: int = 3) -> Peaks:
    """Load, build and run in this process."""
    from .variants import VARIANTS
    from .workloads import WORKLOADS, Case, components_of, subject

    pipe, case = subject(request.arch, request.model, request.dtype, request.device), Case(**request.case)
    gc.collect()
    loaded = held_bytes(request.device)
    reset_peak(request.device)
    VARIANTS[request.variant](pipe, components_of([case.what]))
    call = WORKLOADS[case.what].cycle(pipe, case)
    call()
    building = peak_bytes(request.device)
    settle(torch.device(request.device))
    reset_peak(request.device)
    for _ in range(calls):
        call()
    return Peaks(loaded, building, peak_bytes(request.device))


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[key].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(Request(**json.loads(sys.argv[1]))))))
