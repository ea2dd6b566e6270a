"""Whole graphs through OpenVINO against ATen at many sizes, and the facts about OpenVINO that the backend relies on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("openvino")

from allaprima.backends.aten import AtenExecutable
from allaprima.backends.openvino import OpenVinoExecutable, available, unsupported
from allaprima.capture import Call, CallReader, DimRule, DynamicDim, capture, dim_rules
from allaprima.errors import CaptureError
from allaprima.graph import Graph, aten
from tests.tiny import tiny_bert, tiny_clip, tiny_unet, tiny_vae

Weights = dict[str, torch.Tensor]


def captured(module: nn.Module, *args: Any, dims: DimRule | None = None, **kwargs: Any) -> Graph:
    call: Call = CallReader(module.forward)(args, kwargs)
    reasons = []
    for rule in [dims] if dims else dim_rules(call.tensors):
        try:
            return capture(module, module.forward, call, rule)
        except CaptureError as error:
            reasons.append(error)
    raise reasons[0]


def weights_of(module: nn.Module, graph: Graph) -> Weights:
    """Copies: what a test edits is not what another one reads."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = {p.name: named[p.meta["source"]] for p in graph.placeholders("parameter", "buffer")}
    return {k: v.detach().clone() for k, v in (found | graph.constants).items()}


def compiled(graph: Graph, weights: Weights, dtype: torch.dtype = torch.float32, **options: Any) -> OpenVinoExecutable:
    executable = OpenVinoExecutable(graph, dtype=dtype, threads=2, **options)
    executable.bind(weights)
    return executable


