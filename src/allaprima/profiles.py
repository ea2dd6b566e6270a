"""What is known of diffusers' and transformers' modules: which inputs change when, and one form for equal calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .capture import DimRule, DynamicDim, dim_rules
from .engine import Profile
from .errors import InputError
from .ip_adapter import TABLE, StrengthTable, strengths_from_the_call
from .stage import Time

BATCH = DynamicDim(2, "batch", 1, 63)
"""diffusers branches at a batch of 64; the engine finds out at the first larger batch that nothing changes there."""
ANY_BATCH = DynamicDim(2, "batch", 1, 2**16)
HEIGHT, WIDTH = 18, 22
"""The latents' sizes while capturing: different, and on no grid that a UNet branches at."""

_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual",
              "down_intrablock_additional_residuals")  # fmt: skip
_CONDITIONS = ("encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask",
               "added_cond_kwargs", "controlnet_cond", "pooled_projections", "img_ids", "txt_ids",
               "guidance")  # fmt: skip


class _Times(dict[str, Time]):
    """`down_block_additional_residuals.3` has the time of its group; what is not named changes at every step."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key.split(".")[0], default)


DENOISER_TIMES = _Times({"timestep": Time.SCHEDULE} | dict.fromkeys(_CONDITIONS, Time.PROMPT))


def unet(schedules: Callable[[], Sequence[torch.Tensor]], module: nn.Module | None = None) -> Profile:
    """A conditional UNet of diffusers: sample `[B, C, H, W]`, timestep `[]` or `[B]`, embeddings `[B, S, D]`.

    module  the UNet, for the strengths of its IP-Adapters
    """
    return Profile(
        name="unet",
        times=DENOISER_TIMES,
        dims=_unet_dims,
        normalise=_normalise_unet if module is None else functools.partial(_normalise_adapted, StrengthTable(module)),
        options="cross_attention_kwargs",
        capturing=_as_captured,
        schedules=schedules,
        timestep="timestep",
    )


def controlnet(name: str, schedules: Callable[[], Sequence[torch.Tensor]]) -> Profile:
    """A ControlNet: a UNet's inputs and a picture `[B, 3, 8H, 8W]`, whose embedding is computed once a picture."""
    return Profile(
        name=name,
        times=DENOISER_TIMES,
        dims=_unet_dims,
        normalise=_normalise_controlnet,
        schedules=schedules,
        timestep="timestep",
    )


def transformer() -> Profile:
    """A diffusion transformer: hidden_states `[B, C, H, W]` (SD3) or `[B, N, C]` (Flux), timestep `[B]`."""
    return Profile(name="transformer", times=DENOISER_TIMES, dims=_transformer_dims, options="joint_attention_kwargs")


def text_encoder(name: str = "text_encoder") -> Profile:
    return Profile(name=name, dims=_token_dims)


def image_encoder() -> Profile:
    """It reads pictures of one size, several at once."""
    return Profile(name="image_encoder", dims=lambda tensors: [lambda name, tensor: {0: ANY_BATCH}])


def vae_decoder() -> Profile:
    return Profile(name="vae.decoder", dims=_picture_dims(HEIGHT, WIDTH))


def vae_encoder() -> Profile:
    return Profile(name="vae.encoder", dims=_picture_dims(8 * HEIGHT, 8 * WIDTH))


def _unet_dims(tensors: Sequence[torch.Tensor]) -> list[DimRule]:
    sizes = _halved(int(tensors[0].shape[-2]), int(tensors[0].shape[-1]))
    examples = _halved(HEIGHT, WIDTH)

    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        group = name.split(".")[0]
        found = {0: BATCH} if tensor.dim() > 0 else {}
        if group == "encoder_hidden_states":
            found[1] = DynamicDim(77)
        elif name == f"added_cond_kwargs.{TABLE}":
            return {}
        elif name.startswith("added_cond_kwargs.image_embeds"):
            found[1] = DynamicDim(3, name.replace(".", "_"), 1, 64)  # pictures that an IP-Adapter sees
        elif group == "sample" and tensor.dim() == 4:
            found |= {2: DynamicDim(HEIGHT), 3: DynamicDim(WIDTH)}
        elif group == "controlnet_cond":
            found |= {2: DynamicDim(8 * HEIGHT), 3: DynamicDim(8 * WIDTH)}
        elif group in _RESIDUALS and tuple(tensor.shape[2:]) in sizes:  # else it is averaged over the pixels
            height, width = examples[sizes.index(tuple(tensor.shape[2:]))]
            found |= {2: DynamicDim(height), 3: DynamicDim(width)}
        return found

    return [dims]


