"""What this machine has for allaprima, and what to do about what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .config import default_cache_dir
from .environment import available_cores, cpu_flags, free_memory_bytes, package_version

State = Literal["good", "note", "bad"]
MARKS = {"good": "[green]✓[/]", "note": "[yellow]•[/]", "bad": "[red]✗[/]"}

TORCH_RANGE = ((2, 11), (2, 14))
TRANSFORMERS_RANGE = ((5,), (6,))
DIFFUSERS_RANGE = ((0, 42), (1,))
CACHE_LIMIT_BYTES = 2**30
FREE_MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state    "good", "note" (works, could be better) or "bad" (something will fail)
    advice   what to do; empty where nothing is to be done
    """

    name: str
    state: State
    found: str
    advice: str = ""

    def __rich__(self) -> str:
        from rich.markup import escape

        line = f"{MARKS[self.state]} [bold]{self.name}[/]: {escape(self.found)}"
        return f"{line}\n    → {escape(self.advice)}" if self.advice else line


def examine() -> list[Finding]:
    """Look at everything; a look that fails is a finding itself, never an exception."""
    findings: list[Finding] = []
    for look in LOOKS:
        try:
            findings.extend(look())
        except Exception as error:  # a broken installation is what a doctor is called for
            name = look.__name__.removeprefix("_")
            findings.append(Finding(name, "bad", f"{type(error).__name__}: {error}", "reinstall allaprima and torch"))
    return findings


def _python() -> Iterator[Finding]:
    yield Finding("Python", "good", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    yield _package("torch", *TORCH_RANGE)
    yield _package("diffusers", *DIFFUSERS_RANGE)
    yield _package("transformers", *TRANSFORMERS_RANGE)


def _openvino() -> Iterator[Finding]:
    version = package_version("openvino")
    if version is None:
        advice = "pip install 'allaprima[cpu]' makes pictures on the processor about twice as fast"
        yield Finding("OpenVINO", "note", "not installed", advice)
        return
    import openvino

    processors = ", ".join(openvino.Core().available_devices)
    yield Finding("OpenVINO", "good", f"{version}, devices: {processors}")


def _gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield Finding("GPU", "good", f"{device.name}, {_gib(device.total_memory)}, CUDA {torch.version.cuda}")
        yield _triton()
    elif driver := _nvidia_smi():
        advice = f"torch {torch.__version__} cannot use it: pip install 'allaprima[cuda]', or update the driver"
        yield Finding("GPU", "bad", driver, advice)
    else:
        yield Finding("GPU", "good", "none; pictures are drawn on the processor")


def _triton() -> Finding:
    if version := package_version("triton"):
        return Finding("Triton", "good", version)
    return Finding("Triton", "note", "not installed", "pip install 'allaprima[cuda]' brings our GPU kernels")


def _processor() -> Iterator[Finding]:
    import torch

    cores, threads = available_cores(), torch.get_num_threads()
    flags = cpu_flags()
    special = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16") if name in flags]
    has_bf16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    found = f"{cores} cores, {threads} threads, {' '.join(special) or 'no vector extensions known to us'}"
    if threads > cores:
        yield Finding("Processor", "note", found, f"more threads than cores are slow: set OMP_NUM_THREADS={cores}")
    else:
        yield Finding("Processor", "good", found)
    if has_bf16:
        yield Finding("bf16", "good", 'native: dtype "auto" draws in bf16 on the processor')
    else:
        yield Finding("bf16", "good", 'not native here: dtype "auto" draws in float32 on the processor')


def _memory() -> Iterator[Finding]:
    free = free_memory_bytes()
    if free is None:
        return
    if free < FREE_MEMORY_BYTES:
        advice = "an SD v1.5 checkpoint takes 2 to 4 GiB: close other programs, or use an embedded model"
        yield Finding("Memory", "note", f"{_gib(free)} free", advice)
    else:
        yield Finding("Memory", "good", f"{_gib(free)} free")


def _cache() -> Iterator[Finding]:
    folder = default_cache_dir()
    where = f"{folder} (set ALLAPRIMA_CACHE to move it)"
    if not folder.exists():
        parent = next(path for path in folder.parents if path.exists())
        if os.access(parent, os.W_OK):
            yield Finding("Cache", "good", f"{where}, still empty")
        else:
            yield Finding("Cache", "bad", f"{where} cannot be made", "set ALLAPRIMA_CACHE to a folder you may write to")
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    found = f"{where}, {len(files)} files, {size / 2**20:.1f} MiB"
    if not os.access(folder, os.W_OK):
        yield Finding("Cache", "bad", f"{found}, not writable", "set ALLAPRIMA_CACHE to a folder you may write to")
    elif size > CACHE_LIMIT_BYTES:
        yield Finding("Cache", "note", found, "delete it when you like: it is made again when it is needed")
    else:
        yield Finding("Cache", "good", found)


def _models() -> Iterator[Finding]:
    from .models import EMBEDDED

    root = Path(__file__).parent / "models"
    weights = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    if weights:
        yield Finding("Models", "good", f"{', '.join(EMBEDDED)}; {weights / 2**20:.1f} MiB of weights in {root}")
    else:
        yield Finding("Models", "bad", f"no weights in {root}", "reinstall allaprima; its package holds the weights")


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _openvino,
    _gpu,
    _processor,
    _memory,
    _cache,
    _models,
)


def _package(name: str, low: tuple[int, ...], high: tuple[int, ...]) -> Finding:
    text = importlib.metadata.version(name)
    version = tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())
    if low <= version < high:
        return Finding(name, "good", text)
    allowed = f"{name}>={_dotted(low)},<{_dotted(high)}"
    return Finding(name, "bad", f"{text}, untested", f"pip install '{allowed}'")


def _nvidia_smi() -> str:
    """The name of a GPU that the driver sees, or an empty string."""
    if not (program := shutil.which("nvidia-smi")):
        return ""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