def eager(graph: Graph, weights: Weights, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    executable = AtenExecutable(graph)
    executable.bind(weights)
    with torch.no_grad():
        return executable.run(inputs)


def in_float64(module: nn.Module, inputs: list[torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    wide = module.double()
    with torch.no_grad():
        found = wide(*(x.double() if x.is_floating_point() else x for x in inputs), **kwargs)
    module.float()
    return list(found) if isinstance(found, tuple | list) else [found]


def assert_agrees(found: list[torch.Tensor], expected: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """At most twice eager's error against float64 (root mean square), plus rounding of the result."""
    for ours, theirs, true in zip(found, expected, truth, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = true.double().abs().max() * torch.finfo(ours.dtype).eps
        error, allowed = ((x.double() - true).pow(2).mean().sqrt() for x in (ours, theirs))
        assert error <= 2 * allowed + scale


def pictures(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    batch = DynamicDim(2, "batch", 1, 63)
    return {
        4: {0: batch, 2: DynamicDim(18), 3: DynamicDim(22)},
        3: {0: batch, 1: DynamicDim(77)},
        2: {0: batch, 1: DynamicDim(9)},
    }.get(tensor.dim(), {})


def wide_pictures(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    return {0: DynamicDim(2, "batch", 1, 63), 2: DynamicDim(144), 3: DynamicDim(176)}


class Unet(nn.Module):
    """A UNet that passes on its target sizes at every size, so that one capture serves all."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.unet = tiny_unet(dtype=dtype).eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        before = self.unet.num_upsamplers
        self.unet.num_upsamplers = 30
        try:
            return self.unet(sample, timestep, text, return_dict=False)[0]  # type: ignore[no-any-return]
        finally:
            self.unet.num_upsamplers = before


@pytest.fixture(scope="module")
def unet() -> tuple[Unet, Graph]:
    module = Unet()
    example = unet_inputs(module, 2, 16, 16, 77)
    return module, captured(module, *example, dims=pictures)


def unet_inputs(module: Unet, batch: int, height: int, width: int, tokens: int,
                dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:  # fmt: skip
    config = module.unet.config
    sample = torch.randn(batch, config.in_channels, height, width, dtype=dtype)
    text = torch.randn(batch, tokens, config.cross_attention_dim, dtype=dtype)
    return [sample, torch.tensor(500.0), text]


# ---- whole models --------------------------------------------------------------------------------------------------

UNET_SIZES = [(2, 16, 16, 77), (1, 9, 13, 5), (3, 24, 8, 154), (1, 5, 5, 1)]


@pytest.mark.parametrize("size", UNET_SIZES)
def test_unet_at_every_size_without_another_compilation(unet: tuple[Unet, Graph], size: tuple[int, ...]) -> None:
    module, graph = unet
    weights = weights_of(module, graph)
    executable = compiled(graph, weights)
    request = executable._request
    for shape in (UNET_SIZES[0], size):
        inputs = unet_inputs(module, *shape)
        assert_agrees(executable.run(inputs), eager(graph, weights, inputs), in_float64(module, inputs))
    assert executable._request is request


class Cropped(nn.Module):
    """The middle of a table, as SD3 crops its position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        top, left = (24 - height) // 2, (24 - width) // 2
        return self.table[top : top + height, left : left + width] + x[..., ::2, ::2].sum()


def test_a_size_that_is_negative_on_the_way_is_rounded_down() -> None:
    module = Cropped()
    graph = captured(module, torch.zeros(2, 3, 8, 12))
    weights = weights_of(module, graph)
    executable = compiled(graph, weights)
    for height, width in ((8, 12), (10, 14), (2, 6)):
        inputs = [torch.zeros(2, 3, height, width)]
        assert torch.equal(executable.run(inputs)[0], module(*inputs))


def test_non_contiguous_inputs(unet: tuple[Unet, Graph]) -> None:
    module, graph = unet
    weights = weights_of(module, graph)
    executable = compiled(graph, weights)
    sample, timestep, text = unet_inputs(module, 2, 8, 12, 9)
    strided = [sample.contiguous(memory_format=torch.channels_last), timestep, text.mT.contiguous().mT]
    assert torch.equal(executable.run(strided)[0], executable.run([sample, timestep, text])[0])


def test_vae_decoder_and_encoder() -> None:
    vae = tiny_vae().eval()
    latent = vae.config.latent_channels
    for module, channels, sizes, dims in (
        (vae.decoder, latent, [(2, 8, 8), (1, 5, 9)], pictures),
        (vae.encoder, 3, [(2, 64, 64), (1, 24, 40)], wide_pictures),
    ):
        graph = captured(module, torch.randn(2, channels, 144, 176), dims=dims)
        weights = weights_of(module, graph)
        executable = compiled(graph, weights)
        for batch, height, width in sizes:
            inputs = [torch.randn(batch, channels, height, width)]
            assert_agrees(executable.run(inputs), eager(graph, weights, inputs), in_float64(module, inputs))


@pytest.mark.parametrize("build", [tiny_clip, tiny_bert])
def test_text_encoders(build: Callable[[], nn.Module]) -> None:
    module = build().eval()
    high = int(module.config.vocab_size)  # type: ignore[union-attr, arg-type]
    longest = int(module.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]

    def inputs(batch: int, tokens: int) -> list[torch.Tensor]:
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[0, tokens // 2 + 1 :] = 0
        return [torch.randint(0, high, (batch, tokens)), mask]

    graph = captured(module, *inputs(2, min(9, longest)), return_dict=False)
    weights = weights_of(module, graph)
    executable = compiled(graph, weights)
    for batch, tokens in ((2, min(9, longest)), (3, 4), (5, min(7, longest))):
        given = inputs(batch, tokens)
        truth = in_float64(module, given, return_dict=False)
        assert_agrees(executable.run(given), eager(graph, weights, given), truth)


def test_vit() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32,
                       patch_size=8)  # fmt: skip
    agrees(ViTModel(config).eval(), lambda batch: [torch.randn(batch, 3, 32, 32)], return_dict=False)


def test_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64)  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    agrees(module, lambda n: [torch.randint(0, 99, (n, 3 * n + 1))], use_cache=False, return_dict=False)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width),
        )  # fmt: skip
        changes = stride != 1 or channels != 4 * width
        shortcut = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), norm(4 * width))
        self.skip = shortcut if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.body(x) + self.skip(x))


def resnet50(width: int = 8) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                               nn.MaxPool2d(3, 2, 1)]  # fmt: skip
    channels = width
    for level, count in enumerate((3, 4, 6, 3)):
        for i in range(count):
            layers.append(Bottleneck(channels, width << level, 2 if level and not i else 1))
            channels = 4 * (width << level)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def test_resnet50() -> None:
    torch.manual_seed(0)
    module = resnet50().eval()
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            each.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    agrees(module, lambda n: [torch.randn(n, 3, 32 * n, 96)])