def _halved(height: int, width: int) -> list[tuple[int, ...]]:
    """The sizes at each level of a UNet: a downsampling rounds up."""
    sizes: list[tuple[int, ...]] = [(height, width)]
    for _ in range(8):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def _transformer_dims(tensors: Sequence[torch.Tensor]) -> list[DimRule]:
    tokens, text = DynamicDim(99, "tokens", 1, 2**20), DynamicDim(77, "text", 1, 2**16)

    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        if name in ("img_ids", "txt_ids"):
            return {0: tokens if name == "img_ids" else text}
        found = {0: ANY_BATCH} if tensor.dim() > 0 else {}
        if name == "hidden_states" and tensor.dim() == 4:
            found |= {2: DynamicDim(HEIGHT), 3: DynamicDim(WIDTH)}
        elif name == "hidden_states" and tensor.dim() == 3:
            found[1] = tokens
        elif name == "encoder_hidden_states":
            found[1] = text
        return found

    return [dims, *dim_rules(tensors)]


def _token_dims(tensors: Sequence[torch.Tensor]) -> list[DimRule]:
    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        found = {0: ANY_BATCH}
        return found | ({1: DynamicDim(max(2, tensor.shape[1]))} if tensor.dim() > 1 else {})

    return [dims]


def _picture_dims(height: int, width: int) -> Callable[[Sequence[torch.Tensor]], list[DimRule]]:
    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        if tensor.dim() != 4:
            return {}
        return {0: BATCH, 2: DynamicDim(height), 3: DynamicDim(width)}

    return lambda tensors: [dims]


def _normalise_unet(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The timestep as a float32 tensor: numbers, int64 and float timesteps are one signature."""
    if kwargs.get("cross_attention_kwargs"):
        raise InputError(
            f"cross_attention_kwargs={kwargs['cross_attention_kwargs']!r} is not supported on an optimized pipeline. "
            "Leave it out, or call allaprima.restore(pipe) first."
        )
    sample = args[0] if args else kwargs["sample"]
    if len(args) > 1:
        args = (args[0], _float_timestep(args[1], sample.device), *args[2:])
    else:
        kwargs = kwargs | {"timestep": _float_timestep(kwargs["timestep"], sample.device)}
    return args, kwargs


def _normalise_adapted(table: StrengthTable, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _normalise_unet(*args, **table.added_to(kwargs))


def _normalise_controlnet(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The strength as a tensor as well: users change it between two pictures, and pipelines between two steps."""
    args, kwargs = _normalise_unet(*args, **kwargs)
    sample = args[0] if args else kwargs["sample"]

    def tensor(scale: Any) -> torch.Tensor:
        return torch.as_tensor(scale, dtype=torch.float32, device=sample.device)

    if len(args) > 4:
        return (*args[:4], tensor(args[4]), *args[5:]), kwargs
    return args, kwargs | {"conditioning_scale": tensor(kwargs.get("conditioning_scale", 1.0))}


def _float_timestep(timestep: Any, device: torch.device) -> torch.Tensor:
    if isinstance(timestep, torch.Tensor):
        return timestep.to(device=device, dtype=torch.float32)
    return torch.tensor(float(timestep), device=device)


@contextmanager
def _as_captured(module: nn.Module) -> Iterator[None]:
    with _target_sizes_always(module), strengths_from_the_call(module):
        yield


@contextmanager
def _target_sizes_always(module: nn.Module) -> Iterator[None]:
    """diffusers passes each upsampling its target size only off the 2ⁿ grid.  While capturing it is passed always, so
    that one graph serves every size."""
    before = module.__dict__.get("num_upsamplers")
    if before is None:
        yield
        return
    vars(module)["num_upsamplers"] = 30
    try:
        yield
    finally:
        vars(module)["num_upsamplers"] = before
