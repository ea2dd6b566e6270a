"""Loading checkpoints: an embedded model, a diffusers folder, a .safetensors file or a hub id.

Only safetensors are read, never pickles, and each file is checked before diffusers sees it.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError, UnknownModelError
from ..models import EMBEDDED, load_embedded
from ..notices import quiet_import

with quiet_import():
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def load(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "auto", config: str | Path | None = None
) -> StableDiffusionPipeline:
    """Load a pipeline, ready to draw.

    source  name of an embedded model | diffusers folder | .safetensors file | hub id "owner/name"
    dtype   "auto": float16 on CUDA, bfloat16 on processors that compute in it, else float32
    device  "auto": CUDA where there is one, else the CPU
    config  for a .safetensors file without network: a diffusers folder of the same architecture
    raises  UnknownModelError, CheckpointError, ConfigError
    """
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    pipe = _open(str(source), number, config)
    pipe.to(place)
    return pipe


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}; allowed: 'auto', 'cpu', 'cuda', 'cuda:1', …") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, and this PyTorch sees no GPU. `allaprima doctor` says more.")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.bfloat16 if native_bfloat16() else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}; allowed: 'auto', {', '.join(map(repr, DTYPES))}.")
    return DTYPES[dtype]


def native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _open(source: str, dtype: torch.dtype, config: str | Path | None) -> StableDiffusionPipeline:
    if source in EMBEDDED:
        return load_embedded(source, dtype)
    path = Path(source).expanduser()
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointError(
            f"{source} is a pickle, which can run any code when it is read. Convert it to .safetensors first."
        )
    if path.suffix == ".safetensors":
        return _single_file(path, dtype, config)
    if path.is_dir():
        return _folder(path, dtype)
    if "/" in source and not path.exists() and source.count("/") == 1 and not source.startswith((".", "~", "/")):
        return _hub(source, dtype)
    raise UnknownModelError(source, EMBEDDED)


def check_safetensors(path: Path) -> None:
    """Read the header and every tensor's bounds.  raises CheckpointError for a missing, truncated or hostile file."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise CheckpointError(f"{path} holds no tensors.")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no sound safetensors file ({error}). Download it again.") from error


def _folder(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    index = path / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{path} is no diffusers folder: it has no model_index.json.")
    try:
        json.loads(index.read_text())
    except ValueError as error:
        raise CheckpointError(f"{index} is not JSON: {error}.") from error
    files = sorted(path.glob("*/*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors weights; pickled weights are not read.")
    for file in files:
        check_safetensors(file)
    return _pretrained(str(path), dtype)


def _hub(source: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    return _pretrained(source, dtype)


def _pretrained(source: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "safety_checker": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = DiffusionPipeline.from_pretrained(source, requires_safety_checker=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {str(error)[:500]}") from error
    return pipe


def _single_file(path: Path, dtype: torch.dtype, config: str | Path | None) -> StableDiffusionPipeline:
    check_safetensors(path)
    options: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None}
    if config is not None:
        options |= {"config": str(config), "local_files_only": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = StableDiffusionPipeline.from_single_file(str(path), **options)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SingleFileComponentError) as error:
        # diffusers says no more of weights that are not there than that their tensors are empty
        what = "it lacks weights of this architecture" if "meta tensor" in str(error) else str(error)[:400]
        raise CheckpointError(
            f"{path} cannot be loaded as a Stable Diffusion checkpoint: {what}. Without network, give the "
            "architecture's diffusers folder: load(file, config=folder)."
        ) from error
    _check_complete(path, pipe)
    return pipe


def _check_complete(path: Path, pipe: StableDiffusionPipeline) -> None:
    """diffusers leaves weights of the text encoder that are not in the file without memory, and says nothing."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    missing = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
        if tensor.device.type == "meta"
    ]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} weights, among them {', '.join(missing[:3])}.")