def agrees(module: nn.Module, inputs: Callable[[int], list[torch.Tensor]], dims: DimRule | None = None,
           **kwargs: Any) -> None:  # fmt: skip
    graph = captured(module, *inputs(2), dims=dims, **kwargs)
    assert unsupported(graph) == []
    weights = weights_of(module, graph)
    executable = compiled(graph, weights)
    for n in (2, 3, 5):
        given = inputs(n)
        assert_agrees(executable.run(given), eager(graph, weights, given), in_float64(module, given, **kwargs))


# ---- precision -----------------------------------------------------------------------------------------------------


class Narrow(nn.Module):
    """bfloat16 weights, with one thing computed in float32: an angle that bfloat16 cannot tell from its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64).to(torch.bfloat16)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = torch.sin(timestep.float() * torch.arange(64, dtype=torch.float32))
        return self.linear(x), angle


def test_each_tensor_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    module = Narrow().eval()
    inputs = [torch.randn(5, 64, dtype=torch.bfloat16), torch.tensor(999.0)]
    graph = captured(module, *inputs)
    weights = weights_of(module, graph)
    found, expected = compiled(graph, weights, torch.bfloat16).run(inputs), eager(graph, weights, inputs)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    assert (found[0] - expected[0]).abs().max() <= torch.finfo(torch.bfloat16).eps * expected[0].abs().max()
    assert (found[1] - expected[1]).abs().max() <= 1e-3  # 63·999 radians: float32 itself is good to 4e-3


def test_float32_is_computed_in_float32_wherever_bfloat16_would_be_faster() -> None:
    torch.manual_seed(0)
    module = nn.Linear(256, 256).eval()
    inputs = [torch.randn(64, 256)]
    graph = captured(module, *inputs)
    weights = weights_of(module, graph)
    assert_agrees(compiled(graph, weights).run(inputs), eager(graph, weights, inputs), in_float64(module, inputs))


def test_bfloat16_unet_is_no_worse_than_eager() -> None:
    torch.manual_seed(0)
    module = Unet(torch.bfloat16)
    graph = captured(module, *unet_inputs(module, 2, 16, 16, 77, torch.bfloat16), dims=pictures)
    weights = weights_of(module, graph)
    executable = compiled(graph, weights, torch.bfloat16)
    ratios = []
    for size in UNET_SIZES * 3:
        inputs = unet_inputs(module, *size, torch.bfloat16)
        truth = in_float64(module, inputs)[0]
        module.unet.to(torch.bfloat16)
        ours, theirs = executable.run(inputs)[0], eager(graph, weights, inputs)[0]
        assert ours.dtype == torch.bfloat16
        ratios.append(float((ours - truth).pow(2).mean().sqrt() / (theirs - truth).pow(2).mean().sqrt()))
    assert sorted(ratios)[len(ratios) // 2] <= 1.1


# ---- weights -------------------------------------------------------------------------------------------------------


def test_binding_again_gives_the_new_weights(unet: tuple[Unet, Graph]) -> None:
    module, graph = unet
    weights, inputs = weights_of(module, graph), unet_inputs(module, 1, 8, 8, 9)
    executable = compiled(graph, weights)
    before = executable.run(inputs)[0]
    for weight in weights.values():
        weight.mul_(1.5)
    executable.bind(weights)
    after = executable.run(inputs)[0]
    assert not torch.allclose(before, after)
    assert torch.equal(after, compiled(graph, weights).run(inputs)[0])


def test_matrices_that_change_by_themselves_become_inputs_and_then_build_nothing(unet: tuple[Unet, Graph]) -> None:
    module, graph = unet
    weights, inputs = weights_of(module, graph), unet_inputs(module, 2, 8, 8, 9)
    executable = compiled(graph, weights)
    (matrices, convolutions) = ([n for n, w in weights.items() if w.dim() == dims] for dims in (2, 4))

    def change(names: list[str]) -> bool:
        """Change weights.  returns whether the model was built again"""
        for name in names:
            weights[name] = weights[name] * 1.1 + 0.01
        built = executable.bind(weights, names)
        found, expected = executable.run(inputs)[0], compiled(graph, weights).run(inputs)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return built

    adapted = matrices[::2]
    assert [change(adapted), change(adapted), change(adapted[:3])] == [True, False, False]
    assert [change(matrices[:4]), change(matrices[:4])] == [True, False]
    assert [change(convolutions[:1]), change(convolutions[:1])] == [True, True], "OpenVINO packs taps when it compiles"
    assert [change(list(weights)), change(adapted)] == [True, False], "another checkpoint, and then its LoRA"


def test_ranges_of_columns_of_a_matrix_that_is_an_input() -> None:
    module = Columns(whole=False).eval()
    graph = captured(nn.Sequential(module), torch.randn(2, 4, 16))
    weights = weights_of(nn.Sequential(module), graph)
    executable = compiled(graph, weights)
    (matrix,) = (name for name, weight in weights.items() if weight.dim() == 2)
    for built in (True, False):
        weights[matrix] = torch.randn(24, 16)
        assert executable.bind(weights, [matrix]) is built
        x = torch.randn(2, 4, 16)
        for found, expected in zip(executable.run([x]), eager(graph, weights, [x]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [False, True])
def test_an_edit_in_place_without_bind_changes_nothing(used: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 4, 1)
    module = nn.Sequential(*layers).to(dtype).eval()
    graph = captured(module, torch.randn(2, 4, 8, 8, dtype=dtype))
    weights = weights_of(module, graph)
    executable, reference = compiled(graph, weights), compiled(graph, {k: v.clone() for k, v in weights.items()})
    if used:
        executable.run([torch.randn(1, 4, 4, 4, dtype=dtype)])
    for weight in weights.values():
        weight.mul_(2)
    for size in (4, 9, 33):
        x = torch.randn(2, 4, size, size, dtype=dtype)
        assert torch.equal(executable.run([x])[0], reference.run([x])[0])


def test_weights_of_any_layout() -> None:
    module = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    inputs = [torch.randn(2, 8, 9, 7)]
    graph = captured(module, *inputs)
    weights = {p.name: dict(module.named_parameters())[p.meta["source"]] for p in graph.placeholders("parameter")}
    for share in (False, True):
        found = compiled(graph, weights, share=share).run(inputs)
        assert_agrees(found, eager(graph, weights, inputs), in_float64(nn.Sequential(module), inputs))


def test_shared_weights_outlive_their_owner() -> None:
    module = nn.Linear(64, 64).eval()
    graph = captured(module, torch.randn(2, 64))
    executable = compiled(graph, weights_of(module, graph), share=True)
    x = torch.randn(3, 64)
    assert torch.allclose(executable.run([x])[0], module(x), atol=1e-5)


# ---- running -------------------------------------------------------------------------------------------------------


def test_results_are_not_overwritten_by_the_next_run(unet: tuple[Unet, Graph]) -> None:
    module, graph = unet
    executable = compiled(graph, weights_of(module, graph))
    inputs = unet_inputs(module, 1, 8, 8, 9)
    first = executable.run(inputs)[0]
    kept = first.clone()
    executable.run(unet_inputs(module, 1, 8, 8, 9))
    assert torch.equal(first, kept)


def test_threads_may_share_an_executable() -> None:
    module = nn.Linear(32, 32).eval()
    graph = captured(module, torch.randn(2, 32))
    executable = compiled(graph, weights_of(module, graph))
    wrong = []

    def work(seed: int) -> None:
        x = torch.randn(seed + 1, 32, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            with torch.no_grad():
                if not torch.allclose(executable.run([x])[0], module(x), atol=1e-5):
                    wrong.append(seed)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


class Columns(nn.Module):
    """Ranges of columns of one linear, and the same as a whole."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.linear, self.whole = nn.Linear(16, 24), whole

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.linear(x)
        first, second = y.chunk(2, -1)
        return [first * nn.functional.gelu(second), y[..., -5:], y.sum() if self.whole else first]


