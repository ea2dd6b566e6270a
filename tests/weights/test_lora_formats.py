"""Keys of files are split and grouped; what is left over is named.  The numbers are in tests/test_merging.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from allaprima.errors import AdapterError
from allaprima.weights.deltas import Decomposed, Kronecker, LowRank
from allaprima.weights.lora_formats import understand

A, B = torch.ones(2, 6), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("x.lora_A.weight", "x.lora_B.weight"),
        ("x.lora_A.default.weight", "x.lora_B.default.weight"),
        ("x.lora_down.weight", "x.lora_up.weight"),
        ("x.lora.down.weight", "x.lora.up.weight"),
        ("x.lora_linear_layer.down.weight", "x.lora_linear_layer.up.weight"),
        ("x_lora.down.weight", "x_lora.up.weight"),
        ("x.down.weight", "x.up.weight"),
    ],
)
def test_all_writings_of_a_product(down: str, up: str) -> None:
    found = understand("ink", {down: A, up: B}, {})
    (layer,) = found.layers
    assert layer.name in ("x", "x_lora")
    assert sorted(layer.keys) == sorted((down, up))
    (change,) = layer.weight
    assert isinstance(change, LowRank)
    assert change.scale == 1.0
    assert change.shape == (5, 6)
    assert not found.unused


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 3}}, 1.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 3}}, 1.5),
        ({"lora_alpha": 8, "alpha_pattern": {"q": 3}}, 4.0),
    ],
)
def test_settings_of_peft_in_the_header_and_beside_it(settings: dict[str, Any], scale: float) -> None:
    tensors = {"unet.attn.to_q.lora_A.weight": A, "unet.attn.to_q.lora_B.weight": B}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    for found in (understand("ink", tensors, header), understand("ink", tensors, {}, settings)):
        (change,) = found.layers[0].weight
        assert change.scale == pytest.approx(scale, rel=1e-12)  # type: ignore[attr-defined]
        missed = ["alpha_pattern: q"] if "q" in settings.get("alpha_pattern", {}) else []
        assert list(found.unused) == missed


def test_an_alpha_in_the_tensors_goes_before_settings() -> None:
    tensors = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B, "unet.x.alpha": torch.tensor(3.0)}
    (change,) = understand("ink", tensors, {}, {"lora_alpha": 100}).layers[0].weight
    assert change.scale == 1.5  # type: ignore[attr-defined]


def test_two_whole_factors_have_no_scale() -> None:
    tensors = {"x.lokr_w1": A, "x.lokr_w2": B, "x.alpha": torch.tensor(1e10)}
    (change,) = understand("ink", tensors, {}).layers[0].weight
    assert isinstance(change, Kronecker)
    assert change.scale == 1.0


@pytest.mark.parametrize(
    ("key", "shape", "axis"),
    [
        ("dora_scale", (5, 1), 0),
        ("dora_scale", (5,), 0),
        ("dora_scale", (1, 6), 1),
        ("dora_scale", (1, 6, 1, 1), 1),
        ("lora_magnitude_vector", (5,), 0),
        ("lora_magnitude_vector.weight", (1, 5, 1, 1), 0),
        ("lora_magnitude_vector.default.weight", (5,), 0),
    ],
)
def test_magnitudes_of_rows_and_columns(key: str, shape: tuple[int, ...], axis: int) -> None:
    tensors = {"x.lora_A.weight": A, "x.lora_B.weight": B, f"x.{key}": torch.ones(shape)}
    found = understand("ink", tensors, {})
    (change,) = found.layers[0].weight
    assert isinstance(change, Decomposed)
    assert change.axis == axis
    assert change.fits(torch.Size((5, 6)))
    assert not found.unused


@pytest.mark.parametrize(
    "keys",
    [
        ("x.lora_A.weight",),
        ("x.lora_B.weight", "x.alpha"),
        ("x.hada_w1_a", "x.hada_w1_b", "x.hada_w2_a"),
        ("x.lokr_w1", "x.lokr_w2_a"),
        ("x.dora_scale",),
        ("x.weight",),
        ("x.bias", "step", "x.lora_C.weight"),
    ],
)
def test_what_is_no_whole_is_named(keys: tuple[str, ...]) -> None:
    found = understand("ink", dict.fromkeys(keys, A), {})
    assert not found.layers
    assert sorted(found.unused) == sorted(keys)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.lora_A.weight": A, "x.lora_B.weight": B.T},
        {"x.lora_A.weight": A[0], "x.lora_B.weight": B},
        {"x.lora_down.weight": A, "x.lora_up.weight": B, "x.lora_mid.weight": torch.ones(3, 2, 3, 3)},
        {"x.hada_w1_a": B, "x.hada_w1_b": A, "x.hada_w2_a": B, "x.hada_w2_b": A[:, 1:]},
        {"x.hada_w1_a": B, "x.hada_w1_b": A[:1], "x.hada_w2_a": B, "x.hada_w2_b": A},
        {"x.lokr_w1": A, "x.lokr_w2_a": B, "x.lokr_w2_b": A[:1]},
    ],
)
def test_factors_that_cannot_be_multiplied(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(AdapterError, match="do not belong together"):
        understand("ink", tensors, {})


@pytest.mark.parametrize(
    ("key", "metadata", "said"),
    [
        ("lora_unet_x_attn2_to_k", {}, None),
        ("unet.x.attn2.to_k", {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        ("lora_te2_x", {}, "SDXL"),
        ("transformer.single_transformer_blocks.0.x", {}, "Flux"),
    ],
)
def test_what_it_seems_to_be_for(key: str, metadata: dict[str, str], said: str | None) -> None:
    tensors = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    assert understand("ink", tensors, metadata).architecture == said


@pytest.mark.parametrize(("width", "said"), [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_the_width_of_the_text_tells_the_architecture(width: int, said: str) -> None:
    tensors = {"x.attn2.to_k.lora_A.weight": torch.ones(2, width), "x.attn2.to_k.lora_B.weight": B}
    assert understand("ink", tensors, {}).architecture == said
