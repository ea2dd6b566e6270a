"""All rules on whole networks: equal results, true specs, the expected counts, and quickly."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from allaprima.capture import DynamicDim
from allaprima.graph import Graph, aten, verify
from allaprima.rewrite import PORTABLE, Rewritten, rewrite, rules_for
from allaprima.rewrite.linear import MergeSiblingLinears
from tests.rewrite.check import BATCH, check_equal, check_specs, graph_of, read, rewritten
from tests.tiny import CROSS_DIM, tiny_bert, tiny_clip, tiny_unet, tiny_vae

BACKENDS = ("portable", "aten", "openvino", "cuda")
MANY_LEVELS = 30  # more than any UNet has: the size to which each level upsamples is then always passed on


def unet_dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    sizes = {
        "sample": {0: BATCH, 2: DynamicDim(18), 3: DynamicDim(22)},
        "encoder_hidden_states": {0: BATCH, 1: DynamicDim(77)},
    }
    return sizes.get(name, {})


def unet_call(batch: int, height: int, width: int, tokens: int, text: int = CROSS_DIM, **how: Any) -> tuple[Any, ...]:
    return (
        torch.randn(batch, 4, height, width, **how),
        torch.tensor(417.0, device=how.get("device")),
        torch.randn(batch, tokens, text, **how),
    )


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_unet().double()


@pytest.fixture(scope="module")
def unet_graph(unet: Any) -> Iterator[Graph]:
    levels, unet.num_upsamplers = unet.num_upsamplers, MANY_LEVELS
    graph = graph_of(unet, *unet_call(2, 16, 16, 77, dtype=torch.float64), dims=unet_dims, return_dict=False)
    unet.num_upsamplers = levels
    return graph


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 16, 16, 77), (3, 8, 12, 5), (2, 9, 13, 1), (1, 11, 6, 154)])
def test_the_unet_is_the_same(unet: Any, unet_graph: Graph, backend: str, size: tuple[int, int, int, int]) -> None:
    graph, _ = rewritten(unet_graph, rules_for(backend))
    check_equal(graph, unet, *unet_call(*size, dtype=torch.float64), return_dict=False)


def test_rules_fire_as_often_as_the_unet_has_occasion(unet_graph: Graph) -> None:
    graph, report = rewritten(unet_graph, rules_for("cuda"))
    resnets, blocks, levels = 11, 7, 3
    assert report.fired["AttentionWithoutTransposes"] == 2 * blocks
    assert report.fired["MergeSiblingLinears"] == blocks + 2, "each self-attention, the text, the time"
    assert report.fired["PointwiseConvToRows"] == report.fired["PointwiseConvFromRows"] == blocks
    assert report.fired["UpsampleConv"] == report.fired["FoldUpsample"] == levels - 1
    assert report.fired["GroupNormSilu"] == 2 * resnets + 1
    assert report.fired["NoConcatenation"] == 6
    assert report.fired["GegluLinear"] == blocks
    assert report.fired["ConvAdd"] == 2 * resnets
    assert report.fired["LinearAdd"] == 4 * blocks
    gone = (aten.dropout.default, aten.view.default, aten.expand.default, aten.transpose.int, aten.add.Tensor)
    assert [graph.count(t) for t in gone] == [0] * len(gone)
    assert report.declined == []


def dependents(graph: Graph, source: str) -> set[Any]:
    """Every node that depends on an input."""
    found = {n for n in graph.placeholders("input") if n.meta["source"] == source}
    assert found
    for node in graph.fx.nodes:
        if any(read in found for read in node.all_input_nodes):
            found.add(node)
    return found


def test_nothing_between_the_timestep_and_the_residual_blocks_knows_the_batch(unet_graph: Graph) -> None:
    before, after = unet_graph, rewritten(unet_graph, PORTABLE)[0]

    def linears_of_time(graph: Graph) -> list[Any]:
        """The linears that read the timestep and nothing of the picture or the text, not even their batch."""
        time_only = dependents(graph, "timestep") - dependents(graph, "sample")
        time_only -= dependents(graph, "encoder_hidden_states")
        return [n for n in time_only if n.target is aten.linear.default]

    assert linears_of_time(before) == [], "eager expands the timestep by sample.shape[0]"
    assert len(linears_of_time(after)) == 3, "two of the time MLP, one for all residual blocks"
    assert all(n.meta["spec"].shape[0] == 1 for n in linears_of_time(after))


@given(batch=st.integers(1, 3), height=st.integers(5, 14), width=st.integers(5, 14), tokens=st.integers(2, 9))
@settings(max_examples=5, deadline=None)
def test_specs_are_true_at_any_size(
    unet: Any, unet_graph: Graph, batch: int, height: int, width: int, tokens: int
) -> None:
    graph, _ = rewritten(unet_graph, rules_for("cuda"))
    check_equal(graph, unet, *unet_call(batch, height, width, tokens, dtype=torch.float64), return_dict=False)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Against float64, in the median over some pictures."""
    short, wide = tiny_unet(dtype=dtype), tiny_unet(dtype=dtype).double()
    levels, short.num_upsamplers = short.num_upsamplers, MANY_LEVELS
    captured = graph_of(short, *unet_call(2, 16, 16, 77, dtype=dtype), dims=unet_dims, return_dict=False)
    short.num_upsamplers = levels
    graphs = [rewritten(captured, rules_for(backend))[0] for backend in BACKENDS]
    ratios: list[list[float]] = []
    for _ in range(5):
        sample, t, text = unet_call(1, 10, 12, 9, dtype=dtype)
        truth = wide(sample.double(), t, text.double(), return_dict=False)[0]
        eager = short(sample, t, text, return_dict=False)[0]
        call = read(short, sample, t, text, return_dict=False)
        ours = [check_specs(graph, short, call)[0] for graph in graphs]
        ratios.append([((o - truth).norm() / (eager - truth).norm()).item() for o in ours])
    medians = [sorted(column)[2] for column in zip(*ratios, strict=True)]
    assert max(medians) <= 1.1, dict(zip(BACKENDS, medians, strict=True))


