"""What a checkpoint consists of, before anything of it is used: its modules, and where their numbers lie.

A folder, a single file and an embedded model look alike here: `load` builds modules from it, `switch` writes it into
modules that live.  Tensors are views of the mapped file; only what is used is read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from ..alt_diffusion import CLASSES as ALT_PIPELINES
from ..alt_diffusion import AltTextEncoder
from ..errors import CheckpointError
from ..models import EMBEDDED, component_paths
from ..notices import quiet_import
from .soundness import HOW_TO_CONVERT, check_safetensors

with quiet_import():
    import diffusers
    import transformers

Identity: TypeAlias = tuple[Any, ...]
"""Equal for what was read from the same bytes: each file's path, size, time of change and inode, and what was read."""

Tensors: TypeAlias = Mapping[str, torch.Tensor]

WEIGHTS = ("diffusion_pytorch_model", "model")
# Names that other files or earlier versions of the libraries use -> the names of today.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^text_model\.", ""),
    (r"^(?!text_model\.|text_projection)", "text_model."),
    (r"^bert\.", ""),
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)
# In files beside the weights that are asked for: tables that are computed, other towers of CLIP, EMA's counters.
NOT_WEIGHTS = re.compile(
    r"(^|\.)position_ids$|(^|\.)logit_scale$|^(vision_model|visual_projection)\.|(^|\.)text_projection(\.weight)?$"
)
OF_NO_EFFECT = {
    "_diffusers_version",
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "transformers_version",
}
ALT_ENCODERS = ("AltTextEncoder", "RobertaSeriesModelWithTransformation")
SAVED_WITH_ADAPTERS = (
    "It was saved with adapters of PEFT in it: save it again after pipe.unload_lora_weights(), and pipe.fuse_lora() "
    "before that if they are to stay."
)
OPTIONAL = re.compile(r"^pooler\.")
"""BERT's pooler: no pipeline reads it, and many files lack it."""


@dataclass(frozen=True)
class Component:
    """One module of a checkpoint.

    config    as its class takes it
    identity  of its numbers
    read      () -> the tensors by their names in the module, or by those that `fitted` knows
    where     for messages
    """

    name: str
    kind: type[nn.Module]
    config: Mapping[str, Any]
    identity: Identity
    read: Callable[[], Tensors]
    where: str


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    pipeline  the class that it is for
    modules   by name
    others    name -> (what tells equal ones, how it is built): scheduler and tokenizers
    options   of the pipeline's constructor
    files     all that was looked at: it is the same checkpoint as long as this is equal
    """

    source: str
    pipeline: type[Any]
    modules: Mapping[str, Component]
    others: Mapping[str, tuple[Identity, Callable[[], Any]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Identity = ()


# ---- folders and embedded models -----------------------------------------------------------------------------------


def of_embedded(name: str) -> Checkpoint:
    """raises KeyError"""
    paths = component_paths(name)
    chinese = EMBEDDED[name].language == "zh"
    encoder = transformers.BertModel if chinese else transformers.CLIPTextModel
    kinds = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel, "text_encoder": encoder}
    tokenizer = transformers.BertTokenizer if chinese else transformers.CLIPTokenizer
    scheduler = getattr(diffusers, EMBEDDED[name].scheduler)
    return Checkpoint(
        name,
        diffusers.StableDiffusionPipeline,
        {part: module_folder(part, kind, paths[part]) for part, kind in kinds.items()},
        {part: other_folder(kind, paths[part]) for part, kind in (("tokenizer", tokenizer), ("scheduler", scheduler))},
    )


def of_folder(path: Path) -> Checkpoint:
    """A folder in diffusers' layout.  raises CheckpointError"""
    entries = model_index(path)
    name = str(entries.get("_class_name"))
    pipeline = diffusers.StableDiffusionPipeline if name in ALT_PIPELINES else getattr(diffusers, name, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)):
        raise CheckpointError(f"{path} is for a {name!r}, which diffusers does not know.")
    modules: dict[str, Component] = {}
    others: dict[str, tuple[Identity, Callable[[], Any]]] = {}
    for name, entry in entries.items():
        if name in ("safety_checker", "feature_extractor") or not isinstance(entry, list) or entry[0] is None:
            continue
        kind = class_of(path, *entry)
        if issubclass(kind, nn.Module):
            modules[name] = module_folder(name, kind, path / name)
        else:
            others[name] = other_folder(kind, path / name)
    options = {k: v for k, v in entries.items() if not k.startswith("_") and not isinstance(v, list | None)}
    return Checkpoint(str(path), pipeline, modules, others, options, folder_identity(path))


def folder_identity(path: Path) -> Identity:
    return identity(file for file in sorted(path.glob("*")) + sorted(path.glob("*/*")) if file.is_file())


def model_index(path: Path) -> dict[str, Any]:
    """raises CheckpointError"""
    index = path / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{path} is no diffusers folder: it has no model_index.json.")
    return read_json(index)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no table of settings.")
    return found


def class_of(path: Path, library: Any, name: Any) -> type[Any]:
    """Classes of the two libraries and ours alone: a folder must not name code of its own."""
    if name in ALT_ENCODERS:
        return AltTextEncoder
    home: Any = importlib.import_module(library) if library in ("diffusers", "transformers") else None
    if home is None:
        home = getattr(diffusers.pipelines, str(library), None)
    kind = getattr(home, str(name), None)
    if not isinstance(kind, type):
        raise CheckpointError(f"{path}/model_index.json names {library}.{name}, which this diffusers does not know.")
    return kind


