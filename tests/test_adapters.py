"""diffusers' own calls for adapters on an optimized pipeline: they mean what they mean there; nothing is captured."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.pipelines import eager, engines
from allaprima.tuners import tuners
from tests import test_pipelines
from tests.test_pipelines import difference
from tests.tiny import tiny_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
NEAR = 1e-4
"""Of pictures between 0 and 1, in float32."""
BACKENDS = ["aten", "in place", "openvino"]

SMALL = {"height": 32, "width": 40, "num_inference_steps": 1}

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # several adapters are meant


@pytest.fixture(params=BACKENDS)
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> Any:
    """Optimized, and has drawn once.  "in place": parameters live in buffers that stay, as on a GPU."""
    if request.param == "in place":
        for module in ("runner", "engine"):
            monkeypatch.setattr(f"allaprima.{module}.stays_in_place", lambda device: True)
    backend = "openvino" if request.param == "openvino" else "aten"
    made = ap.optimize(tiny_pipeline(), Config(backend=backend, cache_dir=private_cache))
    draw(made)
    return made


def draw(pipe: Any, **options: Any) -> Any:
    return test_pipelines.draw(pipe, **{**SMALL, **options})


def state_dict(pipe: Any, seed: int, targets: list[str] | None = None) -> dict[str, torch.Tensor]:
    """A LoRA of the UNet as diffusers writes it."""
    maker = tiny_pipeline()
    maker.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets or TARGETS, init_lora_weights=False), "made")
    found = peft.utils.get_peft_model_state_dict(maker.unet, adapter_name="made")
    generator = torch.Generator().manual_seed(seed)
    return {f"unet.{name}": torch.randn(t.shape, generator=generator) * 0.25 for name, t in found.items()}


def load(pipe: Any, name: str = "ink", seed: int = 0) -> None:
    pipe.load_lora_weights(state_dict(pipe, seed), adapter_name=name)


def assert_as_eager(pipe: Any, **options: Any) -> Any:
    """Draw, optimized and not.  returns the picture"""
    drawn = draw(pipe, **options)
    with eager(pipe):
        assert difference(drawn, draw(pipe, **options)) < NEAR
    assert ap.explain(pipe).fallbacks == {}
    return drawn


def digest(pipe: Any) -> str:
    """Of what the programs read."""
    found = hashlib.sha256()
    for engine in engines(pipe).values():
        for name, tensor in sorted(engine._sources.tensors.items()):
            found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_every_call_of_diffusers(pipe: Any) -> None:
    captures, plain = ap.explain(pipe).captures, draw(pipe)
    load(pipe)
    ink = assert_as_eager(pipe)
    assert difference(ink, plain) > 1e-2
    load(pipe, "chalk", seed=1)
    changes: list[Callable[[], None]] = [
        lambda: pipe.set_adapters("chalk"),
        lambda: pipe.set_adapters(["ink", "chalk"], [-0.5, 1.7]),
        lambda: pipe.set_adapters(["ink"], [{"unet": {"down": 0.9, "mid": 0.0, "up": 0.4}}]),
        lambda: pipe.fuse_lora(lora_scale=0.7),
        lambda: (pipe.unfuse_lora(), pipe.set_adapters(["chalk", "ink"], [0.2, 0.2])),
        lambda: pipe.delete_adapters("chalk"),
        lambda: pipe.set_adapters("ink", 0.4),
    ]
    before = ink
    for change in changes:
        change()
        drawn = assert_as_eager(pipe)
        assert difference(drawn, before) > 1e-3
        before = drawn
    pipe.disable_lora()
    assert difference(draw(pipe), plain) < NEAR, "fusing and unfusing rounds"
    pipe.enable_lora()
    assert np.array_equal(draw(pipe), before)
    pipe.unload_lora_weights()
    assert_as_eager(pipe)
    assert ap.explain(pipe).captures == captures
    assert ap.explain(pipe).adapters == {}


def test_fusing_is_noticed_though_nothing_was_drawn_before(pipe: Any) -> None:
    """PEFT writes to the base through `.data`, which leaves no trace there."""
    plain = draw(pipe)
    load(pipe)
    pipe.fuse_lora()
    first = assert_as_eager(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert difference(assert_as_eager(pipe), plain) < NEAR, "fusing and unfusing rounds"
    load(pipe, seed=1)
    pipe.fuse_lora()
    second = assert_as_eager(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    load(pipe, seed=2)
    pipe.fuse_lora()
    third = assert_as_eager(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    load(pipe, seed=3)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fourth = assert_as_eager(pipe)
    for one, other in [(plain, first), (first, second), (second, third), (third, fourth)]:
        assert difference(one, other) > 1e-3


def test_the_scale_of_a_call(pipe: Any) -> None:
    load(pipe)
    full = assert_as_eager(pipe)
    half = assert_as_eager(pipe, cross_attention_kwargs={"scale": 0.5})
    none = assert_as_eager(pipe, cross_attention_kwargs={"scale": 0.0})
    assert difference(full, half) > 1e-3 < difference(half, none)
    runs = ap.explain(pipe).rebuilds
    assert np.array_equal(draw(pipe, cross_attention_kwargs={"scale": 0.0}), none)
    assert ap.explain(pipe).rebuilds == runs, "the same scale again changes no weights, at no step"
    assert np.array_equal(draw(pipe), full)


def test_loaded_before_optimize(private_cache: Path) -> None:
    pipe = tiny_pipeline()
    load(pipe)
    expected = draw(pipe)
    ap.optimize(pipe, Config(backend="aten", cache_dir=private_cache))
    assert difference(draw(pipe), expected) < NEAR
    ap.restore(pipe)
    assert np.array_equal(draw(pipe), expected)


def test_injected_by_hand_and_written_to_in_place(pipe: Any) -> None:
    plain = draw(pipe)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.unet, "hand")
    torch.manual_seed(0)
    for tuner in tuners(pipe.unet):
        torch.nn.init.normal_(tuner.lora_B["hand"].weight)
    first = assert_as_eager(pipe)
    with torch.no_grad():
        for tuner in tuners(pipe.unet):
            tuner.lora_B["hand"].weight.mul_(3)
    second = assert_as_eager(pipe)
    with torch.no_grad():
        for tuner in tuners(pipe.unet):
            tuner.get_base_layer().weight.mul_(2)
    third = assert_as_eager(pipe)
    for one, other in [(plain, first), (first, second), (second, third)]:
        assert difference(one, other) > 1e-3


def test_an_adapter_of_the_text_encoder(pipe: Any) -> None:
    plain, captures = draw(pipe), ap.explain(pipe).captures
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config, "words")
    words = assert_as_eager(pipe)
    assert difference(words, plain) > 1e-4
    assert difference(assert_as_eager(pipe, cross_attention_kwargs={"scale": 0.4}), words) > 1e-5
    assert np.array_equal(draw(pipe), words)
    assert ap.explain(pipe).captures == captures


@pytest.mark.parametrize("pipe", ["aten", "in place"], indirect=True)
def test_all_removed_gives_the_bits_back_whatever_was_between(pipe: Any) -> None:
    before, random = digest(pipe), np.random.default_rng(0)
    for name in ("ink", "chalk"):
        load(pipe, name, seed=len(name))
    seen = {before}
    for _ in range(12):
        names = [name for name in ("ink", "chalk") if random.random() < 0.7]
        (pipe.set_adapters(names, list(random.normal(size=len(names)))), pipe.enable_lora()) if names else (
            pipe.disable_lora()
        )
        draw(pipe)
        seen.add(digest(pipe))
    assert len(seen) > 8
    pipe.unload_lora_weights()
    draw(pipe)
    assert digest(pipe) == before


def test_parameters_go_on_meaning_the_base(pipe: Any) -> None:
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    load(pipe)
    draw(pipe)
    held = {name.replace(".base_layer", ""): p for name, p in pipe.unet.named_parameters() if "lora_" not in name}
    assert held.keys() == before.keys()
    assert all(torch.equal(held[name], before[name]) for name in before)
    ap.restore(pipe)
    assert all(torch.equal(held[name], before[name]) for name in before)


def test_in_place_nothing_that_is_recorded_moves(monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> None:
    for module in ("runner", "engine"):
        monkeypatch.setattr(f"allaprima.{module}.stays_in_place", lambda device: True)
    pipe = ap.optimize(tiny_pipeline(), Config(backend="aten", cache_dir=private_cache))
    draw(pipe)
    sources = engines(pipe)["unet"]._sources
    read = {name: tensor.data_ptr() for name, tensor in sources.tensors.items()}
    for change in (lambda: load(pipe), lambda: pipe.set_adapters("ink", 0.5), pipe.disable_lora, pipe.enable_lora,
                   pipe.fuse_lora, pipe.unfuse_lora, pipe.unload_lora_weights):  # fmt: skip
        change()
        draw(pipe)
        assert {name: tensor.data_ptr() for name, tensor in sources.tensors.items()} == read
    assert {name: p.data_ptr() for name, p in pipe.unet.named_parameters()} == read, "and the base is home again"


def test_what_is_no_change_of_weights_runs_eagerly_and_says_so(private_cache: Path) -> None:
    pipe = ap.optimize(tiny_pipeline(), Config(backend="aten", cache_dir=private_cache))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of the groups
        pipe.unet.conv_in = torch.nn.Conv2d(4, pipe.unet.conv_in.out_channels, 3, padding=1, groups=4)
        pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["conv_in"], init_lora_weights=False), "ink")
    drawn = draw(pipe)
    with eager(pipe):
        assert difference(drawn, draw(pipe)) < NEAR
        pipe.disable_lora()
        assert difference(drawn, draw(pipe)) > 1e-3
    (reason,) = ap.explain(pipe).fallbacks
    assert reason.startswith("unet: an adapter that is no change of weights (Conv2d cannot be merged")


@pytest.mark.parametrize("pipe", ["aten", "in place"], indirect=True)
def test_what_cannot_be_merged_is_never_forgotten(pipe: Any) -> None:
    """Looked at again because something else changed, it must not pass for what was seen before."""
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: these layers have no bias that it could be merged into
        pipe.unet.add_adapter(config, "ink")
    for _ in range(3):
        drawn = draw(pipe)
        with eager(pipe):
            assert difference(drawn, draw(pipe)) < NEAR
        with torch.no_grad():
            pipe.unet.conv_in.bias.add_(0.01)
    (reason,) = ap.explain(pipe).fallbacks
    assert reason.startswith("unet: an adapter that is no change of weights")
    assert ap.explain(pipe).fallbacks[reason] == 3


def test_on_a_processor_only_the_first_of_many_changes_builds() -> None:
    """LoRAs of matrices; the stages of step and prompt read some."""
    pipe = ap.optimize(tiny_pipeline(), Config(backend="openvino"))
    draw(pipe)
    pipe.load_lora_weights(state_dict(pipe, 0, ["to_q", "to_k", "to_v", "to_out.0"]), adapter_name="ink")
    assert_as_eager(pipe)
    first = ap.explain(pipe).rebuilds
    assert first > 0
    for weight in (0.3, -1.0, 2.0):
        pipe.set_adapters("ink", weight)
        assert_as_eager(pipe)
    assert ap.explain(pipe).rebuilds == first


def test_explain_names_adapters_and_their_layers() -> None:
    pipe = ap.optimize(tiny_pipeline(), Config(backend="aten", cache_dir=None))
    assert "adapters   none of PEFT's" in str(ap.explain(pipe))
    load(pipe)
    load(pipe, "chalk", seed=1)
    (found,) = ap.explain(pipe).adapters.values()
    assert found["chalk"] > 10
    assert found["ink"] == 0
    assert f"unet: chalk in {found['chalk']} layers, ink in 0 layers" in str(ap.explain(pipe))


def test_an_adapter_in_any_module() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    module = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(3, 4)
    expected = module(x)
    ap.optimize(module, Config(backend="aten", cache_dir=None))
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        module.set_adapter("default")
        module.base_model.model[0].set_scale("default", 0.0)
        torch.testing.assert_close(module(x), base[0].base_layer(x).tanh())
    assert ap.explain(module).fallbacks == {}