@pytest.mark.parametrize("whole", [False, True])
def test_ranges_of_columns(whole: bool) -> None:
    module = Columns(whole).eval()
    agrees(nn.Sequential(module), lambda n: [torch.randn(n, 4, 16)])


class Cross(nn.Module):
    """Attention of pictures to text, whose lengths are symbols, with and without fewer heads for keys."""

    def __init__(self, gqa: bool) -> None:
        super().__init__()
        self.gqa, self.text = gqa, nn.Linear(24, 32 if gqa else 64)

    def forward(self, q: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, kv = (x.unflatten(-1, (x.shape[-1] // 16, 16)).transpose(1, 2) for x in (q, self.text(text)))
        attended = nn.functional.scaled_dot_product_attention(q, kv, kv * 0.5, enable_gqa=self.gqa)
        return attended.transpose(1, 2)


@pytest.mark.parametrize("gqa", [False, True])
def test_cross_attention_at_lengths_off_the_grid(gqa: bool) -> None:
    def inputs(n: int) -> list[torch.Tensor]:
        return [torch.randn(n, 9 * n, 64), torch.randn(n, 8 * n - 3, 24)]

    def dims(name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
        return {0: DynamicDim(2, "batch", 1, 99), 1: DynamicDim(tensor.shape[1])}

    agrees(Cross(gqa).eval(), inputs, dims=dims)


class Infinite(nn.Module):
    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = x.masked_fill(~seen, -torch.inf)
        return hidden, torch.where(seen, x, torch.finfo(torch.float32).min), hidden.softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities(dtype: torch.dtype) -> None:
    inputs = [torch.randn(3, 8, 8, dtype=dtype), torch.rand(3, 8, 8) > 0.5]
    inputs[1] |= torch.eye(8).bool()
    graph = captured(Infinite(), *inputs)
    hidden, lowest, softmax = compiled(graph, {}, dtype).run(inputs)
    expected = eager(graph, {}, inputs)
    assert torch.equal(hidden, expected[0])
    assert torch.equal(lowest, expected[1])
    assert (softmax - expected[2]).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strided_input_lives_until_the_run_is_over(dtype: torch.dtype) -> None:
    module = nn.Linear(512, 512, dtype=dtype).eval()
    graph = captured(module, torch.randn(2, 512, dtype=dtype))
    executable = compiled(graph, weights_of(module, graph), dtype)
    for _ in range(5):
        x = torch.randn(512, 300, dtype=dtype)
        assert torch.equal(executable.run([x.T])[0], executable.run([x.T.contiguous()])[0])


class Oddities(nn.Module):
    """Results that are inputs, sizes, numbers and None; an input that nobody reads."""

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> Any:
        return x, x.shape[0], 3, None, x.new_zeros(x.shape[0] * x.shape[1] // 2)


def test_odd_results() -> None:
    inputs = [torch.randn(4, 6), torch.randn(3)]
    graph = captured(Oddities(), *inputs)
    executable = compiled(graph, {})
    given = [torch.randn(5, 7), torch.randn(2)]
    same, rows, three, nothing, zeros = executable.run(given)
    assert torch.equal(same, given[0])
    assert (rows, three, nothing, zeros.shape) == (5, 3, None, (17,))


# ---- what cannot be run --------------------------------------------------------------------------------------------


def test_what_cannot_be_translated_is_said_line_by_line() -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x) + torch.fft.rfft(x).real.sum()

    lines = unsupported(captured(Unknown(), torch.randn(4, 4)))
    assert len(lines) == 2
    assert all("no translation" in line for line in lines)


def test_float64_and_float16_are_refused() -> None:
    for dtype in (torch.float64, torch.float16):
        (line,) = unsupported(captured(nn.ReLU(), torch.randn(2, 3).to(dtype)))
        assert str(dtype).removeprefix("torch.") in line


def test_available() -> None:
    assert available() is None


def test_graph_is_left_as_it_was(unet: tuple[Unet, Graph]) -> None:
    module, graph = unet
    before = str(graph)
    compiled(graph, weights_of(module, graph))
    assert str(graph) == before
    assert graph.count(aten.linear.default) > 0
