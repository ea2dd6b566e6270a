"""The ways to run a pipeline that are compared.

A variant is a function that is given a pipeline of its own (`workloads.aliased`) and changes it; after that the
pipeline and its components are called as ever.  Its docstring is what the help says about it.
"""

from __future__ import annotations

import copy
import inspect
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .workloads import component

Variant = Callable[[Any, Sequence[str]], None]


def eager(pipe: Any, components: Sequence[str]) -> None:
    """diffusers as it is"""


def channels_last(pipe: Any, components: Sequence[str]) -> None:
    """eager, convolution weights in channels-last"""
    for path in components:
        if path != "text_encoder":
            component(pipe, path).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(pipe: Any, components: Sequence[str]) -> None:
    """torch.compile(dynamic=True): one compilation for all sizes"""
    _compile(pipe, components, dynamic=True)


def compiled_static(pipe: Any, components: Sequence[str]) -> None:
    """torch.compile(dynamic=False), channels-last: one compilation for each size"""
    channels_last(pipe, components)
    _compile(pipe, components, dynamic=False)


def max_autotune(pipe: Any, components: Sequence[str]) -> None:
    """torch.compile(mode="max-autotune"), channels-last"""
    channels_last(pipe, components)
    _compile(pipe, components, dynamic=False, mode="max-autotune")


def openvino(pipe: Any, components: Sequence[str]) -> None:
    """OpenVINO on the raw modules: convert_model as its manual says, dynamic shapes, precision of the pipeline"""
    for path in components:
        module = component(pipe, path)
        module.forward = RawOpenVINO(module, path)


def ours(pipe: Any, components: Sequence[str]) -> None:
    """allaprima.optimize"""
    from ..pipelines import optimize

    optimize(pipe)


VARIANTS: dict[str, Variant] = {
    "eager": eager,
    "channels-last": channels_last,
    "compile": compiled,
    "compile-static": compiled_static,
    "max-autotune": max_autotune,
    "openvino": openvino,
    "ours": ours,
}
# Their first call at a size may take minutes: it runs under --compile-limit.
LIMITED = ("compile", "compile-static", "max-autotune")


def default_variants(device: str) -> list[str]:
    """What is compared when nothing is asked: the fastest that needs no minutes of compiling."""
    return ["eager", "channels-last", "ours"] if device == "cuda" else ["eager", "openvino", "ours"]


def _compile(pipe: Any, components: Sequence[str], **options: Any) -> None:
    torch._dynamo.reset()
    for path in components:
        module = component(pipe, path)
        module.forward = torch.compile(module.forward, **options)


# ---- OpenVINO on the raw module ------------------------------------------------------------------------------------

# The tensors of each component's call in the order of the converted model, and how a call returns its result.
_INPUTS = {
    "unet": ("sample", "timestep", "encoder_hidden_states"),
    "text_encoder": ("input_ids",),
    "vae.decoder": ("sample",),
}


class RawOpenVINO:
    """Stands in for `module.forward`: the module converted by OpenVINO itself, with none of our rewrites.

    Fair to it: shapes dynamic in the way its converter makes them, the precision said explicitly, torch's number of
    threads, latency as its goal, inputs read where torch holds them.
    """

    def __init__(self, module: torch.nn.Module, path: str) -> None:
        import openvino as ov

        self.names, self.returns_tuple = _INPUTS[path], path != "vae.decoder"
        self.signature = inspect.signature(type(module).forward)
        self.module, self.dtype = module, next(module.parameters()).dtype
        # A UNet branches on sizes off this grid, and a trace knows one branch: there it answers in another shape, and
        # wrongly at every later call.
        self.grid = 2 ** getattr(module, "num_upsamplers", 0)
        plain = copy.deepcopy(module).float() if self.dtype != torch.float32 else module
        with torch.no_grad(), _tracer_warnings_off():
            converted = ov.convert_model(_Positional(plain, self.names), example_input=_example(module, path))
        del plain
        settings = {
            "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[
                self.dtype
            ],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()
        self.wrap = ov.Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(self.module, *args, **kwargs).arguments
        held = [_host(given[name]) for name in self.names]  # alive until infer returns
        if any(size % self.grid for size in held[0].shape[2:]):
            raise ValueError(f"the traced module knows only latent sizes that are multiples of {self.grid}")
        for i, array in enumerate(held):
            self.request.set_input_tensor(i, self.wrap(array, shared_memory=True))
        self.request.infer()
        # The request keeps its output buffer for the next call.
        result = torch.from_numpy(self.request.get_output_tensor(0).data.copy()).to(self.dtype)
        return (result,) if self.returns_tuple else result


class _Positional(torch.nn.Module):
    """The call with its tensors in a row and the first result alone: what a tracer takes."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        result = self.module(**dict(zip(self.names, tensors, strict=True)))
        return result if isinstance(result, torch.Tensor) else result[0]


def _host(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.is_floating_point() or tensor.ndim == 0:
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def _example(module: torch.nn.Module, path: str) -> tuple[torch.Tensor, ...]:
    """Small arguments to trace with; 16 is on the grid of every UNet with up to four halvings."""
    config: Any = getattr(module, "config", None)
    if path == "unet":
        return (
            torch.randn(2, config.in_channels, 16, 16),
            torch.tensor(500.0),
            torch.randn(2, 77, config.cross_attention_dim),
        )
    if path == "text_encoder":
        return (torch.ones(2, config.max_position_embeddings, dtype=torch.int64),)
    first: Any = module.conv_in
    return (torch.randn(2, first.in_channels, 16, 16),)


@contextmanager
def _tracer_warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # branches on sizes are fixed by the trace; the gate finds what that breaks
        yield


# ---- a limit for compilers -----------------------------------------------------------------------------------------


class Unfinished(BaseException):
    """The time limit is over.  No Exception, because compilers catch those and go on."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Interrupt the block in the main thread after `limit_s` seconds.

    raises   Unfinished
    """

    def stop(_signal: int, _frame: Any) -> None:
        raise Unfinished(f"unfinished after {limit_s:g} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    except Exception as error:
        if time.monotonic() - start >= limit_s:  # the interruption came out of the compiler as an error of its own
            raise Unfinished(f"unfinished after {limit_s:g} s") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