def test_rewriting_twice_finds_nothing_more(unet_graph: Graph) -> None:
    for backend in BACKENDS:
        graph, _ = rewritten(unet_graph, rules_for(backend))
        text = str(graph)
        again = rewrite(graph, rules_for(backend))
        assert again.fired == Counter()
        assert str(graph) == text


def for_each_backend(captured: Graph) -> Iterator[tuple[Graph, Rewritten, int]]:
    """The graph rewritten for each backend, what was done, and 1 or 0: whether the backend wants linears merged."""
    for backend in BACKENDS:
        rules = rules_for(backend)
        yield *rewritten(captured, rules), int(any(isinstance(rule, MergeSiblingLinears) for rule in rules))


def test_text_encoders_are_the_same() -> None:
    clip, bert = tiny_clip().double(), tiny_bert().double()
    ids = torch.randint(5, 40, (2, 9))
    for graph, report, merges in for_each_backend(graph_of(clip, ids, return_dict=False)):
        assert report.fired["AttentionWithoutTransposes"] == 2
        assert report.fired["MergeSiblingLinears"] == 2 * merges
        for size in ((1, 77), (3, 20)):
            check_equal(graph, clip, torch.randint(5, 40, size), return_dict=False)
    masked = graph_of(bert, ids, attention_mask=torch.ones_like(ids), return_dict=False)
    for graph, report, merges in for_each_backend(masked):
        assert report.fired["AttentionWithoutTransposes"] == 2
        assert report.fired["MergeSiblingLinears"] == 2 * merges
        for size in ((1, 64), (3, 7)):
            mask = (torch.arange(size[1]) < size[1] - 2).long().expand(size)
            check_equal(graph, bert, torch.randint(5, 40, size), attention_mask=mask, return_dict=False)


def test_the_vae_is_the_same() -> None:
    vae = tiny_vae().double()
    for graph, report, _ in for_each_backend(graph_of(vae.decoder, torch.randn(2, 4, 6, 8).double())):
        assert report.fired["UpsampleConv"] == 3
        assert report.fired["AttentionWithoutTransposes"] == 1
        for size in ((1, 4, 5, 7), (2, 4, 4, 4)):
            check_equal(graph, vae.decoder, torch.randn(size).double())
    for graph, *_ in for_each_backend(graph_of(vae.encoder, torch.randn(2, 3, 32, 48).double())):
        check_equal(graph, vae.encoder, torch.randn(1, 3, 64, 40).double())


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def test_a_vision_transformer_is_the_same() -> None:
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False).eval().double()
    for graph, report, merges in for_each_backend(graph_of(vit, torch.randn(2, 3, 32, 32).double(), return_dict=False)):
        assert report.fired["AttentionWithoutTransposes"] == 2
        assert report.fired["MergeSiblingLinears"] == 2 * merges
        check_equal(graph, vit, torch.randn(1, 3, 32, 32).double(), return_dict=False)


