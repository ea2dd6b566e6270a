"""PEFT's layers: what base and adapters amount to, against what PEFT itself computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from allaprima.tuners import (
    TunersWatch,
    in_force,
    layers_in_force,
    merged,
    peeled,
    state,
    tuners,
    unmerge_what_is_off,
)


class Layers(nn.Module):
    """One of each kind of layer that adapters are put on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.plain = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
        self.conv, self.pointwise, self.strided = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, stride=2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.embedding = nn.Embedding(7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


INPUTS = {"linear": (3, 6), "plain": (3, 6), "conv": (2, 4, 9, 7), "pointwise": (2, 4, 5, 5), "strided": (2, 4, 9, 7),
          "grouped": (2, 4, 9, 7), "embedding": ()}  # fmt: skip
LAYERS = [name for name in INPUTS if name not in ("grouped", "embedding")]


def lora(targets: list[str], **options: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **options)


CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "LoRA": lora,
    "rsLoRA": lambda targets: lora(targets, use_rslora=True),
    "ranks of their own": lambda targets: lora(targets, rank_pattern={"linear": 5}, alpha_pattern={"conv": 2}),
    "DoRA": lambda targets: lora(targets, use_dora=True),
    "LoHa": lambda targets: peft.LoHaConfig(r=3, alpha=5, target_modules=targets, init_weights=False),
    "LoHa, effective convolutions": lambda targets: peft.LoHaConfig(
        r=3, target_modules=targets, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": lambda targets: peft.LoKrConfig(r=3, alpha=5, target_modules=targets, init_weights=False),
    "OFT": lambda targets: peft.OFTConfig(
        r=0, oft_block_size=2, use_cayley_neumann=False, target_modules=[t for t in targets if t in ("linear", "plain")]
    ),
}


def adapted(config: Any, *names: str, dtype: torch.dtype = torch.float32) -> Any:
    module = Layers().to(dtype).eval()
    for i, name in enumerate(names or ("ink",)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two adapters, and of groups in a convolution
            peft.inject_adapter_in_model(config, module, name)
        torch.manual_seed(i + 1)
        for path, parameter in module.named_parameters():
            if f".{name}" in path or path.endswith(name):
                nn.init.normal_(parameter, std=0.3)
    for tuner in tuners(module):
        tuner.set_adapter(list(names or ("ink",)))
        tuner.to(dtype)
    return module.requires_grad_(False)


def given(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([0, 3, 6]) if name == "embedding" else torch.randn(INPUTS[name], dtype=dtype)


def rebuilt(tuner: Any, scale: float = 1.0) -> nn.Module:
    """The base layer with the merged weights."""
    layer = copy.deepcopy(tuner.get_base_layer())
    layer.load_state_dict(merged(tuner, scale), strict=False)
    return layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_weights_compute_what_the_layers_compute(kind: str) -> None:
    module = adapted(CONFIGS[kind](LAYERS))
    with peeled(module) as found:
        pass
    assert found
    for name, tuner in found.items():
        x = given(name)
        torch.testing.assert_close(rebuilt(tuner)(x), tuner(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tuner.get_base_layer()(x), tuner(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("embedding", lora(["embedding"])),
        ("linear", lora(["linear"], lora_bias=True)),
    ],
)
def test_what_peft_has_to_merge_itself(name: str, config: Any) -> None:
    (tuner,) = tuners(adapted(config))
    x = given(name)
    torch.testing.assert_close(rebuilt(tuner)(x), tuner(x), rtol=1e-4, atol=1e-5)


def test_several_adapters_and_a_scale() -> None:
    for tuner in tuners(adapted(lora(["linear", "conv"]), "ink", "chalk")):
        tuner.set_scale("ink", -0.4)
        x = given("linear" if isinstance(tuner.get_base_layer(), nn.Linear) else "conv")
        torch.testing.assert_close(rebuilt(tuner)(x), tuner(x), rtol=1e-4, atol=1e-5)
        made = rebuilt(tuner, 0.3)(x)
        tuner.scale_layer(0.3)
        torch.testing.assert_close(made, tuner(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    for tuner in tuners(adapted(lora(["linear", "conv"]), "ink", "chalk", dtype=dtype)):
        base = tuner.get_base_layer().weight
        exact = base.double()
        for name in ("ink", "chalk"):
            product = tuner.lora_B[name].weight.double().flatten(1) @ tuner.lora_A[name].weight.double().flatten(1)
            exact += product.view(base.shape) * tuner.scaling[name]
        ours = merged(tuner, 1.0)["weight"]
        assert ours.dtype == dtype
        half_an_ulp = torch.finfo(dtype).eps / 2 * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert bool(((ours.double() - exact).abs() <= half_an_ulp * 1.001).all())


def test_the_base_is_left_alone() -> None:
    for kind in ("LoRA", "DoRA", "LoHa"):
        for tuner in tuners(adapted(CONFIGS[kind](LAYERS))):
            before = {name: p.clone() for name, p in tuner.named_parameters()}
            merged(tuner, 0.5)
            assert all(torch.equal(before[name], p) for name, p in tuner.named_parameters())
            assert not tuner.merged


def test_base_layers_stand_in_their_places_only_within_the_context() -> None:
    module = adapted(lora(["linear", "conv"]))
    plain = [name for name, _ in Layers().named_parameters()]
    with peeled(module) as found:
        assert [name for name, _ in module.named_parameters()] == plain
        assert set(found) == {"linear", "conv"}
        assert type(module.linear) is nn.Linear
    assert set(tuners(module)) == {module.linear, module.conv} == set(found.values())
    with pytest.raises(ZeroDivisionError), peeled(module):
        raise ZeroDivisionError
    assert module.linear is found["linear"]


def test_what_is_off_merged_or_not_there_is_not_in_force() -> None:
    module = adapted(lora(["linear"]), "ink", "chalk")
    (tuner,) = tuners(module)
    assert in_force(tuner) == ["ink", "chalk"]
    assert layers_in_force(module) == {"chalk": 1, "ink": 1}
    tuner.set_adapter(["chalk", "unknown"])
    assert in_force(tuner) == ["chalk"]
    assert layers_in_force(module) == {"chalk": 1, "ink": 0}
    tuner.merge(adapter_names=["ink"])
    assert in_force(tuner) == [], "a merged layer computes with its base alone"
    assert state(tuner, 1.0) is None
    tuner.enable_adapters(False)
    x = given("linear")
    unmerge_what_is_off(tuner)
    assert not tuner.merged
    assert in_force(tuner) == []
    torch.testing.assert_close(tuner(x), tuner.get_base_layer()(x))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scale": lambda tuner: tuner.set_scale("ink", 0.7),
    "other adapter": lambda tuner: tuner.set_adapter("chalk"),
    "one more": lambda tuner: tuner.set_adapter(["ink", "chalk"]),
    "off": lambda tuner: tuner.enable_adapters(False),
    "merged": lambda tuner: tuner.merge(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_watch_notices(change: str) -> None:
    module = adapted(lora(["linear", "conv"]), "ink", "chalk")
    for tuner in tuners(module):
        tuner.set_adapter("ink")
    watch = TunersWatch(module)
    before = state(module.conv, 1.0)
    assert watch.unchanged()
    CHANGES[change](module.conv)
    assert not watch.unchanged()
    assert state(module.conv, 1.0) != before


def test_the_watch_notices_one_adapter_merged_in_anothers_place() -> None:
    module = adapted(lora(["linear"]), "ink", "chalk")
    (tuner,) = tuners(module)
    tuner.merge(adapter_names=["ink"])
    watch = TunersWatch(module)
    tuner.unmerge()
    tuner.merge(adapter_names=["chalk"])
    assert not watch.unchanged()


def test_a_scale_that_diffusers_took_back_is_no_change() -> None:
    module = adapted(lora(["linear"]))
    (tuner,) = tuners(module)
    tuner.scaling["ink"] = 0.8
    watch, before = TunersWatch(module), state(tuner, 1.0)
    for scale in (0.3, 0.7, 1.1):
        tuner.scale_layer(scale)
        assert not watch.unchanged()
        tuner.unscale_layer(scale)
    assert tuner.scaling["ink"] != 0.8, "or this test shows nothing"
    assert watch.unchanged()
    assert state(tuner, 1.0) == before


def test_the_state_holds_the_adapters_own_weights_and_the_scale() -> None:
    (tuner,) = tuners(adapted(lora(["linear"])))
    before = state(tuner, 1.0)
    assert state(tuner, 1.0) == before
    assert state(tuner, 0.5) != before
    tuner.lora_A["ink"].weight.mul_(1)
    assert state(tuner, 1.0) != before


def test_what_peft_cannot_merge_is_named() -> None:
    (grouped,) = tuners(adapted(lora(["grouped"], rank_pattern={"grouped": 4})))
    with pytest.raises(ValueError, match=r"Conv2d cannot be merged: Merging is not supported.*groups"):
        merged(grouped, 1.0)
    module = adapted(lora(["linear"]))
    outer = module.linear
    inner = adapted(CONFIGS["LoHa"](["linear"])).linear
    outer.base_layer = inner
    with pytest.raises(ValueError, match="Linear around another adapter's layer"):
        merged(module.linear, 1.0)


def test_a_module_without_adapters() -> None:
    module = Layers()
    with peeled(module) as found:
        assert found == {}
    assert tuners(module) == []
    assert layers_in_force(module) == {}
    assert TunersWatch(module).unchanged()
