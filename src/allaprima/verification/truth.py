"""The truth that both variants are judged by: the same weights and the same noise in a wider dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..pipelines import eager


def precise_copy(pipe: Any, dtype: torch.dtype) -> Any:
    """An unoptimized copy of the pipeline with the same weights, widened to `dtype`; `pipe` stays as it is."""
    with eager(pipe):
        parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns at every cast
    options = {k: pipe.config[k] for k in ("requires_safety_checker",) if k in pipe.config}
    return type(pipe)(**parts, **options)


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 means float32: cuDNN takes TF32 for it unless told otherwise, which is no nearer the truth than f16."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


class NoiseIn(TorchFunctionMode):
    """`torch.randn` draws in `dtype` and then widens, so that a wider run starts from the same noise.

    torch draws other numbers for another dtype from the same seed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("dtype")
        if func is torch.randn and wanted is not None:
            return func(*args, **{**kwargs, "dtype": self.dtype}).to(wanted)
        return func(*args, **kwargs)