@pytest.mark.parametrize("shared", [False, True], ids=["a key for each head", "shared keys"])
def test_a_decoder_is_the_same(shared: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=1 if shared else 2)
    llama = LlamaForCausalLM(config).eval().double()
    captured = graph_of(llama, torch.randint(0, 50, (2, 9)), use_cache=False, return_dict=False)
    for graph, report, merges in for_each_backend(captured):
        assert report.fired["MergeSiblingLinears"] == 4 * merges, "q, k, v and the two of the gated MLP, in both layers"
        assert report.fired["AttentionWithoutTransposes"] == (0 if shared else 2)
        assert all("heads share" in d.reason for d in report.declined if d.rule == "AttentionWithoutTransposes")
        # Rotary angles and norms are in float32 whatever the dtype of the weights.
        check_equal(graph, llama, torch.randint(0, 50, (1, 20)), use_cache=False, return_dict=False, tolerance=1e-6)


def test_a_resnet_loses_its_norms() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck")
    resnet = ResNetModel(config).eval().double()
    captured = graph_of(resnet, torch.randn(2, 3, 32, 48).double(), return_dict=False)
    for graph, report, _ in for_each_backend(captured):
        assert report.fired["FoldBatchNorm"] == 1 + 3 * 3 + 1
        for size in ((1, 3, 32, 32), (3, 3, 40, 24)):
            check_equal(graph, resnet, torch.randn(size).double(), return_dict=False)


def test_rewriting_is_quick(unet_graph: Graph) -> None:
    best = min(_seconds(unet_graph) for _ in range(3))
    assert best < 0.5


def _seconds(graph: Graph) -> float:
    new = graph.copy()
    start = time.process_time()
    rewrite(new, rules_for("cuda"))
    return time.process_time() - start


@pytest.mark.slow
def test_stable_diffusion_1_5() -> None:
    """The counts of docs/rewrites.md, on the real configuration without its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
        unet.num_upsamplers = MANY_LEVELS
        call = unet_call(2, 64, 64, 77, 768, device="meta")
        graph = graph_of(unet, *call, dims=unet_dims, return_dict=False)
    portable, cuda = graph.copy(), graph.copy()
    start = time.process_time()
    report = rewrite(portable, rules_for("portable"))
    assert time.process_time() - start < 0.5
    assert report.fired == Counter(SD15_PORTABLE)
    more = _after(rewrite(cuda, rules_for("cuda")), report)
    assert more == SD15_CUDA
    assert portable.count(aten.linear.default) == 16 * 8 + 4, (
        "two of the time MLP; one for all times, one for all texts"
    )
    verify(portable)
    verify(cuda)


def test_the_page_names_every_rule_and_its_count(repository: Path) -> None:
    page = (repository / "docs" / "rewrites.md").read_text()
    counts = dict(re.findall(r"^\| (\w+) \|.*\| (\d+)[^|]*\|$", page, flags=re.MULTILINE))
    names = {rule.name for backend in BACKENDS for rule in rules_for(backend)}
    assert counts.keys() == names
    expected = Counter(SD15_CUDA) + Counter(SD15_PORTABLE) - Counter({"MergeEqualCalls": SD15_CUDA["MergeEqualCalls"]})
    assert {name: int(count) for name, count in counts.items() if int(count)} == expected


def test_there_is_no_list_for_a_backend_that_nobody_wrote() -> None:
    with pytest.raises(KeyError):
        rules_for("tpu")


def _after(report: Rewritten, before: Rewritten) -> dict[str, int]:
    return dict(report.fired - before.fired)


SD15_PORTABLE = {
    "ViewToReshape": 96,
    "CastToDtype": 1,
    "SizesFromInputs": 1,
    "RemoveNoOps": 176,
    "MergeEqualCalls": 21,
    "SinkBroadcast": 78,
    "DropBroadcast": 22,
    "PointwiseConvToRows": 16,
    "PointwiseConvFromRows": 16,
    "AttentionWithoutTransposes": 32,
    "MergeSiblingLinears": 18,
    "UpsampleConv": 3,
}
SD15_CUDA = {
    "FoldUpsample": 3,
    "MergeEqualCalls": 3,
    "GroupNormSilu": 45,
    "NoConcatenation": 12,
    "GegluLinear": 16,
    "ConvAdd": 44,
    "LinearAdd": 64,
    "ChannelsLastWeights": 66,
    "ChannelsLastInputs": 60,
}
