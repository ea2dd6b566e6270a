"""What is known of diffusers' and transformers' modules: which inputs change when, and one form for equal calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .capture import DimRule, DynamicDim
from .engine import Profile
from .errors import InputError
from .stage import Time

BATCH = DynamicDim(2, "batch", 1, 63)
"""diffusers branches at a batch of 64; the engine finds out at the first larger batch that nothing changes there."""

_STEP_INPUTS = ("sample", "down_block_additional_residuals", "mid_block_additional_residual",
                "down_intrablock_additional_residuals")  # fmt: skip
_UNET_INPUTS = ("encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask",
                "added_cond_kwargs")  # fmt: skip


class _UNetTimes(dict[str, Time]):
    """`down_block_additional_residuals.3` has the time of its group."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key.split(".")[0], default)


def unet(schedules: Callable[[], Sequence[torch.Tensor]]) -> Profile:
    """A conditional UNet of diffusers: sample `[B, C, H, W]`, timestep `[]` or `[B]`, embeddings `[B, S, D]`."""
    times = _UNetTimes({"timestep": Time.SCHEDULE})
    times.update(dict.fromkeys(_STEP_INPUTS, Time.STEP) | dict.fromkeys(_UNET_INPUTS, Time.PROMPT))
    return Profile(
        name="unet",
        times=times,
        dims=_unet_dims,
        normalise=_normalise_unet,
        capturing=_target_sizes_always,
        schedules=schedules,
        timestep="timestep",
    )


def text_encoder() -> Profile:
    return Profile(name="text_encoder", dims=_token_dims)


def vae_decoder() -> Profile:
    return Profile(name="vae.decoder", dims=_picture_dims(18, 22))


def vae_encoder() -> Profile:
    return Profile(name="vae.encoder", dims=_picture_dims(144, 176))


def _unet_dims(tensors: Sequence[torch.Tensor]) -> list[DimRule]:
    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        found = {0: BATCH} if tensor.dim() > 0 else {}
        if name == "sample" and tensor.dim() == 4:
            found |= {2: DynamicDim(18), 3: DynamicDim(22)}
        elif name == "encoder_hidden_states":
            found |= {1: DynamicDim(77)}
        elif name.split(".")[0] in _STEP_INPUTS[1:]:
            found |= {axis: DynamicDim(_residual_example(tensor, axis)) for axis in (2, 3)}
        return found

    return [dims]


def _residual_example(tensor: torch.Tensor, axis: int) -> int:
    return max(2, int(tensor.shape[axis]))


def _token_dims(tensors: Sequence[torch.Tensor]) -> list[DimRule]:
    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        found = {0: DynamicDim(2, "batch", 1, 2**16)}
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


def _float_timestep(timestep: Any, device: torch.device) -> torch.Tensor:
    if isinstance(timestep, torch.Tensor):
        return timestep.to(device=device, dtype=torch.float32)
    return torch.tensor(float(timestep), device=device)


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
