"""Loading checkpoints: an embedded model, a diffusers folder, a .safetensors file or a hub id.

Only safetensors are read, never pickles, and each file is checked before diffusers sees it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..alt_diffusion import CLASSES as ALT_PIPELINES
from ..alt_diffusion import load_alt_diffusion
from ..errors import CheckpointError, ConfigError, UnknownModelError
from ..models import EMBEDDED, load_embedded
from ..notices import quiet_import
from .contents import (
    SAVED_WITH_ADAPTERS,
    Checkpoint,
    Component,
    build,
    fitted,
    model_index,
    module_folder,
    named_tensors,
    of_embedded,
    of_folder,
)
from .hub import is_hub_id, snapshot, variant_of
from .single_file import of_part, of_single_file
from .soundness import HOW_TO_CONVERT, check_safetensors, refuse_pickle
from .writing import remember, remember_tokenizer

with quiet_import():
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

__all__ = ["check_safetensors", "choose_device", "choose_dtype", "load", "open_checkpoint"]

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    config: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: bool = False,
) -> StableDiffusionPipeline:
    """Load a pipeline, ready to draw.  Nothing is downloaded but for a hub id that is not there yet.

    source        name of an embedded model | diffusers folder | .safetensors file | hub id "owner/name"
    dtype         "auto": float16 on CUDA, bfloat16 on processors that compute in it, else float32
    device        "auto": CUDA where there is one, else the CPU
    config        for a .safetensors file of an unknown architecture: a diffusers folder of the same one
    vae           takes the place of the checkpoint's, or of one that it lacks: embedded name | folder of a pipeline or
                  of the part alone | .safetensors file
    text_encoder  likewise
    ema           the UNet's moving average, where a single file holds it beside the weights last trained
    raises        UnknownModelError, CheckpointError, ConfigError
    """
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    swaps = {name: part for name, part in (("vae", vae), ("text_encoder", text_encoder)) if part is not None}
    path = Path(source).expanduser()
    if str(source) not in EMBEDDED and path.suffix == ".safetensors":
        folder = Path(config).expanduser() if config is not None else None
        return assemble(with_parts(of_single_file(path, ema=ema, config=folder), swaps), number, place)
    pipe = _open(str(source), number)
    checkpoint = _known(source)
    if checkpoint is not None and str(source) not in EMBEDDED:
        _check_whole(pipe, [part for name, part in checkpoint.modules.items() if name not in swaps])
    if swaps:
        checkpoint = with_parts(checkpoint or open_checkpoint(source), swaps)
        pipe.register_modules(**{name: build(checkpoint.modules[name], number, place) for name in swaps})
    pipe.to(place)
    if checkpoint is not None:
        _remember(pipe, checkpoint)
    return pipe


def _known(source: str | Path) -> Checkpoint | None:
    """None for classes that are not known by name: they have no origin, and are written anew at a switch."""
    try:
        return open_checkpoint(source)
    except CheckpointError:
        return None


def _check_whole(pipe: Any, parts: Iterable[Component]) -> None:
    """diffusers and transformers draw numbers for weights that a folder lacks, and tell it a log that nobody reads.

    Warns of tensors that have no place.
    raises   CheckpointError
    """
    for component in parts:
        module = pipe.components.get(component.name)
        if isinstance(module, component.kind) and "quantization_config" not in component.config:
            fitted(component, _by_one_name(named_tensors(module), component.read().keys()))


def _by_one_name(tensors: Mapping[str, Any], preferred: Collection[str]) -> dict[str, Any]:
    """Of two names for one tensor the one that the file knows."""
    here = {id(tensor): name for name, tensor in tensors.items() if name in preferred}
    return {name: tensor for name, tensor in tensors.items() if here.get(id(tensor), name) == name}


def open_checkpoint(source: str | Path, *, ema: bool = False) -> Checkpoint:
    """What a checkpoint consists of; no tensor is read yet.

    source  as `load` takes it
    raises  UnknownModelError, CheckpointError
    """
    if str(source) in EMBEDDED:
        return of_embedded(str(source))
    path = Path(source).expanduser()
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        return of_single_file(path, ema=ema)
    if path.is_dir():
        return of_folder(path)
    if is_hub_id(str(source)):
        return of_folder(snapshot(str(source)))
    raise UnknownModelError(str(source), EMBEDDED)


def assemble(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """A pipeline of a checkpoint's parts.  raises CheckpointError"""
    parts = {name: build(component, dtype, device) for name, component in checkpoint.modules.items()}
    parts |= {name: build_other() for name, (_, build_other) in checkpoint.others.items()}
    pipe = new_pipeline(checkpoint.pipeline, parts, checkpoint.options)
    _remember(pipe, checkpoint)
    return pipe


