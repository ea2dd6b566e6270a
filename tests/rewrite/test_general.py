"""The rules on architectures for which nobody wrote them: equal results, and what they find there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
import transformers

from allaprima.capture import dim_rules
from allaprima.errors import CaptureError
from allaprima.graph import Graph
from allaprima.rewrite import rules_for
from tests.rewrite.check import check_equal, graph_of, read, rewritten

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TWO_STACKS = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
)  # fmt: skip
SDXL = dict(
    sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=(2, 4),
    layers_per_block=1, norm_num_groups=8, use_linear_projection=True, transformer_layers_per_block=2,
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
)  # fmt: skip
FLUX = dict(
    patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
)  # fmt: skip


def tokens(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(4, 50, (batch, 5 + batch)),)


def images(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, 32, 32),)


def sdxl(batch: int) -> tuple[Any, ...]:
    added = {"text_embeds": torch.randn(batch, 16), "time_ids": torch.randn(batch, 6)}
    return torch.randn(batch, 4, 8, 8), torch.tensor(5.0), torch.randn(batch, 7, 32), None, None, None, None, added


def flux(batch: int) -> tuple[torch.Tensor, ...]:
    picture, text = torch.randn(batch, 12, 16), torch.randn(batch, 7, 32)
    return picture, text, torch.randn(batch, 16), torch.full((batch,), 5.0), torch.randn(12, 3), torch.randn(7, 3)


# name -> module, its arguments for a batch, flags of the call, some rules that fire
ARCHITECTURES: dict[str, tuple[Callable[[], Any], Callable[[int], Any], dict[str, Any], dict[str, int]]] = {
    "TransformerEncoderLayer": (
        lambda: torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True),
        lambda batch: (torch.randn(batch, 7, 32),), {}, {"LinearAdd": 1, "AddLayerNorm": 1},
    ),
    "GPT-2": (
        lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)),
        tokens, {"use_cache": False}, {"AttentionWithoutTransposes": 2, "AddLayerNorm": 4},
    ),
    "BART": (
        lambda: transformers.BartModel(transformers.BartConfig(**TWO_STACKS)),
        tokens, {"use_cache": False}, {"AttentionWithoutTransposes": 3, "MergeSiblingLinears": 3},
    ),
    "Swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        images, {}, {"AttentionWithoutTransposes": 2, "ComposeReshapes": 6},
    ),
    "ConvNeXt": (
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 16, 16, 32])),
        images, {}, {"ChannelsLastWeights": 8},
    ),
    "Qwen2": (
        lambda: transformers.Qwen2Model(transformers.Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=50)),
        tokens, {"use_cache": False}, {"AttentionWithoutTransposes": 2, "MergeSiblingLinears": 4},
    ),
    "VQ": (
        lambda: diffusers.VQModel(
            block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        images, {}, {"PointwiseConvToRows": 1, "UpsampleConv": 1},
    ),
    "SDXL": (
        lambda: diffusers.UNet2DConditionModel(**SDXL), sdxl, {},
        {"AttentionWithoutTransposes": 16, "MergeSiblingLinears": 10, "GegluLinear": 8, "NoConcatenation": 4},
    ),
    "FLUX": (
        lambda: diffusers.FluxTransformer2DModel(**FLUX), flux, {},
        {"AttentionWithoutTransposes": 2, "MergeSiblingLinears": 4},
    ),
}  # fmt: skip


def most_general_graph_of(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """Captured as the engine does it: the first rule for sizes that the module's code allows."""
    for dims in dim_rules(read(module, *args, **kwargs).tensors):
        with suppress(CaptureError):
            return graph_of(module, *args, dims=dims, **kwargs)
    raise AssertionError("not captured")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_are_the_same_afterwards(name: str) -> None:
    make, arguments, flags, expected = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = make().eval()
    if name != "TransformerEncoderLayer":
        flags = {**flags, "return_dict": False}
    captured = most_general_graph_of(module, *arguments(2), **flags)
    for backend in ("portable", "cuda"):
        graph, report = rewritten(captured, rules_for(backend))
        for batch in (2, 3):
            check_equal(graph, module, *arguments(batch), **flags, tolerance=1e-5)
    assert {rule: report.fired[rule] for rule in expected} == expected
