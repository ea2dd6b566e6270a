"""A pipeline as one file in the layout of the original latent-diffusion code, with the names of SD v1.x checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "fc1": "c_fc",
    "fc2": "c_proj", "self_attn": "attn",
}  # fmt: skip


def save_ldm(pipe: Any, path: Path, **changes: Any) -> None:
    """Write UNet, VAE and CLIP of a pipeline, and two of the tensors that original files hold beside the weights.

    changes  tensors to add, or None for one to leave out; with dots in their names as "__"
    """
    tensors = ldm_tensors(pipe.unet, pipe.vae, pipe.text_encoder)
    length = pipe.text_encoder.config.max_position_embeddings
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(length)[None]
    tensors["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items() if tensor is not None}, path)


def ldm_tensors(
    unet: Any, vae: Any, text_encoder: Any = None, *, open_clip: str = "", text_encoder_2: Any = None
) -> dict[str, Any]:
    """The tensors of modules under their original names.

    open_clip  the prefix of an encoder that is in OpenCLIP's layout: SD 2's first, SDXL's second
    """
    sdxl = text_encoder_2 is not None
    tensors = {f"model.diffusion_model.{unet_name(n, unet.config)}": t.detach() for n, t in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        found = f"first_stage_model.{vae_name(name, vae.config)}"
        # a convolution of 1×1 there, a linear layer here
        square = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", found)
        tensors[found] = tensor.detach()[..., None, None] if square else tensor.detach()
    if text_encoder is not None and (sdxl or not open_clip):
        prefix = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
        for name, tensor in text_encoder.state_dict().items():
            tensors[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = tensor.detach()
    if open_clip:
        tensors |= open_clip_tensors(text_encoder_2 if sdxl else text_encoder, open_clip)
    return tensors


def open_clip_tensors(encoder: Any, prefix: str) -> dict[str, Any]:
    """A CLIP text encoder in OpenCLIP's names: joint matrices for q, k and v, the projection transposed."""
    joint: dict[str, list[Any]] = {}
    found = {}
    for name, tensor in encoder.state_dict().items():
        tensor, name = tensor.detach(), name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
            continue
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if match := re.fullmatch(r"(.+\.attn)\.[qkv]_proj\.(weight|bias)", name):
            joint.setdefault(f"{match[1]}.in_proj_{match[2]}", []).append((name, tensor))
        else:
            found[name] = tensor
    order = ("q_proj", "k_proj", "v_proj")
    for name, parts in joint.items():
        found[name] = torch.cat([t for p in order for n, t in parts if p in n])
    return {prefix + name: tensor for name, tensor in found.items()}


def unet_name(name: str, config: Any) -> str:
    """ "down_blocks.1.resnets.0.norm1.weight" -> "input_blocks.3.0.in_layers.0.weight" (one layer a block)"""
    layers = config.layers_per_block + 1
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    block, number, kind, index, rest = _parts(name)
    if block == "mid_block":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{_resnet(kind, rest)}"
    if block == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{layers * (number + 1)}.0.{rest.replace('conv', 'op', 1)}"
        return f"input_blocks.{layers * number + index + 1}.{int(kind == 'attentions')}.{_resnet(kind, rest)}"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in config.up_block_types[number] else 1
        return f"output_blocks.{layers * (number + 1) - 1}.{after}.{rest}"
    return f"output_blocks.{layers * number + index}.{int(kind == 'attentions')}.{_resnet(kind, rest)}"


def vae_name(name: str, config: Any) -> str:
    """ "decoder.up_blocks.0.resnets.1.conv1.weight" -> "decoder.up.3.block.1.conv1.weight" (four blocks)"""
    side, _, inside = name.partition(".")
    if "_block" not in inside:
        return name.replace("conv_norm_out", "norm_out")
    block, number, kind, index, rest = _parts(inside)
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if block == "mid_block":
        if kind == "resnets":
            return f"{side}.mid.block_{index + 1}.{rest}"
        layer, _, last = rest.rpartition(".")
        return f"{side}.mid.attn_1.{VAE_ATTENTION[layer]}.{last}"
    if block == "up_blocks":
        number = len(config.up_block_types) - 1 - number
    way = block.removesuffix("_blocks")
    return f"{side}.{way}.{number}.{f'block.{index}' if kind == 'resnets' else f'{way}sample'}.{rest}"


def _parts(name: str) -> tuple[str, int, str, int, str]:
    """ "down_blocks.1.resnets.0.norm1.weight" -> ("down_blocks", 1, "resnets", 0, "norm1.weight")"""
    found = re.fullmatch(r"(\w+_blocks?)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    assert found, name
    return found[1], int(found[2] or 0), found[3], int(found[4]), found[5]


def _resnet(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, last = rest.rpartition(".")
    return f"{RESNET[layer]}.{last}"