def _remember(pipe: Any, checkpoint: Checkpoint) -> None:
    for name, component in checkpoint.modules.items():
        remember(pipe.components[name], component.identity)
    for name, (identity, _) in checkpoint.others.items():
        if name.startswith("tokenizer"):
            remember_tokenizer(pipe.components[name], identity)


def new_pipeline(kind: type[Any], parts: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A pipeline of this class, without a safety checker."""
    expected, optional = kind._get_signature_keys(kind)
    settings = {name: value for name, value in options.items() if name in optional}
    if "requires_safety_checker" in optional:
        settings["requires_safety_checker"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**{name: parts.get(name) for name in expected}, **settings)


def with_parts(checkpoint: Checkpoint, swaps: Mapping[str, str | Path]) -> Checkpoint:
    """The checkpoint with other parts in the place of its own.  raises CheckpointError, UnknownModelError"""
    parts = {name: _part(name, Path(source).expanduser(), checkpoint) for name, source in swaps.items()}
    return replace(checkpoint, modules={**checkpoint.modules, **parts})


def _part(name: str, source: Path, checkpoint: Checkpoint) -> Component:
    if str(source) in EMBEDDED:
        return of_embedded(str(source)).modules[name]
    refuse_pickle(source)
    own = checkpoint.modules.get(name)
    if own is None:
        raise CheckpointError(f"{checkpoint.source} has no {name} that {source} could stand for.")
    if not source.is_dir():
        return of_part(source, name, own.kind, own.config)
    if (source / "model_index.json").is_file():
        return of_folder(source).modules[name]
    return module_folder(name, own.kind, source)


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


def _open(source: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    if source in EMBEDDED:
        return load_embedded(source, dtype)
    path = Path(source).expanduser()
    refuse_pickle(path)
    if path.is_dir():
        return _folder(path, dtype)
    if is_hub_id(source):
        return _folder(snapshot(source), dtype)
    raise UnknownModelError(source, EMBEDDED)


def _folder(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    index = model_index(path)
    files = sorted(path.glob("*/*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} holds no .safetensors weights; pickled weights are not read. {HOW_TO_CONVERT.format(path)}."
        )
    if adapters := sorted(path.glob("*/adapter_config.json")):
        raise CheckpointError(f"{adapters[0].parent} holds an adapter in place of weights. {SAVED_WITH_ADAPTERS}")
    for file in files:
        check_safetensors(file)
    variants = {variant_of(file.name) for file in files}
    variant = None if "" in variants else min(variants)
    if index.get("_class_name") in ALT_PIPELINES:
        return load_alt_diffusion(path, dtype, variant)
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "safety_checker": None}
    # Parts that were left out on purpose, as SD 3's third encoder: diffusers wants to be told once more.
    options |= {name: None for name, entry in index.items() if isinstance(entry, list) and entry[:1] == [None]}
    if variant:
        options["variant"] = variant
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DiffusionPipeline.from_pretrained(
                str(path), requires_safety_checker=False, local_files_only=True, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {str(error)[:500]}") from error
