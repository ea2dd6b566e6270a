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
from torch.utils import _pytree as pytree

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


def cuda_graph(pipe: Any, components: Sequence[str]) -> None:
    """eager, channels-last, each component recorded in one CUDA graph a size"""
    _need_gpu()
    channels_last(pipe, components)
    _record(pipe, components)


def compiled_graph(pipe: Any, components: Sequence[str]) -> None:
    """torch.compile(dynamic=False), channels-last, what it makes recorded in one CUDA graph a size"""
    _need_gpu()
    compiled_static(pipe, components)
    _record(pipe, components)


def xformers(pipe: Any, components: Sequence[str]) -> None:
    """eager, channels-last, attention by xformers"""
    import xformers.ops  # type: ignore[import-not-found]  # noqa: F401  diffusers' own error says less

    channels_last(pipe, components)
    pipe.unet.enable_xformers_memory_efficient_attention()


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
    "cuda-graph": cuda_graph,
    "compile-graph": compiled_graph,
    "xformers": xformers,
    "openvino": openvino,
    "ours": ours,
}
# Their first call at a size may take minutes: it runs under --compile-limit.
LIMITED = ("compile", "compile-static", "max-autotune", "compile-graph")


def default_variants(device: str) -> list[str]:
    """What is compared when nothing is asked: the fastest that needs no minutes of compiling."""
    return ["eager", "channels-last", "cuda-graph", "ours"] if device == "cuda" else ["eager", "openvino", "ours"]


def _compile(pipe: Any, components: Sequence[str], **options: Any) -> None:
    torch._dynamo.reset()
    for path in components:
        module = component(pipe, path)
        module.forward = torch.compile(module.forward, **options)


# ---- CUDA graphs of what others compute ----------------------------------------------------------------------------


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU")


def _record(pipe: Any, components: Sequence[str]) -> None:
    for path in components:
        module = component(pipe, path)
        module.forward = Recorded(module.forward)


class Recorded:
    """Stands in for a `forward`: one CUDA graph for each set of sizes, recorded at the first call with them.

    Inputs are copied to where the graph reads them, results out of where it writes them.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        key = str(form), tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
        if key not in self.graphs:
            self.graphs[key] = self._recorded(leaves, form)
        graph, own, made = self.graphs[key]
        torch._foreach_copy_(own, given)
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, made)

    def _recorded(self, leaves: list[Any], form: Any) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]:
        own = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(own, form)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            made = self.forward(*args, **kwargs)
        return graph, [x for x in own if isinstance(x, torch.Tensor)], made


# ---- OpenVINO on the raw module ------------------------------------------------------------------------------------

# The tensors of each component's call in the order of the converted model, and how a call returns its result.
_INPUTS = {
    "unet": ("sample", "timestep", "encoder_hidden_states"),
    "text_encoder": ("input_ids",),
    "vae.decoder": ("sample",),
    "vae.encoder": ("sample",),
}


class RawOpenVINO:
    """Stands in for `module.forward`: the module converted by OpenVINO itself, with none of our rewrites.

    Fair to it: shapes dynamic in the way its converter makes them, the precision said explicitly, torch's number of
    threads, latency as its goal, inputs read where torch holds them.
    """

    def __init__(self, module: torch.nn.Module, path: str) -> None:
        import openvino as ov

        self.names, self.returns_tuple = _INPUTS[path], not path.startswith("vae.")
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
