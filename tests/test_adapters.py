"""Adapters: until the engines can run them, they raise; they are never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import AdapterError
from allaprima.pipelines import eager
from tests.test_pipelines import difference, draw
from tests.tiny import tiny_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.getbasetemp() / "cache"
    return ap.optimize(tiny_pipeline(), Config(backend="aten", cache_dir=cache))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for the tiny UNet that changes the picture."""
    from peft.utils import get_peft_model_state_dict

    maker = tiny_pipeline()
    maker.unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "made")
    with torch.no_grad():
        for name, weight in maker.unet.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("lora")
    layers = get_peft_model_state_dict(maker.unet, adapter_name="made")
    maker.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def load(pipe: Any, lora: Path, name: str = "ink") -> None:
    pipe.load_lora_weights(lora, adapter_name=name)


def test_a_loaded_adapter_raises_and_an_unloaded_one_is_gone(pipe: Any, lora: Path) -> None:
    before = draw(pipe)
    load(pipe, lora)
    for _ in range(2):
        with pytest.raises(AdapterError, match="ink"):
            draw(pipe)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), before)


def test_the_adapter_works_eagerly_and_after_restore(pipe: Any, lora: Path) -> None:
    before = draw(pipe)
    load(pipe, lora)
    with eager(pipe):
        drawn = draw(pipe)
    assert difference(drawn, before) > 1e-3
    ap.restore(pipe)
    assert np.array_equal(draw(pipe), drawn)


def test_an_adapter_loaded_before_optimize_raises(lora: Path) -> None:
    pipe = tiny_pipeline()
    load(pipe, lora)
    ap.optimize(pipe, Config(backend="aten", cache_dir=None))
    with pytest.raises(AdapterError, match="ink"):
        draw(pipe)


def test_an_adapter_that_is_off_raises_too(pipe: Any, lora: Path) -> None:
    draw(pipe)
    load(pipe, lora)
    pipe.disable_lora()
    with pytest.raises(AdapterError):
        draw(pipe)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # that is what two adapters are
def test_switching_between_adapters_is_never_ignored(pipe: Any, lora: Path) -> None:
    draw(pipe)
    load(pipe, lora, "one")
    load(pipe, lora, "two")
    pipe.set_adapters(["one", "two"], [0.5, 0.2])
    with pytest.raises(AdapterError, match="one, two"):
        draw(pipe)
    pipe.delete_adapters("one")
    with pytest.raises(AdapterError, match="two"):
        draw(pipe)
    pipe.delete_adapters("two")


def test_a_fused_adapter_is_never_ignored(pipe: Any, lora: Path) -> None:
    before = draw(pipe)
    load(pipe, lora)
    pipe.fuse_lora()
    with pytest.raises(AdapterError):
        draw(pipe)
    pipe.unload_lora_weights()
    fused = draw(pipe)
    with eager(pipe):
        assert difference(fused, draw(pipe)) < 1e-4
    assert difference(fused, before) > 1e-3, "fused and unloaded: its weights stay in the base"


def test_an_adapter_of_the_text_encoder_raises(pipe: Any) -> None:
    draw(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "words")
    with pytest.raises(AdapterError, match=r"text_encoder.*words"):
        draw(pipe)


def test_an_adapter_in_any_module_raises() -> None:
    from peft import get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    module = ap.optimize(get_peft_model(base, LoraConfig(target_modules=["0"])).eval(), Config(cache_dir=None))
    with pytest.raises(AdapterError, match="default"):
        module(torch.randn(1, 4))
