"""IP-Adapter: pictures as prompts, by further keys and values in each cross-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import InputError
from allaprima.pipelines import eager, engines
from allaprima.stage import Time
from tests.pipelines.comparing import (
    MORE_SIZES,
    TOLERANCE,
    captures,
    difference,
    draw,
    no_fallbacks,
    picture,
    same_as_eager,
    same_at_all_sizes,
    size,
)
from tests.tiny import tiny_ip_adapter, tiny_ip_pipeline


@pytest.fixture(scope="module")
def pipe(cache: Path) -> Any:
    return ap.optimize(tiny_ip_pipeline(), Config(backend="aten", cache_dir=cache))


def shown(height: int, width: int) -> dict[str, Any]:
    return size(height, width) | {"ip_adapter_image": picture(50, 60)}


def test_every_size(pipe: Any) -> None:
    same_at_all_sizes(pipe, shown)
    assert engines(pipe)["image_encoder"].bound


def test_other_pictures_are_data(pipe: Any) -> None:
    first = same_as_eager(pipe, **shown(64, 64))
    before = captures(pipe)
    other = same_as_eager(pipe, **shown(64, 64) | {"ip_adapter_image": picture(80, 40, 3)})
    several = same_as_eager(pipe, **shown(64, 64) | {"ip_adapter_image": [[picture(40, 40, 1), picture(40, 40, 2)]]})
    assert captures(pipe) == before
    assert min(difference(first, other), difference(first, several)) > 1e-3


def test_its_keys_and_values_are_computed_once_a_prompt(pipe: Any) -> None:
    same_as_eager(pipe, **shown(64, 64))
    for runner in engines(pipe)["unet"].runners():
        read = [p.meta["source"] for p in runner.program.stages[Time.STEP].graph.placeholders("parameter", "derived")]
        assert not [name for name in read if "_ip" in name]


def test_its_strength_is_noticed(pipe: Any) -> None:
    first = same_as_eager(pipe, **shown(64, 64))
    pictures, before = [first], captures(pipe)
    for scale in (0.5, -0.3, {"down": 0.4, "mid": 1.0, "up": 0.7}):
        pipe.set_ip_adapter_scale(scale)
        pictures.append(same_as_eager(pipe, **shown(64, 64)))
    assert captures(pipe) == before
    pipe.set_ip_adapter_scale(0.0)
    pictures.append(same_as_eager(pipe, **shown(64, 64)))
    pipe.set_ip_adapter_scale(1.0)
    assert difference(first, same_as_eager(pipe, **shown(64, 64))) == 0
    assert captures(pipe) == before + 1, "a strength of zero leaves the adapter out"
    pairs = [(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(difference(a, b) for a, b in pairs) > 1e-3
    no_fallbacks(pipe)


def test_its_strength_changes_between_two_steps(pipe: Any) -> None:
    def weaker(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.8 - 0.2 * step)
        return {}

    changing = shown(64, 64) | {"callback_on_step_end": weaker, "num_inference_steps": 4}
    pipe.set_ip_adapter_scale(1.0)
    first = draw(pipe, **changing)
    pipe.set_ip_adapter_scale(1.0)
    with eager(pipe):
        assert difference(first, draw(pipe, **changing)) < TOLERANCE
    pipe.set_ip_adapter_scale(1.0)
    assert difference(first, draw(pipe, **changing | {"callback_on_step_end": None})) > 1e-3


def test_without_a_picture(pipe: Any) -> None:
    with pytest.raises(InputError, match="unload_ip_adapter"):
        draw(pipe, **size(64, 64))
    same_as_eager(pipe, **shown(64, 64))


@pytest.mark.slow
def test_two_adapters(cache: Path) -> None:
    pipe = ap.optimize(tiny_ip_pipeline(num_adapters=2), Config(backend="aten", cache_dir=cache))
    same_at_all_sizes(pipe, lambda h, w: size(h, w) | {"ip_adapter_image": [picture(50, 60), picture(64, 64, 1)]})


def test_loaded_and_unloaded_on_an_optimized_pipeline(cache: Path) -> None:
    pipe = ap.optimize(tiny_ip_pipeline(), Config(backend="aten", cache_dir=cache))
    pipe.unload_ip_adapter()
    plain = same_as_eager(pipe, **size(64, 64))
    pipe.register_modules(image_encoder=tiny_ip_pipeline().image_encoder)
    pipe.feature_extractor = tiny_ip_pipeline().feature_extractor
    pipe.load_ip_adapter(tiny_ip_adapter(pipe.unet), subfolder="", weight_name="")
    assert difference(plain, same_as_eager(pipe, **shown(64, 64))) > 1e-3
    no_fallbacks(pipe)


def test_on_openvino(cache: Path) -> None:
    pytest.importorskip("openvino")
    pipe = ap.optimize(tiny_ip_pipeline(), Config(backend="openvino", cache_dir=cache))
    same_at_all_sizes(pipe, shown, [(64, 64, 1), (72, 88, 2)])


@pytest.mark.slow
def test_more_sizes(pipe: Any) -> None:
    same_at_all_sizes(pipe, shown, MORE_SIZES)
