"""The child that reads a pickled checkpoint and writes safetensors: `python -I unpickling.py JOB.json`.

It runs by itself, without the rest of the package.  Before it reads the file it gives up the network, other processes,
and all memory, time and disk beyond its job's.  `weights_only` is what keeps code from running; the rest is for the day
when that fails again (CVE-2025-32434 was such a day).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, PR_SET_NO_NEW_PRIVS = 0x10000000, 0x40000000, 38
PYTHON_ALONE = "refused by Python alone"
MAX_ENTRIES = 50_000
MAX_PICKLE_BYTES = 64 << 20
"""Of a checkpoint's table of contents.  SD 1's, with its training state, has 0.6 MB."""

# What trainers left beside the weights.  Each becomes an object that does nothing.
LEFTOVERS = (
    "pytorch_lightning.",
    "lightning.",
    "numpy.",
    "omegaconf.",
    "_codecs.encode",
    "argparse.Namespace",
    "typing.",
)
FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.kill", "pty.", "shutil.", "urllib.", "http.", "ftplib.", "smtplib.", "ctypes.dlopen", "webbrowser.",
)  # fmt: skip


class Refused(Exception):
    """The file is not converted; the message says why."""


class Ignored:
    """Stands for an object of a trainer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def __hash__(self) -> int:
        return 0


def main(job: Mapping[str, Any]) -> dict[str, Any]:
    """job: "source", "target", "memory_bytes" and "file_bytes" that may be used, "seconds".

    returns  {"tensors", "bytes", "metadata", "skipped", "network"}
    raises   Refused
    """
    network = leave_network()
    source, target = Path(job["source"]), Path(job["target"])
    check_archive(source)
    import torch  # before the limits: it maps much that it never uses
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    limit(job)
    deny(target)
    state, metadata, skipped = tensors_of(read(source), job["memory_bytes"])
    own = dict(separate(state))
    save_file(own, target, metadata=metadata)
    verify(own, target)
    size = sum(tensor.nbytes for tensor in own.values())
    return {"tensors": len(own), "bytes": size, "metadata": metadata, "skipped": skipped, "network": network}


# ---- what it gives up ----------------------------------------------------------------------------------------------


def leave_network() -> str:
    """Go where there is no network.  returns "none" or, where that is not permitted, "refused by Python alone"."""
    if sys.platform != "linux":
        return PYTHON_ALONE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) == 0:
        return "none"
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return PYTHON_ALONE
    with suppress(OSError):  # so that what it writes is still the user's
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    return "none"


def limit(job: Mapping[str, Any]) -> None:
    limits = {
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_CPU: job["seconds"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = mapped + job["memory_bytes"]
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def deny(target: Path) -> None:
    """Refuse, in Python, what reading weights never needs.  Code that is not Python's is not bound by it."""
    import torch._weights_only_unpickler  # noqa: F401  not to be imported under the hook

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise Refused(f"it tried {event}")
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and str(args[0]) != str(target):
            raise Refused(f"it tried to write {str(args[0])[:200]}")

    sys.addaudithook(hook)


# ---- reading -------------------------------------------------------------------------------------------------------


def check_archive(source: Path) -> None:
    """torch stores its files plainly in a zip: compressed ones are no checkpoint, but perhaps a bomb."""
    if not zipfile.is_zipfile(source):
        return
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise Refused(f"an archive of {len(entries)} files; allowed: {MAX_ENTRIES}")
    if packed := next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None):
        raise Refused(
            f"{packed.filename[:100]!r} in it is compressed, to {packed.file_size} bytes; torch compresses none"
        )
    if sum(entry.file_size for entry in entries) > source.stat().st_size:
        raise Refused("its parts overlap")
    table = next((entry for entry in entries if entry.filename.endswith("data.pkl")), None)
    if table is not None and table.file_size > MAX_PICKLE_BYTES:
        raise Refused(f"a table of contents of {table.file_size} bytes; allowed: {MAX_PICKLE_BYTES}")


def read(source: Path) -> Any:
    """What torch's restricted unpickler makes of the file."""
    import torch

    found = leftovers(source)
    with torch.serialization.safe_globals([(Ignored, name) for name in found]):
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
        if zipfile.is_zipfile(source):
            return torch.load(source, mmap=True, **options)
        return torch.load(source, **options)  # the format before torch 1.6 cannot be mapped


def leftovers(source: Path) -> list[str]:
    """The names that torch does not know, all of them a trainer's.  raises Refused for any other"""
    import torch

    if not zipfile.is_zipfile(source):
        return []
    found = list(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    if strange := [name for name in found if not name.startswith(LEFTOVERS)]:
        raise Refused(f"it names {', '.join(strange[:5])}, which is no weight: it may be an attack")
    return found


def tensors_of(loaded: Any, memory_bytes: int) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Tensors by name; numbers and texts that lie beside them; names of what is neither.

    raises  Refused
    """
    import torch

    metadata: dict[str, str] = {"format": "pt"}
    skipped: list[str] = []
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        beside = {key: value for key, value in loaded.items() if key != "state_dict"}
        metadata |= {str(k): str(v)[:1000] for k, v in beside.items() if isinstance(v, bool | int | float | str)}
        skipped += [str(key) for key in beside if str(key) not in metadata]
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise Refused(f"it holds a {type(loaded).__name__} and no table of weights")
    found: dict[str, Any] = {}
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            found[name] = value
        else:
            skipped.append(str(name)[:100])
    if not found:
        raise Refused("it holds no weights")
    strange = [n for n, t in found.items() if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu"]
    if strange:
        raise Refused(f"tensors that are sparse, quantized or without memory: {', '.join(strange[:3])}")
    if (size := sum(tensor.nbytes for tensor in found.values())) > memory_bytes:
        raise Refused(f"its tensors claim {size} bytes; allowed: {memory_bytes}")
    return found, metadata, skipped


def separate(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor in memory of its own, as safetensors wants it; mapped ones stay mapped."""
    seen: set[int] = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        yield name, tensor.detach() if whole else tensor.detach().clone().contiguous()


def verify(own: Mapping[str, Any], target: Path) -> None:
    """Read the file again: every tensor, bit for bit."""
    import torch
    from safetensors import safe_open

    with safe_open(target, framework="pt") as file:
        if set(file.keys()) != set(own):
            raise Refused("the file that was written has other names")
        for name, tensor in own.items():
            written = file.get_tensor(name)
            same = written.dtype == tensor.dtype and written.shape == tensor.shape
            if not same or not torch.equal(_bits(written), _bits(tensor)):
                raise Refused(f"the file that was written differs in {name}")


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
    except Refused as error:
        print(json.dumps({"refused": str(error)}))
    except MemoryError:
        print(json.dumps({"refused": "it needs more memory than is allowed"}))
    except Exception as error:  # noqa: BLE001  whatever a hostile file brings about
        memory = "allocate memory" in str(error) or "Cannot allocate" in str(error) or "mmap" in str(error)
        said = "it needs more memory than is allowed" if memory else f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps({"refused": said}))
