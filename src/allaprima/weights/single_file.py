"""Single files in the layout of the original latent-diffusion code, read offline.

The family is told by the tensors' names and shapes, its configurations and its tokenizer come with the package, and
diffusers' own functions translate the names.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..models.architectures import architecture, clip_tokenizer
from ..notices import quiet_import
from .contents import (
    NOT_WEIGHTS,
    Checkpoint,
    Component,
    Identity,
    Tensors,
    class_of,
    folder_identity,
    identity,
    model_index,
    other_folder,
    read_json,
    warn_of_spare,
)
from .soundness import check_safetensors, metadata

with quiet_import():
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
        infer_diffusers_model_type,
    )

FAMILIES = {
    "v1": "sd1", "inpainting": "sd1-inpaint", "v2": "sd2", "inpainting_v2": "sd2-inpaint",
    "xl_base": "sdxl", "xl_inpaint": "sdxl-inpaint", "xl_refiner": "sdxl-refiner",
}  # fmt: skip
"""diffusers' names for what it recognises -> ours."""

UNET = "model.diffusion_model."
UNET_FIRST = f"{UNET}input_blocks.0.0.weight"
EMA = "model_ema."
VAES = ("first_stage_model.", "vae.")
CLIPS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIPS = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")

# What training left in the file, and OpenCLIP's last layer, which SD 2 does not read.
NOT_READ = re.compile(
    r"^(model_ema|optimizer|embedding_manager|lr_scheduler)|^(first_stage_model|vae)\.(loss|quantize)\."
    r"|^(betas|alphas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|denoiser\.|global_step|v_pred$|ztsnr$|edm_)"
    r"|^cond_stage_model\.model\.transformer\.resblocks\.23\.|(^|\.)attn_mask$"
)
V_STATISTIC = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_LEAST = 0.09
"""SD 2's files do not say what the UNet predicts.  In those that predict v this bias spreads wider (ComfyUI's test)."""


def of_single_file(path: Path, *, ema: bool = False, config: Path | None = None) -> Checkpoint:
    """A file of SD 1, SD 2, SDXL or SDXL's refiner, each with 4 or 9 input channels.

    ema      the exponential moving average of the UNet, where the file holds both
    config   a diffusers folder of the architecture, for one that is not known here
    raises   CheckpointError
    """
    check_safetensors(path)
    tensors = load_file(path)
    if UNET_FIRST not in tensors:
        raise CheckpointError(f"{path} holds no Stable Diffusion UNet{_what_instead(tensors)}.")
    if ema and not any(name.startswith(EMA) for name in tensors):
        raise CheckpointError(f"{path} holds no EMA weights beside the others: load it without ema.")
    settings = _settings(config) if config else architecture(_family(path, tensors))
    parts = _Parts(path, tensors, ema)
    modules = {name: parts.component(name, kind, own) for name, kind, own in _kinds(settings)}
    others = _from_folder(config) if config else _others(settings, prediction(path, tensors, settings))
    files = identity([path]) + (folder_identity(config) if config else ())
    return Checkpoint(str(path), _pipeline(settings), modules, others, settings.get("options", {}), files)


def of_part(path: Path, name: str, kind: type[Any], config: Mapping[str, Any]) -> Component:
    """A module from a file of its own: in diffusers' names, or in the original ones with or without their prefix.

    raises   CheckpointError
    """
    check_safetensors(path)
    return Component(name, kind, config, identity([path], name), lambda: _translated(path, name, config), str(path))


