"""All kernels compiled once a machine, in processes beside the one that will need them.

Compiling takes no GPU, only cores, and the program has a network to capture meanwhile.  Triton keeps what is compiled;
a file in its cache says that all of it is there.

python -m allaprima.backends.cuda.warming --dtype float16    now, for the GPU here; also what the process beside runs
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console

from .compile import every_variant, kernel_of, modules_of, one_of_each
from .device import Device
from .kernels.variant import Variant
from .launchers import build


def ready(dtype: torch.dtype, device: Device) -> bool:
    """Whether the kernels for tensors of `dtype` are compiled; the first to ask sets the compiler going.

    Also True where that ended badly, which is warned of once: a kernel that is not there is compiled when it is
    launched first.
    """
    key = dtype, device.arch
    with _lock:
        if key not in _running:
            _running[key] = _start(dtype, device)
        process = _running[key]
        if process is None or process.poll() is None:
            return process is None
        _running[key] = None
    if process.returncode:
        warnings.warn(
            f"compiling the kernels beside this process ended with {process.returncode}: what is missing is compiled "
            "at its first launch, a second each. python -m allaprima.backends.cuda.warming tells what failed.",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


def wait(limit_s: float = 600.0) -> None:
    """Until everything that was set going has ended: for measurements, which should not be taken beside it."""
    end = time.monotonic() + limit_s
    for process in list(_running.values()):
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


_running: dict[tuple[torch.dtype, int], subprocess.Popen[bytes] | None] = {}
_lock = threading.Lock()


def _start(dtype: torch.dtype, device: Device) -> subprocess.Popen[bytes] | None:
    """None where all is compiled, or no process can be started."""
    variants = every_variant([dtype], modules_of(device.arch))
    done = _marker(variants, device.arch)
    if done.exists():
        return None
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", __name__, "--arch", str(device.arch), "--dtype", name, "--done", str(done)]
    paths = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    try:
        # What a compiler says of a form that fails is not for the user's terminal; that there was one, `ready` tells.
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(command, env=paths, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    except OSError:
        return None
    told = f"compiling {len(variants)} kernels, once on this machine; PyTorch's run until they are there"
    Console(stderr=True).print(told, style="dim")
    return process


def _marker(variants: Sequence[Variant], arch: int) -> Path:
    """The file that says that all of them are compiled, of this Triton and from these sources."""
    import triton

    kernels = {kernel_of(v): v.kernel.cache_key for v in variants}
    parts = (triton.__version__, str(arch), repr(sorted(kernels.items())), *sorted(v.name for v in variants))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return Path(triton.knobs.cache.dir) / f"allaprima-{digest}.txt"


# ---- the process beside --------------------------------------------------------------------------------------------


def compile_all(variants: Sequence[Variant], arch: int, processes: int | None = None) -> list[str]:
    """Compile into Triton's cache, in as many processes as there are cores.  returns what went wrong, by form"""
    count = min(len(variants), processes or os.cpu_count() or 1)
    # Forked, so that they need not import torch again; nothing here has started a thread.  Kernels cannot be pickled,
    # so the processes inherit them.
    with multiprocessing.get_context("fork").Pool(count, initializer=_inherit, initargs=(variants, arch)) as pool:
        wrong = pool.map(_compiled, range(len(variants)), chunksize=1)
    return [text for text in wrong if text]


_inherited: tuple[Sequence[Variant], int] = ((), 0)


def _inherit(variants: Sequence[Variant], arch: int) -> None:
    global _inherited
    _inherited = variants, arch
    os.nice(5)


def _compiled(index: int) -> str | None:
    variants, arch = _inherited
    try:
        build(variants[index].compile_for(arch))
    except Exception as error:  # the compiler raises anything; the other forms may do
        return f"{variants[index].name}: {type(error).__name__}: {str(error).strip()[:300]}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, help="compute capability × 10; default: of the GPU here")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--done", type=Path, help="written at the end, so that it is not done again: what failed")
    parser.add_argument(
        "--sample", action="store_true", help="one form of each kernel, without the mark that all are there"
    )
    given = parser.parse_args(arguments)
    if given.arch is None and not torch.cuda.is_available():
        parser.error("there is no GPU here: say for which one with --arch, such as 80 (A100), 89 (RTX 4090), 90 (H100)")
    arch = given.arch or _arch_here()
    variants = every_variant([getattr(torch, given.dtype)], modules_of(arch))
    done = given.done or (None if given.sample else _marker(variants, arch))
    started = time.monotonic()
    forms = one_of_each(variants) if given.sample else variants
    wrong = compile_all(forms, arch)
    if done is not None:
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text("\n".join(wrong), encoding="utf-8")
    print("\n".join([*wrong, f"{len(forms)} forms in {time.monotonic() - started:.1f} s, {len(wrong)} failed"]))
    return 1 if wrong else 0


def _arch_here() -> int:
    from .device import device_of

    return device_of(0).arch


if __name__ == "__main__":
    sys.exit(main())