def module_folder(name: str, kind: type[nn.Module], folder: Path) -> Component:
    """A module's folder: config.json and its weights.  raises CheckpointError"""
    files = weight_files(folder)
    for file in files:
        check_safetensors(file)
    return Component(name, kind, read_json(folder / "config.json"), identity(files), _reader(files), str(folder))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The .safetensors of a module's folder: whole, in shards, or a variant where it is all there is.

    raises  CheckpointError
    """
    for stem in WEIGHTS:
        others = sorted(file.name[len(stem) : -len(".safetensors")] for file in folder.glob(f"{stem}.*.safetensors"))
        for variant in ("", ".fp16", *others):
            if (whole := folder / f"{stem}{variant}.safetensors").is_file():
                return (whole,)
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                return _shards(index)
    how = f" {HOW_TO_CONVERT.format(folder.parent)}." if list(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder} holds no .safetensors weights; pickled weights are not read.{how}")


def _shards(index: Path) -> tuple[Path, ...]:
    table = read_json(index).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names no files of its own folder.")
    return tuple(index.parent / name for name in names)


def identity(files: Iterable[Path], *of: Any) -> Identity:
    found: list[Any] = []
    for file in files:
        real = file.resolve()
        stat = real.stat()
        found.append((str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return (*found, *of)


def is_fresh(known: Identity) -> bool:
    """Whether files are what they were when their identity was taken."""
    try:
        return identity(Path(entry[0]) for entry in known) == known
    except OSError:
        return False


def _reader(files: tuple[Path, ...]) -> Callable[[], Tensors]:
    @functools.cache
    def read() -> Tensors:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return read


def other_folder(kind: type[Any], folder: Path) -> tuple[Identity, Callable[[], Any]]:
    """A scheduler or tokenizer; equal contents of the folder make equal ones."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.*")):
        digest.update(file.name.encode() + b"\0" + _told(file))

    def build() -> Any:
        try:
            return kind.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{folder} cannot be read: {str(error)[:300]}.") from error

    return (kind.__name__, digest.hexdigest()), build


def _told(file: Path) -> bytes:
    """A file's contents; of settings, all but how they are written and where they came from."""
    if not file.name.endswith("_config.json"):
        return file.read_bytes()
    settings = {name: value for name, value in read_json(file).items() if name not in OF_NO_EFFECT}
    return json.dumps(settings, sort_keys=True).encode()


# ---- modules of it -------------------------------------------------------------------------------------------------


def build(component: Component, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module, with its weights, in eval mode.  raises CheckpointError"""
    module = empty(component)
    found = fitted(component, named_tensors(module))
    with torch.no_grad():
        # Copied even where dtype and device fit: who changes the file must not change the model.
        values = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
            for name, tensor in found.items()
        }
        lacking = {name: tensor for name, tensor in named_tensors(module).items() if name not in values}
        values |= {name: torch.zeros(tensor.shape, dtype=dtype, device=device) for name, tensor in lacking.items()}
        module.load_state_dict(values, assign=True)
    return module.to(device).eval()


def empty(component: Component) -> nn.Module:
    """The module without memory for its parameters.  raises CheckpointError where the configuration makes none"""
    try:
        with init_empty_weights(), torch.no_grad():
            if issubclass(component.kind, transformers.PreTrainedModel):
                return component.kind(component.kind.config_class(**component.config))  # type: ignore[attr-defined]
            return component.kind.from_config({"_class_name": component.kind.__name__, **component.config})  # type: ignore[attr-defined,no-any-return]
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{component.where}: its configuration makes no {component.kind.__name__}: {error}."
        ) from error


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers by name, the living ones."""
    return dict(module.state_dict(keep_vars=True))


def fitted(component: Component, wanted: Tensors) -> dict[str, torch.Tensor]:
    """The component's tensors under the names and in the shapes of `wanted`.

    Warns of tensors that have no place.
    raises   CheckpointError where one is missing or of another shape
    """
    found: dict[str, torch.Tensor] = {}
    spare = []
    for name, tensor in component.read().items():
        known = _known_name(name, wanted)
        if known is not None:
            found[known] = _shaped(tensor, wanted[known].shape)
        elif not NOT_WEIGHTS.search(name):
            spare.append(name)
    missing = [name for name in wanted if name not in found and not OPTIONAL.match(name)]
    other = [n for n, t in found.items() if t.shape != wanted[n].shape or not _same_kind(t, wanted[n])]
    if missing:
        full = ", ".join(f"{component.name}.{name}" for name in missing[:3])
        hint = f" {SAVED_WITH_ADAPTERS}" if any(".base_layer." in name for name in spare) else ""
        raise CheckpointError(
            f"{component.where} lacks weights of this architecture, {len(missing)} in all, among them {full}.{hint}"
        )
    if other:
        full = ", ".join(f"{component.name}.{n} {list(found[n].shape)} for {list(wanted[n].shape)}" for n in other[:3])
        raise CheckpointError(f"{component.where} is of another architecture; weights that do not fit: {full}.")
    if spare:
        warn_of_spare(component.where, spare)
    return found


def warn_of_spare(where: str, names: list[str]) -> None:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    warnings.warn(f"{where}: not used, for want of a place: {', '.join(names[:10])}{more}.", stacklevel=4)


def _known_name(name: str, wanted: Tensors) -> str | None:
    if name in wanted:
        return name
    for pattern, text in RENAMES:
        if (other := re.sub(pattern, text, name)) in wanted:
            return other
    return None


def _shaped(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A 1×1 convolution in the file may be a linear layer here, or the other way round."""
    ones = tensor.shape[len(shape) :] + shape[tensor.dim() :]
    same = tensor.shape[: len(shape)] == shape[: tensor.dim()]
    return tensor.reshape(shape) if same and all(size == 1 for size in ones) else tensor


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.is_floating_point() == other.is_floating_point()