def prediction(path: Path, tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says, or lets guess, of what its UNet predicts: settings for the scheduler."""
    said = metadata(path).get("modelspec.prediction_type", "")
    context = settings["unet"].get("cross_attention_dim")
    if "v_pred" in tensors or said.startswith("v"):
        return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in tensors}
    bias = tensors.get(V_STATISTIC)
    guess = context == 1024 and tensors[UNET_FIRST].shape[1] == 4 and bias is not None and not said
    wide = guess and bias is not None and float(bias.float().std(unbiased=False)) > V_LEAST
    return {"prediction_type": "v_prediction" if wide else "epsilon"}


# ---- what it is ----------------------------------------------------------------------------------------------------


def _family(path: Path, tensors: Tensors) -> str:
    found = infer_diffusers_model_type(tensors)
    if found not in FAMILIES:
        raise CheckpointError(f"{path} is a {found} checkpoint; known are {', '.join(FAMILIES.values())}.")
    family = FAMILIES[found]
    if family == "sd2" and prediction(path, tensors, architecture("sd2"))["prediction_type"] == "epsilon":
        return "sd2-base"
    return family


def _what_instead(tensors: Tensors) -> str:
    names = list(tensors)
    if any("lora" in name or "hada_" in name or "lokr_" in name for name in names):
        return ": it is a LoRA, which goes on top of a checkpoint (`--lora`, ap.loras)"
    if any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.(down|up|conv_in)", name) for name in names):
        return ": it is a VAE, which goes with a checkpoint (load(checkpoint, vae=file))"
    return f" in the original layout; its first tensors are {', '.join(names[:3])}"


def _settings(folder: Path) -> dict[str, Any]:
    """The configurations of a diffusers folder, weights or no weights."""
    index = model_index(folder)
    settings: dict[str, Any] = {"pipeline": index.get("_class_name")}
    for name, entry in index.items():
        if isinstance(entry, list) and (folder / name / "config.json").is_file():
            settings[name] = {"_class_name": entry[1], **read_json(folder / name / "config.json")}
    return settings


def _from_folder(folder: Path) -> dict[str, tuple[Identity, Callable[[], Any]]]:
    entries = {name: entry for name, entry in model_index(folder).items() if isinstance(entry, list)}
    named = {n: e for n, e in entries.items() if n.startswith(("tokenizer", "scheduler")) and e[0] is not None}
    return {name: other_folder(class_of(folder, *entry), folder / name) for name, entry in named.items()}


def _kinds(settings: Mapping[str, Any]) -> list[tuple[str, type[Any], dict[str, Any]]]:
    found = []
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name in settings:
            own = dict(settings[name])
            kind = own.pop("_class_name")
            found.append((name, getattr(diffusers, kind, None) or getattr(transformers, kind), own))
    return found


def _pipeline(settings: Mapping[str, Any]) -> type[Any]:
    kind: type[Any] = getattr(diffusers, settings["pipeline"])
    return kind


def _others(settings: Mapping[str, Any], predicts: Mapping[str, Any]) -> dict[str, tuple[Identity, Callable[[], Any]]]:
    scheduler = {**settings["scheduler"], **predicts}
    kind = getattr(diffusers, scheduler.pop("_class_name"))
    text = json.dumps(scheduler, sort_keys=True)
    found: dict[str, tuple[Identity, Callable[[], Any]]] = {
        "scheduler": ((kind.__name__, text), functools.partial(kind.from_config, scheduler))
    }
    for name in ("tokenizer", "tokenizer_2"):
        if name in settings:
            pad = settings[name]["pad_token"]
            found[name] = (("CLIPTokenizer", pad), functools.partial(clip_tokenizer, pad))
    return found


# ---- its parts -----------------------------------------------------------------------------------------------------


class _Parts:
    """A file's tensors, and those of them that no module takes."""

    def __init__(self, path: Path, tensors: Tensors, ema: bool) -> None:
        self.path, self.tensors, self.ema = path, tensors, ema

    def component(self, name: str, kind: type[Any], config: dict[str, Any]) -> Component:
        """Where the file holds nothing of it, reading it raises CheckpointError."""
        prefix = self._prefix(name)
        read = (
            functools.partial(self._read, name, prefix, config) if prefix else functools.partial(self._lack, name, kind)
        )
        return Component(
            name, kind, config, identity([self.path], name, self.ema), functools.cache(read), str(self.path)
        )

    def _lack(self, name: str, kind: type[Any]) -> Tensors:
        raise CheckpointError(
            f"{self.path} lacks weights: it holds no {name} ({kind.__name__}). Give one: "
            f"load(file, {name}=FOLDER_OR_FILE)."
        )

    def _prefix(self, name: str) -> str | None:
        second = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
        known = {"unet": (UNET,), "vae": VAES, "text_encoder": (*CLIPS, OPEN_CLIPS[0]), "text_encoder_2": second}
        return next((p for p in known[name] if any(key.startswith(p) for key in self.tensors)), None)

    def _read(self, name: str, prefix: str | None, config: dict[str, Any]) -> Tensors:
        assert prefix is not None
        own = {key: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}
        if name == "unet" and self.ema:
            # The averages' names have no dots: "model_ema." + the others' without their "model." and their dots.
            own = {key: self._averaged(key, tensor) for key, tensor in own.items()}
        found = _convert(name, prefix, own, config)
        taken = {_place(tensor) for tensor in found.values()}
        spare = [key for key, tensor in own.items() if _place(tensor) not in taken and not _ignored(key)]
        if name == "unet":
            known = (UNET, *VAES, *CLIPS, *OPEN_CLIPS)
            spare += [key for key in self.tensors if not key.startswith(known) and not _ignored(key)]
        if spare:
            warn_of_spare(str(self.path), spare)
        return found

    def _averaged(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.tensors.get(EMA + "".join(key.split(".")[1:]), tensor)


def _convert(name: str, prefix: str, own: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """Names of today for the original ones."""
    if name == "unet":
        found = convert_ldm_unet_checkpoint(dict(own), config)
    elif name == "vae":
        found = convert_ldm_vae_checkpoint(dict(own), config)
    elif prefix in CLIPS:
        found = convert_ldm_clip_checkpoint(dict(own))
    else:
        width = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        found = convert_open_clip_checkpoint(width, dict(own), prefix=prefix)
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _translated(path: Path, name: str, config: Mapping[str, Any]) -> Tensors:
    tensors: Tensors = load_file(path)
    prefixed = next((p for p in VAES if any(key.startswith(p) for key in tensors)), None)
    if name == "vae" and (prefixed or any(re.match(r"(en|de)coder\.(down|up|mid)\.", key) for key in tensors)):
        prefix = prefixed or VAES[0]
        own = tensors if prefixed else {prefix + key: tensor for key, tensor in tensors.items()}
        return _convert(name, prefix, {key: t for key, t in own.items() if key.startswith(prefix)}, config)
    if name.startswith("text_encoder"):
        tensors = convert_ldm_clip_checkpoint(tensors) or tensors
    return tensors


def _place(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _ignored(key: str) -> bool:
    """Whether a tensor has no part in drawing, or is copied in the translation (OpenCLIP's joint matrices)."""
    return bool(NOT_READ.search(key) or NOT_WEIGHTS.search(key) or key.endswith(("in_proj_weight", "in_proj_bias")))
