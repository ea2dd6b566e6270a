"""What the tests of plans, memory and order share: small networks in stages, and graphs of a few calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from allaprima import ops
from allaprima.backends.cuda.choose import OPERATORS, Choice
from allaprima.graph import Graph, TensorSpec
from allaprima.rewrite import rewrite, rules_for
from allaprima.stage import Program, Time, cut
from allaprima.weights.binding import Binding
from tests.rewrite.check import graph_of
from tests.rewrite.test_whole import MANY_LEVELS, unet_call, unet_dims
from tests.tiny import tiny_unet, tiny_vae


def unet_program(device: torch.device) -> tuple[Any, Program]:
    unet = tiny_unet(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2),
    ).to(device)
    levels, unet.num_upsamplers = unet.num_upsamplers, MANY_LEVELS
    call = unet_call(2, 16, 16, 77, device=device)
    graph = graph_of(unet, *call, dims=unet_dims, return_dict=False)
    unet.num_upsamplers = levels
    rewrite(graph, rules_for("cuda"))
    times = {"timestep": Time.SCHEDULE, "encoder_hidden_states": Time.PROMPT, "sample": Time.STEP}
    return unet, cut(graph, times, Counter())


def decoder_program(device: torch.device) -> tuple[Any, Program]:
    """Its last level but one has blocks with a shortcut."""
    decoder = tiny_vae(block_out_channels=(16, 32, 64, 64), layers_per_block=2).decoder.to(device)
    graph = graph_of(decoder, torch.randn(2, 4, 6, 8, device=device))
    rewrite(graph, rules_for("cuda"))
    return decoder, cut(graph, {}, Counter())


def run(program: Program, module: Any, call: tuple[Any, ...], how: Any) -> list[Any]:
    """All stages; `how(graph, weights, inputs)` runs one."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    binding = Binding(program)
    binding.update(weights, weights)
    values = dict(zip(program.inputs, call, strict=True))
    symbols = {"s0": call[0].shape[0], "s1": call[0].shape[2], "s2": call[0].shape[3]}
    for time, stage in program.stages.items():
        if time is not Time.WEIGHTS:
            inputs = [
                symbols[p.meta["source"]] if p.meta["role"] == "size" else values[p.meta["source"]]
                for p in stage.graph.placeholders("input", "size")
            ]
            made = how(stage.graph, binding.values(stage.graph, weights), inputs)
            values |= zip(stage.outputs, made, strict=True)
    return [values[r.name] for r in program.results]


def aten_writing_over(target: Any, arguments: Sequence[Any], options: Any, *_: Any) -> Choice | None:
    """`choose` where ATen runs the operators, but they write over their argument and lay pictures out as kernels do."""
    known = OPERATORS.get(target)
    if known is None or options:
        return None

    def call(*given: Any, out: torch.Tensor | None = None) -> Any:
        made = target(*given)
        if target is ops.upsample_conv_folded:
            made = made.contiguous(memory_format=torch.channels_last)
        return made if out is None else out.copy_(made)

    over = known.writes_over is not None and known.writes_over(arguments[0])
    return Choice("aten", call, 1.0, target, (), len(arguments), over, "")


def small(build: Callable[..., Any], *shapes: tuple[int | str, ...]) -> Graph:
    """A graph of float32 values: build(call, *inputs) says `call(target, *arguments, shape=…)` and returns the results.

    Without a shape a call's result has that of its first argument.
    """
    fx = FxGraph()
    inputs = [fx.placeholder(f"x{i}") for i in range(len(shapes))]
    for node, shape in zip(inputs, shapes, strict=True):
        node.meta = {"role": "input", "source": node.name, "spec": TensorSpec(shape, torch.float32)}

    def call(target: Any, *arguments: Any, shape: tuple[int | str, ...] | None = None) -> Node:
        node = fx.call_function(target, arguments)
        like = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        node.meta["spec"] = like.meta["spec"] if shape is None else TensorSpec(shape, torch.float32)
        return node

    made = build(call, *inputs)
    fx.output(tuple(made) if isinstance(made, tuple) else (made,))
    return Graph(fx)
