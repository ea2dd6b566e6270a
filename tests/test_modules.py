"""Any module: what makes Stable Diffusion fast works on transformers, convolutional networks and a user's own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import allaprima as ap
from allaprima.config import Config
from allaprima.pipelines import eager

BACKENDS = ("aten", "auto")

# ---- four well-known networks


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1×1, 3×3, 1×1, each with a batch norm, in-place ReLUs, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)


class ResNet50(nn.Module):
    """All fifty layers, an eighth of the width."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)
        )
        blocks, channels = [], width
        for stage, depth in enumerate((3, 4, 6, 3)):
            for i in range(depth):
                blocks.append(Bottleneck(channels, width << stage, 2 if stage and i == 0 else 1))
                channels = 4 * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1), 1))


def resnet() -> nn.Module:
    module = ResNet50()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 1.5)
    return module


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                num_attention_heads=2, max_position_embeddings=64))  # fmt: skip


def vit() -> nn.Module:
    return ViTModel(ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8))  # fmt: skip


def llama() -> nn.Module:
    return LlamaModel(LlamaConfig(vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 90, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def picture(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch + height * width))


def ids(batch: int, length: int) -> dict[str, Any]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[:, length - length // 3 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    call: Callable[..., dict[str, Any]]
    sizes: tuple[tuple[int, ...], ...]


NETWORKS = {
    "BERT": Network(bert, ids, ((2, 12), (1, 7), (5, 33), (3, 64), (70, 5))),
    "ViT": Network(vit, lambda b: {"pixel_values": picture(b, 32, 32)}, ((2,), (1,), (7,), (70,))),
    "ResNet-50": Network(resnet, lambda b, h, w: {"x": picture(b, h, w)}, ((2, 64, 64), (1, 64, 96), (3, 72, 40))),
    "Llama": Network(
        llama, lambda b, n: {"input_ids": tokens(b, n), "use_cache": False}, ((2, 12), (1, 7), (5, 33), (70, 5))
    ),
}


def built(network: Network) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network.build().eval()


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def in_double(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}


def rms(tensors: list[torch.Tensor]) -> float:
    return torch.cat([t.double().flatten() for t in tensors]).square().mean().sqrt().item()


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=NETWORKS)
def optimized(request: pytest.FixtureRequest, backend: str) -> tuple[Network, nn.Module, nn.Module]:
    network = NETWORKS[request.param]
    module = built(network)
    exact = copy.deepcopy(module).double()
    return network, ap.optimize(module, Config(backend=backend, cache_dir=None)), exact


def test_results_are_as_near_to_the_truth_as_eager_at_every_size(optimized: Any) -> None:
    network, module, exact = optimized
    truths, ours, theirs = [], [], []
    for sizes in network.sizes:
        call = network.call(*sizes)
        with torch.no_grad():
            truths.append(first(exact(**in_double(call))))
            ours.append(first(module(**call)) - truths[-1])
            with eager(module):
                theirs.append(first(module(**call)) - truths[-1])
    rounding = torch.finfo(torch.float32).eps * rms(truths)
    assert rms(ours) <= 2 * rms(theirs) + rounding
    report = ap.explain(module)
    assert report.captures == 1
    assert not report.fallbacks


def test_the_result_has_the_type_that_the_module_gives_it(optimized: Any) -> None:
    network, module, _ = optimized
    call = network.call(*network.sizes[0])
    with torch.no_grad():
        ours = module(**call)
        with eager(module):
            theirs = module(**call)
    assert type(ours) is type(theirs)
    assert getattr(ours, "keys", list)() == getattr(theirs, "keys", list)()


def test_rules_fire(optimized: Any) -> None:
    network, module, _ = optimized
    with torch.no_grad():
        module(**network.call(*network.sizes[0]))
    assert sum(ap.explain(module).fired.values()) > 10


def test_an_edited_weight_is_noticed(optimized: Any) -> None:
    network, module, _ = optimized
    call = network.call(*network.sizes[0])
    with torch.no_grad():
        before = first(module(**call))
        for parameter in module.parameters():
            parameter.mul_(1.01)
        after = first(module(**call))
        with eager(module):
            expected = first(module(**call))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


# ---- a user's own modules


class Pair(nn.Module):
    """Two linears, and a result of the shape that `pack` gives it."""

    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.pack = pack

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(self, self.a(x), self.b(x), x)


@dataclass
class Both:
    a: torch.Tensor
    b: torch.Tensor


PACKS: dict[str, Callable[..., Any]] = {
    "a tensor": lambda m, a, b, x: a + b,
    "a tuple": lambda m, a, b, x: (a, b),
    "a dictionary": lambda m, a, b, x: {"a": a, "more": [b, {"none": None, "two": 2, "text": "t"}]},
    "the same tensor twice": lambda m, a, b, x: (a, a),
    "its input": lambda m, a, b, x: (x, a),
    "a view of its input": lambda m, a, b, x: (x[:, :2], a),
    "a parameter": lambda m, a, b, x: (m.a.weight, a),
    "something made of parameters only": lambda m, a, b, x: (m.a.weight @ m.b.weight, a),
    "a parameter for each row": lambda m, a, b, x: (m.a.bias.expand(x.shape[0], -1) * 2, a),
    "a tensor of its size": lambda m, a, b, x: (torch.full((x.shape[0], 2), 3.0), a),
    "a constant": lambda m, a, b, x: (torch.arange(4.0), a),
    "a size": lambda m, a, b, x: (x.shape[0], a),
    "twice a size": lambda m, a, b, x: (a, x.shape[0] * 2),
    "numbers": lambda m, a, b, x: (a, 3, 2.5, True),
    "whole numbers": lambda m, a, b, x: a.argmax(-1),
    "truths": lambda m, a, b, x: a > b,
    "a size as a number": lambda m, a, b, x: a * x.shape[0] ** -0.5 + b / x.shape[0],
    "a product of sizes": lambda m, a, b, x: a.flatten() * (x.shape[0] * x.shape[1]),
    "double": lambda m, a, b, x: a.double() + b,
    "bfloat16": lambda m, a, b, x: a.bfloat16() + b.bfloat16(),
    "half": lambda m, a, b, x: a.half(),
    "complex": lambda m, a, b, x: torch.view_as_complex(a.reshape(-1, 4, 2)),
    "a sorted tensor": lambda m, a, b, x: torch.sort(a, -1),
    "edited in place": lambda m, a, b, x: a.mul_(2).add_(b).clamp_(min=0),
    "written in part": lambda m, a, b, x: written_in_part(a, b),
}


def written_in_part(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, :3] = b[:, :3]
    return a


def same(ours: Any, theirs: Any, coarse: bool = False) -> None:
    """Equal up to rounding; `coarse` where the module itself rounds to fewer bits on the way."""
    assert ours.dtype == theirs.dtype
    rtol, atol = (2e-2, 2e-2) if coarse else (1e-5, 1e-6)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_a_module_may_return(pack: Callable[..., Any], backend: str) -> None:
    module = ap.optimize(Pair(pack).eval(), Config(backend=backend, cache_dir=None))
    for rows in (3, 5, 1):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            ours = module(x)
            with eager(module):
                theirs = module(x)
        assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(theirs)
        for mine, other in zip(*map(torch.utils._pytree.tree_leaves, (ours, theirs)), strict=True):
            if isinstance(other, torch.Tensor):
                same(mine, other, coarse=other.dtype in (torch.float16, torch.bfloat16))
            else:
                assert (type(mine), mine) == (type(other), other)
    assert not ap.explain(module).fallbacks
